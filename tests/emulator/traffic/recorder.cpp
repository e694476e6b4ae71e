// Records the accesses of an emulated kernel: the callbacks of -fsanitize=thread see each one.
//
// A warp's accesses are put together from those of its lanes: the n-th execution of an instruction
// by each lane, counted since all lanes were last at the same place.
#include "recorder.h"

#include "trace.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

int traffic_thread = -1;
int traffic_past_first_level = 0;

namespace traffic {

std::vector<Launch> launches;

namespace {

constexpr int kWarps = 32;

struct Range {
  uintptr_t begin = 0, size = 0;
  bool has(uintptr_t address) const { return address - begin < size; }
};

// An access of a warp, while its lanes come by.
struct Access {
  uint32_t site;
  uint32_t lanes;
  uintptr_t address[kWarp];
};

struct Counted {
  uint32_t executed[kWarp] = {};
  std::vector<uint32_t> accesses;  // by occurrence
};

struct Warp {
  std::vector<Access> accesses;
  std::vector<Counted> counted;    // by site
  std::vector<uint32_t> counting;  // sites
  Stream stream;                   // of the present phase
  uint32_t wide_loads = 0, narrow_loads = 0;
};

struct SiteKey {
  const void* instruction;
  uint32_t size;
  Space space;
  Kind kind;
  bool operator==(const SiteKey& other) const {
    return instruction == other.instruction && size == other.size && space == other.space &&
        kind == other.kind;
  }
};

struct Hash {
  size_t operator()(const SiteKey& key) const {
    return (reinterpret_cast<uintptr_t>(key.instruction) ^ key.size << 3 ^
            static_cast<size_t>(key.kind) << 1 ^ static_cast<size_t>(key.space)) *
        0x9E3779B97F4A7C15;
  }
};

struct Image {
  uintptr_t inside;
  Range range;
};

// The library that an address lies in.
Range image_of(const void* inside) {
  Image image{reinterpret_cast<uintptr_t>(inside), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& wanted = *static_cast<Image*>(data);
        Range range{~uintptr_t{0}, 0};
        uintptr_t end = 0;
        for (int k = 0; k < info->dlpi_phnum; ++k) {
          const auto& header = info->dlpi_phdr[k];
          if (header.p_type != PT_LOAD) continue;
          range.begin = std::min<uintptr_t>(range.begin, info->dlpi_addr + header.p_vaddr);
          end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
        }
        range.size = end > range.begin ? end - range.begin : 0;
        if (range.has(wanted.inside)) wanted.range = range;
        return 0;
      },
      &image);
  return image.range;
}

Range own_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<uintptr_t>(begin), size};
}

class Recorder {
 public:
  void begin_launch(const TrafficLaunch& launch) {
    launches.emplace_back();
    Launch& own = launches.back();
    own.kernel = launch.kernel;
    Dl_info library{};
    dladdr(launch.kernel, &library);
    own.library = library.dli_fname;
    own.base = library.dli_fbase;
    own.blocks = launch.blocks;
    own.threads = launch.threads;
    own.dynamic_shared = launch.dynamic_shared;
    own.streams.resize(launch.blocks);
    own.first_phase.resize(launch.blocks);
    sites_.clear();
    last_key_ = {};
    for (Warp& warp : warps_) warp.counted.clear();
    stacks_ = range_of(launch.stacks);
    host_stack_ = own_stack();
    image_ = image_of(launch.kernel);
    recorder_ = image_of(&traffic_thread);
    shared_.clear();
    for (size_t k = 0; k < launch.shared_count; ++k) shared_.push_back(range_of(launch.shared[k]));
  }

  void begin_block(size_t index) {
    block_ = index;
    phase_ = {};
    launches.back().first_phase[index] = launches.back().phases.size();
  }

  void see(const void* at, size_t size, Kind kind, const void* instruction) {
    const int thread = traffic_thread;
    const auto address = reinterpret_cast<uintptr_t>(at);
    if (thread < 0 || stacks_.has(address) || host_stack_.has(address) || recorder_.has(address))
      return;
    Space space = Space::global;
    if (image_.has(address)) {
      const auto has = [&](const Range& range) { return range.has(address); };
      if (std::none_of(shared_.begin(), shared_.end(), has)) return;
      space = Space::shared;
    } else if (kind == Kind::load && std::exchange(traffic_past_first_level, 0)) {
      kind = Kind::load_past_first_level;
    }
    const uint32_t site = site_of({instruction, static_cast<uint32_t>(size), space, kind});
    Warp& warp = warps_[thread / kWarp];
    if (warp.counted.size() <= site) warp.counted.resize(site + 1);
    Counted& counted = warp.counted[site];
    const int lane = thread % kWarp;
    const uint32_t occurrence = counted.executed[lane]++;
    if (occurrence == counted.accesses.size()) {
      if (occurrence == 0) warp.counting.push_back(site);
      counted.accesses.push_back(static_cast<uint32_t>(warp.accesses.size()));
      warp.accesses.emplace_back();
      warp.accesses.back().site = site;
      warp.accesses.back().lanes = 0;
    }
    Access& access = warp.accesses[counted.accesses[occurrence]];
    access.lanes |= 1u << lane;
    access.address[lane] = address;
  }

