// The CUDA core as a Python module: what it was built with, and the step plan. Its ops register themselves with torch's
// dispatcher.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_update_plan.h"
#include "plan_bindings.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return info;
}

double number(const py::dict& options, const char* name) {
  const py::object value = options[name];
  return value.is_none() ? INFINITY : value.cast<double>();
}

pyft::ClipOptions clip_options(const py::dict& options) {
  pyft::ClipOptions clip;
  clip.clip_value = static_cast<float>(number(options, "clip_value"));
  clip.agc = number(options, "agc");
  clip.tensor = number(options, "tensor");
  clip.group = number(options, "group");
  clip.global = number(options, "global");
  clip.refuses = options["refuses"].cast<bool>();
  clip.takes_norm = options["takes_norm"].cast<bool>();
  clip.captured = options["captured"].cast<bool>();
  return clip;
}

std::unique_ptr<pyft::CudaUpdatePlan> make_plan(const py::list& params, std::vector<int64_t> present,
                                                const py::list& state, std::vector<int64_t> groups,
                                                std::vector<int64_t> numbers, std::vector<bool> fresh, int64_t seed,
                                                const std::string& weights, const py::list& decision) {
  return std::make_unique<pyft::CudaUpdatePlan>(pyft::plan_input(params, std::move(present), state, std::move(groups),
                                                                 std::move(numbers), std::move(fresh), seed, weights),
                                                pyft::take(decision).at(0));
}

// parts: a handle, or nothing for one device alone.
// Each list holds one tensor or none.
pyft::Others others_of(const py::list& parts, int64_t devices, int64_t device, const py::list& sums) {
  pyft::Others others;
  for (torch::stable::Tensor& taken : pyft::take(parts)) {
    others.devices = pyft::DeviceParts{std::move(taken), devices, device};
  }
  for (torch::stable::Tensor& taken : pyft::take(sums)) {
    others.processes = std::move(taken);
  }
  return others;
}

// lrs: handles of learning rates that are on the GPU, and the groups that they are for.
void take_norms(pyft::CudaUpdatePlan& plan, const std::vector<pyft::GroupTuple>& groups, const py::list& lrs,
                const std::vector<int64_t>& lr_groups, const py::dict& clip, const py::list& parts, int64_t devices,
                int64_t device, const py::list& sums) {
  const std::vector<pyft::RuleHyper> unpacked = pyft::unpack(groups);
  const pyft::ClipOptions options = clip_options(clip);
  const pyft::OwnedHandles handles = pyft::borrow(lrs);
  std::vector<const float*> on_device(handles.size() == 0 ? 0 : groups.size(), nullptr);
  for (size_t k = 0; k < handles.size(); ++k) {
    on_device.at(lr_groups.at(k)) = static_cast<const float*>(pyft::view_of(handles[k]).data);
  }
  const pyft::Others others = others_of(parts, devices, device, sums);
  py::gil_scoped_release release;
  plan.take_norms(unpacked, on_device, options, others);
}

void update(pyft::CudaUpdatePlan& plan, const py::list& parts, int64_t devices, int64_t device, const py::list& sums) {
  const pyft::Others others = others_of(parts, devices, device, sums);
  py::gil_scoped_release release;
  plan.update(others);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", &build_info);
  module.attr("DECISION_WORDS") = sizeof(pyft::StepDecision) / 8;
  module.def("part_size", &pyft::part_size, py::arg("num_groups"));
  py::class_<pyft::CudaUpdatePlan>(module, "UpdatePlan")
      .def(py::init(&make_plan))
      .def("set_gradients",
           [](pyft::CudaUpdatePlan& plan, const py::list& grads) -> py::object {
             std::vector<int64_t> to_be_copied;
             const pyft::OwnedHandles handles = pyft::borrow(grads);
             const bool fits = plan.set_gradients(pyft::views_of(handles), to_be_copied);
             return fits ? py::cast(to_be_copied) : py::none();
           })
      .def("has_rows", &pyft::CudaUpdatePlan::has_rows)
      .def("uploads", &pyft::CudaUpdatePlan::uploads)
      .def("take_norms", &take_norms)
      .def("refresh", [](pyft::CudaUpdatePlan& plan,
                         const std::vector<pyft::GroupTuple>& groups) { plan.refresh(pyft::unpack(groups)); })
      .def("update", &update);
}
