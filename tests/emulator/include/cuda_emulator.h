// Runs CUDA kernels on the CPU, one thread at a time, so that a test sees what they compute.
//
// Every thread of a block is a fiber: it runs until it waits for others, in `__syncthreads` or in
// a warp's operation, and then the next one goes on. Blocks run one after another. Both orders can
// be chosen, and a kernel's results must not depend on either. What a launch or a kernel does
// wrong ends the launch with an error and a text instead of a hang or a wrong number.
#pragma once

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(FASTSN_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#if !defined(__ELF__) || !__has_attribute(noinit)
#error "the CUDA emulator needs GCC 11 or newer and ELF"
#endif

// Each library that includes this has an emulator of its own.
#pragma GCC visibility push(hidden)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_emulator {

constexpr int warp_size = 32;
constexpr int max_threads = 1024;
constexpr int max_warps = max_threads / warp_size;
constexpr size_t default_shared = 48 << 10;
constexpr size_t max_shared = 227 << 10;
constexpr size_t max_parameters = 32764;

// Who is told of the course of a launch: a recorder of memory accesses, or nobody.
#ifdef FASTSN_EMULATOR_RECORDS
}  // namespace cuda_emulator
#include "../traffic/observer.h"
namespace cuda_emulator {
#else
struct Observer {
  template <typename Machine>
  static void begin_launch(Machine&, const void*, size_t, int, size_t) {}
  static void begin_block(size_t) {}
  static void end_block() {}
  static void go_on(int) {}
  static void meet(int) {}
  static void barrier() {}
  static void past_first_level() {}
  static void atomic(const void*, size_t, const void*) {}
};
#endif

// Fibers

#if defined(__x86_64__) && !defined(FASTSN_EMULATOR_UCONTEXT)

struct Context {
  void* stack_pointer;
};

// `noipa`: the caller must not believe that this uses no register.
__attribute__((naked, noipa)) inline void exchange_stacks(void**, void*) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}

inline void exchange(Context& from, Context& to) {
  exchange_stacks(&from.stack_pointer, to.stack_pointer);
}

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.stack_pointer = top - 6;  // What exchange_stacks pops.
}

#else

struct Context {
  ucontext_t context;
};

inline void exchange(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  makecontext(&context.context, entry, 0);
}

#endif

// The stacks of all fibers, with a page between them that none may touch.
class Stacks {
 public:
  void prepare(Context& context, int thread, void (*entry)()) {
    if (!memory_) allocate();
    // Tops at different offsets in their pages do not compete for the same cache lines.
    const size_t shift = thread % 61 * 64;
    cuda_emulator::prepare(context, memory_ + thread * stride_ + page_, size - shift, entry);
  }

  std::pair<const void*, size_t> range() {
    if (!memory_) allocate();
    return {memory_, stride_ * max_threads};
  }

 private:
  static constexpr size_t size = 256 << 10;

  void allocate() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* all = mmap(nullptr, stride_ * max_threads, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(all);
    for (int i = 0; i < max_threads; ++i) mprotect(memory_ + i * stride_, page_, PROT_NONE);
  }

  size_t page_ = sysconf(_SC_PAGESIZE), stride_ = size + page_;
  char* memory_ = nullptr;
};

// Static shared memory: all variables in the sections that `__shared__` puts them in.
class StaticShared {
 public:
  void poison() {
    for (auto [begin, size] : ranges()) std::memset(begin, 0xFF, size);
  }

  const std::vector<std::pair<char*, size_t>>& ranges() {
    if (!known_) find();
    return ranges_;
  }

