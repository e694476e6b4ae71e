// The operators of spectral normalization with kernels whose memory accesses are recorded.
#include "../../../csrc/cuda/ops.h"
#include "../../../csrc/schemas.h"

#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <limits>

namespace {

// Memory that starts where torch's allocator on a GPU lets it start: which lines an access touches
// depends on it.
class Aligned : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t kAlignment = 512;
    void* const memory =
        std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK(memory != nullptr || bytes == 0, "out of memory");
    return {memory, memory, &std::free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void align(bool wanted) {
  static Aligned aligned;
  static c10::Allocator* const plain = c10::GetCPUAllocator();
  c10::SetCPUAllocator(
      wanted ? static_cast<c10::Allocator*>(&aligned) : plain, std::numeric_limits<uint8_t>::max());
}

}  // namespace

TORCH_LIBRARY(fastsn_recorded, m) {
  fastsn::define_operators(m);
  m.def("align(bool wanted) -> ()", &align);
}

TORCH_LIBRARY_IMPL(fastsn_recorded, CPU, m) {
  m.impl("power_", &fastsn::cuda::power_);
  m.impl("estimate", &fastsn::cuda::estimate);
  m.impl("scale", &fastsn::cuda::scale);
  m.impl("scale_backward", &fastsn::cuda::scale_backward);
}
