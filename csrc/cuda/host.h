#pragma once

#include "kernels.h"
#include "plan.h"

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

// What the operators share on their way from tensors to descriptors. Needs a torch with CUDA only
// at run time: the stream comes through torch's device-independent interface, memory from torch's
// allocator, so that CUDA graphs capture a call and streams do not share its workspace.
namespace fastsn::cuda {

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Type::kFloat;
    case at::kDouble:
      return Type::kDouble;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kHalf;
  }
}

inline Where where(const at::Device& device) {
  if (!device.is_cuda()) {
    return {0, nullptr};
  }
  const c10::impl::VirtualGuardImpl guard(device.type());
  return {device.index(), guard.getStreamNativeHandle(guard.getStream(device))};
}

inline void check(const char* error, const char* phase) {
  TORCH_CHECK(
      error == nullptr, "fastsn: CUDA kernel '", phase, "' was not launched: ", error,
      ". `python -m fastsn info` tells on which GPUs it can run");
}

inline bool is_aligned(const at::Tensor& tensor) {
  const auto bytes = std::min<size_t>(kPack * tensor.element_size(), 16);
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

}  // namespace fastsn::cuda
