#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace fastsn {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// FASTSN_CPU_CAPABILITY caps the choice, so that every version can be tested on one machine.
Isa best_isa() {
#if defined(__x86_64__)
  const char* const cap = std::getenv("FASTSN_CPU_CAPABILITY");
  const auto capped_at = [&](const char* name) { return cap && std::strcmp(cap, name) == 0; };
  if (capped_at("baseline")) {
    return Isa::kBaseline;
  }
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && !capped_at("avx2") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (has_avx2) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

const Isa kIsa = best_isa();

}  // namespace

template <>
const Kernels<float>& kernels<float>(c10::ScalarType weight_type) {
#if defined(__x86_64__)
  if (kIsa == Isa::kAvx512) {
    return avx512::float_kernels(weight_type);
  }
  if (kIsa == Isa::kAvx2) {
    return avx2::float_kernels(weight_type);
  }
#endif
  return baseline::float_kernels(weight_type);
}

template <>
const Kernels<double>& kernels<double>(c10::ScalarType /*weight_type*/) {
#if defined(__x86_64__)
  if (kIsa == Isa::kAvx512) {
    return avx512::double_kernels();
  }
  if (kIsa == Isa::kAvx2) {
    return avx2::double_kernels();
  }
#endif
  return baseline::double_kernels();
}

std::string cpu_capability() {
  switch (kIsa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastsn
