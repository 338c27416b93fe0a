// What a step does to the gradients, decided on the GPU from the sums of their chunks before anything is written: clip
// factors, and whether to go on at all. The same as pyft/optim/decide.py on the CPU. No torch header.
#pragma once

#include "cuda_launch.h"

namespace pyft {

// In device memory; zeros at first, but for `coef` and `smallest`, which are 1, and `bad`, which is -1.
struct StepDecision {
  // How many steps wrote nothing, and how many did, so far.
  int64_t skipped, applied;
  // Of all gradients, after the clamp and before clipping.
  double total_norm;
  // The smallest factor that any gradient, or a row of it, had.
  double smallest;
  // The first tensor, by its number, whose gradient is not finite; -1: none.
  int64_t bad;
  // Whether this step writes nothing.
  int64_t skip;
  // Of all gradients, where each has not its own.
  float coef;
  // Blocks of the update that are done.
  uint32_t done;
};

// A device's part of the sums over several: high and low part of the sum of squares before tensors and rows are
// clipped, of that after it, and `bad` or infinity; then the two parts of the latter sum for each group.
constexpr int kPartNumbers = 5;
PYFT_HOST_DEVICE int64_t part_size(int64_t num_groups) { return kPartNumbers + 2 * num_groups; }

struct DecisionWork {
  // Terms begin[t] .. begin[t + 1] - 1 are sums of squares of parts of tensor t.
  const double* terms;
  const int64_t* begin;
  int64_t num_tensors;
  // The factor that each of these parts has already, or null.
  const float* factors;
  // The group and the number of each tensor.
  const int32_t* groups;
  const int64_t* numbers;
  int64_t num_groups;
  // INFINITY: no such limit.
  double tensor_limit, group_limit, global_limit;
  // Whether a step with a gradient that is not finite is refused.
  bool refuses;
  // 2 * num_tensors and num_groups numbers to work in.
  double *sums, *group_factors;
  // A part for each device, and the place of this device's.
  double* parts;
  int64_t devices, device;
  // A factor for each tensor, or null where all have one.
  float* scales;
  StepDecision* decision;
};

inline int64_t decision_scratch(int64_t num_tensors, int64_t num_groups) { return 2 * num_tensors + num_groups; }

// `part` fills this device's part, and `rest` decides once those of all devices are there. `sums` takes the sums of
// squares of this process's parts of tensors, and `after_sums` decides once they were added over all processes.
enum class DecisionStage { part, rest, both, sums, after_sums };

cudaError_t launch_decision(const DecisionWork& work, DecisionStage stage, cudaStream_t stream);

}  // namespace pyft
