#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

// Work of all layers cut into tiles, the same whatever the number of threads, so that results
// depend on shapes only.
namespace fastsn {

struct Tile {
  int64_t item;   // estimate or layer
  int64_t index;  // number of the tile within its item
  int64_t begin;
  int64_t end;
};

// About this many elements make a tile: it stays in a second-level cache between two uses. Those
// have 256 KB at least, of which fp32 takes half and the vectors that go with it some more.
constexpr int64_t kTileNumel = 32 * 1024;
static_assert(kTileNumel * sizeof(float) <= 128 * 1024);
// More tiles than this per item would only add partial results to sum up: each one is as long as a
// vector, and a square matrix of so many whole tiles has 1024 columns, 1/32 of a tile.
constexpr int64_t kMaxTiles = 32;
static_assert(kMaxTiles * kTileNumel == 1024 * 1024);
// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerialNumel = 16 * 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Appends the tiles of `item`, whose `numel` elements are cut along an axis of `length` positions
// into at most `max_tiles` runs of whole multiples of `align` positions. Returns their number.
inline int64_t cut(
    std::vector<Tile>& tiles, int64_t item, int64_t numel, int64_t length, int64_t align,
    int64_t max_tiles) {
  const int64_t wanted = std::clamp<int64_t>(ceil_div(numel, kTileNumel), 1, max_tiles);
  const int64_t step = std::max<int64_t>(ceil_div(ceil_div(length, wanted), align) * align, 1);
  int64_t count = 0;
  for (int64_t begin = 0; begin < length; begin += step) {
    tiles.push_back({item, count++, begin, std::min(begin + step, length)});
  }
  return count;
}

// Calls work(tile) once for every tile, on as many threads as pay off. Tiles start in order.
template <typename T, typename Work>
void for_each_tile(const std::vector<T>& tiles, int64_t total_numel, const Work& work) {
  const int64_t threads = std::min<int64_t>(
      {at::get_num_threads(), static_cast<int64_t>(tiles.size()),
       ceil_div(total_numel, kSerialNumel)});
  if (threads <= 1 || at::in_parallel_region()) {
    for (const auto& tile : tiles) {
      work(tile);
    }
    return;
  }
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tiles.size(); i = next++) {
      work(tiles[i]);
    }
  });
}

}  // namespace fastsn
