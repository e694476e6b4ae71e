#include "../ops.h"

#include "../estimates.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>

// Gradients of fastsn::scale, with u and v constant as in torch and in Miyato et al. (2018).
namespace fastsn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// u v^T of one estimate, in the shape of the weight.
at::Tensor outer_product(
    const at::Tensor& u, const at::Tensor& v, at::IntArrayRef shape, int64_t dim) {
  std::vector<int64_t> moved{shape[dim]};
  for (int64_t d = 0; d < static_cast<int64_t>(shape.size()); ++d) {
    if (d != dim) {
      moved.push_back(shape[d]);
    }
  }
  return u.outer(v).view(moved).movedim(0, dim);
}

// scale_backward out of operations that torch differentiates and batches, for create_graph and
// is_grads_batched.
std::vector<at::Tensor> composite_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  // torch's operations do not look.
  for (size_t l = 0; l < weights.size(); ++l) {
    if (is_plain(weights[l])) {
      check_storage(weights[l], "weights", static_cast<int64_t>(l));
    }
    if (is_plain(grads[l])) {
      check_storage(grads[l], "grads", static_cast<int64_t>(l));
    }
  }
  const auto type = snapshot.scalar_type();
  const auto estimates = describe(as_dense(weights), layers, dims);
  std::vector<at::Tensor> result;
  result.reserve(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto weight = weights[l].to(type);
    const auto grad = grads[l].to(type);
    const int64_t begin = estimates.first_of_layer[l];
    const int64_t end = estimates.first_of_layer[l + 1];
    at::Tensor slope = at::zeros_like(weight);  // d sigma / d W
    for (int64_t e = begin; e < end; ++e) {
      const auto& item = estimates.items[e];
      slope = slope +
          outer_product(
                  snapshot.narrow(0, item.u, item.view.rows),
                  snapshot.narrow(0, item.v, item.view.cols()), weight.sizes(), dims[e]);
    }
    slope = slope / static_cast<double>(end - begin);
    const auto sigma = (slope * weight).sum();
    // The branch that at::where leaves out must not divide by zero: its gradient would be NaN.
    const auto divisor =
        bound || zero_guard ? at::where(sigma == 0, at::ones_like(sigma), sigma) : sigma;
    auto change = (grad - (grad * weight).sum() / divisor * slope) * (scales[l] / divisor);
    if (bound) {
      change = at::where(sigma <= scales[l], grad, change);
    }
    if (zero_guard) {
      change = at::where(sigma == 0, grad * scales[l], change);
    }
    result.push_back(change.to(weights[l].scalar_type()));
  }
  return result;
}

// What the backward needs of the layers that it has not been through yet.
struct Saved final : torch::CustomClassHolder {
  bool bound = false;
  bool zero_guard = false;
  std::vector<int64_t> positions;  // of these layers among the inputs and outputs of the node
  variable_list weights;
  std::vector<int64_t> versions;
  at::Tensor snapshot;
  std::vector<int64_t> layers;
  std::vector<int64_t> dims;
  std::vector<double> scales;
};

using SavedPtr = c10::intrusive_ptr<Saved>;

SavedPtr select(const SavedPtr& all, const std::vector<size_t>& chosen) {
  if (chosen.size() == all->weights.size()) {
    return all;
  }
  auto part_ptr = c10::make_intrusive<Saved>();
  if (chosen.empty()) {
    return part_ptr;
  }
  const Saved& saved = *all;
  Saved& part = *part_ptr;
  part.bound = saved.bound;
  part.zero_guard = saved.zero_guard;
  const auto estimates = describe(as_dense(saved.weights), saved.layers, saved.dims);
  variable_list vectors;
  variable_list sigmas;
  for (const size_t l : chosen) {
    for (int64_t e = estimates.first_of_layer[l]; e < estimates.first_of_layer[l + 1]; ++e) {
      const auto& item = estimates.items[e];
      vectors.push_back(saved.snapshot.narrow(0, item.u, item.view.rows + item.view.cols()));
      sigmas.push_back(saved.snapshot.narrow(0, item.sigma, 1));
      part.layers.push_back(static_cast<int64_t>(part.weights.size()));
      part.dims.push_back(saved.dims[e]);
    }
    part.positions.push_back(saved.positions[l]);
    part.weights.push_back(saved.weights[l]);
    part.versions.push_back(saved.versions[l]);
    part.scales.push_back(saved.scales[l]);
  }
  vectors.insert(vectors.end(), sigmas.begin(), sigmas.end());
  part.snapshot = at::cat(vectors);
  return part_ptr;
}

int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

// One node serves all layers, but a graph may reach them in several backwards, one branch after the
// other, as it could if each layer had a node of its own. Saved variables would all be released by
// the first of these. So the node keeps its tensors itself, and drops those of the layers that a
// backward has been through.
struct Scale : public torch::autograd::Function<Scale> {
  static constexpr bool is_traceable = true;
  static constexpr const char* kKey = "saved";

