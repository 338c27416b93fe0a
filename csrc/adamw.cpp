#include "adamw.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "adamw_cpu.h"
#include "cpu_target.h"
#include "grad_norm.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

std::vector<int64_t> numels_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> numels;
  for (const Tensor& t : tensors) {
    numels.push_back(t.numel());
  }
  return numels;
}

constexpr int64_t kLooksPerTask = 32;
constexpr int64_t kFetchAheadLooks = 6;

float* fp32(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void check_state(const std::vector<Tensor>& params, const std::vector<Tensor>& state, const char* list) {
  check_same_count(params.size(), "params", state.size(), list);
  for (size_t i = 0; i < state.size(); ++i) {
    check_fp32_cpu(state[i], list, i);
    check_same_layout(params[i], "params", state[i], list, i);
  }
}

void check_params(const std::vector<Tensor>& params) {
  for (size_t i = 0; i < params.size(); ++i) {
    check_fp32_cpu(params[i], "params", i);
    STD_TORCH_CHECK(is_dense(params[i]), element("params", i), " has sizes ", to_string(params[i].sizes()),
                    " and strides ", to_string(params[i].strides()), ", with gaps or overlaps");
  }
}

void check_steps(const std::vector<Tensor>& params, const std::vector<Tensor>& steps) {
  check_same_count(params.size(), "params", steps.size(), "steps");
  for (size_t i = 0; i < steps.size(); ++i) {
    check_fp32_cpu(steps[i], "steps", i);
    STD_TORCH_CHECK(steps[i].numel() == 1, element("steps", i), " must hold one number, got ", steps[i].numel());
  }
}

// Neighbours mostly share group and step count: two pow() a tensor would cost more than a small tensor's update.
void fill_constants(const std::vector<AdamWGroup>& groups, const std::vector<int64_t>& group_of,
                    const std::vector<double>& step_of, double clip_coef, std::vector<AdamWStep>& constants) {
  constants.resize(group_of.size());
  for (size_t i = 0; i < group_of.size(); ++i) {
    if (i > 0 && group_of[i] == group_of[i - 1] && step_of[i] == step_of[i - 1]) {
      constants[i] = constants[i - 1];
      continue;
    }
    const AdamWGroup& g = groups[group_of[i]];
    constants[i] =
        adamw_step_constants(step_of[i], g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize, clip_coef);
  }
}

}  // namespace

void adamw_over_chunks(const ChunkTable& table, const std::vector<AdamWPointers>& pointers,
                       const std::vector<AdamWStep>& steps) {
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  for_each_chunk(table, [&](int64_t c) {
    const Chunk& chunk = table.chunks[c];
    const AdamWPointers& p = pointers[chunk.tensor];
    adamw_cpu(p.param + chunk.offset, p.grad + chunk.offset, p.exp_avg + chunk.offset, p.exp_avg_sq + chunk.offset,
              chunk.length, steps[chunk.tensor]);
  });
}

AdamWPlan::AdamWPlan(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, std::vector<int64_t> groups)
    : params_(std::move(params)),
      exp_avgs_(std::move(exp_avgs)),
      exp_avg_sqs_(std::move(exp_avg_sqs)),
      steps_(std::move(steps)),
      groups_(std::move(groups)) {
  check_params(params_);
  check_state(params_, exp_avgs_, "exp_avgs");
  check_state(params_, exp_avg_sqs_, "exp_avg_sqs");
  check_steps(params_, steps_);
  check_same_count(params_.size(), "params", groups_.size(), "groups");
  table_ = cut_into_chunks(numels_of(params_));
  for (const Tensor& param : params_) {
    layouts_.push_back(layout_of(view_of(param.get())));
  }
  pointers_.resize(params_.size());
  grads_.resize(params_.size());
  counts_.resize(params_.size());
  fits_.resize(params_.size());
}

