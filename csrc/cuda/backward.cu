#include "flat.cuh"

// Phases D and E: the gradients of the normalized weights.
namespace fastsn::cuda {
namespace {

// Copies a vector from the snapshot, of which it is a part, into the order of the weight's memory.
// The blocks of a layer share this.
template <typename Acc>
__device__ __forceinline__ void lay_out(
    const Matrix& matrix, bool of_members, const Acc* from, Acc* to, int64_t length, int block,
    int blocks) {
  constexpr int kAtOnce = 8;
  const int64_t stride = int64_t{blocks} * kFlatThreads;
  with_positions(matrix, of_members, [&](const auto& position) {
    for (int64_t base = int64_t{block} * kFlatThreads + threadIdx.x; base < length;
         base += kAtOnce * stride) {
      Acc values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t at = base + k * stride;
        values[k] = at < length ? __ldg(from + position(static_cast<int>(at))) : Acc(0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (base + k * stride < length) {
          to[base + k * stride] = values[k];
        }
      }
    }
  });
}

// Blocks that a multiprocessor must have registers for: what the compiler aims at by itself leaves
// some of them in memory.
constexpr int kProductBlocks = 3;
template <typename T, typename Grad>
constexpr int kGradientBlocks = kFlatPack<T, Grad> > 4 ? 2 : 3;

template <typename T, typename Grad, int kBytes>
__global__ void __launch_bounds__(kFlatThreads, kProductBlocks) product_kernel(
    const __grid_constant__ Batch<BackwardItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  using Acc = Accumulate<T>;
  constexpr int kCount = kFlatPack<T, Grad>;
  wait_for_inputs();
  const int block = static_cast<int>(blockIdx.x);
  const int index = batch.item_of(block);
  const BackwardItem& item = batch.items[index];
  const int tile = block - batch.first_block[index];
  const int64_t end = min(int64_t{tile + 1} * item.tile, item.numel);
  Acc sums[kCount] = {};
  for (int64_t at = int64_t{tile} * item.tile; at < end; at += kFlatStep<T, Grad>) {
    with_elements<T, Grad>(item.vectorized, at, end, [&](const auto& elements) {
      Pack<Grad, kCount> grads[kFlatPacks];
      Pack<T, kCount> weights[kFlatPacks];
      elements.load(item.grad, grads);
      elements.load(item.weight, weights);
#pragma unroll
      for (int j = 0; j < kFlatPacks; ++j) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          sums[c] += static_cast<Acc>(widen(grads[j].e[c])) * widen(weights[j].e[c]);
        }
      }
    });
  }
#pragma unroll 1
  for (int e = 0; e < item.estimates; ++e) {
    const Outer& outer = item.outers[e];
    lay_out(
        outer.matrix, true, call.snapshot + members_in_snapshot(outer),
        call.workspace + outer.vectors, outer.matrix.members, tile, item.products);
    lay_out(
        outer.matrix, false, call.snapshot + units_in_snapshot(outer),
        call.workspace + units_in_workspace(outer), unit_length(outer.matrix), tile, item.products);
  }
  Acc own = sums[0];
#pragma unroll
  for (int c = 1; c < kCount; ++c) {
    own += sums[c];
  }
  const Acc sum = block_sum<kFlatThreads>(own);
  if (threadIdx.x == 0) {
    call.workspace[item.product + tile] = sum;
  }
}

// The elements of the outer product of a member and a unit vector, in the order of the weight.
template <typename Acc>
struct OuterReader {
  const Outer& outer;
  const Acc* members;
  const Acc* units;
  int unit;    // where a block begins
  int offset;  // within that unit

  __device__ __forceinline__ OuterReader(const Outer& outer, const Acc* workspace, int64_t begin)
      : outer(outer),
        members(workspace + outer.vectors),
        units(workspace + units_in_workspace(outer)) {
    const int64_t length = int64_t{outer.matrix.members} * outer.matrix.inner;
    // At most one too small.
    unit = static_cast<int>(__umul64hi(static_cast<uint64_t>(begin), outer.one_over_length));
    int64_t rest = begin - unit * length;
    if (rest >= length) {
      ++unit;
      rest -= length;
    }
    offset = static_cast<int>(rest);
  }

  // Adds an element, `after` the first one of the block.
  __device__ __forceinline__ void add(int after, Acc& to) const {
    const int within_block = offset + after;
    const int units_on = divide(within_block, outer.by_length);
    const int within = within_block - units_on * outer.matrix.members * outer.matrix.inner;
    const int member = divide(within, outer.by_inner);
    const int inner = within - member * outer.matrix.inner;
    if (unit + units_on < outer.matrix.units) {
      to += members[member] * units[(unit + units_on) * outer.matrix.inner + inner];
    }
  }

