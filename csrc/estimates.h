#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <vector>

namespace fastsn {

// A weight seen as the matrix whose rows are the slices along one dimension, in memory order:
// element (r, c) with c = a * inner + b lies at (a * rows + r) * inner + b.
struct MatrixView {
  // A memory column is a number with these digits, the last one running fastest; the sum of digit
  // times stride is its logical column.
  struct Digit {
    int64_t size;
    int64_t stride;
  };

  int64_t outer = 1;
  int64_t rows = 1;
  int64_t inner = 1;
  c10::SmallVector<Digit, 4> digits;  // none where memory columns are logical columns

  int64_t cols() const { return outer * inner; }
  int64_t numel() const { return rows * cols(); }
  // Memory column of each logical column; empty where there are no digits.
  std::vector<int64_t> column_order() const;
};

// `weight` must be dense and non-overlapping; `dim` counts from the front.
MatrixView view_as_matrix(const at::Tensor& weight, int64_t dim);

// One spectral-norm estimate: layer `layer`, matricized along one of its dimensions.
struct Estimate {
  int64_t layer;
  bool first;  // the layer's first matricization; the others iterate in the opposite order
  MatrixView view;
  int64_t u;  // offsets into the snapshot
  int64_t v;
  int64_t sigma;
};

// All estimates of a call and the layout of its snapshot: u and v of every estimate in turn, then
// one sigma per estimate.
struct Estimates {
  std::vector<Estimate> items;
  std::vector<int64_t>
      first_of_layer;  // items of layer l: [first_of_layer[l], first_of_layer[l+1])
  int64_t snapshot_numel = 0;
};

// `layers` names the layer of each estimate, in ascending order, at least one per layer.
// `weights` must be dense.
Estimates describe(at::TensorList weights, at::IntArrayRef layers, at::IntArrayRef dims);

// Every weight dense and non-overlapping: itself where it is, a copy with the strides of
// at::empty_like where not.
std::vector<at::Tensor> as_dense(at::TensorList weights);

// fp64 for fp64 weights, fp32 for everything narrower.
at::ScalarType accumulate_type(at::TensorList weights);

// Whether it is a strided tensor with a storage of its own and nothing else: not one on the meta
// device, a subclass that computes in its own way, or a wrapper of torch.func.
bool is_plain(const at::Tensor& tensor);

// Bytes that a strided tensor reaches from the beginning of its storage on, and that there are.
int64_t bytes_needed(const at::Tensor& tensor);
int64_t bytes_found(const at::Tensor& tensor);

// Errors, before anything is read or changed: weights; u, v and n_power_iterations of power_;
// snapshot and scales of scale and scale_backward. They include storages that are too small: what
// shards parameters leaves tensors without one behind.
void check_storage(const at::Tensor& tensor, const char* name, int64_t index = -1);
void check_weights(at::TensorList weights);
void check_vectors(
    const Estimates& estimates, at::TensorList weights, at::TensorList u, at::TensorList v,
    at::IntArrayRef n_power_iterations);
void check_snapshot(
    const Estimates& estimates, at::TensorList weights, const at::Tensor& snapshot,
    at::ArrayRef<double> scales);

void check_gradients(at::TensorList grads, at::TensorList weights);

// Types that differ from the weights' meet at the accumulate type: only there is a result rounded.
bool have_type(at::TensorList tensors, at::ScalarType type);
bool have_types_of(at::TensorList tensors, at::TensorList others);
std::vector<at::Tensor> converted(at::TensorList tensors, at::ScalarType type);
std::vector<at::Tensor> converted_like(at::TensorList tensors, at::TensorList others);

// `grad` with the strides of `like`: itself, or a copy.
at::Tensor with_strides_of(const at::Tensor& grad, const at::Tensor& like);

// What a layer's sigma does to its weight: weight' = factor * weight, and whether the gradient
// sees sigma move (it does not where a bound is slack or where zero_guard steps in).
struct Factor {
  double value;
  bool moves;
};
Factor factor_of(double sigma, double scale, bool bound, bool zero_guard);

}  // namespace fastsn
