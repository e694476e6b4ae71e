#include "flat.cuh"

// Phase C: the normalized weights.
namespace fastsn::cuda {
namespace {

// From the end, where the power iteration before has just been: a part of that is still in the
// second-level cache.
template <typename T, typename Out, int kBytes>
__global__ void __launch_bounds__(kFlatThreads) scale_kernel(
    const __grid_constant__ Batch<ScaleItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  constexpr int kCount = kFlatPack<T, Out>;
  wait_for_inputs();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int index = batch.item_of(block);
  const ScaleItem& item = batch.items[index];
  const int64_t begin = int64_t{block - batch.first_block[index]} * kFlatStep<T, Out>;
  with_elements<T, Out>(item.vectorized, begin, item.numel, [&](const auto& elements) {
    Pack<T, kCount> weights[kFlatPacks];
    elements.load(item.weight, weights);
    const auto factor = factor_of(
        call.snapshot + item.sigma, item.estimates, item.scale, call.bound, call.zero_guard);
    Pack<Out, kCount> results[kFlatPacks];
#pragma unroll
    for (int j = 0; j < kFlatPacks; ++j) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        narrow(widen(weights[j].e[c]) * factor.value, results[j].e[c]);
      }
    }
    elements.store(item.out, results);
  });
}

template <typename T, typename Out>
struct Scale {
  using Item = ScaleItem;
  static constexpr int kBlock = kFlatThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = scale_kernel<T, Out, kBytes>;
  static int64_t blocks(const Item& item) { return ceil_div(item.numel, kFlatStep<T, Out>); }
};

}  // namespace

const char* scale(
    Where where, Type weights, Type out, const ScaleItem* items, int64_t count,
    const ScaleCall& call) {
  return launch_typed<Scale>(where, weights, out, items, count, call);
}

}  // namespace fastsn::cuda
