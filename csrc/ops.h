#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <tuple>
#include <vector>

// The operators, as C++ functions that go through the dispatcher. Their schemas are in schemas.h.
namespace fastsn {

at::Tensor power_(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard);

at::Tensor estimate(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims);

std::vector<at::Tensor> scale(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard,
    std::optional<at::ScalarType> dtype);

std::vector<at::Tensor> scale_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard);

at::Tensor patch_mean(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average);

at::Tensor patch_mean_backward(
    const at::Tensor& grad, c10::SymIntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average, at::ScalarType dtype, bool channels_last);

std::tuple<at::Tensor, at::Tensor> mean_bias(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed);

}  // namespace fastsn
