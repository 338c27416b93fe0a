// The step plan of a GPU: tables in its memory are kept between steps and copied there when they change, and a step is
// a few launches that wait for nothing.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda_table.h"
#include "owned_handles.h"
#include "row_norms_cuda.h"
#include "step_decision_cuda.h"
#include "update_cuda.h"
#include "update_state.h"

namespace pyft {

// What a step does to the gradients. INFINITY: no such limit.
struct ClipOptions {
  float clip_value = INFINITY;
  double agc = INFINITY, tensor = INFINITY, group = INFINITY, global = INFINITY;
  // Whether a step with gradients that are not finite is refused, and whether norms are taken at all.
  bool refuses = false, takes_norm = false;
  // Whether the step is captured in a graph.
  bool captured = false;

  bool by_rows() const { return agc < INFINITY; }
  bool by_one_factor() const { return !by_rows() && !(tensor < INFINITY) && !(group < INFINITY); }
};

// Sums over the parameters of several devices: room for a part of each on this one, float64, and its place among them.
struct DeviceParts {
  torch::stable::Tensor parts;
  int64_t devices, device;
};

// Whose sums belong to those of a device: other devices of this process, or other processes, or none. For processes,
// room for two sums of each tensor, float64; the first half is to be added over them between the halves of a step.
struct Others {
  std::optional<DeviceParts> devices;
  std::optional<torch::stable::Tensor> processes;
};

// Takes dense fp32, bf16 and fp16 parameters on one GPU whose state has their layout; throws for others.
class CudaUpdatePlan {
 public:
  // decision: a StepDecision, which the steps before may have written to.
  CudaUpdatePlan(PlanInput input, torch::stable::Tensor decision);

  // As that of UpdatePlan.
  bool set_gradients(const std::vector<TensorView>& grads, std::vector<int64_t>& to_be_copied);
  bool has_rows() const { return tensors_.has_rows(); }

  // The first half of a step: norms, and unless `others` are waited for, the decision. `lrs`: learning rates that are
  // in device memory themselves, one for each group, or null.
  void take_norms(const std::vector<RuleHyper>& groups, const std::vector<const float*>& lrs, const ClipOptions& clip,
                  const Others& others);
  // The second half: the decision, if others were waited for, and the update.
  void update(const Others& others);

  // New numbers of groups for replays of a captured step: by the current stream, in place. Learning rates in device
  // memory stay. Throws where replays would bring the old ones back.
  void refresh(const std::vector<RuleHyper>& groups);

  // The update alone, by a factor in device memory, or null for 1. Counters hold the number of this step.
  void update_by(const std::vector<RuleHyper>& groups, const float* coef);

  // Copies to the device so far.
  int64_t uploads() const { return uploads_; }

 private:
  void point_at(DeviceTensor& record, Slot slot, void* data);
  void put_groups(const std::vector<RuleHyper>& groups, const std::vector<const float*>& lrs);
  void put_rows();
  void put_tables();
  void reset_decision();
  void sum_squares(cudaStream_t stream);
  void decide(DecisionStage stage, const Others& others, cudaStream_t stream);
  std::optional<UpdateLayout> layout() const;
  void launch(const float* coef, bool advance, cudaStream_t stream);

  template <class T>
  bool put(DeviceTable<T>& table, std::vector<T> values, bool anyway = false) {
    return keep(table.put(std::move(values), decision_, anyway));
  }
  // Whether there is a copy.
  bool keep(std::optional<torch::stable::Tensor> copied);
  StepDecision* decision() const { return static_cast<StepDecision*>(decision_.mutable_data_ptr()); }
  DeviceFloatsTable grads_table() const;

  torch::stable::Tensor decision_;
  int64_t seed_;
  std::vector<int64_t> numbers_;
  PlanTensors tensors_;
  std::vector<DeviceTensor> records_;
  std::vector<DeviceFloats> grads_;
  std::vector<Rule> rules_;
  // Whether any group is pulled toward its first values.
  bool pulled_ = false;
  std::vector<Fit> fits_;
  ClipOptions clip_;
  bool fresh_decision_ = false;
  // Whether any step was captured, and whether one copies the numbers of groups to the device in every replay.
  bool captured_ = false, numbers_in_graph_ = false;
  std::vector<const float*> lrs_;
  int64_t uploads_ = 0, num_chunks_ = 0;
  // Host memory that graphs copy from in every replay.
  std::vector<torch::stable::Tensor> kept_;

  DeviceTable<DeviceChunk> device_chunks_;
  DeviceTable<int64_t> device_begin_, device_numbers_, device_row_begin_;
  DeviceTable<int32_t> device_group_of_;
  DeviceTable<uint8_t> device_fresh_;
  DeviceTable<DeviceTensor> device_records_;
  DeviceTable<DeviceFloats> device_grads_, device_params_;
  DeviceTable<DeviceGroup> device_groups_;
  DeviceTable<RowTask> device_tasks_;
  DeviceTable<DeviceRows> device_rows_;
  DeviceTable<DeviceCutRows> device_cut_rows_;
  // Sums of pieces of long rows, and how many of each row are there.
  DeviceTable<RowSums> row_pieces_;
  DeviceTable<uint32_t> rows_done_;
  // Sums of squares of chunks or rows; what the decision works in; factors of rows and of tensors.
  DeviceTable<double> terms_, scratch_;
  DeviceTable<float> row_factors_, scales_;
};

}  // namespace pyft
