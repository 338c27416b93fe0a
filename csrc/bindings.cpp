// What is not a tensor op: build information, the CPU target, and the step plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "cpu_target.h"
#include "held_state.h"
#include "update_plan.h"

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

// (rule, numbers, decay_to_init) for each group.
using GroupTuple = std::tuple<std::string, std::vector<double>, double>;

std::vector<pyft::RuleHyper> unpack(const std::vector<GroupTuple>& groups) {
  std::vector<pyft::RuleHyper> unpacked;
  for (const auto& [rule, numbers, decay_to_init] : groups) {
    pyft::RuleHyper hyper{pyft::rule_by_name(rule), {}, decay_to_init};
    if (static_cast<int>(numbers.size()) != pyft::kRuleInfo[static_cast<int>(hyper.rule)].hyper_count) {
      throw py::value_error(rule + " does not take " + std::to_string(numbers.size()) + " numbers");
    }
    std::copy(numbers.begin(), numbers.end(), hyper.numbers);
    unpacked.push_back(hyper);
  }
  return unpacked;
}

// `none`: there is no limit.
float limit(const std::optional<double>& clip_value) {
  return clip_value.has_value() ? static_cast<float>(*clip_value) : INFINITY;
}

pyft::UpdatePlan make_plan(const py::list& params, std::vector<int64_t> present, const py::list& state,
                           std::vector<int64_t> groups, std::vector<int64_t> numbers, std::vector<bool> fresh,
                           int64_t seed, const std::string& weights) {
  pyft::PlanInput input;
  input.params = take(params);
  input.present = std::move(present);
  input.state = take(state);
  input.groups = std::move(groups);
  input.numbers = std::move(numbers);
  input.fresh = std::move(fresh);
  input.seed = seed;
  input.weights = pyft::weight_mode_by_name(weights);
  return pyft::UpdatePlan(std::move(input));
}

const std::vector<double>& sums_of_squares(pyft::UpdatePlan& plan, std::optional<double> clip_value,
                                           const std::vector<double>& known) {
  py::gil_scoped_release release;
  return plan.sums_of_squares(limit(clip_value), known);
}

// For steps that need no more than the norm over all gradients.
double total_of_squares(pyft::UpdatePlan& plan, std::optional<double> clip_value) {
  py::gil_scoped_release release;
  plan.sums_of_squares(limit(clip_value), {});
  return plan.total();
}

py::tuple clip_rows(pyft::UpdatePlan& plan, std::optional<double> clip_value, double clipping, double eps) {
  std::vector<double> sums, clipped, smallest;
  {
    py::gil_scoped_release release;
    sums = plan.clip_rows(limit(clip_value), clipping, eps, clipped, smallest);
  }
  return py::make_tuple(std::move(sums), std::move(clipped), std::move(smallest));
}

// free: handles of the gradients, each given up when its tensor is done; or an empty list.
void step(pyft::UpdatePlan& plan, const std::vector<GroupTuple>& groups, const std::vector<double>& scales,
          std::optional<double> clip_value, const py::list& free) {
  const auto unpacked = unpack(groups);
  pyft::OwnedHandles handles = borrow(free);
  py::gil_scoped_release release;
  plan.step(unpacked, scales, limit(clip_value), true, free.empty() ? nullptr : &handles);
}

float element_of(const pyft::FloatData& x, int64_t place) {
  switch (x.format) {
    case pyft::FloatFormat::bf16:
      return pyft::to_fp32(static_cast<const pyft::Bf16*>(x.data)[place]);
    case pyft::FloatFormat::fp16:
      return pyft::to_fp32(static_cast<const pyft::Fp16*>(x.data)[place]);
    default:
      return static_cast<const float*>(x.data)[place];
  }
}

pyft::FloatData float_data(const pyft::TensorView& view) {
  const auto format = pyft::float_format(view.dtype);
  if (!format.has_value() || !view.is_cpu()) {
    throw py::type_error("expected dense float32, bfloat16 or float16 tensors on the CPU");
  }
  return {view.data, *format};
}

// Sum of squares of one tensor, and a place that tells whether it was scaled afterwards: the first element in memory
// that is not 0, or -1, and its value.
std::tuple<double, int64_t, float> sum_of_squares(const py::list& handle, std::optional<double> clip_value) {
  const pyft::OwnedHandles owned = borrow(handle);
  const pyft::TensorView view = pyft::view_of(owned[0]);
  const pyft::FloatData data = float_data(view);
  py::gil_scoped_release release;
  const pyft::ChunkTable table = pyft::cut_into_chunks({view.numel()});
  std::vector<double> partial;
  pyft::sum_of_squares_per_chunk(table, {data}, limit(clip_value), partial);
  const double sum = pyft::sum_per_tensor(table, partial, 1)[0];
  for (size_t c = 0; c < partial.size(); ++c) {
    const pyft::Chunk& chunk = table.chunks[c];
    for (int64_t i = chunk.offset; partial[c] != 0.0 && i < chunk.offset + chunk.length; ++i) {
      if (const float value = element_of(data, i); value != 0.0f) {
        return {sum, i, value};
      }
    }
  }
  return {sum, -1, 0.0f};
}

// The element of each tensor at its place in memory; 0 where the place is -1.
std::vector<float> elements(const py::list& handles, const std::vector<int64_t>& places) {
  const pyft::OwnedHandles owned = borrow(handles);
  std::vector<float> found;
  for (size_t i = 0; i < owned.size(); ++i) {
    const pyft::TensorView view = pyft::view_of(owned[i]);
    const bool inside = places.at(i) >= 0 && places[i] < view.numel();
    found.push_back(inside ? element_of(float_data(view), places[i]) : 0.0f);
  }
  return found;
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
  module.def("sum_of_squares", &sum_of_squares, py::arg("handle"), py::arg("clip_value"));
  module.def("elements", &elements, py::arg("handles"), py::arg("places"));
  py::class_<pyft::HeldState>(module, "HeldState")
      .def(py::init<const py::list&, std::vector<int64_t>, py::dict, const py::list&>())
      .def("gradients", &pyft::HeldState::gradients);
  py::class_<pyft::UpdatePlan>(module, "UpdatePlan")
      .def(py::init(&make_plan))
      .def("set_gradients",
           [](pyft::UpdatePlan& plan, const py::list& grads) -> py::object {
             std::vector<int64_t> to_be_copied;
             const bool fits = plan.set_gradients(borrow(grads), to_be_copied);
             return fits ? py::cast(to_be_copied) : py::none();
           })
      .def("sums_of_squares", &sums_of_squares)
      .def("clip_rows", &clip_rows)
      .def("has_rows", &pyft::UpdatePlan::has_rows)
      .def("total_of_squares", &total_of_squares)
      .def("first_nonfinite", &pyft::UpdatePlan::first_nonfinite)
      .def("step", &step);
}
