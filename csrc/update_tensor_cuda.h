// One tensor of an update on a GPU: its record in shared memory, and what all its elements have in common in this step.
#pragma once

#include <cstddef>

#include "clip_grads_math.h"
#include "four_elements_cuda.h"
#include "update_cuda.h"

namespace pyft {

#ifdef PYFT_SITE

constexpr int kRecordWords = sizeof(DeviceTensor) / sizeof(uint64_t);
static_assert(kRecordWords * sizeof(uint64_t) == sizeof(DeviceTensor));

// A DeviceTensor in shared memory, read where it is used: in registers it would halve the number of warps.
template <class Words>
struct SharedTensor {
  Words words;

  template <class T>
  __device__ __forceinline__ T* pointer(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(static_cast<uint64_t>(words[offset / 8])));
  }
  template <class T>
  __device__ __forceinline__ T number(size_t offset) const {
    const uint64_t word = words[offset / 8];
    return static_cast<T>(static_cast<int64_t>(word << (64 - 8 * (offset % 8 + sizeof(T)))) >> (64 - 8 * sizeof(T)));
  }

  __device__ __forceinline__ void* param() const { return pointer<void>(offsetof(DeviceTensor, param)); }
  __device__ __forceinline__ void* extra() const { return pointer<void>(offsetof(DeviceTensor, extra)); }
  __device__ __forceinline__ void* init() const { return pointer<void>(offsetof(DeviceTensor, init)); }
  __device__ __forceinline__ void* moment(int k) const {
    return pointer<void>(offsetof(DeviceTensor, moments) + 8 * k);
  }
  __device__ __forceinline__ float* scales(int k) const {
    return pointer<float>(offsetof(DeviceTensor, scales) + 8 * k);
  }
  __device__ __forceinline__ float* count() const { return pointer<float>(offsetof(DeviceTensor, count)); }
  __device__ __forceinline__ uint64_t key_number() const { return words[offsetof(DeviceTensor, number) / 8]; }
  __device__ __forceinline__ int64_t row_length() const { return number<int64_t>(offsetof(DeviceTensor, row_length)); }
  __device__ __forceinline__ int64_t first_row() const { return number<int64_t>(offsetof(DeviceTensor, first_row)); }
  __device__ __forceinline__ int32_t group() const { return number<int32_t>(offsetof(DeviceTensor, group)); }
  __device__ __forceinline__ WeightFormat weights() const {
    return static_cast<WeightFormat>(number<int8_t>(offsetof(DeviceTensor, weights)));
  }
  __device__ __forceinline__ FloatFormat init_format() const {
    return static_cast<FloatFormat>(number<int8_t>(offsetof(DeviceTensor, init_format)));
  }
  __device__ __forceinline__ MomentFormat format(int k) const {
    return static_cast<MomentFormat>(number<int8_t>(offsetof(DeviceTensor, formats) + k));
  }
};

constexpr int kStepFloats = sizeof(RuleStep) / sizeof(float);
struct StepFloats {
  float at[kStepFloats];
};
static_assert(sizeof(StepFloats) == sizeof(RuleStep));

// What all elements of a tensor have in common in this step.
struct Constants {
  RuleStep step;
  Rule rule;
  uint32_t moments, signs;
  bool decoupled;
  uint32_t key;
  float grad_scale, init_pull, clip_value;
  const float* row_factors;
};

// Places of shared memory.
constexpr int kStepAt = 0, kScaleAt = kStepFloats, kPullAt = kScaleAt + 1, kSharedFloats = kPullAt + 1;
constexpr int kRuleAt = 0, kMomentsAt = 1, kSignsAt = 2, kDecoupledAt = 3, kKeyAt = 4, kSharedNumbers = 5;

__device__ __forceinline__ RuleHyper hyper_of(const DeviceGroup* group) {
  RuleHyper hyper;
  hyper.rule = load(&group->hyper.rule);
#pragma unroll
  for (int i = 0; i < kHyperNumbers; ++i) {
    hyper.numbers[i] = load(&group->hyper.numbers[i]);
  }
  hyper.decay_to_init = load(&group->hyper.decay_to_init);
  const float* lr = load(&group->lr);
  if (lr != nullptr) {
    hyper.numbers[0] = load(lr);
  }
  return hyper;
}

// What the constants of a rule were computed for: tensors of a group mostly share them.
struct KnownStep {
  int32_t group = -1;
  double count = -1.0;
  bool first = false;
};

// By one thread of the block.
template <class Words, class Floats, class Numbers>
__device__ __forceinline__ void fill_constants(const UpdateWork& work, const SharedTensor<Words>& t, int32_t tensor,
                                               KnownStep& known, Floats floats, Numbers numbers) {
  const float* counter = t.count();
  const double count = counter == nullptr ? 1.0 : load(counter) + (work.advance ? 1.0 : 0.0);
  const int32_t number_of_group = t.group();
  const bool first = load(work.fresh + tensor) != 0;
  const DeviceGroup* group = work.groups + number_of_group;
  if (number_of_group != known.group || count != known.count || first != known.first) {
    known = {number_of_group, count, first};
    const RuleHyper hyper = hyper_of(group);
    const StepFloats step = __builtin_bit_cast(StepFloats, step_constants(hyper, count, first, WholePower{}));
#pragma unroll
    for (int i = 0; i < kStepFloats; ++i) {
      floats[kStepAt + i] = step.at[i];
    }
    const bool decoupled = load(&group->decoupled) != 0;
    floats[kPullAt] = init_pull(decoupled, hyper.lr(), hyper.decay_to_init);
    numbers[kRuleAt] = static_cast<uint32_t>(hyper.rule);
    numbers[kMomentsAt] = static_cast<uint32_t>(load(&group->has));
    numbers[kSignsAt] = static_cast<uint32_t>(load(&group->is_signed));
    numbers[kDecoupledAt] = decoupled;
  }
  const float scale = work.scales == nullptr ? load(work.coef) : load(work.scales + tensor);
  floats[kScaleAt] = load(&group->maximize) != 0 ? -scale : scale;
  numbers[kKeyAt] = random_key(work.seed, t.key_number(), static_cast<uint64_t>(count));
}

template <class Words, class Floats, class Numbers>
__device__ __forceinline__ Constants read_constants(const UpdateWork& work, const SharedTensor<Words>& t, Floats floats,
                                                    Numbers numbers) {
  StepFloats step;
#pragma unroll
  for (int i = 0; i < kStepFloats; ++i) {
    step.at[i] = floats[kStepAt + i];
  }
  return {__builtin_bit_cast(RuleStep, step),
          static_cast<Rule>(static_cast<int8_t>(numbers[kRuleAt])),
          numbers[kMomentsAt],
          numbers[kSignsAt],
          numbers[kDecoupledAt] != 0,
          numbers[kKeyAt],
          floats[kScaleAt],
          t.init() == nullptr ? 0.0f : static_cast<float>(floats[kPullAt]),
          work.clip_value,
          work.row_factors == nullptr ? nullptr : work.row_factors + t.first_row()};
}

#endif

}  // namespace pyft
