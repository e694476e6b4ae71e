#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

namespace fastsn {

// The part of MatrixView (estimates.h) that the kernels need.
struct Shape {
  int64_t outer;
  int64_t rows;
  int64_t inner;
};

// At most this many contiguous columns make a row short: the kernels then run along (row, column)
// pairs, with the vectors over columns repeated and those over rows expanded to match. A repeated
// one has up to 16 times as many elements and is on the stack: 2 KB.
constexpr int64_t kShortInner = 32;
static_assert(kShortInner * 64 <= 2048, "bytes of a SIMD vector per element");

// Inner loops of the CPU back-end for one weight type, accumulating in Acc. Vectors over columns
// are in memory order. Every function is a pure function of its arguments: which thread runs it,
// and when, changes nothing.
template <typename Acc>
struct Kernels {
  // Rows [begin, end): s = W v on those rows, and t += W^T s over them. `t` null: s only.
  // `scratch` holds rows * inner elements where the row is short.
  void (*u_first)(
      const void* weight, Shape shape, int64_t begin, int64_t end, const Acc* v, Acc* s, Acc* t,
      Acc* scratch);

  // Columns [begin, end): t = W^T u on those columns, and s += W t over them. They count in units
  // of `inner` where outer > 1 or the row is short, of one column otherwise. `scratch` holds
  // 2 * rows * inner elements where the row is short.
  void (*v_first)(
      const void* weight, Shape shape, int64_t begin, int64_t end, const Acc* u, Acc* t, Acc* s,
      Acc* scratch);

  // The rest works on memory positions i in [begin, end).

  // out[i] = factor * weight[i], rounded.
  void (*scale)(const void* weight, Acc factor, void* out, int64_t begin, int64_t end);

  // Sum of grad[i] * weight[i].
  Acc (*dot)(const void* grad, const void* weight, int64_t begin, int64_t end);

  // buffer[i - begin] = factor * grad[i].
  void (*load_scaled)(const void* grad, Acc factor, Acc* buffer, int64_t begin, int64_t end);

  // buffer[i - begin] += coefficient * (u v^T)[i]. Where the row is short, u is expanded: one
  // element per (row, column) pair.
  void (*add_outer)(
      Acc* buffer, Shape shape, int64_t begin, int64_t end, Acc coefficient, const Acc* u,
      const Acc* v);

  // out[i] = buffer[i - begin], rounded.
  void (*store)(const Acc* buffer, void* out, int64_t begin, int64_t end);

  // y[i] += x[i] for i < n.
  void (*add)(const Acc* x, Acc* y, int64_t n);

  // x = x / |x|, however large or small its elements are; zeros stay.
  void (*make_unit)(Acc* x, int64_t n);

  // out[j] += sum over i < n of x[i * stride + j], for j < length.
  void (*sum_rows)(const void* x, int64_t stride, int64_t n, Acc* out, int64_t length);
};

// The kernels of the best instruction set that this machine has.
template <typename Acc>
const Kernels<Acc>& kernels(c10::ScalarType weight_type);

// "avx512", "avx2" or "baseline".
std::string cpu_capability();

namespace baseline {
const Kernels<float>& float_kernels(c10::ScalarType weight_type);
const Kernels<double>& double_kernels();
}  // namespace baseline
namespace avx2 {
const Kernels<float>& float_kernels(c10::ScalarType weight_type);
const Kernels<double>& double_kernels();
}  // namespace avx2
namespace avx512 {
const Kernels<float>& float_kernels(c10::ScalarType weight_type);
const Kernels<double>& double_kernels();
}  // namespace avx512

}  // namespace fastsn
