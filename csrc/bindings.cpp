// What is not a tensor op: build information, the CPU target, and the step plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "adamw.h"
#include "cpu_target.h"
#include "held_state.h"

namespace py = pybind11;

namespace {

// Capsules as made by torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors: each holds a new reference, taken over here.
pyft::OwnedHandles borrow(const py::list& handles) {
  pyft::OwnedHandles owned(handles.size());
  for (const py::handle& handle : handles) {
    owned.take(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(handle.ptr(), nullptr)));
  }
  return owned;
}

std::vector<torch::stable::Tensor> take(const py::list& handles) {
  std::vector<torch::stable::Tensor> tensors;
  tensors.reserve(handles.size());
  for (const py::handle& handle : handles) {
    tensors.emplace_back(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(handle.ptr(), nullptr)));
  }
  return tensors;
}

using GroupTuple = std::tuple<double, double, double, double, double, bool>;

std::vector<pyft::AdamWGroup> unpack(const std::vector<GroupTuple>& groups) {
  std::vector<pyft::AdamWGroup> unpacked;
  for (const auto& [lr, beta1, beta2, eps, weight_decay, maximize] : groups) {
    unpacked.push_back({lr, beta1, beta2, eps, weight_decay, maximize});
  }
  return unpacked;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["cpu_targets"] = pyft::supported_cpu_targets();
  info["chunk_elements"] = py::make_tuple(pyft::kShortChunk, pyft::kLongChunk);
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &build_info);
  module.def("cpu_target", [] { return std::string(pyft::cpu_target_name(pyft::cpu_target())); });
  module.def("set_cpu_target", &pyft::set_cpu_target, py::arg("name"));
  py::class_<pyft::HeldState>(module, "HeldState")
      .def(py::init<const py::list&, std::vector<int64_t>, py::dict, py::tuple>())
      .def("gradients", &pyft::HeldState::gradients);
  py::class_<pyft::AdamWPlan>(module, "AdamWPlan")
      .def(py::init([](const py::list& params, const py::list& exp_avgs, const py::list& exp_avg_sqs,
                       const py::list& steps, std::vector<int64_t> groups) {
        return pyft::AdamWPlan(take(params), take(exp_avgs), take(exp_avg_sqs), take(steps), std::move(groups));
      }))
      .def("set_gradients",
           [](pyft::AdamWPlan& plan, const py::list& grads) -> py::object {
             std::vector<int64_t> other_layout;
             const bool fits = plan.set_gradients(borrow(grads), other_layout);
             return fits ? py::cast(other_layout) : py::none();
           })
      .def("sum_of_squares",
           [](pyft::AdamWPlan& plan) {
             py::gil_scoped_release release;
             return plan.sum_of_squares();
           })
      .def("first_nonfinite", &pyft::AdamWPlan::first_nonfinite)
      .def("step", [](pyft::AdamWPlan& plan, const std::vector<GroupTuple>& groups, double clip_coef) {
        const auto unpacked = unpack(groups);
        py::gil_scoped_release release;
        plan.step(unpacked, clip_coef);
      });
}
