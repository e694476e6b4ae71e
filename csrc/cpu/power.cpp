#include "../estimates.h"
#include "kernels.h"
#include "tiles.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

// fastsn::power_ and fastsn::estimate on the CPU.
//
// One iteration reads W once: a tile that owns whole rows has s = W v for them, and at once adds
// its part of t = W^T s while the rows are in cache; with s and t summed up,
//   a = max(|s|, eps), u = s / a, t' = t / a, b = max(|t'|, eps), v = t' / b, sigma = |t'|^2 / b,
// which are torch's numbers: its third product u^T W v is |t'|^2 / b. Where v comes first, rows and
// columns change places. Where nothing iterates, u and v are made units first and sigma = <u, s>.
namespace fastsn {
namespace {

template <typename Acc>
struct Job {
  const void* weight;
  const Kernels<Acc>* kernels;
  Shape shape;
  bool v_first;
  int64_t iterations;
  double eps;
  bool zero_guard;
  Acc* u;      // in the snapshot
  Acc* v;      // in the snapshot, or a copy in memory order
  Acc* sigma;  // in the snapshot

  // Workspace of one iteration: `whole` is the product that the tiles own, `partial` holds one
  // summand of the other product per tile.
  Acc* whole = nullptr;
  Acc* partial = nullptr;
  std::atomic<int64_t> tiles_left{0};
  int64_t n_tiles = 0;

