#include "cpu/kernels.h"
#include "cuda/versions.h"
#include "estimates.h"
#include "ops.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

namespace {

std::vector<at::Tensor> tensors_of(const py::list& list) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(list.size());
  for (const auto& item : list) {
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "fastsn: expected a list of tensors");
    tensors.push_back(THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

// power_ (estimate, where nothing iterates) and scale in one call from Python, which for small
// layers spends more time on passing arguments than on computing. Both go through the dispatcher as
// if called one after the other.
std::pair<std::vector<at::Tensor>, at::Tensor> normalize(
    const py::list& weight_list, const py::list& u_list, const py::list& v_list,
    const std::vector<int64_t>& layers, const std::vector<int64_t>& dims,
    const std::vector<int64_t>& n_power_iterations, const std::vector<double>& scales, double eps,
    bool v_first, bool bound, bool zero_guard, std::optional<at::ScalarType> dtype) {
  const auto weights = tensors_of(weight_list);
  const auto u = tensors_of(u_list);
  const auto v = tensors_of(v_list);
  const py::gil_scoped_release no_gil;
  const bool iterates = std::any_of(
      n_power_iterations.begin(), n_power_iterations.end(), [](int64_t n) { return n != 0; });
  const auto snapshot = iterates
      ? fastsn::power_(weights, u, v, layers, dims, n_power_iterations, eps, v_first, zero_guard)
      : fastsn::estimate(weights, u, v, layers, dims);
  return {
      fastsn::scale(weights, snapshot, layers, dims, scales, bound, zero_guard, dtype), snapshot};
}

// Whether it could be an argument of the operators as it is.
const at::Tensor* usable(const py::handle& item) {
  if (!THPVariable_Check(item.ptr())) {
    return nullptr;
  }
  const auto& tensor = THPVariable_Unpack(item.ptr());
  return fastsn::is_plain(tensor) && tensor.is_floating_point() &&
          fastsn::bytes_needed(tensor) <= fastsn::bytes_found(tensor)
      ? &tensor
      : nullptr;
}

bool is_weight(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// For every weight whether one call with others could serve it, with its u and v, as they are.
// What is odd about the rest, the callers find out one by one; nothing here is an error.
std::vector<bool> present(
    const py::list& weights, const py::list& u, const py::list& v,
    const std::vector<int64_t>& layers, const std::vector<int64_t>& dims) {
  const size_t count = layers.size();
  std::vector<bool> result(weights.size(), false);
  if (u.size() != count || v.size() != count || dims.size() != count) {
    return result;
  }
  std::vector<bool> is_odd(weights.size(), false);
  const auto fits = [&](const at::Tensor& weight, size_t e) {
    const auto* const own_u = usable(u[e]);
    const auto* const own_v = usable(v[e]);
    if (own_u == nullptr || own_v == nullptr || dims[e] < 0 || dims[e] >= weight.dim()) {
      return false;
    }
    int64_t cols = 1;
    for (int64_t d = 0; d < weight.dim(); ++d) {
      cols *= d == dims[e] ? 1 : weight.size(d);
    }
    return own_u->sizes() == at::IntArrayRef{weight.size(dims[e])} &&
        own_v->sizes() == at::IntArrayRef{cols} && own_u->device() == weight.device() &&
        own_v->device() == weight.device();
  };
  for (size_t e = 0; e < count; ++e) {
    if (layers[e] < 0 || layers[e] >= static_cast<int64_t>(weights.size())) {
      continue;
    }
    const auto layer = static_cast<size_t>(layers[e]);
    const auto* const weight = usable(weights[layer]);
    result[layer] = weight != nullptr && is_weight(*weight) && !is_odd[layer] && fits(*weight, e);
    is_odd[layer] = !result[layer];
  }
  return result;
}

}  // namespace

// Importing the module registers the operators; what it exports tells how it was built.
PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = FASTSN_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_reason") = FASTSN_CUDA_REASON;
  m.attr("cuda_architectures") = FASTSN_CUDA_ARCHITECTURES;  // none: no CUDA kernels
  m.attr("cuda_ptx") = FASTSN_CUDA_PTX;                      // none: no portable code
#ifdef FASTSN_CUDA
  m.def("cuda_versions", &fastsn::cuda::versions);
#endif
  m.def("cpu_capability", &fastsn::cpu_capability);
  m.def("normalize", &normalize);
  m.def("present", &present);
}
