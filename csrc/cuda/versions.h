#pragma once

#include <utility>

namespace fastsn::cuda {

// The newest CUDA that the driver knows (0: there is no driver) and that of the runtime linked in:
// 13020 is 13.2. Asking does not start CUDA.
std::pair<int, int> versions();

}  // namespace fastsn::cuda
