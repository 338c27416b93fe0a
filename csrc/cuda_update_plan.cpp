#include "cuda_update_plan.h"

#include <algorithm>
#include <cmath>

namespace pyft {
namespace {

// The floor of the norm of a row of weights, as AGC_EPS in pyft/optim.
constexpr double kAgcEps = 1e-3;

int32_t device_type_of(const Tensor& tensor) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
#ifndef PYFT_CUDA_SERVES_CPU
  STD_TORCH_CHECK(device_type == aoti_torch_device_type_cuda(), "a CUDA plan takes tensors on a GPU");
#endif
  return device_type;
}

}  // namespace

CudaUpdatePlan::CudaUpdatePlan(PlanInput input, Tensor decision)
    : decision_(std::move(decision)),
      seed_(input.seed),
      numbers_(input.numbers),
      tensors_(input, device_type_of(decision_), "on one GPU") {
  const size_t count = tensors_.size();
  STD_TORCH_CHECK(decision_.numel() * 8 == sizeof(StepDecision), "decision must have ", sizeof(StepDecision) / 8,
                  " int64 numbers, got ", decision_.numel());
  records_.resize(count);
  grads_.resize(count);
  std::vector<int32_t> group_of;
  std::vector<uint8_t> fresh(input.fresh.begin(), input.fresh.end());
  fresh.resize(count, 0);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(tensors_.param(i).get_device_index() == decision_.get_device_index(), element("params", i),
                    " is on another GPU than the others; one plan is for one GPU");
    const StateFormats& formats = tensors_.formats(i);
    DeviceTensor& record = records_[i];
    record = {};
    record.number = static_cast<uint64_t>(numbers_[i]);
    record.row_length = tensors_.row_length(i);
    record.group = static_cast<int32_t>(tensors_.group(i));
    record.weights = formats.weights;
    record.init_format = formats.init;
    std::copy(formats.moments, formats.moments + kMoments, record.formats);
    group_of.push_back(record.group);
  }
  const CudaDevice device(decision_);
  // Until a step says otherwise.
  clip_.captured = true;
  DeviceChunkTable table = cut_for_device(tensors_.numels());
  num_chunks_ = static_cast<int64_t>(table.chunks.size());
  put(device_chunks_, std::move(table.chunks));
  put(device_begin_, std::move(table.begin));
  put(device_group_of_, std::move(group_of));
  // Which part of a tensor it is, in the upper half, keys random bits only.
  std::vector<int64_t> of_tensors = numbers_;
  for (int64_t& number : of_tensors) {
    number &= 0xffffffff;
  }
  put(device_numbers_, std::move(of_tensors));
  put(device_fresh_, std::move(fresh));
}

bool CudaUpdatePlan::keep(std::optional<Tensor> copied) {
  const bool is_copied = copied.has_value();
  uploads_ += is_copied;
  if (is_copied && clip_.captured) {
    kept_.push_back(std::move(*copied));
  }
  return is_copied;
}

void CudaUpdatePlan::point_at(DeviceTensor& record, Slot slot, void* data) {
  if (slot == kStep) {
    record.count = static_cast<float*>(data);
  } else if (is_scale(slot)) {
    record.scales[slot - kFirstScale] = static_cast<float*>(data);
  } else if (is_moment(slot)) {
    record.moments[slot] = data;
  } else if (slot == kExtra) {
    record.extra = data;
  } else {
    record.init = data;
  }
}

bool CudaUpdatePlan::set_gradients(const std::vector<TensorView>& grads, std::vector<int64_t>& to_be_copied) {
  return look_at_all(tensors_, grads.size(), false, fits_, to_be_copied, [&](size_t i) {
    DeviceTensor& record = records_[i];
    return tensors_.look_at(
        i, grads[i], false, [&](void* data) { record.param = data; },
        [&](Slot slot, void* data) { point_at(record, slot, data); },
        [&](const void* data, FloatFormat format) { grads_[i] = {data, static_cast<int64_t>(format)}; });
  });
}

