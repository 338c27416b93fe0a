// One element of clipping, computed in fp32 and rounded once.
#pragma once

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

PYFT_HOST_DEVICE void round_into(float& place, float x) { place = x; }
PYFT_HOST_DEVICE void round_into(Bf16& place, float x) { place = to_bf16(x); }
PYFT_HOST_DEVICE void round_into(Fp16& place, float x) { place = to_fp16(x); }

struct ScaleBy {
  float factor;

  PYFT_HOST_DEVICE float operator()(float x) const { return x * factor; }
};

// NaN stays NaN: it fails both comparisons.
struct ClampTo {
  float limit;

  PYFT_HOST_DEVICE float operator()(float x) const {
    const float upper = x > limit ? limit : x;
    return upper < -limit ? -limit : upper;
  }
};

// torch's factor min(1, max_norm / (total_norm + 1e-6)), rounded in fp32 as torch.nn.utils rounds it: a number by a
// tensor is the reciprocal times the number.
PYFT_HOST_DEVICE double clip_coefficient(double total_norm, double max_norm) {
  const float norm = static_cast<float>(total_norm);
  // x - x is 0 for finite numbers only.
  if (norm - norm != 0.0f) {
    const double coef = max_norm / (total_norm + 1e-6);
    return coef < 1.0 ? coef : 1.0;
  }
  const double coef = 1.0f / (norm + 1e-6f) * static_cast<float>(max_norm);
  return coef < 1.0 ? coef : 1.0;
}

template <class Element, class Change>
PYFT_HOST_DEVICE void change_each(Element* x, int64_t length, const Change& change) {
  for (int64_t i = 0; i < length; ++i) {
    round_into(x[i], change(to_fp32(x[i])));
  }
}

}  // namespace pyft
