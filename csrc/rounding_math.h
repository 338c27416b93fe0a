// How values narrower than fp32 are kept: parameters with a remainder, a compensation or stochastic rounding, and
// moments in bf16 or in 8 bits. Integer arithmetic and selects, as in float_formats.h.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

enum class WeightFormat : int8_t { fp32, bf16, fp16, bf16_split32, bf16_kahan, bf16_stochastic };
enum class MomentFormat : int8_t { none, fp32, bf16, int8 };

// Elements that share one scale of 8-bit state.
constexpr int64_t kBlock = 256;

// Random bits of an element: a function of the key and its place, so threads and chunks change nothing. The mixer is
// "lowbias32" of Chris Wellons' hash-prospector (public domain); kGolden is 2^32 over the golden ratio.
constexpr uint32_t kGolden = 0x9e3779b9u, kMix1 = 0x7feb352du, kMix2 = 0x846ca68bu;
PYFT_HOST_DEVICE uint32_t random_bits(uint32_t key, uint32_t place) {
  uint32_t x = place * kGolden + key;
  x = (x ^ (x >> 16)) * kMix1;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 16);
}

// Of the element at a place of 64 bits.
PYFT_HOST_DEVICE uint32_t key_of_place(uint32_t key, int64_t place) {
  return key ^ (static_cast<uint32_t>(place >> 32) * 0x85ebca6bu);
}

// Key of a tensor in a step; one of SplitMix64's rounds for each number.
PYFT_HOST_DEVICE uint32_t random_key(uint64_t seed, uint64_t tensor, uint64_t step) {
  uint64_t x = seed;
  for (uint64_t number : {tensor, step, uint64_t{0}}) {
    x = (x + 0x9e3779b97f4a7c15u) ^ number;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return static_cast<uint32_t>(x >> 32);
}

// Up with the probability of the part that is cut off (Gupta et al. 2015, section 3.1); `random` is of 16 bits.
// For results of arithmetic: NaN must be a quiet one.
PYFT_HOST_DEVICE Bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  return upper_half(bits & 0x80000000u, (bits & 0x7fffffffu) + random);
}

// An fp32 number as the nearest bf16, ties away from zero, and 16 bits more. With ties to even, the two would not
// determine a number half-way between two bf16 ones.
PYFT_HOST_DEVICE uint16_t split_high(float x) {
  const uint32_t bits = bits_of(x), nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(is_nan_bits(bits) ? nan : (bits + 0x8000u) >> 16);
}
PYFT_HOST_DEVICE int16_t split_low(float x, uint16_t high) {
  const uint32_t bits = bits_of(x);
  return static_cast<int16_t>(is_nan_bits(bits) ? 0u : bits - (static_cast<uint32_t>(high) << 16));
}
PYFT_HOST_DEVICE float join(Bf16 high, int16_t low) {
  return float_of((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

// 8-bit moments: floats of 3 bits after the point and, relative to the largest of their block, 16 powers of two for a
// moment of either sign, 32 for one that is never negative. Rounded with random bits, or a moving average whose change
// is less than half a code would never move; within a power of two codes are equally far apart, so the mean is exact.
// The bits are multiples of kGolden from a random start: each uniform, and two multiplications cheaper than
// random_bits.
constexpr int kCodeShift = 20;
constexpr uint32_t kCode = 1u << kCodeShift;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// The scale of a block, a power of two, from the bits of its largest size: what is rounded up stays below its double.
// inf if the block holds NaN or inf.
PYFT_HOST_DEVICE float block_scale(uint32_t largest) {
  const uint32_t finite = largest < kInfinityBits ? largest : kInfinityBits;
  return float_of((finite + 2 * kCode) & kInfinityBits);
}

// Bits of the value of code 0: kPowers powers of two below the double of the scale, or 0.
template <uint32_t kPowers>
PYFT_HOST_DEVICE uint32_t lowest_bits(float scale) {
  const uint32_t above = bits_of(scale) + 0x00800000u, range = kPowers << 23;
  return above > range ? above - range : 0u;
}
PYFT_HOST_DEVICE uint32_t lowest_signed(float scale) { return lowest_bits<16>(scale); }
PYFT_HOST_DEVICE uint32_t lowest_unsigned(float scale) { return lowest_bits<32>(scale); }

// The size is kept as a sum with the lowest value: 0 is code 0, and what is small beside it is rounded linearly.
PYFT_HOST_DEVICE int8_t encode_signed(float x, uint32_t lowest, uint32_t random) {
  const float size = float_of(bits_of(x) & 0x7fffffffu) + float_of(lowest);
  const int32_t code = static_cast<int32_t>((bits_of(size) - lowest + (random >> (32 - kCodeShift))) >> kCodeShift);
  const int32_t sign = static_cast<int32_t>(bits_of(x)) >> 31;
  return static_cast<int8_t>((code ^ sign) - sign);
}
PYFT_HOST_DEVICE float decode_signed(int8_t code, uint32_t lowest) {
  const int32_t wide = code;
  const uint32_t size = static_cast<uint32_t>(wide < 0 ? -wide : wide);
  const float value = float_of((size << kCodeShift) + lowest) - float_of(lowest);
  return float_of(bits_of(value) | (static_cast<uint32_t>(wide) & 0x80000000u));
}

// What is less than the lowest value becomes that, zeros among them: what is not 0 must not become 0, or it would
// divide by eps alone. The lowest value of a block of zeros is 0.
PYFT_HOST_DEVICE uint8_t encode_unsigned(float x, uint32_t lowest, uint32_t random) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint8_t>(((bits > lowest ? bits : lowest) - lowest + (random >> (32 - kCodeShift))) >> kCodeShift);
}
PYFT_HOST_DEVICE float decode_unsigned(uint8_t code, uint32_t lowest) {
  return float_of((static_cast<uint32_t>(code) << kCodeShift) + lowest);
}

}  // namespace pyft
