#include "../means.h"
#include "classes.h"
#include "kernels.h"
#include "tiles.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

// fastsn::patch_mean and fastsn::patch_mean_backward on the CPU.
namespace fastsn {
namespace {

// Elements summed over the samples at a time: their sums stay in the first-level cache.
constexpr int64_t kChunk = 4096;
// Samples in such a sum before it is added to the others: long chains of additions round more.
constexpr int64_t kSamples = 512;
// Lines that no tap meets are not read where they are at least this long.
constexpr int64_t kSkipped = 64;
// Bytes written before another thread pays off.
constexpr int64_t kCopied = 64 * 1024;

// (N, C, *size) as samples that consist of lines without gaps between them.
struct View {
  at::Tensor input;
  bool channels_last;
  int64_t channels;  // that count lines; 1 where they are in the line
  int64_t length;    // of a line
};

// Whether dimensions of these sizes and strides, the last one innermost, leave no gaps.
bool is_dense(at::IntArrayRef sizes, at::IntArrayRef strides) {
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) {
      return false;
    }
    expected *= sizes[d];
  }
  return true;
}

View view_of(const at::Tensor& input) {
  const auto sizes = input.sizes();
  const bool has_positions = c10::multiply_integers(sizes.slice(2)) > 1;
  if (has_positions && is_dense(sizes.slice(1), input.strides().slice(1))) {
    return {input, false, sizes[1], sizes.back()};
  }
  at::DimVector moved_sizes(sizes.slice(2));
  at::DimVector moved_strides(input.strides().slice(2));
  moved_sizes.push_back(sizes[1]);
  moved_strides.push_back(input.strides()[1]);
  if (is_dense(moved_sizes, moved_strides)) {
    return {input, true, 1, sizes[1]};
  }
  return view_of(input.contiguous(input.suggest_memory_format()));
}

// The dimensions that count lines: all, but for the one that is the line where channels are not.
at::ArrayRef<Axis> line_axes(const Axes& axes, bool channels_last) {
  return at::ArrayRef<Axis>(axes).slice(0, axes.size() - (channels_last ? 0 : 1));
}

double count_of(int64_t samples, at::IntArrayRef output_size, bool average) {
  return average ? static_cast<double>(samples * c10::multiply_integers(output_size)) : 1;
}

// Sum over what a tap meets of the line x; of halves, where it is long.
template <typename Acc>
Acc sum_of_tap(const Acc* x, const Axis::Tap& tap, int64_t step) {
  constexpr int64_t kLong = 256;
  if (tap.count > kLong) {
    const int64_t half = tap.count / 2;
    return sum_of_tap(x, {tap.first, half}, step) +
        sum_of_tap(x, {tap.first + half * step, tap.count - half}, step);
  }
  constexpr int64_t kParts = 4;
  Acc parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= tap.count; i += kParts) {
    for (int64_t k = 0; k < kParts; ++k) {
      parts[k] += x[tap.first + (i + k) * step];
    }
  }
  for (; i < tap.count; ++i) {
    parts[i % kParts] += x[tap.first + i * step];
  }
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// One call of patch_mean. Lines are summed up over the samples and by their keys.
template <typename Acc>
class PatchMean {
 public:
  PatchMean(const View& view, const Axes& axes, double count, Acc* out)
      : view_(view),
        axes_(axes),
        lines_(line_axes(axes, view.channels_last)),
        count_(static_cast<Acc>(count)),
        out_(out),
        narrow_(kernels<Acc>(view.input.scalar_type())),
        wide_(kernels<Acc>(c10::CppTypeToScalarType<Acc>::value)) {}

