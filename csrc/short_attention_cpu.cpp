#include "short_attention_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu_target.h"

#define PYFT_LOOPS_FILE "short_attention_loops.h"
#include "product_targets.h"

namespace pyft {

int64_t short_attention_scratch(int64_t queries, int64_t keys, int64_t width, bool backward) {
  // Rows of scores fill whole registers of any target.
  const int64_t padded = (keys + 15) / 16 * 16;
  return padded * (width + queries * (backward ? 2 : 1) + 2);
}

void short_attention_cpu(const ShortAttention& work, int64_t first, int64_t last, float* scratch) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::attend(work, first, last, scratch);
    case CpuTarget::avx2:
      return avx2::attend(work, first, last, scratch);
    default:
      break;
  }
#endif
  baseline::attend(work, first, last, scratch);
}

void short_attention_backward_cpu(const ShortAttentionGradient& work, int64_t first, int64_t last, float* scratch) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::attend_backward(work, first, last, scratch);
    case CpuTarget::avx2:
      return avx2::attend_backward(work, first, last, scratch);
    default:
      break;
  }
#endif
  baseline::attend_backward(work, first, last, scratch);
}

}  // namespace pyft
