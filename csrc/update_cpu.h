// The update of one chunk of one tensor: any rule on any storage format.
#pragma once

#include <cstdint>

#include "float_formats.h"
#include "rounding_math.h"
#include "update_rules.h"

namespace pyft {

struct Moment {
  void* data = nullptr;
  // int8: one for each kBlock elements.
  float* scale = nullptr;
  MomentFormat format = MomentFormat::none;
  bool is_signed = false;
};

// One tensor and its state: addresses of first elements. All of it has the parameter's layout in memory.
struct TensorUpdate {
  void* param = nullptr;
  // The remainder of bf16_split32 (int16) or the compensation of bf16_kahan (bf16).
  void* extra = nullptr;
  FloatData grad{nullptr, FloatFormat::fp32};
  FloatData init{nullptr, FloatFormat::fp32};
  Moment moments[kMoments];
  WeightFormat weights = WeightFormat::fp32;
  // Factors of adaptive clipping for each row of the gradient, or null.
  const float* row_factors = nullptr;
  int64_t row_length = 1;

  // Of this step.
  Rule rule = Rule::adamw;
  RuleStep step{};
  float grad_scale = 1.0f;
  float clip_value = 0.0f;  // INFINITY: gradients are not clamped
  float init_pull = 0.0f;   // times (param - init): taken from the parameter, or added to the gradient
  uint32_t key = 0;
};

// What will be updated next: it is loaded while the present chunk is computed. A short chunk is over before the
// hardware has seen the pattern of its accesses; and all loads at once would hold the present chunk up.
struct Ahead {
  // Of one array: where it begins, and the bytes of an element.
  struct Array {
    const char* data;
    int64_t size;
  };

  Array arrays[2 + kMoments];
  int count = 0;
  int64_t length = 0;

  // Begins to load elements begin .. end - 1.
  void fetch(int64_t begin, int64_t end) const {
    constexpr int64_t kLine = 64;
    end = end < length ? end : length;
    for (int k = 0; k < count; ++k) {
      const char* line = arrays[k].data + begin * arrays[k].size;
      const char* const behind = arrays[k].data + end * arrays[k].size;
      for (; line + 4 * kLine <= behind; line += 4 * kLine) {
        __builtin_prefetch(line);
        __builtin_prefetch(line + kLine);
        __builtin_prefetch(line + 2 * kLine);
        __builtin_prefetch(line + 3 * kLine);
      }
      for (; line < behind; line += kLine) {
        __builtin_prefetch(line);
      }
    }
  }
};
constexpr Ahead kNothing{};

// Updates `length` elements from `offset` on, which is a multiple of kBlock.
void update_cpu(const TensorUpdate& tensor, int64_t offset, int64_t length, const Ahead& next);

}  // namespace pyft
