#include "classes.h"

#include <algorithm>

namespace fastsn {

Classes::Classes(const Axis& axis)
    : taps(static_cast<int64_t>(axis.taps.size())), of(axis.size, 0), run_end(axis.size) {
  // Each tap splits the classes that it meets a part of.
  std::vector<int64_t> split(1);
  for (const auto& tap : axis.taps) {
    std::fill(split.begin(), split.end(), -1);
    auto next = static_cast<int64_t>(split.size());
    for (int64_t i = 0; i < tap.count; ++i) {
      auto& own = of[tap.first + i * axis.step];
      if (split[own] < 0) {
        split[own] = next++;
      }
      own = split[own];
    }
    split.resize(next);
  }
  // Numbered in the order of positions; 0 was what no tap meets.
  std::fill(split.begin(), split.end(), -1);
  for (int64_t p = 0; p < axis.size; ++p) {
    if (of[p] > 0 && split[of[p]] < 0) {
      split[of[p]] = count++;
      for (const auto& tap : axis.taps) {
        const int64_t distance = p - tap.first;
        meets.push_back(
            distance >= 0 && distance < tap.count * axis.step && distance % axis.step == 0);
      }
    }
    of[p] = split[of[p]];
  }
  for (int64_t p = axis.size - 1; p >= 0; --p) {
    run_end[p] = p + 1 < axis.size && of[p] == of[p + 1] ? run_end[p + 1] : p + 1;
  }
}

Lines::Lines(at::ArrayRef<Axis> axes) {
  for (const auto& axis : axes) {
    axes_.emplace_back(axis);
  }
  if (axes_.empty()) {  // one line per channel
    axes_.emplace_back(Axis{1, 1, {{0, 1}}});
  }
  for (const auto& axis : axes_) {
    per_channel_ *= axis.size();
    keys_per_channel_ *= axis.count;
  }
}

Lines::Cursor::Cursor(const Lines& lines, int64_t line)
    : lines_(lines),
      inner_(lines.axes_.back()),
      line_(line),
      index_(line % inner_.size()),
      upper_(line / inner_.size()) {
  find_upper_key();
}

void Lines::Cursor::advance(int64_t count) {
  line_ += count;
  index_ += count;
  if (index_ == inner_.size()) {
    index_ = 0;
    ++upper_;
    find_upper_key();
  }
}

void Lines::Cursor::find_upper_key() {
  int64_t rest = upper_;
  int64_t scale = inner_.count;
  upper_key_ = 0;
  for (size_t d = lines_.axes_.size() - 1; d-- > 0;) {
    const auto& axis = lines_.axes_[d];
    const int64_t own = axis.of[rest % axis.size()];
    if (own < 0) {
      upper_key_ = -1;
      return;
    }
    upper_key_ += own * scale;
    scale *= axis.count;
    rest /= axis.size();
  }
  upper_key_ += rest * scale;
}

namespace {

// Replaces the dimension of size `from` in x (before, from, after) by one of size `to`: entry j of
// it is the sum of the entries i that it meets.
template <typename Acc, typename Meets>
std::vector<Acc> combine(
    const std::vector<Acc>& x, int64_t before, int64_t from, int64_t to, int64_t after,
    const Meets& meets) {
  std::vector<Acc> y(before * to * after);
  for (int64_t b = 0; b < before; ++b) {
    for (int64_t j = 0; j < to; ++j) {
      Acc* const sum = y.data() + (b * to + j) * after;
      for (int64_t i = 0; i < from; ++i) {
        const Acc* const term = x.data() + (b * from + i) * after;
        for (int64_t k = 0; meets(i, j) && k < after; ++k) {
          sum[k] += term[k];
        }
      }
    }
  }
  return y;
}

}  // namespace

template <typename Acc>
std::vector<Acc> Lines::to_taps(std::vector<Acc> values, int64_t channels, int64_t after) const {
  int64_t before = channels;
  for (auto axis = axes_.begin(); axis != axes_.end(); ++axis) {
    int64_t rest = after;
    std::for_each(axis + 1, axes_.end(), [&](const auto& later) { rest *= later.count; });
    values = combine(values, before, axis->count, axis->taps, rest, [&](int64_t own, int64_t tap) {
      return axis->meets[own * axis->taps + tap];
    });
    before *= axis->taps;
  }
  return values;
}

template <typename Acc>
std::vector<Acc> Lines::from_taps(std::vector<Acc> values, int64_t channels, int64_t after) const {
  int64_t before = channels;
  for (auto axis = axes_.begin(); axis != axes_.end(); ++axis) {
    int64_t rest = after;
    std::for_each(axis + 1, axes_.end(), [&](const auto& later) { rest *= later.taps; });
    values = combine(values, before, axis->taps, axis->count, rest, [&](int64_t tap, int64_t own) {
      return axis->meets[own * axis->taps + tap];
    });
    before *= axis->count;
  }
  return values;
}

template std::vector<float> Lines::to_taps(std::vector<float>, int64_t, int64_t) const;
template std::vector<double> Lines::to_taps(std::vector<double>, int64_t, int64_t) const;
template std::vector<float> Lines::from_taps(std::vector<float>, int64_t, int64_t) const;
template std::vector<double> Lines::from_taps(std::vector<double>, int64_t, int64_t) const;

}  // namespace fastsn
