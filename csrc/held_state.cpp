#include "held_state.h"

#include <utility>

namespace py = pybind11;

namespace pyft {

HeldState::HeldState(const py::list& params, std::vector<int64_t> groups, py::dict state, const py::list& keys)
    : groups_(std::move(groups)) {
  for (const auto& [param, of_param] : state) {
    every_state_.push_back(py::reinterpret_borrow<py::object>(of_param));
  }
  for (const py::handle& param : params) {
    params_.push_back(py::reinterpret_borrow<py::object>(param));
    const auto of_keys = py::reinterpret_borrow<py::tuple>(keys[states_.size()]);
    states_.push_back(of_keys.empty() ? py::dict() : state[param].cast<py::dict>());
    for (const auto& [key, value] : states_.back()) {
      held_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
}

bool HeldState::same_state(const py::dict& state) const {
  if (state.size() != every_state_.size()) {
    return false;
  }
  // Looking a tensor up in a dict would call Tensor.__hash__, which is Python; the order of values is enough.
  PyObject *param = nullptr, *of_param = nullptr;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(state.ptr(), &position, &param, &of_param) != 0; ++i) {
    if (of_param != every_state_[i].ptr()) {
      return false;
    }
  }
  size_t next = 0;
  for (const py::dict& of_one : states_) {
    position = 0;
    while (PyDict_Next(of_one.ptr(), &position, &param, &of_param) != 0) {
      if (next == held_.size() || of_param != held_[next++].ptr()) {
        return false;
      }
    }
  }
  return next == held_.size();
}

namespace {

// What `param.grad` calls in the end, without the search through the classes for it. Null for a class of the user's
// own, which may have a `grad` of its own.
PyGetSetDef* grad_of(PyTypeObject* type) {
  static PyObject* const tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  static PyGetSetDef* const found = [] {
    const py::object of_base = py::handle(tensor).attr("grad");
    const bool plain = Py_IS_TYPE(of_base.ptr(), &PyGetSetDescr_Type);
    return plain ? reinterpret_cast<PyGetSetDescrObject*>(of_base.ptr())->d_getset : nullptr;
  }();
  PyObject* const asked = reinterpret_cast<PyObject*>(type);
  return asked == tensor || asked == parameter ? found : nullptr;
}

py::object gradient(PyObject* param) {
  static const py::str* const name = new py::str("grad");
  PyGetSetDef* const getter = grad_of(Py_TYPE(param));
  PyObject* grad = getter == nullptr ? PyObject_GetAttr(param, name->ptr()) : getter->get(param, getter->closure);
  if (grad == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(grad);
}

}  // namespace

py::object HeldState::gradients(const py::list& param_groups, const py::dict& state) const {
  if (!same_state(state)) {
    return py::none();
  }
  const py::str params_key("params");
  py::list grads;
  size_t next = 0;
  int64_t number = 0;
  for (const py::handle& group : param_groups) {
    for (const py::handle& param : group[params_key].cast<py::list>()) {
      py::object grad = gradient(param.ptr());
      if (grad.is_none()) {
        continue;
      }
      if (next == params_.size() || param.ptr() != params_[next].ptr() || groups_[next] != number) {
        return py::none();
      }
      ++next;
      grads.append(std::move(grad));
    }
    ++number;
  }
  return next == params_.size() ? py::object(std::move(grads)) : py::object(py::none());
}

}  // namespace pyft
