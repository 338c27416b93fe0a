// Attention of short sequences: for each sample and head all weights stay in a cache.
#pragma once

#include <cstdint>

namespace pyft {

// One (batch, heads, rows, columns) operand; the entries of a row lie side by side.
template <class Element>
struct Strided {
  Element* data;
  int64_t batch, head, row;

  Element* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// What is added to the scores: bool (false forbids) or fp32, broadcast by strides of 0; or null.
struct AttentionMask {
  const void* data;
  bool is_bool;
  int64_t batch, head, row, column;
};

// weights = softmax(scale * query key^T + mask), with dropout where `keep` is not null: one bit for each weight in the
// order (batch, heads, queries, keys), and kept weights times `on`. out = weights value.
struct ShortAttention {
  Strided<const float> query, key, value;
  AttentionMask mask;
  const uint8_t* keep;
  float on, scale;
  bool causal;
  // `weights` counts those of all samples and heads.
  int64_t heads, queries, keys, width, weights;
  Strided<float> out;
  // (batch, heads, queries): logarithm of the sum of exponentials of each row, infinite where all is forbidden; or
  // null.
  float* log_sums;
};

// From the gradient of the output, which itself is not needed.
struct ShortAttentionGradient {
  ShortAttention forward;
  Strided<const float> grad;
  Strided<float> grad_query, grad_key, grad_value;
};

// Floats of scratch memory for one thread.
int64_t short_attention_scratch(int64_t queries, int64_t keys, int64_t width, bool backward);

// Pairs of sample and head from `first` to `last`, counted as sample * heads + head.
void short_attention_cpu(const ShortAttention& work, int64_t first, int64_t last, float* scratch);
void short_attention_backward_cpu(const ShortAttentionGradient& work, int64_t first, int64_t last, float* scratch);

}  // namespace pyft
