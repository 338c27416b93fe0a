// Max pooling that keeps, for each output, which place of its window was the largest: one byte where torch keeps eight.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

// One dimension of the windows. Window `o` covers inputs o * stride - padding + k * dilation, 0 <= k < kernel.
struct PoolAxis {
  int64_t in, out, kernel, stride, padding, dilation;

  PYFT_HOST_DEVICE int64_t start(int64_t o) const { return o * stride - padding; }

  // First k that is inside the input.
  PYFT_HOST_DEVICE int64_t first(int64_t o) const {
    const int64_t before = -start(o);
    return before <= 0 ? 0 : (before + dilation - 1) / dilation;
  }

  PYFT_HOST_DEVICE bool inside(int64_t o, int64_t k) const {
    const int64_t place = start(o) + k * dilation;
    return place >= 0 && place < in;
  }

  // Windows begin() .. end() - 1 have input k inside.
  PYFT_HOST_DEVICE int64_t begin(int64_t k) const {
    const int64_t before = padding - k * dilation;
    return before <= 0 ? 0 : (before + stride - 1) / stride;
  }

  PYFT_HOST_DEVICE int64_t end(int64_t k) const {
    const int64_t room = in - 1 + padding - k * dilation;
    const int64_t last = room < 0 ? 0 : room / stride + 1;
    return last < out ? last : out;
  }
};

struct PoolShape {
  PoolAxis height, width;
};

// As torch: the first of equal values wins, the last NaN wins over all.
PYFT_HOST_DEVICE void take_larger(float x, int32_t place, float& largest, int32_t& at) {
  const bool take = (x > largest) | (x != x);
  largest = take ? x : largest;
  at = take ? place : at;
}

}  // namespace pyft