  static variable_list forward(
      AutogradContext* ctx, at::TensorList weights, const at::Tensor& snapshot,
      std::vector<int64_t> layers, std::vector<int64_t> dims, std::vector<double> scales,
      bool bound, bool zero_guard, std::optional<at::ScalarType> dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto out = scale(weights, snapshot, layers, dims, scales, bound, zero_guard, dtype);
    auto saved = c10::make_intrusive<Saved>();
    saved->bound = bound;
    saved->zero_guard = zero_guard;
    saved->weights = weights.vec();
    saved->snapshot = snapshot;
    saved->layers = std::move(layers);
    saved->dims = std::move(dims);
    saved->scales = std::move(scales);
    variable_list frozen;
    for (size_t l = 0; l < weights.size(); ++l) {
      saved->positions.push_back(static_cast<int64_t>(l));
      saved->versions.push_back(version_of(weights[l]));
      if (!weights[l].requires_grad()) {
        frozen.push_back(out[l]);
      }
    }
    ctx->mark_non_differentiable(frozen);
    ctx->set_materialize_grads(false);
    ctx->saved_data[kKey] = c10::IValue::make_capsule(std::move(saved));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto all = c10::static_intrusive_pointer_cast<Saved>(ctx->saved_data[kKey].toCapsule());
    const Saved& saved = *all;
    constexpr size_t kOtherArguments = 7;
    variable_list result(grads.size() + kOtherArguments);

    std::vector<size_t> wanted;
    std::vector<size_t> rest;
    variable_list wanted_grads;
    for (size_t i = 0; i < saved.positions.size(); ++i) {
      const auto& grad = grads[saved.positions[i]];
      if (grad.defined() && ctx->needs_input_grad(saved.positions[i])) {
        check_version(saved, i);
        wanted.push_back(i);
        wanted_grads.push_back(grad.is_sparse() ? grad.to_dense() : grad);
      } else {
        rest.push_back(i);
      }
    }
    for (size_t l = 0; l < grads.size(); ++l) {
      const bool is_released =
          std::find(saved.positions.begin(), saved.positions.end(), l) == saved.positions.end();
      TORCH_CHECK(
          !(is_released && grads[l].defined() && ctx->needs_input_grad(l)),
          torch::autograd::ERR_BACKWARD_TWICE);
    }
    if (wanted.empty()) {
      return result;
    }

    const auto part = select(all, wanted);
    const bool is_batched =
        std::any_of(wanted_grads.begin(), wanted_grads.end(), [](const auto& grad) {
          const auto keys = grad.unsafeGetTensorImpl()->key_set();
          return keys.has(c10::DispatchKey::Batched) ||
              keys.has(c10::DispatchKey::FuncTorchBatched);
        });
    const auto compute =
        at::GradMode::is_enabled() || is_batched ? composite_backward : scale_backward;
    auto changes = compute(
        wanted_grads, part->weights, part->snapshot, part->layers, part->dims, part->scales,
        saved.bound, saved.zero_guard);
    for (size_t i = 0; i < wanted.size(); ++i) {
      result[part->positions[i]] = std::move(changes[i]);
    }
    if (!torch::autograd::get_current_graph_task_keep_graph()) {
      ctx->saved_data[kKey] = c10::IValue::make_capsule(select(all, rest));
    }
    return result;
  }

  static void check_version(const Saved& saved, size_t i) {
    const int64_t version = version_of(saved.weights[i]);
    TORCH_CHECK(
        version == saved.versions[i],
        "one of the variables needed for gradient computation has been modified by an inplace "
        "operation: weight ",
        saved.positions[i], " of a spectral normalization, of shape ", saved.weights[i].sizes(),
        ", is at version ", version, "; expected version ", saved.versions[i], " instead.");
  }
};

std::vector<at::Tensor> scale_autograd(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard,
    std::optional<at::ScalarType> dtype) {
  const bool needs_node = at::GradMode::is_enabled() &&
      std::any_of(weights.begin(), weights.end(), [](const auto& w) { return w.requires_grad(); });
  if (!needs_node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return scale(weights, snapshot, layers, dims, scales, bound, zero_guard, dtype);
  }
  return Scale::apply(
      weights, snapshot, layers.vec(), dims.vec(), scales.vec(), bound, zero_guard, dtype);
}

// u, v and sigma carry no gradient of their own.
at::Tensor power_autograd(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  at::AutoDispatchBelowAutograd guard;
  return power_(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard);
}

at::Tensor estimate_autograd(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims) {
  at::AutoDispatchBelowAutograd guard;
  return estimate(weights, u, v, layers, dims);
}

// torch's functions write u and v once per iteration: so say their version counters here. They go
// up first, because that fails where u and v may not be written.
at::Tensor power_inplace(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  for (size_t e = 0; e < layers.size(); ++e) {
    TORCH_CHECK(
        e < u.size() && e < v.size(), "fastsn: expected ", layers.size(), " u and v, got ",
        u.size(), " and ", v.size());
    TORCH_CHECK(
        layers[e] >= 0 && layers[e] < static_cast<int64_t>(n_power_iterations.size()),
        "fastsn: expected n_power_iterations for layer ", layers[e], ", got ",
        n_power_iterations.size(), " of them");
    for (int64_t i = 0; i < n_power_iterations[layers[e]]; ++i) {
      torch::autograd::impl::bump_version(u[e]);
      torch::autograd::impl::bump_version(v[e]);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return power_(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, Autograd, m) {
  m.impl("power_", &power_autograd);
  m.impl("estimate", &estimate_autograd);
  m.impl("scale", &scale_autograd);
}

TORCH_LIBRARY_IMPL(fastsn, ADInplaceOrView, m) { m.impl("power_", &power_inplace); }

}  // namespace fastsn
