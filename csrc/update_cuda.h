// The update of all tensors on a GPU in one launch: any rule on any storage format. No torch header.
#pragma once

#include <optional>

#include "chunks.h"
#include "cuda_launch.h"
#include "float_formats.h"
#include "grad_norm_cuda.h"
#include "rounding_math.h"
#include "step_decision_cuda.h"
#include "update_rules.h"

namespace pyft {

// One tensor and its state: addresses of first elements in device memory, all of it in the parameter's layout.
struct DeviceTensor {
  void* param;
  // The remainder of bf16_split32 (int16) or the compensation of bf16_kahan (bf16).
  void* extra;
  const void* init;
  void* moments[kMoments];
  // Of moments in 8 bits: one for each kBlock elements.
  float* scales[kMoments];
  // The number of steps so far; null: not counted.
  float* count;
  // Keys the random bits.
  uint64_t number;
  // Rows of the gradient that adaptive clipping scales.
  int64_t row_length, first_row;
  int32_t group;
  FloatFormat init_format;
  WeightFormat weights;
  MomentFormat formats[kMoments];
};

// A parameter group: what Python gives, and what the kernel need not work out.
struct DeviceGroup {
  RuleHyper hyper;
  // In place of hyper.lr() where the learning rate is itself in device memory.
  const float* lr;
  // Bit k of the last two: the rule has moment k, and it may be negative.
  int32_t decoupled, maximize, has, is_signed;
};

struct UpdateWork {
  const DeviceChunk* chunks;
  int64_t num_chunks;
  const DeviceTensor* tensors;
  const DeviceFloats* grads;
  int64_t num_tensors;
  const DeviceGroup* groups;
  // 1: the moments of a tensor were made for this step.
  uint8_t* fresh;
  StepDecision* decision;
  // The factor of all gradients; of each, or null; of each row, or null.
  const float* coef;
  const float* scales;
  const float* row_factors;
  // INFINITY: gradients are not clamped.
  float clip_value;
  // Whether counters are moved on, else they hold the number of this step.
  bool advance;
  uint64_t seed;
};

// How all tensors of a launch are stored, and the rule of all groups: the same everywhere, with no pull toward first
// values, no limit of elements and no factors of rows.
struct UpdateLayout {
  Rule rule;
  WeightFormat weights;
  FloatFormat grads;
  // none: the rule has no moments.
  MomentFormat moments;

  bool operator==(const UpdateLayout&) const = default;
};

// Updates all tensors, unless decision->skip says no; faster where they have one `layout`.
cudaError_t launch_update(const UpdateWork& work, const std::optional<UpdateLayout>& layout, cudaStream_t stream);

// Nothing where no kernel was compiled for the layout.
std::optional<cudaError_t> launch_fixed_update(const UpdateWork& work, const UpdateLayout& layout, cudaStream_t stream);

}  // namespace pyft
