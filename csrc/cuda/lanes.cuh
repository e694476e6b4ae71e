#pragma once

#include "device.cuh"

// The threads of a block on a weight: who holds which elements, and how their sums come together.
namespace fastsn::cuda {

// The place of a thread in its block; see Cut.
struct Lane {
  int group;
  int groups;
  int lane;
  int member;  // among the `width` members side by side
  int inner;   // among the `classes` inner indices side by side
  bool active;

  __device__ __forceinline__ explicit Lane(const Cut& cut)
      : group(static_cast<int>(threadIdx.x) / cut.lanes),
        groups(kThreads / cut.lanes),
        lane(static_cast<int>(threadIdx.x) % cut.lanes),
        member(lane / cut.classes),
        inner(lane % cut.classes),
        active(member < cut.width) {}
};

// Where slot c of pack j of a thread lies among the members. kVectorized is cut.vectorized, known
// to the compiler.
template <bool kVectorized>
__device__ __forceinline__ int slot_member(const Cut& cut, const Lane& lane, int j, int c) {
  return kVectorized ? (j * cut.lanes + lane.lane) * kPack + c
                     : (j * kPack + c) * cut.width + lane.member;
}

// A unit together with one of the chunks of its inner indices.
struct Unit {
  int unit;
  int inner;   // of this thread
  bool valid;  // for this thread

  __device__ __forceinline__
  Unit(const Matrix& matrix, const Cut& cut, const Lane& lane, int index, int end)
      : unit(index), inner(lane.inner), valid(index < end && lane.active) {
    if (cut.class_chunks > 1) {
      unit = index / cut.class_chunks;
      inner += (index - unit * cut.class_chunks) * cut.classes;
      valid = valid && inner < matrix.inner;
    }
  }
};

// The elements of one pack of a unit, zeros where there are none. Members count from `first` and
// end before `end`.
template <bool kVectorized, typename T>
__device__ __forceinline__ Pack<T> load(
    const PowerItem& item, const Lane& lane, const Unit& unit, int first, int end, int j) {
  const T* const from = static_cast<const T*>(item.weight) +
      int64_t{unit.unit} * item.matrix.members * item.matrix.inner + unit.inner;
  Pack<T> pack{};
  if constexpr (kVectorized) {
    const int member = first + slot_member<true>(item.cut, lane, j, 0);
    if (unit.valid && member < end) {
      pack = load_pack(from + member);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const int member = first + slot_member<false>(item.cut, lane, j, c);
      if (unit.valid && member < end) {
        pack.e[c] = __ldg(from + int64_t{member} * item.matrix.inner);
      }
    }
  }
  return pack;
}

// For every value: its sum over the threads of the group with the same inner index. `exchange` is
// shared memory for twice as many values as the block has.
template <int kValues, typename Acc>
__device__ __forceinline__ void sum_classes(
    const Cut& cut, const Lane& lane, Acc (&values)[kValues], Acc* exchange) {
  Acc(*const before)[kThreads] = reinterpret_cast<Acc(*)[kThreads]>(exchange);
  Acc(*const between)[kThreads] = before + kValues;
  if (cut.classes == 1) {
    const int within = min(cut.lanes, 32);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      if (offset < within) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
        }
      }
    }
    if (cut.lanes <= 32) {
      return;
    }
    __syncthreads();  // the sums of the call before have been read
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        before[k][threadIdx.x / 32] = values[k];
      }
    }
    __syncthreads();
    const int warps = cut.lanes / 32;
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      Acc sum = 0;
#pragma unroll 1
      for (int warp = 0; warp < warps; ++warp) {
        sum += before[k][lane.group * warps + warp];
      }
      values[k] = sum;
    }
    return;
  }
  if (cut.width == 1) {
    return;
  }
  // In two steps, of about the square root of the members each.
  const int parts = static_cast<int>(ceilf(sqrtf(static_cast<float>(cut.width))));
  const int start = lane.group * cut.lanes + lane.inner;
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    before[k][threadIdx.x] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    if (lane.member < parts) {
      Acc sum = 0;
#pragma unroll 1
      for (int q = lane.member; q < cut.width; q += parts) {
        sum += before[k][start + q * cut.classes];
      }
      between[k][threadIdx.x] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    Acc sum = 0;
#pragma unroll 1
    for (int q = 0; q < parts; ++q) {
      sum += between[k][start + q * cut.classes];
    }
    values[k] = sum;
  }
}

// The sums of all groups and inner indices of a block, one for each member that a group holds:
// write(member, sum). `shared` holds kThreads times kCount elements.
template <int kCount, typename Acc, typename Write>
__device__ __forceinline__ void sum_groups(
    const Cut& cut, const Lane& own, const Acc (&sums)[kCount], Acc* shared, const Write& write) {
  __syncthreads();  // whatever was in `shared` has been read
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    shared[s * kThreads + threadIdx.x] = sums[s];
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kCount * cut.lanes; k += kThreads) {
    Acc* const column = shared + k / cut.lanes * kThreads + k % cut.lanes;
    Acc sum = column[0];
    for (int group = 1; group < own.groups; ++group) {
      sum += column[group * cut.lanes];
    }
    column[0] = sum;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kCount * cut.width; k += kThreads) {
    const int slot = k / cut.width;
    const int member = k % cut.width;
    const Acc* const run = shared + slot * kThreads + member * cut.classes;
    Acc sum = run[0];
    for (int inner = 1; inner < cut.classes; ++inner) {
      sum += run[inner];
    }
    const int pack = slot / kPack;
    const int c = slot % kPack;
    write(
        cut.vectorized ? (pack * cut.lanes + member) * kPack + c : slot * cut.width + member, sum);
  }
}

// What belongs to pack j of a thread, of the members that the block holds.
template <bool kVectorized, typename Acc>
__device__ __forceinline__ Pack<Acc> held_pack(
    const Cut& cut, const Lane& lane, const Acc* shared, int j) {
  if constexpr (kVectorized) {
    return *reinterpret_cast<const Pack<Acc>*>(shared + slot_member<true>(cut, lane, j, 0));
  } else {
    Pack<Acc> pack{};
    if (lane.active) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        pack.e[c] = shared[slot_member<false>(cut, lane, j, c)];
      }
    }
    return pack;
  }
}

}  // namespace fastsn::cuda