  void run() const {
    const Range lines{0, view_.channels * lines_.per_channel()};
    const Range samples{0, view_.input.size(0)};
    const int64_t numel = lines.end * view_.length * samples.end;
    const int64_t wanted = std::clamp<int64_t>(ceil_div(numel, kTileNumel), 1, kMaxTiles);
    const bool by_line = lines.end >= std::min(wanted, samples.end);
    const bool by_channel = by_line && 2 * view_.channels >= wanted;
    std::vector<Tile> tiles;
    cut(tiles, 0, numel, by_line ? lines.end : samples.end, by_channel ? lines_.per_channel() : 1,
        kMaxTiles);
    if (by_channel || tiles.size() == 1) {
      for_each_tile(tiles, numel, [&](const Tile& tile) {
        const int64_t per_channel = lines_.per_channel();
        const Range own = tiles.size() == 1 ? lines : Range{tile.begin, tile.end};
        finish(sum(own, samples).values, {own.begin / per_channel, own.end / per_channel});
      });
      return;
    }
    std::vector<Sums> parts(tiles.size());
    for_each_tile(tiles, numel, [&](const Tile& tile) {
      const Range range{tile.begin, tile.end};
      parts[tile.index] = by_line ? sum(range, samples) : sum(lines, range);
    });
    std::vector<Acc> total(view_.channels * lines_.keys_per_channel() * view_.length);
    for (const auto& part : parts) {
      wide_.add(
          part.values.data(), total.data() + part.first_key * view_.length,
          static_cast<int64_t>(part.values.size()));
    }
    finish(std::move(total), {0, view_.channels});
  }

 private:
  struct Range {
    int64_t begin;
    int64_t end;
  };
  // One line per key from `first_key` on.
  struct Sums {
    int64_t first_key;
    std::vector<Acc> values;
  };

  Range keys_of(Range lines) const {
    const int64_t per_channel = lines_.per_channel();
    if (lines.begin % per_channel == 0 && lines.end % per_channel == 0) {
      const int64_t keys = lines_.keys_per_channel();
      return {lines.begin / per_channel * keys, lines.end / per_channel * keys};
    }
    Range keys{std::numeric_limits<int64_t>::max(), 0};
    for (Lines::Cursor at(lines_, lines.begin); at.line() < lines.end; at.advance(at.run())) {
      if (at.key() >= 0) {
        keys = {std::min(keys.begin, at.key()), std::max(keys.end, at.key() + 1)};
      }
    }
    return keys.end == 0 ? Range{0, 0} : keys;
  }

  Sums sum(Range lines, Range samples) const {
    const Range keys = keys_of(lines);
    Sums sums{keys.begin, std::vector<Acc>((keys.end - keys.begin) * view_.length)};
    for (Lines::Cursor at(lines_, lines.begin); at.line() < lines.end;) {
      const int64_t end = end_of_chunk(at, lines.end);
      for (int64_t begin = 0; end > at.line() && begin < view_.length; begin += kChunk) {
        const int64_t width = std::min(kChunk, view_.length - begin);
        for (int64_t n = samples.begin; n < samples.end; n += kSamples) {
          sum_chunk(at, end, begin, width, {n, std::min(n + kSamples, samples.end)}, sums);
        }
      }
      while (at.line() < end) {
        at.advance(std::min(at.run(), end - at.line()));
      }
      if (at.line() < lines.end && is_skipped(at)) {
        at.advance(std::min(at.run(), lines.end - at.line()));
      }
    }
    return sums;
  }

  bool is_skipped(const Lines::Cursor& at) const {
    return at.key() < 0 && at.run() * view_.length >= kSkipped;
  }

  int64_t end_of_chunk(Lines::Cursor at, int64_t end) const {
    end = std::min(end, at.line() + std::max<int64_t>(kChunk / view_.length, 1));
    while (at.line() < end && !is_skipped(at)) {
      at.advance(std::min(at.run(), end - at.line()));
    }
    return at.line();
  }

