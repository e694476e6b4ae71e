#pragma once

#include "items.h"

// How work is cut into blocks. Host code, without torch and without a GPU. Results depend on these
// numbers, and these on shapes and alignment alone: never on the device or on what else there is.
#ifdef __CUDACC__
#define FASTSN_BOTH __host__ __device__
#else
#define FASTSN_BOTH
#endif

namespace fastsn::cuda {

// Threads of a block of the power iteration.
constexpr int kThreads = 512;
// Elements of a pack: one load of 16 bytes in fp32.
constexpr int kPack = 4;
// Packs that a thread holds: as many as it has registers for.
constexpr int packs(bool is_double) { return is_double ? 4 : 8; }
// Elements of the second vector that one block of the reduction sums up.
constexpr int kReduceChunk = 64;

// Elements that one block of scale and of the gradient writes.
constexpr int kFlatThreads = 256;
constexpr int kFlatTile = 8192;
// Elements that one block of <G, W> reads at least, and the most such blocks of one layer: every
// block of the gradient sums up what they found.
constexpr int kProductTile = 16384;
constexpr int kMaxProducts = 1024;

FASTSN_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cut of one multiplication with the weight, whose elements lie in packs that can be loaded at
// once if `aligned`. `unit_first`: see Cut.
Cut cut(const Matrix& matrix, bool unit_first, bool aligned, bool is_double);

// Members that a group holds at once.
inline int capacity(const Cut& cut, bool is_double) { return cut.width * kPack * packs(is_double); }

FASTSN_BOTH inline int64_t unit_length(const Matrix& matrix) {
  return int64_t{matrix.units} * matrix.inner;
}
FASTSN_BOTH inline int64_t first_length(const PowerItem& item) {
  return item.cut.unit_first ? item.matrix.members : unit_length(item.matrix);
}
FASTSN_BOTH inline int64_t second_length(const PowerItem& item) {
  if (item.only_estimate) {
    return 0;
  }
  return item.cut.unit_first ? unit_length(item.matrix) : item.matrix.members;
}
FASTSN_BOTH inline int64_t reduce_blocks(const PowerItem& item) {
  const int64_t blocks = ceil_div(second_length(item), kReduceChunk);
  return blocks == 0 ? 1 : blocks;
}

// Elements per partial sum of <G, W>.
FASTSN_BOTH inline int64_t product_tile(int64_t numel) {
  const int64_t least = ceil_div(numel, kMaxProducts);
  return ceil_div(least < kProductTile ? kProductTile : least, kPack) * kPack;
}

}  // namespace fastsn::cuda
