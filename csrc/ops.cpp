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

}  // namespace fastsn
