// Loops of the update. Included once for each CPU target, with PYFT_LOOPS, a namespace, PYFT_LOOPS_TARGET, an
// attribute, and for one of them PYFT_LOOPS_AVX2 defined; there is no include guard. A rule works on fp32 numbers:
// those of the tensors themselves where they are fp32, else copies of one block, which stay in the L1 cache.

#include "update_formats.h"

namespace pyft::PYFT_LOOPS {

// Rules, on fp32 numbers.
template <bool kCoupled, bool kAmsgrad>
PYFT_LOOPS_TARGET void adam_loop(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
                                 float* __restrict__ v, float* __restrict__ max_v, int32_t length, float scale,
                                 const RuleStep& step) {
  const AdamStep h = step.adam;
  for (int32_t i = 0; i < length; ++i) {
    float exp_avg = m[i], exp_avg_sq = v[i], max_exp_avg_sq = kAmsgrad ? max_v[i] : 0.0f;
    adam_element<kCoupled, kAmsgrad>(p[i], g[i] * scale, exp_avg, exp_avg_sq, max_exp_avg_sq, h);
    m[i] = exp_avg;
    v[i] = exp_avg_sq;
    if (kAmsgrad) {
      max_v[i] = max_exp_avg_sq;
    }
  }
}

template <SgdKind kKind>
PYFT_LOOPS_TARGET void sgd_loop(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ buffer, float*,
                                float*, int32_t length, float scale, const RuleStep& step) {
  const SgdStep h = step.sgd;
  for (int32_t i = 0; i < length; ++i) {
    float velocity = kKind == SgdKind::plain ? 0.0f : buffer[i];
    sgd_element<kKind>(p[i], g[i] * scale, velocity, h);
    if (kKind != SgdKind::plain) {
      buffer[i] = velocity;
    }
  }
}

template <bool kCentered, bool kMomentum>
PYFT_LOOPS_TARGET void rmsprop_loop(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ square_avg,
                                    float* __restrict__ buffer, float* __restrict__ grad_avg, int32_t length,
                                    float scale, const RuleStep& step) {
  const RmspropStep h = step.rmsprop;
  for (int32_t i = 0; i < length; ++i) {
    float v = square_avg[i], velocity = kMomentum ? buffer[i] : 0.0f, mean = kCentered ? grad_avg[i] : 0.0f;
    rmsprop_element<kCentered, kMomentum>(p[i], g[i] * scale, v, velocity, mean, h);
    square_avg[i] = v;
    if (kMomentum) {
      buffer[i] = velocity;
    }
    if (kCentered) {
      grad_avg[i] = mean;
    }
  }
}

PYFT_LOOPS_TARGET inline void adagrad_loop(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ sum,
                                           float*, float*, int32_t length, float scale, const RuleStep& step) {
  const AdagradStep h = step.adagrad;
  for (int32_t i = 0; i < length; ++i) {
    adagrad_element(p[i], g[i] * scale, sum[i], h);
  }
}

PYFT_LOOPS_TARGET inline void lion_loop(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
                                        float*, float*, int32_t length, float scale, const RuleStep& step) {
  const LionStep h = step.lion;
  for (int32_t i = 0; i < length; ++i) {
    lion_element(p[i], g[i] * scale, m[i], h);
  }
}

// In the order of Rule.
constexpr RuleLoop kRuleLoops[kRules] = {
    adam_loop<false, false>,
    adam_loop<false, true>,
    adam_loop<true, false>,
    adam_loop<true, true>,
    sgd_loop<SgdKind::plain>,
    sgd_loop<SgdKind::momentum>,
    sgd_loop<SgdKind::nesterov>,
    rmsprop_loop<false, false>,
    rmsprop_loop<true, false>,
    rmsprop_loop<false, true>,
    rmsprop_loop<true, true>,
    adagrad_loop,
    lion_loop,
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
                                       t.step);
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
PYFT_LOOPS_TARGET inline void update_plain(const TensorUpdate& t, int64_t begin, int64_t length) {
  const auto at = [begin](void* data) { return data == nullptr ? nullptr : static_cast<float*>(data) + begin; };
  kRuleLoops[static_cast<int>(t.rule)](at(t.param), static_cast<const float*>(t.grad.data) + begin,
                                       at(t.moments[0].data), at(t.moments[1].data), at(t.moments[2].data),
                                       static_cast<int32_t>(length), t.grad_scale, t.step);
}

PYFT_LOOPS_TARGET inline void update_range(const TensorUpdate& t, bool plain, int64_t begin, int64_t length) {
  if (plain) {
    return update_plain(t, begin, length);
  }
  for (int64_t i = 0; i < length; i += kBlock) {
    update_block(t, begin + i, length - i < kBlock ? length - i : kBlock);
  }
}

// Loads what is next beside its last elements.
PYFT_LOOPS_TARGET inline void update_and_fetch(const TensorUpdate& t, bool plain, int64_t begin, int64_t length,
                                               const Ahead& next) {
  const int64_t piece = plain ? kPiece : kBlock;
  const int64_t before = length > next.length ? (length - next.length) / kBlock * kBlock : 0;
  update_range(t, plain, begin, before);
  int64_t i = before;
  for (; i < length && i - before < next.length; i += piece) {
    next.fetch(i - before, i - before + piece);
    update_range(t, plain, begin + i, length - i < piece ? length - i : piece);
  }
  next.fetch(i - before, next.length);
  if (i < length) {
    update_range(t, plain, begin + i, length - i);
  }
}

// Two places of a long chunk in fp32 may be worked on in turn: twice as many cache lines are under way, which one core
// of some kinds needs to keep the memory busy. Blocks of narrower formats take longer than their memory, and change
// places too seldom for the hardware to see what comes next: one place after the other is a quarter faster with 8-bit
// moments.
PYFT_LOOPS_TARGET void update_chunk(const TensorUpdate& t, int64_t offset, int64_t length, const Ahead& next) {
  const bool plain = is_plain(t);
  if (length < kTwoStreams || !plain || !works_on_two_places()) {
    return update_and_fetch(t, plain, offset, length, next);
  }
  next.fetch(0, next.length);
  const int64_t second = length / 2 / kBlock * kBlock + kSkew;
  int64_t i = 0;
  for (; i + kBlock <= length - second; i += kBlock) {
    update_range(t, plain, offset + i, kBlock);
    update_range(t, plain, offset + second + i, kBlock);
  }
  update_range(t, plain, offset + i, second - i);
  update_range(t, plain, offset + second + i, length - second - i);
}

}  // namespace pyft::PYFT_LOOPS

#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
