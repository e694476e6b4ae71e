#pragma once

#include "device.cuh"
#include "kernels.h"

// What both phases of a power iteration share: its constants, and how u and v are read.
namespace fastsn::cuda {

template <typename Acc>
struct Power {
  Acc* snapshot;
  Acc* workspace;
  int* tickets;
  Acc eps;
  bool first_round;
  bool zero_guard;
};

template <typename Acc>
Power<Acc> typed(const PowerCall& call) {
  return {
      static_cast<Acc*>(call.snapshot),
      static_cast<Acc*>(call.workspace),
      call.tickets,
      static_cast<Acc>(call.eps),
      call.first_round,
      call.zero_guard};
}

template <typename Acc>
__device__ __forceinline__ Acc read_live(const Vector& vector, int at) {
  return read_as<Acc>(vector.live, vector.type, at);
}

template <typename Acc>
__device__ __forceinline__ void write_live(const Vector& vector, int at, Acc value) {
  switch (vector.type) {
    case Type::kFloat:
      static_cast<float*>(vector.live)[at] = static_cast<float>(value);
      break;
    case Type::kDouble:
      static_cast<double*>(vector.live)[at] = static_cast<double>(value);
      break;
    case Type::kBFloat16:
      narrow(static_cast<float>(value), static_cast<__nv_bfloat16*>(vector.live)[at]);
      break;
    default:
      narrow(static_cast<float>(value), static_cast<__half*>(vector.live)[at]);
  }
}

// u or v before this round.
template <typename Acc>
__device__ __forceinline__ Acc read_vector(const Power<Acc>& call, const Vector& vector, int at) {
  return call.first_round ? read_live<Acc>(vector, at) : call.snapshot[vector.snapshot + at];
}

}  // namespace fastsn::cuda
