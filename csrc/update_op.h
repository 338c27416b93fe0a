// The update as an op over lists of tensors: its arguments, for the plan of any device.
#pragma once

#include <string>
#include <vector>

#include "owned_handles.h"
#include "tensor_checks.h"
#include "update_state.h"

namespace pyft {

inline PlanInput plan_input(const std::vector<Tensor>& params, const std::vector<std::string>& keys,
                            const std::vector<Tensor>& state, const std::vector<Tensor>& steps) {
  const size_t count = params.size();
  check_same_count(count * keys.size(), "keys times params", state.size(), "state");
  STD_TORCH_CHECK(steps.empty() || steps.size() == count, "steps has ", steps.size(), " tensors but params has ",
                  count);
  PlanInput input;
  input.params = params;
  input.groups.assign(count, 0);
  std::vector<size_t> place(kSlots, keys.size());
  int64_t present = steps.empty() ? 0 : int64_t{1} << kStep;
  for (size_t k = 0; k < keys.size(); ++k) {
    const Slot slot = slot_by_name(keys[k]);
    place[slot] = k;
    present |= int64_t{1} << slot;
  }
  input.present.assign(count, present);
  for (size_t i = 0; i < count; ++i) {
    input.numbers.push_back(static_cast<int64_t>(i));
    for (int s = 0; s < kStep; ++s) {
      if (place[s] < keys.size()) {
        input.state.push_back(state[place[s] * count + i]);
      }
    }
    if (!steps.empty()) {
      input.state.push_back(steps[i]);
    }
  }
  return input;
}

inline RuleHyper rule_hyper(const std::string& rule, const std::vector<double>& hyper, double decay_to_init) {
  RuleHyper group{rule_by_name(rule), {}, decay_to_init};
  const size_t expected = kRuleInfo[static_cast<int>(group.rule)].hyper_count;
  STD_TORCH_CHECK(hyper.size() == expected, "hyper has ", hyper.size(), " numbers, ", rule, " takes ", expected);
  std::copy(hyper.begin(), hyper.end(), group.numbers);
  return group;
}

// `where`: "the CPU", for the message.
template <class Plan>
void give_gradients(Plan& plan, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                    const char* where) {
  check_same_count(params.size(), "params", grads.size(), "grads");
  std::vector<TensorView> views(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    views[i] = view_of(grads[i].get());
  }
  std::vector<int64_t> to_be_copied;
  STD_TORCH_CHECK(plan.set_gradients(views, to_be_copied), "a parameter does not fit its state");
  if (!to_be_copied.empty()) {
    const size_t i = to_be_copied[0];
    check_same_layout(params[i], "params", grads[i], "grads", i);
    STD_TORCH_CHECK(false, element("grads", i), " must be float32, bfloat16 or float16 on ", where);
  }
}

}  // namespace pyft
