#include "plan.h"

#include <algorithm>

namespace fastsn::cuda {
namespace {

// Where the members come first, a layer is cut into about so many tiles, so that a few layers fill
// a GPU, ...
constexpr int64_t kTiles = 128;
// ... of no fewer elements than this: a tile has costs of its own.
constexpr int64_t kTileNumel = 12 * 1024;

// Where the units come first, a tile is read twice. It has no more bytes than this, so that it is
// in a cache the second time: those of all blocks that a GPU runs at once fit into half of a
// second-level cache of 50 MB, those of a multiprocessor into most of its first-level cache.
constexpr int64_t kSlabBytes = 96 * 1024;
// It has members for a whole sector at least, whatever its size: less would be read in vain.
constexpr int kSectorBytes = 32;
// A warp at most shares a unit, unless there are too few units for all groups of a block.
constexpr int kLanesUnitFirst = 32;

// The least power of two of at least `least` at which classes of this width leave few threads idle.
int lanes_for(int classes, int least) {
  int lanes = 1;
  while (lanes < kThreads &&
         (lanes < least || lanes < classes || lanes / classes * classes * 4 < lanes * 3)) {
    lanes *= 2;
  }
  return lanes;
}

int lanes_members_first(const Matrix& matrix, const Cut& cut, int bytes) {
  int lanes = lanes_for(cut.classes, 32);
  const int64_t held = kPack * packs(bytes == 8);
  while (lanes < most_threads(bytes) && lanes / cut.classes * held < matrix.members) {
    lanes *= 2;
  }
  return lanes;
}

int lanes_unit_first(const Matrix& matrix, const Cut& cut, int bytes) {
  const int64_t units = int64_t{matrix.units} * cut.class_chunks;
  // Members side by side in a group times kPack are those of a tile.
  const auto is_too_large = [&](int lanes) {
    const int64_t members = std::min(lanes / cut.classes * kPack, matrix.members);
    return members * unit_length(matrix) * bytes > kSlabBytes;
  };
  if (cut.classes > 1) {
    const int wide = lanes_for(cut.classes, std::max(16, 2 * cut.classes));
    return is_too_large(wide) ? lanes_for(cut.classes, 16) : wide;
  }
  int lanes = kLanesUnitFirst;
  while (lanes > 1 && lanes * kPack * bytes > kSectorBytes && is_too_large(lanes)) {
    lanes /= 2;
  }
  const int64_t at_once = packs(bytes == 8);
  while (lanes >= kLanesUnitFirst && lanes < kThreads && units * 2 * lanes <= at_once * kThreads) {
    lanes *= 2;
  }
  return lanes;
}

}  // namespace

Cut cut(const Matrix& matrix, bool unit_first, bool aligned, int bytes) {
  Cut cut{};
  cut.unit_first = unit_first;
  cut.vectorized = aligned && matrix.inner == 1 && matrix.members % kPack == 0;
  cut.classes = std::clamp(matrix.inner, 1, kThreads);
  cut.class_chunks = static_cast<int32_t>(ceil_div(matrix.inner, cut.classes));
  cut.lanes =
      unit_first ? lanes_unit_first(matrix, cut, bytes) : lanes_members_first(matrix, cut, bytes);
  while (1 << cut.lane_bits < cut.lanes) {
    ++cut.lane_bits;
  }
  while (cut.threads() < kThreads) {
    ++cut.group_bits;
  }
  cut.width = cut.lanes / cut.classes;
  while (cut.parts * cut.parts < cut.width) {
    ++cut.parts;
  }
  cut.by_width = divisor(cut.width);
  cut.by_classes = divisor(cut.classes);
  cut.by_class_chunks = divisor(std::max(cut.class_chunks, 1));
  if (unit_first) {
    // One pack of members: all units lie between two of them.
    cut.span = cut.width * kPack;
    cut.tiles = static_cast<int32_t>(std::max<int64_t>(ceil_div(matrix.members, cut.span), 1));
    return cut;
  }
  const int64_t groups = int64_t{1} << cut.group_bits;
  const int64_t units = int64_t{matrix.units} * cut.class_chunks;
  const int64_t unit_numel = std::max<int64_t>(int64_t{matrix.members} * cut.classes, 1);
  const int64_t numel = unit_length(matrix) * matrix.members;
  const int64_t wanted = std::max(ceil_div(numel, kTiles), kTileNumel);
  const int64_t span = ceil_div(ceil_div(wanted, unit_numel), groups) * groups;
  // An empty matrix has a tile too, whose products are zeros.
  cut.span = static_cast<int32_t>(std::clamp<int64_t>(span, 1, std::max<int64_t>(units, 1)));
  cut.tiles = static_cast<int32_t>(std::max<int64_t>(ceil_div(units, cut.span), 1));
  return cut;
}

}  // namespace fastsn::cuda
