// The storage formats of parameters, gradients and moments, and conversions to and from fp32. Integer arithmetic and
// selects only, so that loops over them vectorise on every CPU target and give the same bits on each, and on a GPU.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

enum class FloatFormat : int8_t { fp32, bf16, fp16 };

// Elements of a tensor in one of the formats.
struct FloatData {
  const void* data;
  FloatFormat format;
};

PYFT_HOST_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
PYFT_HOST_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Types of their own: both are 16 bits in memory.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

PYFT_HOST_DEVICE float to_fp32(float x) { return x; }
PYFT_HOST_DEVICE float to_fp32(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// After Fabian Giesen, "half_to_float_fast4": exponent re-biased by an addition, subnormals by a subtraction of floats.
PYFT_HOST_DEVICE float to_fp32(Fp16 x) {
  const uint32_t body = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = body & 0x0f800000u;
  const uint32_t normal = body + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(body + (113u << 23)) - float_of(113u << 23));
  const uint32_t infinite = body + (224u << 23);
  return float_of((exponent == 0 ? subnormal : exponent == 0x0f800000u ? infinite : normal) | sign);
}

PYFT_HOST_DEVICE bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// The upper half of a sum of bits that cuts off the lower. Sums beyond the largest NaN would become -0.
PYFT_HOST_DEVICE Bf16 upper_half(uint32_t sign, uint32_t sum) {
  const uint32_t body = sum < 0x7fffffffu ? sum : 0x7fffffffu;
  return {static_cast<uint16_t>((sign | body) >> 16)};
}

// Round to nearest, ties to even. For results of arithmetic: NaN must be a quiet one.
PYFT_HOST_DEVICE Bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  return upper_half(bits & 0x80000000u, size + 0x7fffu + ((bits >> 16) & 1u));
}

// After Fabian Giesen, "float_to_half_fast3_rtne": round to nearest, ties to even; beyond the range inf.
PYFT_HOST_DEVICE Fp16 to_fp16(float x) {
  const uint32_t bits = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
  constexpr uint32_t kMagic = 126u << 23;
  const uint32_t subnormal = bits_of(float_of(bits < (113u << 23) ? bits : 0u) + float_of(kMagic)) - kMagic;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t body = bits >= (143u << 23) ? large : bits < (113u << 23) ? subnormal : normal;
  return {static_cast<uint16_t>(body | sign)};
}

}  // namespace pyft
