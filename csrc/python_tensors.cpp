#include "python_tensors.h"

#include <optional>

#include "dlpack_exchange.h"
#include "plan_bindings.h"

namespace py = pybind11;

namespace pyft {
namespace {

// Of torch.Tensor; null where this torch has none that can be read here.
const dlpack::ExchangeTable* find_exchange(const py::object& tensor) {
  constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor, kAttribute) || !PyCapsule_IsValid(tensor.attr(kAttribute).ptr(), "dlpack_exchange_api")) {
    return nullptr;
  }
  const py::object capsule = tensor.attr(kAttribute);
  auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->major_version != dlpack::kMajorVersion) {
    table = table->previous;
  }
  return table;
}

struct Exchange {
  PyObject* tensor_class;
  dlpack::LookAt look_at;

  Exchange() {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const dlpack::ExchangeTable* table = find_exchange(tensor);
    look_at = table == nullptr ? nullptr : table->look_at;
    tensor_class = tensor.inc_ref().ptr();
  }
};

const Exchange& exchange() {
  static const Exchange* const found = new Exchange();
  return *found;
}

// -1, which no dtype is, for those that no gradient is taken in.
int32_t dtype_of(const dlpack::View& view) {
  static const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       fp16 = aoti_torch_dtype_float16();
  if (view.type_lanes != 1 || (view.type_code != dlpack::kFloat && view.type_code != dlpack::kBfloat)) {
    return -1;
  }
  if (view.type_code == dlpack::kBfloat) {
    return bf16;
  }
  return view.type_bits == 32 ? fp32 : view.type_bits == 16 ? fp16 : -1;
}

OwnedHandles handle_of(PyObject* tensor) {
  py::list one;
  one.append(py::handle(tensor));
  const py::object make = py::module_::import("torch").attr("_C").attr("_aoti");
  return borrow(make.attr("unsafe_alloc_void_ptrs_from_tensors")(one));
}

// Which word of a torch.Tensor leads to its record: the one that its handle leads to. 0: none does.
size_t find_record_word() {
  const py::object tensor = py::module_::import("torch").attr("empty")(1);
  const OwnedHandles handle = handle_of(tensor.ptr());
  const char* const record = *reinterpret_cast<const char* const*>(handle[0]);
  for (size_t word = 2; word < Py_TYPE(tensor.ptr())->tp_basicsize / sizeof(void*); ++word) {
    if (reinterpret_cast<const char* const*>(tensor.ptr())[word] == record) {
      return word;
    }
  }
  return 0;
}

// Nothing for other classes.
std::optional<Record> record_of(PyObject* tensor) {
  static const size_t word = find_record_word();
  if (word == 0 || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != exchange().tensor_class) {
    return std::nullopt;
  }
  return Record(reinterpret_cast<const char* const*>(tensor)[word]);
}

}  // namespace

bool look_through(PyObject* tensor, TensorView& view) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const Exchange& by = exchange();
  if (by.look_at == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != by.tensor_class) {
    return false;
  }
  dlpack::View found;
  if (by.look_at(tensor, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != dlpack::kCpu || found.byte_offset != 0) {
    return false;
  }
  view = {found.data, found.dim, found.sizes, found.strides, dtype_of(found), cpu};
  return true;
}

void fetch_record(PyObject* tensor) {
  if (const auto record = record_of(tensor)) {
    record->fetch();
  }
}

void fetch_storage(PyObject* tensor) {
  if (const auto record = record_of(tensor)) {
    record->fetch_storage();
  }
}

PythonTensors::PythonTensors(const py::list& tensors) : views_(tensors.size()) {
  for (size_t i = 0; i < views_.size(); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!look_through(tensor, views_[i])) {
      handles_.push_back(handle_of(tensor));
      views_[i] = view_of(handles_.back()[0]);
    }
  }
}

}  // namespace pyft
