#include "results.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/alloc_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastsn {
namespace {

// Smaller blocks come from memory that malloc keeps anyway.
constexpr size_t kMinBytes = 64 * 1024;

struct Block {
  void* data;
  size_t bytes;
};

class FreeList {
 public:
  FreeList() {
    const char* const megabytes = std::getenv("FASTSN_CPU_CACHE_MB");
    limit_ = (megabytes ? std::strtoull(megabytes, nullptr, 10) : 1024) << 20;
  }

  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = blocks_.find(bytes);
      if (found != blocks_.end() && !found->second.empty()) {
        void* const data = found->second.back();
        found->second.pop_back();
        held_ -= bytes;
        return {data, bytes};
      }
    }
    return {allocate(bytes), bytes};
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.bytes > limit_) {
      c10::free_cpu(block.data);
      return;
    }
    if (held_ + block.bytes > limit_) {
      release();
    }
    blocks_[block.bytes].push_back(block.data);
    held_ += block.bytes;
  }

 private:
  // Huge pages save most of the page faults of a first use, and address translations ever after.
  static void* allocate(size_t bytes) {
#if defined(__linux__)
    constexpr size_t kHugePage = 2 << 20;
    void* data = nullptr;
    if (bytes >= kHugePage && posix_memalign(&data, kHugePage, bytes) == 0) {
      madvise(data, bytes, MADV_HUGEPAGE);
      return data;
    }
#endif
    return c10::alloc_cpu(bytes);
  }

  // Sizes that no longer come must not crowd out those that do.
  void release() {
    for (auto& [bytes, list] : blocks_) {
      for (void* const data : list) {
        c10::free_cpu(data);
      }
    }
    blocks_.clear();
    held_ = 0;
  }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> blocks_;
  size_t held_ = 0;
  size_t limit_ = 0;
};

// Never destroyed: tensors may outlive static objects.
FreeList& free_list() {
  static auto* const list = new FreeList();
  return *list;
}

void give_back(void* context) {
  auto* const block = static_cast<Block*>(context);
  free_list().give(*block);
  delete block;
}

struct Allocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* const block = new Block(free_list().take(bytes));
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty_result(const at::Tensor& like) {
  static Allocator allocator;
  auto result = like.nbytes() < kMinBytes
      ? at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type())
      : at::detail::empty_strided_generic(
            like.sizes(), like.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
            like.scalar_type());
  // What torch promises for all memory that is not initialized.
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    result.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

}  // namespace fastsn