  int64_t cols() const { return shape.outer * shape.inner; }
  int64_t numel() const { return shape.rows * cols(); }
  bool is_short() const { return shape.inner <= kShortInner; }
  bool only_estimates() const { return iterations <= 0; }
  bool starts_with_v() const { return v_first && !only_estimates(); }
  int64_t whole_length() const { return starts_with_v() ? cols() : shape.rows; }
  int64_t partial_length() const {
    return only_estimates() ? 0 : starts_with_v() ? shape.rows : cols();
  }
};

template <typename Acc>
void cut_job(Job<Acc>& job, int64_t index, std::vector<Tile>& tiles) {
  if (job.numel() == 0) {
    return;
  }
  int64_t length = job.shape.rows;
  int64_t align = 4;
  if (job.starts_with_v()) {
    // Columns of a matrix whose rows are contiguous are cut into whole cache lines.
    const bool by_column = job.shape.outer == 1 && !job.is_short();
    length = by_column ? job.shape.inner : job.shape.outer;
    align = by_column ? 64 : 1;
  } else if (job.is_short()) {
    // Every tile repeats the short columns anew: rows enough to pay for that.
    align = ceil_div(512, job.shape.inner);
  }
  job.n_tiles = cut(tiles, index, job.numel(), length, align, kMaxTiles);
}

// After the last tile: the sums, the norms, the new u, v and sigma.
template <typename Acc>
void finish(Job<Acc>& job) {
  const auto& vectors = kernels<Acc>(c10::CppTypeToScalarType<Acc>::value);
  const int64_t m = job.whole_length();
  if (job.only_estimates()) {
    *job.sigma = vectors.dot(job.u, job.whole, 0, m);
    return;
  }
  const int64_t n = job.partial_length();
  Acc* const y = job.partial;
  for (int64_t k = 1; k < job.n_tiles; ++k) {
    vectors.add(job.partial + k * n, y, n);
  }
  const Acc eps = static_cast<Acc>(job.eps);
  const auto norm = [&](const Acc* x, int64_t length) {
    return std::sqrt(vectors.dot(x, x, 0, length));
  };
  const Acc a = std::max(norm(job.whole, m), eps);
  vectors.scale(y, 1 / a, y, 0, n);
  const Acc y_norm = norm(y, n);
  const Acc b = std::max(y_norm, eps);
  *job.sigma = y_norm * (y_norm / b);
  if (job.zero_guard && *job.sigma == 0) {
    return;
  }
  vectors.scale(job.whole, 1 / a, job.v_first ? job.v : job.u, 0, m);
  vectors.scale(y, 1 / b, job.v_first ? job.u : job.v, 0, n);
}

// A matrix without elements: no tile, no product, norm 0.
template <typename Acc>
void finish_empty(Job<Acc>& job) {
  *job.sigma = 0;
  if (!job.only_estimates() && !job.zero_guard) {
    std::fill_n(job.u, job.shape.rows, Acc(0));
    std::fill_n(job.v, job.cols(), Acc(0));
  }
}

template <typename Acc>
void run_tile(Job<Acc>& job, const Tile& tile) {
  thread_local std::vector<Acc> scratch;
  if (job.is_short()) {
    const size_t needed = 2 * job.shape.rows * job.shape.inner;
    if (scratch.size() < needed) {
      scratch.resize(needed);
    }
  }
  const int64_t n = job.partial_length();
  Acc* const part = n == 0 ? nullptr : job.partial + tile.index * n;
  std::fill_n(part, n, Acc(0));
  const bool v_first = job.starts_with_v();
  (v_first ? job.kernels->v_first : job.kernels->u_first)(
      job.weight, job.shape, tile.begin, tile.end, v_first ? job.u : job.v, job.whole, part,
      scratch.data());
  if (--job.tiles_left == 0) {
    finish(job);
  }
}

template <typename Acc>
void run_jobs(std::vector<Job<Acc>>& jobs, const at::TensorOptions& options) {
  std::vector<Tile> tiles;
  int64_t workspace_numel = 0;
  int64_t rounds = 0;
  for (size_t e = 0; e < jobs.size(); ++e) {
    auto& job = jobs[e];
    cut_job(job, static_cast<int64_t>(e), tiles);
    workspace_numel += job.whole_length() + job.n_tiles * job.partial_length();
    rounds = std::max<int64_t>({rounds, job.iterations, 1});
    if (job.numel() == 0) {
      finish_empty(job);
    }
  }
  const auto workspace = at::empty({workspace_numel}, options);
  Acc* free = workspace.template mutable_data_ptr<Acc>();
  for (auto& job : jobs) {
    job.whole = free;
    job.partial = free + job.whole_length();
    free = job.partial + job.n_tiles * job.partial_length();
  }

  for (int64_t round = 0; round < rounds; ++round) {
    const auto is_done = [&](const Job<Acc>& job) {
      return round >= std::max<int64_t>(job.iterations, 1);
    };
    tiles.erase(
        std::remove_if(
            tiles.begin(), tiles.end(), [&](const Tile& tile) { return is_done(jobs[tile.item]); }),
        tiles.end());
    int64_t numel = 0;
    for (auto& job : jobs) {
      job.tiles_left = job.n_tiles;
      numel += is_done(job) ? 0 : job.numel();
    }
    for_each_tile(tiles, numel, [&](const Tile& tile) { run_tile(jobs[tile.item], tile); });
  }
}

// Reads `from`, a vector of any dtype, into `to`, element c to position order[c].
template <typename Acc>
void read_vector(const at::Tensor& from, Acc* to, const std::vector<int64_t>& order) {
  constexpr auto kType = c10::CppTypeToScalarType<Acc>::value;
  if (from.scalar_type() != kType || !from.is_contiguous()) {
    read_vector(from.to(kType).contiguous(), to, order);
    return;
  }
  const Acc* x = from.template const_data_ptr<Acc>();
  if (order.empty()) {
    std::copy_n(x, from.numel(), to);
    return;
  }
  for (size_t c = 0; c < order.size(); ++c) {
    to[order[c]] = x[c];
  }
}

// Writes snapshot[offset:offset + n] into the vector `to`, of any dtype.
template <typename Acc>
void write_vector(const at::Tensor& snapshot, int64_t offset, const at::Tensor& to) {
  if (to.scalar_type() == snapshot.scalar_type() && to.is_contiguous()) {
    std::copy_n(
        snapshot.template const_data_ptr<Acc>() + offset, to.numel(),
        to.template mutable_data_ptr<Acc>());
  } else {
    to.copy_(snapshot.narrow(0, offset, to.numel()));
  }
}

template <typename Acc>
at::Tensor run(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  const auto dense = as_dense(weights);
  const auto estimates = describe(dense, layers, dims);
  const size_t count = estimates.items.size();
  check_vectors(estimates, weights, u, v, n_power_iterations);

  const auto options =
      at::TensorOptions().dtype(c10::CppTypeToScalarType<Acc>::value).device(weights[0].device());
  const auto snapshot = at::empty({estimates.snapshot_numel}, options);
  Acc* const data = snapshot.template mutable_data_ptr<Acc>();

  std::vector<Job<Acc>> jobs(count);
  std::vector<std::vector<int64_t>> orders(count);
  std::vector<std::vector<Acc>> reordered(count);
  for (size_t e = 0; e < count; ++e) {
    const auto& item = estimates.items[e];
    auto& job = jobs[e];
    job.weight = dense[item.layer].const_data_ptr();
    job.kernels = &kernels<Acc>(dense[item.layer].scalar_type());
    job.shape = {item.view.outer, item.view.rows, item.view.inner};
    job.v_first = v_first == item.first;
    job.iterations = n_power_iterations[item.layer];
    job.eps = eps;
    job.zero_guard = zero_guard;
    job.u = data + item.u;
    job.v = data + item.v;
    job.sigma = data + item.sigma;
    read_vector(u[e], job.u, {});
    orders[e] = item.view.column_order();
    if (!orders[e].empty()) {
      reordered[e].resize(item.view.cols());
      job.v = reordered[e].data();
    }
    read_vector(v[e], job.v, orders[e]);
    if (job.only_estimates()) {
      job.kernels->make_unit(job.u, item.view.rows);
      job.kernels->make_unit(job.v, item.view.cols());
    }
  }

  run_jobs(jobs, options);

  for (size_t e = 0; e < count; ++e) {
    const auto& item = estimates.items[e];
    for (size_t c = 0; c < orders[e].size(); ++c) {
      data[item.v + c] = reordered[e][orders[e][c]];
    }
    if (jobs[e].iterations > 0) {
      write_vector<Acc>(snapshot, item.u, u[e]);
      write_vector<Acc>(snapshot, item.v, v[e]);
    }
  }
  return snapshot;
}

at::Tensor power_cpu(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims, at::IntArrayRef n_power_iterations, double eps, bool v_first,
    bool zero_guard) {
  check_weights(weights);
  const auto run_typed = accumulate_type(weights) == at::kDouble ? run<double> : run<float>;
  return run_typed(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard);
}

at::Tensor estimate_cpu(
    at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef layers,
    at::IntArrayRef dims) {
  const std::vector<int64_t> none(weights.size(), 0);
  return power_cpu(weights, u, v, layers, dims, none, 0, false, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, CPU, m) {
  m.impl("power_", &power_cpu);
  m.impl("estimate", &estimate_cpu);
}

}  // namespace fastsn
