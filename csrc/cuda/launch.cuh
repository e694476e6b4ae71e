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

// Raises the limit of dynamic shared memory once per kernel and device.
template <auto kKernel>
cudaError_t allow_shared(int device, int bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (bytes <= 48 * 1024 || (done.load() & bit) != 0) {
    return cudaSuccess;
  }
  const auto status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) {
    done.fetch_or(bit);
  }
  return status;
}

// kernel(arguments...) by so many blocks of `threads` threads with `shared` bytes of dynamic
// memory.
template <typename... Parameters, typename... Arguments>
cudaError_t start(
    Where where, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
    const Arguments&... arguments) {
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
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
  config.numAttrs = overlaps_launches() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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
  auto status = allow_shared<kKernel>(where.device, Kernel::kShared);
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
    status = start(where, kKernel, blocks, Kernel::kBlock, Kernel::kShared, batch, arguments...);
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
