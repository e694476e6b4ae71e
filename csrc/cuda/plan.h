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

// Threads of a block of `multiply`. Two such blocks fit into a multiprocessor, so that one of them
// reads while the other one sums up; rows too long for the registers of a block have twice as many
// threads, but for fp64.
constexpr int kThreads = 256;
constexpr int kManyThreads = 512;
constexpr int most_threads(int bytes) { return bytes == 8 ? kThreads : kManyThreads; }
// Elements of a pack: one load of 16 bytes in fp32.
constexpr int kPack = 4;
// Packs that a thread holds: as many as it has registers for.
constexpr int packs(bool is_double) { return is_double ? 4 : 8; }
// Such a block may have half of the 64 Ki registers of a multiprocessor: 128 a thread, of which the
// elements and as many sums take a half.
static_assert(2 * kPack * packs(false) * kThreads * 2 <= 32 * 1024);
static_assert(2 * kPack * packs(true) * 2 * kThreads * 2 <= 32 * 1024);

// Threads of a block of `finish`, and elements of the second vector that it sums up.
constexpr int kFinishThreads = 512;
constexpr int kReduceChunk = 64;
static_assert(kFinishThreads % (kReduceChunk / kPack) == 0, "whole packs side by side");
// Vectors of up to so many elements together are normalized by one block, the last one of `finish`;
// longer ones by many, in a launch of their own.
constexpr int kNormalizedAtOnce = 16 * 1024;
constexpr int kNormalizeTile = 8 * kFinishThreads;
static_assert(kNormalizedAtOnce % kNormalizeTile == 0);
constexpr int kNormNumel = 3;

// Threads of a block of `rest`, and elements that each of them has in registers, all on their way
// before the first one is used. Vectors of most networks are one tile; the tiles of a longer one
// know each other's sums only in a second launch.
constexpr int kRestThreads = 512;
constexpr int kRestValues = 16;
constexpr int kRestTile = kRestThreads * kRestValues;
static_assert(kRestValues * 2 <= 64 * 1024 / kRestThreads / 2, "half of a thread's registers");

// Threads of a block of scale, product and gradient; and packs of 16 bytes that each of them loads
// from a tensor before it uses the first one.
constexpr int kFlatThreads = 256;
constexpr int kFlatPacks = 4;
// Elements that one block of <G, W> reads, or a multiple: there are no more such blocks of a layer
// than this, as every block of the gradient sums up what they found.
constexpr int kProductTile = 8192;
constexpr int kMaxProducts = 1024;

FASTSN_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For numbers from 0 to 2^31 - 1; `value` is one of them, and not 0.
constexpr Divisor divisor(int64_t value) {
  int bits = 0;
  while ((int64_t{1} << bits) < value) {
    ++bits;
  }
  const uint64_t multiplier = (uint64_t{1} << (31 + bits)) / static_cast<uint64_t>(value) + 1;
  return {static_cast<uint32_t>(multiplier), 31 + bits};
}

FASTSN_BOTH constexpr int divide(int number, const Divisor& by) {
  return static_cast<int>(uint64_t{static_cast<uint32_t>(number)} * by.multiplier >> by.shift);
}

// The cut of one multiplication with the weight, whose elements have `bytes` bytes and lie in packs
// that can be loaded at once if `aligned`. `unit_first`: see Cut.
Cut cut(const Matrix& matrix, bool unit_first, bool aligned, int bytes);

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
FASTSN_BOTH constexpr int64_t rest_tiles(int64_t length) {
  return length <= kRestTile ? 1 : ceil_div(length, kRestTile);
}
// Both vectors of an item.
FASTSN_BOTH inline int64_t vector_length(const PowerItem& item) {
  return item.matrix.members + unit_length(item.matrix);
}
FASTSN_BOTH inline bool is_normalized_at_once(const PowerItem& item) {
  return vector_length(item) <= kNormalizedAtOnce;
}

// Where both vectors of an outer product lie: in the snapshot, and in the workspace, each at the
// beginning of a pack.
FASTSN_BOTH inline int64_t members_in_snapshot(const Outer& outer) {
  return outer.snapshot + (outer.matrix.members_are_columns ? unit_length(outer.matrix) : 0);
}
FASTSN_BOTH inline int64_t units_in_snapshot(const Outer& outer) {
  return outer.snapshot + (outer.matrix.members_are_columns ? 0 : outer.matrix.members);
}
FASTSN_BOTH inline int64_t units_in_workspace(const Outer& outer) {
  return outer.vectors + ceil_div(outer.matrix.members, kPack) * kPack;
}

// Elements per partial sum of <G, W>.
FASTSN_BOTH inline int64_t product_tile(int64_t numel) {
  const int64_t steps = ceil_div(numel, int64_t{kMaxProducts} * kProductTile);
  return (steps == 0 ? 1 : steps) * kProductTile;
}

}  // namespace fastsn::cuda
