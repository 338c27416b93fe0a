#include "grad_norm_cpu.h"

#include <cmath>
#include <type_traits>

#include "cpu_target.h"
#include "grad_norm_math.h"

#if PYFT_X86_TARGETS
#include "grad_norm_avx2.h"
#endif

namespace pyft {
namespace {

template <class Element, class Term>
double sum_baseline(const Element* x, int64_t length, const Term& term, const Element* next) {
  return sum_of_terms(x, length, term, next);
}

template <class Element>
uint32_t largest_baseline(const Element* x, int64_t length) {
  return largest_magnitude_bits(x, length);
}

#if PYFT_X86_TARGETS
template <class Element, class Term>
PYFT_TARGET_AVX2 double sum_avx2(const Element* x, int64_t length, const Term& term, const Element* next) {
  if constexpr (std::is_same_v<Term, Square> && !std::is_same_v<Element, Fp16>) {
    return sum_of_squares_avx2(x, length, next);
  }
  return sum_of_terms(x, length, term, next);
}

template <class Element, class Term>
PYFT_TARGET_AVX512 double sum_avx512(const Element* x, int64_t length, const Term& term, const Element* next) {
  return sum_of_terms(x, length, term, next);
}

template <class Element>
PYFT_TARGET_AVX2 uint32_t largest_avx2(const Element* x, int64_t length) {
  return largest_magnitude_bits(x, length);
}

template <class Element>
PYFT_TARGET_AVX512 uint32_t largest_avx512(const Element* x, int64_t length) {
  return largest_magnitude_bits(x, length);
}
#endif

template <class Element, class Term>
double sum_on_target(const Element* x, int64_t length, const Term& term, const void* data_of_next) {
  const Element* next = data_of_next == nullptr ? x : static_cast<const Element*>(data_of_next);
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return sum_avx512(x, length, term, next);
    case CpuTarget::avx2:
      return sum_avx2(x, length, term, next);
    default:
      break;
  }
#endif
  return sum_baseline(x, length, term, next);
}

template <class Element>
uint32_t largest_on_target(const Element* x, int64_t length) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return largest_avx512(x, length);
    case CpuTarget::avx2:
      return largest_avx2(x, length);
    default:
      break;
  }
#endif
  return largest_baseline(x, length);
}

// Calls work(pointer to the first element) with the type of the format.
template <class Work>
auto by_format(FloatData x, int64_t offset, const Work& work) {
  switch (x.format) {
    case FloatFormat::bf16:
      return work(static_cast<const Bf16*>(x.data) + offset);
    case FloatFormat::fp16:
      return work(static_cast<const Fp16*>(x.data) + offset);
    default:
      return work(static_cast<const float*>(x.data) + offset);
  }
}

}  // namespace

double sum_of_squares_cpu(FloatData x, int64_t offset, int64_t length, float clip_value, const void* next) {
  return by_format(x, offset, [&](auto* first) {
    return std::isinf(clip_value) ? sum_on_target(first, length, Square{}, next)
                                  : sum_on_target(first, length, ClampedSquare{clip_value}, next);
  });
}

double sum_of_magnitudes_cpu(FloatData x, int64_t offset, int64_t length, const void* next) {
  return by_format(x, offset, [&](auto* first) { return sum_on_target(first, length, Magnitude{}, next); });
}

double sum_of_powers_cpu(FloatData x, int64_t offset, int64_t length, double largest, double p) {
  // All its time goes into pow, which no target vectorises.
  return by_format(x, offset, [&](auto* first) { return sum_baseline(first, length, ScaledPower{largest, p}, first); });
}

float largest_magnitude_cpu(FloatData x, int64_t offset, int64_t length) {
  return float_of(by_format(x, offset, [&](auto* first) { return largest_on_target(first, length); }));
}

}  // namespace pyft
