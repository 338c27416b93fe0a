// Sums and the largest magnitude of one chunk with a fixed shape: four quarters, kLanes running sums in each, then a
// tree. The shape does not depend on the vector width, so every CPU target gives the same bits. A square of an fp32
// number is exact in double and cannot overflow there, so the norm is right even where torch's fp32 one becomes inf.
#pragma once

#include <cmath>
#include <cstdint>

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

constexpr int kLanes = 8;
// One core does not keep the memory busy with one stream of loads: four, fetched this many bytes ahead.
constexpr int kStreams = 4;
constexpr int64_t kFetchAheadBytes = 2048;

// What is summed. Each is 0 for 0, and NaN or inf where x is.
struct Square {
  PYFT_HOST_DEVICE double operator()(float x) const {
    const double wide = x;
    return wide * wide;
  }
  // The square is exact, so this has the bits of sum + (*this)(x).
  PYFT_HOST_DEVICE double add_to(double sum, float x) const {
    return fma(static_cast<double>(x), static_cast<double>(x), sum);
  }
};

struct ClampedSquare {
  float limit;

  PYFT_HOST_DEVICE double operator()(float x) const { return Square{}(clamped(x)); }
  PYFT_HOST_DEVICE double add_to(double sum, float x) const { return Square{}.add_to(sum, clamped(x)); }

  PYFT_HOST_DEVICE float clamped(float x) const {
    const float upper = x < limit ? x : limit;
    const float inside = upper > -limit ? upper : -limit;
    // The clamp hides NaN and inf; x - x is NaN for both and 0 for the rest.
    return inside + (x - x);
  }
};

struct Magnitude {
  PYFT_HOST_DEVICE double operator()(float x) const { return std::fabs(x); }
  PYFT_HOST_DEVICE double add_to(double sum, float x) const { return sum + std::fabs(x); }
};

// With the largest magnitude of all tensors for `largest`, no power overflows and the largest cannot vanish.
struct ScaledPower {
  double largest, p;

  double operator()(float x) const { return std::pow(std::fabs(x) / largest, p); }
};

// The same by logarithms, for GPUs, where pow is a call. The error grows with the size of the logarithm, as the power
// becomes small beside the largest, which is 1.
struct ScaledPowerByLogarithm {
  double largest, p;

  PYFT_HOST_DEVICE double add_to(double sum, float x) const {
    return sum + exp2(p * log2(std::fabs(static_cast<double>(x)) / largest));
  }
};

constexpr int kSums = kStreams * kLanes;

// Adds what the quarters leave over, and then all sums.
template <class Element, class Term>
PYFT_HOST_DEVICE double add_rest_and_sums(const Element* x, int64_t length, const Term& term, double* sums) {
  const int64_t done = length / kSums * kSums;
  if (length > done) {
    // A sum indexed at run time would keep all of them out of registers, so the rest is padded with zeros.
    float rest[kSums] = {};
    for (int64_t i = done; i < length; ++i) {
      rest[i - done] = to_fp32(x[i]);
    }
    for (int lane = 0; lane < kSums; ++lane) {
      sums[lane] += term(rest[lane]);
    }
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
    }
  }
  return sums[0];
}

// What to load beside element i of the first quarter: what comes later in it or, of a short one, what is next.
template <class Element>
PYFT_HOST_DEVICE const Element* ahead_of(const Element* x, int64_t quarter, const Element* next) {
  const int64_t far = kFetchAheadBytes / static_cast<int64_t>(sizeof(Element));
  // A short quarter ends before: what lies behind it would be loaded in vain.
  return quarter > 2 * far ? x + far : next;
}

// `next`: what will be summed after this. If this is short, what is next is loaded meanwhile.
template <class Element, class Term>
PYFT_HOST_DEVICE double sum_of_terms(const Element* x, int64_t length, const Term& term, const Element* next) {
  const int64_t quarter = length / kSums * kLanes;
  // Of a constant 0 the compiler makes an instruction that fills memory, which takes longer than the loop.
  const double zero = length < 0 ? 1.0 : 0.0;
  double sums[kSums];
  for (double& sum : sums) {
    sum = zero;
  }
  const Element* const ahead = ahead_of(x, quarter, next);
  for (int64_t i = 0; i < quarter; i += kLanes) {
#ifndef __CUDACC__
    // Written out: a prefetch inside the loop over streams keeps it from being vectorised.
    __builtin_prefetch(ahead + i);
    __builtin_prefetch(ahead + quarter + i);
    __builtin_prefetch(ahead + 2 * quarter + i);
    __builtin_prefetch(ahead + 3 * quarter + i);
#endif
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[stream * kLanes + lane] += term(to_fp32(x[stream * quarter + i + lane]));
      }
    }
  }
  return add_rest_and_sums(x, length, term, sums);
}

// Bits of the largest |x|: as integers, magnitudes are in order, and NaN is above inf. 0 for no elements.
template <class Element>
PYFT_HOST_DEVICE uint32_t largest_magnitude_bits(const Element* x, int64_t length) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t bits = bits_of(to_fp32(x[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Brock et al. 2021, eq. 3: min(1, clipping * max(|W_i|, eps) / |G_i|), from the squares of both norms.
PYFT_HOST_DEVICE double agc_row_factor(double grad_square, double param_square, double clipping, double eps) {
  const double grad_norm = std::sqrt(grad_square), param_norm = std::sqrt(param_square);
  const double limit = clipping * (param_norm > eps ? param_norm : eps);
  // x - x is 0 for finite numbers only.
  const bool finite = grad_norm - grad_norm == 0.0 && param_norm - param_norm == 0.0;
  return finite && grad_norm > limit ? limit / grad_norm : 1.0;
}

}  // namespace pyft
