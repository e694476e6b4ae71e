// Kernels whose memory accesses are known, behind functions for ctypes; see ../../test_traffic.py.
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct alignas(16) Pack {
  float e[4];
};

struct Numbers {
  int values[100];
};

template <typename... Parameters, typename... Arguments>
int start(
    unsigned grid, unsigned block, size_t shared, void (*kernel)(Parameters...),
    Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// As the kernels do it: through a type that is loaded at once, then element by element.
__global__ void packs_kernel(const float* in, float* out) {
  Pack pack;
  *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(in) + index());
  Pack doubled;
  for (int c = 0; c < 4; ++c) doubled.e[c] = 2 * pack.e[c];
  *reinterpret_cast<uint4*>(out + 4 * index()) = *reinterpret_cast<const uint4*>(&doubled);
}

__global__ void structs_kernel(const float4* in, float4* out) {
  const float4 x = in[index()];
  out[index()] = make_float4(x.w, x.z, x.y, x.x + 1);
}

__global__ void halves_kernel(const uint2* in, uint2* out) { out[index()] = __ldg(in + index()); }

// out[t * to] = in[t * from + first] by the first `threads` threads.
__global__ void strided_kernel(
    const float* in, int from, int first, int threads, float* out, int to) {
  if (index() < threads) out[index() * to] = __ldg(in + index() * from + first);
}

// Four numbers a thread, one after the other.
__global__ void scalars_kernel(const float* in, float* out) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) out[4 * index() + c] = __ldg(in + 4 * index() + c);
}

// Twice: threads 0, 2, 4, ... load two numbers, all others one, and they meet.
__global__ void diverging_kernel(const float* in, float* out) {
  float sum = 0;
  for (int part = 0; part < 2; ++part) {
    for (int k = 0; k < (threadIdx.x % 2 == 0 ? 2 : 1); ++k)
      sum += __ldg(in + 1024 * (2 * part + k) + threadIdx.x);
    __syncwarp();
  }
  out[index()] = sum;
}

__global__ void count_kernel(unsigned* counter, int* added) {
  atomicInc(counter, 1000);
  atomicAdd(added, 2);
}

// Every block goes over all of `in`, `rounds` times.
__global__ void stream_kernel(const float4* in, int count, int rounds, float* out) {
  float sum = 0;
  for (int round = 0; round < rounds; ++round)
    for (int k = threadIdx.x; k < count; k += blockDim.x) sum += __ldg(in + k).x;
  out[index()] = sum;
}

__global__ void twice_kernel(const float* in, bool past_first_level, float* out) {
  const float before = __ldg(in + index());
  __syncthreads();
  out[index()] = before + (past_first_level ? __ldcg(in + index()) : __ldg(in + index()));
}

// A local array and a parameter that the compiler has to index.
__global__ void private_kernel(Numbers numbers, int step, int* out) {
  int local[64];
  for (int k = 0; k < 64; ++k) local[k * step % 64] = numbers.values[(k + threadIdx.x) % 100];
  if (local[threadIdx.x % 64] == -1) *out = 1;
}

// Thread t uses word t * stride, as packs or alone, of dynamic or static memory.
__global__ void shared_kernel(int stride, bool as_packs, float* out) {
  FASTSN_DYNAMIC_SHARED(memory);
  float* const words = reinterpret_cast<float*>(memory);
  if (as_packs) {
    const Pack pack = *reinterpret_cast<const Pack*>(words + threadIdx.x * stride);
    out[index()] = pack.e[0] + pack.e[3];
  } else {
    out[index()] = words[threadIdx.x * stride];
  }
}

__global__ void static_kernel(float* out) {
  __shared__ float columns[32][32];
  columns[threadIdx.x][0] = 1;
  __syncthreads();
  out[index()] = columns[0][threadIdx.x];
}

// Two phases: three packs and one number, then one number, by the first warp one more.
__global__ void phases_kernel(const float4* packs, const float* numbers, float* out) {
  float sum = __ldg(numbers);
  for (int k = 0; k < 3; ++k) sum += __ldg(packs + k * blockDim.x + threadIdx.x).x;
  __syncthreads();
  sum += __ldg(numbers + threadIdx.x);
  if (threadIdx.x < 32) sum += __ldg(numbers + threadIdx.x + 32);
  out[threadIdx.x] = sum;
}

}  // namespace

EXPORT int packs(unsigned grid, const float* in, float* out) {
  return start(grid, 64, 0, packs_kernel, in, out);
}
EXPORT int structs(unsigned grid, const float4* in, float4* out) {
  return start(grid, 64, 0, structs_kernel, in, out);
}
EXPORT int halves(unsigned grid, const uint2* in, uint2* out) {
  return start(grid, 64, 0, halves_kernel, in, out);
}
EXPORT int strided(
    unsigned grid, const float* in, int from, int first, int threads, float* out, int to) {
  return start(grid, 64, 0, strided_kernel, in, from, first, threads, out, to);
}
EXPORT int scalars(unsigned grid, const float* in, float* out) {
  return start(grid, 64, 0, scalars_kernel, in, out);
}
EXPORT int diverging(const float* in, float* out) {
  return start(1, 64, 0, diverging_kernel, in, out);
}
EXPORT int count(unsigned* counter, int* added) {
  return start(2, 64, 0, count_kernel, counter, added);
}
EXPORT int stream(unsigned grid, const float4* in, int count, int rounds, float* out) {
  return start(grid, 64, 0, stream_kernel, in, count, rounds, out);
}
EXPORT int twice(const float* in, int past_first_level, float* out) {
  return start(1, 64, 0, twice_kernel, in, past_first_level != 0, out);
}
EXPORT int private_memory(int* out) { return start(1, 64, 0, private_kernel, Numbers{}, 5, out); }
EXPORT int shared(int stride, int as_packs, float* out) {
  return start(1, 32, 16384, shared_kernel, stride, as_packs != 0, out);
}
EXPORT int static_shared(float* out) { return start(1, 32, 0, static_kernel, out); }
EXPORT int phases(const float4* packs, const float* numbers, float* out) {
  return start(1, 64, 0, phases_kernel, packs, numbers, out);
}