// In device memory, so that a captured graph that is replayed takes the numbers of its last refresh; they are copied
// only when a schedule has changed them.
void CudaUpdatePlan::put_groups(const std::vector<RuleHyper>& groups, const std::vector<const float*>& lrs) {
  std::vector<Rule> rules;
  std::vector<DeviceGroup> entries(groups.size());
  pulled_ = false;
  for (size_t g = 0; g < groups.size(); ++g) {
    pulled_ = pulled_ || groups[g].decay_to_init != 0.0;
    rules.push_back(groups[g].rule);
    // Padding is compared, too.
    std::memset(static_cast<void*>(&entries[g]), 0, sizeof(DeviceGroup));
    entries[g].hyper.rule = groups[g].rule;
    std::copy(groups[g].numbers, groups[g].numbers + kHyperNumbers, entries[g].hyper.numbers);
    entries[g].hyper.decay_to_init = groups[g].decay_to_init;
    entries[g].lr = lrs.empty() ? nullptr : lrs[g];
    const RuleInfo& info = kRuleInfo[static_cast<int>(groups[g].rule)];
    for (int k = 0; k < kMoments; ++k) {
      entries[g].has |= info.has[k] << k;
      entries[g].is_signed |= info.is_signed[k] << k;
    }
    entries[g].decoupled = info.decoupled_decay;
    entries[g].maximize = groups[g].maximize();
  }
  if (rules != rules_) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      tensors_.check_state(i, kRuleInfo[static_cast<int>(rules.at(tensors_.group(i)))]);
    }
    rules_ = std::move(rules);
  }
  const bool copied = put(device_groups_, std::move(entries));
  numbers_in_graph_ = numbers_in_graph_ || (copied && clip_.captured);
}

void CudaUpdatePlan::refresh(const std::vector<RuleHyper>& groups) {
  STD_TORCH_CHECK(!numbers_in_graph_,
                  "the captured graph brings its own hyperparameters in every replay, because the step before the "
                  "capture had others or there was none; take one with the same numbers, then capture");
  const CudaDevice device(decision_);
  clip_.captured = false;
  put_groups(groups, lrs_);
}

void CudaUpdatePlan::put_rows() {
  std::vector<DeviceFloats> params;
  std::vector<DeviceRows> shapes;
  std::vector<int64_t> rows, lengths, begin{0};
  for (size_t i = 0; i < tensors_.size(); ++i) {
    params.push_back({records_[i].param, static_cast<int64_t>(float_format(records_[i].weights))});
    rows.push_back(tensors_.num_rows(i));
    lengths.push_back(tensors_.row_length(i));
    shapes.push_back({lengths.back(), begin.back()});
    records_[i].first_row = begin.back();
    begin.push_back(begin.back() + rows.back());
  }
  row_factors_.reserve(begin.back(), decision_);
  terms_.reserve(begin.back(), decision_);
  put(device_params_, std::move(params), captured_);
  RowTasks tasks = cut_into_row_tasks(rows, lengths);
  row_pieces_.reserve(tasks.num_pieces, decision_);
  put(rows_done_, std::vector<uint32_t>(tasks.num_cut_rows, 0));
  put(device_tasks_, std::move(tasks.tasks));
  put(device_cut_rows_, std::move(tasks.cut));
  put(device_rows_, std::move(shapes));
  put(device_row_begin_, std::move(begin));
}

// A captured step copies its addresses in every replay, and the steps after it copy theirs: either may come next.
void CudaUpdatePlan::put_tables() {
  put(device_grads_, grads_, captured_);
  put(device_records_, records_, captured_);
}

// All but the counts: a step without norms must not heed what the last one with norms found.
void CudaUpdatePlan::reset_decision() {
  StepDecision plain{};
  plain.smallest = 1.0;
  plain.bad = -1;
  plain.coef = 1.0f;
  constexpr int64_t kCounts = offsetof(StepDecision, total_norm) / 8, kWords = sizeof(StepDecision) / 8;
  Tensor words = torch::stable::view(decision_, {kWords});
  keep(copy_to_device(reinterpret_cast<const int64_t*>(&plain) + kCounts,
                      torch::stable::narrow(words, 0, kCounts, kWords - kCounts)));
}

DeviceFloatsTable CudaUpdatePlan::grads_table() const {
  return {device_chunks_.data(), num_chunks_, device_grads_.data(), device_begin_.data(),
          static_cast<int64_t>(tensors_.size())};
}

void CudaUpdatePlan::sum_squares(cudaStream_t stream) {
  if (!clip_.by_rows()) {
    terms_.reserve(num_chunks_, decision_);
    check_launch(launch_sum_of_squares(grads_table(), clip_.clip_value, terms_.data(), stream), "update_");
    return;
  }
  const RowNormsWork work{device_tasks_.data(),
                          device_tasks_.size(),
                          device_rows_.data(),
                          device_grads_.data(),
                          device_params_.data(),
                          clip_.clip_value,
                          clip_.agc,
                          kAgcEps,
                          terms_.data(),
                          row_factors_.data(),
                          device_cut_rows_.data(),
                          row_pieces_.data(),
                          rows_done_.data()};
  check_launch(launch_row_norms(work, stream), "update_");
}

