#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

// The operators, as C++ functions that go through the dispatcher. Their schemas are in ops.cpp.
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
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard);

std::vector<at::Tensor> scale_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard);

}  // namespace fastsn
