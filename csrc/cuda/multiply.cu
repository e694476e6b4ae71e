#include "lanes.cuh"
#include "launch.cuh"
#include "power.cuh"

// Phase A of a power iteration: the weight is read once, or, where its units are cut across, twice
// by the same block, the second time from a cache.
//
//   members -> units -> members:  y[n,i] = sum_r W[n,r,i] x[r],  z[r] = sum_{n,i} W[n,r,i] y[n,i]
//   units -> members -> units:    y[r] = sum_{n,i} W[n,r,i] x[n,i],  z[n,i] = sum_r W[n,r,i] y[r]
//
// In both, a tile has its part of `first` = y complete, one summand of `second` = z and one of
// |y|^2.
namespace fastsn::cuda {
namespace {

template <typename Acc>
constexpr int kPacksOf = packs(sizeof(Acc) == 8);
template <typename Acc>
constexpr int kSlots = kPack * kPacksOf<Acc>;
// What a block shares: the members that it holds, or its threads' sums over all units; then what
// sum_classes exchanges.
template <int kBlock, typename Acc>
constexpr int kSharedBytes = kBlock * (kSlots<Acc> + 2) * static_cast<int>(sizeof(Acc));

// to[k] = x[from + k] for the members that a group holds, zeros where there are none.
template <int kBlock, typename Acc>
__device__ __forceinline__ void lay_out(
    const Matrix& matrix, const Acc* x, int from, int held, Acc* to) {
  constexpr int kAtOnce = 8;
  with_positions(matrix, true, [&](const auto& position) {
    for (int base = threadIdx.x; base < held; base += kAtOnce * kBlock) {
      Acc values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int member = from + base + k * kBlock;
        const bool wanted = base + k * kBlock < held && member < matrix.members;
        values[k] = wanted ? x[position(member)] : Acc(0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (base + k * kBlock < held) {
          to[base + k * kBlock] = values[k];
        }
      }
    }
  });
}

// A sum, or a pack of them.
template <typename Acc, int kCount>
__device__ __forceinline__ void store_run(Acc* to, const Pack<Acc, kCount>& run) {
  if constexpr (kCount == 1) {
    *to = run.e[0];
  } else {
    store_pack(to, run);
  }
}

// The first `count` of `values`, so far as they lie before `end`, in runs of kRun.
template <int kRun, int kValues, typename Acc>
__device__ __forceinline__ void store_runs(
    Acc* to, int at, int end, int count, const Acc (&values)[kValues]) {
#pragma unroll
  for (int k = 0; k < kValues; k += kRun) {
    if (k < count && at + k < end) {
      Pack<Acc, kRun> run;
#pragma unroll
      for (int c = 0; c < kRun; ++c) {
        run.e[c] = values[k + c];
      }
      store_run(to + at + k, run);
    }
  }
}

// Element `index` of u or v.
template <typename Acc>
__device__ __forceinline__ Acc
element(const Matrix& matrix, bool of_members, const Acc* x, int index) {
  Acc value;
  with_positions(matrix, of_members, [&](const auto& position) { value = x[position(index)]; });
  return value;
}

// The tile's summand of |first|^2, or of sigma, from its elements [begin, end) of `first`.
template <int kBlock, typename Acc>
__device__ __forceinline__ void write_squares(
    const PowerItem& item, const Power<Acc>& call, int tile, bool of_members, int begin, int end) {
  const Acc* const first = call.workspace + item.first;
  const Acc* const before = call.before(of_members ? item.member : item.unit);
  Acc sum = 0;
#pragma unroll 1
  for (int k = begin + static_cast<int>(threadIdx.x); k < end; k += kBlock) {
    sum += first[k] * (item.only_estimate ? element(item.matrix, of_members, before, k) : first[k]);
  }
  const Acc squares = block_sum<kBlock>(sum);
  if (threadIdx.x == 0) {
    call.workspace[item.first_squares + tile] = squares;
  }
}

// Where a unit with a chunk of its inner indices begins in the unit vector.
__device__ __forceinline__ int position_of(const Matrix& matrix, const Cut& cut, int index) {
  const int unit = cut.class_chunks > 1 ? divide(index, cut.by_class_chunks) : index;
  return unit * matrix.inner + (index - unit * cut.class_chunks) * cut.classes;
}

// members -> units -> members. The tile owns whole units. A unit that fits into the registers of
// its group is multiplied both times from there; longer ones are read twice, a part at a time.
template <int kBlock, bool kVectorized, typename T, typename Acc>
__device__ __forceinline__ void members_first(
    const PowerItem& item, int tile, const Power<Acc>& call, Acc* shared) {
  constexpr int kPacks = kPacksOf<Acc>;
  constexpr bool kPrefetches = sizeof(Acc) == sizeof(float);  // fp64 has no registers left for it
  const Matrix& matrix = item.matrix;
  const Cut& cut = item.cut;
  const Lane lane(cut);
  // The units of a group follow one another, so that their results fill whole sectors.
  const int begin = tile * cut.span;
  const int end = min(begin + cut.span, matrix.units * cut.class_chunks);
  const int count = (end - begin + lane.groups - 1) >> cut.group_bits;
  const int own = begin + lane.group * count;
  const int held = cut.width * kSlots<Acc>;
  const bool fits = matrix.members <= held;
  Acc* const exchange = shared + kBlock * kSlots<Acc>;

  const auto load_unit = [&](Pack<T>(&to)[kPacks], int index, int from) {
    const Unit unit(matrix, cut, lane, index, end);
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
    sum_groups<kBlock, kVectorized>(cut, lane, sums, shared, [&](int member, const auto& sum) {
      if (from + member < matrix.members) {
        Acc* const part = call.workspace + item.partial + int64_t{tile} * matrix.members;
        store_run(part + from + member, sum);
      }
    });
  };

  for (int from = 0; from == 0 || from < matrix.members; from += held) {
    const auto write_first = [&](int at, Acc dot) {
      Acc* const first = call.workspace + item.first + at;
      *first = from == 0 ? dot : *first + dot;
    };
    // A unit is on its way while the one before it is summed up, the first one while the vector is
    // laid out.
    Pack<T> next[kPacks];
    if constexpr (kPrefetches) {
      load_unit(next, own, from);
    }
    __syncthreads();  // what `shared` held before has been read
    lay_out<kBlock>(matrix, call.before(item.member), from, held, shared);
    __syncthreads();
    Acc sums[kSlots<Acc>] = {};
    Acc kept = 0;  // the results of up to 32 units, one in each of as many threads
    for (int k = 0; k < count; ++k) {
      Pack<T> packs[kPacks];
      if constexpr (kPrefetches) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
          packs[j] = next[j];
        }
        load_unit(next, k + 1 < count ? own + k + 1 : end, from);
      } else {
        load_unit(packs, own + k, from);
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
      sum_classes<kBlock>(cut, lane, dot, exchange);
      if (fits) {
        add_scaled(sums, packs, dot[0]);
      }
      if (cut.classes > 1) {
        const Unit unit(matrix, cut, lane, own + k, end);
        if (unit.valid && lane.member == 0) {
          write_first(unit.position(matrix), dot[0]);
        }
      } else {
        kept = lane.lane == (k & 31) ? dot[0] : kept;
        const int at = own + (k & ~31) + lane.lane;
        if (((k & 31) == 31 || k + 1 == count) && lane.lane < 32 && at <= own + k && at < end) {
          write_first(at, kept);
        }
      }
    }
    if (fits && !item.only_estimate) {
      write_part(sums, from);
    }
  }
  __syncthreads();  // the tile's part of `first` is complete
  write_squares<kBlock>(
      item, call, tile, false, position_of(matrix, cut, begin), position_of(matrix, cut, end));
  if (fits || item.only_estimate) {
    return;
  }
  for (int from = 0; from < matrix.members; from += held) {
    Acc sums[kSlots<Acc>] = {};
    for (int k = 0; k < count; ++k) {
      const Unit unit(matrix, cut, lane, own + k, end);
      Pack<T> packs[kPacks];
      load_unit(packs, own + k, from);
      const Acc* const first = call.workspace + item.first;
      add_scaled(sums, packs, unit.valid ? first[unit.position(matrix)] : Acc(0));
    }
    write_part(sums, from);
  }
}

// units -> members -> units. The tile owns one pack of members per thread and goes over all units
// twice, see kSlabBytes.
template <int kBlock, bool kVectorized, typename T, typename Acc>
__device__ __forceinline__ void units_first(
    const PowerItem& item, int tile, const Power<Acc>& call, Acc* shared) {
  constexpr int kUnits = kPacksOf<Acc>;
  const Matrix& matrix = item.matrix;
  const Cut& cut = item.cut;
  const Lane lane(cut);
  const int from = tile * cut.span;
  const int until = min(from + cut.span, matrix.members);
  const int end = matrix.units * cut.class_chunks;
  const int stride = kUnits << cut.group_bits;
  const Acc* const before = call.before(item.unit);

  Acc sums[kPack] = {};
  for (int base = 0; base < end; base += stride) {
    Pack<T> packs[kUnits];
    Acc x[kUnits];
    // Groups side by side have units side by side, so that these are whole sectors of the vector.
    const auto unit_of = [&](int k) {
      return Unit(matrix, cut, lane, base + (k << cut.group_bits) + lane.group, end);
    };
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      packs[k] = load<kVectorized, T>(item, lane, unit_of(k), from, until, 0);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit = unit_of(k);
      x[k] = unit.valid ? element(matrix, false, before, unit.position(matrix)) : Acc(0);
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        sums[c] += widen(packs[k].e[c]) * x[k];
      }
    }
  }
  Acc* const y = shared + kPack * kBlock;
  Acc* const exchange = y + kPack * kBlock;
  static_assert(2 * kPack + 2 * kUnits <= kSlots<Acc> + 2);
  sum_groups<kBlock, kVectorized>(cut, lane, sums, shared, [&](int member, const auto& run) {
    store_run(y + member, run);
    if (from + member < until) {
      store_run(call.workspace + item.first + from + member, run);
    }
  });
  __syncthreads();  // y and the tile's part of `first` are complete
  write_squares<kBlock>(item, call, tile, true, from, until);
  if (item.only_estimate) {
    return;
  }
  const auto factors = held_pack<kVectorized>(cut, lane, y, 0);
  Acc* const part = call.workspace + item.partial + tile * unit_length(matrix);
  const bool within_warp = cut.classes == 1 && cut.lanes <= 32;
  // Here the units of a group follow one another, so that their results fill whole sectors.
  const int own = lane.group * kUnits;
  for (int base = own; base < end + own; base += stride) {
    Pack<T> packs[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Unit unit(matrix, cut, lane, base + k, end);
      packs[k] = load<kVectorized, T>(item, lane, unit, from, until, 0);
    }
    Acc dots[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      dots[k] = 0;
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        dots[k] += widen(packs[k].e[c]) * factors.e[c];
      }
    }
    if (within_warp) {
      const int2 kept = sum_lanes(cut, lane.lane, dots);
      const int at = base + kept.y;
      if (end % kPack != 0 || kept.x == 1) {
        store_runs<1>(part, at, end, kept.x, dots);
      } else if (kept.x == 2) {
        store_runs<2>(part, at, end, kept.x, dots);
      } else {
        store_runs<kPack>(part, at, end, kept.x, dots);
      }
    } else {
      sum_classes<kBlock>(cut, lane, dots, exchange);
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const Unit unit(matrix, cut, lane, base + k, end);
        if (unit.valid && lane.member == 0) {
          part[unit.position(matrix)] = dots[k];
        }
      }
    }
  }
}