  // Adds the lines from `at` to `end`, positions [begin, begin + width) of each.
  void sum_chunk(
      const Lines::Cursor& at, int64_t end, int64_t begin, int64_t width, Range samples,
      Sums& sums) const {
    const auto& input = view_.input;
    const int64_t first = samples.begin * input.stride(0) + at.line() * view_.length + begin;
    const char* const x = static_cast<const char*>(input.const_data_ptr()) +
        first * static_cast<int64_t>(input.element_size());
    const int64_t count = samples.end - samples.begin;
    if (count == 1) {
      sum_lines(at, end, narrow_, x, view_.length, input.element_size(), begin, width, sums);
      return;
    }
    alignas(64) Acc buffer[kChunk];
    const int64_t length = (end - at.line()) * width;
    std::fill_n(buffer, length, Acc(0));
    narrow_.sum_rows(x, input.stride(0), count, buffer, length);
    sum_lines(at, end, wide_, buffer, width, sizeof(Acc), begin, width, sums);
  }

  // The same for one sample at `x`, or the sum of some, whose lines are `stride` apart.
  void sum_lines(
      Lines::Cursor at, int64_t end, const Kernels<Acc>& own, const void* x, int64_t stride,
      size_t item, int64_t begin, int64_t width, Sums& sums) const {
    const auto* from = static_cast<const char*>(x);
    while (at.line() < end) {
      const int64_t run = std::min(at.run(), end - at.line());
      if (at.key() >= 0) {
        Acc* const to = sums.values.data() + (at.key() - sums.first_key) * view_.length + begin;
        own.sum_rows(from, stride, run, to, width);
      }
      from += run * stride * static_cast<int64_t>(item);
      at.advance(run);
    }
  }

  // From the sums of all keys of some channels to the results of these.
  void finish(std::vector<Acc> values, Range channels) const {
    const int64_t n = channels.end - channels.begin;
    if (view_.channels_last) {
      const auto sums = lines_.to_taps(std::move(values), 1, view_.length);
      const int64_t taps = static_cast<int64_t>(sums.size()) / view_.length;
      for (int64_t c = 0; c < view_.length; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          out_[c * taps + tap] = sums[tap * view_.length + c] / count_;
        }
      }
    } else {
      const auto width = static_cast<int64_t>(axes_.back().taps.size());
      const auto sums = lines_.to_taps(along_lines(values), n, width);
      Acc* out = out_ + channels.begin * (static_cast<int64_t>(sums.size()) / n);
      for (const Acc sum : sums) {
        *out++ = sum / count_;
      }
    }
  }

  // The sums over what each tap of the last dimension meets, of every line.
  std::vector<Acc> along_lines(const std::vector<Acc>& values) const {
    const auto& axis = axes_.back();
    std::vector<Acc> result;
    result.reserve(values.size() / view_.length * axis.taps.size());
    for (auto line = values.begin(); line != values.end(); line += view_.length) {
      for (const auto& tap : axis.taps) {
        result.push_back(sum_of_tap(&*line, tap, axis.step));
      }
    }
    return result;
  }

  const View& view_;
  const Axes& axes_;
  Lines lines_;
  Acc count_;
  Acc* out_;
  const Kernels<Acc>& narrow_;  // on elements of the input
  const Kernels<Acc>& wide_;    // on sums
};

at::Tensor patch_mean_cpu(
    const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average) {
  const auto type = check_input(input, kernel_size);
  const auto axes = axes_of(
      input.sizes().slice(2), kernel_size, stride, padding, dilation, output_size, transposed);
  const double count = count_of(input.size(0), output_size, average);
  at::DimVector shape{input.size(1)};
  shape.append(kernel_size.begin(), kernel_size.end());
  if (input.numel() == 0) {
    return at::zeros(shape, input.options().dtype(type)).div_(count);
  }
  const auto view = view_of(input);
  auto out = at::empty(shape, input.options().dtype(type));
  if (type == at::kDouble) {
    PatchMean<double>(view, axes, count, out.mutable_data_ptr<double>()).run();
  } else {
    PatchMean<float>(view, axes, count, out.mutable_data_ptr<float>()).run();
  }
  return out;
}

