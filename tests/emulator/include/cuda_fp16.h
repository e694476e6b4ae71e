// float16 for the emulator: conversions round to the nearest, ties to even, as on the device.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short __x;
  __half() = default;
  __half(__half_raw raw) : __x(raw.x) {}
  __half(float value);
  operator float() const {
    const unsigned sign = static_cast<unsigned>(__x & 0x8000) << 16;
    const unsigned exponent = __x >> 10 & 31, fraction = __x & 0x3FF;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    const unsigned wide = exponent == 31 ? 255 : exponent + (127 - 15);
    return cuda_emulator::bits<float>(sign | wide << 23 | fraction << 13);
  }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
inline unsigned short __half_as_ushort(__half x) { return x.__x; }

inline float __half2float(__half x) { return x; }

inline __half __float2half_rn(float value) {
  const unsigned x = cuda_emulator::bits<unsigned>(value), magnitude = x & 0x7FFFFFFF;
  unsigned result;
  if (magnitude > 0x7F800000) return __ushort_as_half(0x7FFF);
  if (magnitude >= 0x47800000)  // 2^16 and more
    result = 0x7C00;
  else if (magnitude < 0x38800000)  // Less than 2^-14: subnormal, a multiple of 2^-24.
    result = static_cast<unsigned>(std::nearbyint(std::fabs(value) * 0x1p24f));
  else  // The carry may go up to infinity, as it must.
    result = (magnitude - ((127u - 15) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  return __ushort_as_half(static_cast<unsigned short>((x >> 16 & 0x8000) | result));
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half::__half(float value) : __half(__float2half_rn(value)) {}

inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
