#include "weights.h"

#include <limits>

namespace fastsn::cuda {

Matrix matrix_of(const MatrixView& view) {
  // Leaves room for the steps of a loop beyond the end.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() - (1 << 16);
  const bool units_are_rows = view.outer == 1 || view.rows == 1;  // and members columns
  const int64_t unit_length = units_are_rows ? view.cols() : view.rows * view.inner;
  TORCH_CHECK(
      view.rows <= kLargest && view.cols() <= kLargest && unit_length <= kLargest,
      "fastsn: on a GPU a matrix may have up to ", kLargest, " rows and columns, got ", view.rows,
      " and ", view.cols(), ", and as many elements in a run of rows, got ", unit_length);
  TORCH_CHECK(
      units_are_rows || view.rows <= kLargest / std::max<int64_t>(view.inner, 1),
      "fastsn: on a GPU rows that lie between each other may have up to ", kLargest,
      " elements together, got ", view.rows, " times ", view.inner);
  TORCH_CHECK(
      view.digits.size() <= kMaxDigits,
      "fastsn: on a GPU the columns of a weight may lie in memory in at most ", kMaxDigits,
      " permuted runs, got ", view.digits.size(), "; call .contiguous() on it");
  Matrix matrix{};
  matrix.members_are_columns = units_are_rows;
  matrix.units = static_cast<int32_t>(units_are_rows ? view.rows : view.outer);
  matrix.members = static_cast<int32_t>(units_are_rows ? view.cols() : view.rows);
  matrix.inner = static_cast<int32_t>(units_are_rows ? 1 : view.inner);
  matrix.digits.count = static_cast<int32_t>(view.digits.size());
  for (size_t k = 0; k < view.digits.size(); ++k) {
    matrix.digits.size[k] = static_cast<int32_t>(view.digits[k].size);
    matrix.digits.stride[k] = static_cast<int32_t>(view.digits[k].stride);
    const auto by_size = divisor(view.digits[k].size);
    matrix.digits.multiplier[k] = by_size.multiplier;
    matrix.digits.shift[k] = static_cast<uint8_t>(by_size.shift);
  }
  return matrix;
}

}  // namespace fastsn::cuda
