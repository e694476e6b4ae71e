#include "launch.cuh"
#include "patches.h"

// The mean patch of a convolution's input, and its gradient.
namespace fastsn::cuda {
namespace {

// Indices begin, begin + step, ... below end.
struct Steps {
  int begin;
  int end;
  int step;
};

// The least multiple of stride that is at least x, in strides and not below zero.
__device__ __forceinline__ int strides_to(int x, int stride) {
  return x <= 0 ? 0 : (stride == 1 ? x : (x + stride - 1) / stride);
}

// The positions in [low, high) of the input that a tap meets.
__device__ __forceinline__ Steps
met(const Axis& axis, bool transposed, int tap, int low, int high) {
  const int shift = tap * axis.dilation - axis.padding;
  if (transposed) {  // position p is added to output p * stride + shift
    return {
        max(low, strides_to(-shift, axis.stride)),
        min(high, strides_to(axis.output_size - shift, axis.stride)), 1};
  }
  // Output p reads position p * stride + shift.
  const int first = strides_to(low - shift, axis.stride);
  const int last = min(axis.output_size, strides_to(high - shift, axis.stride));
  return {first * axis.stride + shift, last * axis.stride + shift, axis.stride};
}

__device__ __forceinline__ bool meets(const Axis& axis, bool transposed, int tap, int position) {
  const int shift = tap * axis.dilation - axis.padding;
  if (transposed) {
    const int output = position * axis.stride + shift;
    return output >= 0 && output < axis.output_size;
  }
  const int reach = position - shift;
  return reach >= 0 && reach % axis.stride == 0 && reach / axis.stride < axis.output_size;
}

// sums[0][k] += sums[1][k] + ... + sums[count - 1][k], `count` a power of two: as a tree.
template <typename Acc>
__device__ __forceinline__ void fold(Acc* sums, int count, int length) {
  for (int half = count / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int k = threadIdx.x; k < half * length; k += kPatchThreads) {
      sums[k] += sums[half * length + k];
    }
  }
  __syncthreads();
}

// A range along one dimension; `block` is the number of a block among those of this dimension and
// of all slower ones.
struct Range {
  int begin;
  int count;

  __device__ __forceinline__ Range(unsigned& block, int of_tile, int of_all) {
    const auto tiles = static_cast<unsigned>(ceil_div(of_all, of_tile));
    const unsigned index = block % tiles;
    block /= tiles;
    begin = static_cast<int>(index) * of_tile;
    count = min(of_tile, of_all - begin);
  }
};

// What a block sums up. Neighbours in memory are neighbours in the grid.
struct Place {
  Range inner;
  Range columns;
  Range rows;
  Range outer;
  unsigned slice;

  __device__ __forceinline__ Place(const Layout& layout, const Tile& tile, unsigned block)
      : inner(block, tile.inner, layout.inner),
        columns(block, tile.columns, layout.columns),
        rows(block, tile.rows, layout.rows),
        outer(block, tile.outer, layout.outer),
        slice(block) {}

