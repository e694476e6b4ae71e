#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

// Shapes: weights[l] any shape; estimate e matricizes weights[layers[e]] along dims[e] into
// (rows_e, cols_e); u[e] is (rows_e,), v[e] is (cols_e,). A snapshot is one flat fp32 (fp64 for
// fp64 weights) tensor: u and v of every estimate in turn, then one sigma per estimate.
//
// The split in two is what makes the pair functionalize: an operator that mutates and returns
// Tensor[] cannot. Gradients flow through `scale` alone, which reads the snapshot and never the
// live u and v, so that another forward before the backward changes nothing.
TORCH_LIBRARY(fastsn, m) {
  m.def(
      "power_(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] layers, int[] dims, "
      "int[] n_power_iterations, float eps, bool v_first, bool zero_guard) -> Tensor");
  m.def("estimate(Tensor[] weights, Tensor[] u, Tensor[] v, int[] layers, int[] dims) -> Tensor");
  m.def(
      "scale(Tensor[] weights, Tensor snapshot, int[] layers, int[] dims, float[] scales, "
      "bool bound, bool zero_guard) -> Tensor[]");
  m.def(
      "scale_backward(Tensor[] grads, Tensor[] weights, Tensor snapshot, int[] layers, "
      "int[] dims, float[] scales, bool bound, bool zero_guard) -> Tensor[]");
}

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
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard) {
  static const auto op = find<decltype(scale)>("fastsn::scale");
  return op.call(weights, snapshot, layers, dims, scales, bound, zero_guard);
}

std::vector<at::Tensor> scale_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  static const auto op = find<decltype(scale_backward)>("fastsn::scale_backward");
  return op.call(grads, weights, snapshot, layers, dims, scales, bound, zero_guard);
}

}  // namespace fastsn
