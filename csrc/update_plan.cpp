#include "update_plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu_target.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

// The first elements of the arrays that nearly every rule reads.
Ahead ahead_of(const TensorUpdate& update, const Chunk& chunk) {
  constexpr int64_t kMost = 512;
  Ahead next;
  next.length = std::min(chunk.length, kMost);
  const auto add = [&](const void* data, int64_t size) {
    if (data != nullptr) {
      next.arrays[next.count++] = {static_cast<const char*>(data) + size * chunk.offset, size};
    }
  };
  add(update.param, update.weights == WeightFormat::fp32 ? 4 : 2);
  add(update.grad.data, update.grad.format == FloatFormat::fp32 ? 4 : 2);
  for (const Moment& moment : update.moments) {
    add(moment.data, moment.format == MomentFormat::fp32 ? 4 : moment.format == MomentFormat::bf16 ? 2 : 1);
  }
  return next;
}

bool needs_random_bits(const TensorUpdate& update) {
  bool needs = update.weights == WeightFormat::bf16_stochastic;
  for (const Moment& moment : update.moments) {
    needs = needs || moment.format == MomentFormat::bf16 || moment.format == MomentFormat::int8;
  }
  return needs;
}

}  // namespace

UpdatePlan::UpdatePlan(PlanInput input)
    : numbers_(input.numbers),
      seed_(input.seed),
      fresh_(input.fresh.begin(), input.fresh.end()),
      tensors_(input, aoti_torch_device_type_cpu(), "on the CPU"),
      table_(cut_into_chunks(tensors_.numels())) {
  fresh_.resize(tensors_.size(), false);
  updates_.resize(tensors_.size());
  counts_.resize(tensors_.size());
  chunks_of_.resize(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const StateFormats& formats = tensors_.formats(i);
    updates_[i].weights = formats.weights;
    updates_[i].row_length = tensors_.row_length(i);
    updates_[i].init.format = formats.init;
    for (int k = 0; k < kMoments; ++k) {
      updates_[i].moments[k].format = formats.moments[k];
    }
  }
  for (const Chunk& chunk : table_.chunks) {
    ++chunks_of_[chunk.tensor];
  }
}

void UpdatePlan::point_at(TensorUpdate& update, size_t i, Slot slot, void* data) {
  if (slot == kStep) {
    counts_[i] = static_cast<float*>(data);
  } else if (is_scale(slot)) {
    update.moments[slot - kFirstScale].scale = static_cast<float*>(data);
  } else if (is_moment(slot)) {
    update.moments[slot].data = data;
  } else if (slot == kExtra) {
    update.extra = data;
  } else {
    update.init.data = data;
  }
}

bool UpdatePlan::set_gradients(const std::vector<TensorView>& grads, std::vector<int64_t>& to_be_copied,
                               bool same_state) {
  return look_at_all(tensors_, grads.size(), same_state, fits_, to_be_copied, [&](size_t i) {
    TensorUpdate& update = updates_[i];
    return tensors_.look_at(
        i, grads[i], same_state, [&](void* data) { update.param = data; },
        [&](Slot slot, void* data) { point_at(update, i, slot, data); },
        [&](const void* data, FloatFormat format) { update.grad = {data, format}; });
  });
}

const std::vector<double>& UpdatePlan::sums_of_squares(float clip_value, const std::vector<double>& known) {
  if (known.empty()) {
    std::vector<FloatData> data;
    for (const TensorUpdate& update : updates_) {
      data.push_back(update.grad);
    }
    sum_of_squares_per_chunk(table_, data, clip_value, partial_);
    sums_ = sum_per_tensor(table_, partial_, static_cast<int64_t>(updates_.size()));
    return sums_;
  }
  check_same_count(tensors_.size(), "the plan", known.size(), "known sums");
  sums_ = known;
  std::vector<int64_t> numels, places;
  std::vector<FloatData> data;
  for (size_t i = 0; i < known.size(); ++i) {
    if (std::isnan(known[i])) {
      numels.push_back(tensors_.numel(i));
      data.push_back(updates_[i].grad);
      places.push_back(static_cast<int64_t>(i));
    }
  }
  if (!places.empty()) {
    const ChunkTable table = cut_into_chunks(numels);
    sum_of_squares_per_chunk(table, data, clip_value, partial_);
    const std::vector<double> sums = sum_per_tensor(table, partial_, static_cast<int64_t>(places.size()));
    for (size_t k = 0; k < places.size(); ++k) {
      sums_[places[k]] = sums[k];
    }
  }
  return sums_;
}

Rows UpdatePlan::rows_of(size_t i, FloatData data) const {
  return {data, tensors_.num_rows(i), tensors_.row_length(i)};
}

const std::vector<double>& UpdatePlan::clip_rows(float clip_value, double clipping, double eps,
                                                 std::vector<double>& clipped, std::vector<double>& smallest) {
  const size_t count = updates_.size();
  std::vector<Rows> grads, params;
  for (size_t i = 0; i < count; ++i) {
    grads.push_back(rows_of(i, updates_[i].grad));
    params.push_back(rows_of(i, {updates_[i].param, float_format(updates_[i].weights)}));
  }
  std::vector<std::vector<double>> of_grads, of_params;
  sum_of_squares_per_row(grads, clip_value, of_grads);
  sum_of_squares_per_row(params, INFINITY, of_params);
  sums_.assign(count, 0.0);
  clipped.assign(count, 0.0);
  row_factors_.resize(count);
  smallest.assign(count, 1.0);
  for (size_t i = 0; i < count; ++i) {
    row_factors_[i].resize(of_grads[i].size());
    for (size_t row = 0; row < of_grads[i].size(); ++row) {
      const double sum = of_grads[i][row];
      const float factor = static_cast<float>(agc_factor(sum, of_params[i][row], clipping, eps));
      row_factors_[i][row] = factor;
      sums_[i] += sum;
      clipped[i] += sum * factor * factor;
      smallest[i] = std::min<double>(smallest[i], factor);
    }
    updates_[i].row_factors = row_factors_[i].data();
  }
  return sums_;
}

