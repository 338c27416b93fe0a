// What is not a tensor op: build information, the CPU target, and the step plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_target.h"
#include "held_state.h"
#include "plan_bindings.h"
#include "python_tensors.h"
#include "update_plan.h"

namespace py = pybind11;

namespace {

pyft::UpdatePlan make_plan(const py::list& params, std::vector<int64_t> present, const py::list& state,
                           std::vector<int64_t> groups, std::vector<int64_t> numbers, std::vector<bool> fresh,
                           int64_t seed, const std::string& weights) {
  return pyft::UpdatePlan(pyft::plan_input(params, std::move(present), state, std::move(groups), std::move(numbers),
                                           std::move(fresh), seed, weights));
}

// held: what the gradients come from, if it is they as they came, or None. same_state: state is where it was.
py::object set_gradients(pyft::UpdatePlan& plan, const py::list& grads, const pyft::HeldState* held, bool same_state) {
  std::vector<int64_t> to_be_copied;
  bool fits = false;
  if (const std::vector<pyft::TensorView>* views = held == nullptr ? nullptr : held->views_of(grads)) {
    fits = plan.set_gradients(*views, to_be_copied, same_state);
  } else {
    fits = plan.set_gradients(pyft::PythonTensors(grads).views(), to_be_copied, same_state);
  }
  return fits ? py::cast(to_be_copied) : py::none();
}

const std::vector<double>& sums_of_squares(pyft::UpdatePlan& plan, std::optional<double> clip_value,
                                           const std::vector<double>& known) {
  py::gil_scoped_release release;
  return plan.sums_of_squares(pyft::limit(clip_value), known);
}

// For steps that need no more than the norm over all gradients.
double total_of_squares(pyft::UpdatePlan& plan, std::optional<double> clip_value) {
  py::gil_scoped_release release;
  plan.sums_of_squares(pyft::limit(clip_value), {});
  return plan.total();
}

py::tuple clip_rows(pyft::UpdatePlan& plan, std::optional<double> clip_value, double clipping, double eps) {
  std::vector<double> sums, clipped, smallest;
  {
    py::gil_scoped_release release;
    sums = plan.clip_rows(pyft::limit(clip_value), clipping, eps, clipped, smallest);
  }
  return py::make_tuple(std::move(sums), std::move(clipped), std::move(smallest));
}

// free: handles of the gradients, each given up when its tensor is done; or an empty list.
void step(pyft::UpdatePlan& plan, const std::vector<pyft::GroupTuple>& groups, const std::vector<double>& scales,
          std::optional<double> clip_value, const py::list& free) {
  const auto unpacked = pyft::unpack(groups);
  pyft::OwnedHandles handles = pyft::borrow(free);
  py::gil_scoped_release release;
  plan.step(unpacked, scales, pyft::limit(clip_value), true, free.empty() ? nullptr : &handles);
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
  const pyft::OwnedHandles owned = pyft::borrow(handle);
  const pyft::TensorView view = pyft::view_of(owned[0]);
  const pyft::FloatData data = float_data(view);
  py::gil_scoped_release release;
  const pyft::ChunkTable table = pyft::cut_into_chunks({view.numel()});
  std::vector<double> partial;
  pyft::sum_of_squares_per_chunk(table, {data}, pyft::limit(clip_value), partial);
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
  const pyft::OwnedHandles owned = pyft::borrow(handles);
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
      .def(py::init([](const py::list& params, std::vector<int64_t> groups, const py::dict& state, const py::list& keys,
                       const py::list& handles) {
        return pyft::HeldState(params, std::move(groups), state, keys, pyft::borrow(handles));
      }))
      .def("gradients", &pyft::HeldState::gradients)
      .def("increment_versions", &pyft::HeldState::increment_versions);
  py::class_<pyft::UpdatePlan>(module, "UpdatePlan")
      .def(py::init(&make_plan))
      .def("set_gradients", &set_gradients, py::arg("grads"), py::arg("held"), py::arg("same_state"))
      .def("sums_of_squares", &sums_of_squares)
      .def("clip_rows", &clip_rows)
      .def("has_rows", &pyft::UpdatePlan::has_rows)
      .def("total_of_squares", &total_of_squares)
      .def("first_nonfinite", &pyft::UpdatePlan::first_nonfinite)
      .def("step", &step);
}
