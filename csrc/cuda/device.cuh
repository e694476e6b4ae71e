#pragma once

#include "items.h"
#include "plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

// What the kernels share. No header of torch: these files compile wherever nvcc is.
namespace fastsn::cuda {

#ifndef FASTSN_DYNAMIC_SHARED
#define FASTSN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// The type in which sums are kept.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// An element of whatever type.
template <typename Acc>
__device__ __forceinline__ Acc read_as(const void* from, Type type, int at) {
  switch (type) {
    case Type::kFloat:
      return static_cast<Acc>(static_cast<const float*>(from)[at]);
    case Type::kDouble:
      return static_cast<Acc>(static_cast<const double*>(from)[at]);
    case Type::kBFloat16:
      return static_cast<Acc>(widen(static_cast<const __nv_bfloat16*>(from)[at]));
    default:
      return static_cast<Acc>(widen(static_cast<const __half*>(from)[at]));
  }
}

// Consecutive elements, loaded and stored at once: in words of 16 bytes, or of all if they are
// less.
template <typename T, int kCount = kPack>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T e[kCount];
};

template <int kBytes>
using Word =
    std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, unsigned>>;

template <int kCount = kPack, typename T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  using Piece = Word<sizeof(Pack<T, kCount>)>;
  Pack<T, kCount> pack;
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(pack) / sizeof(Piece)); ++k) {
    reinterpret_cast<Piece*>(&pack)[k] = __ldg(reinterpret_cast<const Piece*>(from) + k);
  }
  return pack;
}

template <int kCount, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  using Piece = Word<sizeof(Pack<T, kCount>)>;
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(pack) / sizeof(Piece)); ++k) {
    reinterpret_cast<Piece*>(to)[k] = reinterpret_cast<const Piece*>(&pack)[k];
  }
}

__device__ __forceinline__ int logical_column(const Digits& digits, int memory) {
  int logical = 0;
#pragma unroll
  for (int k = kMaxDigits - 1; k >= 0; --k) {
    if (k < digits.count) {
      const int rest = divide(memory, {digits.multiplier[k], digits.shift[k]});
      logical += (memory - rest * digits.size[k]) * digits.stride[k];
      memory = rest;
    }
  }
  return logical;
}

// body(position) with a function that tells where element `index` of the member or the unit vector
// lies in u or v. What it does is decided once, not for every element.
template <typename Body>
__device__ __forceinline__ void with_positions(
    const Matrix& matrix, bool of_members, const Body& body) {
  if (matrix.members_are_columns == of_members && matrix.digits.count > 0) {
    body([&](int index) { return logical_column(matrix.digits, index); });
  } else {
    body([](int index) { return index; });
  }
}

// As many items as fit into a kernel parameter of so many bytes, which cut the grid among them:
// item k has the blocks [first_block[k], first_block[k + 1]).
template <typename Item, int kBytes>
struct Batch {
  static constexpr int kCapacity =
      static_cast<int>((kBytes - 2 * sizeof(Item*)) / (sizeof(Item) + sizeof(int32_t)));
  Item items[kCapacity];
  int32_t first_block[kCapacity + 1];
  int32_t count;

  __device__ __forceinline__ int item_of(int block) const {
    int low = 0;
    int high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// First of all in a kernel: waits until what was launched before has ended, see overlaps_launches
// and prepare.
__device__ __forceinline__ void wait_for_inputs() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The sum over all threads of a block, in a fixed order, for every thread.
template <int kBlock, typename Acc>
__device__ __forceinline__ Acc block_sum(Acc x) {
  __shared__ Acc warp_sums[kBlock / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  __syncthreads();  // the sums of a call before have been read
  if (threadIdx.x % 32 == 0) {
    warp_sums[threadIdx.x / 32] = x;
  }
  __syncthreads();
  Acc sum = 0;
#pragma unroll
  for (int warp = 0; warp < kBlock / 32; ++warp) {
    sum += warp_sums[warp];
  }
  return sum;
}

// What a layer's sigma does to its weight: see factor_of in estimates.h.
template <typename Acc>
struct Factor {
  Acc sigma;
  Acc value;
  bool moves;
};

template <typename Acc>
__device__ __forceinline__ Factor<Acc> factor_of(
    const Acc* sigmas, int estimates, double scale, bool bound, bool zero_guard) {
  Acc sum = 0;
#pragma unroll 1
  for (int e = 0; e < estimates; ++e) {
    sum += sigmas[e];
  }
  const Acc sigma = sum / static_cast<Acc>(estimates);
  const Acc wanted = static_cast<Acc>(scale);
  if (zero_guard && sigma == 0) {
    return {sigma, wanted, false};
  }
  if (bound && sigma <= wanted) {
    return {sigma, 1, false};
  }
  return {sigma, wanted / sigma, true};
}

}  // namespace fastsn::cuda
