// The observer of a build that records accesses; see cuda_emulator.h.
#pragma once

#include "recorder.h"

#include <vector>

namespace cuda_emulator {

struct Observer {
  template <typename Machine>
  static void begin_launch(
      Machine& machine, const void* kernel, size_t blocks, int threads, size_t dynamic_shared) {
    std::vector<TrafficRange> shared;
    for (const auto& [begin, size] : machine.shared_memory()) shared.push_back({begin, size});
    const auto [stacks, stacks_size] = machine.stacks();
    const TrafficLaunch launch{
        kernel,        blocks,       threads, dynamic_shared, {stacks, stacks_size},
        shared.data(), shared.size()};
    traffic_begin_launch(&launch);
  }
  static void begin_block(size_t index) { traffic_begin_block(index); }
  static void end_block() { traffic_end_block(); }
  static void go_on(int thread) { traffic_thread = thread; }
  static void meet(int warp) { traffic_meet(warp); }
  static void barrier() { traffic_barrier(); }
  static void past_first_level() { traffic_past_first_level = 1; }
  static void atomic(const void* address, size_t size, const void* instruction) {
    traffic_atomic(address, size, instruction);
  }
};

}  // namespace cuda_emulator
