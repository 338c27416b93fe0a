// The update as an op over lists of tensors; optimizers use the step plan.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "update_op.h"
#include "update_plan.h"

namespace pyft {

// state: for each key the tensors of all parameters. steps: the number of this step for each, or nothing.
void update_(const std::string& rule, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
             const std::vector<std::string>& keys, const std::vector<Tensor>& state, const std::vector<Tensor>& steps,
             const std::optional<Tensor>& clip_coef, const std::vector<double>& hyper, double decay_to_init,
             const std::string& weights, int64_t seed, bool first) {
  const RuleHyper group = rule_hyper(rule, hyper, decay_to_init);
  double coef = 1.0;
  if (clip_coef.has_value()) {
    STD_TORCH_CHECK(clip_coef->is_cpu() && clip_coef->numel() == 1 &&
                        clip_coef->scalar_type() == torch::headeronly::ScalarType::Float,
                    "clip_coef must be one float32 number on the CPU");
    coef = *static_cast<const float*>(clip_coef->const_data_ptr());
  }
  PlanInput input = plan_input(params, keys, state, steps);
  input.seed = seed;
  input.weights = weight_mode_by_name(weights);
  input.fresh.assign(params.size(), first);
  UpdatePlan plan(std::move(input));
  give_gradients(plan, params, grads, "the CPU");
  plan.step({group}, {coef}, INFINITY, false, nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { library.impl("update_", TORCH_BOX(&update_)); }

}  // namespace pyft
