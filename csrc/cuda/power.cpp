#include "ops.h"
#include "weights.h"

#include <ATen/ops/empty.h>

#include <utility>

// fastsn::power_ and fastsn::estimate on the GPU: from tensors to descriptors.
namespace fastsn::cuda {
namespace {

// u or v as the kernels read and write it: itself, or a copy of an unusual one.
at::Tensor usable(const at::Tensor& x, at::ScalarType accumulate) {
  return x.to(accumulate).contiguous();
}

// Only what is written gets memory of its own, where a tensor shares it until then.
Vector vector_of(const at::Tensor& x, int64_t snapshot, bool is_written) {
  return {is_written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr()), snapshot};
}

}  // namespace

at::Tensor power_(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  check_weights(weights);
  const auto accumulate = accumulate_type(weights);
  const bool is_double = accumulate == at::kDouble;
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  check_vectors(estimates, weights, u, v, n_power_iterations);
  const size_t count = estimates.items.size();

  const c10::DeviceGuard guard(weights[0].device());
  const auto options = at::TensorOptions().dtype(accumulate).device(weights[0].device());
  const auto snapshot = at::empty({estimates.snapshot_numel}, options);
  auto* const units = static_cast<char*>(snapshot.mutable_data_ptr());
  std::vector<RestItem> resting;
  std::vector<PowerItem> items(count);
  std::vector<Types> types(count);
  std::vector<at::Tensor> us(count);
  std::vector<at::Tensor> vs(count);
  Places places;
  int64_t rounds = 1;
  for (size_t e = 0; e < count; ++e) {
    const auto& estimate = estimates.items[e];
    const auto& weight = dense[estimate.layer];
    auto& item = items[e];
    types[e] = {type_of(weight.scalar_type()), type_of(accumulate)};
    us[e] = usable(u[e], accumulate);
    vs[e] = usable(v[e], accumulate);
    item.weight = weight.const_data_ptr();
    item.matrix = matrix_of(estimate.view);
    const bool members_are_columns = item.matrix.members_are_columns;
    item.only_estimate = n_power_iterations[estimate.layer] <= 0;
    auto u_vector = vector_of(us[e], estimate.u, !item.only_estimate);
    auto v_vector = vector_of(vs[e], estimate.v, !item.only_estimate);
    if (item.only_estimate) {
      for (const auto& [vector, length] :
           {std::pair(&u_vector, us[e].numel()), std::pair(&v_vector, vs[e].numel())}) {
        const int64_t tiles = rest_tiles(length);
        const int64_t parts = tiles > 1 ? places.take(2 * tiles) : 0;
        resting.push_back({vector->live, vector->snapshot, length, parts});
        vector->live = units + vector->snapshot * static_cast<int64_t>(snapshot.element_size());
      }
    }
    item.member = members_are_columns ? v_vector : u_vector;
    item.unit = members_are_columns ? u_vector : v_vector;
    item.sigma = estimate.sigma;
    const bool starts_with_v = v_first == estimate.first;  // v comes out first, u goes in
    const bool unit_first = !item.only_estimate && starts_with_v == members_are_columns;
    item.cut =
        cut(item.matrix, unit_first, is_aligned(weight), static_cast<int>(weight.element_size()));
    item.ticket = static_cast<int32_t>(e);
    item.first = places.take(first_length(item));
    item.second = places.take(second_length(item));
    item.partial = places.take(item.cut.tiles * second_length(item));
    item.first_squares = places.take(item.cut.tiles);
    item.second_squares = places.take(reduce_blocks(item));
    item.norms = places.take(kNormNumel);
    rounds = std::max(rounds, n_power_iterations[estimate.layer]);
  }

  // The counters come last; an element has room for one at least.
  const auto workspace = at::empty({places.numel() + static_cast<int64_t>(count)}, options);
  const auto bytes = static_cast<char*>(workspace.mutable_data_ptr());
  PowerCall call{};
  call.snapshot = snapshot.mutable_data_ptr();
  call.workspace = bytes;
  call.tickets = reinterpret_cast<int*>(bytes + places.numel() * workspace.element_size());
  call.eps = eps;
  call.zero_guard = zero_guard;
  const auto place = where(weights[0].device());
  check(rest(place, is_double, resting.data(), static_cast<int64_t>(resting.size()), call), "rest");
  for (int64_t round = 0; round < rounds; ++round) {
    if (round > 0) {
      size_t kept = 0;
      for (size_t k = 0; k < items.size(); ++k) {
        const auto layer = estimates.items[items[k].ticket].layer;
        if (n_power_iterations[layer] > round) {
          items[kept] = items[k];
          types[kept++] = types[k];
        }
      }
      items.resize(kept);
      types.resize(kept);
    }
    call.first_round = round == 0;
    for_each_type(items, types, [&](Types own, const PowerItem* some, int64_t n) {
      check(multiply(place, own.weight, some, n, call), "multiply");
    });
    check(
        finish(place, is_double, items.data(), static_cast<int64_t>(items.size()), call), "finish");
  }

  for (size_t e = 0; e < count; ++e) {
    if (n_power_iterations[estimates.items[e].layer] > 0) {
      if (!us[e].is_same(u[e])) {
        u[e].copy_(us[e]);
      }
      if (!vs[e].is_same(v[e])) {
        v[e].copy_(vs[e]);
      }
    }
  }
  return snapshot;
}

at::Tensor estimate(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims) {
  const std::vector<int64_t> none(weights.size(), 0);
  return cuda::power_(weights, u, v, layers, dims, none, 0, false, false);
}

}  // namespace fastsn::cuda
