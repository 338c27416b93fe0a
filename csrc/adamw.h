// The AdamW op over lists of tensors, and the step plan that keeps its chunk table and state between steps.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "adamw_math.h"
#include "chunks.h"
#include "owned_handles.h"

namespace pyft {

struct AdamWPointers {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
};

// Hyperparameters of one parameter group.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// One parallel region over all chunks of all tensors.
void adamw_over_chunks(const ChunkTable& table, const std::vector<AdamWPointers>& pointers,
                       const std::vector<AdamWStep>& steps);

// What a step needs again and again: a dispatcher call with four lists of 400 tensors costs more than the update.
// Only dense fp32 CPU parameters whose two moments have the parameter's layout may enter.
class AdamWPlan {
 public:
  using Tensors = std::vector<torch::stable::Tensor>;

  AdamWPlan(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, std::vector<int64_t> groups);

  // Looks at this step's gradients, and again at parameters and moments: `tensor.data = other` moves any of them.
  // False: one no longer fits, build a new plan. `other_layout` gets the numbers of gradients that must first be
  // copied into their parameter's layout.
  bool set_gradients(const OwnedHandles& grads, std::vector<int64_t>& other_layout);

  // Sum of squares of all gradients, in double. Fixed shape: the same bits for any number of threads.
  double sum_of_squares();

  // Number of the first gradient with a NaN or an inf, or -1. Valid after sum_of_squares().
  int64_t first_nonfinite() const;

  // Advances every step counter by one and updates all parameters; gradients are multiplied by clip_coef on the way.
  void step(const std::vector<AdamWGroup>& groups, double clip_coef);

 private:
  enum class Fit : char { as_it_is, other_layout, other_dtype, not_at_all };

  // Takes the addresses of one parameter, its state and its gradient. Writes to no list but at place i.
  Fit look_at(size_t i, AtenTensorHandle gradient);

  Tensors params_, exp_avgs_, exp_avg_sqs_, steps_;
  std::vector<int64_t> groups_;
  // Sizes, then strides, of each parameter when the plan was made.
  std::vector<std::vector<int64_t>> layouts_;
  ChunkTable table_;
  std::vector<AdamWPointers> pointers_;
  std::vector<const float*> grads_;
  std::vector<float*> counts_;
  std::vector<Fit> fits_;
  std::vector<AdamWStep> constants_;
  std::vector<double> partial_;
};

}  // namespace pyft
