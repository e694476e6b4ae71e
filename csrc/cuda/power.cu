#include "kernels.h"
#include "launch.cuh"

// Phases A and B of a power iteration: the weight is read once, or, where its units are cut across,
// twice by the same block, the second time from a cache.
//
//   members -> units -> members:  y[n,i] = sum_r W[n,r,i] x[r],  z[r] = sum_{n,i} W[n,r,i] y[n,i]
//   units -> members -> units:    y[r] = sum_{n,i} W[n,r,i] x[n,i],  z[n,i] = sum_r W[n,r,i] y[r]
//
// In both, a tile has its part of `first` = y complete and one summand of `second` = z.
namespace fastsn::cuda {
namespace {

template <typename Acc>
struct Power {
  Acc* snapshot;
  Acc* workspace;
  int* tickets;
  Acc eps;
  bool first_round;
  bool zero_guard;
};

template <typename Acc>
constexpr int kPacksOf = packs(sizeof(Acc) == 8);
template <typename Acc>
constexpr int kSlots = kPack * kPacksOf<Acc>;
// What a block shares: the members that it holds, or its threads' sums over all units; then what
// sum_classes exchanges.
template <typename Acc>
constexpr int kSharedBytes = kThreads * (kSlots<Acc> + 2) * static_cast<int>(sizeof(Acc));

template <typename Acc>
__device__ __forceinline__ Acc read_live(const Vector& vector, int at) {
  switch (vector.type) {
    case Type::kFloat:
      return static_cast<Acc>(static_cast<const float*>(vector.live)[at]);
    case Type::kDouble:
      return static_cast<Acc>(static_cast<const double*>(vector.live)[at]);
    case Type::kBFloat16:
      return static_cast<Acc>(widen(static_cast<const __nv_bfloat16*>(vector.live)[at]));
    default:
      return static_cast<Acc>(widen(static_cast<const __half*>(vector.live)[at]));
  }
}

template <typename Acc>
__device__ __forceinline__ void write_live(const Vector& vector, int at, Acc value) {
  switch (vector.type) {
    case Type::kFloat:
      static_cast<float*>(vector.live)[at] = static_cast<float>(value);
      break;
    case Type::kDouble:
      static_cast<double*>(vector.live)[at] = static_cast<double>(value);
      break;
    case Type::kBFloat16:
      narrow(static_cast<float>(value), static_cast<__nv_bfloat16*>(vector.live)[at]);
      break;
    default:
      narrow(static_cast<float>(value), static_cast<__half*>(vector.live)[at]);
  }
}

// u or v before this round.
template <typename Acc>
__device__ __forceinline__ Acc read_vector(const Power<Acc>& call, const Vector& vector, int at) {
  return call.first_round ? read_live<Acc>(vector, at) : call.snapshot[vector.snapshot + at];
}

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

// members -> units -> members. The tile owns whole units. A unit that fits into the registers of
// its group is multiplied both times from there; longer ones are read twice, a part at a time.
template <bool kVectorized, typename T, typename Acc>
__device__ __forceinline__ void members_first(
    const PowerItem& item, int tile, const Power<Acc>& call, Acc* shared) {
  constexpr int kPacks = kPacksOf<Acc>;
  constexpr bool kPrefetches = sizeof(Acc) == sizeof(float);  // fp64 has no registers left for it
  const Matrix& matrix = item.matrix;
  const Cut& cut = item.cut;
  const Lane lane(cut);
  const int begin = tile * cut.span;
  const int end = min(begin + cut.span, matrix.units * cut.class_chunks);
  const int held = cut.width * kSlots<Acc>;
  const bool fits = matrix.members <= held;
  Acc* const exchange = shared + kThreads * kSlots<Acc>;
  Acc* const first = call.workspace + item.first;
  Acc* const part = call.workspace + item.partial + int64_t{tile} * matrix.members;

  const auto load_unit = [&](Pack<T>(&to)[kPacks], const Unit& unit, int from) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      to[j] = load<kVectorized, T>(item, lane, unit, from, matrix.members, j);
    }
  };
  const auto add_scaled = [&](Acc(&to)[kSlots<Acc>], const Pack<T>(&packs)[kPacks], Acc factor) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        to[j * kPack + c] += widen(packs[j].e[c]) * factor;
      }
    }
  };
  const auto write_part = [&](Acc(&sums)[kSlots<Acc>], int from) {
    sum_groups(cut, lane, sums, shared, [&](int member, Acc sum) {
      if (from + member < matrix.members) {
        part[from + member] = sum;
      }
    });
  };

  for (int from = 0; from == 0 || from < matrix.members; from += held) {
    __syncthreads();  // what `shared` held before has been read
    for (int k = threadIdx.x; k < held; k += kThreads) {
      const int member = from + k;
      shared[k] = member < matrix.members
          ? read_vector(call, item.member, position(matrix, true, member))
          : Acc(0);
    }
    __syncthreads();
    Acc sums[kSlots<Acc>] = {};
    // The unit after the present one is on its way while that is summed up.
    Pack<T> next[kPacks];
    if constexpr (kPrefetches) {
      load_unit(next, Unit(matrix, cut, lane, begin + lane.group, end), from);
    }
    for (int base = begin; base < end; base += lane.groups) {
      const Unit unit(matrix, cut, lane, base + lane.group, end);
      Pack<T> packs[kPacks];
      if constexpr (kPrefetches) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
          packs[j] = next[j];
        }
        load_unit(next, Unit(matrix, cut, lane, base + lane.groups + lane.group, end), from);
      } else {
        load_unit(packs, unit, from);
      }
      Acc dot[1] = {0};
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const auto x = held_pack<kVectorized>(cut, lane, shared, j);
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          dot[0] += widen(packs[j].e[c]) * x.e[c];
        }
      }
      sum_classes(cut, lane, dot, exchange);
      const int64_t at = int64_t{unit.unit} * matrix.inner + unit.inner;
      if (unit.valid && lane.member == 0) {
        first[at] = from == 0 ? dot[0] : first[at] + dot[0];
      }
      if (fits) {
        add_scaled(sums, packs, dot[0]);
      }
    }
    if (fits && !item.only_estimate) {
      write_part(sums, from);
    }
  }
  if (fits || item.only_estimate) {
    return;
  }
  __syncthreads();  // `first` is complete
  for (int from = 0; from < matrix.members; from += held) {
    Acc sums[kSlots<Acc>] = {};
    for (int base = begin; base < end; base += lane.groups) {
      const Unit unit(matrix, cut, lane, base + lane.group, end);
      Pack<T> packs[kPacks];
      load_unit(packs, unit, from);
      const int64_t at = int64_t{unit.unit} * matrix.inner + unit.inner;
      add_scaled(sums, packs, unit.valid ? first[at] : Acc(0));
    }
    write_part(sums, from);
  }
}

