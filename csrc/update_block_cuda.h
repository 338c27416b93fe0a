// One step of the elements of a tensor on a GPU, a block of kBlock by each warp.
#pragma once

#include "block_sums_cuda.h"
#include "row_norms_cuda.h"
#include "update_layout_cuda.h"

namespace pyft {

#ifdef PYFT_SITE

// A warp updates kBlock elements at a time: each lane four of each half, so that every access of the warp is
// contiguous.
constexpr int kHalves = 2;
static_assert(kBlock == kHalves * kFour * kWarp);

// Four elements of a tensor, from `at` on; fewer where it ends.
struct Place {
  int64_t at;
  int count;
};

// As they lie in memory.
struct RawElements {
  Four param, grad, moments[kMoments], extra, init;
};

__device__ __forceinline__ void widen(const Four& raw, FloatFormat format, float (&values)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    values[i] = fp32_at(raw, format, i);
  }
}

__device__ __forceinline__ FloatFormat float_format_of(WeightFormat weights) {
  return weights == WeightFormat::fp32   ? FloatFormat::fp32
         : weights == WeightFormat::fp16 ? FloatFormat::fp16
                                         : FloatFormat::bf16;
}

__device__ __forceinline__ bool has_extra(WeightFormat weights) {
  return weights == WeightFormat::bf16_split32 || weights == WeightFormat::bf16_kahan;
}

// kWhole: all four are there, and each tensor's begin where one access may.
template <bool kWhole>
__device__ __forceinline__ Four load_place(const void* data, int bytes, const Place& place) {
  return kWhole ? load_at_once<true>(data, bytes, place.at) : load_four(data, bytes, place.at, place.count);
}

template <bool kWhole>
__device__ __forceinline__ void store_place(void* data, int bytes, const Place& place, const Four& raw) {
  if (kWhole) {
    store_at_once<true>(data, bytes, place.at, raw);
  } else {
    store_four(data, bytes, place.at, place.count, raw);
  }
}

template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ RawElements read_elements(const Layout& layout, const Tensor& t, const DeviceFloats& grad,
                                                     bool pulled, const Place& place) {
  RawElements raw = {};
  raw.param = load_place<kWhole>(t.param(), bytes_of(layout.weights()), place);
  raw.grad = load_place<kWhole>(grad.data, bytes_of(layout.grad()), place);
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if (layout.has(k)) {
      raw.moments[k] = load_place<kWhole>(t.moment(k), bytes_of(layout.format(k)), place);
    }
  }
  if (has_extra(layout.weights())) {
    raw.extra = load_place<kWhole>(t.extra(), 2, place);
  }
  if (pulled) {
    raw.init = load_place<kWhole>(t.init(), bytes_of(t.init_format()), place);
  }
  return raw;
}

__device__ __forceinline__ void read_weights(WeightFormat weights, const Four& raw, const Four& extra,
                                             float (&p)[kFour]) {
  widen(raw, float_format_of(weights), p);
  if (!has_extra(weights)) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint16_t high = static_cast<uint16_t>(bits_at(raw, 2, i)), more = static_cast<uint16_t>(bits_at(extra, 2, i));
    p[i] = weights == WeightFormat::bf16_split32 ? join(Bf16{high}, static_cast<int16_t>(more))
                                                 : p[i] + to_fp32(Bf16{more});
  }
}

template <bool kWhole, class Tensor>
__device__ __forceinline__ void write_weights(const Tensor& t, WeightFormat weights, const Place& place, uint32_t key,
                                              const float (&p)[kFour]) {
  const int bytes = bytes_of(weights);
  Four raw = {}, extra = {};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    uint32_t bits = 0, more = 0;
    if (weights == WeightFormat::fp32) {
      bits = bits_of(p[i]);
    } else if (weights == WeightFormat::fp16) {
      bits = to_fp16(p[i]).bits;
    } else if (weights == WeightFormat::bf16_stochastic) {
      const uint32_t random = random_bits(key_of_place(~key, place.at), static_cast<uint32_t>(place.at) + i);
      bits = to_bf16_stochastic(p[i], random >> 16).bits;
    } else if (weights == WeightFormat::bf16_split32) {
      bits = split_high(p[i]);
      more = static_cast<uint16_t>(split_low(p[i], static_cast<uint16_t>(bits)));
    } else {
      bits = to_bf16(p[i]).bits;
      more = to_bf16(p[i] - to_fp32(Bf16{static_cast<uint16_t>(bits)})).bits;
    }
    put_bits(raw, bytes, i, bits);
    put_bits(extra, 2, i, more);
  }
  store_place<kWhole>(t.param(), bytes, place, raw);
  if (has_extra(weights)) {
    store_place<kWhole>(t.extra(), 2, place, extra);
  }
}

