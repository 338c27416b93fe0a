// Sums of squares in AVX2 registers, with the bits of sum_of_terms: a third faster in the cache than what the compiler
// makes of it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu_target.h"
#include "float_formats.h"
#include "grad_norm_math.h"

namespace pyft {

// Eight elements as doubles: kLanes lanes in two registers, in turn or, of bf16, those at even and at odd places.
struct EightDoubles {
  __m256d first, second;
};
PYFT_TARGET_AVX2 inline EightDoubles load_doubles(const float* x) {
  return {_mm256_cvtps_pd(_mm_loadu_ps(x)), _mm256_cvtps_pd(_mm_loadu_ps(x + 4))};
}
PYFT_TARGET_AVX2 inline EightDoubles load_doubles(const Bf16* x) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  const __m128i even = _mm_slli_epi32(both, 16), odd = _mm_and_si128(both, _mm_set1_epi32(INT32_MIN >> 15));
  return {_mm256_cvtps_pd(_mm_castsi128_ps(even)), _mm256_cvtps_pd(_mm_castsi128_ps(odd))};
}

PYFT_TARGET_AVX2 inline void store_lanes(const float*, double* to, const EightDoubles& lanes) {
  _mm256_storeu_pd(to, lanes.first);
  _mm256_storeu_pd(to + 4, lanes.second);
}
PYFT_TARGET_AVX2 inline void store_lanes(const Bf16*, double* to, const EightDoubles& lanes) {
  const __m256d low = _mm256_unpacklo_pd(lanes.first, lanes.second);
  const __m256d high = _mm256_unpackhi_pd(lanes.first, lanes.second);
  _mm256_storeu_pd(to, _mm256_permute2f128_pd(low, high, 0x20));
  _mm256_storeu_pd(to + 4, _mm256_permute2f128_pd(low, high, 0x31));
}

template <class Element>
PYFT_TARGET_AVX2 double sum_of_squares_avx2(const Element* x, int64_t length, const Element* next) {
  static_assert(kStreams == 4 && kLanes == 8);
  const int64_t quarter = length / kSums * kLanes;
  const Element* const ahead = ahead_of(x, quarter, next);
  EightDoubles sums[kStreams];
  for (EightDoubles& sum : sums) {
    sum = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  }
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int stream = 0; stream < kStreams; ++stream) {
      __builtin_prefetch(ahead + stream * quarter + i);
      const EightDoubles wide = load_doubles(x + stream * quarter + i);
      // A square is exact in double, so this is the sum of the rounded one as well.
      sums[stream].first = _mm256_fmadd_pd(wide.first, wide.first, sums[stream].first);
      sums[stream].second = _mm256_fmadd_pd(wide.second, wide.second, sums[stream].second);
    }
  }
  double lanes[kSums];
  for (int stream = 0; stream < kStreams; ++stream) {
    store_lanes(x, lanes + stream * kLanes, sums[stream]);
  }
  return add_rest_and_sums(x, length, Square{}, lanes);
}

}  // namespace pyft
