#pragma once

#include "../ops.h"

// The operators on the GPU.
namespace fastsn::cuda {

decltype(fastsn::power_) power_;
decltype(fastsn::estimate) estimate;
decltype(fastsn::scale) scale;
decltype(fastsn::scale_backward) scale_backward;

// Below the dispatcher all sizes are numbers.
at::Tensor patch_mean(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average);
at::Tensor patch_mean_backward(
    const at::Tensor& grad, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average, at::ScalarType dtype, bool channels_last);
decltype(fastsn::mean_bias) mean_bias;

}  // namespace fastsn::cuda
