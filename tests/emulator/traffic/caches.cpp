// What the caches of a device make of recorded launches. Blocks run in slots; the slots take turns,
// a line each; loads look into the first-level cache of their multiprocessor, then into the second
// level, which stays from launch to launch.
#include "trace.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

namespace traffic {
namespace {

struct Line {
  uint64_t line = 0;
  uint8_t valid = 0;  // sectors that are there as a whole
  uint8_t dirty = 0;
  Bytes stored{};  // of sectors that are not
  size_t newer = 0, older = 0;
};

// The line that was not used for the longest time makes room for another one.
class Cache {
 public:
  explicit Cache(uint64_t bytes) : capacity_(std::max<uint64_t>(bytes / kLine, 1)), lines_(1) {
    places_.reserve(capacity_);
    lines_.reserve(capacity_ + 1);
  }

  // The line, which is present afterwards; evict(line) is what made room.
  template <typename Evict>
  Line& at(uint64_t line, const Evict& evict) {
    const auto found = places_.find(line);
    size_t place = lines_.size();
    if (found != places_.end()) {
      place = found->second;
      unlink(place);
    } else {
      if (places_.size() < capacity_) {
        lines_.emplace_back();
      } else {
        place = lines_[0].newer;
        unlink(place);
        places_.erase(lines_[place].line);
        if (lines_[place].dirty) evict(lines_[place]);
        lines_[place] = {};
      }
      lines_[place].line = line;
      places_.emplace(line, place);
    }
    // Behind the newest.
    lines_[place].older = lines_[0].older;
    lines_[place].newer = 0;
    lines_[lines_[0].older].newer = place;
    lines_[0].older = place;
    return lines_[place];
  }

  template <typename Body>
  void for_each(const Body& body) {
    for (size_t place = 1; place < lines_.size(); ++place) body(lines_[place]);
  }

 private:
  void unlink(size_t place) {
    const Line& line = lines_[place];
    lines_[line.older].newer = line.newer;
    lines_[line.newer].older = line.older;
  }

  uint64_t capacity_;
  std::unordered_map<uint64_t, size_t> places_;
  // A ring that starts and ends at the first, which is no line: its `newer` is the oldest line.
  std::vector<Line> lines_;
};

// What becomes of a dirty line.
void write_back(Line& line, TrafficTotals& totals) {
  totals.written += __builtin_popcount(line.dirty);
  totals.filled += __builtin_popcount(line.dirty & ~line.valid);
  line.dirty = 0;
}

std::unique_ptr<Cache> second_level;

class Run {
 public:
  Run(Launch& launch, int multiprocessors, int resident, uint64_t first_level)
      : launch_(launch), has_first_(first_level > 0) {
    for (int k = 0; k < multiprocessors; ++k) first_.emplace_back(first_level);
    slots_.resize(static_cast<size_t>(multiprocessors) * resident);
  }

  TrafficTotals run() {
    for (auto& phase : launch_.phases) phase.first_level = phase.second_level = phase.memory = 0;
    size_t next = 0;
    size_t running = 0;
    for (Slot& slot : slots_) running += start(slot, next);
    while (running > 0) {
      for (size_t k = 0; k < slots_.size(); ++k) {
        Slot& slot = slots_[k];
        if (!slot.runs) continue;
        step(slot, first_[k % first_.size()]);
        if (slot.at == launch_.streams[slot.block].requests.size()) {
          slot.runs = false;
          running -= 1 - start(slot, next);
        }
      }
    }
    return totals_;
  }

 private:
  struct Slot {
    bool runs = false;
    size_t block = 0, at = 0, partial = 0, phase = 0;
  };

  // The next block that accesses anything.
  size_t start(Slot& slot, size_t& next) {
    for (; next < launch_.blocks; ++next) {
      if (launch_.streams[next].requests.empty()) continue;
      slot = {true, next, 0, 0, launch_.first_phase[next]};
      ++next;
      return 1;
    }
    return 0;
  }

