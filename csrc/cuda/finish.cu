#include "launch.cuh"
#include "power.cuh"

// Phase B of a power iteration: the summands are added up, then sigma and the new u and v.
namespace fastsn::cuda {
namespace {

// What the products are divided by for the new vectors, the second one by both of them: their
// product could be too small a number, and so could what they are divided into if it were
// multiplied with their inverses. In the workspace at `norms` of an item whose vectors many blocks
// normalize.
template <typename Acc>
struct Norms {
  Acc first;
  Acc second;
  Acc moves;  // 0: the vectors stay as they are
};
static_assert(sizeof(Norms<float>) == kNormNumel * sizeof(float));

// Sum of `values`, in a fixed order, for every thread. Other blocks of this grid may have written
// them: past the first-level cache, which may have other contents.
template <typename Acc>
__device__ __forceinline__ Acc sum_of(const Acc* values, int64_t count) {
  Acc sum = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < count; k += kFinishThreads) {
    sum += __ldcg(values + k);
  }
  return block_sum<kFinishThreads>(sum);
}

// The larger one; unlike max, NaN where x is.
template <typename Acc>
__device__ __forceinline__ Acc at_least(Acc x, Acc eps) {
  return x < eps ? eps : x;
}

// body(k) for every k of a part of [0, count) that begins at `begin`.
template <typename Body>
__device__ __forceinline__ void for_each(
    int64_t begin, int64_t end, int64_t count, const Body& body) {
  const int64_t until = min(end, count);
#pragma unroll 4
  for (int64_t k = begin + threadIdx.x; k < until; k += kFinishThreads) {
    body(static_cast<int>(k));
  }
}

// Of both vectors one after the other, elements [begin, end): new ones, or the old ones into the
// snapshot, where those of an estimate are already.
template <typename Acc>
__device__ __forceinline__ void write_vectors(
    const PowerItem& item, const Power<Acc>& call, const Norms<Acc>& norms, int64_t begin,
    int64_t end) {
  const bool unit_first = item.cut.unit_first;
  const auto write = [&](const Vector& vector, bool of_members, const Acc* product, Acc divisor,
                         int64_t length, int64_t from) {
    Acc* const live = static_cast<Acc*>(vector.live);
    Acc* const snapshot = call.snapshot + vector.snapshot;
    const int64_t first = from > begin ? 0 : begin - from;
    if (norms.moves != 0) {
      with_positions(item.matrix, of_members, [&](const auto& position) {
        for_each(first, end - from, length, [&](int k) {
          const Acc value = __ldcg(product + k) / norms.first / divisor;
          const int at = position(k);
          snapshot[at] = value;
          live[at] = value;
        });
      });
    } else if (call.first_round && !item.only_estimate) {
      for_each(first, end - from, length, [&](int k) { snapshot[k] = live[k]; });
    }
  };
  const int64_t first_length = unit_first ? item.matrix.members : unit_length(item.matrix);
  const int64_t second_length = unit_first ? unit_length(item.matrix) : item.matrix.members;
  write(
      unit_first ? item.member : item.unit, unit_first, call.workspace + item.first, Acc(1),
      first_length, 0);
  write(
      unit_first ? item.unit : item.member, !unit_first, call.workspace + item.second, norms.second,
      second_length, first_length);
}

// sigma, and what the vectors are multiplied with, when all blocks of an item have added up.
template <typename Acc>
__device__ __forceinline__ Norms<Acc> norms_of(
    const PowerItem& item, const Power<Acc>& call, Acc first_squares, Acc first_norm) {
  if (item.only_estimate) {
    if (threadIdx.x == 0) {
      call.snapshot[item.sigma] = first_squares;
    }
    return {1, 1, 0};
  }
  const Acc norm = sqrt(sum_of(call.workspace + item.second_squares, reduce_blocks(item)));
  const Acc divisor = at_least(norm, call.eps);
  const Acc sigma = norm * (norm / divisor);
  if (threadIdx.x == 0) {
    call.snapshot[item.sigma] = sigma;
  }
  const bool moves = !(call.zero_guard && sigma == 0);
  return {first_norm, divisor, static_cast<Acc>(moves)};
}

// kPack consecutive columns of the summands' sum, over every kParts-th tile from `part` on. Where
// `vectorized`, all of them are there.
constexpr int kParts = kFinishThreads / (kReduceChunk / kPack);

template <typename Acc>
__device__ __forceinline__ Pack<Acc> sum_tiles(
    const Acc* summands, int64_t at, int64_t length, int part, int tiles, bool vectorized) {
  constexpr int kAtOnce = 4;
  Pack<Acc> sum{};
  for (int base = part; base < tiles; base += kAtOnce * kParts) {
    Pack<Acc> packs[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int tile = base + k * kParts;
      packs[k] = {};
      if (vectorized) {
        if (tile < tiles) {
          packs[k] = load_pack(summands + tile * length + at);
        }
      } else {
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          if (tile < tiles && at + c < length) {
            packs[k].e[c] = __ldg(summands + tile * length + at + c);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        sum.e[c] += packs[k].e[c];
      }
    }
  }
  return sum;
}

// Blocks that a multiprocessor runs at once: those of a network of some million elements all start
// together.
template <typename Acc>
constexpr int kFinishBlocks = sizeof(Acc) == 8 ? 2 : 3;

// A block adds up a chunk of the summands of `second`; the last one of an item goes on to the
// norms, and to the vectors if they are short.
template <typename Acc, int kBytes>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks<Acc>) finish_kernel(
    const __grid_constant__ Batch<PowerItem, kBytes> batch,
    const __grid_constant__ Power<Acc> call) {
  constexpr int kLanes = kReduceChunk / kPack;
  constexpr int kWarps = kFinishThreads / 32;
  __shared__ Acc parts[kWarps][kReduceChunk];
  __shared__ bool is_last;
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const PowerItem& item = batch.items[index];
  const int chunk = block - batch.first_block[index];
  const int64_t length = second_length(item);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int part = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t begin = int64_t{chunk} * kReduceChunk;
  Pack<Acc> sum{};
  if (begin + lane * kPack < length) {
    const Acc* const summands = call.workspace + item.partial;
    const int64_t at = begin + lane * kPack;
    sum = length % kPack == 0 ? sum_tiles(summands, at, length, part, item.cut.tiles, true)
                              : sum_tiles(summands, at, length, part, item.cut.tiles, false);
  }
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      sum.e[c] += __shfl_xor_sync(0xffffffffu, sum.e[c], offset);
    }
  }
  if (static_cast<int>(threadIdx.x) % 32 < kLanes) {
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      parts[threadIdx.x / 32][lane * kPack + c] = sum.e[c];
    }
  }
  // The blocks of an item all need this, and none waits for the others.
  const Acc first_squares = sum_of(call.workspace + item.first_squares, item.cut.tiles);
  const Acc first_norm = at_least(sqrt(first_squares), call.eps);
  const int64_t own = begin + threadIdx.x;
  Acc square = 0;
  if (threadIdx.x < kReduceChunk && own < length) {
    Acc total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total += parts[warp][threadIdx.x];
    }
    call.workspace[item.second + own] = total;
    // Of what will be normalized: the square of a product alone could be too large, or too small.
    const Acc scaled = total / first_norm;
    square = scaled * scaled;
  }
  const Acc squares = block_sum<kFinishThreads>(square);
  const int blocks = static_cast<int>(reduce_blocks(item));
  if (threadIdx.x == 0) {
    call.workspace[item.second_squares + chunk] = squares;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = blocks == 1 || atomicAdd(call.tickets + item.ticket, 1) == blocks - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();
  const auto norms = norms_of(item, call, first_squares, first_norm);
  if (is_normalized_at_once(item)) {
    write_vectors(item, call, norms, 0, vector_length(item));
  } else if (threadIdx.x == 0) {
    Acc* const to = call.workspace + item.norms;
    to[0] = norms.first;
    to[1] = norms.second;
    to[2] = norms.moves;
  }
}