 private:
  // The program headers, which are in memory, do not name sections; the file does.
  void find() {
    Dl_info own{};
    const void* here = &threadIdx;
    dladdr(here, &own);
    std::ifstream file(own.dli_fname, std::ios::binary);
    auto read = [&](auto* to, size_t count, size_t offset) {
      file.seekg(static_cast<std::streamoff>(offset));
      file.read(reinterpret_cast<char*>(to), static_cast<std::streamsize>(count * sizeof(*to)));
    };
    ElfW(Ehdr) header;
    read(&header, 1, 0);
    std::vector<ElfW(Shdr)> sections(file ? header.e_shnum : 0);
    read(sections.data(), sections.size(), header.e_shoff);
    std::string names(file ? sections.at(header.e_shstrndx).sh_size : 0, '\0');
    read(names.data(), names.size(), sections.at(header.e_shstrndx).sh_offset);
    if (!file) throw std::runtime_error(std::string("cannot read ") + own.dli_fname);
    char* base = header.e_type == ET_DYN ? static_cast<char*>(own.dli_fbase) : nullptr;
    for (const auto& section : sections)
      if (std::strncmp(&names[section.sh_name], ".noinit", 7) == 0)
        ranges_.emplace_back(base + section.sh_addr, section.sh_size);
    known_ = true;
  }

  bool known_ = false;
  std::vector<std::pair<char*, size_t>> ranges_;
};

// Orders

struct Order {
  enum Kind { forward, reversed, random } kind = forward;
  uint64_t state = 1;

  // `forward`, `reversed`, `random` or `random:SEED`.
  static Order parse(const std::string& text) {
    if (text == "forward") return {forward, 1};
    if (text == "reversed") return {reversed, 1};
    if (text == "random") return {random, 1};
    if (text.rfind("random:", 0) == 0) return {random, std::stoull(text.substr(7)) + 1};
    throw std::invalid_argument("not an order: '" + text + "'");
  }

  uint64_t draw() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  // One of the set bits.
  int choose(uint32_t set) {
    if (kind == forward) return __builtin_ctz(set);
    if (kind == reversed) return 31 - __builtin_clz(set);
    const int by = draw() >> 59;
    return (__builtin_ctz(set >> by | set << (-by & 31)) + by) & 31;
  }

  std::vector<size_t> permutation(size_t count) {
    std::vector<size_t> result(count);
    std::iota(result.begin(), result.end(), 0);
    if (kind == reversed) std::reverse(result.begin(), result.end());
    if (kind == random)
      for (size_t i = count; i > 1; --i) std::swap(result[i - 1], result[draw() % i]);
    return result;
  }
};

// Execution

enum class Operation { none, syncthreads, syncwarp, ballot, shuffle4, shuffle8 };

inline const char* name_of(Operation operation) {
  constexpr const char* names[] = {"nothing",       "__syncthreads",    "__syncwarp",
                                   "__ballot_sync", "a 4-byte shuffle", "an 8-byte shuffle"};
  return names[static_cast<int>(operation)];
}

struct Warp {
  uint32_t ready, waiting;  // Lanes that can go on, and those that wait for others of the warp.
  Operation operation[warp_size];
  uint32_t mask[warp_size];
  int source[warp_size];
  uint64_t given[warp_size], received[warp_size];
};

// What a kernel is called with: the function object and how to call it.
struct Body {
  const void* object;
  void (*call)(const void*);
};

class Machine {
 public:
  Machine() {
    if (const char* text = std::getenv("FASTSN_EMULATOR_ORDER")) set_order(text);
  }

  // `BLOCKS,THREADS`, or one for both; see Order::parse.
  void set_order(const std::string& text) {
    const size_t comma = text.find(',');
    const Order blocks = Order::parse(text.substr(0, comma));
    thread_order_ = Order::parse(comma == std::string::npos ? text : text.substr(comma + 1));
    block_order_ = blocks;
  }

  // Runs a kernel; returns what it did wrong, or nothing.
  std::string launch(dim3 grid, dim3 block, size_t shared, const void* kernel, Body body) {
    gridDim = grid;
    blockDim = block;
    threads_ = static_cast<int>(block.x * block.y * block.z);
    for (int t = 0; t < threads_; ++t) thread_index_[t] = index_in(block, t);
    body_ = body;
    error_.clear();
    shared_size_ = shared;
    Observer::begin_launch(*this, kernel, size_t{grid.x} * grid.y * grid.z, threads_, shared);
    for (size_t index : block_order_.permutation(size_t{grid.x} * grid.y * grid.z)) {
      block_index_ = index;
      run_block();
      if (!error_.empty()) break;
    }
    return error_;
  }

