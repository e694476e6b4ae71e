#pragma once

#include <cstdint>

// What the host tells the kernels about the work of a call. Everything goes by value as a kernel
// parameter, so nothing is copied to the device and a CUDA graph captures it as it is.
namespace fastsn::cuda {

enum class Type : int32_t { kFloat, kDouble, kBFloat16, kHalf };

// n / d = n * multiplier >> shift for every n below 2^31: a division costs a kernel dozens of
// instructions. See divisor in plan.h.
struct Divisor {
  uint32_t multiplier;
  int32_t shift;
};

constexpr int kMaxDigits = 4;

// Where a column lies: memory column to logical column (see MatrixView::Digit).
struct Digits {
  int32_t size[kMaxDigits];
  int32_t stride[kMaxDigits];
  uint32_t multiplier[kMaxDigits];  // of the divisor by `size`
  uint8_t shift[kMaxDigits];
  int32_t count;  // 0: the two agree
};

// A weight in memory: `units` runs of `members` times `inner` elements, W[n][r][i]. Two vectors
// belong to it: one over the members r, one over the units and the inner index (n, i).
struct Matrix {
  int32_t units;
  int32_t members;
  int32_t inner;
  bool members_are_columns;  // the member vector is v and in logical order; else the unit vector
  Digits digits;
};

// How one multiplication is cut into blocks. A block has groups of `lanes` threads, each group
// takes one unit at a time. A thread holds several members of a unit: packs of four consecutive
// ones where `vectorized`, or else single ones, `width` apart, with inner index
// `class_chunk * classes + lane % classes`.
struct Cut {
  bool unit_first;  // the unit vector comes in, the member vector goes out; else the other way
  bool vectorized;
  int32_t group_bits;    // a block has 2 to this many groups
  int32_t lane_bits;     // a group has 2 to this many threads, ...
  int32_t lanes;         // ... which is this
  int32_t width;         // members side by side in a group
  int32_t classes;       // inner indices side by side in a group
  int32_t class_chunks;  // so many times `classes` cover `inner`
  int32_t span;          // of a tile: units times class_chunks, or members if unit_first
  int32_t tiles;
  Divisor by_width;
  Divisor by_classes;
  Divisor by_class_chunks;
  int32_t parts;  // sums of so many members side by side are added up first: the root of `width`

  int threads() const { return lanes << group_bits; }  // of a block
};

// A u or a v, of the type in which sums are kept.
struct Vector {
  void* live;        // as the caller keeps it
  int64_t snapshot;  // offset
};

// A u or a v of a layer that does not iterate, to be made a unit vector.
struct RestItem {
  const void* live;
  int64_t snapshot;  // offset of the result
  int64_t length;
  int64_t parts;  // in the workspace: two numbers per tile, where there are several
};

// One estimate in one power iteration. `first` is what the tiles own (s = W v where u comes first),
// `second` what they add up (t = W^T s). The other offsets are in the workspace.
struct PowerItem {
  const void* weight;
  Matrix matrix;
  Cut cut;
  Vector member;
  Vector unit;
  int64_t sigma;  // offset in the snapshot
  int64_t first;
  int64_t second;
  int64_t partial;         // one summand of `second` per tile
  int64_t first_squares;   // one summand of |first|^2 per tile, of sigma if only_estimate
  int64_t second_squares;  // one summand of |second|^2 per block of finish
  int64_t norms;           // kNormNumel numbers, see finish.cu
  int32_t ticket;          // which counter
  bool only_estimate;      // its vectors are those that `rest` has left in the snapshot
};

// One layer in scale.
struct ScaleItem {
  const void* weight;
  void* out;
  int64_t numel;
  int64_t sigma;  // offset of its first estimate's
  double scale;
  int32_t estimates;
  bool vectorized;
};

constexpr int kMaxEstimates = 2;

// d sigma / d W of one estimate: the product of two vectors. `product` copies them from the
// snapshot into the workspace, where they lie in the order of the weight and where packs may.
struct Outer {
  Matrix matrix;
  Divisor by_length;  // of a unit
  Divisor by_inner;
  uint64_t one_over_length;  // times 2^64, rounded down
  int64_t snapshot;          // where u lies and then v
  int64_t vectors;           // where the members lie in the workspace, and then the units
};

// One layer in scale_backward.
struct BackwardItem {
  const void* grad;
  const void* weight;
  void* out;
  int64_t numel;
  int64_t sigma;
  int64_t product;  // offset of its partial sums of <G, W> in the workspace
  int64_t tile;     // elements per partial sum
  double scale;
  int32_t products;  // how many partial sums
  int32_t estimates;
  bool vectorized;
  Outer outers[kMaxEstimates];
};

}  // namespace fastsn::cuda
