#pragma once

#include <cstdint>

// What the host tells the kernels about the work of a call. Everything goes by value as a kernel
// parameter, so nothing is copied to the device and a CUDA graph captures it as it is.
namespace fastsn::cuda {

enum class Type : int32_t { kFloat, kDouble, kBFloat16, kHalf };

constexpr int kMaxDigits = 4;

// Where a column lies: memory column to logical column (see MatrixView::Digit).
struct Digits {
  int32_t count;  // 0: the two agree
  int32_t size[kMaxDigits];
  int32_t stride[kMaxDigits];
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
  int32_t lanes;         // threads of a group: a power of two
  int32_t width;         // members side by side in a group
  int32_t classes;       // inner indices side by side in a group
  int32_t class_chunks;  // so many times `classes` cover `inner`
  int32_t span;          // of a tile: units times class_chunks, or members if unit_first
  int32_t tiles;
};

// A u or a v.
struct Vector {
  void* live;        // as the caller keeps it
  int64_t snapshot;  // offset
  Type type;         // of `live`
};

// One estimate in one power iteration. `first` is what the tiles own (s = W v where u comes first),
// `second` what they add up (t = W^T s).
struct PowerItem {
  const void* weight;
  Matrix matrix;
  Cut cut;
  Vector member;
  Vector unit;
  int64_t sigma;  // offset in the snapshot
  int64_t first;  // offsets in the workspace
  int64_t second;
  int64_t partial;  // one summand of `second` per tile
  int32_t ticket;   // which counter
  bool only_estimate;
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

// d sigma / d W of one estimate: the product of two vectors in the snapshot.
struct Outer {
  Matrix matrix;
  int64_t member;
  int64_t unit;
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
