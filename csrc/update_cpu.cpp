#include "update_cpu.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu_target.h"

#if PYFT_X86_TARGETS
#include <immintrin.h>
#endif

namespace pyft {
namespace {

// Streams that are a multiple of 4 KiB apart make loads wait for stores whose low address bits are equal.
constexpr int64_t kSkew = 2 * kBlock;
constexpr int64_t kTwoStreams = 8192;
// Elements between which some of what is next is fetched: four arrays make 16 cache lines, and a core waits for 24.
constexpr int32_t kPiece = 64;

// Of a long chunk in fp32. AMD's Zen 3 is 3 % faster with one place after the other (five runs of 110 M parameters), an
// Intel with AVX-512 with two in turn.
bool works_on_two_places() {
#if PYFT_X86_TARGETS
  static const bool two = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") == 0;
  }();
  return two;
#else
  return true;
#endif
}

using RuleLoop = void (*)(float* param, const float* grad, float* first, float* second, float* third, int32_t length,
                          float grad_scale, const RuleStep& step, const Ahead& next);

bool is_plain(const TensorUpdate& t) {
  bool plain = t.weights == WeightFormat::fp32 && t.grad.format == FloatFormat::fp32 && t.row_factors == nullptr &&
               t.init_pull == 0.0f && !(t.clip_value < INFINITY);
  for (const Moment& moment : t.moments) {
    plain = plain && (moment.format == MomentFormat::none || moment.format == MomentFormat::fp32);
  }
  return plain;
}

}  // namespace
}  // namespace pyft

#define PYFT_LOOPS baseline
#define PYFT_LOOPS_TARGET
#include "update_loops.h"

#if PYFT_X86_TARGETS
#define PYFT_LOOPS avx2
#define PYFT_LOOPS_TARGET PYFT_TARGET_AVX2
#define PYFT_LOOPS_AVX2
#include "update_loops.h"
#undef PYFT_LOOPS_AVX2

#define PYFT_LOOPS avx512
#define PYFT_LOOPS_TARGET PYFT_TARGET_AVX512
#include "update_loops.h"
#endif

namespace pyft {

void update_cpu(const TensorUpdate& tensor, int64_t offset, int64_t length, const Ahead& next) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::update_chunk(tensor, offset, length, next);
    case CpuTarget::avx2:
      return avx2::update_chunk(tensor, offset, length, next);
    default:
      break;
  }
#endif
  baseline::update_chunk(tensor, offset, length, next);
}

}  // namespace pyft
