#include "ops.h"

#include "../estimates.h"
#include "host.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <utility>

// The operators on weights: from tensors to descriptors.
namespace fastsn::cuda {
namespace {

Matrix matrix_of(const MatrixView& view) {
  // Leaves room for the steps of a loop beyond the end.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() - (1 << 16);
  const bool units_are_rows = view.outer == 1 || view.rows == 1;  // and members columns
  const int64_t unit_length = units_are_rows ? view.cols() : view.rows * view.inner;
  TORCH_CHECK(
      view.rows <= kLargest && view.cols() <= kLargest && unit_length <= kLargest,
      "fastsn: on a GPU a matrix may have up to ", kLargest, " rows and columns, got ", view.rows,
      " and ", view.cols(), ", and as many elements in a run of rows, got ", unit_length);
  TORCH_CHECK(
      units_are_rows || view.rows <= kLargest / std::max<int64_t>(view.inner, 1),
      "fastsn: on a GPU rows that lie between each other may have up to ", kLargest,
      " elements together, got ", view.rows, " times ", view.inner);
  TORCH_CHECK(
      view.digits.size() <= kMaxDigits,
      "fastsn: on a GPU the columns of a weight may lie in memory in at most ", kMaxDigits,
      " permuted runs, got ", view.digits.size(), "; call .contiguous() on it");
  Matrix matrix{};
  matrix.members_are_columns = units_are_rows;
  matrix.units = static_cast<int32_t>(units_are_rows ? view.rows : view.outer);
  matrix.members = static_cast<int32_t>(units_are_rows ? view.cols() : view.rows);
  matrix.inner = static_cast<int32_t>(units_are_rows ? 1 : view.inner);
  matrix.digits.count = static_cast<int32_t>(view.digits.size());
  for (size_t k = 0; k < view.digits.size(); ++k) {
    matrix.digits.size[k] = static_cast<int32_t>(view.digits[k].size);
    matrix.digits.stride[k] = static_cast<int32_t>(view.digits[k].stride);
    const auto by_size = divisor(view.digits[k].size);
    matrix.digits.multiplier[k] = by_size.multiplier;
    matrix.digits.shift[k] = static_cast<uint8_t>(by_size.shift);
  }
  return matrix;
}

// u or v as the kernels read and write it: itself, or a copy of an unusual one.
at::Tensor usable(const at::Tensor& x, at::ScalarType accumulate) {
  return x.to(accumulate).contiguous();
}

// Only what is written gets memory of its own, where a tensor shares it until then.
Vector vector_of(const at::Tensor& x, int64_t snapshot, bool is_written) {
  return {is_written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr()), snapshot};
}

// Hands out places in a workspace, each at the beginning of a pack.
class Places {
 public:
  int64_t take(int64_t numel) {
    const int64_t start = numel_;
    numel_ += ceil_div(numel, kPack) * kPack;
    return start;
  }

  int64_t numel() const { return numel_; }

 private:
  int64_t numel_ = 0;
};

// A kernel for each pair of types: that of a weight and that of what goes with it.
struct Types {
  Type weight;
  Type other;

