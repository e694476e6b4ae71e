#include "launch.cuh"
#include "power.cuh"

// Phase B of a power iteration: the summands are added up, then sigma and the new u and v.
namespace fastsn::cuda {
namespace {

// All of a vector: body(k) for every k, by the threads of a block.
template <typename Body>
__device__ __forceinline__ void for_each(int64_t count, const Body& body) {
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    body(static_cast<int>(k));
  }
}

// Both vectors as they are into the snapshot.
template <typename Acc>
__device__ __forceinline__ void keep_vectors(const PowerItem& item, const Power<Acc>& call) {
  if (!call.first_round) {
    return;
  }
  for_each(item.matrix.members, [&](int k) {
    call.snapshot[item.member.snapshot + k] = read_live<Acc>(item.member, k);
  });
  for_each(unit_length(item.matrix), [&](int k) {
    call.snapshot[item.unit.snapshot + k] = read_live<Acc>(item.unit, k);
  });
}

// The larger one; unlike max, NaN where x is.
template <typename Acc>
__device__ __forceinline__ Acc at_least(Acc x, Acc eps) {
  return x < eps ? eps : x;
}

// What is left when both products are complete: by one block per item.
template <typename Acc>
__device__ __forceinline__ void normalize(const PowerItem& item, const Power<Acc>& call) {
  const bool unit_first = item.cut.unit_first;
  const Vector& first = unit_first ? item.member : item.unit;
  const Vector& second = unit_first ? item.unit : item.member;
  const Acc* const y = call.workspace + item.first;
  const Acc* const z = call.workspace + item.second;
  const int64_t y_length = first_length(item);
  const int64_t z_length = second_length(item);

  Acc sum = 0;
  if (item.only_estimate) {
    for_each(y_length, [&](int k) {
      sum += y[k] * read_vector(call, first, position(item.matrix, unit_first, k));
    });
    const Acc sigma = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) {
      call.snapshot[item.sigma] = sigma;
    }
    keep_vectors(item, call);
    return;
  }
  for_each(y_length, [&](int k) { sum += y[k] * y[k]; });
  const Acc y_norm = sqrt(block_sum<kThreads>(sum));
  const Acc y_scale = 1 / at_least(y_norm, call.eps);
  sum = 0;
  // Other blocks of this grid wrote z: past the first-level cache, which may have other contents.
  for_each(z_length, [&](int k) {
    const Acc scaled = __ldcg(z + k) * y_scale;
    sum += scaled * scaled;
  });
  const Acc z_norm = sqrt(block_sum<kThreads>(sum));
  const Acc divisor = at_least(z_norm, call.eps);
  const Acc sigma = z_norm * (z_norm / divisor);
  if (threadIdx.x == 0) {
    call.snapshot[item.sigma] = sigma;
  }
  if (call.zero_guard && sigma == 0) {
    keep_vectors(item, call);
    return;
  }
  const auto write = [&](const Vector& vector, bool of_members, int k, Acc value) {
    const int at = position(item.matrix, of_members, k);
    call.snapshot[vector.snapshot + at] = value;
    write_live(vector, at, value);
  };
  const Acc z_scale = y_scale * (1 / divisor);
  for_each(y_length, [&](int k) { write(first, unit_first, k, y[k] * y_scale); });
  for_each(z_length, [&](int k) { write(second, !unit_first, k, __ldcg(z + k) * z_scale); });
}

// A block adds up a chunk of the summands; the last one of an item goes on to normalize.
template <typename Acc, int kBytes>
__global__ void __launch_bounds__(kThreads) finish_kernel(
    const __grid_constant__ Batch<PowerItem, kBytes> batch,
    const __grid_constant__ Power<Acc> call) {
  constexpr int kParts = kThreads / kReduceChunk;
  __shared__ Acc parts[kParts][kReduceChunk];
  __shared__ bool is_last;
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const PowerItem& item = batch.items[index];
  const int64_t length = second_length(item);
  const int column = static_cast<int>(threadIdx.x) % kReduceChunk;
  const int part = static_cast<int>(threadIdx.x) / kReduceChunk;
  const int64_t at = int64_t{block - batch.first_block[index]} * kReduceChunk + column;
  Acc sum = 0;
  if (at < length) {
    const Acc* const summands = call.workspace + item.partial + at;
#pragma unroll 4
    for (int tile = part; tile < item.cut.tiles; tile += kParts) {
      sum += summands[tile * length];
    }
  }
  parts[part][column] = sum;
  __syncthreads();
  if (part == 0 && at < length) {
#pragma unroll
    for (int k = 1; k < kParts; ++k) {
      sum += parts[k][column];
    }
    call.workspace[item.second + at] = sum;
  }
  const int blocks = static_cast<int>(reduce_blocks(item));
  if (blocks > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      is_last = atomicAdd(call.tickets + item.ticket, 1) == blocks - 1;
    }
    __syncthreads();
    if (!is_last) {
      return;
    }
    __threadfence();
  } else {
    __syncthreads();
  }
  normalize(item, call);
}

template <typename Acc>
struct Finish {
  using Item = PowerItem;
  static constexpr int kBlock = kThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = finish_kernel<Acc, kBytes>;
  static int64_t blocks(const Item& item) { return reduce_blocks(item); }
};

}  // namespace

const char* finish(
    Where where, bool is_double, const PowerItem* items, int64_t count, const PowerCall& call) {
  return is_double ? launch<Finish<double>>(where, items, count, typed<double>(call))
                   : launch<Finish<float>>(where, items, count, typed<float>(call));
}

}  // namespace fastsn::cuda
