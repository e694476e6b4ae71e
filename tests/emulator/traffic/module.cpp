// The operators of spectral normalization with kernels whose memory accesses are recorded.
#include "../../../csrc/cuda/ops.h"
#include "../../../csrc/schemas.h"

TORCH_LIBRARY(fastsn_recorded, m) { fastsn::define_operators(m); }

TORCH_LIBRARY_IMPL(fastsn_recorded, CPU, m) {
  m.impl("power_", &fastsn::cuda::power_);
  m.impl("estimate", &fastsn::cuda::estimate);
  m.impl("scale", &fastsn::cuda::scale);
  m.impl("scale_backward", &fastsn::cuda::scale_backward);
}