// units -> members -> units. The tile owns one pack of members per thread and goes over all units
// twice.
template <bool kVectorized, typename T, typename Acc>
__device__ __forceinline__ void units_first(
    const PowerItem& item, int tile, const Power<Acc>& call, Acc* shared) {
  constexpr int kUnits = kPacksOf<Acc>;
  const Matrix& matrix = item.matrix;
  const Cut& cut = item.cut;
  const Lane lane(cut);
  const int from = tile * cut.span;
  const int until = min(from + cut.span, matrix.members);
  const int end = matrix.units * cut.class_chunks;
  const int stride = kUnits * lane.groups;

  Acc sums[kPack] = {};
  for (int base = 0; base < end; base += stride) {
    Pack<T> packs[kUnits];
    Acc x[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(matrix, cut, lane, base + k * lane.groups + lane.group, end);
      packs[k] = load<kVectorized, T>(item, lane, unit, from, until, 0);
      const int at = unit.unit * matrix.inner + unit.inner;
      x[k] = unit.valid ? read_vector(call, item.unit, position(matrix, false, at)) : Acc(0);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        sums[c] += widen(packs[k].e[c]) * x[k];
      }
    }
  }
  Acc* const y = shared + kPack * kThreads;
  Acc* const exchange = y + kPack * kThreads;
  static_assert(2 * kPack + 2 * kUnits <= kSlots<Acc> + 2);
  Acc* const first = call.workspace + item.first;
  sum_groups(cut, lane, sums, shared, [&](int member, Acc sum) {
    y[member] = sum;
    if (from + member < until) {
      first[from + member] = sum;
    }
  });
  if (item.only_estimate) {
    return;
  }
  __syncthreads();  // y is complete
  const auto own = held_pack<kVectorized>(cut, lane, y, 0);
  Acc* const part = call.workspace + item.partial + tile * unit_length(matrix);
  for (int base = 0; base < end; base += stride) {
    Acc dots[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(matrix, cut, lane, base + k * lane.groups + lane.group, end);
      const auto pack = load<kVectorized, T>(item, lane, unit, from, until, 0);
      dots[k] = 0;
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        dots[k] += widen(pack.e[c]) * own.e[c];
      }
    }
    sum_classes(cut, lane, dots, exchange);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(matrix, cut, lane, base + k * lane.groups + lane.group, end);
      if (unit.valid && lane.member == 0) {
        part[unit.unit * matrix.inner + unit.inner] = dots[k];
      }
    }
  }
}

