#include "launch.cuh"
#include "power.cuh"

#include <cfloat>

// Before phase A, where a layer does not iterate: u and v, which may be of any length, as unit
// vectors in the snapshot. A vector is divided by its largest element first: then squares neither
// overflow nor vanish.
namespace fastsn::cuda {
namespace {

template <typename Acc>
__host__ __device__ constexpr Acc smallest() {
  return sizeof(Acc) == 8 ? Acc(DBL_MIN) : Acc(FLT_MIN);
}

// The larger one; `x` where y is NaN.
template <typename Acc>
__device__ __forceinline__ Acc larger(Acc x, Acc y) {
  return y > x ? y : x;
}

// The largest over all threads of a block, for every thread.
template <typename Acc>
__device__ __forceinline__ Acc block_largest(Acc x) {
  __shared__ Acc of_warps[kRestThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  __syncthreads();  // what a call before left has been read
  if (threadIdx.x % 32 == 0) {
    of_warps[threadIdx.x / 32] = x;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kRestThreads / 32; ++warp) {
    x = larger(x, of_warps[warp]);
  }
  return x;
}

// What a length is divided by: itself, or for zeros a number that leaves them as they are.
template <typename Acc>
__device__ __forceinline__ Acc length_of(Acc squares) {
  const Acc length = sqrt(squares);
  return length < smallest<Acc>() ? smallest<Acc>() : length;
}

// A tile of a vector: all of a short one. Of a long one it leaves behind its largest element and
// the sum of its squares, divided by that.
template <typename Acc, int kBytes>
__global__ void __launch_bounds__(kRestThreads) rest_kernel(
    const __grid_constant__ Batch<RestItem, kBytes> batch,
    const __grid_constant__ Power<Acc> call) {
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const RestItem& item = batch.items[index];
  const int tile = block - batch.first_block[index];
  const Acc* const live = static_cast<const Acc*>(item.live);
  const int64_t begin = int64_t{tile} * kRestTile + threadIdx.x;
  Acc values[kRestValues];
#pragma unroll
  for (int k = 0; k < kRestValues; ++k) {
    const int64_t at = begin + k * kRestThreads;
    values[k] = at < item.length ? __ldg(live + at) : Acc(0);
  }
  Acc largest = smallest<Acc>();
#pragma unroll
  for (int k = 0; k < kRestValues; ++k) {
    largest = larger(largest, values[k] < 0 ? -values[k] : values[k]);
  }
  largest = block_largest(largest);
  Acc squares = 0;
#pragma unroll
  for (int k = 0; k < kRestValues; ++k) {
    values[k] /= largest;
    squares += values[k] * values[k];
  }
  squares = block_sum<kRestThreads>(squares);
  if (rest_tiles(item.length) > 1) {
    if (threadIdx.x == 0) {
      call.workspace[item.parts + 2 * tile] = largest;
      call.workspace[item.parts + 2 * tile + 1] = squares;
    }
    return;
  }
  const Acc length = length_of(squares);
#pragma unroll
  for (int k = 0; k < kRestValues; ++k) {
    const int64_t at = begin + k * kRestThreads;
    if (at < item.length) {
      call.snapshot[item.snapshot + at] = values[k] / length;
    }
  }
}

// A tile of a long vector, of which all tiles have left their parts behind.
template <typename Acc, int kBytes>
__global__ void __launch_bounds__(kRestThreads) rest_long_kernel(
    const __grid_constant__ Batch<RestItem, kBytes> batch,
    const __grid_constant__ Power<Acc> call) {
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const RestItem& item = batch.items[index];
  const Acc* const live = static_cast<const Acc*>(item.live);
  const Acc* const parts = call.workspace + item.parts;
  const int64_t tiles = rest_tiles(item.length);
  Acc largest = smallest<Acc>();
  for (int64_t k = threadIdx.x; k < tiles; k += kRestThreads) {
    largest = larger(largest, parts[2 * k]);
  }
  largest = block_largest(largest);
  Acc squares = 0;
  for (int64_t k = threadIdx.x; k < tiles; k += kRestThreads) {
    const Acc ratio = parts[2 * k] / largest;
    squares += parts[2 * k + 1] * ratio * ratio;
  }
  const Acc length = length_of(block_sum<kRestThreads>(squares));
  const int64_t begin = int64_t{block - batch.first_block[index]} * kRestTile + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kRestValues; ++k) {
    const int64_t at = begin + k * kRestThreads;
    if (at < item.length) {
      call.snapshot[item.snapshot + at] = __ldg(live + at) / largest / length;
    }
  }
}

template <typename Acc>
struct Rest {
  using Item = RestItem;
  static constexpr int kBlock = kRestThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = rest_kernel<Acc, kBytes>;
  static int64_t blocks(const Item& item) { return rest_tiles(item.length); }
};

template <typename Acc>
struct RestLong {
  using Item = RestItem;
  static constexpr int kBlock = kRestThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = rest_long_kernel<Acc, kBytes>;
  static int64_t blocks(const Item& item) {
    const int64_t tiles = rest_tiles(item.length);
    return tiles == 1 ? 0 : tiles;
  }
};

template <typename Acc>
const char* rest_of(Where where, const RestItem* items, int64_t count, const PowerCall& call) {
  const auto constants = typed<Acc>(call);
  const char* const error = launch<Rest<Acc>>(where, items, count, constants);
  return error != nullptr ? error : launch<RestLong<Acc>>(where, items, count, constants);
}

}  // namespace

const char* rest(
    Where where, bool is_double, const RestItem* items, int64_t count, const PowerCall& call) {
  return is_double ? rest_of<double>(where, items, count, call)
                   : rest_of<float>(where, items, count, call);
}

}  // namespace fastsn::cuda
