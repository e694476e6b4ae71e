#pragma once

#include "items.h"
#include "plan.h"

// What the host tells the kernels of patch_mean, patch_mean_backward and mean_bias, and how
// patch_mean is cut into blocks.
namespace fastsn::cuda {

// Threads of a block of these kernels, except of mean_bias.
constexpr int kPatchThreads = 256;
constexpr int kBiasThreads = 128;
// Blocks that a multiprocessor must have registers for: what the compiler aims at by itself leaves
// some of them in memory.
constexpr int kPatchBlocks = 3;
// Elements of a tile: as many fit into shared memory twice, in fp64 too.
constexpr int kPatchTile = 2048;
// Results of a block that adds up partial sums, each by a column of kPatchThreads / kPatchColumns
// threads.
constexpr int kPatchColumns = 8;

constexpr int kMaxAxes = 3;

// Along one spatial dimension: what says which positions of the input a tap meets.
struct Axis {
  int32_t size;  // of the input
  int32_t taps;
  int32_t stride;
  int32_t padding;
  int32_t dilation;
  int32_t output_size;
};

// Dimensions that are missing come first, with one position and one tap that meets it.
struct Geometry {
  Axis axes[kMaxAxes];
  bool transposed;

  FASTSN_BOTH int64_t taps() const { return int64_t{axes[0].taps} * axes[1].taps * axes[2].taps; }
};

// An input in memory: x[sample][outer][row][column][inner]. The channels are `outer` or `inner`,
// the other one is 1; a row runs along the last dimension.
struct Layout {
  int64_t samples;
  int32_t outer;
  int32_t rows;
  int32_t columns;
  int32_t inner;

  FASTSN_BOTH int64_t channels() const { return int64_t{outer} * inner; }
  FASTSN_BOTH int64_t sample() const { return channels() * rows * columns; }
};

// A block sums up so many elements along each dimension, of a slice of so many samples, and
// contracts the sums with the taps. Where a tile does not have all positions, it has whole rows, or
// else a part of a single one.
struct Tile {
  int32_t samples;
  int32_t outer;
  int32_t rows;
  int32_t columns;
  int32_t inner;
  int32_t width;    // threads side by side: a power of two; others take other samples meanwhile
  bool vectorized;  // every tile starts and ends with a pack

  FASTSN_BOTH int32_t numel() const { return outer * rows * columns * inner; }
};

// `aligned`: the first element lies where packs may.
Tile tile_of(const Layout& layout, int64_t taps, bool aligned);

// How many tiles lie side by side along the channels, the rows and the columns.
FASTSN_BOTH inline int64_t channel_tiles(const Layout& layout, const Tile& tile) {
  return ceil_div(layout.outer, tile.outer) * ceil_div(layout.inner, tile.inner);
}
FASTSN_BOTH inline int64_t row_tiles(const Layout& layout, const Tile& tile) {
  return ceil_div(layout.rows, tile.rows);
}
FASTSN_BOTH inline int64_t column_tiles(const Layout& layout, const Tile& tile) {
  return ceil_div(layout.columns, tile.columns);
}
FASTSN_BOTH inline int64_t slices(const Layout& layout, const Tile& tile) {
  return ceil_div(layout.samples, tile.samples);
}
// How many partial sums there are of each result.
FASTSN_BOTH inline int64_t partial_sums(const Layout& layout, const Tile& tile) {
  return row_tiles(layout, tile) * column_tiles(layout, tile) * slices(layout, tile);
}

struct PatchItem {
  const void* input;
  void* sums;  // [partial sum][channel][tap], divided by `divisor`
  double divisor;
  Layout layout;
  Geometry geometry;
  Tile tile;
};

struct PartialItem {
  const void* sums;  // [partial sum][result]
  void* out;
  double divisor;
  int64_t count;  // of results
  int64_t partial_sums;
};

struct PatchBackwardItem {
  const void* grad;  // [channel][tap], of the accumulate type
  void* out;
  double divisor;
  Layout layout;  // of the result: one sample
  Geometry geometry;
};

// A row of the weight in the order of its memory is a number with these digits, the last one
// running fastest. They say where an element lies, and what it is multiplied with.
struct BiasDigit {
  int32_t size;
  int64_t weight;
  int64_t patch;
};

struct BiasItem {
  const void* weight;
  const void* patches;  // of the accumulate type
  const void* gain;     // or null
  const void* beta;     // or null
  void* bias;
  void* mean;
  Type gain_type;
  Type beta_type;
  int32_t channels;      // of the output
  int32_t group;         // channels of a group
  int64_t group_stride;  // of the weight
  int64_t channel_stride;
  int32_t length;  // of a row
  int32_t digit_count;
  BiasDigit digits[1 + kMaxAxes];
};

}  // namespace fastsn::cuda
