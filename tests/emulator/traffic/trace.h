// What is recorded of a launch, and what the caches make of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace traffic {

constexpr int kWarp = 32;
constexpr uint64_t kLine = 128, kSector = 32;
constexpr int kSectors = kLine / kSector;

enum class Space : uint8_t { global, shared };
enum class Kind : uint8_t { load, load_past_first_level, store, atomic };

// A bit for each byte of a line.
using Bytes = std::array<uint64_t, 2>;

// The bytes of a sector.
inline uint32_t of_sector(const Bytes& bytes, int sector) {
  return static_cast<uint32_t>(bytes[sector / 2] >> sector % 2 * 32);
}

// One line that a warp accesses, in 8 bytes, or the end of a phase.
struct Request {
  uint64_t line : 56;
  uint64_t sectors : 4;
  uint64_t kind : 2;
  uint64_t is_partial : 1;  // a store of some bytes of a sector; the bytes are in Stream::partial
  uint64_t ends_phase : 1;
};
static_assert(sizeof(Request) == 8);

struct Stream {
  std::vector<Request> requests;
  std::vector<Bytes> partial;

  void clear() {
    requests.clear();
    partial.clear();
  }
};

extern "C" {

// An instruction of a launch, as all warps executed it. The layout is known to recorded.py.
struct TrafficSite {
  const void* instruction;
  uint32_t size;  // bytes per lane
  Space space;
  Kind kind;
  uint64_t accesses;  // of a warp
  uint64_t asked;     // bytes, of all lanes
  uint64_t distinct;  // bytes, lanes with the same address once
  uint64_t sectors;   // that the accesses touch, of 32 bytes
  uint64_t needed;    // sectors that would do for the distinct bytes
  uint64_t wavefronts;
  uint64_t least_wavefronts;  // without bank conflicts
};

// What a block does between two barriers.
struct TrafficPhase {
  uint32_t block;
  uint32_t wide_loads;    // from global memory, of the warp that has the most: of 8 bytes and more
  uint32_t narrow_loads;  // of fewer bytes per lane
  uint32_t atomics;
  uint64_t wavefronts;  // of shared memory, of all warps
  uint64_t stored;      // sectors
  // Sectors that were loaded, by where they came from.
  uint64_t first_level, second_level, memory;
};

struct TrafficTotals {
  uint64_t loaded;                             // sectors, from wherever
  uint64_t first_level, second_level, memory;  // the same, by where they came from
  uint64_t stored;                             // sectors, to the second level
  uint64_t atomics;
  uint64_t filled;   // sectors from memory, to complete what was stored in part
  uint64_t written;  // sectors to memory
};

}  // extern "C"

struct Launch {
  const void* kernel = nullptr;
  const char* library = nullptr;  // that the kernel is in, and where it lies
  const void* base = nullptr;
  size_t blocks = 0;
  int threads = 0;
  size_t dynamic_shared = 0;
  std::vector<TrafficSite> sites;
  std::vector<Stream> streams;  // of each block
  std::vector<TrafficPhase> phases;
  std::vector<size_t> first_phase;  // of each block
};

// Kept until cleared.
extern std::vector<Launch> launches;

}  // namespace traffic