// Long vectors: a part of them by each block.
template <typename Acc, int kBytes>
__global__ void __launch_bounds__(kFinishThreads) normalize_kernel(
    const __grid_constant__ Batch<PowerItem, kBytes> batch,
    const __grid_constant__ Power<Acc> call) {
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const PowerItem& item = batch.items[index];
  const Acc* const norms = call.workspace + item.norms;
  const int64_t begin = int64_t{block - batch.first_block[index]} * kNormalizeTile;
  write_vectors(item, call, {norms[0], norms[1], norms[2]}, begin, begin + kNormalizeTile);
}

template <typename Acc>
struct Finish {
  using Item = PowerItem;
  static constexpr int kBlock = kFinishThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = finish_kernel<Acc, kBytes>;
  static int64_t blocks(const Item& item) { return reduce_blocks(item); }
};

template <typename Acc>
struct Normalize {
  using Item = PowerItem;
  static constexpr int kBlock = kFinishThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = normalize_kernel<Acc, kBytes>;
  static int64_t blocks(const Item& item) {
    const bool at_once = is_normalized_at_once(item) || item.only_estimate;
    return at_once ? 0 : ceil_div(vector_length(item), kNormalizeTile);
  }
};

template <typename Acc>
const char* finish_of(Where where, const PowerItem* items, int64_t count, const PowerCall& call) {
  const auto constants = typed<Acc>(call);
  const char* const error = launch<Finish<Acc>>(where, items, count, constants);
  return error != nullptr ? error : launch<Normalize<Acc>>(where, items, count, constants);
}

}  // namespace

const char* finish(
    Where where, bool is_double, const PowerItem* items, int64_t count, const PowerCall& call) {
  return is_double ? finish_of<double>(where, items, count, call)
                   : finish_of<float>(where, items, count, call);
}

}  // namespace fastsn::cuda
