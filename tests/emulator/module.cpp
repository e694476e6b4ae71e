#include "../../csrc/cuda/ops.h"
#include "../../csrc/cuda/patches.h"
#include "../../csrc/cuda/plan.h"
#include "../../csrc/schemas.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <utility>
#include <vector>

namespace {

// Memory filled with ones, which are NaN in every floating point type, between zones that nobody
// may write.
class Guarded : public c10::Allocator {
 public:
  static constexpr size_t kZone = 4096;
  static constexpr unsigned char kIntact = 0xFF;
  static inline int64_t broken = 0;

  c10::DataPtr allocate(size_t bytes) override {
    // The last zone starts right behind the last byte.
    const size_t all = sizeof(size_t) + bytes + 2 * kZone;
    auto* const memory = static_cast<unsigned char*>(std::aligned_alloc(64, (all + 63) / 64 * 64));
    TORCH_CHECK(memory != nullptr, "out of memory");
    std::fill_n(memory, (all + 63) / 64 * 64, kIntact);
    copy_data(memory, &bytes, sizeof(bytes));
    return {memory + kZone, memory, &free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void free(void* context) {
    auto* const memory = static_cast<unsigned char*>(context);
    const size_t bytes = *static_cast<const size_t*>(context);
    const auto is_intact = [](unsigned char byte) { return byte == kIntact; };
    broken += !std::all_of(memory + sizeof(size_t), memory + kZone, is_intact) ||
        !std::all_of(memory + kZone + bytes, memory + 2 * kZone + bytes, is_intact);
    std::free(memory);
  }
};

// Whether memory is guarded from now on; returns how many guarded pieces that have been freed since
// the last call had a write outside.
int64_t guard(bool wanted) {
  static Guarded guarded;
  static c10::Allocator* const plain = c10::GetCPUAllocator();
  c10::SetCPUAllocator(
      wanted ? static_cast<c10::Allocator*>(&guarded) : plain, std::numeric_limits<uint8_t>::max());
  return std::exchange(Guarded::broken, 0);
}

// A cut, its fields in their order, then the members that a group holds at once.
std::vector<int64_t> plan(
    int64_t units, int64_t members, int64_t inner, bool unit_first, bool aligned, int64_t bytes) {
  fastsn::cuda::Matrix matrix{};
  matrix.units = static_cast<int32_t>(units);
  matrix.members = static_cast<int32_t>(members);
  matrix.inner = static_cast<int32_t>(inner);
  const auto cut = fastsn::cuda::cut(matrix, unit_first, aligned, static_cast<int>(bytes));
  return {cut.unit_first,   cut.vectorized,
          cut.threads(),    cut.lanes,
          cut.width,        cut.classes,
          cut.class_chunks, cut.span,
          cut.tiles,        fastsn::cuda::capacity(cut, bytes == 8)};
}

// number / by, as kernels divide.
int64_t divide(int64_t number, int64_t by) {
  return fastsn::cuda::divide(static_cast<int>(number), fastsn::cuda::divisor(by));
}

// How patch_mean is cut: the tile along outer, rows, columns and inner, how many of them there are
// along channels, rows, columns and samples, then whether it is made of packs and how many threads
// are side by side.
std::vector<int64_t> patch_plan(
    int64_t samples, int64_t outer, int64_t rows, int64_t columns, int64_t inner, int64_t taps) {
  fastsn::cuda::Layout layout{};
  layout.samples = samples;
  layout.outer = static_cast<int32_t>(outer);
  layout.rows = static_cast<int32_t>(rows);
  layout.columns = static_cast<int32_t>(columns);
  layout.inner = static_cast<int32_t>(inner);
  const auto tile = fastsn::cuda::tile_of(layout, taps, true);
  return {
      tile.outer,
      tile.rows,
      tile.columns,
      tile.inner,
      fastsn::cuda::channel_tiles(layout, tile),
      fastsn::cuda::row_tiles(layout, tile),
      fastsn::cuda::column_tiles(layout, tile),
      fastsn::cuda::slices(layout, tile),
      tile.vectorized,
      tile.width};
}

}  // namespace

// The CUDA back-end, its kernels compiled for the emulator, as operators on CPU tensors; and what
// tests ask and set.
TORCH_LIBRARY(fastsn_emulated, m) {
  fastsn::define_operators(m);
  m.def(
      "plan(int units, int members, int inner, bool unit_first, bool aligned, int bytes) "
      "-> int[]",
      &plan);
  m.def("divide(int number, int by) -> int", &divide);
  m.def(
      "patch_plan(int samples, int outer, int rows, int columns, int inner, int taps) -> int[]",
      &patch_plan);
  m.def("guard(bool wanted) -> int", &guard);
}

TORCH_LIBRARY_IMPL(fastsn_emulated, CPU, m) {
  m.impl("power_", &fastsn::cuda::power_);
  m.impl("estimate", &fastsn::cuda::estimate);
  m.impl("scale", &fastsn::cuda::scale);
  m.impl("scale_backward", &fastsn::cuda::scale_backward);
  m.impl("patch_mean", &fastsn::cuda::patch_mean);
  m.impl("patch_mean_backward", &fastsn::cuda::patch_mean_backward);
  m.impl("mean_bias", &fastsn::cuda::mean_bias);
}
