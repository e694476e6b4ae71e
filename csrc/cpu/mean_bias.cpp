#include "../estimates.h"
#include "../means.h"
#include "kernels.h"
#include "tiles.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

// fastsn::mean_bias on the CPU: the first half of a power iteration, with patches in the place of
// v.
namespace fastsn {
namespace {

// In slices along the first dimension that are dense and one after the other.
at::Tensor with_dense_slices(const at::Tensor& weight) {
  const auto dense = as_dense(weight)[0];
  const bool is_outermost =
      dense.numel() == 0 || dense.size(0) == 1 || dense.stride(0) == dense.numel() / dense.size(0);
  return is_outermost ? dense : dense.contiguous();
}

template <typename Acc>
void run(
    const at::Tensor& weight, const at::Tensor& patches, const BiasShape& shape, int64_t groups,
    bool transposed, Acc* mean) {
  const auto dense = groups == 1 ? as_dense(weight)[0] : with_dense_slices(weight);
  const int64_t depth = dense.size(0) / groups;
  const auto view = view_as_matrix(dense.narrow(0, 0, depth), transposed ? 1 : 0);
  const auto order = view.column_order();
  const Acc* vectors = patches.const_data_ptr<Acc>();
  std::vector<Acc> reordered(order.empty() ? 0 : patches.numel());
  if (!order.empty()) {
    for (int64_t i = 0; i < patches.numel(); ++i) {
      reordered[i / shape.cols * shape.cols + order[i % shape.cols]] = vectors[i];
    }
    vectors = reordered.data();
  }
  std::vector<Tile> tiles;
  const int64_t numel = shape.rows * shape.cols;
  const bool is_short = view.inner <= kShortInner;
  // Every tile repeats the short columns anew: rows enough to pay for that.
  const int64_t align = is_short ? ceil_div(512, view.inner) : 4;
  for (int64_t group = 0; group < groups; ++group) {
    cut(tiles, group, numel, shape.rows, align, kMaxTiles);
  }
  const auto& own = kernels<Acc>(weight.scalar_type());
  const auto* const data = static_cast<const char*>(dense.const_data_ptr());
  for_each_tile(tiles, groups * numel, [&](const Tile& tile) {
    thread_local std::vector<Acc> scratch;
    if (is_short) {
      scratch.resize(std::max<size_t>(scratch.size(), view.rows * view.inner));
    }
    own.u_first(
        data + tile.item * numel * static_cast<int64_t>(dense.element_size()),
        {view.outer, view.rows, view.inner}, tile.begin, tile.end, vectors + tile.item * shape.cols,
        mean + tile.item * shape.rows, nullptr, scratch.data());
  });
}

std::tuple<at::Tensor, at::Tensor> mean_bias_cpu(
    const at::Tensor& weight, const at::Tensor& patches, const std::optional<at::Tensor>& gain,
    const std::optional<at::Tensor>& beta, int64_t groups, bool transposed) {
  const auto shape = check_bias(weight, patches, gain, beta, groups, transposed);
  const auto mean = at::empty({shape.channels}, weight.options().dtype(shape.type));
  const auto vectors = patches.to(shape.type).contiguous();
  if (shape.type == at::kDouble) {
    run(weight, vectors, shape, groups, transposed, mean.mutable_data_ptr<double>());
  } else {
    run(weight, vectors, shape, groups, transposed, mean.mutable_data_ptr<float>());
  }
  auto bias = gain ? at::mul(mean, gain->to(shape.type)).neg_() : mean.neg();
  if (beta) {
    bias.add_(beta->to(shape.type));
  }
  return {bias.to(weight.scalar_type()), mean};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, CPU, m) { m.impl("mean_bias", &mean_bias_cpu); }

}  // namespace fastsn
