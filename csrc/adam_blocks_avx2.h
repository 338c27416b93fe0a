// Adam and AdamW on narrow formats, in AVX2 registers. What waits for a root or a division fills a core's scheduler,
// and nothing else goes on. So one loop works at three places: it takes the roots of 32 elements, divides by those of
// the 32 before, and encodes 8-bit moments of the block before, whose largest size is known by then. The bits of the
// loops in update_loops.h. Included there, once.

#include "adam_formats_avx2.h"

namespace pyft::avx2 {

// adam_element, in two halves.
template <bool kCoupled>
struct AdamVectors {
  __m256 scale, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, eps;

  PYFT_INLINE_AVX2 AdamVectors(const TensorUpdate& t) {
    const AdamStep& h = t.step.adam;
    scale = _mm256_set1_ps(t.grad_scale);
    weight_decay = _mm256_set1_ps(h.weight_decay);
    decay = _mm256_set1_ps(h.decay);
    one_minus_beta1 = _mm256_set1_ps(h.one_minus_beta1);
    beta2 = _mm256_set1_ps(h.beta2);
    one_minus_beta2 = _mm256_set1_ps(h.one_minus_beta2);
    step_size = _mm256_set1_ps(h.step_size);
    inv_sqrt_bias_correction2 = _mm256_set1_ps(h.inv_sqrt_bias_correction2);
    eps = _mm256_set1_ps(h.eps);
  }
  PYFT_INLINE_AVX2 void moments(__m256 grad, __m256 param, __m256& exp_avg, __m256& exp_avg_sq) const {
    const __m256 scaled = _mm256_mul_ps(grad, scale);
    const __m256 g = kCoupled ? _mm256_add_ps(scaled, _mm256_mul_ps(weight_decay, param)) : scaled;
    exp_avg = _mm256_add_ps(exp_avg, _mm256_mul_ps(_mm256_sub_ps(g, exp_avg), one_minus_beta1));
    exp_avg_sq = _mm256_add_ps(_mm256_mul_ps(exp_avg_sq, beta2), _mm256_mul_ps(_mm256_mul_ps(g, g), one_minus_beta2));
  }
  PYFT_INLINE_AVX2 __m256 updated(__m256 param, __m256 exp_avg, __m256 root) const {
    const __m256 denom = _mm256_add_ps(_mm256_mul_ps(root, inv_sqrt_bias_correction2), eps);
    const __m256 kept = kCoupled ? param : _mm256_mul_ps(param, decay);
    return _mm256_sub_ps(kept, _mm256_mul_ps(step_size, _mm256_div_ps(exp_avg, denom)));
  }
};

template <WeightFormat kWeights, class Grad, MomentFormat kMoment, bool kCoupled>
struct AdamBlocks {
  static constexpr Order kOrder =
      kWeights != WeightFormat::fp32 && kMoment == MomentFormat::bf16 ? Order::even_odd : Order::in_turn;
  const AdamVectors<kCoupled> rule;
  WeightBlocks<kWeights, kOrder> param;
  const Grad* const grad;
  MomentBlocks<kMoment, true, kOrder> exp_avg;
  MomentBlocks<kMoment, false, kOrder> exp_avg_sq;
  float* const roots;

  // Of 16 elements: i of the block, which begins at `at`.
  PYFT_INLINE_AVX2 void take_roots(int64_t at, int64_t i) {
    const Two g = load_floats<kOrder>(grad + at + i);
    Two m = exp_avg.load(i), v = exp_avg_sq.load(i), p = {};
    if constexpr (kCoupled) {
      p = param.load(at + i);
    }
    rule.moments(g.first, p.first, m.first, v.first);
    rule.moments(g.second, p.second, m.second, v.second);
    store_two(roots + i, {_mm256_sqrt_ps(v.first), _mm256_sqrt_ps(v.second)});
    exp_avg.store(i, m);
    exp_avg_sq.store(i, v);
  }
  PYFT_INLINE_AVX2 void divide(int64_t at, int64_t i) {
    const Two p = param.load(at + i), m = load_two(exp_avg.kept + i), r = load_two(roots + i);
    param.store(at + i, {rule.updated(p.first, m.first, r.first), rule.updated(p.second, m.second, r.second)});
  }

