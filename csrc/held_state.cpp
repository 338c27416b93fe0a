#include "held_state.h"

#include <algorithm>
#include <utility>

#include "python_tensors.h"

namespace py = pybind11;

namespace pyft {

HeldState::HeldState(const py::list& params, std::vector<int64_t> groups, const py::dict& state, const py::list& keys,
                     OwnedHandles handles)
    : groups_(std::move(groups)),
      handles_(std::move(handles)),
      last_grads_(params.size(), nullptr),
      views_(params.size()) {
  for (size_t i = 0; i < handles_.size(); ++i) {
    records_.emplace_back(handles_[i]);
  }
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

namespace {

constexpr size_t kAhead = 12, kSoon = 6, kLag = 4;

// Begins to load dicts that will be read soon, and the tables of those that are there by now.
void fetch_dicts(const std::vector<py::dict>& dicts, size_t i) {
  if (i + kAhead < dicts.size()) {
    __builtin_prefetch(dicts[i + kAhead].ptr());
  }
  if (i + kSoon < dicts.size()) {
    const char* table = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dicts[i + kSoon].ptr())->ma_keys);
    __builtin_prefetch(table);
    __builtin_prefetch(table + 64);
  }
}

}  // namespace

bool HeldState::has_state(const py::dict& state) const {
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
  for (size_t i = 0; i < states_.size(); ++i) {
    fetch_dicts(states_, i);
    position = 0;
    while (PyDict_Next(states_[i].ptr(), &position, &param, &of_param) != 0) {
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

// Begins to load what the gradients of parameters that are next will be read from.
void HeldState::fetch(size_t next) const {
  if (next + kAhead < params_.size()) {
    __builtin_prefetch(params_[next + kAhead].ptr());
    records_[next + kAhead].fetch();
  }
  if (next + kSoon < params_.size()) {
    records_[next + kSoon].fetch_autograd();
    __builtin_prefetch(last_grads_[next + kSoon]);
    // Sizes are inside the record of a tensor.
    __builtin_prefetch(reinterpret_cast<const char*>(views_[next + kSoon].sizes) - 64);
  }
}

py::object HeldState::gradients(const py::list& param_groups, const py::dict& state, bool same_state) {
  last_list_ = nullptr;
  if (!same_state && !has_state(state)) {
    return py::none();
  }
  const py::str params_key("params");
  const size_t count = params_.size();
  py::list grads(count);
  size_t next = 0;
  int64_t number = 0;
  bool seen = true;
  for (const py::handle& group : param_groups) {
    for (const py::handle& param : group[params_key].cast<py::list>()) {
      fetch(next);
      py::object grad = gradient(param.ptr());
      if (grad.is_none()) {
        continue;
      }
      if (next == count || param.ptr() != params_[next].ptr() || groups_[next] != number) {
        return py::none();
      }
      fetch_record(grad.ptr());
      fetch_storage(grad.ptr());
      last_grads_[next] = grad.ptr();
      PyList_SET_ITEM(grads.ptr(), next, grad.release().ptr());
      // The one before had time to arrive.
      if (next >= kLag) {
        seen = seen && look_through(PyList_GET_ITEM(grads.ptr(), next - kLag), views_[next - kLag]);
      }
      ++next;
    }
    ++number;
  }
  if (next != count) {
    return py::none();
  }
  for (size_t i = count < kLag ? 0 : count - kLag; i < count; ++i) {
    seen = seen && look_through(PyList_GET_ITEM(grads.ptr(), i), views_[i]);
  }
  last_list_ = seen ? grads.ptr() : nullptr;
  return std::move(grads);
}

const std::vector<TensorView>* HeldState::views_of(const py::list& grads) const {
  return grads.ptr() == last_list_ ? &views_ : nullptr;
}

void HeldState::increment_versions(const py::object& increment, const py::list& blocks) const {
  size_t begin = 0;
  for (const py::handle& block : blocks) {
    const size_t size = PyTuple_GET_SIZE(block.ptr());
    for (size_t i = begin + 2 * size; i < std::min(begin + 3 * size, params_.size()); ++i) {
      __builtin_prefetch(params_[i].ptr());
      records_[i].fetch();
    }
    for (size_t i = begin + size; i < std::min(begin + 2 * size, params_.size()); ++i) {
      records_[i].fetch_version();
    }
    increment(block);
    begin += size;
  }
}

}  // namespace pyft