template <typename T, int kBlock, int kBytes>
__global__ void __launch_bounds__(kBlock, kManyThreads / kBlock) multiply_kernel(
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
  if constexpr (kBlock == kThreads) {
    if (item.cut.unit_first) {
      if (item.cut.vectorized) {
        units_first<kBlock, true, T>(item, tile, call, shared);
      } else {
        units_first<kBlock, false, T>(item, tile, call, shared);
      }
      return;
    }
  }
  if (item.cut.vectorized) {
    members_first<kBlock, true, T>(item, tile, call, shared);
  } else {
    members_first<kBlock, false, T>(item, tile, call, shared);
  }
}

template <typename T, int kBlockThreads>
struct Multiply {
  using Item = PowerItem;
  static constexpr int kBlock = kBlockThreads;
  static constexpr int kShared = kSharedBytes<kBlock, Accumulate<T>>;
  template <int kBytes>
  static constexpr auto kernel = multiply_kernel<T, kBlock, kBytes>;
  static int64_t blocks(const Item& item) {
    return item.cut.threads() == kBlock ? item.cut.tiles : 0;
  }
};

}  // namespace

const char* multiply(
    Where where, Type weights, const PowerItem* items, int64_t count, const PowerCall& call) {
  return with_type(weights, [&](auto value) {
    using T = decltype(value);
    const auto constants = typed<Accumulate<T>>(call);
    const char* error = launch<Multiply<T, kThreads>>(where, items, count, constants);
    if constexpr (most_threads(sizeof(T)) > kThreads) {
      error = error ? error : launch<Multiply<T, kManyThreads>>(where, items, count, constants);
    }
    return error;
  });
}

}  // namespace fastsn::cuda
