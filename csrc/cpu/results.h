#pragma once

#include <ATen/core/Tensor.h>

namespace fastsn {

// An uninitialized tensor with the shape, strides and type of `like`, a dense CPU tensor.
//
// Large results are short-lived and come again in the same sizes at every step. Memory fresh from
// the operating system costs a page fault per 4 KB at its first use, several times what writing the
// result costs. So their storage goes back to a free list, of at most FASTSN_CPU_CACHE_MB (default
// 1024, 0: none) megabytes, and not to the operating system.
at::Tensor empty_result(const at::Tensor& like);

}  // namespace fastsn
