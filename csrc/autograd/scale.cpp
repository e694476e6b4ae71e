#include "../ops.h"

#include "../estimates.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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

// scale_backward out of differentiable operations, for create_graph.
std::vector<at::Tensor> differentiable_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
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

// The arguments of a call for some of its layers only.
struct Selection {
  variable_list weights;
  variable_list grads;
  at::Tensor snapshot;
  std::vector<int64_t> layers;
  std::vector<int64_t> dims;
  std::vector<double> scales;
};

Selection select(
    const variable_list& grads, const variable_list& weights, const at::Tensor& snapshot,
    const std::vector<int64_t>& layers, const std::vector<int64_t>& dims,
    const std::vector<double>& scales, const std::vector<size_t>& wanted) {
  const auto estimates = describe(as_dense(weights), layers, dims);
  Selection part;
  variable_list vectors;
  variable_list sigmas;
  for (const size_t l : wanted) {
    for (int64_t e = estimates.first_of_layer[l]; e < estimates.first_of_layer[l + 1]; ++e) {
      const auto& item = estimates.items[e];
      vectors.push_back(snapshot.narrow(0, item.u, item.view.rows + item.view.cols()));
      sigmas.push_back(snapshot.narrow(0, item.sigma, 1));
      part.layers.push_back(static_cast<int64_t>(part.weights.size()));
      part.dims.push_back(dims[e]);
    }
    part.weights.push_back(weights[l]);
    part.grads.push_back(grads[l].is_sparse() ? grads[l].to_dense() : grads[l]);
    part.scales.push_back(scales[l]);
  }
  if (wanted.size() == weights.size()) {
    part.snapshot = snapshot;
  } else {
    vectors.insert(vectors.end(), sigmas.begin(), sigmas.end());
    part.snapshot = at::cat(vectors);
  }
  return part;
}

struct Scale : public torch::autograd::Function<Scale> {
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, at::TensorList weights, const at::Tensor& snapshot,
      std::vector<int64_t> layers, std::vector<int64_t> dims, std::vector<double> scales,
      bool bound, bool zero_guard) {
    // One node serves all layers, but a graph may reach them in several backwards, one branch after
    // the other, as it could if each layer had a node of its own. So the tensors are kept as long as
    // the node, and not as saved variables, which the first backward releases; the check that
    // nobody has changed the weights since comes with it.
    std::vector<int64_t> versions;
    for (const auto& weight : weights) {
      versions.push_back(version_of(weight));
    }
    ctx->saved_data["weights"] = weights.vec();
    ctx->saved_data["versions"] = std::move(versions);
    ctx->saved_data["snapshot"] = snapshot;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto out = scale(weights, snapshot, layers, dims, scales, bound, zero_guard);
    ctx->saved_data["layers"] = std::move(layers);
    ctx->saved_data["dims"] = std::move(dims);
    ctx->saved_data["scales"] = std::move(scales);
    ctx->saved_data["bound"] = bound;
    ctx->saved_data["zero_guard"] = zero_guard;
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto weights = ctx->saved_data["weights"].toTensorVector();
    const auto versions = ctx->saved_data["versions"].toIntVector();
    const bool bound = ctx->saved_data["bound"].toBool();
    const bool zero_guard = ctx->saved_data["zero_guard"].toBool();
    std::vector<size_t> wanted;
    for (size_t l = 0; l < weights.size(); ++l) {
      if (grads[l].defined() && ctx->needs_input_grad(l)) {
        TORCH_CHECK(
            version_of(weights[l]) == versions[l],
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: weight ", l, " of a spectral normalization, of shape ", weights[l].sizes(),
            ", is at version ", version_of(weights[l]), "; expected version ", versions[l],
            " instead.");
        wanted.push_back(l);
      }
    }
    constexpr size_t kOtherArguments = 6;
    variable_list result(weights.size() + kOtherArguments);
    if (wanted.empty()) {
      return result;
    }
    const auto part = select(
        grads, weights, ctx->saved_data["snapshot"].toTensor(),
        ctx->saved_data["layers"].toIntVector(), ctx->saved_data["dims"].toIntVector(),
        ctx->saved_data["scales"].toDoubleVector(), wanted);
    const auto compute =
        at::GradMode::is_enabled() ? differentiable_backward : scale_backward;
    auto changes = compute(
        part.grads, part.weights, part.snapshot, part.layers, part.dims, part.scales, bound,
        zero_guard);
    for (size_t i = 0; i < wanted.size(); ++i) {
      result[wanted[i]] = std::move(changes[i]);
    }
    return result;
  }

  static int64_t version_of(const at::Tensor& tensor) {
    return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
  }
};

std::vector<at::Tensor> scale_autograd(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard) {
  return Scale::apply(
      weights, snapshot, layers.vec(), dims.vec(), scales.vec(), bound, zero_guard);
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

// torch's functions write u and v once per iteration: so say their version counters here. They go up
// first, because that fails where u and v may not be written.
at::Tensor power_inplace(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  for (size_t e = 0; e < layers.size(); ++e) {
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

TORCH_LIBRARY_IMPL(fastsn, ADInplaceOrView, m) {
  m.impl("power_", &power_inplace);
}

}  // namespace fastsn
