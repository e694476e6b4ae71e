#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
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

}  // namespace fastsn
