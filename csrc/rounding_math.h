// How values narrower than fp32 are kept: parameters with a remainder, a compensation or stochastic rounding, and
// moments in bf16 or in 8 bits. Integer arithmetic and selects, as in float_formats.h.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

// Elements that share one scale of 8-bit state.
constexpr int64_t kBlock = 256;

// Random bits of an element: a function of the key and its place, so threads and chunks change nothing. The mixer is
// "lowbias32" of Chris Wellons' hash-prospector (public domain).
PYFT_HOST_DEVICE uint32_t random_bits(uint32_t key, uint32_t place) {
  uint32_t x = place * 0x9e3779b9u + key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Key of a tensor in a step; one of SplitMix64's rounds for each number.
inline uint32_t random_key(uint64_t seed, uint64_t tensor, uint64_t step) {
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

// 8-bit moments, relative to the largest of their block. Companding, as in FlashOptim (arXiv 2602.23349), by a power
// taken on the bits of the float: halving or quartering them is its square or fourth root up to 6 %, and exactly
// reversible. Codes are rounded with random bits, or a moving average whose change is less than half a code would never
// move.
template <int kShift>
constexpr uint32_t kPowerBias = 0x3f800000u - (0x3f800000u >> kShift);

template <int kShift>
PYFT_HOST_DEVICE float compress(float x) {
  return float_of((bits_of(x) >> kShift) + kPowerBias<kShift>);
}

constexpr int kSignedShift = 1;
constexpr int kUnsignedShift = 2;
// Below this a block is kept as zeros: its reciprocal would overflow.
constexpr uint32_t kSmallestScaleBits = 0x00800000u;

// Random bits for the codes of a block: the fractional parts of multiples of the golden ratio, from a random start.
// Each is uniform, and one multiplication cheaper than random_bits.
constexpr uint32_t kGolden = 0x9e3779b9u;

// In [1, 2), from the upper 23 bits.
PYFT_HOST_DEVICE float one_to_two(uint32_t random) { return float_of((random >> 9) | 0x3f800000u); }

// For numbers that are not negative: their bits are in the same order, and unlike for floats, compilers know how to
// take the minimum of many integers at once. NaN counts as the largest.
PYFT_HOST_DEVICE float smaller(float x, float y) {
  const uint32_t a = bits_of(x), b = bits_of(y);
  return float_of(a < b ? a : b);
}
PYFT_HOST_DEVICE float larger(float x, float y) {
  const uint32_t a = bits_of(x), b = bits_of(y);
  return float_of(a > b ? a : b);
}

// sign * 127 codes for a moment of either sign. Below the first code the map is linear, which keeps averages unbiased.
PYFT_HOST_DEVICE int8_t encode_signed(float x, float inv_scale, uint32_t random) {
  constexpr float kSlope = 1.0f / 127.0f / 6.19963394e-05f;  // the first code over its value
  const float size = float_of(bits_of(x) & 0x7fffffffu) * inv_scale;
  const float scaled = 127.0f * smaller(size * kSlope, compress<kSignedShift>(size)) + one_to_two(random);
  const int32_t code = static_cast<int32_t>(smaller(scaled, 128.0f)) - 1;
  const int32_t sign = static_cast<int32_t>(bits_of(x)) >> 31;
  return static_cast<int8_t>((code ^ sign) - sign);
}
PYFT_HOST_DEVICE float decode_signed(int8_t code, float scale) {
  const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>(code)) * (1.0f / 127.0f));
  const uint32_t size = bits & 0x7fffffffu;
  constexpr uint32_t kBias = kPowerBias<kSignedShift>;
  const uint32_t root = (size > kBias ? size : kBias) - kBias;
  return float_of((root << kSignedShift) | (bits & 0x80000000u)) * scale;
}

// 255 codes for one that is never negative. The smallest stands for 2e-10 of the largest, zeros among them: what is not
// 0 must not become 0, or it would divide by eps alone. A block of zeros has the scale 0, whatever its codes.
PYFT_HOST_DEVICE uint8_t encode_unsigned(float x, float inv_scale, uint32_t random) {
  const float scaled = 255.0f * compress<kUnsignedShift>(x * inv_scale) + one_to_two(random);
  return static_cast<uint8_t>(static_cast<int32_t>(smaller(larger(scaled, 2.0f), 256.0f)) - 1);
}
PYFT_HOST_DEVICE float decode_unsigned(uint8_t code, float scale) {
  const float y = static_cast<float>(static_cast<int32_t>(code)) * (1.0f / 255.0f);
  return float_of((bits_of(y) - kPowerBias<kUnsignedShift>) << kUnsignedShift) * scale;
}

}  // namespace pyft
