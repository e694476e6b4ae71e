// Kernels that test the emulator itself, behind functions for ctypes; see ../test_emulator.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../csrc/cuda/launch.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

// With external linkage, unlike all else: the linker keeps what is shared elsewhere.
namespace fastsn_selftest {

template <typename T>
__device__ T exchange_shared(T value) {
  __shared__ T kept;
  __syncthreads();
  const T before = kept;
  __syncthreads();
  kept = value;
  return before;
}

}  // namespace fastsn_selftest

namespace {

struct Options {
  unsigned grid = 1, block = 64;
  size_t shared = 0;
};

template <typename... Parameters, typename... Arguments>
cudaError_t start(const Options& options, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(options.grid);
  config.blockDim = dim3(options.block);
  config.dynamicSmemBytes = options.shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T>
__device__ T block_sum(T x) {
  __shared__ T sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < warps; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// out[block] = the sum of its threads' numbers.
__global__ void __launch_bounds__(1024) sum_kernel(const float* in, float* out) {
  const float sum = block_sum(__ldg(in + blockIdx.x * blockDim.x + threadIdx.x));
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The last block to arrive adds up what all have left, in a fixed order.
__global__ void ticket_kernel(float* partial, unsigned* ticket, float* out) {
  __shared__ bool last;
  const float sum = block_sum(static_cast<float>(blockIdx.x * blockDim.x + threadIdx.x));
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(partial + b);
  if (threadIdx.x == 0) *out = total;
}

// Every thread passes a number to the next one; `barrier`: none, a warp's, a block's.
__global__ void neighbour_kernel(int barrier, int* out) {
  FASTSN_DYNAMIC_SHARED(memory);
  int* const shared = reinterpret_cast<int*>(memory);
  shared[threadIdx.x] = threadIdx.x;
  if (barrier == 1) __syncwarp();
  if (barrier == 2) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void block_order_kernel(int* count, int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(count, 1);
}

// What shared memory holds when a block starts.
__global__ void fresh_kernel(unsigned* out) {
  __shared__ unsigned fixed;
  __align__(16) __shared__ float also_fixed[4];
  FASTSN_DYNAMIC_SHARED(memory);
  unsigned* const dynamic = reinterpret_cast<unsigned*>(memory);
  unsigned seen = fixed & __float_as_uint(also_fixed[3]) & dynamic[0] & dynamic[99];
  seen &= fastsn_selftest::exchange_shared(0u);
  seen = __all_sync(~0u, seen == ~0u) ? ~0u : 0;
  __syncthreads();
  fixed = also_fixed[3] = dynamic[0] = dynamic[99] = 0;
  out[blockIdx.x * blockDim.x + threadIdx.x] = seen;
}

template <typename T>
__global__ void shuffle_kernel(int operation, int argument, int width, T* out) {
  const T x = static_cast<T>(threadIdx.x);
  T& result = out[threadIdx.x];
  switch (operation) {
    case 0:
      result = __shfl_sync(~0u, x, argument, width);
      break;
    case 1:
      result = __shfl_up_sync(~0u, x, argument, width);
      break;
    case 2:
      result = __shfl_down_sync(~0u, x, argument, width);
      break;
    case 3:
      result = __shfl_xor_sync(~0u, x, argument, width);
      break;
    // Both halves of a warp, each for itself.
    case 4:
      if (threadIdx.x % 32 < 16)
        result = __shfl_xor_sync(0xFFFFu, x, argument, 16);
      else
        result = __shfl_sync(0xFFFF0000u, x, 16 + argument);
      break;
    case 5:
      result = static_cast<T>(__ballot_sync(~0u, threadIdx.x % argument == 0));
      break;
  }
}

enum Mistake {
  return_before_barrier,
  skip_barrier,
  return_before_shuffle,
  different_masks,
  different_operations,
  barrier_against_shuffle,
  mask_without_caller,
  bad_width,
  beyond_dynamic_shared,
  beyond_array,
  misaligned,
  exception,
  trap,
};

__global__ void mistake_kernel(int mistake, float* memory) {
  __shared__ int shared[64];
  const unsigned t = threadIdx.x;
  switch (mistake) {
    case return_before_barrier:
      if (t == 5) return;
      __syncthreads();
      break;
    case skip_barrier:
      if (t < 32) __syncthreads();
      __syncwarp();
      break;
    case return_before_shuffle:
      if (t == 5) return;
      __shfl_xor_sync(~0u, t, 1);
      break;
    case different_masks:
      __shfl_xor_sync(t % 32 < 16 ? ~0u : 0xFFFF0000u, t, 1);
      break;
    case different_operations:
      t == 5 ? __ballot_sync(~0u, 1) : __shfl_xor_sync(~0u, t, 1);
      break;
    case barrier_against_shuffle:
      t == 5 ? __syncthreads() : __syncwarp();
      break;
    case mask_without_caller:
      __syncwarp(0xFFFF0000u);
      break;
    case bad_width:
      __shfl_xor_sync(~0u, t, 1, 12);
      break;
    case beyond_dynamic_shared: {
      FASTSN_DYNAMIC_SHARED(dynamic);
      dynamic[16] = 0;
      break;
    }
    case beyond_array:
      shared[t + blockDim.x] = 0;
      memory[8] = shared[t];
      break;
    case misaligned:
      memory[8] = __ldg(reinterpret_cast<const float4*>(memory + 1)).x;
      break;
    case exception:
      throw std::runtime_error("from a kernel");
    case trap:
      __trap();
  }
}

__global__ void empty_kernel() {}

__global__ void by_value_kernel(Options own, unsigned* out) {
  own.block += threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = own.block;
}

__global__ void work_kernel(int barriers, int shuffles, float* out) {
  float x = threadIdx.x;
  for (int b = 0; b < barriers; ++b) {
    for (int s = 0; s < shuffles; ++s) x = 0.5f * (x + __shfl_xor_sync(~0u, x, 1 << s % 5));
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

template <typename T, T (*kConvert)(float)>
void convert_all(const float* from, T* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = kConvert(from[i]);
}

}  // namespace

EXPORT const char* error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
EXPORT const char* error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
EXPORT int last_error() { return cudaGetLastError(); }
EXPORT int peek_last_error() { return cudaPeekAtLastError(); }
EXPORT void fail_next_launch(int error) {
  cuda_emulator::fail_next_launch(static_cast<cudaError_t>(error));
}
EXPORT size_t launch_count() { return cuda_emulator::launch_count(); }
EXPORT int set_order(const char* text) {
  try {
    cuda_emulator::machine.set_order(text);
  } catch (const std::invalid_argument&) {
    return 1;
  }
  return 0;
}

EXPORT int sums(unsigned grid, unsigned block, const float* in, float* out) {
  return start({grid, block}, sum_kernel, in, out);
}
EXPORT int ticket(unsigned grid, float* partial, unsigned* ticket, float* out) {
  return start({grid}, ticket_kernel, partial, ticket, out);
}
EXPORT int neighbour(int barrier, unsigned block, int* out) {
  return start({1, block, block * sizeof(int)}, neighbour_kernel, barrier, out);
}
EXPORT int block_order(unsigned grid, int* out) {
  int count = 0;
  return start({grid}, block_order_kernel, &count, out);
}
EXPORT int fresh(unsigned grid, unsigned* out) { return start({grid, 64, 400}, fresh_kernel, out); }
EXPORT int shuffle_float(int operation, int argument, int width, float* out) {
  return start({}, shuffle_kernel<float>, operation, argument, width, out);
}
EXPORT int shuffle_double(int operation, int argument, int width, double* out) {
  return start({}, shuffle_kernel<double>, operation, argument, width, out);
}
EXPORT int make_mistake(int mistake, float* memory) {
  return start({2, 64, 16}, mistake_kernel, mistake, memory);
}
EXPORT int by_value(unsigned* out) { return start({}, by_value_kernel, Options{1, 100}, out); }
EXPORT int work(unsigned grid, unsigned block, int barriers, int shuffles, float* out) {
  return start({grid, block}, work_kernel, barriers, shuffles, out);
}
EXPORT int empty(unsigned grid, unsigned block, size_t shared) {
  return start({grid, block, shared}, empty_kernel);
}

// The same for what the project launches: on a device that has not had the kernel yet, of code from
// instructions of this compute capability, perhaps while a stream is captured.
EXPORT int start_prepared(int device, int instructions, int captures, int shared) {
  cuda_emulator::loaded.clear();
  cuda_emulator::instructions = instructions;
  cuda_emulator::captures = captures;
  const int result = fastsn::cuda::start<empty_kernel>({device, nullptr}, 1, 32, shared);
  cuda_emulator::captures = false;
  return result;
}
EXPORT int start_unprepared(int captures) {
  cuda_emulator::loaded.clear();
  cuda_emulator::captures = captures;
  const int result = empty(1, 32, 0);
  cuda_emulator::captures = false;
  return result;
}
EXPORT int capture_mode() { return cuda_emulator::capture_mode; }
EXPORT int last_attributes() { return cuda_emulator::last_attributes; }
EXPORT int raise_limit(int bytes) {
  return cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

EXPORT void to_bfloat16(const float* from, __nv_bfloat16* to, size_t count) {
  convert_all<__nv_bfloat16, __float2bfloat16_rn>(from, to, count);
}
EXPORT void to_half(const float* from, __half* to, size_t count) {
  convert_all<__half, __float2half_rn>(from, to, count);
}
EXPORT void from_bfloat16(const __nv_bfloat16* from, float* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = __bfloat162float(from[i]);
}
EXPORT void from_half(const __half* from, float* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = __half2float(from[i]);
}
