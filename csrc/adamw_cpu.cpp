#include "adamw_cpu.h"

#include "cpu_target.h"

namespace pyft {
namespace {

constexpr int64_t kBlock = 64;
// Streams that are a multiple of 4 KiB apart make loads wait for stores whose low address bits are equal.
constexpr int64_t kSkew = 512;
constexpr int64_t kTwoStreams = 8192;

PYFT_HOST_DEVICE void adamw_range(float* __restrict__ param, const float* __restrict__ grad,
                                  float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq, int64_t begin,
                                  int64_t end, const AdamWStep& h) {
  for (int64_t i = begin; i < end; ++i) {
    adamw_element(param[i], grad[i], exp_avg[i], exp_avg_sq[i], h);
  }
}

// Two places of a chunk are worked on in turn: twice as many cache lines are under way, which one core needs to keep
// the memory busy.
PYFT_HOST_DEVICE void adamw_loop(float* __restrict__ param, const float* __restrict__ grad, float* __restrict__ exp_avg,
                                 float* __restrict__ exp_avg_sq, int64_t length, const AdamWStep& step) {
  const AdamWStep h = step;
  if (length < kTwoStreams) {
    return adamw_range(param, grad, exp_avg, exp_avg_sq, 0, length, h);
  }
  const int64_t second = length / 2 + kSkew;
  int64_t i = 0;
  for (; i + kBlock <= length - second; i += kBlock) {
    for (int64_t start : {i, second + i}) {
      for (int64_t k = start; k < start + kBlock; ++k) {
        adamw_element(param[k], grad[k], exp_avg[k], exp_avg_sq[k], h);
      }
    }
  }
  adamw_range(param, grad, exp_avg, exp_avg_sq, i, second, h);
  adamw_range(param, grad, exp_avg, exp_avg_sq, second + i, length, h);
}

void adamw_baseline(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t length,
                    const AdamWStep& step) {
  adamw_loop(param, grad, exp_avg, exp_avg_sq, length, step);
}

#if PYFT_X86_TARGETS
PYFT_TARGET_AVX2 void adamw_avx2(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t length,
                                 const AdamWStep& step) {
  adamw_loop(param, grad, exp_avg, exp_avg_sq, length, step);
}

PYFT_TARGET_AVX512 void adamw_avx512(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t length,
                                     const AdamWStep& step) {
  adamw_loop(param, grad, exp_avg, exp_avg_sq, length, step);
}
#endif

}  // namespace

void adamw_cpu(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t length,
               const AdamWStep& step) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return adamw_avx512(param, grad, exp_avg, exp_avg_sq, length, step);
    case CpuTarget::avx2:
      return adamw_avx2(param, grad, exp_avg, exp_avg_sq, length, step);
    default:
      break;
  }
#endif
  adamw_baseline(param, grad, exp_avg, exp_avg_sq, length, step);
}

}  // namespace pyft
