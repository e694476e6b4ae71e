#pragma once

#include "device.cuh"
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

// Host side: starts a kernel for any number of items, in batches of as many as a parameter holds.
namespace fastsn::cuda {

constexpr int kSmallParameter = 4096 - 256;   // what every GPU and driver takes
constexpr int kLargeParameter = 32764 - 256;  // from Volta on; costs time to copy

// Whether a kernel may be brought onto the device while the one before it ends (programmatic
// dependent launch). Off unless FASTSN_CUDA_PDL=1: for measurements, see benchmarks/NOTES.md.
inline bool overlaps_launches() {
  static const bool wanted = [] {
    const char* const value = std::getenv("FASTSN_CUDA_PDL");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return wanted;
}

// What a launch needs to know of a kernel on a device.
struct Prepared {
  cudaError_t status;
  bool waits;  // for the launch before it, see wait_for_inputs
};

// Before a kernel's first launch on a device: brings its code there, and lets it have `shared`
// bytes of dynamic shared memory. Code that is brought by a launch itself would make that fail
// where a graph is captured, as memory is allocated for it; the mode of this thread allows that.
template <auto kKernel>
Prepared prepare(int device, int shared) {
  static std::atomic<uint64_t> done{0};
  static std::atomic<uint64_t> waiting{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((done.load() & bit) == 0) {
    auto mode = cudaStreamCaptureModeRelaxed;
    auto status = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) {
      return {status, false};
    }
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kKernel);
    if (status == cudaSuccess && shared > 48 * 1024) {
      status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) {
      return {status, false};
    }
    // Compiled from older instructions, also by the driver for a newer device, a kernel cannot
    // wait.
    if (attributes.ptxVersion >= 90) {
      waiting.fetch_or(bit);
    }
    done.fetch_or(bit);
  }
  return {cudaSuccess, (waiting.load() & bit) != 0};
}

// kKernel(arguments...) by so many blocks of `threads` threads with `shared` bytes of dynamic
// memory.
template <auto kKernel, typename... Arguments>
cudaError_t start(
    Where where, int64_t blocks, int threads, int shared, const Arguments&... arguments) {
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const auto prepared = prepare<kKernel>(where.device, shared);
  if (prepared.status != cudaSuccess) {
    return prepared.status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlaps_launches() && prepared.waits ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

inline const char* message(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Kernel::kernel<kBytes>(batch, arguments...) for items[0 .. count), each an Item that needs
// Kernel::blocks(item) blocks of kBlock threads with kShared bytes of dynamic shared memory.
template <typename Kernel, int kBytes, typename... Arguments>
cudaError_t launch_batches(
    Where where, const typename Kernel::Item* items, int64_t count, const Arguments&... arguments) {
  constexpr auto kKernel = Kernel::template kernel<kBytes>;
  auto status = cudaSuccess;
  Batch<typename Kernel::Item, kBytes> batch;
  for (int64_t begin = 0; begin < count && status == cudaSuccess;) {
    batch.count = 0;
    int64_t blocks = 0;
    for (; begin < count && batch.count < batch.kCapacity; ++begin) {
      const int64_t own = Kernel::blocks(items[begin]);
      if (own == 0) {
        continue;
      }
      if (blocks + own > INT32_MAX) {
        break;
      }
      batch.items[batch.count] = items[begin];
      batch.first_block[batch.count++] = static_cast<int32_t>(blocks);
      blocks += own;
    }
    if (batch.count == 0) {
      // Nothing left, or one item with more blocks than a grid can have.
      return begin < count ? cudaErrorInvalidConfiguration : cudaSuccess;
    }
    batch.first_block[batch.count] = static_cast<int32_t>(blocks);
    status = start<kKernel>(where, blocks, Kernel::kBlock, Kernel::kShared, batch, arguments...);
  }
  return status;
}

// With the smallest parameter that holds all items; null, or an error message.
template <typename Kernel, typename... Arguments>
const char* launch(
    Where where, const typename Kernel::Item* items, int64_t count, const Arguments&... arguments) {
  const bool is_small = count <= Batch<typename Kernel::Item, kSmallParameter>::kCapacity;
  const auto status = is_small
      ? launch_batches<Kernel, kSmallParameter>(where, items, count, arguments...)
      : launch_batches<Kernel, kLargeParameter>(where, items, count, arguments...);
  return message(status);
}

// body(a value of this type).
template <typename Body>
const char* with_type(Type type, const Body& body) {
  switch (type) {
    case Type::kFloat:
      return body(float{});
    case Type::kDouble:
      return body(double{});
    case Type::kBFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(__half{});
  }
}

}  // namespace fastsn::cuda
