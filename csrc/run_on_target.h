// A loop that is a callable object, with an always-inline operator(), compiled once for every CPU target.
#pragma once

#include "cpu_target.h"

namespace pyft {

template <class Loop>
void run_baseline(const Loop& loop) {
  loop();
}

#if PYFT_X86_TARGETS
template <class Loop>
PYFT_TARGET_AVX2 void run_avx2(const Loop& loop) {
  loop();
}

template <class Loop>
PYFT_TARGET_AVX512 void run_avx512(const Loop& loop) {
  loop();
}
#endif

template <class Loop>
void run_on_target(const Loop& loop) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return run_avx512(loop);
    case CpuTarget::avx2:
      return run_avx2(loop);
    default:
      break;
  }
#endif
  run_baseline(loop);
}

}  // namespace pyft