int64_t UpdatePlan::first_nonfinite() const {
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (!std::isfinite(sums_[i])) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

// What a tensor's constants are made of. Two pow() a tensor would cost more than a small tensor's update, so those of a
// group's first tensor serve all that count as it does.
struct UpdatePlan::StepNumbers {
  const std::vector<RuleHyper>& groups;
  const std::vector<double>& scales;
  float clip_value;
  bool advance;
  struct Constants {
    double count = -1.0;
    bool fresh = false;
    RuleStep step{};
  };
  std::vector<Constants> of_group;
};

double UpdatePlan::next_count(size_t i, bool advance) const {
  return counts_[i] == nullptr ? 1.0 : *counts_[i] + (advance ? 1.0f : 0.0f);
}

UpdatePlan::StepNumbers UpdatePlan::numbers_of_step(const std::vector<RuleHyper>& groups,
                                                    const std::vector<double>& scales, float clip_value, bool advance) {
  std::vector<Rule> rules;
  for (const RuleHyper& group : groups) {
    rules.push_back(group.rule);
  }
  StepNumbers numbers{groups, scales, clip_value, advance, std::vector<StepNumbers::Constants>(groups.size())};
  for (size_t i = 0; i < updates_.size(); ++i) {
    const int64_t g = tensors_.group(i);
    const RuleHyper& group = groups.at(g);
    if (rules != checked_rules_) {
      tensors_.check_state(i, kRuleInfo[static_cast<int>(group.rule)]);
    }
    if (numbers.of_group[g].count < 0.0) {
      const double count = next_count(i, advance);
      numbers.of_group[g] = {count, fresh_[i] != 0, step_constants(group, count, fresh_[i] != 0, LibraryPower{})};
    }
  }
  checked_rules_ = std::move(rules);
  return numbers;
}

// Advances the counter of one tensor and fills in the constants of its step.
void UpdatePlan::prepare(size_t i, const StepNumbers& numbers) {
  TensorUpdate& update = updates_[i];
  const RuleHyper& group = numbers.groups[tensors_.group(i)];
  const double count = next_count(i, numbers.advance);
  if (numbers.advance && counts_[i] != nullptr) {
    *counts_[i] = static_cast<float>(count);
  }
  for (int k = 0; k < kMoments; ++k) {
    update.moments[k].is_signed = kRuleInfo[static_cast<int>(group.rule)].is_signed[k];
  }
  const StepNumbers::Constants& known = numbers.of_group[tensors_.group(i)];
  update.step = known.count == count && known.fresh == (fresh_[i] != 0)
                    ? known.step
                    : step_constants(group, count, fresh_[i] != 0, LibraryPower{});
  update.rule = group.rule;
  const double scale = numbers.scales.size() == 1 ? numbers.scales[0] : numbers.scales[i];
  update.grad_scale = static_cast<float>(group.maximize() ? -scale : scale);
  update.clip_value = numbers.clip_value;
  update.init_pull = update.init.data == nullptr ? 0.0f : init_pull(group);
  if (needs_random_bits(update)) {
    update.key =
        random_key(static_cast<uint64_t>(seed_), static_cast<uint64_t>(numbers_[i]), static_cast<uint64_t>(count));
  }
}

// What to load while chunk c is updated. Begins to load what is asked for before an update.
Ahead UpdatePlan::after(size_t c) const {
  if (c + 2 < table_.chunks.size()) {
    const int64_t tensor = table_.chunks[c + 2].tensor;
    __builtin_prefetch(counts_[tensor]);
    for (size_t byte = 0; byte < sizeof(TensorUpdate); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(&updates_[tensor]) + byte);
    }
  }
  if (c + 1 < table_.chunks.size() && table_.chunks[c].length <= kShortChunk) {
    return ahead_of(updates_[table_.chunks[c + 1].tensor], table_.chunks[c + 1]);
  }
  return kNothing;
}

void UpdatePlan::step(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value,
                      bool advance, OwnedHandles* free) {
  STD_TORCH_CHECK(scales.size() == 1 || scales.size() == updates_.size(), "scales has ", scales.size(),
                  " numbers, expected 1 or ", updates_.size());
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  const StepNumbers numbers = numbers_of_step(groups, scales, clip_value, advance);
  // A tensor of one chunk is prepared by the thread that updates it.
  for (size_t i = 0; i < updates_.size(); ++i) {
    if (chunks_of_[i] != 1) {
      prepare(i, numbers);
    }
  }
  std::unique_ptr<std::atomic<int64_t>[]> left;
  if (free != nullptr) {
    left = std::make_unique<std::atomic<int64_t>[]>(updates_.size());
    for (size_t i = 0; i < updates_.size(); ++i) {
      left[i] = chunks_of_[i];
    }
  }
  for_each_chunk(table_, [&](int64_t c) {
    const Chunk& chunk = table_.chunks[c];
    const Ahead next = after(c);
    if (chunks_of_[chunk.tensor] == 1) {
      prepare(chunk.tensor, numbers);
    }
    update_cpu(updates_[chunk.tensor], chunk.offset, chunk.length, next);
    if (free != nullptr && --left[chunk.tensor] == 0) {
      free->release(chunk.tensor);
    }
  });
  fresh_.assign(fresh_.size(), false);
  for (TensorUpdate& update : updates_) {
    update.row_factors = nullptr;
  }
}

}  // namespace pyft
