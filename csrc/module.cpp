#include "cpu/kernels.h"
#include "cuda/versions.h"
#include "estimates.h"
#include "ops.h"

#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
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

// What tells most changes of a weight: its version (None of one made in inference mode), and where
// it lies (0 where it has no memory of its own).
py::tuple state_of(const at::Tensor& weight) {
  const py::object version =
      weight.is_inference() ? py::none() : py::object(py::int_(weight._version()));
  uintptr_t place = 0;
  try {
    place = reinterpret_cast<uintptr_t>(weight.data_ptr());
  } catch (const c10::Error&) {
  }
  return py::make_tuple(version, place);
}

py::list states_of(const py::list& weights) {
  py::list states;
  for (const auto& weight : tensors_of(weights)) {
    states.append(state_of(weight));
  }
  return states;
}

// An attribute of a `Left` of fastsn/weights/normalizer.py.
py::object attribute(PyObject* left, PyObject* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(left, name));
}

// Whether the weight is as it was when `left` was made of it, and what was made is what a read
// would make now.
bool is_plainly(PyObject* left, PyObject* item, const py::object& normalized) {
  static PyObject* const kOriginal = PyUnicode_InternFromString("original");
  static PyObject* const kState = PyUnicode_InternFromString("state");
  if (attribute(left, kOriginal).ptr() != item || !THPVariable_Check(item) ||
      !THPVariable_Check(normalized.ptr())) {
    return false;
  }
  const at::Tensor& weight = THPVariable_Unpack(item);
  const at::Tensor& result = THPVariable_Unpack(normalized.ptr());
  if (!fastsn::is_plain(weight) || weight.is_inference() || weight.data_ptr() == nullptr ||
      result.scalar_type() != weight.scalar_type() ||
      (result.is_inference() && !c10::InferenceMode::is_enabled()) ||
      result.requires_grad() != (at::GradMode::is_enabled() && weight.requires_grad())) {
    return false;
  }
  const auto state = attribute(left, kState);
  return state && PyObject_RichCompareBool(state.ptr(), state_of(weight).ptr(), Py_EQ) == 1;
}

// take(pending, weight, training): what a grouped call has left for this thread's read of a weight,
// no more left then; None where it takes a longer look, which is not done here. Every layer has one
// of these between two of its operators, where a line of Python costs several times what it costs
// in a loop.
PyObject* take(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject* const kNormalized = PyUnicode_InternFromString("normalized");
  if (count != 3 || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "expected a dictionary, a weight and whether it trains");
    return nullptr;
  }
  // The forward of a checkpoint leaves a record, and this might be one, see fastsn/recompute.py.
  if ((!at::GradMode::is_enabled() && args[2] != Py_False) ||
      at::SavedTensorDefaultHooks::get_hooks(true).has_value()) {
    Py_RETURN_NONE;
  }
  const auto thread =
      py::reinterpret_steal<py::object>(PyLong_FromUnsignedLong(PyThread_get_thread_ident()));
  PyObject* const left = thread ? PyDict_GetItemWithError(args[0], thread.ptr()) : nullptr;
  if (left == nullptr) {
    if (PyErr_Occurred() != nullptr) {
      return nullptr;
    }
    Py_RETURN_NONE;
  }
  auto normalized = attribute(left, kNormalized);
  const bool is_taken = normalized && is_plainly(left, args[1], normalized);
  if (PyErr_Occurred() != nullptr || (is_taken && PyDict_DelItem(args[0], thread.ptr()) != 0)) {
    return nullptr;
  }
  if (!is_taken) {
    Py_RETURN_NONE;
  }
  return normalized.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef take_method = {
    "take", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(take)), METH_FASTCALL,
    nullptr};

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
  m.def("states_of", &states_of);
  m.add_object("take", PyCFunction_New(&take_method, nullptr));
}
