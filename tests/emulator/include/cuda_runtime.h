// The part of CUDA that the kernels use, for compilation as C++. See cuda_emulator.h.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>

#include "cuda_emulator.h"

#pragma GCC visibility push(hidden)

// Qualifiers

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// In a section of its own, which every block finds filled with NaN.
#define __shared__ static __attribute__((noinit))
#define FASTSN_DYNAMIC_SHARED(name) unsigned char* name = ::cuda_emulator::machine.dynamic_shared()

// Types

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int warpSize = cuda_emulator::warp_size;

// Synchronization

inline void __syncthreads() { cuda_emulator::machine.syncthreads(); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  cuda_emulator::machine.warp_operation(cuda_emulator::Operation::syncwarp, mask);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_emulator {

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const auto operation = sizeof(T) == 4 ? Operation::shuffle4 : Operation::shuffle8;
  uint64_t given = 0;
  std::memcpy(&given, &value, sizeof(T));
  const uint64_t received = machine.warp_operation(operation, mask, given, source);
  std::memcpy(&value, &received, sizeof(T));
  return value;
}

// The first lane of the caller's segment.
inline int segment(int width) {
  if (width < 1 || width > warp_size || (width & (width - 1)))
    machine.fail("a shuffle of width " + std::to_string(width));
  return machine.lane() & ~(width - 1);
}

}  // namespace cuda_emulator

// A source outside of the caller's segment means the caller itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int first = cuda_emulator::segment(width);
  return cuda_emulator::shuffle(mask, value, first + (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cuda_emulator::machine.lane(), source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle(
      mask, value, source < cuda_emulator::segment(width) ? lane : source);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cuda_emulator::machine.lane(), source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle(
      mask, value, source >= cuda_emulator::segment(width) + width ? lane : source);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const int lane = cuda_emulator::machine.lane(), source = lane ^ lane_mask;
  return cuda_emulator::shuffle(
      mask, value, source >= cuda_emulator::segment(width) + width ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(cuda_emulator::machine.warp_operation(
      cuda_emulator::Operation::ballot, mask, predicate != 0));
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

namespace cuda_emulator {

// One thread runs at a time. The observer sees one access instead of a load and a store: `noipa`,
// or the compiler would load in the caller.
template <typename T>
__attribute__((noipa, no_sanitize("thread"))) T exchange(T* p, T value) {
  Observer::atomic(p, sizeof(T), __builtin_return_address(0));
  const T before = *p;
  *p = value;
  return before;
}

template <typename T>
__attribute__((noipa, no_sanitize("thread"))) T peek(const T* p) {
  return *p;
}

}  // namespace cuda_emulator

// There is no atomicAdd of floats: its order would be left to chance.
inline int atomicAdd(int* p, int value) {
  return cuda_emulator::exchange(p, cuda_emulator::peek(p) + value);
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  return cuda_emulator::exchange(p, cuda_emulator::peek(p) + value);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned before = cuda_emulator::peek(p);
  return cuda_emulator::exchange(p, before >= limit ? 0 : before + 1);
}

[[noreturn]] inline void __trap() { cuda_emulator::machine.fail("__trap()"); }

// Memory

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  cuda_emulator::Observer::past_first_level();
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

// Arithmetic

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

namespace cuda_emulator {

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_emulator

inline unsigned __float_as_uint(float x) { return cuda_emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_emulator::bits<int>(x); }
inline float __int_as_float(int x) { return cuda_emulator::bits<float>(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Of a NaN and a number, the number.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}

template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

// Errors

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
};

namespace cuda_emulator {

inline std::mutex one_launch;
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local std::string failure;  // Of the kernel that failed last.
inline cudaError_t injected = cudaSuccess;
inline size_t launches = 0;
inline std::unordered_map<const void*, size_t> shared_limits;

// Kernels whose code is on the device: it comes there when it is first asked for, which needs
// memory, and that is refused while a stream is being captured, unless the mode of the thread
// allows it.
inline std::unordered_set<const void*> loaded;
inline bool captures = false;
inline int instructions = 90;         // kernels were compiled from those of this compute capability
inline unsigned last_attributes = 0;  // that the last launch had

// The next launch returns `error` and does nothing.
inline void fail_next_launch(cudaError_t error) { injected = error; }

// Kernels that were started since the program began.
inline size_t launch_count() { return launches; }

inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_emulator

inline cudaError_t cudaPeekAtLastError() { return cuda_emulator::last_error; }
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emulator::last_error, cudaSuccess);
}

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
  }
  return "unrecognized error code";
}

// For a failed kernel this says more than CUDA would: what it did wrong.
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return cuda_emulator::failure.empty() ? "unspecified launch failure"
                                            : cuda_emulator::failure.c_str();
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

// Launches

using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  char pad[64];
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};

namespace cuda_emulator {

inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

inline cudaError_t load(const void* kernel) {
  if (loaded.count(kernel) == 0 && captures && capture_mode != cudaStreamCaptureModeRelaxed)
    return cudaErrorStreamCaptureUnsupported;
  loaded.insert(kernel);
  return cudaSuccess;
}

}  // namespace cuda_emulator

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = std::exchange(cuda_emulator::capture_mode, *mode);
  return cudaSuccess;
}

// A launch ends before the next one starts.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

namespace cuda_emulator {

inline cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  if (grid.x < 1 || grid.x > 0x7FFFFFFF || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535 || threads < 1 || threads > max_threads || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config.numAttrs && !config.attrs) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto id = config.attrs[i].id;
    if (id != cudaLaunchAttributeIgnore && id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return cudaErrorNotSupported;
  }
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? default_shared : limit->second))
    return cudaErrorInvalidValue;
  last_attributes = config.numAttrs;
  if (const cudaError_t error = load(kernel)) return error;
  return std::exchange(injected, cudaSuccess);
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body body) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (const cudaError_t error = check(config, kernel)) return record(error);
  ++launches;
  failure = machine.launch(config.gridDim, config.blockDim, config.dynamicSmemBytes, kernel, body);
  return record(failure.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace cuda_emulator

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(
    void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  using namespace cuda_emulator;
  std::lock_guard<std::mutex> lock(one_launch);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > max_shared) return record(cudaErrorInvalidValue);
  shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  using namespace cuda_emulator;
  std::lock_guard<std::mutex> lock(one_launch);
  if (!kernel) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t error = load(reinterpret_cast<const void*>(kernel))) return record(error);
  attributes->ptxVersion = attributes->binaryVersion = instructions;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((size_t{0} + ... + sizeof(Parameters)) <= cuda_emulator::max_parameters);
  auto launch = [&](Parameters... copies) {
    auto call = [&] { kernel(copies...); };
    const cuda_emulator::Body body{
        &call, [](const void* object) { (*static_cast<const decltype(call)*>(object))(); }};
    return cuda_emulator::launch(*config, reinterpret_cast<const void*>(kernel), body);
  };
  return launch(std::forward<Arguments>(arguments)...);
}

#pragma GCC visibility pop