AdamWPlan::Fit AdamWPlan::look_at(size_t i, AtenTensorHandle gradient) {
  const TensorView param = view_of(params_[i].get()), grad = view_of(gradient), count = view_of(steps_[i].get());
  const TensorView exp_avg = view_of(exp_avgs_[i].get()), exp_avg_sq = view_of(exp_avg_sqs_[i].get());
  const bool fp32 = param.is_fp32_cpu() && exp_avg.is_fp32_cpu() && exp_avg_sq.is_fp32_cpu() && count.is_fp32_cpu();
  if (!fp32 || !has_layout(param, layouts_[i]) || !same_layout(param, exp_avg) || !same_layout(param, exp_avg_sq) ||
      !is_one_number(count)) {
    return Fit::not_at_all;
  }
  grads_[i] = static_cast<const float*>(grad.data);
  pointers_[i] = {static_cast<float*>(param.data), grads_[i], static_cast<float*>(exp_avg.data),
                  static_cast<float*>(exp_avg_sq.data)};
  counts_[i] = static_cast<float*>(count.data);
  return !grad.is_fp32_cpu() ? Fit::other_dtype : same_layout(param, grad) ? Fit::as_it_is : Fit::other_layout;
}

bool AdamWPlan::set_gradients(const OwnedHandles& grads, std::vector<int64_t>& other_layout) {
  check_same_count(params_.size(), "the plan", grads.size(), "grads");
  // The last update has driven five records a parameter out of the cache; waiting for them is the cost, so share it.
  torch::stable::parallel_for(0, static_cast<int64_t>(fits_.size()), kLooksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t later = std::min(i + kFetchAheadLooks, end - 1);
      for (AtenTensorHandle tensor : {params_[later].get(), grads[later], exp_avgs_[later].get(),
                                      exp_avg_sqs_[later].get(), steps_[later].get()}) {
        fetch_record(tensor);
      }
      fits_[i] = look_at(i, grads[i]);
    }
  });
  other_layout.clear();
  for (size_t i = 0; i < fits_.size(); ++i) {
    if (fits_[i] == Fit::not_at_all) {
      return false;
    }
    STD_TORCH_CHECK(fits_[i] != Fit::other_dtype, element("grads", i), " must be a dense float32 tensor on the CPU");
    if (fits_[i] == Fit::other_layout) {
      other_layout.push_back(static_cast<int64_t>(i));
    }
  }
  return true;
}

double AdamWPlan::sum_of_squares() {
  sum_of_squares_per_chunk(table_, grads_, partial_);
  return add_in_order(partial_);
}

int64_t AdamWPlan::first_nonfinite() const {
  for (size_t c = 0; c < partial_.size(); ++c) {
    if (!std::isfinite(partial_[c])) {
      return table_.chunks[c].tensor;
    }
  }
  return -1;
}

void AdamWPlan::step(const std::vector<AdamWGroup>& groups, double clip_coef) {
  std::vector<double> step_of(counts_.size());
  for (size_t i = 0; i < counts_.size(); ++i) {
    *counts_[i] += 1.0f;
    step_of[i] = *counts_[i];
  }
  fill_constants(groups, groups_, step_of, clip_coef, constants_);
  adamw_over_chunks(table_, pointers_, constants_);
}

void adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
            const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& steps,
            const std::optional<Tensor>& clip_coef, double lr, double beta1, double beta2, double eps,
            double weight_decay, bool maximize) {
  check_params(params);
  check_state(params, grads, "grads");
  check_state(params, exp_avgs, "exp_avgs");
  check_state(params, exp_avg_sqs, "exp_avg_sqs");
  check_steps(params, steps);
  double coef = 1.0;
  if (clip_coef.has_value()) {
    STD_TORCH_CHECK(clip_coef->is_cpu() && clip_coef->numel() == 1 &&
                        clip_coef->scalar_type() == torch::headeronly::ScalarType::Float,
                    "clip_coef must be one float32 number on the CPU");
    coef = *fp32(*clip_coef);
  }
  std::vector<AdamWPointers> pointers(params.size());
  std::vector<double> step_of(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    pointers[i] = {fp32(params[i]), fp32(grads[i]), fp32(exp_avgs[i]), fp32(exp_avg_sqs[i])};
    step_of[i] = *fp32(steps[i]);
  }
  std::vector<AdamWStep> constants;
  fill_constants({{lr, beta1, beta2, eps, weight_decay, maximize}}, std::vector<int64_t>(params.size(), 0), step_of,
                 coef, constants);
  adamw_over_chunks(cut_into_chunks(numels_of(params)), pointers, constants);
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { library.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace pyft
