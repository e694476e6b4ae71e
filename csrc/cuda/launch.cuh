#pragma once

#include "device.cuh"

#include <atomic>
#include <cstdlib>
#include <cstring>

// Host side: starts a kernel for any number of items, in batches of as many as a parameter holds.
namespace fastsn::cuda {

constexpr int kSmallParameter = 4096 - 256;   // what every GPU and driver takes
constexpr int kLargeParameter = 32764 - 256;  // from Volta on; costs time to copy

template <typename Item>
constexpr bool fits_small(int64_t count) {
  return count <= Batch<Item, kSmallParameter>::kCapacity;
}

struct Launch {
  int device;
  cudaStream_t stream;
  int threads;
  int shared_bytes;
};

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
cudaError_t allow_shared(const Launch& launch) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (launch.device % 64);
  if (launch.shared_bytes <= 48 * 1024 || (done.load() & bit) != 0) {
    return cudaSuccess;
  }
  const auto status = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (status == cudaSuccess) {
    done.fetch_or(bit);
  }
  return status;
}

// kKernel(batch, arguments...) for items[0 .. count), where item k needs blocks_of(items[k])
// blocks.
template <auto kKernel, int kBytes, typename Item, typename BlocksOf, typename... Arguments>
cudaError_t launch_batches(
    const Launch& launch, const Item* items, int64_t count, const BlocksOf& blocks_of,
    const Arguments&... arguments) {
  auto status = allow_shared<kKernel>(launch);
  Batch<Item, kBytes> batch;
  for (int64_t begin = 0; begin < count && status == cudaSuccess;) {
    batch.count = 0;
    int64_t blocks = 0;
    for (; begin < count && batch.count < batch.kCapacity; ++begin) {
      const int64_t own = blocks_of(items[begin]);
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
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlaps_launches() ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kKernel, batch, arguments...);
  }
  return status;
}

inline const char* message_of(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace fastsn::cuda
