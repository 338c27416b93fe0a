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

constexpr int64_t kLooksPerTask = 32;
constexpr int64_t kFetchAheadLooks = 6;
constexpr const char* kSlotNames[kSlots] = {"first",       "second", "third", "first_scale", "second_scale",
                                            "third_scale", "extra",  "init",  "step"};

bool is_moment(Slot slot) { return slot <= kThird; }
bool is_scale(Slot slot) { return slot >= kFirstScale && slot <= kThirdScale; }

bool is_scales(const TensorView& t, int64_t numel) {
  return t.is_fp32_cpu() && t.dim == 1 && t.sizes[0] == numel && (numel <= 1 || t.strides[0] == 1);
}

std::optional<WeightFormat> weight_format(int32_t dtype, WeightMode mode) {
  const std::optional<FloatFormat> format = float_format(dtype);
  if (!format.has_value()) {
    return std::nullopt;
  }
  if (*format != FloatFormat::bf16) {
    return *format == FloatFormat::fp32 ? WeightFormat::fp32 : WeightFormat::fp16;
  }
  constexpr WeightFormat kOfBf16[] = {WeightFormat::bf16, WeightFormat::bf16_split32, WeightFormat::bf16_kahan,
                                      WeightFormat::bf16_stochastic};
  return kOfBf16[static_cast<int>(mode)];
}

std::optional<MomentFormat> moment_format(int32_t dtype) {
  static const int32_t int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
  if (dtype == int8 || dtype == uint8) {
    return MomentFormat::int8;
  }
  const std::optional<FloatFormat> format = float_format(dtype);
  if (!format.has_value() || *format == FloatFormat::fp16) {
    return std::nullopt;
  }
  return *format == FloatFormat::fp32 ? MomentFormat::fp32 : MomentFormat::bf16;
}

template <class T>
T by_name(const std::string& name, const char* what, const char* const* names, int count) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) {
      return static_cast<T>(i);
    }
  }
  STD_TORCH_CHECK(false, what, " '", name, "' is unknown");
  return T{};
}

// The four arrays that nearly every rule reads.
void fetch_chunk(const TensorUpdate& update, const Chunk& chunk) {
  const auto fetch = [&chunk](const void* data, int64_t size) {
    if (data != nullptr) {
      fetch_ahead(static_cast<const char*>(data) + size * chunk.offset, size * chunk.length);
    }
  };
  fetch(update.param, update.weights == WeightFormat::fp32 ? 4 : 2);
  fetch(update.grad.data, update.grad.format == FloatFormat::fp32 ? 4 : 2);
  for (const Moment& moment : update.moments) {
    fetch(moment.data, moment.format == MomentFormat::fp32 ? 4 : moment.format == MomentFormat::bf16 ? 2 : 1);
  }
}

}  // namespace

Slot slot_by_name(const std::string& name) { return by_name<Slot>(name, "key", kSlotNames, kSlots); }

Rule rule_by_name(const std::string& name) {
  const char* names[kRules];
  for (int i = 0; i < kRules; ++i) {
    names[i] = kRuleInfo[i].name;
  }
  return by_name<Rule>(name, "rule", names, kRules);
}

WeightMode weight_mode_by_name(const std::string& name) {
  constexpr const char* kNames[] = {"plain", "split32", "kahan", "stochastic"};
  return by_name<WeightMode>(name, "weights", kNames, 4);
}

UpdatePlan::UpdatePlan(PlanInput input)
    : groups_(std::move(input.groups)),
      numbers_(std::move(input.numbers)),
      seed_(input.seed),
      weights_(input.weights),
      fresh_(std::move(input.fresh)) {
  check_same_count(input.params.size(), "params", input.present.size(), "present");
  check_same_count(input.params.size(), "params", groups_.size(), "groups");
  check_same_count(input.params.size(), "params", numbers_.size(), "numbers");
  fresh_.resize(input.params.size(), false);
  updates_.resize(input.params.size());
  counts_.resize(input.params.size());
  fits_.resize(input.params.size());
  size_t next = 0;
  for (size_t i = 0; i < input.params.size(); ++i) {
    adopt(i, input, next);
  }
  STD_TORCH_CHECK(next == input.state.size(), "state has ", input.state.size(), " tensors, expected ", next);
  params_ = std::move(input.params);
  table_ = cut_into_chunks(numels_);
  chunks_of_.resize(params_.size());
  for (const Chunk& chunk : table_.chunks) {
    ++chunks_of_[chunk.tensor];
  }
}

