#pragma once

#include "../ops.h"

// The operators on the GPU.
namespace fastsn::cuda {

decltype(fastsn::power_) power_;
decltype(fastsn::estimate) estimate;
decltype(fastsn::scale) scale;
decltype(fastsn::scale_backward) scale_backward;

}  // namespace fastsn::cuda
