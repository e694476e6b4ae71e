#include "../ops.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

// Gradients of fastsn::patch_mean, its own gradient and fastsn::mean_bias, as often as asked.
namespace fastsn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using SymInts = std::vector<c10::SymInt>;
using Ints = std::vector<int64_t>;

// All but the input of patch_mean and the gradient of patch_mean_backward.
struct Geometry {
  Ints stride;
  Ints padding;
  Ints dilation;
  SymInts output_size;
  bool transposed;
  bool average;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["output_size"] = output_size;
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["average"] = average;
  }
  explicit Geometry(AutogradContext* ctx)
      : stride(ctx->saved_data["stride"].toIntVector()),
        padding(ctx->saved_data["padding"].toIntVector()),
        dilation(ctx->saved_data["dilation"].toIntVector()),
        output_size(ctx->saved_data["output_size"].toSymIntVector()),
        transposed(ctx->saved_data["transposed"].toBool()),
        average(ctx->saved_data["average"].toBool()) {}
  Geometry(
      at::IntArrayRef stride_, at::IntArrayRef padding_, at::IntArrayRef dilation_,
      c10::SymIntArrayRef output_size_, bool transposed_, bool average_)
      : stride(stride_.vec()),
        padding(padding_.vec()),
        dilation(dilation_.vec()),
        output_size(output_size_.vec()),
        transposed(transposed_),
        average(average_) {}

  at::Tensor mean(const at::Tensor& input, const Ints& kernel_size) const {
    return patch_mean(
        input, kernel_size, stride, padding, dilation, output_size, transposed, average);
  }
  at::Tensor backward(
      const at::Tensor& grad, const SymInts& input_size, at::ScalarType dtype,
      bool channels_last) const {
    return patch_mean_backward(
        grad, input_size, stride, padding, dilation, output_size, transposed, average, dtype,
        channels_last);
  }
};

bool is_channels_last(const at::Tensor& input) {
  const auto format = input.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

// Keeps nothing of the input's memory: what follows may overwrite it.
struct PatchMean : public torch::autograd::Function<PatchMean> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, Ints kernel_size, const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView guard;
    geometry.save(ctx);
    ctx->saved_data["input_size"] = input.sym_sizes().vec();
    ctx->saved_data["dtype"] = input.scalar_type();
    ctx->saved_data["channels_last"] = is_channels_last(input);
    return geometry.mean(input, kernel_size);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto input_size = ctx->saved_data["input_size"].toSymIntVector();
    const auto of_one = Geometry(ctx).backward(
        grads[0], input_size, ctx->saved_data["dtype"].toScalarType(),
        ctx->saved_data["channels_last"].toBool());
    return {of_one.expand_symint(input_size), {}, {}};
  }
};

// Linear like patch_mean, of which it is the adjoint for one sample.
struct PatchMeanBackward : public torch::autograd::Function<PatchMeanBackward> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad, const SymInts& input_size,
      const Geometry& geometry, at::ScalarType dtype, bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView guard;
    geometry.save(ctx);
    ctx->saved_data["kernel_size"] = grad.sizes().slice(1).vec();
    ctx->saved_data["count"] = input_size[0];
    ctx->saved_data["dtype"] = grad.scalar_type();
    return geometry.backward(grad, input_size, dtype, channels_last);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Geometry geometry(ctx);
    auto result =
        geometry.mean(grads[0].unsqueeze(0), ctx->saved_data["kernel_size"].toIntVector());
    if (geometry.average) {
      result = result / ctx->saved_data["count"].toSymInt();
    }
    return {result.to(ctx->saved_data["dtype"].toScalarType()), {}, {}, {}, {}};
  }
};

at::Tensor patch_mean_autograd(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average) {
  if (!at::GradMode::is_enabled() || !input.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return patch_mean(
        input, kernel_size, stride, padding, dilation, output_size, transposed, average);
  }
  const Geometry geometry(stride, padding, dilation, output_size, transposed, average);
  return PatchMean::apply(input, kernel_size.vec(), geometry);
}