// out[line] = rows[its key], or zeros, bitwise: lines of `length` bytes.
void copy_lines(const Lines& lines, int64_t channels, const char* rows, int64_t length, char* out) {
  const int64_t count = channels * lines.per_channel();
  const int64_t grain = std::max<int64_t>(kCopied / std::max<int64_t>(length, 1), 1);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (Lines::Cursor at(lines, begin); at.line() < end; at.advance(1)) {
      char* const to = out + at.line() * length;
      if (at.key() < 0) {
        std::memset(to, 0, length);
      } else {
        std::memcpy(to, rows + at.key() * length, length);
      }
    }
  });
}

// What the lines of each key hold, in the accumulate type.
template <typename Acc>
at::Tensor rows_of(
    const at::Tensor& grad, const Axes& axes, const Lines& lines, double count,
    bool channels_last) {
  const int64_t channels = grad.size(0);
  const auto by_channel = grad.reshape({channels, -1});
  const auto ordered = (channels_last ? by_channel.t() : by_channel).contiguous();
  std::vector<Acc> values(ordered.numel());
  std::transform(
      ordered.template const_data_ptr<Acc>(),
      ordered.template const_data_ptr<Acc>() + ordered.numel(), values.begin(),
      [&](Acc x) { return x / static_cast<Acc>(count); });
  if (channels_last) {
    values = lines.from_taps(std::move(values), 1, channels);
    auto rows = at::empty({lines.keys_per_channel(), channels}, grad.options());
    std::copy(values.begin(), values.end(), rows.template mutable_data_ptr<Acc>());
    return rows;
  }
  const auto& axis = axes.back();
  const auto taps = static_cast<int64_t>(axis.taps.size());
  values = lines.from_taps(std::move(values), channels, taps);
  auto rows = at::zeros({channels * lines.keys_per_channel(), axis.size}, grad.options());
  Acc* const row = rows.template mutable_data_ptr<Acc>();
  for (size_t i = 0; i < values.size(); ++i) {
    const auto& tap = axis.taps[i % taps];
    Acc* const first = row + static_cast<int64_t>(i) / taps * axis.size + tap.first;
    for (int64_t k = 0; k < tap.count; ++k) {
      first[k * axis.step] += values[i];
    }
  }
  return rows;
}

at::Tensor patch_mean_backward_cpu(
    const at::Tensor& grad, at::IntArrayRef input_size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef output_size, bool transposed,
    bool average, at::ScalarType dtype, bool channels_last) {
  const auto type = check_gradient(grad, input_size, dtype);
  const auto size = input_size.slice(2);
  const auto axes =
      axes_of(size, grad.sizes().slice(1), stride, padding, dilation, output_size, transposed);
  const bool in_line = channels_last || axes.empty();  // channels are
  at::DimVector shape(size);
  shape.insert(in_line ? shape.end() : shape.begin(), input_size[1]);
  const auto out = at::empty(shape, grad.options().dtype(dtype));
  if (out.numel() > 0) {
    const Lines lines(line_axes(axes, in_line));
    const double count = count_of(input_size[0], output_size, average);
    const auto rows =
        (type == at::kDouble ? rows_of<double> : rows_of<float>)(grad.to(type), axes, lines, count,
                                                                 in_line)
            .to(dtype);
    copy_lines(
        lines, in_line ? 1 : input_size[1], static_cast<const char*>(rows.const_data_ptr()),
        shape.back() * static_cast<int64_t>(out.element_size()),
        static_cast<char*>(out.mutable_data_ptr()));
  }
  return in_line ? out.movedim(-1, 0) : out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastsn, CPU, m) {
  m.impl("patch_mean", &patch_mean_cpu);
  m.impl("patch_mean_backward", &patch_mean_backward_cpu);
}

}  // namespace fastsn
