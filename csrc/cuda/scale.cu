#include "launch.cuh"

#include <type_traits>

// Phases C, D and E: the normalized weights, and their gradients.
namespace fastsn::cuda {
namespace {

template <typename Acc>
struct Scaling {
  const Acc* snapshot;
  Acc* workspace;
  bool bound;
  bool zero_guard;
};

template <typename T>
__device__ __forceinline__ Pack<T> load_some(const void* from, int64_t at, int count, bool whole) {
  const T* const source = static_cast<const T*>(from) + at;
  if (whole) {
    return load_pack(source);
  }
  Pack<T> pack{};
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    if (c < count) {
      pack.e[c] = __ldg(source + c);
    }
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_some(
    void* out, int64_t at, int count, bool whole, const Pack<T>& pack) {
  T* const to = static_cast<T*>(out) + at;
  if (whole) {
    store_pack(to, pack);
    return;
  }
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    if (c < count) {
      to[c] = pack.e[c];
    }
  }
}

// From the end, where the power iteration before has just been: a part of that is still in the
// second-level cache.
template <typename T, typename Out, int kBytes>
__global__ void __launch_bounds__(kFlatThreads) scale_kernel(
    const __grid_constant__ Batch<ScaleItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  wait_for_inputs();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int index = batch.item_of(block);
  const ScaleItem& item = batch.items[index];
  const int64_t begin = int64_t{block - batch.first_block[index]} * kFlatTile;
  const int64_t end = min(begin + kFlatTile, item.numel);
  const auto factor = factor_of(
      call.snapshot + item.sigma, item.estimates, item.scale, call.bound, call.zero_guard);
#pragma unroll 4
  for (int64_t at = begin + kPack * int64_t{threadIdx.x}; at < end; at += kPack * kFlatThreads) {
    const int count = static_cast<int>(min(end - at, int64_t{kPack}));
    const bool whole = item.vectorized && count == kPack;
    const auto weight = load_some<T>(item.weight, at, count, whole);
    Pack<Out> result;
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      narrow(widen(weight.e[c]) * factor.value, result.e[c]);
    }
    store_some(item.out, at, count, whole, result);
  }
}

template <typename T, typename Grad, int kBytes>
__global__ void __launch_bounds__(kFlatThreads) product_kernel(
    const __grid_constant__ Batch<BackwardItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  using Acc = Accumulate<T>;
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const BackwardItem& item = batch.items[index];
  const int tile = block - batch.first_block[index];
  const int64_t begin = int64_t{tile} * item.tile;
  const int64_t end = min(begin + item.tile, item.numel);
  Acc sums[kPack] = {};
#pragma unroll 4
  for (int64_t at = begin + kPack * int64_t{threadIdx.x}; at < end; at += kPack * kFlatThreads) {
    const int count = static_cast<int>(min(end - at, int64_t{kPack}));
    const bool whole = item.vectorized && count == kPack;
    const auto grad = load_some<Grad>(item.grad, at, count, whole);
    const auto weight = load_some<T>(item.weight, at, count, whole);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      sums[c] += static_cast<Acc>(widen(grad.e[c])) * widen(weight.e[c]);
    }
  }
  const Acc sum = block_sum<kFlatThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (threadIdx.x == 0) {
    call.workspace[item.product + tile] = sum;
  }
}

// The elements of the outer product of a member and a unit vector, in the order of the weight.
template <typename Acc>
struct OuterReader {
  const Matrix& matrix;
  const Acc* members;
  const Acc* units;
  int64_t start_unit;
  uint32_t start_offset;  // within a unit

  __device__ __forceinline__ OuterReader(const Outer& outer, const Acc* snapshot, int64_t begin)
      : matrix(outer.matrix), members(snapshot + outer.member), units(snapshot + outer.unit) {
    const int64_t length = int64_t{matrix.members} * matrix.inner;
    start_unit = begin / length;
    start_offset = static_cast<uint32_t>(begin - start_unit * length);
  }

