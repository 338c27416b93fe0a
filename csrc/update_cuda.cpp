// The update as an op over lists of tensors on a GPU; optimizers use the step plan.
#include "update_cuda.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda_update_plan.h"
#include "update_op.h"

namespace pyft {
namespace {

// As update_ of the CPU; clip_coef is on the GPU, too.
void update_(const std::string& rule, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
             const std::vector<std::string>& keys, const std::vector<Tensor>& state, const std::vector<Tensor>& steps,
             const std::optional<Tensor>& clip_coef, const std::vector<double>& hyper, double decay_to_init,
             const std::string& weights, int64_t seed, bool first) {
  const RuleHyper group = rule_hyper(rule, hyper, decay_to_init);
  if (params.empty()) {
    return;
  }
  const float* coef = nullptr;
  if (clip_coef.has_value()) {
    STD_TORCH_CHECK(on_cuda(*clip_coef) && together(params[0], *clip_coef) && clip_coef->numel() == 1 &&
                        clip_coef->scalar_type() == torch::headeronly::ScalarType::Float,
                    "clip_coef must be one float32 number on the device of params");
    coef = static_cast<const float*>(clip_coef->const_data_ptr());
  }
  const CudaDevice device(params[0]);
  refuse_capture(device.stream(), "update_");
  PlanInput input = plan_input(params, keys, state, steps);
  input.seed = seed;
  input.weights = weight_mode_by_name(weights);
  input.fresh.assign(params.size(), first);
  Tensor decision = torch::stable::empty({static_cast<int64_t>(sizeof(StepDecision) / 8)},
                                         torch::headeronly::ScalarType::Long, std::nullopt, params[0].device());
  CudaUpdatePlan plan(std::move(input), decision);
  give_gradients(plan, params, grads, kCudaDevice);
  plan.update_by({group}, coef);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) { library.impl("update_", TORCH_BOX(&update_)); }

}  // namespace pyft
