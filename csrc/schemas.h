#pragma once

#include <torch/library.h>

namespace fastsn {

// Shapes: weights[l] any shape; estimate e matricizes weights[layers[e]] along dims[e] into
// (rows_e, cols_e); u[e] is (rows_e,), v[e] is (cols_e,). A snapshot is one flat fp32 (fp64 for
// fp64 weights) tensor: u and v of every estimate in turn, then one sigma per estimate.
//
// The split in two is what makes the pair functionalize: an operator that mutates and returns
// Tensor[] cannot. Gradients flow through `scale` alone, which reads the snapshot and never the
// live u and v, so that another forward before the backward changes nothing.
inline void define_operators(torch::Library& m) {
  m.def(
      "power_(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] layers, int[] dims, "
      "int[] n_power_iterations, float eps, bool v_first, bool zero_guard) -> Tensor");
  m.def("estimate(Tensor[] weights, Tensor[] u, Tensor[] v, int[] layers, int[] dims) -> Tensor");
  m.def(
      "scale(Tensor[] weights, Tensor snapshot, int[] layers, int[] dims, float[] scales, "
      "bool bound, bool zero_guard, ScalarType? dtype=None) -> Tensor[]");
  m.def(
      "scale_backward(Tensor[] grads, Tensor[] weights, Tensor snapshot, int[] layers, "
      "int[] dims, float[] scales, bool bound, bool zero_guard) -> Tensor[]");
}

}  // namespace fastsn
