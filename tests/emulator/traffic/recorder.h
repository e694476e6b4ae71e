// What an emulator that records memory accesses tells the recorder, a library of its own: the
// callbacks of -fsanitize=thread must not be compiled with it.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)

extern "C" {

struct TrafficRange {
  const void* begin;
  size_t size;
};

// A launch that begins, and where its threads keep what is not in global memory.
struct TrafficLaunch {
  const void* kernel;
  size_t blocks;
  int threads;
  size_t dynamic_shared;
  TrafficRange stacks;
  const TrafficRange* shared;
  size_t shared_count;
};

// The thread whose accesses follow, or -1: nobody's.
extern int traffic_thread;
// Whether the next load from global memory goes past the first-level cache.
extern int traffic_past_first_level;

void traffic_begin_launch(const TrafficLaunch* launch);
void traffic_begin_block(size_t index);
// All lanes of a warp are at the same place.
void traffic_meet(int warp);
// All threads of the block are.
void traffic_barrier();
void traffic_end_block();
void traffic_atomic(const void* address, size_t size, const void* instruction);
}

#pragma GCC visibility pop
