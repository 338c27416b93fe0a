// Loops of the update. Included once for each CPU target, with PYFT_LOOPS, a namespace, PYFT_LOOPS_TARGET, an
// attribute, and for one of them PYFT_LOOPS_AVX2 defined; there is no include guard. A rule works on fp32 numbers:
// those of the tensors themselves where they are fp32, else copies of one block, which stay in the L1 cache.

#include "update_formats.h"
#ifdef PYFT_LOOPS_AVX2
#include "adam_blocks_avx2.h"
#endif

namespace pyft::PYFT_LOOPS {

// Elements begin .. end - 1 of a rule, on fp32 numbers.
template <Rule kRule>
PYFT_LOOPS_TARGET inline void update_elements(float* __restrict__ p, const float* __restrict__ g,
                                              float* __restrict__ first, float* __restrict__ second,
                                              float* __restrict__ third, int32_t begin, int32_t end, float scale,
                                              const RuleStep& step) {
  constexpr const bool* kHas = kRuleInfo[static_cast<int>(kRule)].has;
  for (int32_t i = begin; i < end; ++i) {
    float a = kHas[0] ? first[i] : 0.0f, b = kHas[1] ? second[i] : 0.0f, c = kHas[2] ? third[i] : 0.0f;
    update_element<kRule>(p[i], g[i] * scale, a, b, c, step);
    if (kHas[0]) {
      first[i] = a;
    }
    if (kHas[1]) {
      second[i] = b;
    }
    if (kHas[2]) {
      third[i] = c;
    }
  }
}

template <Rule kRule>
PYFT_LOOPS_TARGET void rule_loop(float* p, const float* g, float* first, float* second, float* third, int32_t length,
                                 float scale, const RuleStep& step, const Ahead& next) {
  const RuleStep h = step;
  int32_t i = 0;
  for (; i + kPiece <= length && i < next.length; i += kPiece) {
    next.fetch(i, i + kPiece);
    update_elements<kRule>(p, g, first, second, third, i, i + kPiece, scale, h);
  }
  update_elements<kRule>(p, g, first, second, third, i, length, scale, h);
  next.fetch(i, next.length);
}

// In the order of Rule.
constexpr RuleLoop kRuleLoops[kRules] = {
    rule_loop<Rule::adamw>,
    rule_loop<Rule::adamw_amsgrad>,
    rule_loop<Rule::adam>,
    rule_loop<Rule::adam_amsgrad>,
    rule_loop<Rule::sgd>,
    rule_loop<Rule::sgd_momentum>,
    rule_loop<Rule::sgd_nesterov>,
    rule_loop<Rule::rmsprop>,
    rule_loop<Rule::rmsprop_centered>,
    rule_loop<Rule::rmsprop_momentum>,
    rule_loop<Rule::rmsprop_centered_momentum>,
    rule_loop<Rule::adagrad>,
    rule_loop<Rule::lion>,
};

PYFT_LOOPS_TARGET inline void scale_rows(const TensorUpdate& t, int64_t begin, float* __restrict__ g, int64_t length) {
  for (int64_t i = 0; i < length;) {
    const int64_t row = (begin + i) / t.row_length;
    const int64_t left = (row + 1) * t.row_length - begin - i;
    const int64_t end = i + (left < length - i ? left : length - i);
    const float factor = t.row_factors[row];
    for (; i < end; ++i) {
      g[i] *= factor;
    }
  }
}

// The gradient in fp32, clamped and clipped by rows: the tensor itself, or its value in `buffer`.
PYFT_LOOPS_TARGET inline const float* load_grad(const TensorUpdate& t, int64_t begin, float* __restrict__ buffer,
                                                int64_t length) {
  const bool clamped = t.clip_value < INFINITY;
  if (t.grad.format == FloatFormat::fp32 && !clamped && t.row_factors == nullptr && t.init_pull == 0.0f) {
    return static_cast<const float*>(t.grad.data) + begin;
  }
  widen(t.grad, begin, buffer, length);
  if (clamped) {
    const float limit = t.clip_value;
    for (int64_t i = 0; i < length; ++i) {
      const float low = buffer[i] < -limit ? -limit : buffer[i];
      buffer[i] = low > limit ? limit : low;
    }
  }
  if (t.row_factors != nullptr) {
    scale_rows(t, begin, buffer, length);
  }
  return buffer;
}

// The pull toward the first value, as the parameter is before the rule: what is to be added to a gradient that is
// scaled already, or taken from the parameter after the rule.
PYFT_LOOPS_TARGET inline void pull_to_init(const TensorUpdate& t, int64_t begin, const float* __restrict__ p,
                                           float* __restrict__ pull, int64_t length) {
  widen(t.init, begin, pull, length);
  const float factor = t.init_pull;
  for (int64_t i = 0; i < length; ++i) {
    pull[i] = factor * (p[i] - pull[i]);
  }
}

// At most kBlock elements, of any format.
PYFT_LOOPS_TARGET inline void update_block(const TensorUpdate& t, int64_t begin, int64_t length) {
  alignas(64) float p_buffer[kBlock], g_buffer[kBlock], moment_buffer[kMoments][kBlock];
  float* p = load_param(t, begin, p_buffer, length);
  const float* g = load_grad(t, begin, g_buffer, length);
  float* moments[kMoments];
  for (int k = 0; k < kMoments; ++k) {
    moments[k] = load_moment(t.moments[k], begin, moment_buffer[k], length);
  }
  const bool decoupled = kRuleInfo[static_cast<int>(t.rule)].decoupled_decay;
  float scale = t.grad_scale;
  alignas(64) float pull[kBlock];
  if (t.init_pull != 0.0f) {
    pull_to_init(t, begin, p, pull, length);
    if (!decoupled) {
      for (int64_t i = 0; i < length; ++i) {
        g_buffer[i] = g_buffer[i] * scale + pull[i];
      }
      scale = 1.0f;
    }
  }
  kRuleLoops[static_cast<int>(t.rule)](p, g, moments[0], moments[1], moments[2], static_cast<int32_t>(length), scale,
                                       t.step, kNothing);
  if (t.init_pull != 0.0f && decoupled) {
    for (int64_t i = 0; i < length; ++i) {
      p[i] -= pull[i];
    }
  }
  store_param(t, begin, p, length);
  for (int k = 0; k < kMoments; ++k) {
    if (moments[k] == moment_buffer[k]) {
      store_moment(t, k, begin, moments[k], static_cast<int32_t>(length));
    }
  }
}

// Any number of elements, all in fp32, with nothing to be done to the gradient but to scale it.
PYFT_LOOPS_TARGET inline void update_plain(const TensorUpdate& t, int64_t begin, int64_t length, const Ahead& next) {
  const auto at = [begin](void* data) { return data == nullptr ? nullptr : static_cast<float*>(data) + begin; };
  kRuleLoops[static_cast<int>(t.rule)](at(t.param), static_cast<const float*>(t.grad.data) + begin,
                                       at(t.moments[0].data), at(t.moments[1].data), at(t.moments[2].data),
                                       static_cast<int32_t>(length), t.grad_scale, t.step, next);
}

PYFT_LOOPS_TARGET inline void update_range(const TensorUpdate& t, bool plain, int64_t begin, int64_t length,
                                           const Ahead& next) {
  if (plain) {
    return update_plain(t, begin, length, next);
  }
  for (int64_t i = 0; i < length; i += kBlock) {
    next.fetch(i, i + kBlock);
    update_block(t, begin + i, length - i < kBlock ? length - i : kBlock);
  }
  next.fetch(length, next.length);
}

// What is next is loaded beside the last elements.
PYFT_LOOPS_TARGET inline void update_one_place(const TensorUpdate& t, bool plain, int64_t begin, int64_t length,
                                               const Ahead& next) {
  const int64_t before = length > next.length ? (length - next.length) / kBlock * kBlock : 0;
#ifdef PYFT_LOOPS_AVX2
  const int64_t whole = length / kBlock * kBlock;
  const AdamRun run = whole > 0 ? adam_run_of(t) : nullptr;
  if (run != nullptr) {
    run(t, begin, whole, next, before);
    if (whole < length) {
      update_block(t, begin + whole, length - whole);
    }
    return next.fetch(whole - before, next.length);
  }
#endif
  if (before > 0) {
    update_range(t, plain, begin, before, kNothing);
  }
  update_range(t, plain, begin + before, length - before, next);
}

// Two places of a long chunk in fp32 may be worked on in turn: twice as many cache lines are under way, which one core
// of some kinds needs to keep the memory busy. Blocks of narrower formats take longer than their memory, and change
// places too seldom for the hardware to see what comes next: one place after the other is a quarter faster with 8-bit
// moments.
PYFT_LOOPS_TARGET void update_chunk(const TensorUpdate& t, int64_t offset, int64_t length, const Ahead& next) {
  const bool plain = is_plain(t);
  if (length < kTwoStreams || !plain || !works_on_two_places()) {
    return update_one_place(t, plain, offset, length, next);
  }
  next.fetch(0, next.length);
  const int64_t second = length / 2 / kBlock * kBlock + kSkew;
  int64_t i = 0;
  for (; i + kBlock <= length - second; i += kBlock) {
    update_range(t, plain, offset + i, kBlock, kNothing);
    update_range(t, plain, offset + second + i, kBlock, kNothing);
  }
  update_range(t, plain, offset + i, second - i, kNothing);
  update_range(t, plain, offset + second + i, length - second - i, kNothing);
}

}  // namespace pyft::PYFT_LOOPS

#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