void UpdatePlan::adopt(size_t i, const PlanInput& input, size_t& next) {
  const Tensor& param = input.params[i];
  const TensorView view = view_of(param.get());
  const std::optional<WeightFormat> weights = weight_format(view.dtype, weights_);
  STD_TORCH_CHECK(view.is_cpu() && weights.has_value() && is_dense(param), element("params", i),
                  " must be a dense float32, bfloat16 or float16 tensor on the CPU for the compiled core, got sizes ",
                  to_string(param.sizes()), " and strides ", to_string(param.strides()));
  dtypes_.push_back(view.dtype);
  layouts_.push_back(layout_of(view));
  numels_.push_back(view.numel());
  updates_[i].weights = *weights;
  updates_[i].row_length = view.dim > 1 && view.sizes[0] > 0 ? numels_[i] / view.sizes[0] : numels_[i];
  for (int s = 0; s < kSlots; ++s) {
    if ((input.present[i] >> s & 1) != 0) {
      STD_TORCH_CHECK(next < input.state.size(), "state has only ", input.state.size(), " tensors");
      adopt_slot(updates_[i], i, static_cast<Slot>(s), input.state[next++]);
      if (s != kStep && !is_scale(static_cast<Slot>(s))) {
        check_same_layout(param, "params", held_.back().tensor, kSlotNames[s], i);
      }
    }
  }
  held_begin_.push_back(held_.size());
}

void UpdatePlan::adopt_slot(TensorUpdate& update, size_t i, Slot slot, const Tensor& tensor) {
  static const int32_t int16 = aoti_torch_dtype_int16(), bf16 = aoti_torch_dtype_bfloat16();
  const TensorView view = view_of(tensor.get());
  STD_TORCH_CHECK(view.is_cpu(), element(kSlotNames[slot], i), " must be on the CPU");
  bool fits = true;
  if (is_moment(slot)) {
    const std::optional<MomentFormat> format = moment_format(view.dtype);
    fits = format.has_value();
    update.moments[slot].format = format.value_or(MomentFormat::none);
  } else if (is_scale(slot)) {
    fits = is_scales(view, (numels_[i] + kBlock - 1) / kBlock);
  } else if (slot == kExtra) {
    fits = view.dtype == (weights_ == WeightMode::split32 ? int16 : bf16);
  } else if (slot == kInit) {
    const std::optional<FloatFormat> format = float_format(view.dtype);
    fits = format.has_value();
    update.init.format = format.value_or(FloatFormat::fp32);
  } else {
    fits = view.is_fp32_cpu() && is_one_number(view);
  }
  STD_TORCH_CHECK(fits, element(kSlotNames[slot], i), " has a dtype or size that does not fit, sizes ",
                  to_string(tensor.sizes()));
  held_.push_back({tensor, slot, view.dtype, view.numel()});
}

bool UpdatePlan::point_at(TensorUpdate& update, size_t i, const Held& held, const TensorView& param) {
  const TensorView view = view_of(held.tensor.get());
  if (view.dtype != held.dtype || !view.is_cpu()) {
    return false;
  }
  if (held.slot == kStep) {
    counts_[i] = static_cast<float*>(view.data);
    return is_one_number(view);
  }
  if (is_scale(held.slot)) {
    update.moments[held.slot - kFirstScale].scale = static_cast<float*>(view.data);
    return is_scales(view, held.numel);
  }
  if (is_moment(held.slot)) {
    update.moments[held.slot].data = view.data;
  } else if (held.slot == kExtra) {
    update.extra = view.data;
  } else {
    update.init.data = view.data;
  }
  return same_layout(param, view);
}

UpdatePlan::Fit UpdatePlan::look_at(size_t i, AtenTensorHandle gradient) {
  TensorUpdate& update = updates_[i];
  const TensorView param = view_of(params_[i].get());
  if (param.dtype != dtypes_[i] || !param.is_cpu() || !has_layout(param, layouts_[i])) {
    return Fit::not_at_all;
  }
  update.param = param.data;
  for (size_t h = held_begin_[i]; h < held_begin_[i + 1]; ++h) {
    if (!point_at(update, i, held_[h], param)) {
      return Fit::not_at_all;
    }
  }
  const TensorView grad = view_of(gradient);
  const std::optional<FloatFormat> format = float_format(grad.dtype);
  update.grad = {grad.data, format.value_or(FloatFormat::fp32)};
  return format.has_value() && grad.is_cpu() && same_layout(param, grad) ? Fit::as_it_is : Fit::to_be_copied;
}