  PYFT_INLINE_AVX2 void block(int64_t at) {
    constexpr int64_t kTurn = 32;
    param.begin_block(at);
    exp_avg.begin_block();
    exp_avg_sq.begin_block();
    for (int64_t i = 0; i < kBlock; i += kTurn) {
      take_roots(at, i);
      if (i > 0) {
        divide(at, i - kTurn);
      }
      if (at > 0) {
        exp_avg.encode(i);
      }
      take_roots(at, i + 16);
      if (i > 0) {
        divide(at, i - kTurn + 16);
      }
      if (at > 0) {
        exp_avg_sq.encode(i);
      }
    }
    divide(at, kBlock - kTurn);
    divide(at, kBlock - kTurn + 16);
    exp_avg.end_block();
    exp_avg_sq.end_block();
  }
  PYFT_INLINE_AVX2 void encode_last() {
    for (int64_t i = 0; i < kBlock; i += 32) {
      exp_avg.encode(i);
      exp_avg_sq.encode(i);
    }
  }
};

// What is next is fetched beside the elements from `fetched_from` on.
template <WeightFormat kWeights, class Grad, MomentFormat kMoment, bool kCoupled>
PYFT_TARGET_AVX2 void run_adam(const TensorUpdate& t, int64_t begin, int64_t length, const Ahead& next,
                               int64_t fetched_from) {
  alignas(64) float of_exp_avg[2][kBlock], of_exp_avg_sq[2][kBlock], roots[kBlock];
  AdamBlocks<kWeights, Grad, kMoment, kCoupled> blocks{{t},
                                                       {t, begin},
                                                       static_cast<const Grad*>(t.grad.data) + begin,
                                                       {t, 0, begin, of_exp_avg},
                                                       {t, 1, begin, of_exp_avg_sq},
                                                       roots};
  for (int64_t at = 0; at < length; at += kBlock) {
    if (at >= fetched_from) {
      next.fetch(at - fetched_from, at - fetched_from + kBlock);
    }
    blocks.block(at);
  }
  blocks.encode_last();
}

using AdamRun = void (*)(const TensorUpdate& t, int64_t begin, int64_t length, const Ahead& next, int64_t fetched_from);

template <WeightFormat kWeights, class Grad, MomentFormat kMoment>
AdamRun adam_run_of(bool coupled) {
  return coupled ? run_adam<kWeights, Grad, kMoment, true> : run_adam<kWeights, Grad, kMoment, false>;
}

template <WeightFormat kWeights>
AdamRun adam_run_of(MomentFormat moments, bool coupled) {
  switch (moments) {
    case MomentFormat::int8:
      return adam_run_of<kWeights, Bf16, MomentFormat::int8>(coupled);
    case MomentFormat::bf16:
      return adam_run_of<kWeights, Bf16, MomentFormat::bf16>(coupled);
    default:
      return adam_run_of<kWeights, Bf16, MomentFormat::fp32>(coupled);
  }
}

// The loop for whole blocks of a tensor, or null where update_block must do.
inline AdamRun adam_run_of(const TensorUpdate& t) {
  const MomentFormat moments = t.moments[0].format;
  const bool coupled = t.rule == Rule::adam;
  if ((t.rule != Rule::adamw && !coupled) || t.moments[1].format != moments || t.row_factors != nullptr ||
      t.init_pull != 0.0f || t.clip_value < INFINITY) {
    return nullptr;
  }
  if (t.weights == WeightFormat::fp32 && t.grad.format == FloatFormat::fp32) {
    return moments == MomentFormat::int8   ? adam_run_of<WeightFormat::fp32, float, MomentFormat::int8>(coupled)
           : moments == MomentFormat::bf16 ? adam_run_of<WeightFormat::fp32, float, MomentFormat::bf16>(coupled)
                                           : nullptr;
  }
  if (t.grad.format != FloatFormat::bf16) {
    return nullptr;
  }
  switch (t.weights) {
    case WeightFormat::bf16:
      return adam_run_of<WeightFormat::bf16>(moments, coupled);
    case WeightFormat::bf16_stochastic:
      return adam_run_of<WeightFormat::bf16_stochastic>(moments, coupled);
    case WeightFormat::bf16_split32:
      return adam_run_of<WeightFormat::bf16_split32>(moments, coupled);
    case WeightFormat::bf16_kahan:
      return adam_run_of<WeightFormat::bf16_kahan>(moments, coupled);
    default:
      return nullptr;
  }
}

}  // namespace pyft::avx2

#undef PYFT_INLINE_AVX2
