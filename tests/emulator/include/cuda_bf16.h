// bfloat16 for the emulator: conversions round to the nearest, ties to even, as on the device.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct alignas(2) __nv_bfloat16 {
  unsigned short __x;
  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : __x(raw.x) {}
  __nv_bfloat16(float value);
  operator float() const { return cuda_emulator::bits<float>(static_cast<unsigned>(__x) << 16); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }

inline float __bfloat162float(__nv_bfloat16 x) { return x; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned x = cuda_emulator::bits<unsigned>(value);
  if ((x & 0x7FFFFFFF) > 0x7F800000) return __ushort_as_bfloat16(0x7FFF);
  // The carry may go up to infinity, as it must.
  return __ushort_as_bfloat16(static_cast<unsigned short>((x + 0x7FFF + (x >> 16 & 1)) >> 16));
}

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16::__nv_bfloat16(float value) : __nv_bfloat16(__float2bfloat16_rn(value)) {}

inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline float __low2float(__nv_bfloat162 x) { return x.x; }
inline float __high2float(__nv_bfloat162 x) { return x.y; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