  unsigned char* dynamic_shared() { return shared_; }

  // Where the threads keep what is not in global memory.
  std::pair<const void*, size_t> stacks() { return stacks_.range(); }
  std::vector<std::pair<char*, size_t>> shared_memory() {
    auto ranges = static_shared_.ranges();
    ranges.emplace_back(reinterpret_cast<char*>(shared_), shared_size_);
    return ranges;
  }

  int lane() const { return current_ % warp_size; }

  void syncthreads() {
    begin_wait(Operation::syncthreads);
    ++at_barrier_;
    yield();
  }

  // Waits for the lanes of `mask`; returns what lane `source` gave, or for a ballot all bits.
  uint64_t warp_operation(Operation operation, uint32_t mask, uint64_t given = 0, int source = 0) {
    Warp& warp = warps_[current_ / warp_size];
    const int lane = this->lane();
    if (!(mask >> lane & 1))
      fail(std::string(name_of(operation)) + " with a mask that leaves out the caller");
    begin_wait(operation);
    warp.waiting |= 1u << lane;
    warp.mask[lane] = mask;
    warp.source[lane] = source;
    warp.given[lane] = given;
    if ((warp.waiting & mask) == mask) finish(warp, operation, mask);
    yield();
    return warp.received[lane];
  }

  // Ends the launch. Called by a thread of the kernel.
  [[noreturn]] void fail(const std::string& what) {
    if (current_ == host) {
      std::fprintf(stderr, "CUDA emulator, outside of a kernel: %s\n", what.c_str());
      std::abort();
    }
    error_ = "block " + std::to_string(block_index_) + ", " + describe(current_) + ": " + what;
    yield();
    std::abort();  // Nobody comes back to this fiber.
  }

 private:
  static constexpr int host = max_threads;
  static constexpr size_t margin = 256;

  static uint3 index_in(dim3 size, size_t i) {
    return {
        static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
        static_cast<unsigned>(i / size.x / size.y)};
  }

  static std::string describe(int thread) { return "thread " + std::to_string(thread); }

  void run_block() {
    blockIdx = index_in(gridDim, block_index_);
    static_shared_.poison();
    std::memset(shared_, 0xFF, shared_size_ + margin);
    ready_warps_ = 0;
    at_barrier_ = returned_ = 0;
    for (int t = 0; t < threads_; ++t) {
      if (t % warp_size == 0) warps_[t / warp_size] = Warp{};
      begin(t);
      stacks_.prepare(contexts_[t], t, run_thread);
    }
    Observer::begin_block(block_index_);
    go(choose());
    Observer::end_block();
    const unsigned char* end = shared_ + shared_size_;
    if (error_.empty() && std::any_of(end, end + margin, [](auto byte) { return byte != 0xFF; }))
      error_ = "block " + std::to_string(block_index_) +
          ": a write behind the end of the dynamic shared memory";
  }

  static void run_thread();

  void run_kernel() {
    std::string exception;
    try {
      body_.call(body_.object);
    } catch (const std::exception& caught) {
      exception = caught.what();
    } catch (...) {
      exception = "not a std::exception";
    }
    if (!exception.empty()) fail("exception in a kernel: " + exception);
    begin_wait(Operation::none);
    ++returned_;
    yield();
  }

  void begin(int thread) {
    Warp& warp = warps_[thread / warp_size];
    warp.ready |= 1u << thread % warp_size;
    ready_warps_ |= 1u << thread / warp_size;
  }

  void begin_wait(Operation operation) {
    Warp& warp = warps_[current_ / warp_size];
    warp.operation[lane()] = operation;
    warp.ready &= ~(1u << lane());
    if (!warp.ready) ready_warps_ &= ~(1u << current_ / warp_size);
  }