template <typename T, int kBytes>
__global__ void __launch_bounds__(kThreads, 1) multiply_kernel(
    const __grid_constant__ Batch<PowerItem, kBytes> batch,
    const __grid_constant__ Power<Accumulate<T>> call) {
  FASTSN_DYNAMIC_SHARED(memory);
  auto* const shared = reinterpret_cast<Accumulate<T>*>(memory);
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const PowerItem& item = batch.items[index];
  const int tile = block - batch.first_block[index];
  if (tile == 0 && threadIdx.x == 0) {
    call.tickets[item.ticket] = 0;
  }
  if (item.cut.unit_first) {
    if (item.cut.vectorized) {
      units_first<true, T>(item, tile, call, shared);
    } else {
      units_first<false, T>(item, tile, call, shared);
    }
  } else if (item.cut.vectorized) {
    members_first<true, T>(item, tile, call, shared);
  } else {
    members_first<false, T>(item, tile, call, shared);
  }
}

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
Power<Acc> typed(const PowerCall& call) {
  return {
      static_cast<Acc*>(call.snapshot),
      static_cast<Acc*>(call.workspace),
      call.tickets,
      static_cast<Acc>(call.eps),
      call.first_round,
      call.zero_guard};
}

template <typename T, int kBytes>
cudaError_t multiply_all(
    Where where, const PowerItem* items, int64_t count, const PowerCall& call) {
  using Acc = Accumulate<T>;
  const Launch launch{
      where.device, static_cast<cudaStream_t>(where.stream), kThreads, kSharedBytes<Acc>};
  return launch_batches<multiply_kernel<T, kBytes>, kBytes>(
      launch, items, count, [](const PowerItem& item) { return item.cut.tiles; }, typed<Acc>(call));
}

template <typename Acc, int kBytes>
cudaError_t finish_all(Where where, const PowerItem* items, int64_t count, const PowerCall& call) {
  const Launch launch{where.device, static_cast<cudaStream_t>(where.stream), kThreads, 0};
  return launch_batches<finish_kernel<Acc, kBytes>, kBytes>(
      launch, items, count, reduce_blocks, typed<Acc>(call));
}

template <int kBytes>
cudaError_t multiply_typed(
    Where where, Type weights, const PowerItem* items, int64_t count, const PowerCall& call) {
  switch (weights) {
    case Type::kFloat:
      return multiply_all<float, kBytes>(where, items, count, call);
    case Type::kDouble:
      return multiply_all<double, kBytes>(where, items, count, call);
    case Type::kBFloat16:
      return multiply_all<__nv_bfloat16, kBytes>(where, items, count, call);
    default:
      return multiply_all<__half, kBytes>(where, items, count, call);
  }
}

}  // namespace

const char* multiply(
    Where where, Type weights, const PowerItem* items, int64_t count, const PowerCall& call) {
  const bool small = fits_small<PowerItem>(count);
  return message_of(
      (small ? multiply_typed<kSmallParameter>
             : multiply_typed<kLargeParameter>)(where, weights, items, count, call));
}

const char* finish(
    Where where, bool is_double, const PowerItem* items, int64_t count, const PowerCall& call) {
  const bool small = fits_small<PowerItem>(count);
  if (is_double) {
    return message_of(
        (small ? finish_all<double, kSmallParameter>
               : finish_all<double, kLargeParameter>)(where, items, count, call));
  }
  return message_of(
      (small ? finish_all<float, kSmallParameter>
             : finish_all<float, kLargeParameter>)(where, items, count, call));
}

}  // namespace fastsn::cuda