__device__ __forceinline__ void read_moment(MomentFormat format, bool is_signed, const Four& raw, float scale,
                                            float (&m)[kFour]) {
  if (format != MomentFormat::int8) {
    widen(raw, format == MomentFormat::fp32 ? FloatFormat::fp32 : FloatFormat::bf16, m);
    return;
  }
  const uint32_t lowest = is_signed ? lowest_signed(scale) : lowest_unsigned(scale);
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint8_t code = static_cast<uint8_t>(bits_at(raw, 1, i));
    m[i] = is_signed ? decode_signed(static_cast<int8_t>(code), lowest) : decode_unsigned(code, lowest);
  }
}

// `random`: of the tensor, the step, the moment and the block; `lowest`: of the codes, where there are some.
template <bool kWhole>
__device__ __forceinline__ void write_moment(void* data, MomentFormat format, bool is_signed, const Place& place,
                                             uint32_t random, uint32_t lowest, const float (&m)[kFour]) {
  const int bytes = bytes_of(format);
  random += static_cast<uint32_t>(place.at) % kBlock * kGolden;
  Four raw = {};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    uint32_t bits = bits_of(m[i]);
    if (format == MomentFormat::bf16) {
      bits = to_bf16_stochastic(m[i], random >> 16).bits;
    } else if (format == MomentFormat::int8) {
      // Only this NaN has a code.
      const float value = is_nan_bits(bits) ? float_of(0x7fc00000u) : m[i];
      bits = is_signed ? static_cast<uint8_t>(encode_signed(value, lowest, random))
                       : encode_unsigned(value, lowest, random);
    }
    random += kGolden;
    put_bits(raw, bytes, i, bits);
  }
  store_place<kWhole>(data, bytes, place, raw);
}

// The gradient as the rule takes it but for its scale: clamped, and its rows clipped.
__device__ __forceinline__ void shape_gradient(const Constants& c, int64_t row_length, const Place& place,
                                               float (&g)[kFour]) {
  if (c.clip_value < INFINITY) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      g[i] = ClampTo{c.clip_value}(g[i]);
    }
  }
  if (c.row_factors != nullptr) {
    float factors[kFour];
    factors_of_rows(c.row_factors, row_length, place.at, place.count, factors);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      g[i] *= factors[i];
    }
  }
}

// One step of four elements; their moments, in fp32, are left in m.
template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ void update_four(const Layout& layout, const Tensor& t, const Constants& c,
                                            const RawElements& raw, const float (&scales)[kMoments], const Place& place,
                                            float (&m)[kMoments][kFour]) {
  const bool pulled = Layout::kMayBePulled && c.init_pull != 0.0f;
  float p[kFour], g[kFour], pull[kFour] = {};
  read_weights(layout.weights(), raw.param, raw.extra, p);
  widen(raw.grad, layout.grad(), g);
  if (Layout::kMayBeShaped) {
    shape_gradient(c, t.row_length(), place, g);
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    read_moment(layout.has(k) ? layout.format(k) : MomentFormat::fp32, layout.is_signed(k), raw.moments[k], scales[k],
                m[k]);
  }
  if (pulled) {
    widen(raw.init, t.init_format(), pull);
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    g[i] = g[i] * c.grad_scale;
    if (pulled) {
      pull[i] = c.init_pull * (p[i] - pull[i]);
      g[i] = layout.decoupled() ? g[i] : g[i] + pull[i];
    }
  }
  layout.apply(p, g, m, c.step);
  if (pulled && layout.decoupled()) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      p[i] = p[i] - pull[i];
    }
  }
  write_weights<kWhole>(t, layout.weights(), place, c.key, p);
}

// Bits of the largest size of a moment in the block, in all lanes: as integers, they are in the order of the sizes.
__device__ __forceinline__ uint32_t largest_size(const Place (&places)[kHalves], const float (&first)[kFour],
                                                 const float (&second)[kFour]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint32_t a = i < places[0].count ? bits_of(first[i]) & 0x7fffffffu : 0u;
    const uint32_t b = i < places[1].count ? bits_of(second[i]) & 0x7fffffffu : 0u;
    largest = a > largest ? a : largest;
    largest = b > largest ? b : largest;
  }
  return warp_max(largest);
}