  bool operator==(const Types& types) const {
    return weight == types.weight && other == types.other;
  }
};

// launch(types, items, count) for the items of each pair of types.
template <typename Item, typename Launch>
void for_each_type(
    const std::vector<Item>& items, const std::vector<Types>& types, const Launch& launch) {
  std::vector<bool> done(items.size(), false);
  std::vector<Item> own;
  for (size_t first = 0; first < items.size(); ++first) {
    if (done[first]) {
      continue;
    }
    if (std::all_of(types.begin(), types.end(), [&](Types t) { return t == types[first]; })) {
      launch(types[first], items.data(), static_cast<int64_t>(items.size()));
      return;
    }
    own.clear();
    for (size_t k = first; k < items.size(); ++k) {
      if (types[k] == types[first]) {
        own.push_back(items[k]);
        done[k] = true;
      }
    }
    launch(types[first], own.data(), static_cast<int64_t>(own.size()));
  }
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

namespace {

// The same type, or fp32 weights and what autocast asks for.
bool has_kernel(at::ScalarType weight, at::ScalarType other) {
  return weight == other ||
      (weight == at::kFloat && (other == at::kBFloat16 || other == at::kHalf));
}

// Makes what at::empty_like makes of dense tensors, but only the first through the dispatcher,
// whose work takes most of the time. That one tells which allocator torch uses at present: it can
// be replaced, and the one that is registered for a device is then not even set up.
class Results {
 public:
  explicit Results(size_t count) { made_.reserve(count); }

  const at::Tensor& add(const at::Tensor& like, at::ScalarType type) {
    if (made_.empty()) {
      made_.push_back(at::empty_like(like, like.options().dtype(type)));
    } else {
      const auto& first = made_.front();
      const c10::DispatchKeySet keys(c10::computeDispatchKey(type, at::kStrided, first.device()));
      made_.push_back(
          at::detail::empty_strided_generic(
              like.sizes(), like.strides(), first.storage().allocator(), keys, type));
    }
    return made_.back();
  }

  std::vector<at::Tensor> take() { return std::move(made_); }

 private:
  std::vector<at::Tensor> made_;
};

std::vector<at::Tensor> run_scale(
    at::TensorList weights, const at::Tensor& snapshot, const Estimates& estimates,
    at::ArrayRef<double> scales, bool bound, bool zero_guard, std::optional<at::ScalarType> dtype) {
  Results results(weights.size());
  std::vector<ScaleItem> items(weights.size());
  std::vector<Types> types(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto& weight = weights[l];
    const int64_t first = estimates.first_of_layer[l];
    const auto& out = results.add(weight, dtype.value_or(weight.scalar_type()));
    types[l] = {type_of(weight.scalar_type()), type_of(out.scalar_type())};
    auto& item = items[l];
    item.weight = weight.const_data_ptr();
    item.out = out.mutable_data_ptr();
    item.numel = weight.numel();
    item.sigma = estimates.items[first].sigma;
    item.scale = scales[l];
    item.estimates = static_cast<int32_t>(estimates.first_of_layer[l + 1] - first);
    item.vectorized = is_aligned(weight) && is_aligned(out);
  }
  const ScaleCall call{snapshot.const_data_ptr(), nullptr, bound, zero_guard};
  const auto place = where(snapshot.device());
  for_each_type(items, types, [&](Types own, const ScaleItem* some, int64_t n) {
    check(scale(place, own.weight, own.other, some, n, call), "scale");
  });
  return results.take();
}

std::vector<at::Tensor> run_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    const Estimates& estimates, at::ArrayRef<double> scales, bool bound, bool zero_guard) {
  Results results(weights.size());
  std::vector<at::Tensor> strided;
  std::vector<BackwardItem> items(weights.size());
  std::vector<Types> types(weights.size());
  strided.reserve(weights.size());
  Places places;
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto& weight = weights[l];
    const int64_t first = estimates.first_of_layer[l];
    const int64_t count = estimates.first_of_layer[l + 1] - first;
    TORCH_CHECK(
        count <= kMaxEstimates, "fastsn: on a GPU a weight may have up to ", kMaxEstimates,
        " estimates, got ", count);
    const auto& out = results.add(weight, weight.scalar_type());
    strided.push_back(with_strides_of(grads[l], weight));
    types[l] = {type_of(weight.scalar_type()), type_of(strided[l].scalar_type())};
    auto& item = items[l];
    item.grad = strided[l].const_data_ptr();
    item.weight = weight.const_data_ptr();
    item.out = out.mutable_data_ptr();
    item.numel = weight.numel();
    item.sigma = estimates.items[first].sigma;
    item.scale = scales[l];
    item.tile = product_tile(item.numel);
    item.products = static_cast<int32_t>(ceil_div(item.numel, item.tile));
    item.product = places.take(item.products);
    item.estimates = static_cast<int32_t>(count);
    item.vectorized = is_aligned(weight) && is_aligned(out) && is_aligned(strided[l]);
    for (int64_t k = 0; k < count; ++k) {
      const auto& estimate = estimates.items[first + k];
      auto& outer = item.outers[k];
      const auto& matrix = outer.matrix = matrix_of(estimate.view);
      const auto length = std::max<int64_t>(int64_t{matrix.members} * matrix.inner, 1);
      outer.by_length = divisor(length);
      outer.one_over_length = std::numeric_limits<uint64_t>::max() / static_cast<uint64_t>(length);
      outer.by_inner = divisor(std::max(matrix.inner, 1));
      outer.snapshot = estimate.u;
      outer.vectors = places.take(matrix.members);
      places.take(unit_length(matrix));
    }
  }
  const auto workspace = at::empty({places.numel()}, snapshot.options());
  const ScaleCall call{snapshot.const_data_ptr(), workspace.mutable_data_ptr(), bound, zero_guard};
  const auto place = where(snapshot.device());
  for_each_type(items, types, [&](Types own, const BackwardItem* some, int64_t n) {
    check(product(place, own.weight, own.other, some, n, call), "product");
    check(gradient(place, own.weight, own.other, some, n, call), "gradient");
  });
  return results.take();
}

}  // namespace

std::vector<at::Tensor> scale(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard,
    std::optional<at::ScalarType> dtype) {
  check_weights(weights);
  const auto accumulate = accumulate_type(weights);
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  check_snapshot(estimates, dense, snapshot, scales);
  const c10::DeviceGuard guard(snapshot.device());
  const bool fits = !dtype || std::all_of(dense.begin(), dense.end(), [&](const auto& weight) {
    return has_kernel(weight.scalar_type(), *dtype);
  });
  if (fits) {
    return run_scale(dense, snapshot, estimates, scales, bound, zero_guard, dtype);
  }
  const auto wide = converted(dense, accumulate);
  return converted(
      run_scale(wide, snapshot, estimates, scales, bound, zero_guard, std::nullopt), *dtype);
}

std::vector<at::Tensor> scale_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  check_weights(weights);
  const auto accumulate = accumulate_type(weights);
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  check_snapshot(estimates, dense, snapshot, scales);
  check_gradients(grads, weights);
  const c10::DeviceGuard guard(snapshot.device());
  const bool fits = std::equal(
      dense.begin(), dense.end(), grads.begin(), [](const auto& weight, const auto& grad) {
        return has_kernel(weight.scalar_type(), grad.scalar_type());
      });
  if (fits) {
    return run_backward(grads, dense, snapshot, estimates, scales, bound, zero_guard);
  }
  return converted_like(
      run_backward(
          converted(grads, accumulate), converted(dense, accumulate), snapshot, estimates, scales,
          bound, zero_guard),
      dense);
}

}  // namespace fastsn::cuda
