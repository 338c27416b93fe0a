#include "clip_grads_cpu.h"

#include "clip_grads_math.h"
#include "cpu_target.h"

namespace pyft {
namespace {

template <class Element, class Change>
void change_baseline(Element* x, int64_t length, const Change& change) {
  change_each(x, length, change);
}

#if PYFT_X86_TARGETS
template <class Element, class Change>
PYFT_TARGET_AVX2 void change_avx2(Element* x, int64_t length, const Change& change) {
  change_each(x, length, change);
}

template <class Element, class Change>
PYFT_TARGET_AVX512 void change_avx512(Element* x, int64_t length, const Change& change) {
  change_each(x, length, change);
}
#endif

template <class Element, class Change>
void change_on_target(Element* x, int64_t length, const Change& change) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return change_avx512(x, length, change);
    case CpuTarget::avx2:
      return change_avx2(x, length, change);
    default:
      break;
  }
#endif
  change_baseline(x, length, change);
}

template <class Change>
void change_in_format(FloatData x, int64_t offset, int64_t length, const Change& change) {
  void* data = const_cast<void*>(x.data);
  switch (x.format) {
    case FloatFormat::bf16:
      return change_on_target(static_cast<Bf16*>(data) + offset, length, change);
    case FloatFormat::fp16:
      return change_on_target(static_cast<Fp16*>(data) + offset, length, change);
    default:
      return change_on_target(static_cast<float*>(data) + offset, length, change);
  }
}

}  // namespace

void scale_cpu(FloatData x, int64_t offset, int64_t length, float factor) {
  change_in_format(x, offset, length, ScaleBy{factor});
}

void clamp_cpu(FloatData x, int64_t offset, int64_t length, float limit) {
  change_in_format(x, offset, length, ClampTo{limit});
}

}  // namespace pyft
