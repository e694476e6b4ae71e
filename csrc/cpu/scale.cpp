#include "../estimates.h"
#include "kernels.h"
#include "results.h"
#include "tiles.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <thread>

// fastsn::scale and fastsn::scale_backward on the CPU.
namespace fastsn {
namespace {

// Elements handled at a time in the backward: a block stays in the first-level cache while the
// outer products of all estimates are added to it. That has 32 KB at least, of which fp64 takes
// half.
constexpr int64_t kBlock = 2048;
static_assert(kBlock * sizeof(double) <= 16 * 1024);

std::vector<Tile> cut_flat(at::TensorList tensors, int64_t& total) {
  std::vector<Tile> tiles;
  total = 0;
  for (size_t l = 0; l < tensors.size(); ++l) {
    const int64_t numel = tensors[l].numel();
    total += numel;
    cut(tiles, static_cast<int64_t>(l), numel, numel, 16, ceil_div(numel, kTileNumel) + 1);
  }
  return tiles;
}

// The sigma of a layer: the mean over its estimates.
template <typename Acc>
double sigma_of(const Estimates& estimates, const Acc* snapshot, int64_t layer) {
  const int64_t begin = estimates.first_of_layer[layer];
  const int64_t end = estimates.first_of_layer[layer + 1];
  double sum = 0;
  for (int64_t e = begin; e < end; ++e) {
    sum += static_cast<double>(snapshot[estimates.items[e].sigma]);
  }
  return sum / static_cast<double>(end - begin);
}

template <typename Acc>
std::vector<at::Tensor> run_scale(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard) {
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  check_snapshot(estimates, dense, snapshot, scales);
  const Acc* const data = snapshot.template const_data_ptr<Acc>();

  struct Layer {
    const Kernels<Acc>* kernels;
    const void* weight;
    void* out;
    Acc factor;
  };
  std::vector<at::Tensor> out;
  std::vector<Layer> jobs;
  out.reserve(dense.size());
  jobs.reserve(dense.size());
  for (size_t l = 0; l < dense.size(); ++l) {
    out.push_back(empty_result(dense[l]));
    const double sigma = sigma_of(estimates, data, static_cast<int64_t>(l));
    const double factor = factor_of(sigma, scales[l], bound, zero_guard).value;
    jobs.push_back(
        {&kernels<Acc>(dense[l].scalar_type()), dense[l].const_data_ptr(),
         out[l].mutable_data_ptr(), static_cast<Acc>(factor)});
  }
  int64_t total;
  // From the end, where the power iteration before has just been: a part of that is still in a
  // cache.
  auto tiles = cut_flat(dense, total);
  std::reverse(tiles.begin(), tiles.end());
  for_each_tile(tiles, total, [&](const Tile& tile) {
    const auto& job = jobs[tile.item];
    job.kernels->scale(job.weight, job.factor, job.out, tile.begin, tile.end);
  });
  return out;
}

// One of the two passes of the backward over a tile: the product <G, W>, then the result.
struct Step {
  Tile tile;
  bool second;
};

// The second pass of a layer right after the first pass of the next one: its gradient is still in a
// cache then, and its product has most likely been summed up.
std::vector<Step> pipelined(const std::vector<Tile>& tiles) {
  std::vector<Step> steps;
  steps.reserve(2 * tiles.size());
  size_t behind = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    steps.push_back({tiles[i], false});
    const bool last_of_layer = i + 1 == tiles.size() || tiles[i + 1].item != tiles[i].item;
    if (last_of_layer) {
      for (; behind < tiles.size() && tiles[behind].item < tiles[i].item; ++behind) {
        steps.push_back({tiles[behind], true});
      }
    }
  }
  for (; behind < tiles.size(); ++behind) {
    steps.push_back({tiles[behind], true});
  }
  return steps;
}

// dW = f * G - f * <G, W> / sigma * mean over estimates of u v^T, f = scale / sigma.
template <typename Acc>
std::vector<at::Tensor> run_backward(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  check_snapshot(estimates, dense, snapshot, scales);
  const Acc* const data = snapshot.template const_data_ptr<Acc>();

  struct Outer {
    Shape shape;
    const Acc* u;
    const Acc* v;
    std::vector<Acc> expanded_u;
    std::vector<Acc> reordered_v;
  };
  struct Layer {
    const Kernels<Acc>* kernels;
    at::Tensor grad;
    const void* weight;
    void* out;
    double sigma;
    Factor factor;
    bool in_place;  // the result needs no rounding: blocks are built where they end up
    std::vector<Outer> outers;
    Acc coefficient = 0;
    std::vector<Acc> partial;
    std::atomic<int64_t> tiles_left{0};
    std::atomic<bool> ready{false};
  };
  const auto finish_product = [](Layer& job) {
    if (!job.factor.moves) {
      return;
    }
    double product = 0;
    for (const Acc part : job.partial) {
      product += static_cast<double>(part);
    }
    job.coefficient = static_cast<Acc>(
        -job.factor.value * product / job.sigma / static_cast<double>(job.outers.size()));
  };
  int64_t total;
  const auto tiles = cut_flat(dense, total);
  std::vector<at::Tensor> out;
  std::vector<Layer> jobs(dense.size());
  out.reserve(dense.size());
  for (const auto& tile : tiles) {
    ++jobs[tile.item].tiles_left;
  }
  for (size_t l = 0; l < dense.size(); ++l) {
    auto& job = jobs[l];
    out.push_back(empty_result(dense[l]));
    job.kernels = &kernels<Acc>(dense[l].scalar_type());
    job.grad = with_strides_of(grads[l], dense[l]);
    job.weight = dense[l].const_data_ptr();
    job.out = out[l].mutable_data_ptr();
    job.sigma = sigma_of(estimates, data, static_cast<int64_t>(l));
    job.factor = factor_of(job.sigma, scales[l], bound, zero_guard);
    job.in_place = dense[l].scalar_type() == snapshot.scalar_type();
    job.partial.resize(job.tiles_left);
    for (int64_t e = estimates.first_of_layer[l];
         job.factor.moves && e < estimates.first_of_layer[l + 1]; ++e) {
      const auto& item = estimates.items[e];
      Outer outer{
          {item.view.outer, item.view.rows, item.view.inner}, data + item.u, data + item.v, {}, {}};
      if (item.view.inner <= kShortInner) {
        outer.expanded_u.reserve(item.view.rows * item.view.inner);
        for (int64_t r = 0; r < item.view.rows; ++r) {
          outer.expanded_u.insert(outer.expanded_u.end(), item.view.inner, outer.u[r]);
        }
        outer.u = outer.expanded_u.data();
      }
      if (const auto order = item.view.column_order(); !order.empty()) {
        outer.reordered_v.resize(item.view.cols());
        for (int64_t c = 0; c < item.view.cols(); ++c) {
          outer.reordered_v[order[c]] = outer.v[c];
        }
        outer.v = outer.reordered_v.data();
      }
      job.outers.push_back(std::move(outer));
    }
  }

  for_each_tile(pipelined(tiles), 2 * total, [&](const Step& step) {
    auto& job = jobs[step.tile.item];
    const auto& tile = step.tile;
    if (!step.second) {
      if (job.factor.moves) {
        job.partial[tile.index] =
            job.kernels->dot(job.grad.const_data_ptr(), job.weight, tile.begin, tile.end);
      }
      if (--job.tiles_left == 0) {
        finish_product(job);
        job.ready.store(true, std::memory_order_release);
      }
      return;
    }
    // Steps start in order and first steps wait for nothing, so this one ends.
    while (!job.ready.load(std::memory_order_acquire)) {
      std::this_thread::yield();
    }
    Acc buffer[kBlock];
    for (int64_t begin = tile.begin; begin < tile.end; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, tile.end);
      Acc* const block = job.in_place ? static_cast<Acc*>(job.out) + begin : buffer;
      job.kernels->load_scaled(
          job.grad.const_data_ptr(), static_cast<Acc>(job.factor.value), block, begin, end);
      for (const auto& outer : job.outers) {
        job.kernels->add_outer(block, outer.shape, begin, end, job.coefficient, outer.u, outer.v);
      }
      if (!job.in_place) {
        job.kernels->store(block, job.out, begin, end);
      }
    }
  });
  return out;
}

