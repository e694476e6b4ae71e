#include "../means.h"
#include "host.h"
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>

// patch_mean, patch_mean_backward and mean_bias: from tensors to descriptors.
namespace fastsn::cuda {
namespace {

constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() / 2;

void check_size(int64_t size, const char* name) {
  TORCH_CHECK(
      size <= kLargest, "fastsn: on a GPU ", name, " may be up to ", kLargest, ", got ", size);
}

Geometry geometry_of(
    at::IntArrayRef size, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size,
    bool transposed) {
  axes_of(size, kernel_size, stride, padding, dilation, output_size, transposed);  // checks
  Geometry geometry{{{1, 1, 1, 0, 1, 1}, {1, 1, 1, 0, 1, 1}, {1, 1, 1, 0, 1, 1}}, transposed};
  constexpr int64_t kMostTaps = 1 << 20;
  int64_t taps = 1;
  for (size_t d = 0; d < size.size(); ++d) {
    // All positions that the kernels compute, from the first to the last.
    const auto reach = static_cast<double>(kernel_size[d]) * static_cast<double>(dilation[d]) +
        std::abs(static_cast<double>(padding[d])) +
        static_cast<double>(std::max(size[d], output_size[d]) + 1) * static_cast<double>(stride[d]);
    TORCH_CHECK(
        reach <= static_cast<double>(kLargest), "fastsn: on a GPU a convolution may reach over up ",
        "to ", kLargest, " positions, got size ", size[d], ", kernel_size ", kernel_size[d],
        ", stride ", stride[d], ", padding ", padding[d], " and dilation ", dilation[d]);
    taps = std::min(kernel_size[d], kMostTaps + 1) * taps;
    TORCH_CHECK(
        taps <= kMostTaps, "fastsn: on a GPU a kernel may have up to ", kMostTaps,
        " positions, got kernel_size ", kernel_size);
    geometry.axes[kMaxAxes - size.size() + d] = {
        static_cast<int32_t>(size[d]),     static_cast<int32_t>(kernel_size[d]),
        static_cast<int32_t>(stride[d]),   static_cast<int32_t>(padding[d]),
        static_cast<int32_t>(dilation[d]), static_cast<int32_t>(output_size[d])};
  }
  return geometry;
}

// Of tensors (N, C, *size) that are dense, with the channels innermost or else contiguous.
Layout layout_of(at::IntArrayRef size, bool channels_inside) {
  int64_t rows = 1;
  for (size_t d = 2; d + 1 < size.size(); ++d) {
    rows *= size[d];
  }
  check_size(size[0], "the number of samples");
  check_size(size[1], "the number of channels");
  check_size(rows, "the product of all sizes but the last");
  Layout layout{};
  layout.samples = size[0];
  layout.outer = channels_inside ? 1 : static_cast<int32_t>(size[1]);
  layout.rows = static_cast<int32_t>(rows);
  layout.columns = size.size() > 2 ? static_cast<int32_t>(size.back()) : 1;
  layout.inner = channels_inside ? static_cast<int32_t>(size[1]) : 1;
  return layout;
}

bool has_channels_inside(const at::Tensor& x) {
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool good = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return good;
  };
  bool good = fits(1);
  for (int64_t d = x.dim() - 1; d > 1; --d) {
    good = fits(d) && good;
  }
  return fits(0) && good;
}

double divisor_of(int64_t samples, at::IntArrayRef output_size, bool average) {
  double divisor = 1;
  if (average) {
    divisor = static_cast<double>(samples);
    for (const int64_t size : output_size) {
      divisor *= static_cast<double>(size);
    }
  }
  return divisor;
}

at::Tensor plain(const at::Tensor& x, at::ScalarType type) { return x.to(type).contiguous(); }

}  // namespace

at::Tensor patch_mean(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average) {
  const auto type = check_input(input, kernel_size);
  const auto geometry = geometry_of(
      input.sizes().slice(2), kernel_size, stride, padding, dilation, output_size, transposed);
  const double divisor = divisor_of(input.size(0), output_size, average);
  at::DimVector shape{input.size(1)};
  shape.append(kernel_size.begin(), kernel_size.end());

  const c10::DeviceGuard guard(input.device());
  const auto options = at::TensorOptions().dtype(type).device(input.device());
  if (input.numel() == 0) {
    return at::full(shape, 0 / divisor, options);
  }
  auto dense = input;
  if (!dense.is_contiguous() && !has_channels_inside(dense)) {
    dense = dense.contiguous(dense.suggest_memory_format());
  }
  PatchItem item{};
  item.input = dense.const_data_ptr();
  item.layout = layout_of(dense.sizes(), has_channels_inside(dense));
  item.geometry = geometry;
  item.tile = tile_of(item.layout, geometry.taps(), is_aligned(dense));
  const auto result = at::empty(shape, options);
  const int64_t sums = partial_sums(item.layout, item.tile);
  const auto place = where(input.device());
  if (sums == 1) {
    item.sums = result.mutable_data_ptr();
    item.divisor = divisor;
    check(patch_sums(place, type_of(dense.scalar_type()), item), "patch_sums");
    return result;
  }
  const auto workspace = at::empty({sums, result.numel()}, options);
  item.sums = workspace.mutable_data_ptr();
  item.divisor = 1;
  check(patch_sums(place, type_of(dense.scalar_type()), item), "patch_sums");
  const PartialItem partial{item.sums, result.mutable_data_ptr(), divisor, result.numel(), sums};
  check(add_partial_sums(place, type == at::kDouble, partial), "partial_sums");
  return result;
}

