#include "lanes.cuh"
#include "launch.cuh"
#include "power.cuh"

// Phase A of a power iteration: the weight is read once, or, where its units are cut across, twice
// by the same block, the second time from a cache.
//
//   members -> units -> members:  y[n,i] = sum_r W[n,r,i] x[r],  z[r] = sum_{n,i} W[n,r,i] y[n,i]
//   units -> members -> units:    y[r] = sum_{n,i} W[n,r,i] x[n,i],  z[n,i] = sum_r W[n,r,i] y[r]
//
// In both, a tile has its part of `first` = y complete and one summand of `second` = z.
namespace fastsn::cuda {
namespace {

template <typename Acc>
constexpr int kPacksOf = packs(sizeof(Acc) == 8);
template <typename Acc>
constexpr int kSlots = kPack * kPacksOf<Acc>;
// What a block shares: the members that it holds, or its threads' sums over all units; then what
// sum_classes exchanges.
template <typename Acc>
constexpr int kSharedBytes = kThreads * (kSlots<Acc> + 2) * static_cast<int>(sizeof(Acc));

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

template <typename T>
struct Multiply {
  using Item = PowerItem;
  static constexpr int kBlock = kThreads;
  static constexpr int kShared = kSharedBytes<Accumulate<T>>;
  template <int kBytes>
  static constexpr auto kernel = multiply_kernel<T, kBytes>;
  static int64_t blocks(const Item& item) { return item.cut.tiles; }
};

}  // namespace

const char* multiply(
    Where where, Type weights, const PowerItem* items, int64_t count, const PowerCall& call) {
  return with_type(weights, [&](auto value) {
    using T = decltype(value);
    return launch<Multiply<T>>(where, items, count, typed<Accumulate<T>>(call));
  });
}

}  // namespace fastsn::cuda