  void step(Slot& slot, Cache& first) {
    const Stream& stream = launch_.streams[slot.block];
    const Request request = stream.requests[slot.at++];
    if (request.ends_phase) {
      ++slot.phase;
      return;
    }
    TrafficPhase& phase = launch_.phases[slot.phase];
    const auto write = [&](Line& line) { write_back(line, totals_); };
    auto sectors = static_cast<uint8_t>(request.sectors);
    const auto kind = static_cast<Kind>(request.kind);
    if (kind == Kind::store) {
      Line& line = second_level->at(request.line, write);
      totals_.stored += __builtin_popcount(sectors);
      line.dirty |= sectors;
      if (request.is_partial)
        store_part(line, stream.partial[slot.partial++]);
      else
        line.valid |= sectors;
      return;
    }
    if (kind != Kind::atomic) {
      totals_.loaded += __builtin_popcount(sectors);
      if (kind == Kind::load && has_first_) {
        Line& line = first.at(request.line, [](Line&) {});
        const int hits = __builtin_popcount(sectors & line.valid);
        phase.first_level += hits;
        totals_.first_level += hits;
        sectors &= ~line.valid;
        line.valid |= sectors;
        if (sectors == 0) return;
      }
    }
    Line& line = second_level->at(request.line, write);
    const int misses = __builtin_popcount(sectors & ~line.valid);
    line.valid |= sectors;
    phase.memory += misses;
    totals_.memory += misses;
    if (kind == Kind::atomic) {
      line.dirty |= sectors;
      ++totals_.atomics;
      return;
    }
    const int hits = __builtin_popcount(sectors) - misses;
    phase.second_level += hits;
    totals_.second_level += hits;
  }

  // A sector that has been stored in part until it is complete needs nothing from memory.
  static void store_part(Line& line, const Bytes& bytes) {
    for (int k = 0; k < 2; ++k) line.stored[k] |= bytes[k];
    for (int s = 0; s < kSectors; ++s)
      if (of_sector(line.stored, s) == ~uint32_t{0}) line.valid |= 1 << s;
  }

  Launch& launch_;
  bool has_first_;
  std::vector<Cache> first_;
  std::vector<Slot> slots_;
  TrafficTotals totals_{};
};

}  // namespace
}  // namespace traffic

// For ctypes; see ../../recorded.py.
using traffic::launches;
using traffic::second_level;

extern "C" {

void traffic_clear() { launches.clear(); }
size_t traffic_launches() { return launches.size(); }
const void* traffic_kernel(size_t launch) { return launches[launch].kernel; }
const char* traffic_library(size_t launch) { return launches[launch].library; }
const void* traffic_base(size_t launch) { return launches[launch].base; }
size_t traffic_blocks(size_t launch) { return launches[launch].blocks; }
int traffic_threads(size_t launch) { return launches[launch].threads; }
size_t traffic_dynamic_shared(size_t launch) { return launches[launch].dynamic_shared; }
size_t traffic_site_count(size_t launch) { return launches[launch].sites.size(); }
const traffic::TrafficSite* traffic_sites(size_t launch) { return launches[launch].sites.data(); }
size_t traffic_phase_count(size_t launch) { return launches[launch].phases.size(); }
const traffic::TrafficPhase* traffic_phases(size_t launch) {
  return launches[launch].phases.data();
}

// An empty second-level cache.
void traffic_reset_second_level(uint64_t bytes) {
  second_level = std::make_unique<traffic::Cache>(bytes);
}

// Clean data that is there before anything runs.
void traffic_warm(uintptr_t address, uint64_t bytes) {
  traffic::TrafficTotals ignored{};
  for (uint64_t at = address / traffic::kSector; at * traffic::kSector < address + bytes; ++at) {
    auto& line = second_level->at(
        at / traffic::kSectors, [&](auto& old) { traffic::write_back(old, ignored); });
    line.valid |= 1 << at % traffic::kSectors;
  }
}

void traffic_run(
    size_t launch, int multiprocessors, int resident, uint64_t first_level,
    traffic::TrafficTotals* totals) {
  *totals = traffic::Run(launches[launch], multiprocessors, resident, first_level).run();
}

// What still has to be written to memory.
void traffic_write_back(traffic::TrafficTotals* totals) {
  *totals = {};
  second_level->for_each([&](auto& line) { traffic::write_back(line, *totals); });
}
}
