#include "cpu/kernels.h"

#include <torch/csrc/utils/pybind.h>

// Importing the module registers the operators; what it exports tells how it was built.
PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = FASTSN_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_reason") = FASTSN_CUDA_REASON;
  m.def("cpu_capability", &fastsn::cpu_capability);
}
