#include "means.h"

#include "estimates.h"

#include <algorithm>

namespace fastsn {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Positions p in [0, length) with 0 <= p * stride + shift < limit: [first, last].
struct Range {
  int64_t first;
  int64_t last;
  Range(int64_t length, int64_t stride, int64_t shift, int64_t limit)
      : first(std::max<int64_t>(0, ceil_div(-shift, stride))),
        last(std::min(length - 1, floor_div(limit - 1 - shift, stride))) {}
  int64_t count() const { return std::max<int64_t>(0, last - first + 1); }
};

// The type to sum in: fp64 for fp64, fp32 for everything narrower.
at::ScalarType wide_type(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      "fastsn: ", name, " must be float64, float32, bfloat16 or float16, got ", type);
  TORCH_CHECK(
      tensor.layout() == at::kStrided, "fastsn: ", name, " must be strided (dense), got ",
      tensor.layout());
  check_storage(tensor, name);
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

Axes axes_of(
    at::IntArrayRef size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size,
    bool transposed) {
  TORCH_CHECK(size.size() <= 3, "fastsn: expected at most 3 spatial dimensions, got ", size.size());
  for (const auto& list : {kernel_size, stride, padding, dilation, output_size}) {
    TORCH_CHECK(
        list.size() == size.size(), "fastsn: expected ", size.size(),
        " entries, one per spatial dimension, got ", list.size());
  }
  Axes axes;
  for (size_t d = 0; d < size.size(); ++d) {
    TORCH_CHECK(
        kernel_size[d] > 0 && stride[d] > 0 && dilation[d] > 0 && output_size[d] >= 0,
        "fastsn: expected a positive kernel_size, stride and dilation and an output_size of at "
        "least 0, got ",
        kernel_size[d], ", ", stride[d], ", ", dilation[d], " and ", output_size[d]);
    Axis axis{size[d], transposed ? 1 : stride[d], {}};
    for (int64_t tap = 0; tap < kernel_size[d]; ++tap) {
      const int64_t shift = tap * dilation[d] - padding[d];
      if (transposed) {  // input p is added to output p * stride + shift
        const Range input(size[d], stride[d], shift, output_size[d]);
        axis.taps.push_back({input.first, input.count()});
      } else {  // output p reads input p * stride + shift
        const Range output(output_size[d], stride[d], shift, size[d]);
        axis.taps.push_back({output.first * stride[d] + shift, output.count()});
      }
    }
    axes.push_back(axis);
  }
  return axes;
}

at::ScalarType check_input(const at::Tensor& input, at::IntArrayRef kernel_size) {
  const auto dims = static_cast<int64_t>(kernel_size.size()) + 2;
  TORCH_CHECK(
      input.dim() == dims, "fastsn: expected an input of ", dims, " dimensions (N, C, *size) for ",
      "kernel_size ", kernel_size, ", got shape ", input.sizes());
  return wide_type(input, "input");
}

at::ScalarType check_gradient(
    const at::Tensor& grad, at::IntArrayRef input_size, at::ScalarType dtype) {
  TORCH_CHECK(
      input_size.size() >= 2, "fastsn: expected an input_size (N, C, *size), got ", input_size);
  TORCH_CHECK(
      grad.dim() == static_cast<int64_t>(input_size.size()) - 1 && grad.size(0) == input_size[1],
      "fastsn: expected a gradient of shape (C, *kernel_size) for input_size ", input_size,
      ", got ", grad.sizes());
  TORCH_CHECK(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "fastsn: dtype must be float64, float32, bfloat16 or float16, got ", dtype);
  return wide_type(grad, "grad");
}

BiasShape check_bias(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed) {
  const auto type = wide_type(weight, "weight");
  wide_type(patches, "patches");
  TORCH_CHECK(
      weight.dim() >= 2, "fastsn: expected a weight of at least 2 dimensions, got shape ",
      weight.sizes());
  TORCH_CHECK(
      groups > 0 && weight.size(0) % groups == 0,
      "fastsn: groups must divide the first dimension of the weight, ", weight.size(0), ", got ",
      groups);
  at::DimVector expected(weight.sizes());
  expected.erase(expected.begin() + (transposed ? 1 : 0));
  if (!transposed) {
    expected[0] *= groups;
  }
  TORCH_CHECK(
      patches.sizes() == expected && patches.device() == weight.device(),
      "fastsn: expected patches of shape ", at::IntArrayRef(expected), " on ", weight.device(),
      " for a weight of shape ", weight.sizes(), " in ", groups, " groups, got ", patches.sizes(),
      " on ", patches.device());
  const int64_t rows = transposed ? weight.size(1) : weight.size(0) / groups;
  const int64_t channels = groups * rows;
  for (const auto& [name, vector] : {std::pair("gain", &gain), std::pair("beta", &beta)}) {
    if (vector->has_value()) {
      const auto& x = **vector;
      wide_type(x, name);
      TORCH_CHECK(
          x.dim() == 1 && x.size(0) == channels && x.device() == weight.device(),
          "fastsn: expected a ", name, " of shape [", channels, "] on ", weight.device(), ", got ",
          x.sizes(), " on ", x.device());
    }
  }
  int64_t cols = transposed ? weight.size(0) / groups : weight.size(1);
  for (int64_t d = 2; d < weight.dim(); ++d) {
    cols *= weight.size(d);
  }
  return {type, channels, rows, cols};
}

}  // namespace fastsn
