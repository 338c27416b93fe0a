// The parameters of a step plan and their state tensors: what each must be, found when the plan is made, and looked at
// again in every step. The same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "rounding_math.h"
#include "tensor_checks.h"
#include "update_rules.h"

namespace pyft {

// The state tensors of one parameter, by their place in a list from Python. A scale belongs to an 8-bit moment.
enum Slot { kFirst, kSecond, kThird, kFirstScale, kSecondScale, kThirdScale, kExtra, kInit, kStep, kSlots };

constexpr const char* kSlotNames[kSlots] = {"first",       "second", "third", "first_scale", "second_scale",
                                            "third_scale", "extra",  "init",  "step"};

// "plain", "split32", "kahan", "stochastic".
enum class WeightMode : int8_t { plain, split32, kahan, stochastic };

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

// "first", "second", ...: the names of the slots in the schema of the op.
inline Slot slot_by_name(const std::string& name) { return by_name<Slot>(name, "key", kSlotNames, kSlots); }

inline Rule rule_by_name(const std::string& name) {
  const char* names[kRules];
  for (int i = 0; i < kRules; ++i) {
    names[i] = kRuleInfo[i].name;
  }
  return by_name<Rule>(name, "rule", names, kRules);
}

inline WeightMode weight_mode_by_name(const std::string& name) {
  constexpr const char* kNames[] = {"plain", "split32", "kahan", "stochastic"};
  return by_name<WeightMode>(name, "weights", kNames, 4);
}

inline bool is_moment(Slot slot) { return slot <= kThird; }
inline bool is_scale(Slot slot) { return slot >= kFirstScale && slot <= kThirdScale; }

inline std::optional<WeightFormat> weight_format(int32_t dtype, WeightMode mode) {
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

inline FloatFormat float_format(WeightFormat weights) {
  return weights == WeightFormat::fp32   ? FloatFormat::fp32
         : weights == WeightFormat::fp16 ? FloatFormat::fp16
                                         : FloatFormat::bf16;
}

inline std::optional<MomentFormat> moment_format(int32_t dtype) {
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

// The formats in which a parameter and its state are kept.
struct StateFormats {
  WeightFormat weights = WeightFormat::fp32;
  MomentFormat moments[kMoments] = {MomentFormat::none, MomentFormat::none, MomentFormat::none};
  FloatFormat init = FloatFormat::fp32;
};

enum class Fit : char { as_it_is, to_be_copied, not_at_all };

// Takes dense fp32, bf16 and fp16 parameters of one device whose state has their layout; throws for others.
class PlanTensors {
 public:
  // `where`: "on the CPU", for messages.
  PlanTensors(PlanInput& input, int32_t device_type, const char* where)
      : device_type_(device_type), where_(where), weights_(input.weights), groups_(std::move(input.groups)) {
    check_same_count(input.params.size(), "params", input.present.size(), "present");
    check_same_count(input.params.size(), "params", groups_.size(), "groups");
    check_same_count(input.params.size(), "params", input.numbers.size(), "numbers");
    present_ = std::move(input.present);
    formats_.resize(input.params.size());
    size_t next = 0;
    for (size_t i = 0; i < input.params.size(); ++i) {
      adopt(i, input, next);
    }
    STD_TORCH_CHECK(next == input.state.size(), "state has ", input.state.size(), " tensors, expected ", next);
    params_ = std::move(input.params);
  }

  size_t size() const { return params_.size(); }
  const Tensor& param(size_t i) const { return params_[i]; }
  int64_t numel(size_t i) const { return numels_[i]; }
  const std::vector<int64_t>& numels() const { return numels_; }
  int64_t group(size_t i) const { return groups_[i]; }
  const StateFormats& formats(size_t i) const { return formats_[i]; }
  bool has(size_t i, Slot slot) const { return (present_[i] >> slot & 1) != 0; }

  // A gradient as rows: the length of each, and how many there are.
  int64_t row_length(size_t i) const {
    const size_t dim = layouts_[i].size() / 2;
    return dim > 1 && layouts_[i][0] > 0 ? numels_[i] / layouts_[i][0] : numels_[i];
  }
  int64_t num_rows(size_t i) const {
    const int64_t length = row_length(i);
    return length == 0 ? 0 : numels_[i] / length;
  }

  // Whether the first dimension of each parameter is the slowest in memory.
  bool has_rows() const {
    for (size_t i = 0; i < layouts_.size(); ++i) {
      const size_t dim = layouts_[i].size() / 2;
      const bool contiguous = dim <= 1 || layouts_[i][0] <= 1 || layouts_[i][dim] == row_length(i);
      if (!contiguous && numels_[i] > 0) {
        return false;
      }
    }
    return true;
  }

  // Begins to load what look_at(i) will read: first the records, then, when these are there, where their memory is.
  void fetch_records(size_t i, bool same_state) const {
    records_[i].fetch();
    for (size_t h = held_begin_[i]; !same_state && h < held_begin_[i + 1]; ++h) {
      held_[h].record.fetch();
    }
  }
  void fetch_storages(size_t i, bool same_state) const {
    records_[i].fetch_storage();
    for (size_t h = held_begin_[i]; !same_state && h < held_begin_[i + 1]; ++h) {
      held_[h].record.fetch_storage();
    }
  }

  // Where parameter i, its state and its gradient are now: calls param(address), state(slot, address) and
  // gradient(address, format). With `same_state` the state is known to be where it was.
  template <class Param, class State, class Gradient>
  Fit look_at(size_t i, const TensorView& grad, bool same_state, const Param& param, const State& state,
              const Gradient& gradient) const {
    const TensorView view = view_of(params_[i].get());
    if (view.dtype != dtypes_[i] || !is_here(view) || !has_layout(view, layouts_[i])) {
      return Fit::not_at_all;
    }
    param(view.data);
    for (size_t h = held_begin_[i]; !same_state && h < held_begin_[i + 1]; ++h) {
      const Held& held = held_[h];
      const TensorView of_state = view_of(held.tensor.get());
      if (of_state.dtype != held.dtype || !is_here(of_state)) {
        return Fit::not_at_all;
      }
      state(held.slot, of_state.data);
      const bool fits = held.slot == kStep    ? is_one_number(of_state)
                        : is_scale(held.slot) ? is_scales(of_state, held.numel)
                                              : same_layout(view, of_state);
      if (!fits) {
        return Fit::not_at_all;
      }
    }
    const std::optional<FloatFormat> format = float_format(grad.dtype);
    gradient(grad.data, format.value_or(FloatFormat::fp32));
    return format.has_value() && is_here(grad) && same_layout(view, grad) ? Fit::as_it_is : Fit::to_be_copied;
  }

  // Throws unless parameter i has the state that a rule needs.
  void check_state(size_t i, const RuleInfo& info) const {
    int moments = 0, narrow = 0;
    for (int k = 0; k < kMoments; ++k) {
      const bool is_narrow = formats_[i].moments[k] == MomentFormat::int8;
      moments += info.has[k];
      narrow += info.has[k] && is_narrow;
      STD_TORCH_CHECK(!info.has[k] || has(i, static_cast<Slot>(k)), element("params", i), " has no state '",
                      kSlotNames[k], "', which ", info.name, " needs");
      STD_TORCH_CHECK(!is_narrow || has(i, static_cast<Slot>(kFirstScale + k)), element("params", i),
                      " has 8-bit state without scales");
    }
    STD_TORCH_CHECK(narrow == 0 || narrow == moments, element("params", i), " has some moments in 8 bits and some not");
    const WeightFormat weights = formats_[i].weights;
    const bool needs_extra = weights == WeightFormat::bf16_split32 || weights == WeightFormat::bf16_kahan;
    STD_TORCH_CHECK(!needs_extra || has(i, kExtra), element("params", i), " has no state 'extra'");
  }

 private:
  // What a tensor of the state must be.
  struct Held {
    Tensor tensor;
    Record record;
    Slot slot;
    int32_t dtype;
    int64_t numel;
  };

  bool is_here(const TensorView& t) const { return t.device_type == device_type_; }
  bool is_fp32(const TensorView& t) const {
    static const int32_t fp32 = aoti_torch_dtype_float32();
    return t.dtype == fp32 && is_here(t);
  }
  bool is_scales(const TensorView& t, int64_t numel) const {
    return is_fp32(t) && t.dim == 1 && t.sizes[0] == numel && (numel <= 1 || t.strides[0] == 1);
  }

  void adopt(size_t i, const PlanInput& input, size_t& next) {
    const Tensor& param = input.params[i];
    const TensorView view = view_of(param.get());
    const std::optional<WeightFormat> weights = weight_format(view.dtype, weights_);
    STD_TORCH_CHECK(is_here(view) && weights.has_value() && is_dense(param), element("params", i),
                    " must be a dense float32, bfloat16 or float16 tensor ", where_,
                    " for the compiled core, got sizes ", to_string(param.sizes()), " and strides ",
                    to_string(param.strides()));
    records_.emplace_back(param.get());
    dtypes_.push_back(view.dtype);
    layouts_.push_back(layout_of(view));
    numels_.push_back(view.numel());
    formats_[i].weights = *weights;
    for (int s = 0; s < kSlots; ++s) {
      if (has(i, static_cast<Slot>(s))) {
        STD_TORCH_CHECK(next < input.state.size(), "state has only ", input.state.size(), " tensors");
        adopt_slot(i, static_cast<Slot>(s), input.state[next++]);
        if (s != kStep && !is_scale(static_cast<Slot>(s))) {
          check_same_layout(param, "params", held_.back().tensor, kSlotNames[s], i);
        }
      }
    }
    held_begin_.push_back(held_.size());
  }

  void adopt_slot(size_t i, Slot slot, const Tensor& tensor) {
    static const int32_t int16 = aoti_torch_dtype_int16(), bf16 = aoti_torch_dtype_bfloat16();
    const TensorView view = view_of(tensor.get());
    STD_TORCH_CHECK(is_here(view), element(kSlotNames[slot], i), " must be ", where_);
    bool fits = true;
    if (is_moment(slot)) {
      const std::optional<MomentFormat> format = moment_format(view.dtype);
      fits = format.has_value();
      formats_[i].moments[slot] = format.value_or(MomentFormat::none);
    } else if (is_scale(slot)) {
      fits = is_scales(view, (numels_[i] + kBlock - 1) / kBlock);
    } else if (slot == kExtra) {
      fits = view.dtype == (weights_ == WeightMode::split32 ? int16 : bf16);
    } else if (slot == kInit) {
      const std::optional<FloatFormat> format = float_format(view.dtype);
      fits = format.has_value();
      formats_[i].init = format.value_or(FloatFormat::fp32);
    } else {
      fits = is_fp32(view) && is_one_number(view);
    }
    STD_TORCH_CHECK(fits, element(kSlotNames[slot], i), " has a dtype or size that does not fit, sizes ",
                    to_string(tensor.sizes()));
    held_.push_back({tensor, Record(tensor.get()), slot, view.dtype, view.numel()});
  }

  int32_t device_type_;
  const char* where_;
  WeightMode weights_;
  std::vector<torch::stable::Tensor> params_;
  std::vector<Record> records_;
  std::vector<int64_t> groups_, present_, numels_;
  std::vector<int32_t> dtypes_;
  // Sizes, then strides, of each parameter.
  std::vector<std::vector<int64_t>> layouts_;
  std::vector<StateFormats> formats_;
  std::vector<Held> held_;
  // held_[held_begin_[i]] .. held_[held_begin_[i + 1] - 1] belong to parameter i.
  std::vector<size_t> held_begin_{0};
};

// Looks at all gradients in parallel: the last update has driven their records out of the cache, and waiting for them
// is the cost. look(i) gives the fit of one. False: one does not fit; else the numbers of those to be copied.
template <class Look>
bool look_at_all(const PlanTensors& tensors, size_t num_grads, bool same_state, std::vector<Fit>& fits,
                 std::vector<int64_t>& to_be_copied, const Look& look) {
  constexpr int64_t kLooksPerTask = 128;
  constexpr int64_t kRecordsAhead = 4, kStoragesAhead = 2;
  check_same_count(tensors.size(), "the plan", num_grads, "grads");
  fits.resize(tensors.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(fits.size()), kLooksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tensors.fetch_records(std::min(i + kRecordsAhead, end - 1), same_state);
      tensors.fetch_storages(std::min(i + kStoragesAhead, end - 1), same_state);
      fits[i] = look(i);
    }
  });
  to_be_copied.clear();
  for (size_t i = 0; i < fits.size(); ++i) {
    if (fits[i] == Fit::not_at_all) {
      return false;
    }
    if (fits[i] == Fit::to_be_copied) {
      to_be_copied.push_back(static_cast<int64_t>(i));
    }
  }
  return true;
}

}  // namespace pyft
