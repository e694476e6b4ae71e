#include "estimates.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>

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
  std::vector<int64_t> others;
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

  const int64_t cols = view.cols();
  view.column_order.assign(cols, 0);
  int64_t repeat = cols;
  bool identity = true;
  for (const int64_t d : others) {
    repeat /= sizes[d];
    const int64_t step = is_outer(d) ? strides[d] / view.rows : strides[d];
    for (int64_t c = 0; c < cols; ++c) {
      view.column_order[c] += (c / repeat) % sizes[d] * step;
    }
  }
  for (int64_t c = 0; c < cols && identity; ++c) {
    identity = view.column_order[c] == c;
  }
  if (identity) {
    view.column_order.clear();
  }
  return view;
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
  }
  return is_double ? at::kDouble : at::kFloat;
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
