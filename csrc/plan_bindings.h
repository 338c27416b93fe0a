// What Python gives to a step plan of any device.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "owned_handles.h"
#include "update_state.h"

namespace pyft {

// Capsules as made by torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors: each holds a new reference, taken over here.
inline OwnedHandles borrow(const pybind11::list& handles) {
  OwnedHandles owned(handles.size());
  for (const pybind11::handle& handle : handles) {
    owned.take(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(handle.ptr(), nullptr)));
  }
  return owned;
}

inline std::vector<torch::stable::Tensor> take(const pybind11::list& handles) {
  std::vector<torch::stable::Tensor> tensors;
  tensors.reserve(handles.size());
  for (const pybind11::handle& handle : handles) {
    tensors.emplace_back(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(handle.ptr(), nullptr)));
  }
  return tensors;
}

// (rule, numbers, decay_to_init) for each group.
using GroupTuple = std::tuple<std::string, std::vector<double>, double>;

inline std::vector<RuleHyper> unpack(const std::vector<GroupTuple>& groups) {
  std::vector<RuleHyper> unpacked;
  for (const auto& [rule, numbers, decay_to_init] : groups) {
    RuleHyper hyper{rule_by_name(rule), {}, decay_to_init};
    if (static_cast<int>(numbers.size()) != kRuleInfo[static_cast<int>(hyper.rule)].hyper_count) {
      throw pybind11::value_error(rule + " does not take " + std::to_string(numbers.size()) + " numbers");
    }
    std::copy(numbers.begin(), numbers.end(), hyper.numbers);
    unpacked.push_back(hyper);
  }
  return unpacked;
}

// `none`: there is no limit.
inline float limit(const std::optional<double>& clip_value) {
  return clip_value.has_value() ? static_cast<float>(*clip_value) : INFINITY;
}

inline PlanInput plan_input(const pybind11::list& params, std::vector<int64_t> present, const pybind11::list& state,
                            std::vector<int64_t> groups, std::vector<int64_t> numbers, std::vector<bool> fresh,
                            int64_t seed, const std::string& weights) {
  PlanInput input;
  input.params = take(params);
  input.present = std::move(present);
  input.state = take(state);
  input.groups = std::move(groups);
  input.numbers = std::move(numbers);
  input.fresh = std::move(fresh);
  input.seed = seed;
  input.weights = weight_mode_by_name(weights);
  return input;
}

}  // namespace pyft
