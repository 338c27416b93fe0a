// The step plan: what an optimizer step needs again and again, kept between steps. A dispatcher call with four lists of
// 400 tensors costs more than their update.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "chunks.h"
#include "grad_norm.h"
#include "owned_handles.h"
#include "update_cpu.h"
#include "update_state.h"

namespace pyft {

// One parallel region for each pass over all tensors. Takes dense fp32, bf16 and fp16 parameters on the CPU whose state
// has their layout; throws for others.
class UpdatePlan {
 public:
  explicit UpdatePlan(PlanInput input);

  // Looks at this step's gradients, and again at parameters and state: `tensor.data = other` moves any of them.
  // False: one no longer fits, build a new plan. `to_be_copied` gets the numbers of gradients of another layout than
  // their parameter's, or another dtype or device than the core takes.
  // With `same_state` state tensors are known to be where they were.
  bool set_gradients(const std::vector<TensorView>& grads, std::vector<int64_t>& to_be_copied, bool same_state = false);

  // Sum of squares of each gradient, clamped to [-clip_value, clip_value]. Sums that are known already are given, NaN
  // stands for unknown; an empty list for none known.
  const std::vector<double>& sums_of_squares(float clip_value, const std::vector<double>& known);

  // Adaptive clipping by rows: keeps a factor for each row for the next step(). Gives the sum of squares of each
  // gradient, and in `clipped` after it, and the smallest factor of each.
  const std::vector<double>& clip_rows(float clip_value, double clipping, double eps, std::vector<double>& clipped,
                                       std::vector<double>& smallest);

  // Whether clip_rows can serve: the first dimension of each parameter is the slowest in memory.
  bool has_rows() const { return tensors_.has_rows(); }

  // Sum of what sums_of_squares or clip_rows gave: the same bits for any order of parameters.
  double total() const { return add_exactly(sums_); }

  // Number of the first gradient whose sum is not finite, or -1.
  int64_t first_nonfinite() const;

  // Updates all parameters. Gradients are multiplied by scales on the way: one for all, or one for each. With
  // `advance` every step counter is moved on first. Each of `free` is given up when its tensor is done.
  void step(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value, bool advance,
            OwnedHandles* free);

 private:
  void point_at(TensorUpdate& update, size_t i, Slot slot, void* data);
  struct StepNumbers;
  StepNumbers numbers_of_step(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value,
                              bool advance);
  double next_count(size_t i, bool advance) const;
  void prepare(size_t i, const StepNumbers& numbers);
  Ahead after(size_t c) const;
  Rows rows_of(size_t i, FloatData data) const;

  std::vector<int64_t> numbers_;
  int64_t seed_;
  // Whether moments were made for the next step. Read by several threads.
  std::vector<char> fresh_;
  PlanTensors tensors_;
  ChunkTable table_;
  std::vector<int64_t> chunks_of_;
  std::vector<TensorUpdate> updates_;
  std::vector<float*> counts_;
  // Of each group, when the state was last checked.
  std::vector<Rule> checked_rules_;
  std::vector<Fit> fits_;
  std::vector<double> partial_, sums_;
  std::vector<std::vector<float>> row_factors_;
};

}  // namespace pyft