  // Adds kPack elements, `offset` after the start.
  __device__ __forceinline__ void add(uint32_t offset, Acc (&to)[kPack]) const {
    const uint32_t inner_size = matrix.inner;
    const uint32_t length = matrix.members * inner_size;
    const uint32_t from_unit = start_offset + offset;
    const uint32_t units_on = from_unit / length;
    int unit = static_cast<int>(start_unit + units_on);
    const uint32_t within = from_unit - units_on * length;
    if (inner_size == 1 && matrix.digits.count == 0 && within + kPack <= length) {
      const Acc of_unit = units[unit];
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        to[c] += members[within + c] * of_unit;
      }
      return;
    }
    int member = static_cast<int>(within / inner_size);
    int inner = static_cast<int>(within - member * inner_size);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      if (unit < matrix.units) {
        to[c] += members[position(matrix, true, member)] *
            units[position(matrix, false, unit * matrix.inner + inner)];
      }
      if (++inner == matrix.inner) {
        inner = 0;
        if (++member == matrix.members) {
          member = 0;
          ++unit;
        }
      }
    }
  }
};

// dW = f * G - f * <G, W> / sigma * mean over estimates of u v^T, f = scale / sigma.
template <typename T, typename Grad, int kBytes>
__global__ void __launch_bounds__(kFlatThreads) gradient_kernel(
    const __grid_constant__ Batch<BackwardItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  using Acc = Accumulate<T>;
  wait_for_inputs();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int index = batch.item_of(block);
  const BackwardItem& item = batch.items[index];
  const int64_t begin = int64_t{block - batch.first_block[index]} * kFlatTile;
  const int64_t end = min(begin + kFlatTile, item.numel);
  const auto factor = factor_of(
      call.snapshot + item.sigma, item.estimates, item.scale, call.bound, call.zero_guard);
  Acc sum = 0;
  for (int k = threadIdx.x; k < item.products; k += kFlatThreads) {
    sum += call.workspace[item.product + k];
  }
  const Acc product = block_sum<kFlatThreads>(sum);
  const Acc coefficient = factor.moves
      ? -factor.value * (product / factor.sigma) / static_cast<Acc>(item.estimates)
      : Acc(0);
  const OuterReader<Acc> first(item.outers[0], call.snapshot, begin);
  const OuterReader<Acc> last(item.outers[item.estimates - 1], call.snapshot, begin);
#pragma unroll 2
  for (int64_t at = begin + kPack * int64_t{threadIdx.x}; at < end; at += kPack * kFlatThreads) {
    const int count = static_cast<int>(min(end - at, int64_t{kPack}));
    const bool whole = item.vectorized && count == kPack;
    const auto grad = load_some<Grad>(item.grad, at, count, whole);
    Acc slope[kPack] = {};
    if (factor.moves) {
      const auto offset = static_cast<uint32_t>(at - begin);
      first.add(offset, slope);
      if (item.estimates > 1) {
        last.add(offset, slope);
      }
    }
    Pack<T> result;
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      const Acc wide = static_cast<Acc>(widen(grad.e[c])) * factor.value;
      narrow(factor.moves ? wide + coefficient * slope[c] : wide, result.e[c]);
    }
    store_some(item.out, at, count, whole, result);
  }
}

template <typename Acc>
Scaling<Acc> typed(const ScaleCall& call) {
  return {
      static_cast<const Acc*>(call.snapshot), static_cast<Acc*>(call.workspace), call.bound,
      call.zero_guard};
}

template <typename T, typename Out>
struct Scale {
  using Item = ScaleItem;
  static constexpr int kBlock = kFlatThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = scale_kernel<T, Out, kBytes>;
  static int64_t blocks(const Item& item) { return ceil_div(item.numel, kFlatTile); }
};

template <typename T, typename Grad>
struct Product {
  using Item = BackwardItem;
  static constexpr int kBlock = kFlatThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = product_kernel<T, Grad, kBytes>;
  static int64_t blocks(const Item& item) { return item.products; }
};

template <typename T, typename Grad>
struct Gradient {
  using Item = BackwardItem;
  static constexpr int kBlock = kFlatThreads;
  static constexpr int kShared = 0;
  template <int kBytes>
  static constexpr auto kernel = gradient_kernel<T, Grad, kBytes>;
  static int64_t blocks(const Item& item) { return ceil_div(item.numel, kFlatTile); }
};

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

}  // namespace

const char* scale(
    Where where, Type weights, Type out, const ScaleItem* items, int64_t count,
    const ScaleCall& call) {
  return launch_typed<Scale>(where, weights, out, items, count, call);
}

const char* product(
    Where where, Type weights, Type grads, const BackwardItem* items, int64_t count,
    const ScaleCall& call) {
  return launch_typed<Product>(where, weights, grads, items, count, call);
}

const char* gradient(
    Where where, Type weights, Type grads, const BackwardItem* items, int64_t count,
    const ScaleCall& call) {
  return launch_typed<Gradient>(where, weights, grads, items, count, call);
}

}  // namespace fastsn::cuda
