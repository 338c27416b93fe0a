// Includes PYFT_LOOPS_FILE, the loops of a matrix product, once for each CPU target, with PYFT_LOOPS, a namespace,
// PYFT_LOOPS_TARGET, an attribute, PYFT_LOOPS_LANES, floats in a register, and PYFT_LOOPS_FMA(a, b, c) defined. There
// is no include guard.
#include <array>
#include <utility>

#include "cpu_target.h"

#if PYFT_X86_TARGETS
#include <immintrin.h>
#endif

#define PYFT_LOOPS baseline
#define PYFT_LOOPS_TARGET
#define PYFT_LOOPS_LANES 4
#define PYFT_LOOPS_FMA(a, b, c) ((a) * (b) + (c))
#include PYFT_LOOPS_FILE
#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
#undef PYFT_LOOPS_LANES
#undef PYFT_LOOPS_FMA

#if PYFT_X86_TARGETS
#define PYFT_LOOPS avx2
#define PYFT_LOOPS_TARGET PYFT_TARGET_AVX2
#define PYFT_LOOPS_LANES 8
#define PYFT_LOOPS_FMA(a, b, c) (Vec) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#include PYFT_LOOPS_FILE
#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
#undef PYFT_LOOPS_LANES
#undef PYFT_LOOPS_FMA

#define PYFT_LOOPS avx512
#define PYFT_LOOPS_TARGET PYFT_TARGET_AVX512
#define PYFT_LOOPS_LANES 16
#define PYFT_LOOPS_FMA(a, b, c) (Vec) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#include PYFT_LOOPS_FILE
#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
#undef PYFT_LOOPS_LANES
#undef PYFT_LOOPS_FMA
#endif

#undef PYFT_LOOPS_FILE
