#include "estimates.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

namespace fastsn {

MatrixView view_as_matrix(const at::Tensor& weight, int64_t dim) {
  MatrixView view;
  const auto sizes = weight.sizes();
  const auto strides = weight.strides();
  view.rows = sizes[dim];
  if (weight.numel() == 0) {
    view.outer = view.rows == 0 ? 1 : 0;
    if (view.rows == 0) {
      for (int64_t d = 0; d < weight.dim(); ++d) {
        view.inner *= d == dim ? 1 : sizes[d];
      }
    }
    return view;
  }

  if (weight.is_contiguous()) {
    for (int64_t d = 0; d < dim; ++d) {
      view.outer *= sizes[d];
    }
    for (int64_t d = dim + 1; d < weight.dim(); ++d) {
      view.inner *= sizes[d];
    }
    return view;
  }

  // A dimension of size 1 has no place in memory of its own: its stride says nothing.
  c10::SmallVector<int64_t, 8> others;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    if (d != dim && sizes[d] > 1) {
      others.push_back(d);
    }
  }
  const bool row_moves = view.rows > 1;
  const auto is_outer = [&](int64_t d) { return row_moves && strides[d] > strides[dim]; };
  for (const int64_t d : others) {
    (is_outer(d) ? view.outer : view.inner) *= sizes[d];
  }

