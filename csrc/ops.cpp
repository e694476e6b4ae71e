#include "ops.h"

#include "schemas.h"

#include <ATen/core/dispatch/Dispatcher.h>

TORCH_LIBRARY(fastsn, m) { fastsn::define_operators(m); }

namespace fastsn {
namespace {

template <typename Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

at::Tensor power_(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  static const auto op = find<decltype(power_)>("fastsn::power_");
  return op.call(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard);
}

at::Tensor estimate(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims) {
  static const auto op = find<decltype(estimate)>("fastsn::estimate");
  return op.call(weights, u, v, layers, dims);
}

std::vector<at::Tensor> scale(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard,
    std::optional<at::ScalarType> dtype) {
  static const auto op = find<decltype(scale)>("fastsn::scale");
  return op.call(weights, snapshot, layers, dims, scales, bound, zero_guard, dtype);
}

std::vector<at::Tensor> scale_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  static const auto op = find<decltype(scale_backward)>("fastsn::scale_backward");
  return op.call(grads, weights, snapshot, layers, dims, scales, bound, zero_guard);
}

at::Tensor patch_mean(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average) {
  static const auto op = find<decltype(patch_mean)>("fastsn::patch_mean");
  return op.call(input, kernel_size, stride, padding, dilation, output_size, transposed, average);
}

at::Tensor patch_mean_backward(
    const at::Tensor& grad, c10::SymIntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average, at::ScalarType dtype, bool channels_last) {
  static const auto op = find<decltype(patch_mean_backward)>("fastsn::patch_mean_backward");
  return op.call(
      grad, input_size, stride, padding, dilation, output_size, transposed, average, dtype,
      channels_last);
}

std::tuple<at::Tensor, at::Tensor> mean_bias(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed) {
  static const auto op = find<decltype(mean_bias)>("fastsn::mean_bias");
  return op.call(weight, patches, gain, beta, groups, transposed);
}

}  // namespace fastsn