  void finish(Warp& warp, Operation operation, uint32_t mask) {
    const int first = current_ - lane();
    uint32_t votes = 0;
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(mask >> lane & 1)) continue;
      votes |= static_cast<uint32_t>(warp.given[lane] != 0) << lane;
      if (warp.operation[lane] != operation || warp.mask[lane] != mask)
        fail(
            std::string(name_of(operation)) + " with mask " + hex(mask) + ", but " +
            waits(first + lane));
    }
    const int lanes = std::min(threads_ - first, warp_size);
    if (__builtin_popcount(mask) == lanes) Observer::meet(first / warp_size);
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(mask >> lane & 1)) continue;
      // What a lane outside of the mask would give is undefined.
      const int from = warp.source[lane];
      const uint64_t value = mask >> from & 1 ? warp.given[from] : ~uint64_t{0};
      warp.received[lane] = operation == Operation::ballot ? votes : value;
      begin(first + lane);
    }
    warp.waiting &= ~mask;
  }

  // The current thread waits or has returned: another one goes on.
  void yield() { go(choose()); }

  void go(int next) {
    const int last = current_;
    if (next == last) return;
    current_ = next;
    if (next != host) threadIdx = thread_index_[next];
    Observer::go_on(next == host ? -1 : next);
    exchange(contexts_[last], contexts_[next]);
  }

  int choose() {
    if (!error_.empty()) return host;
    if (!ready_warps_) {
      if (returned_ == threads_) return host;
      if (at_barrier_ != threads_) {
        error_ = "block " + std::to_string(block_index_) + ": threads wait forever; " + stuck();
        return host;
      }
      at_barrier_ = 0;
      Observer::barrier();
      for (int t = 0; t < threads_; ++t) begin(t);
    }
    // A warp goes on as far as it can; at random, others come between.
    const bool interrupt = thread_order_.kind == Order::random && thread_order_.draw() % 16 == 0;
    if (interrupt || !(ready_warps_ >> warp_ & 1)) warp_ = thread_order_.choose(ready_warps_);
    return warp_ * warp_size + thread_order_.choose(warps_[warp_].ready);
  }

  static std::string hex(uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", value);
    return text;
  }

  std::string waits(int thread) const {
    const Warp& warp = warps_[thread / warp_size];
    const int lane = thread % warp_size;
    const Operation operation = warp.operation[lane];
    if (operation == Operation::none) return describe(thread) + " has returned";
    const std::string where = describe(thread) + " waits in " + name_of(operation);
    return operation == Operation::syncthreads ? where
                                               : where + " with mask " + hex(warp.mask[lane]);
  }

  // The first thread of each kind: all threads have returned or wait.
  std::string stuck() const {
    std::map<Operation, std::string> kinds;
    for (int t = 0; t < threads_; ++t)
      kinds.emplace(warps_[t / warp_size].operation[t % warp_size], waits(t));
    std::string text = std::to_string(at_barrier_) + " of " + std::to_string(threads_) +
        " threads reached __syncthreads";
    for (const auto& [operation, example] : kinds) text += ", " + example;
    return text;
  }

  Order block_order_, thread_order_;
  Body body_{};
  uint3 thread_index_[max_threads];
  size_t block_index_ = 0, shared_size_ = 0;
  int threads_ = 0, at_barrier_ = 0, returned_ = 0;
  int current_ = host;
  int warp_ = 0;
  uint32_t ready_warps_ = 0;
  std::string error_;
  Warp warps_[max_warps];
  Context contexts_[max_threads + 1];
  Stacks stacks_;
  StaticShared static_shared_;
  alignas(128) unsigned char shared_[max_shared + margin];
};

inline Machine machine;

inline void Machine::run_thread() { machine.run_kernel(); }

}  // namespace cuda_emulator

// What `-fsanitize=alignment,bounds` calls, so that no library is needed and the launch fails.
namespace cuda_emulator {

struct Location {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] inline void fail_at(const Location* at, const char* what) {
  machine.fail(std::string(what) + " at " + at->file + ":" + std::to_string(at->line));
}

}  // namespace cuda_emulator

extern "C" {
__attribute__((used)) inline void __ubsan_handle_type_mismatch_v1(
    const cuda_emulator::Location* at, void*) {
  cuda_emulator::fail_at(at, "misaligned access");
}
__attribute__((used)) inline void __ubsan_handle_out_of_bounds(
    const cuda_emulator::Location* at, void*) {
  cuda_emulator::fail_at(at, "index out of bounds");
}
}

#pragma GCC visibility pop