std::vector<at::Tensor> scale_cpu(
    at::TensorList weights, const at::Tensor& snapshot, at::IntArrayRef layers,
    at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound, bool zero_guard,
    std::optional<at::ScalarType> dtype) {
  check_weights(weights);
  const auto type = accumulate_type(weights);
  const auto run = type == at::kDouble ? run_scale<double> : run_scale<float>;
  if (!dtype || have_type(weights, *dtype)) {
    return run(weights, snapshot, layers, dims, scales, bound, zero_guard);
  }
  const auto wide = converted(weights, type);
  return converted(run(wide, snapshot, layers, dims, scales, bound, zero_guard), *dtype);
}

std::vector<at::Tensor> scale_backward_cpu(
    at::TensorList grads, at::TensorList weights, const at::Tensor& snapshot,
    at::IntArrayRef layers, at::IntArrayRef dims, at::ArrayRef<double> scales, bool bound,
    bool zero_guard) {
  check_weights(weights);
  const auto type = accumulate_type(weights);
  const auto run = type == at::kDouble ? run_backward<double> : run_backward<float>;
  check_gradients(grads, weights);
  if (have_types_of(grads, weights)) {
    return run(grads, weights, snapshot, layers, dims, scales, bound, zero_guard);
  }
  return converted_like(
      run(converted(grads, type), converted(weights, type), snapshot, layers, dims, scales, bound,
          zero_guard),
      weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, CPU, m) {
  m.impl("scale", &scale_cpu);
  m.impl("scale_backward", &scale_backward_cpu);
}

}  // namespace fastsn
