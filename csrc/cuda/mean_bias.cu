#include "launch.cuh"
#include "patches.h"

// The bias that a weight and the mean patch of its input make.
namespace fastsn::cuda {
namespace {

// A block per channel of the output: its row of the weight times the patches.
template <typename T>
__global__ void __launch_bounds__(kBiasThreads)
    mean_bias_kernel(const __grid_constant__ BiasItem item) {
  using Acc = Accumulate<T>;
  wait_for_inputs();
  const auto channel = static_cast<int>(blockIdx.x);
  const int group = channel / item.group;
  const T* const weight = static_cast<const T*>(item.weight) + group * item.group_stride +
      (channel - group * item.group) * item.channel_stride;
  const Acc* const patches = static_cast<const Acc*>(item.patches) + int64_t{group} * item.length;
  Acc sum = 0;
#pragma unroll 4
  for (int k = threadIdx.x; k < item.length; k += kBiasThreads) {
    int64_t in_weight = 0;
    int64_t in_patches = 0;
    int rest = k;
#pragma unroll
    for (int d = kMaxAxes; d > 0; --d) {
      if (d < item.digit_count) {
        const BiasDigit& digit = item.digits[d];
        const int before = rest / digit.size;
        in_weight += (rest - before * digit.size) * digit.weight;
        in_patches += (rest - before * digit.size) * digit.patch;
        rest = before;
      }
    }
    in_weight += rest * item.digits[0].weight;
    in_patches += rest * item.digits[0].patch;
    sum += widen(__ldg(weight + in_weight)) * __ldg(patches + in_patches);
  }
  const Acc mean = block_sum<kBiasThreads>(sum);
  if (threadIdx.x == 0) {
    Acc bias = -mean;
    if (item.gain != nullptr) {
      bias *= read_as<Acc>(item.gain, item.gain_type, channel);
    }
    if (item.beta != nullptr) {
      bias += read_as<Acc>(item.beta, item.beta_type, channel);
    }
    static_cast<Acc*>(item.mean)[channel] = mean;
    narrow(bias, static_cast<T*>(item.bias)[channel]);
  }
}

}  // namespace

const char* mean_bias(Where where, Type weight, const BiasItem& item) {
  return with_type(weight, [&](auto value) {
    return message(
        start<mean_bias_kernel<decltype(value)>>(where, item.channels, kBiasThreads, 0, item));
  });
}

}  // namespace fastsn::cuda
