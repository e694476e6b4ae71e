#include "plan.h"

#include <algorithm>

namespace fastsn::cuda {
namespace {

// A layer is cut into about so many tiles, so that a few layers fill a GPU, ...
constexpr int64_t kTiles = 128;
// ... of no fewer elements than this: a tile has costs of its own.
constexpr int64_t kTileNumel = 24 * 1024;
// Where the units come first, a tile has four times so many members: threads enough for a whole
// cache line, and members enough that the summands, one per unit and tile, stay few.
constexpr int kLanesUnitFirst = 16;
constexpr int kWidthUnitFirst = 2;

// The least power of two of at least `least` at which classes of this width leave few threads idle.
int lanes_for(int classes, int least) {
  int lanes = 1;
  while (lanes < kThreads &&
         (lanes < least || lanes < classes || lanes / classes * classes * 4 < lanes * 3)) {
    lanes *= 2;
  }
  return lanes;
}

}  // namespace

Cut cut(const Matrix& matrix, bool unit_first, bool aligned, bool is_double) {
  Cut cut{};
  cut.unit_first = unit_first;
  cut.vectorized = aligned && matrix.inner == 1 && matrix.members % kPack == 0;
  cut.classes = std::clamp(matrix.inner, 1, kThreads);
  cut.class_chunks = static_cast<int32_t>(ceil_div(matrix.inner, cut.classes));
  cut.lanes = lanes_for(
      cut.classes, unit_first ? std::max(kLanesUnitFirst, kWidthUnitFirst * cut.classes) : 32);
  cut.width = cut.lanes / cut.classes;
  if (unit_first) {
    // One pack of members: all units lie between two of them.
    cut.span = cut.width * kPack;
    cut.tiles = static_cast<int32_t>(std::max<int64_t>(ceil_div(matrix.members, cut.span), 1));
    return cut;
  }
  while (cut.lanes < kThreads && capacity(cut, is_double) < matrix.members) {
    cut.lanes *= 2;
    cut.width = cut.lanes / cut.classes;
  }
  const int64_t groups = kThreads / cut.lanes;
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
