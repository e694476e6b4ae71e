#pragma once

#include "../estimates.h"
#include "host.h"

#include <algorithm>
#include <vector>

// What the operators on weights share on their way from tensors to descriptors.
namespace fastsn::cuda {

Matrix matrix_of(const MatrixView& view);

// Hands out places in a workspace, each at the beginning of a pack.
class Places {
 public:
  int64_t take(int64_t numel) {
    const int64_t start = numel_;
    numel_ += ceil_div(numel, kPack) * kPack;
    return start;
  }

  int64_t numel() const { return numel_; }

 private:
  int64_t numel_ = 0;
};

// A kernel for each pair of types: that of a weight and that of what goes with it.
struct Types {
  Type weight;
  Type other;

  bool operator==(const Types& types) const {
    return weight == types.weight && other == types.other;
  }
};

// launch(types, items, count) for the items of each pair of types.
template <typename Item, typename Launch>
void for_each_type(
    const std::vector<Item>& items, const std::vector<Types>& types, const Launch& launch) {
  std::vector<bool> done(items.size(), false);
  std::vector<Item> own;
  for (size_t first = 0; first < items.size(); ++first) {
    if (done[first]) {
      continue;
    }
    if (std::all_of(types.begin(), types.end(), [&](Types t) { return t == types[first]; })) {
      launch(types[first], items.data(), static_cast<int64_t>(items.size()));
      return;
    }
    own.clear();
    for (size_t k = first; k < items.size(); ++k) {
      if (types[k] == types[first]) {
        own.push_back(items[k]);
        done[k] = true;
      }
    }
    launch(types[first], own.data(), static_cast<int64_t>(own.size()));
  }
}

}  // namespace fastsn::cuda