  __device__ __forceinline__ int line() const { return columns.count * inner.count; }
  __device__ __forceinline__ int numel() const { return outer.count * rows.count * line(); }
};

// sums[outer][row][column][inner] of a place over its slice of the samples. What lies side by side
// in memory is a run: all of the place, or its inner elements.
template <bool kVectorized, typename T, typename Acc>
__device__ __forceinline__ void sum_samples(const PatchItem& item, const Place& place, Acc* sums) {
  constexpr int kStep = kVectorized ? kPack : 1;
  const Layout& layout = item.layout;
  const int64_t sample = layout.sample();
  const int64_t begin = int64_t{place.slice} * item.tile.samples;
  const int64_t end = min(begin + item.tile.samples, layout.samples);
  const int64_t start =
      ((int64_t{place.outer.begin} * layout.rows + place.rows.begin) * layout.columns +
       place.columns.begin) *
          layout.inner +
      place.inner.begin;
  const int numel = place.numel();
  const int run = place.inner.count == layout.inner ? numel : place.inner.count;
  const int width = item.tile.width;
  const int lanes = kPatchThreads / width;
  const int lane = static_cast<int>(threadIdx.x) / width;
  for (int k = static_cast<int>(threadIdx.x) % width * kStep; k < numel; k += width * kStep) {
    const int before = k / run;
    const T* const from = static_cast<const T*>(item.input) + start +
        int64_t{before} * layout.inner + (k - before * run);
    Acc own[kStep] = {};
#pragma unroll 4
    for (int64_t n = begin + lane; n < end; n += lanes) {
      if constexpr (kVectorized) {
        const auto pack = load_pack(from + n * sample);
#pragma unroll
        for (int c = 0; c < kStep; ++c) {
          own[c] += widen(pack.e[c]);
        }
      } else {
        own[0] += widen(__ldg(from + n * sample));
      }
    }
#pragma unroll
    for (int c = 0; c < kStep; ++c) {
      sums[lane * numel + k + c] = own[c];
    }
  }
  fold(sums, lanes, numel);
}

// The sum over those rows of a place that a tap of the first and one of the second dimension meet,
// at one column of one channel, whose elements `sums` points to.
template <typename Acc>
__device__ __forceinline__ Acc
sum_rows(const Geometry& geometry, const Place& place, int first, int second, const Acc* sums) {
  const int height = geometry.axes[1].size;
  const int begin = place.rows.begin;
  const int end = begin + place.rows.count;
  const auto planes =
      met(geometry.axes[0], geometry.transposed, first, begin / height, (end - 1) / height + 1);
  Acc sum = 0;
  for (int plane = planes.begin; plane < planes.end; plane += planes.step) {
    const int start = plane * height;
    const auto rows =
        met(geometry.axes[1], geometry.transposed, second, max(0, begin - start),
            min(height, end - start));
    for (int row = rows.begin; row < rows.end; row += rows.step) {
      sum += sums[(start + row - begin) * place.line()];
    }
  }
  return sum;
}

// lines[tap][outer][column][inner] for `count` taps of the first two dimensions, `from` on.
template <typename Acc>
__device__ __forceinline__ void sum_all_rows(
    const Geometry& geometry, const Place& place, int from, int count, const Acc* sums,
    Acc* lines) {
  const int line = place.line();
  const int outer = place.outer.count;
  for (int k = threadIdx.x; k < count * outer * line; k += kPatchThreads) {
    const int group = k / line;
    const int tap = from + group / outer;
    const int first = tap / geometry.axes[1].taps;
    const int second = tap - first * geometry.axes[1].taps;
    const int at = group % outer * place.rows.count * line + (k - group * line);
    lines[k] = sum_rows(geometry, place, first, second, sums + at);
  }
  __syncthreads();
}

// out[channel][tap] = the sum over those columns of lines that a tap of the last dimension meets.
template <typename Acc>
__device__ __forceinline__ void sum_all_columns(
    const Geometry& geometry, const Place& place, int from, int count, const Acc* lines,
    Acc divisor, Acc* out) {
  const Axis& axis = geometry.axes[kMaxAxes - 1];
  const int outer = place.outer.count;
  const int inner = place.inner.count;
  const int begin = place.columns.begin;
  // Threads that share a sum: not where neighbours have neighbouring channels.
  const int sharing = inner > 1 ? 1 : 8;
  const int share = static_cast<int>(threadIdx.x) % sharing;
  const int results = count * outer * axis.taps * inner;
  for (int base = 0; base < results; base += kPatchThreads / sharing) {
    const int k = base + static_cast<int>(threadIdx.x) / sharing;
    const int group = k / (axis.taps * inner);
    const int of_group = k - group * axis.taps * inner;
    const int tap = of_group / inner;
    const int channel = of_group - tap * inner;
    Acc sum = 0;
    if (k < results) {
      const Acc* const own = lines + group * place.line() + channel;
      const auto columns = met(axis, geometry.transposed, tap, begin, begin + place.columns.count);
      for (int column = columns.begin + share * columns.step; column < columns.end;
           column += sharing * columns.step) {
        sum += own[(column - begin) * inner];
      }
    }
    for (int offset = sharing / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (k < results && share == 0) {
      const int64_t row_tap = from + group / outer;
      out[(group % outer + channel) * geometry.taps() + row_tap * axis.taps + tap] = sum / divisor;
    }
  }
  __syncthreads();
}

// A block sums its samples up, then the rows, then the columns that taps meet, for as many taps at
// once as have room.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    patch_sums_kernel(const __grid_constant__ PatchItem item) {
  using Acc = Accumulate<T>;
  __shared__ Acc sums[kPatchTile];
  __shared__ Acc lines[kPatchTile];
  wait_for_inputs();
  const Place place(item.layout, item.tile, blockIdx.x);
  if (item.tile.vectorized) {
    sum_samples<true, T>(item, place, sums);
  } else {
    sum_samples<false, T>(item, place, sums);
  }
  const Geometry& geometry = item.geometry;
  const int64_t row_tile = place.rows.begin / item.tile.rows;
  const int64_t column_tile = place.columns.begin / item.tile.columns;
  const int64_t partial_sum = (place.slice * row_tiles(item.layout, item.tile) + row_tile) *
          column_tiles(item.layout, item.tile) +
      column_tile;
  const int64_t channel =
      partial_sum * item.layout.channels() + place.outer.begin + place.inner.begin;
  Acc* const out = static_cast<Acc*>(item.sums) + channel * geometry.taps();
  const int taps = geometry.axes[0].taps * geometry.axes[1].taps;
  const int at_once = kPatchTile / (place.outer.count * place.line());
  for (int tap = 0; tap < taps; tap += at_once) {
    const int count = min(at_once, taps - tap);
    sum_all_rows(geometry, place, tap, count, sums, lines);
    sum_all_columns(geometry, place, tap, count, lines, static_cast<Acc>(item.divisor), out);
  }
}

// The partial sums are added up: by a column of threads for each result.
template <typename Acc>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    partial_sums_kernel(const __grid_constant__ PartialItem item) {
  constexpr int kLanes = kPatchThreads / kPatchColumns;
  __shared__ Acc sums[kPatchThreads];
  wait_for_inputs();
  const int column = static_cast<int>(threadIdx.x) % kPatchColumns;
  const int64_t result = int64_t{blockIdx.x} * kPatchColumns + column;
  Acc sum = 0;
  if (result < item.count) {
    const Acc* const from = static_cast<const Acc*>(item.sums) + result;
#pragma unroll 4
    for (int64_t k = threadIdx.x / kPatchColumns; k < item.partial_sums; k += kLanes) {
      sum += from[k * item.count];
    }
  }
  sums[threadIdx.x] = sum;
  fold(sums, kLanes, kPatchColumns);
  if (threadIdx.x < kPatchColumns && result < item.count) {
    static_cast<Acc*>(item.out)[result] = sums[column] / static_cast<Acc>(item.divisor);
  }
}

// Each thread adds up the gradients of the taps that meet its position.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    patch_backward_kernel(const __grid_constant__ PatchBackwardItem item) {
  using Acc = Accumulate<T>;
  wait_for_inputs();
  const Layout& layout = item.layout;
  const int64_t at = int64_t{blockIdx.x} * kPatchThreads + threadIdx.x;
  if (at >= layout.sample()) {
    return;
  }
  const auto inner_size = static_cast<int64_t>(layout.inner);
  const int64_t position = at / inner_size;
  const int64_t line = position / layout.columns;
  const int64_t outer = line / layout.rows;
  const int column = static_cast<int>(position - line * layout.columns);
  const int row = static_cast<int>(line - outer * layout.rows);
  const int64_t channel = outer + (at - position * inner_size);
  const auto& [first, second, third] = item.geometry.axes;
  const bool transposed = item.geometry.transposed;
  const int plane = row / second.size;
  const int row_of_plane = row - plane * second.size;
  const Acc* grad = static_cast<const Acc*>(item.grad) + channel * item.geometry.taps();
  Acc sum = 0;
  for (int i = 0; i < first.taps; ++i) {
    const bool meets_plane = meets(first, transposed, i, plane);
    for (int j = 0; j < second.taps; ++j, grad += third.taps) {
      if (meets_plane && meets(second, transposed, j, row_of_plane)) {
        for (int k = 0; k < third.taps; ++k) {
          if (meets(third, transposed, k, column)) {
            sum += __ldg(grad + k);
          }
        }
      }
    }
  }
  narrow(sum / static_cast<Acc>(item.divisor), static_cast<T*>(item.out)[at]);
}

}  // namespace

const char* patch_sums(Where where, Type input, const PatchItem& item) {
  const int64_t blocks =
      channel_tiles(item.layout, item.tile) * partial_sums(item.layout, item.tile);
  return with_type(input, [&](auto value) {
    return message(
        start<patch_sums_kernel<decltype(value)>>(where, blocks, kPatchThreads, 0, item));
  });
}

const char* add_partial_sums(Where where, bool is_double, const PartialItem& item) {
  const int64_t blocks = ceil_div(item.count, kPatchColumns);
  return message(
      is_double ? start<partial_sums_kernel<double>>(where, blocks, kPatchThreads, 0, item)
                : start<partial_sums_kernel<float>>(where, blocks, kPatchThreads, 0, item));
}

const char* patch_backward(Where where, Type out, const PatchBackwardItem& item) {
  const int64_t blocks = ceil_div(item.layout.sample(), kPatchThreads);
  return with_type(out, [&](auto value) {
    return message(
        start<patch_backward_kernel<decltype(value)>>(where, blocks, kPatchThreads, 0, item));
  });
}

}  // namespace fastsn::cuda
