#pragma once

#include "../means.h"

#include <vector>

// Positions of an input that the same taps of a kernel meet make a class: sums over positions are
// taken class by class, every position once, and only then put together to the sums of the taps.
namespace fastsn {

// The classes along one dimension.
struct Classes {
  int64_t count = 0;
  int64_t taps = 0;
  std::vector<int64_t> of;       // of each position; -1 where no tap meets it
  std::vector<int64_t> run_end;  // the first position after this one that is of another class
  std::vector<char> meets;       // [class * taps + tap]

  explicit Classes(const Axis& axis);
  int64_t size() const { return static_cast<int64_t>(of.size()); }
};

// Lines are what lies in memory without a gap and is treated alike: a run along the last dimension,
// or, where channels lie innermost, the channels at one position. They count through the channels
// (where they are not in the line) and then through the given dimensions; their keys through the
// channels and the classes of these dimensions.
class Lines {
 public:
  explicit Lines(at::ArrayRef<Axis> axes);

  int64_t per_channel() const { return per_channel_; }
  int64_t keys_per_channel() const { return keys_per_channel_; }

  // What is given per key, `after` numbers each, for some channels, as sums over the classes that
  // each tap meets; or what is given per tap as sums over the taps that meet each class.
  template <typename Acc>
  std::vector<Acc> to_taps(std::vector<Acc> values, int64_t channels, int64_t after) const;
  template <typename Acc>
  std::vector<Acc> from_taps(std::vector<Acc> values, int64_t channels, int64_t after) const;

  // A place among the lines.
  class Cursor {
   public:
    Cursor(const Lines& lines, int64_t line);
    int64_t line() const { return line_; }
    // -1 where no tap meets the line.
    int64_t key() const { return upper_key_ < 0 ? -1 : key_of(inner_.of[index_]); }
    // How many lines from here on have this key.
    int64_t run() const {
      return (upper_key_ < 0 ? inner_.size() : inner_.run_end[index_]) - index_;
    }
    // By at most run() lines.
    void advance(int64_t count);

   private:
    int64_t key_of(int64_t own) const { return own < 0 ? -1 : upper_key_ + own; }
    void find_upper_key();

    const Lines& lines_;
    const Classes& inner_;  // of the last dimension
    int64_t line_;
    int64_t index_;  // along the last dimension
    int64_t upper_;  // number of all that is before it
    int64_t upper_key_ = 0;
  };

 private:
  std::vector<Classes> axes_;
  int64_t per_channel_ = 1;
  int64_t keys_per_channel_ = 1;
};

}  // namespace fastsn