at::Tensor patch_mean_backward_autograd(
    const at::Tensor& grad, c10::SymIntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, c10::SymIntArrayRef output_size,
    bool transposed, bool average, at::ScalarType dtype, bool channels_last) {
  if (!at::GradMode::is_enabled() || !grad.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return patch_mean_backward(
        grad, input_size, stride, padding, dilation, output_size, transposed, average, dtype,
        channels_last);
  }
  const Geometry geometry(stride, padding, dilation, output_size, transposed, average);
  return PatchMeanBackward::apply(grad, input_size.vec(), geometry, dtype, channels_last);
}

// A weight as (groups, rows, *) and patches as (groups, *) such that their product over `*` is the
// mean, where `*` is (C_in / groups, *kernel_size).
at::Tensor split(const at::Tensor& weight, int64_t groups, bool transposed) {
  const auto own = weight.unflatten_symint(0, {groups, weight.sym_size(0) / groups});
  return transposed ? own.transpose(1, 2) : own;
}

struct MeanBias : public torch::autograd::Function<MeanBias> {
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& weight, const at::Tensor& patches,
      const std::optional<at::Tensor>& gain, const std::optional<at::Tensor>& beta, int64_t groups,
      bool transposed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [bias, mean] = mean_bias(weight, patches, gain, beta, groups, transposed);
    const auto own_gain = gain.value_or(at::Tensor());
    ctx->save_for_backward({weight, patches, own_gain});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["has_gain"] = gain.has_value();
    if (beta) {
      ctx->saved_data["beta"] = beta->scalar_type();
    }
    ctx->mark_non_differentiable({mean});
    ctx->set_materialize_grads(false);
    return {bias, mean};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    constexpr size_t kArguments = 6;
    variable_list result(kArguments);
    if (!grads[0].defined()) {
      return result;
    }
    // Autocast must not narrow what follows.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const auto& [weight, patches, gain] = std::tie(saved[0], saved[1], saved[2]);
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const bool transposed = ctx->saved_data["transposed"].toBool();
    const auto wide = at::promoteTypes(weight.scalar_type(), at::kFloat);
    const auto grad = grads[0].to(wide);
    const auto mean_grad = gain.defined() ? -grad * gain.to(wide) : -grad;
    const auto per_group = mean_grad.reshape_symint({groups, mean_grad.sym_numel() / groups});
    const auto own = split(weight, groups, transposed);
    size_t edge = 0;
    if (ctx->needs_input_grad(edge++)) {
      auto shape = own.sym_sizes().vec();
      shape[1] = 1;
      const auto p = patches.to(wide).reshape_symint(shape);
      auto rows = per_group;
      while (rows.dim() < own.dim()) {
        rows = rows.unsqueeze(-1);
      }
      auto outer = (rows * p).to(weight.scalar_type());
      result[0] = (transposed ? outer.transpose(1, 2) : outer).reshape_symint(weight.sym_sizes());
    }
    if (ctx->needs_input_grad(edge++)) {
      const auto back = at::matmul(per_group.unsqueeze(1), own.to(wide).flatten(2));
      result[1] = back.reshape_symint(patches.sym_sizes()).to(patches.scalar_type());
    }
    if (gain.defined() && ctx->needs_input_grad(edge++)) {
      const auto minus_mean = std::get<0>(
          mean_bias(weight.to(wide), patches, std::nullopt, std::nullopt, groups, transposed));
      result[2] = (grad * minus_mean).to(gain.scalar_type());
    }
    if (ctx->saved_data.count("beta") != 0 && ctx->needs_input_grad(edge)) {
      result[3] = grad.to(ctx->saved_data["beta"].toScalarType());
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> mean_bias_autograd(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed) {
  const bool needs_node = at::GradMode::is_enabled() &&
      (weight.requires_grad() || patches.requires_grad() || (gain && gain->requires_grad()) ||
       (beta && beta->requires_grad()));
  if (!needs_node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return mean_bias(weight, patches, gain, beta, groups, transposed);
  }
  auto result = MeanBias::apply(weight, patches, gain, beta, groups, transposed);
  return {std::move(result[0]), std::move(result[1])};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, Autograd, m) {
  m.impl("patch_mean", &patch_mean_autograd);
  m.impl("patch_mean_backward", &patch_mean_backward_autograd);
  m.impl("mean_bias", &mean_bias_autograd);
}

}  // namespace fastsn
