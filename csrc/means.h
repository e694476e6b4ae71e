#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>

// Shapes that patch_mean, patch_mean_backward and mean_bias share on every device.
namespace fastsn {

// Along one spatial dimension, what each tap of a kernel meets: `count` positions of the input from
// `first` on, `step` apart. Along other dimensions the taps of a kernel are independent of it, so
// that a tap of the whole kernel meets the product of these sets.
struct Axis {
  struct Tap {
    int64_t first;
    int64_t count;
  };
  int64_t size;
  int64_t step;
  c10::SmallVector<Tap, 8> taps;
};

using Axes = c10::SmallVector<Axis, 3>;

// Checks the lists (one entry per dimension of `size`, at most three) and describes each dimension.
Axes axes_of(
    at::IntArrayRef size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size,
    bool transposed);

// Errors; the result is the type to sum in.
at::ScalarType check_input(const at::Tensor& input, at::IntArrayRef kernel_size);
at::ScalarType check_gradient(
    const at::Tensor& grad, at::IntArrayRef input_size, at::ScalarType dtype);

// What mean_bias computes with: a weight of `groups` slices along its first dimension, each of
// (rows, cols) once `transposed` ones exchange their first two dimensions.
struct BiasShape {
  at::ScalarType type;  // to sum in
  int64_t channels;     // C_out: groups * rows
  int64_t rows;
  int64_t cols;
};
BiasShape check_bias(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed);

}  // namespace fastsn
