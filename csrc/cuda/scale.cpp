#include "ops.h"
#include "weights.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>
#include <utility>

// fastsn::scale and fastsn::scale_backward on the GPU: from tensors to descriptors.
namespace fastsn::cuda {
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
