#pragma once

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

#include <type_traits>

// What the kernels share that go over the elements of weights in the order of their memory: scale,
// product and gradient. A thread has kFlatPacks packs of each tensor, all of which it loads before
// it uses the first one.
namespace fastsn::cuda {

// Elements of a pack: 16 bytes of the wider one of two types.
template <typename A, typename B>
constexpr int kFlatPack = 16 / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
// What a block has at once.
template <typename A, typename B>
constexpr int kFlatStep = kFlatThreads * kFlatPacks * kFlatPack<A, B>;

// Elements of a layer that a block has at once: all of the step, in packs, or else `count` of them,
// each by itself.
template <bool kWhole, int kCount, int kPacks = kFlatPacks>
struct Flat {
  int64_t begin;
  int count;

  // Where element c of pack j of a thread lies, after `begin`.
  static __device__ __forceinline__ int slot(int j, int c) {
    return kWhole ? (j * kFlatThreads + static_cast<int>(threadIdx.x)) * kCount + c
                  : (j * kCount + c) * kFlatThreads + static_cast<int>(threadIdx.x);
  }

  // Zeros where there are none.
  template <typename T>
  __device__ __forceinline__ void load(const void* from, Pack<T, kCount> (&packs)[kPacks]) const {
    const T* const source = static_cast<const T*>(from) + begin;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if constexpr (kWhole) {
        packs[j] = load_pack<kCount>(source + slot(j, 0));
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          packs[j].e[c] = slot(j, c) < count ? __ldg(source + slot(j, c)) : T{};
        }
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(void* out, const Pack<T, kCount> (&packs)[kPacks]) const {
    T* const to = static_cast<T*>(out) + begin;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if constexpr (kWhole) {
        store_pack(to + slot(j, 0), packs[j]);
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if (slot(j, c) < count) {
            to[slot(j, c)] = packs[j].e[c];
          }
        }
      }
    }
  }
};

// body(elements) for a step of a layer from `begin` on that ends at `end` at the latest.
template <typename A, typename B, typename Body>
__device__ __forceinline__ void with_elements(
    bool vectorized, int64_t begin, int64_t end, const Body& body) {
  const int count = static_cast<int>(min(end - begin, int64_t{kFlatStep<A, B>}));
  if (vectorized && count == kFlatStep<A, B>) {
    body(Flat<true, kFlatPack<A, B>>{begin, count});
  } else {
    body(Flat<false, kFlatPack<A, B>>{begin, count});
  }
}

template <typename Acc>
struct Scaling {
  const Acc* snapshot;
  Acc* workspace;
  bool bound;
  bool zero_guard;
};

template <typename Acc>
Scaling<Acc> typed(const ScaleCall& call) {
  return {
      static_cast<const Acc*>(call.snapshot), static_cast<Acc*>(call.workspace), call.bound,
      call.zero_guard};
}

// For the types that occur: a weight and the same, or an fp32 weight and what autocast asks for.
template <template <typename, typename> typename Kernel, typename T, typename Item>
const char* launch_other(
    Where where, Type other, const Item* items, int64_t count, const ScaleCall& call) {
  return with_type(other, [&](auto value) -> const char* {
    using Other = decltype(value);
    if constexpr (std::is_same_v<T, Other> || (std::is_same_v<T, float> && sizeof(Other) == 2)) {
      return launch<Kernel<T, Other>>(where, items, count, typed<Accumulate<T>>(call));
    } else {
      return "no kernel for these two types";
    }
  });
}

template <template <typename, typename> typename Kernel, typename Item>
const char* launch_typed(
    Where where, Type weights, Type other, const Item* items, int64_t count,
    const ScaleCall& call) {
  return with_type(weights, [&](auto value) {
    return launch_other<Kernel, decltype(value)>(where, other, items, count, call);
  });
}

}  // namespace fastsn::cuda