bool UpdatePlan::set_gradients(const OwnedHandles& grads, std::vector<int64_t>& to_be_copied) {
  check_same_count(params_.size(), "the plan", grads.size(), "grads");
  // The last update has driven these records out of the cache; waiting for them is the cost, so share it.
  torch::stable::parallel_for(0, static_cast<int64_t>(fits_.size()), kLooksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t later = std::min(i + kFetchAheadLooks, end - 1);
      fetch_record(params_[later].get());
      fetch_record(grads[later]);
      for (size_t h = held_begin_[later]; h < held_begin_[later + 1]; ++h) {
        fetch_record(held_[h].tensor.get());
      }
      fits_[i] = look_at(i, grads[i]);
    }
  });
  to_be_copied.clear();
  for (size_t i = 0; i < fits_.size(); ++i) {
    if (fits_[i] == Fit::not_at_all) {
      return false;
    }
    if (fits_[i] == Fit::to_be_copied) {
      to_be_copied.push_back(static_cast<int64_t>(i));
    }
  }
  return true;
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
  check_same_count(params_.size(), "the plan", known.size(), "known sums");
  sums_ = known;
  std::vector<int64_t> numels, places;
  std::vector<FloatData> data;
  for (size_t i = 0; i < known.size(); ++i) {
    if (std::isnan(known[i])) {
      numels.push_back(numels_[i]);
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
  const int64_t length = updates_[i].row_length;
  return {data, length == 0 ? 0 : numels_[i] / length, length};
}

bool UpdatePlan::has_rows() const {
  for (size_t i = 0; i < layouts_.size(); ++i) {
    const size_t dim = layouts_[i].size() / 2;
    const bool contiguous = dim <= 1 || layouts_[i][0] <= 1 || layouts_[i][dim] == updates_[i].row_length;
    if (!contiguous && numels_[i] > 0) {
      return false;
    }
  }
  return true;
}

const std::vector<double>& UpdatePlan::clip_rows(float clip_value, double clipping, double eps,
                                                 std::vector<double>& clipped, std::vector<double>& smallest) {
  const size_t count = updates_.size();
  std::vector<Rows> grads, params;
  for (size_t i = 0; i < count; ++i) {
    const WeightFormat weights = updates_[i].weights;
    const FloatFormat format = weights == WeightFormat::fp32   ? FloatFormat::fp32
                               : weights == WeightFormat::fp16 ? FloatFormat::fp16
                                                               : FloatFormat::bf16;
    grads.push_back(rows_of(i, updates_[i].grad));
    params.push_back(rows_of(i, {updates_[i].param, format}));
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

// Neighbours mostly share group and step count: two pow() a tensor would cost more than a small tensor's update.
void UpdatePlan::fill_constants(const std::vector<RuleHyper>& groups, const std::vector<double>& scales,
                                float clip_value) {
  for (size_t i = 0; i < updates_.size(); ++i) {
    TensorUpdate& update = updates_[i];
    const RuleHyper& group = groups.at(groups_[i]);
    const double count = counts_[i] == nullptr ? 1.0 : *counts_[i];
    const RuleInfo& info = kRuleInfo[static_cast<int>(group.rule)];
    int moments = 0, narrow = 0;
    for (int k = 0; k < kMoments; ++k) {
      const Moment& moment = update.moments[k];
      moments += info.has[k];
      narrow += info.has[k] && moment.format == MomentFormat::int8;
      STD_TORCH_CHECK(!info.has[k] || (moment.data != nullptr || numels_[i] == 0), element("params", i),
                      " has no state '", kSlotNames[k], "', which ", info.name, " needs");
      STD_TORCH_CHECK(moment.format != MomentFormat::int8 || moment.scale != nullptr || numels_[i] == 0,
                      element("params", i), " has 8-bit state without scales");
      update.moments[k].is_signed = info.is_signed[k];
    }
    STD_TORCH_CHECK(narrow == 0 || narrow == moments, element("params", i), " has some moments in 8 bits and some not");
    const bool needs_extra = update.weights == WeightFormat::bf16_split32 || update.weights == WeightFormat::bf16_kahan;
    STD_TORCH_CHECK(!needs_extra || update.extra != nullptr || numels_[i] == 0, element("params", i),
                    " has no state 'extra'");
    const bool alike = i > 0 && groups_[i] == groups_[i - 1] && fresh_[i] == fresh_[i - 1];
    if (alike && count == (counts_[i - 1] == nullptr ? 1.0 : *counts_[i - 1])) {
      update.step = updates_[i - 1].step;
    } else {
      update.step = step_constants(group, count, fresh_[i], LibraryPower{});
    }
    update.rule = group.rule;
    const double scale = scales.size() == 1 ? scales[0] : scales[i];
    update.grad_scale = static_cast<float>(group.maximize() ? -scale : scale);
    update.clip_value = clip_value;
    update.init_pull = update.init.data == nullptr ? 0.0f : init_pull(group);
    update.key =
        random_key(static_cast<uint64_t>(seed_), static_cast<uint64_t>(numbers_[i]), static_cast<uint64_t>(count));
  }
}

void UpdatePlan::step(const std::vector<RuleHyper>& groups, const std::vector<double>& scales, float clip_value,
                      bool advance, OwnedHandles* free) {
  STD_TORCH_CHECK(scales.size() == 1 || scales.size() == updates_.size(), "scales has ", scales.size(),
                  " numbers, expected 1 or ", updates_.size());
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  if (advance) {
    for (float* count : counts_) {
      if (count != nullptr) {
        *count += 1.0f;
      }
    }
  }
  fill_constants(groups, scales, clip_value);
  std::unique_ptr<std::atomic<int64_t>[]> left;
  if (free != nullptr) {
    left = std::make_unique<std::atomic<int64_t>[]>(updates_.size());
    for (size_t i = 0; i < updates_.size(); ++i) {
      left[i] = chunks_of_[i];
    }
  }
  for_each_chunk(table_, [&](int64_t c) {
    const Chunk& chunk = table_.chunks[c];
    if (c + 1 < static_cast<int64_t>(table_.chunks.size()) && chunk.length <= kShortChunk) {
      fetch_chunk(updates_[table_.chunks[c + 1].tensor], table_.chunks[c + 1]);
    }
    update_cpu(updates_[chunk.tensor], chunk.offset, chunk.length);
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
