#include "update_cpu.h"

#include <algorithm>
#include <cmath>

#include "cpu_target.h"

namespace pyft {
namespace {

// Streams that are a multiple of 4 KiB apart make loads wait for stores whose low address bits are equal.
constexpr int64_t kSkew = 2 * kBlock;
constexpr int64_t kTwoStreams = 8192;

// The 8-bit moments of one block, and the bits of the largest size of each after the rule.
struct Coded {
  const int8_t* codes[kMoments] = {};
  uint32_t lowest[kMoments] = {};
  uint32_t largest[kMoments] = {};

  PYFT_HOST_DEVICE float signed_at(int moment, int32_t i) const {
    return decode_signed(codes[moment][i], lowest[moment]);
  }
  PYFT_HOST_DEVICE float unsigned_at(int moment, int32_t i) const {
    return decode_unsigned(static_cast<uint8_t>(codes[moment][i]), lowest[moment]);
  }
};

// Bits of floats without their sign are in the order of their sizes, and an integer maximum keeps NaN.
PYFT_HOST_DEVICE uint32_t larger_size(uint32_t largest, float x) {
  const uint32_t size = bits_of(x) & 0x7fffffffu;
  return size > largest ? size : largest;
}

using RuleLoop = void (*)(float* param, const float* grad, Coded& coded, float* first, float* second, float* third,
                          int32_t length, float grad_scale, const RuleStep& step);

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
#include "update_loops.h"

#define PYFT_LOOPS avx512
#define PYFT_LOOPS_TARGET PYFT_TARGET_AVX512
#include "update_loops.h"
#endif

namespace pyft {

void update_cpu(const TensorUpdate& tensor, int64_t offset, int64_t length) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::update_chunk(tensor, offset, length);
    case CpuTarget::avx2:
      return avx2::update_chunk(tensor, offset, length);
    default:
      break;
  }
#endif
  baseline::update_chunk(tensor, offset, length);
}

}  // namespace pyft