  void meet(Warp& warp) {
    for (const Access& access : warp.accesses) {
      if (launches.back().sites[access.site].space == Space::global)
        finish_global(warp, access);
      else
        finish_shared(access);
    }
    warp.accesses.clear();
    for (const uint32_t site : warp.counting) {
      std::fill_n(warp.counted[site].executed, kWarp, 0);
      warp.counted[site].accesses.clear();
    }
    warp.counting.clear();
  }

  void meet(int warp) { meet(warps_[warp]); }

  // The warps of a block take turns, a line each.
  void barrier() {
    Stream& stream = launches.back().streams[block_];
    size_t left = 0;
    size_t partial[kWarps] = {};
    for (Warp& warp : warps_) {
      meet(warp);
      left = std::max(left, warp.stream.requests.size());
      phase_.wide_loads = std::max(phase_.wide_loads, warp.wide_loads);
      phase_.narrow_loads = std::max(phase_.narrow_loads, warp.narrow_loads);
      warp.wide_loads = warp.narrow_loads = 0;
    }
    for (size_t k = 0; k < left; ++k) {
      for (int w = 0; w < kWarps; ++w) {
        const Stream& own = warps_[w].stream;
        if (k >= own.requests.size()) continue;
        stream.requests.push_back(own.requests[k]);
        if (own.requests[k].is_partial) stream.partial.push_back(own.partial[partial[w]++]);
      }
    }
    for (Warp& warp : warps_) warp.stream.clear();
    Request end{};
    end.ends_phase = 1;
    stream.requests.push_back(end);
    phase_.block = static_cast<uint32_t>(block_);
    launches.back().phases.push_back(phase_);
    phase_ = {};
  }

 private:
  static Range range_of(const TrafficRange& range) {
    return {reinterpret_cast<uintptr_t>(range.begin), range.size};
  }

  uint32_t site_of(const SiteKey& key) {
    if (key == last_key_) return last_site_;
    auto& sites = launches.back().sites;
    const auto [found, is_new] = sites_.emplace(key, static_cast<uint32_t>(sites.size()));
    if (is_new) {
      sites.push_back({});
      sites.back().instruction = key.instruction;
      sites.back().size = key.size;
      sites.back().space = key.space;
      sites.back().kind = key.kind;
    }
    last_key_ = key;
    last_site_ = found->second;
    return last_site_;
  }

  void finish_global(Warp& warp, const Access& access) {
    TrafficSite& site = launches.back().sites[access.site];
    lines_.clear();
    for (uint32_t left = access.lanes; left; left &= left - 1) {
      uintptr_t at = access.address[__builtin_ctz(left)];
      const uintptr_t end = at + site.size;
      while (at < end) {
        const uint64_t line = at / kLine;
        const uintptr_t until = std::min<uintptr_t>(end, (line + 1) * kLine);
        auto found = std::find_if(
            lines_.rbegin(), lines_.rend(), [&](const auto& known) { return known.first == line; });
        if (found == lines_.rend()) {
          lines_.push_back({line, {}});
          found = lines_.rbegin();
        }
        set(found->second, at % kLine, until - at);
        at = until;
      }
    }
    uint64_t distinct = 0, sectors = 0;
    for (const auto& [line, bytes] : lines_) {
      Request request{};
      request.line = line;
      request.kind = static_cast<uint64_t>(site.kind);
      for (int s = 0; s < kSectors; ++s) {
        const uint32_t own = of_sector(bytes, s);
        if (own == 0) continue;
        request.sectors |= 1u << s;
        distinct += __builtin_popcount(own);
        ++sectors;
        if (site.kind == Kind::store && own != ~uint32_t{0}) request.is_partial = 1;
      }
      warp.stream.requests.push_back(request);
      if (request.is_partial) warp.stream.partial.push_back(bytes);
    }
    ++site.accesses;
    site.asked += uint64_t{site.size} * __builtin_popcount(access.lanes);
    site.distinct += distinct;
    site.sectors += sectors;
    site.needed += (distinct + kSector - 1) / kSector;
    if (site.kind == Kind::store)
      phase_.stored += sectors;
    else if (site.kind == Kind::atomic)
      ++phase_.atomics;
    else
      ++(site.size >= 8 ? warp.wide_loads : warp.narrow_loads);
  }

