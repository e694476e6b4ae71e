#include "patches.h"

#include <algorithm>

namespace fastsn::cuda {
namespace {

// As many blocks as fill a large GPU a few times over. A constant: results do not depend on where
// they are computed.
constexpr int64_t kWantedBlocks = 512;
constexpr int64_t kLeastTile = 64;
// Inner elements side by side: a load of a warp in packs.
constexpr int64_t kRun = 32;
// A slice has so many samples at least, so that partial sums are few beside what is read.
constexpr int64_t kLeastSamples = 4;

// Rounded down to whole packs, if there is one.
int64_t in_packs(int64_t count) { return count < kPack ? count : count / kPack * kPack; }

// The largest tile of up to `most` elements.
Tile largest(const Layout& x, int64_t most) {
  const int64_t positions = int64_t{x.rows} * x.columns;
  int64_t inner = std::min<int64_t>(x.inner, kRun);
  const int64_t fitting = std::max<int64_t>(1, most / inner);
  int64_t rows = x.rows;
  int64_t columns = x.columns;
  int64_t outer = 1;
  if (positions <= fitting) {
    const int64_t channels = most / std::max<int64_t>(1, positions);
    inner = x.inner <= channels ? x.inner : channels / kRun * kRun;
    outer = x.outer <= channels ? x.outer : in_packs(channels);
  } else if (columns <= fitting) {
    rows = in_packs(fitting / columns);
  } else {
    rows = 1;
    columns = in_packs(fitting);
  }
  Tile tile{};
  tile.outer = static_cast<int32_t>(outer);
  tile.rows = static_cast<int32_t>(rows);
  tile.columns = static_cast<int32_t>(columns);
  tile.inner = static_cast<int32_t>(inner);
  return tile;
}

int64_t tiles(const Layout& x, const Tile& tile) {
  return channel_tiles(x, tile) * row_tiles(x, tile) * column_tiles(x, tile);
}

// Whether every tile begins and ends between packs.
bool is_made_of_packs(const Layout& x, const Tile& tile) {
  const auto fits = [](int64_t part, int64_t whole, int64_t elements) {
    return part == whole || part * elements % kPack == 0;
  };
  const int64_t row = int64_t{x.columns} * x.inner;
  return x.sample() % kPack == 0 && fits(tile.outer, x.outer, x.rows * row) &&
      fits(tile.rows, x.rows, row) && fits(tile.columns, x.columns, x.inner) &&
      (tile.inner == x.inner || (tile.inner % kPack == 0 && x.inner % kPack == 0));
}

int64_t power_of_two_from(int64_t least) {
  int64_t power = 1;
  while (power < least) {
    power *= 2;
  }
  return power;
}

}  // namespace

Tile tile_of(const Layout& layout, int64_t taps, bool aligned) {
  // Per channel a tile has more positions than partial sums come out of it.
  const int64_t positions = std::min(int64_t{layout.rows} * layout.columns, taps);
  const int64_t inner = std::min<int64_t>(layout.inner, kRun);
  const int64_t least = std::max(kLeastTile, positions * inner);
  int64_t most = kPatchTile;
  Tile tile = largest(layout, most);
  while (most / 2 >= least && tiles(layout, tile) < kWantedBlocks) {
    most /= 2;
    tile = largest(layout, most);
  }
  const int64_t wanted = ceil_div(kWantedBlocks, std::max<int64_t>(1, tiles(layout, tile)));
  const int64_t possible = std::max<int64_t>(1, layout.samples / kLeastSamples);
  tile.samples = static_cast<int32_t>(ceil_div(layout.samples, std::min(wanted, possible)));
  tile.vectorized = aligned && is_made_of_packs(layout, tile);
  const int64_t steps = ceil_div(tile.numel(), tile.vectorized ? kPack : 1);
  tile.width = static_cast<int32_t>(std::min<int64_t>(kPatchThreads, power_of_two_from(steps)));
  return tile;
}

}  // namespace fastsn::cuda