  // In the order of memory; neighbours that are neighbours in the logical order too are one digit.
  std::sort(
      others.begin(), others.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  for (const int64_t d : others) {
    int64_t stride = 1;
    for (int64_t later = d + 1; later < weight.dim(); ++later) {
      stride *= later == dim ? 1 : sizes[later];
    }
    if (!view.digits.empty() && view.digits.back().stride == stride * sizes[d]) {
      view.digits.back() = {view.digits.back().size * sizes[d], stride};
    } else {
      view.digits.push_back({sizes[d], stride});
    }
  }
  if (view.digits.size() < 2) {
    view.digits.clear();
  }
  return view;
}

std::vector<int64_t> MatrixView::column_order() const {
  if (digits.empty()) {
    return {};
  }
  std::vector<int64_t> order(cols());
  for (int64_t memory = 0; memory < cols(); ++memory) {
    int64_t rest = memory;
    int64_t logical = 0;
    for (auto digit = digits.rbegin(); digit != digits.rend(); ++digit) {
      logical += rest % digit->size * digit->stride;
      rest /= digit->size;
    }
    order[logical] = memory;
  }
  return order;
}

Estimates describe(at::TensorList weights, at::IntArrayRef layers, at::IntArrayRef dims) {
  TORCH_CHECK(
      layers.size() == dims.size(), "fastsn: layers and dims differ in length: ", layers.size(),
      " and ", dims.size());
  Estimates estimates;
  estimates.items.reserve(layers.size());
  estimates.first_of_layer.reserve(weights.size() + 1);
  for (size_t e = 0; e < layers.size(); ++e) {
    const int64_t layer = layers[e];
    const bool first = e == 0 || layers[e - 1] != layer;
    TORCH_CHECK(
        layer == static_cast<int64_t>(estimates.first_of_layer.size()) - (first ? 0 : 1) &&
            layer < static_cast<int64_t>(weights.size()),
        "fastsn: layers must name every one of the ", weights.size(),
        " weights in ascending order, got ", layers);
    const auto& weight = weights[layer];
    TORCH_CHECK(
        dims[e] >= 0 && dims[e] < weight.dim(), "fastsn: dims[", e, "] must be in [0, ",
        weight.dim() - 1, "], got ", dims[e]);
    if (first) {
      estimates.first_of_layer.push_back(static_cast<int64_t>(e));
    }
    auto view = view_as_matrix(weight, dims[e]);
    const int64_t u = estimates.snapshot_numel;
    const int64_t v = u + view.rows;
    estimates.snapshot_numel = v + view.cols();
    estimates.items.push_back({layer, first, std::move(view), u, v, 0});
  }
  TORCH_CHECK(
      estimates.first_of_layer.size() == weights.size(),
      "fastsn: layers must name every one of the ", weights.size(),
      " weights in ascending order, got ", layers);
  estimates.first_of_layer.push_back(static_cast<int64_t>(layers.size()));
  for (auto& item : estimates.items) {
    item.sigma = estimates.snapshot_numel++;
  }
  return estimates;
}

std::vector<at::Tensor> as_dense(at::TensorList weights) {
  std::vector<at::Tensor> dense;
  dense.reserve(weights.size());
  for (const auto& weight : weights) {
    dense.push_back(
        weight.is_non_overlapping_and_dense() ? weight : at::empty_like(weight).copy_(weight));
  }
  return dense;
}

at::ScalarType accumulate_type(at::TensorList weights) {
  return weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

bool is_plain(const at::Tensor& tensor) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet kWrappers{
      Key::Python,    Key::FuncTorchBatched, Key::FuncTorchGradWrapper,
      Key::Batched,   Key::Functionalize,    Key::NestedTensor,
      Key::ZeroTensor};
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta() &&
      !tensor.key_set().has_any(kWrappers) && tensor.has_storage() &&
      !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

int64_t bytes_needed(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return 0;
  }
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

int64_t bytes_found(const at::Tensor& tensor) {
  return static_cast<int64_t>(tensor.storage().nbytes());
}

void check_storage(const at::Tensor& tensor, const char* name, int64_t index) {
  const int64_t needed = bytes_needed(tensor);
  const int64_t found = bytes_found(tensor);
  TORCH_CHECK(
      needed <= found, "fastsn: ", name, index < 0 ? "" : c10::str("[", index, "]"), " of shape ",
      tensor.sizes(), " needs a storage of ", needed, " bytes, got one of ", found, " bytes");
}

void check_weights(at::TensorList weights) {
  TORCH_CHECK(!weights.empty(), "fastsn: expected at least one weight, got none");
  const auto device = weights[0].device();
  const bool is_double = weights[0].scalar_type() == at::kDouble;
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto type = weights[l].scalar_type();
    TORCH_CHECK(
        type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
        "fastsn: weights[", l, "] must be float64, float32, bfloat16 or float16, got ", type);
    TORCH_CHECK(
        weights[l].layout() == at::kStrided, "fastsn: weights[", l,
        "] must be strided (dense), got ", weights[l].layout());
    TORCH_CHECK(
        weights[l].device() == device, "fastsn: all weights of a call must be on one device, got ",
        device, " and ", weights[l].device());
    TORCH_CHECK(
        (type == at::kDouble) == is_double,
        "fastsn: float64 weights cannot share a call with other types, got ",
        weights[0].scalar_type(), " and ", type);
    check_storage(weights[l], "weights", static_cast<int64_t>(l));
  }
}

namespace {

void check_vector(
    const at::Tensor& x, const char* name, size_t index, int64_t length, const at::Device& device) {
  TORCH_CHECK(
      x.dim() == 1 && x.size(0) == length, "fastsn: ", name, "[", index, "] must have shape [",
      length, "], got ", x.sizes());
  TORCH_CHECK(
      x.device() == device, "fastsn: ", name, "[", index, "] must be on ", device, ", got ",
      x.device());
  TORCH_CHECK(
      x.is_floating_point(), "fastsn: ", name, "[", index, "] must be floating point, got ",
      x.scalar_type());
  check_storage(x, name, static_cast<int64_t>(index));
}

}  // namespace

void check_vectors(
    const Estimates& estimates, at::TensorList weights, at::TensorList u, at::TensorList v,
    at::IntArrayRef n_power_iterations) {
  const size_t count = estimates.items.size();
  TORCH_CHECK(
      u.size() == count && v.size() == count, "fastsn: expected ", count, " u and v, got ",
      u.size(), " and ", v.size());
  TORCH_CHECK(
      n_power_iterations.size() == weights.size(), "fastsn: expected ", weights.size(),
      " n_power_iterations, got ", n_power_iterations.size());
  for (size_t e = 0; e < count; ++e) {
    const auto& view = estimates.items[e].view;
    check_vector(u[e], "u", e, view.rows, weights[0].device());
    check_vector(v[e], "v", e, view.cols(), weights[0].device());
  }
}

void check_snapshot(
    const Estimates& estimates, at::TensorList weights, const at::Tensor& snapshot,
    at::ArrayRef<double> scales) {
  TORCH_CHECK(
      scales.size() == weights.size(), "fastsn: expected ", weights.size(), " scales, got ",
      scales.size());
  TORCH_CHECK(
      snapshot.dim() == 1 && snapshot.size(0) == estimates.snapshot_numel &&
          snapshot.is_contiguous() && snapshot.scalar_type() == accumulate_type(weights) &&
          snapshot.device() == weights[0].device(),
      "fastsn: expected a contiguous ", accumulate_type(weights), " snapshot of ",
      estimates.snapshot_numel, " elements on ", weights[0].device(), ", got ",
      snapshot.scalar_type(), " of shape ", snapshot.sizes(), " on ", snapshot.device());
  check_storage(snapshot, "snapshot");
}

void check_gradients(at::TensorList grads, at::TensorList weights) {
  TORCH_CHECK(
      grads.size() == weights.size(), "fastsn: expected ", weights.size(), " gradients, got ",
      grads.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    TORCH_CHECK(
        grads[l].sizes() == weights[l].sizes() && grads[l].is_floating_point() &&
            grads[l].device() == weights[l].device(),
        "fastsn: expected a floating point gradient of shape ", weights[l].sizes(), " on ",
        weights[l].device(), ", got ", grads[l].scalar_type(), " of shape ", grads[l].sizes(),
        " on ", grads[l].device());
    check_storage(grads[l], "grads", static_cast<int64_t>(l));
  }
}

bool have_type(at::TensorList tensors, at::ScalarType type) {
  return std::all_of(
      tensors.begin(), tensors.end(), [&](const auto& x) { return x.scalar_type() == type; });
}

bool have_types_of(at::TensorList tensors, at::TensorList others) {
  return std::equal(
      tensors.begin(), tensors.end(), others.begin(), others.end(),
      [](const auto& x, const auto& y) { return x.scalar_type() == y.scalar_type(); });
}

std::vector<at::Tensor> converted(at::TensorList tensors, at::ScalarType type) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    result.push_back(tensor.to(type));
  }
  return result;
}

std::vector<at::Tensor> converted_like(at::TensorList tensors, at::TensorList others) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (size_t k = 0; k < tensors.size(); ++k) {
    result.push_back(tensors[k].to(others[k].scalar_type()));
  }
  return result;
}

at::Tensor with_strides_of(const at::Tensor& grad, const at::Tensor& like) {
  bool lies_alike = true;
  for (int64_t d = 0; d < like.dim(); ++d) {
    // The stride of a dimension of size 1 says nothing.
    lies_alike = lies_alike && (like.size(d) == 1 || grad.stride(d) == like.stride(d));
  }
  return lies_alike ? grad : at::empty_like(like, grad.options()).copy_(grad);
}

Factor factor_of(double sigma, double scale, bool bound, bool zero_guard) {
  if (zero_guard && sigma == 0) {
    return {scale, false};
  }
  if (bound && sigma <= scale) {
    return {1, false};
  }
  return {scale / sigma, true};
}

}  // namespace fastsn
