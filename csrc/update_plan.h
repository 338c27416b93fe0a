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

namespace pyft {

// The state tensors of one parameter, by their place in a list from Python. A scale belongs to an 8-bit moment.
enum Slot { kFirst, kSecond, kThird, kFirstScale, kSecondScale, kThirdScale, kExtra, kInit, kStep, kSlots };

// "first", "second", ...: the names of the slots in the schema of the op.
Slot slot_by_name(const std::string& name);
Rule rule_by_name(const std::string& name);

// "plain", "split32", "kahan", "stochastic".
enum class WeightMode : int8_t { plain, split32, kahan, stochastic };
WeightMode weight_mode_by_name(const std::string& name);

struct PlanInput {
  std::vector<torch::stable::Tensor> params;
  // Bit s of present[i]: parameter i has slot s. `state` holds the tensors of these slots, parameter after parameter.
  std::vector<int64_t> present;
  std::vector<torch::stable::Tensor> state;
  std::vector<int64_t> groups;
  // Keys of the random bits.
  std::vector<int64_t> numbers;
  int64_t seed = 0;
  WeightMode weights = WeightMode::plain;
  // Whether the moments of a parameter were made for the next step; empty for none.
  std::vector<bool> fresh;
};

// One parallel region for each pass over all tensors. Takes dense fp32, bf16 and fp16 parameters on the CPU whose state
// has their layout; throws for others.
class UpdatePlan {
 public:
  explicit UpdatePlan(PlanInput input);

  // Looks at this step's gradients, and again at parameters and state: `tensor.data = other` moves any of them.
  // False: one no longer fits, build a new plan. `to_be_copied` gets the numbers of gradients of another layout than
  // their parameter's, or another dtype or device than the core takes.
  bool set_gradients(const OwnedHandles& grads, std::vector<int64_t>& to_be_copied);

  // Sum of squares of each gradient, clamped to [-clip_value, clip_value]. Sums that are known already are given, NaN
  // stands for unknown; an empty list for none known.
  const std::vector<double>& sums_of_squares(float clip_value, const std::vector<double>& known);

  // Adaptive clipping by rows: keeps a factor for each row for the next step(). Gives the sum of squares of each
  // gradient, and in `clipped` after it, and the smallest factor of each.
  const std::vector<double>& clip_rows(float clip_value, double clipping, double eps, std::vector<double>& clipped,
                                       std::vector<double>& smallest);

  // Whether clip_rows can serve: the first dimension of each parameter is the slowest in memory.
  bool has_rows() const;

  // Sum of what sums_of_squares or clip_rows gave: the same bits for any order of parameters.
  double total() const { return add_exactly(sums_); }

  // Number of the first gradient whose sum is not finite, or -1.
  int64_t first_nonfinite() const;

  // Updates all parameters. Gradients are multiplied by scales on the way: one for all, or one for each. With
  // `advance` every step counter is moved on first. Each of `free` is given up when its tensor is done.
  void step(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value, bool advance,
            OwnedHandles* free);

 private:
  enum class Fit : char { as_it_is, to_be_copied, not_at_all };
  // What a tensor of the state must be, found when the plan is made.
  struct Held {
    torch::stable::Tensor tensor;
    Slot slot;
    int32_t dtype;
    int64_t numel;
  };

  void adopt(size_t i, const PlanInput& input, size_t& next);
  void adopt_slot(TensorUpdate& update, size_t i, Slot slot, const torch::stable::Tensor& tensor);
  Fit look_at(size_t i, AtenTensorHandle gradient);
  bool point_at(TensorUpdate& update, size_t i, const Held& held, const TensorView& param);
  void fill_constants(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value);
  Rows rows_of(size_t i, FloatData data) const;

  std::vector<torch::stable::Tensor> params_;
  std::vector<int32_t> dtypes_;
  // Sizes, then strides, of each parameter.
  std::vector<std::vector<int64_t>> layouts_;
  std::vector<int64_t> numels_, groups_, numbers_;
  std::vector<Held> held_;
  // held_[held_begin_[i]] .. held_[held_begin_[i + 1] - 1] belong to parameter i.
  std::vector<size_t> held_begin_{0};
  int64_t seed_;
  WeightMode weights_;
  std::vector<bool> fresh_;
  ChunkTable table_;
  std::vector<int64_t> chunks_of_;
  std::vector<TensorUpdate> updates_;
  std::vector<float*> counts_;
  std::vector<Fit> fits_;
  std::vector<double> partial_, sums_;
  std::vector<std::vector<float>> row_factors_;
};

}  // namespace pyft
