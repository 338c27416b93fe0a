// How the tensors of an update are stored and by which rule they go: known to the compiler where a whole launch has
// one, asked for at every four elements where tensors differ.
#pragma once

#include "update_tensor_cuda.h"

namespace pyft {

#ifdef PYFT_SITE

template <Rule kRule>
__device__ __forceinline__ void apply_rule(float (&p)[kFour], const float (&g)[kFour], float (&m)[kMoments][kFour],
                                           const RuleStep& step) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    update_element<kRule>(p[i], g[i], m[0][i], m[1][i], m[2][i], step);
  }
}

// Bit k of a rule's moments: it has it, or it may be negative.
constexpr uint32_t moment_bits(const bool (&of)[kMoments]) { return of[0] | of[1] << 1 | of[2] << 2; }

// Every tensor of a launch is stored so, is pulled nowhere, and its gradient has one factor.
template <Rule kRule, WeightFormat kWeights, FloatFormat kGrad, MomentFormat kMoment>
struct FixedLayout {
  template <class Tensor>
  using For = FixedLayout;
  static constexpr UpdateLayout kLayout{kRule, kWeights, kGrad, kMoment};
  static constexpr uint32_t kHas = moment_bits(kRuleInfo[static_cast<int>(kRule)].has);
  static constexpr uint32_t kSigned = moment_bits(kRuleInfo[static_cast<int>(kRule)].is_signed);
  // Blocks that a processor is to hold: as many as the registers of these loads leave room for.
  static constexpr int kBlocks = (kHas >> 2) != 0 ? 4 : 5;
  static constexpr bool kMayBePulled = false, kMayBeShaped = false, kMayHaveScales = kMoment == MomentFormat::int8;

  template <class Tensor>
  __device__ __forceinline__ FixedLayout(const Tensor&, const DeviceFloats&, const Constants&) {}

  static constexpr __device__ WeightFormat weights() { return kWeights; }
  static constexpr __device__ FloatFormat grad() { return kGrad; }
  static constexpr __device__ bool has(int k) { return (kHas >> k & 1) != 0; }
  static constexpr __device__ bool is_signed(int k) { return (kSigned >> k & 1) != 0; }
  static constexpr __device__ MomentFormat format(int) { return kMoment; }
  static constexpr __device__ bool decoupled() { return false; }

  static __device__ __forceinline__ void apply(float (&p)[kFour], const float (&g)[kFour], float (&m)[kMoments][kFour],
                                               const RuleStep& step) {
    apply_rule<kRule>(p, g, m, step);
  }
};

// Formats and rule of one tensor, which may differ from the next.
template <class Tensor>
struct AnyLayout {
  static constexpr bool kMayBePulled = true, kMayBeShaped = true, kMayHaveScales = true;
  const Tensor& t;
  const DeviceFloats& gradient;
  const Constants& c;

  __device__ __forceinline__ AnyLayout(const Tensor& tensor, const DeviceFloats& grad, const Constants& constants)
      : t(tensor), gradient(grad), c(constants) {}

  __device__ __forceinline__ WeightFormat weights() const { return t.weights(); }
  __device__ __forceinline__ FloatFormat grad() const { return gradient.float_format(); }
  __device__ __forceinline__ bool has(int k) const { return (c.moments >> k & 1) != 0; }
  __device__ __forceinline__ bool is_signed(int k) const { return (c.signs >> k & 1) != 0; }
  __device__ __forceinline__ MomentFormat format(int k) const { return t.format(k); }
  __device__ __forceinline__ bool decoupled() const { return c.decoupled; }

  __device__ __forceinline__ void apply(float (&p)[kFour], const float (&g)[kFour], float (&m)[kMoments][kFour],
                                        const RuleStep& step) const {
#define PYFT_RULE(name) \
  case Rule::name:      \
    return apply_rule<Rule::name>(p, g, m, step);
    switch (c.rule) {
      PYFT_RULE(adamw)
      PYFT_RULE(adamw_amsgrad)
      PYFT_RULE(adam)
      PYFT_RULE(adam_amsgrad)
      PYFT_RULE(sgd)
      PYFT_RULE(sgd_momentum)
      PYFT_RULE(sgd_nesterov)
      PYFT_RULE(rmsprop)
      PYFT_RULE(rmsprop_centered)
      PYFT_RULE(rmsprop_momentum)
      PYFT_RULE(rmsprop_centered_momentum)
      PYFT_RULE(adagrad)
      PYFT_RULE(lion)
    }
#undef PYFT_RULE
  }
};

struct AnyLayouts {
  static constexpr int kBlocks = 4;
  template <class Tensor>
  using For = AnyLayout<Tensor>;
};

#endif

}  // namespace pyft
