#pragma once

#include "items.h"
#include "patches.h"

// The kernels, behind functions that neither need torch's headers nor CUDA's. All run on `stream`
// (a cudaStream_t) of `device`, which must be the current one, and return null or an error message.
namespace fastsn::cuda {

struct Where {
  int device;
  void* stream;
};

// Constants of a power iteration. `snapshot` and `workspace` hold elements of the accumulate type.
struct PowerCall {
  void* snapshot;
  void* workspace;
  int* tickets;
  double eps;
  bool first_round;  // vectors are read from where the caller keeps them, later from the snapshot
  bool zero_guard;
};

// Before phase A: unit vectors along u and v of what does not iterate, into the snapshot.
const char* rest(
    Where where, bool is_double, const RestItem* items, int64_t count, const PowerCall& call);

// Phase A: `first` of every item, and a summand of `second` for each of its tiles.
const char* multiply(
    Where where, Type weights, const PowerItem* items, int64_t count, const PowerCall& call);

// Phase B: adds the summands, normalizes, writes u, v and sigma.
const char* finish(
    Where where, bool is_double, const PowerItem* items, int64_t count, const PowerCall& call);

struct ScaleCall {
  const void* snapshot;
  void* workspace;  // of the accumulate type; for the backward
  bool bound;
  bool zero_guard;
};

// Phase C: scale / sigma * W.
const char* scale(
    Where where, Type weights, Type out, const ScaleItem* items, int64_t count,
    const ScaleCall& call);

// Phase D: the partial sums of <G, W>.
const char* product(
    Where where, Type weights, Type grads, const BackwardItem* items, int64_t count,
    const ScaleCall& call);

// Phase E: the gradients.
const char* gradient(
    Where where, Type weights, Type grads, const BackwardItem* items, int64_t count,
    const ScaleCall& call);

// The mean patch of a convolution's input: sums, and where there are several of each result their
// sum.
const char* patch_sums(Where where, Type input, const PatchItem& item);
const char* add_partial_sums(Where where, bool is_double, const PartialItem& item);

// Its gradient with respect to a sample.
const char* patch_backward(Where where, Type out, const PatchBackwardItem& item);

// The mean of a convolution's output, and the bias that takes it away.
const char* mean_bias(Where where, Type weight, const BiasItem& item);

}  // namespace fastsn::cuda
