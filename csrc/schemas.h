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

  // The batch mean of a convolution's output out of its input. input (N, C, *size) is what a
  // convolution with this kernel_size, stride, padding (in front of each dimension), dilation and
  // output_size reads (`transposed`: a transposed convolution). The result (C, *kernel_size), fp32
  // or wider, holds for each channel and tap the sum over the batch and the output positions of
  // what the tap is multiplied with, divided by N * prod(output_size) if `average`. All lists have
  // one entry per spatial dimension; empty ones make it the mean of (N, C) over N.
  m.def(
      "patch_mean(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "SymInt[] output_size, bool transposed, bool average) -> Tensor");
  // Its gradient with respect to any one sample of an input of this size, type and memory format,
  // of shape (C, *size); all samples have the same.
  m.def(
      "patch_mean_backward(Tensor grad, SymInt[] input_size, int[] stride, int[] padding, "
      "int[] dilation, SymInt[] output_size, bool transposed, bool average, ScalarType dtype, "
      "bool channels_last) -> Tensor");
  // mean (C_out,), fp32 or wider, of the convolution of this weight over patches (C_in, *kernel),
  // without gradient; and the bias beta - gain * mean that takes it away, in the weight's type.
  m.def(
      "mean_bias(Tensor weight, Tensor patches, Tensor? gain, Tensor? beta, int groups, "
      "bool transposed) -> (Tensor bias, Tensor mean)");
}

}  // namespace fastsn