  static void set(Bytes& bytes, uint64_t begin, uint64_t count) {
    for (uint64_t k = begin; k < begin + count;) {
      const uint64_t bit = k % 64, run = std::min(begin + count - k, 64 - bit);
      bytes[k / 64] |= (run == 64 ? ~uint64_t{0} : (uint64_t{1} << run) - 1) << bit;
      k += run;
    }
  }

  // 32 banks of 4 bytes; of wide accesses, 16 or 8 lanes at a time.
  void finish_shared(const Access& access) {
    TrafficSite& site = launches.back().sites[access.site];
    const int at_once = site.size <= 4 ? 32 : site.size <= 8 ? 16 : 8;
    const uint64_t words = std::max<uint64_t>(site.size / 4, 1);
    uint64_t wavefronts = 0, least = 0;
    for (int first = 0; first < kWarp; first += at_once) {
      const uint32_t lanes = access.lanes >> first & (at_once == 32 ? ~0u : (1u << at_once) - 1);
      if (lanes == 0) continue;
      words_.clear();
      for (uint32_t left = lanes; left; left &= left - 1) {
        const uint64_t word = access.address[first + __builtin_ctz(left)] / 4;
        for (uint64_t k = 0; k < words; ++k) words_.push_back(word + k);
      }
      std::sort(words_.begin(), words_.end());
      words_.erase(std::unique(words_.begin(), words_.end()), words_.end());
      uint64_t of_bank[32] = {};
      uint64_t most = 0;
      for (const uint64_t word : words_) most = std::max(most, ++of_bank[word % 32]);
      wavefronts += most;
      ++least;
    }
    ++site.accesses;
    site.asked += uint64_t{site.size} * __builtin_popcount(access.lanes);
    site.wavefronts += wavefronts;
    site.least_wavefronts += least;
    phase_.wavefronts += wavefronts;
  }

  std::unordered_map<SiteKey, uint32_t, Hash> sites_;
  SiteKey last_key_{};
  uint32_t last_site_ = 0;
  Warp warps_[kWarps];
  Range stacks_, host_stack_, image_, recorder_;
  std::vector<Range> shared_;
  size_t block_ = 0;
  TrafficPhase phase_{};
  std::vector<std::pair<uint64_t, Bytes>> lines_;
  std::vector<uint64_t> words_;
};

Recorder recorder;

}  // namespace
}  // namespace traffic

using traffic::Kind;
using traffic::recorder;

void traffic_begin_launch(const TrafficLaunch* launch) { recorder.begin_launch(*launch); }
void traffic_begin_block(size_t index) { recorder.begin_block(index); }
void traffic_meet(int warp) { recorder.meet(warp); }
void traffic_barrier() { recorder.barrier(); }
void traffic_end_block() { recorder.barrier(); }
void traffic_atomic(const void* address, size_t size, const void* instruction) {
  recorder.see(address, size, Kind::atomic, instruction);
}

#define SEE(size, kind) recorder.see(address, size, kind, __builtin_return_address(0))
#define ACCESSES(n)                                                    \
  void __tsan_read##n(void* address) { SEE(n, Kind::load); }           \
  void __tsan_write##n(void* address) { SEE(n, Kind::store); }         \
  void __tsan_unaligned_read##n(void* address) { SEE(n, Kind::load); } \
  void __tsan_unaligned_write##n(void* address) { SEE(n, Kind::store); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, size_t size) { SEE(size, Kind::load); }
void __tsan_write_range(void* address, size_t size) { SEE(size, Kind::store); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
}

// Host code is compiled with the callbacks as well, which are to do what an atomic operation does.
#define UPDATE(bits, T, operation)                               \
  T __tsan_atomic##bits##_##operation(volatile T* p, T x, int) { \
    return __atomic_##operation(p, x, __ATOMIC_SEQ_CST);         \
  }
#define COMPARE(bits, T, kind)                                                                     \
  int __tsan_atomic##bits##_compare_exchange_##kind(volatile T* p, T* expected, T x, int, int) {   \
    return __atomic_compare_exchange_n(p, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
#define ATOMICS(bits, T)                                      \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);              \
  }                                                           \
  void __tsan_atomic##bits##_store(volatile T* p, T x, int) { \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                 \
  }                                                           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) { \
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);       \
  }                                                           \
  UPDATE(bits, T, fetch_add)                                  \
  UPDATE(bits, T, fetch_sub)                                  \
  UPDATE(bits, T, fetch_or)                                   \
  UPDATE(bits, T, fetch_and)                                  \
  COMPARE(bits, T, strong)                                    \
  COMPARE(bits, T, weak)

extern "C" {
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