  // Adds a pack of elements that are members of one unit.
  template <int kCount>
  __device__ __forceinline__ void add_pack(int after, Acc (&to)[kCount]) const {
    const int within_block = offset + after;
    const int units_on = divide(within_block, outer.by_length);
    const Acc of_unit = units[unit + units_on];
    const auto pack = load_pack<kCount>(members + (within_block - units_on * outer.matrix.members));
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      to[c] += pack.e[c] * of_unit;
    }
  }
};

template <typename Acc, bool kWhole, int kCount, int kPacks>
__device__ __forceinline__ void add_outer(
    const Outer& outer, const Acc* workspace, const Flat<kWhole, kCount, kPacks>& elements,
    Acc (&to)[kPacks][kCount]) {
  const OuterReader<Acc> reader(outer, workspace, elements.begin);
  if (kWhole && outer.matrix.inner == 1 && outer.matrix.members % kCount == 0) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      reader.add_pack(elements.slot(j, 0), to[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      reader.add(elements.slot(j, c), to[j][c]);
    }
  }
}

// The gradient of a layer, dW = f * G - f * <G, W> / sigma * mean over estimates of u v^T, with
// f = scale / sigma.
template <typename T, typename Grad>
struct GradientOf {
  using Acc = Accumulate<T>;
  static constexpr int kCount = kFlatPack<T, Grad>;

  const BackwardItem& item;
  const Acc* workspace;
  Factor<Acc> factor;

  // What the sum of the outer products is multiplied with.
  __device__ __forceinline__ Acc coefficient() const {
    Acc sum = 0;
    for (int k = threadIdx.x; k < item.products; k += kFlatThreads) {
      sum += workspace[item.product + k];
    }
    const Acc product = block_sum<kFlatThreads>(sum);
    return factor.moves
        ? -factor.value * (product / factor.sigma) / static_cast<Acc>(item.estimates)
        : Acc(0);
  }

  template <bool kWhole, int kPacks>
  __device__ __forceinline__ void add_outers(
      const Flat<kWhole, kCount, kPacks>& elements, Acc (&to)[kPacks][kCount]) const {
    if (factor.moves) {
#pragma unroll 1
      for (int e = 0; e < item.estimates; ++e) {
        add_outer(item.outers[e], workspace, elements, to);
      }
    }
  }

  template <bool kWhole, int kPacks>
  __device__ __forceinline__ void write(
      const Flat<kWhole, kCount, kPacks>& elements, const Pack<Grad, kCount> (&grads)[kPacks],
      const Acc (&slopes)[kPacks][kCount], Acc coefficient) const {
    Pack<T, kCount> results[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const Acc wide = static_cast<Acc>(widen(grads[j].e[c])) * factor.value;
        narrow(factor.moves ? wide + coefficient * slopes[j][c] : wide, results[j].e[c]);
      }
    }
    elements.store(item.out, results);
  }
};

template <typename T, typename Grad, int kBytes>
__global__ void __launch_bounds__(kFlatThreads, kGradientBlocks<T, Grad>) gradient_kernel(
    const __grid_constant__ Batch<BackwardItem, kBytes> batch,
    const __grid_constant__ Scaling<Accumulate<T>> call) {
  using Acc = Accumulate<T>;
  constexpr int kCount = kFlatPack<T, Grad>;
  wait_for_inputs();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int index = batch.item_of(block);
  const BackwardItem& item = batch.items[index];
  const int64_t begin = int64_t{block - batch.first_block[index]} * kFlatStep<T, Grad>;
  const auto factor = [&] {
    return factor_of(
        call.snapshot + item.sigma, item.estimates, item.scale, call.bound, call.zero_guard);
  };
  if (item.vectorized && item.numel - begin >= kFlatStep<T, Grad>) {
    const Flat<true, kCount> elements{begin, kFlatStep<T, Grad>};
    Pack<Grad, kCount> grads[kFlatPacks];
    elements.load(item.grad, grads);
    const GradientOf<T, Grad> gradient{item, call.workspace, factor()};
    Acc slopes[kFlatPacks][kCount] = {};
    gradient.add_outers(elements, slopes);
    gradient.write(elements, grads, slopes, gradient.coefficient());
    return;
  }
  const GradientOf<T, Grad> gradient{item, call.workspace, factor()};
  const Acc coefficient = gradient.coefficient();
  constexpr int kStep = kFlatThreads * kCount;
  const int64_t end = min(begin + kFlatStep<T, Grad>, item.numel);
#pragma unroll 1
  for (int64_t at = begin; at < end; at += kStep) {
    const Flat<false, kCount, 1> elements{at, static_cast<int>(min(end - at, int64_t{kStep}))};
    Pack<Grad, kCount> grads[1];
    elements.load(item.grad, grads);
    Acc slopes[1][kCount] = {};
    gradient.add_outers(elements, slopes);
    gradient.write(elements, grads, slopes, coefficient);
  }
}

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
  static int64_t blocks(const Item& item) { return ceil_div(item.numel, kFlatStep<T, Grad>); }
};

}  // namespace

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
