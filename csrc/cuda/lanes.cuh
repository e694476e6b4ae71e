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
      : group(static_cast<int>(threadIdx.x) >> cut.lane_bits),
        groups(1 << cut.group_bits),
        lane(static_cast<int>(threadIdx.x) & (cut.lanes - 1)),
        member(divide(lane, cut.by_classes)),
        inner(lane - member * cut.classes),
        active(member < cut.width) {}
};

// Where slot c of pack j of a thread lies among the members. kVectorized is cut.vectorized, known
// to the compiler.
template <bool kVectorized>
__device__ __forceinline__ int slot_member(const Cut& cut, const Lane& lane, int j, int c) {
  return kVectorized ? ((j << cut.lane_bits) + lane.lane) * kPack + c
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
      unit = divide(index, cut.by_class_chunks);
      inner += (index - unit * cut.class_chunks) * cut.classes;
      valid = valid && inner < matrix.inner;
    }
  }

  __device__ __forceinline__ int position(const Matrix& matrix) const {
    return unit * matrix.inner + inner;
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
      pack = load_pack<kPack>(from + member);
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
template <int kBlock, int kValues, typename Acc>
__device__ __forceinline__ void sum_classes(
    const Cut& cut, const Lane& lane, Acc (&values)[kValues], Acc* exchange) {
  Acc(*const before)[kBlock] = reinterpret_cast<Acc(*)[kBlock]>(exchange);
  Acc(*const between)[kBlock] = before + kValues;
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
  const int parts = cut.parts;
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

// The sums over the lanes of groups of up to a warp, shared out among these: of kValues values of
// every lane each keeps some, which then come first. Returns how many, and at which one they begin;
// where there are more lanes than values, neighbours keep the same.
template <int kValues, typename Acc>
__device__ __forceinline__ int2 sum_lanes(const Cut& cut, int lane, Acc (&values)[kValues]) {
  int begin = 0;
  int offset = cut.lanes / 2;
  int kept = kValues;
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2) {
    if (offset > 0) {
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int k = 0; k < half; ++k) {
        const Acc given = upper ? values[k] : values[k + half];
        values[k] =
            (upper ? values[k + half] : values[k]) + __shfl_xor_sync(0xffffffffu, given, offset);
      }
      begin += upper ? half : 0;
      kept = half;
      offset /= 2;
    }
  }
  for (; offset > 0; offset /= 2) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
  }
  return {kept, begin};
}

// The sums of all groups and inner indices of a block, for the members that a group holds:
// write(member, pack) with as many sums as belong together. `shared` holds kBlock times kCount
// elements.
template <int kBlock, bool kVectorized, int kCount, typename Acc, typename Write>
__device__ __forceinline__ void sum_groups(
    const Cut& cut, const Lane& own, Acc (&sums)[kCount], Acc* shared, const Write& write) {
  constexpr int kRun = kVectorized ? kPack : 1;
  // Groups of the same warp.
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset >= cut.lanes) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], offset);
      }
    }
  }
  const int sets = min(own.groups, kBlock / 32);
  if (kVectorized && sets == 1) {
#pragma unroll
    for (int j = 0; j < kCount / kRun; ++j) {
      Pack<Acc, kRun> run;
#pragma unroll
      for (int c = 0; c < kRun; ++c) {
        run.e[c] = sums[j * kRun + c];
      }
      write(slot_member<true>(cut, own, j, 0), run);
    }
    return;
  }
  const int set = cut.lanes < 32 ? static_cast<int>(threadIdx.x) / 32 : own.group;
  const int at = set * cut.lanes + own.lane;
  __syncthreads();  // whatever was in `shared` has been read
  if (static_cast<int>(threadIdx.x) % 32 < cut.lanes) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      shared[s * kBlock + at] = sums[s];
    }
  }
  __syncthreads();
  const bool has_classes = !kVectorized && cut.classes > 1;
  for (int k = threadIdx.x; k < (kCount / kRun) << cut.lane_bits; k += kBlock) {
    const int run = k >> cut.lane_bits;
    Acc* const from = shared + run * kRun * kBlock + (k & (cut.lanes - 1));
    Pack<Acc, kRun> total;
#pragma unroll
    for (int c = 0; c < kRun; ++c) {
      total.e[c] = from[c * kBlock];
      for (int other = 1; other < sets; ++other) {
        total.e[c] += from[c * kBlock + other * cut.lanes];
      }
    }
    if (has_classes) {
      from[0] = total.e[0];
    } else {
      write(k * kRun, total);
    }
  }
  if (!has_classes) {
    return;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kCount * cut.width; k += kBlock) {
    const int slot = divide(k, cut.by_width);
    const Acc* const run = shared + slot * kBlock + (k - slot * cut.width) * cut.classes;
    Pack<Acc, kRun> sum{};
    for (int inner = 0; inner < cut.classes; ++inner) {
      sum.e[0] += run[inner];
    }
    write(k, sum);
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