void CudaUpdatePlan::decide(DecisionStage stage, const Others& others, cudaStream_t stream) {
  const std::optional<DeviceParts>& parts = others.devices;
  const int64_t count = static_cast<int64_t>(tensors_.size()), groups = device_groups_.size();
  const int64_t room = decision_scratch(count, groups);
  scratch_.reserve(room + part_size(groups), decision_);
  const bool by_rows = clip_.by_rows();
  if (!clip_.by_one_factor()) {
    scales_.reserve(count, decision_);
  }
  DecisionWork work{};
  work.terms = terms_.data();
  work.begin = by_rows ? device_row_begin_.data() : device_begin_.data();
  work.num_tensors = count;
  work.factors = by_rows ? row_factors_.data() : nullptr;
  work.groups = device_group_of_.data();
  work.numbers = device_numbers_.data();
  work.num_groups = groups;
  work.tensor_limit = clip_.tensor;
  work.group_limit = clip_.group;
  work.global_limit = clip_.global;
  work.refuses = clip_.refuses;
  work.sums = scratch_.data();
  if (others.processes.has_value()) {
    STD_TORCH_CHECK(others.processes->numel() == 2 * count, "sums must have ", 2 * count, " numbers, got ",
                    others.processes->numel());
    work.sums = static_cast<double*>(others.processes->mutable_data_ptr());
  }
  work.group_factors = scratch_.data() + 2 * count;
  work.parts = parts.has_value() ? static_cast<double*>(parts->parts.mutable_data_ptr()) : scratch_.data() + room;
  work.devices = parts.has_value() ? parts->devices : 1;
  work.device = parts.has_value() ? parts->device : 0;
  work.scales = clip_.by_one_factor() ? nullptr : scales_.data();
  work.decision = decision();
  check_launch(launch_decision(work, stage, stream), "update_");
}

void CudaUpdatePlan::take_norms(const std::vector<RuleHyper>& groups, const std::vector<const float*>& lrs,
                                const ClipOptions& clip, const Others& others) {
  const CudaDevice device(decision_);
  clip_ = clip;
  captured_ = captured_ || clip.captured;
  lrs_ = lrs;
  put_groups(groups, lrs);
  if (clip_.by_rows()) {
    put_rows();
  }
  put_tables();
  if (!clip_.takes_norm) {
    if (!fresh_decision_) {
      reset_decision();
    }
    fresh_decision_ = true;
    return;
  }
  fresh_decision_ = false;
  sum_squares(device.stream());
  const DecisionStage stage = others.processes.has_value() ? DecisionStage::sums
                              : others.devices.has_value() ? DecisionStage::part
                                                           : DecisionStage::both;
  decide(stage, others, device.stream());
}

void CudaUpdatePlan::update(const Others& others) {
  const CudaDevice device(decision_);
  if (clip_.takes_norm && others.processes.has_value()) {
    decide(DecisionStage::after_sums, others, device.stream());
  } else if (clip_.takes_norm && others.devices.has_value()) {
    decide(DecisionStage::rest, others, device.stream());
  }
  launch(&decision()->coef, true, device.stream());
}

std::optional<UpdateLayout> CudaUpdatePlan::layout() const {
  const bool shaped = clip_.clip_value < INFINITY || (clip_.takes_norm && clip_.by_rows());
  std::optional<UpdateLayout> common;
  for (size_t i = 0; i < tensors_.size() && !pulled_ && !shaped; ++i) {
    UpdateLayout of_one{rules_[tensors_.group(i)], records_[i].weights, static_cast<FloatFormat>(grads_[i].format),
                        MomentFormat::none};
    const RuleInfo& info = kRuleInfo[static_cast<int>(of_one.rule)];
    for (int k = 0; k < kMoments; ++k) {
      if (!info.has[k]) {
        continue;
      }
      if (of_one.moments != MomentFormat::none && of_one.moments != records_[i].formats[k]) {
        return std::nullopt;
      }
      of_one.moments = records_[i].formats[k];
    }
    if (common.has_value() && *common != of_one) {
      return std::nullopt;
    }
    common = of_one;
  }
  return common;
}

void CudaUpdatePlan::launch(const float* coef, bool advance, cudaStream_t stream) {
  const bool scaled = clip_.takes_norm && !clip_.by_one_factor();
  const UpdateWork work{device_chunks_.data(),
                        num_chunks_,
                        device_records_.data(),
                        device_grads_.data(),
                        static_cast<int64_t>(tensors_.size()),
                        device_groups_.data(),
                        device_fresh_.data(),
                        decision(),
                        coef,
                        scaled ? scales_.data() : nullptr,
                        clip_.takes_norm && clip_.by_rows() ? row_factors_.data() : nullptr,
                        clip_.clip_value,
                        advance,
                        static_cast<uint64_t>(seed_)};
  check_launch(launch_update(work, layout(), stream), "update_");
}

void CudaUpdatePlan::update_by(const std::vector<RuleHyper>& groups, const float* coef) {
  const CudaDevice device(decision_);
  put_groups(groups, {});
  put_tables();
  reset_decision();
  launch(coef == nullptr ? &decision()->coef : coef, false, device.stream());
}

}  // namespace pyft
