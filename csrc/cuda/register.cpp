#include "ops.h"

#include <torch/library.h>

// In a file of its own, unlike on the CPU: tests register the same functions under another name,
// for kernels in the emulator.
TORCH_LIBRARY_IMPL(fastsn, CUDA, m) {
  m.impl("power_", &fastsn::cuda::power_);
  m.impl("estimate", &fastsn::cuda::estimate);
  m.impl("scale", &fastsn::cuda::scale);
  m.impl("scale_backward", &fastsn::cuda::scale_backward);
  m.impl("patch_mean", &fastsn::cuda::patch_mean);
  m.impl("patch_mean_backward", &fastsn::cuda::patch_mean_backward);
  m.impl("mean_bias", &fastsn::cuda::mean_bias);
}
