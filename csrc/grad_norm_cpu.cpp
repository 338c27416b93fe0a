#include "grad_norm_cpu.h"

#include "cpu_target.h"
#include "grad_norm_math.h"

namespace pyft {
namespace {

double sum_of_squares_baseline(const float* x, int64_t length) { return sum_of_squares_chunk(x, length); }

#if PYFT_X86_TARGETS
PYFT_TARGET_AVX2 double sum_of_squares_avx2(const float* x, int64_t length) { return sum_of_squares_chunk(x, length); }

PYFT_TARGET_AVX512 double sum_of_squares_avx512(const float* x, int64_t length) {
  return sum_of_squares_chunk(x, length);
}
#endif

}  // namespace

double sum_of_squares_cpu(const float* x, int64_t length) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return sum_of_squares_avx512(x, length);
    case CpuTarget::avx2:
      return sum_of_squares_avx2(x, length);
    default:
      break;
  }
#endif
  return sum_of_squares_baseline(x, length);
}

}  // namespace pyft