at::Tensor patch_mean_backward(
    const at::Tensor& grad, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average, at::ScalarType dtype, bool channels_last) {
  check_gradient(grad, input_size, dtype);
  PatchBackwardItem item{};
  item.geometry = geometry_of(
      input_size.slice(2), grad.sizes().slice(1), stride, padding, dilation, output_size,
      transposed);
  item.divisor = divisor_of(input_size[0], output_size, average);
  item.layout = layout_of(input_size, channels_last);

  const c10::DeviceGuard guard(grad.device());
  at::DimVector shape(input_size.slice(2));
  shape.insert(channels_last ? shape.end() : shape.begin(), input_size[1]);
  const auto out = at::empty(shape, grad.options().dtype(dtype));
  if (out.numel() > 0) {
    const auto dense = plain(grad, dtype == at::kDouble ? at::kDouble : at::kFloat);
    item.grad = dense.const_data_ptr();
    item.out = out.mutable_data_ptr();
    check(patch_backward(where(grad.device()), type_of(dtype), item), "patch_backward");
  }
  return channels_last ? out.movedim(-1, 0) : out;
}

std::tuple<at::Tensor, at::Tensor> mean_bias(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed) {
  const auto shape = check_bias(weight, patches, gain, beta, groups, transposed);
  check_size(shape.channels, "the number of channels");
  check_size(shape.cols, "the number of elements per channel of the output");

  const c10::DeviceGuard guard(weight.device());
  const auto options = at::TensorOptions().device(weight.device());
  const auto bias = at::empty({shape.channels}, options.dtype(weight.scalar_type()));
  const auto mean = at::empty({shape.channels}, options.dtype(shape.type));
  if (shape.channels == 0) {
    return {bias, mean};
  }
  const auto inputs = plain(patches, shape.type);
  BiasItem item{};
  item.weight = weight.const_data_ptr();
  item.patches = inputs.const_data_ptr();
  item.bias = bias.mutable_data_ptr();
  item.mean = mean.mutable_data_ptr();
  item.channels = static_cast<int32_t>(shape.channels);
  item.group = static_cast<int32_t>(shape.rows);
  item.length = static_cast<int32_t>(shape.cols);
  item.channel_stride = weight.stride(transposed ? 1 : 0);
  item.group_stride = weight.size(0) / groups * weight.stride(0);
  // Kept until the kernel is launched.
  at::Tensor vectors[2];
  if (gain) {
    vectors[0] = plain(*gain, gain->scalar_type());
    item.gain = vectors[0].const_data_ptr();
    item.gain_type = type_of(vectors[0].scalar_type());
  }
  if (beta) {
    vectors[1] = plain(*beta, beta->scalar_type());
    item.beta = vectors[1].const_data_ptr();
    item.beta_type = type_of(vectors[1].scalar_type());
  }

  // In the order of memory; neighbours there that are neighbours among the patches are one digit.
  c10::SmallVector<BiasDigit, 4> digits;
  int64_t patch = 1;
  for (int64_t d = weight.dim() - 1; d > 0; --d) {
    const int64_t from = d > 1 ? d : (transposed ? 0 : 1);
    const int64_t size = from == 0 ? weight.size(0) / groups : weight.size(from);
    if (size > 1) {
      digits.push_back({static_cast<int32_t>(size), weight.stride(from), patch});
    }
    patch *= size;
  }
  std::stable_sort(digits.begin(), digits.end(), [](const BiasDigit& a, const BiasDigit& b) {
    return a.weight < b.weight;
  });
  c10::SmallVector<BiasDigit, 4> merged;
  for (const auto& digit : digits) {
    if (!merged.empty() && digit.weight == merged.back().weight * merged.back().size &&
        digit.patch == merged.back().patch * merged.back().size) {
      merged.back().size *= digit.size;
    } else {
      merged.push_back(digit);
    }
  }
  TORCH_CHECK(
      merged.size() <= 1 + kMaxAxes, "fastsn: on a GPU a weight may have up to ", kMaxAxes,
      " spatial dimensions, got shape ", weight.sizes());
  item.digit_count = static_cast<int32_t>(merged.size());
  std::copy(merged.rbegin(), merged.rend(), item.digits);
  check(mean_bias(where(weight.device()), type_of(weight.scalar_type()), item), "mean_bias");
  return {bias, mean};
}

}  // namespace fastsn::cuda
