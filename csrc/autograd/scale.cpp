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
    auto change = (grad - (grad * weight).sum() / sigma * slope) * (scales[l] / sigma);
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

struct Scale : public torch::autograd::Function<Scale> {
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, at::TensorList weights, const at::Tensor& snapshot,
      std::vector<int64_t> layers, std::vector<int64_t> dims, std::vector<double> scales,
      bool bound, bool zero_guard) {
    variable_list saved(weights.begin(), weights.end());
    saved.push_back(snapshot);
    ctx->save_for_backward(std::move(saved));
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
    auto weights = ctx->get_saved_variables();
    const auto snapshot = weights.back();
    weights.pop_back();
    const auto layers = ctx->saved_data["layers"].toIntVector();
    const auto dims = ctx->saved_data["dims"].toIntVector();
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const bool bound = ctx->saved_data["bound"].toBool();
    const bool zero_guard = ctx->saved_data["zero_guard"].toBool();

    // A weight that nothing used, or that needs no gradient, still has its place in the snapshot:
    // it takes part with a gradient of zero and gets none.
    variable_list wanted(weights.size());
    variable_list result(weights.size() + 6);
    for (size_t l = 0; l < weights.size(); ++l) {
      wanted[l] = grads[l].defined() ? grads[l] : at::zeros_like(weights[l]);
    }
    const auto all = at::GradMode::is_enabled()
        ? differentiable_backward(
              wanted, weights, snapshot, layers, dims, scales, bound, zero_guard)
        : scale_backward(
              wanted, weights, snapshot, layers, dims, scales, bound, zero_guard);
    for (size_t l = 0; l < weights.size(); ++l) {
      if (grads[l].defined() && ctx->needs_input_grad(l)) {
        result[l] = all[l];
      }
    }
    return result;
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

// torch's functions write u and v once per iteration: so say their version counters here.
at::Tensor power_inplace(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  at::Tensor snapshot;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    snapshot =
        power_(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard);
  }
  for (size_t e = 0; e < layers.size(); ++e) {
    for (int64_t i = 0; i < n_power_iterations[layers[e]]; ++i) {
      torch::autograd::impl::bump_version(u[e]);
      torch::autograd::impl::bump_version(v[e]);
    }
  }
  return snapshot;
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
