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

  // u or v before this round.
  __device__ __forceinline__ const Acc* before(const Vector& vector) const {
    return first_round ? static_cast<const Acc*>(vector.live) : snapshot + vector.snapshot;
  }
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

}  // namespace fastsn::cuda