__device__ __forceinline__ Place place_of(int64_t begin, int64_t end, int half) {
  const int64_t at = begin + (half * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kFour, left = end - at;
  return {at, left >= kFour ? kFour : left < 0 ? 0 : static_cast<int>(left)};
}

__device__ __forceinline__ uint32_t block_random(const Constants& c, int moment, int64_t begin) {
  return random_bits(c.key + static_cast<uint32_t>(moment), static_cast<uint32_t>(begin / kBlock));
}

template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ void update_half(const Layout& layout, const Tensor& t, const Constants& c, int64_t begin,
                                            const RawElements& raw, const Place& place) {
  const float no_scales[kMoments] = {};
  float m[kMoments][kFour];
  update_four<kWhole>(layout, t, c, raw, no_scales, place, m);
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if (layout.has(k)) {
      const uint32_t random = layout.format(k) == MomentFormat::bf16 ? block_random(c, k, begin) : 0;
      write_moment<kWhole>(t.moment(k), layout.format(k), layout.is_signed(k), place, random, 0, m[k]);
    }
  }
}

// The kBlock elements from `begin` on, or those below `end`, without scales of moments: halves know nothing of each
// other.
template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ void update_halves(const Layout& layout, const Tensor& t, const DeviceFloats& grad,
                                              const Constants& c, int64_t begin, int64_t end) {
  if constexpr (kWhole) {
    // All loads come before what is done with any of them.
    const Place first = place_of(begin, end, 0), second = place_of(begin, end, 1);
    const RawElements raw = read_elements<kWhole>(layout, t, grad, false, first);
    const RawElements more = read_elements<kWhole>(layout, t, grad, false, second);
    update_half<kWhole>(layout, t, c, begin, raw, first);
    update_half<kWhole>(layout, t, c, begin, more, second);
  } else {
#pragma unroll 1
    for (int h = 0; h < kHalves; ++h) {
      const Place place = place_of(begin, end, h);
      update_half<kWhole>(layout, t, c, begin, read_elements<kWhole>(layout, t, grad, false, place), place);
    }
  }
}

// The same where moments may be in 8 bits. All lanes of a warp come here together.
template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ void update_scaled_block(const Layout& layout, const Tensor& t, const DeviceFloats& grad,
                                                    const Constants& c, int64_t begin, int64_t end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool pulled = Layout::kMayBePulled && c.init_pull != 0.0f;
  const Place places[kHalves] = {place_of(begin, end, 0), place_of(begin, end, 1)};
  RawElements raw[kHalves];
  float scales[kMoments] = {}, m[kHalves][kMoments][kFour];
  if constexpr (kWhole) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      raw[h] = read_elements<kWhole>(layout, t, grad, pulled, places[h]);
    }
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if (layout.has(k) && layout.format(k) == MomentFormat::int8) {
      // By the lane that will write it.
      const float scale = lane == 0 ? load(in_global(t.scales(k) + begin / kBlock)) : 0.0f;
      scales[k] = __shfl_sync(kAllLanes, scale, 0);
    }
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    if (!kWhole) {
      raw[h] = read_elements<kWhole>(layout, t, grad, pulled, places[h]);
    }
    update_four<kWhole>(layout, t, c, raw[h], scales, places[h], m[h]);
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if (!layout.has(k)) {
      continue;
    }
    const MomentFormat format = layout.format(k);
    const bool is_signed = layout.is_signed(k);
    const uint32_t random = format != MomentFormat::fp32 ? block_random(c, k, begin) : 0;
    uint32_t lowest = 0;
    if (format == MomentFormat::int8) {
      const float scale = block_scale(largest_size(places, m[0][k], m[1][k]));
      lowest = is_signed ? lowest_signed(scale) : lowest_unsigned(scale);
      if (lane == 0) {
        store(in_global(t.scales(k) + begin / kBlock), scale);
      }
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      write_moment<kWhole>(t.moment(k), format, is_signed, places[h], random, lowest, m[h][k]);
    }
  }
}

template <bool kWhole, class Layout, class Tensor>
__device__ __forceinline__ void update_block(const Layout& layout, const Tensor& t, const DeviceFloats& grad,
                                             const Constants& c, int64_t begin, int64_t end) {
  if constexpr (Layout::kMayHaveScales) {
    update_scaled_block<kWhole>(layout, t, grad, c, begin, end);
  } else {
    update_halves<kWhole>(layout, t, grad, c, begin, end);
  }
}

// Whether four elements of each tensor move as one access, wherever four begin.
template <class Layout, class Tensor>
__device__ __forceinline__ bool moves_by_four(const Layout& layout, const Tensor& t, const DeviceFloats& grad) {
  bool fits =
      begins_by_four(t.param(), bytes_of(layout.weights())) && begins_by_four(grad.data, bytes_of(layout.grad()));
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    fits = fits && (!layout.has(k) || begins_by_four(t.moment(k), bytes_of(layout.format(k))));
  }
  return fits && (!has_extra(layout.weights()) || begins_by_four(t.extra(), 2));
}

#endif

}  // namespace pyft
