// Max pooling that keeps, for each output, which place of its window was the largest: one byte where torch keeps eight.
#pragma once

#include <cstdint>

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

// One dimension of the windows. Window `o` covers inputs o * stride - padding + k * dilation, 0 <= k < kernel.
template <class Int>
struct PoolAxisOf {
  Int in, out, kernel, stride, padding, dilation;

  PYFT_HOST_DEVICE Int start(Int o) const { return o * stride - padding; }

  // First k that is inside the input.
  PYFT_HOST_DEVICE Int first(Int o) const {
    const Int before = -start(o);
    return before <= 0 ? 0 : (before + dilation - 1) / dilation;
  }

  PYFT_HOST_DEVICE bool inside(Int o, Int k) const {
    const Int place = start(o) + k * dilation;
    return place >= 0 && place < in;
  }

  // Windows begin() .. end() - 1 have input k inside.
  PYFT_HOST_DEVICE Int begin(Int k) const {
    const Int before = padding - k * dilation;
    return before <= 0 ? 0 : (before + stride - 1) / stride;
  }

  PYFT_HOST_DEVICE Int end(Int k) const {
    const Int room = in - 1 + padding - k * dilation;
    const Int last = room < 0 ? 0 : room / stride + 1;
    return last < out ? last : out;
  }

  // Windows first_over(i) .. last_over(i) are those whose span meets input i. by_stride(n): n / stride, n >= 0.
  template <class Quotient>
  PYFT_HOST_DEVICE Int first_over(Int i, const Quotient& by_stride) const {
    const Int before = i + padding - (kernel - 1) * dilation;
    return before <= 0 ? 0 : static_cast<Int>(by_stride(before + stride - 1));
  }

  template <class Quotient>
  PYFT_HOST_DEVICE Int last_over(Int i, const Quotient& by_stride) const {
    const Int last = static_cast<Int>(by_stride(i + padding));
    return last < out ? last : out - 1;
  }
};
using PoolAxis = PoolAxisOf<int64_t>;

struct PoolShape {
  PoolAxis height, width;
};

// As torch: the first of equal values wins, the last NaN wins over all.
template <class Element>
PYFT_HOST_DEVICE bool is_larger(Element x, Element largest) {
  const float value = to_fp32(x);
  return (value > to_fp32(largest)) | (value != value);
}

// In order as numbers are, NaN above all: fewer instructions than conversions.
PYFT_HOST_DEVICE int32_t rank_of(Fp16 x) {
  constexpr int32_t kInfinity = 0x7c00;
  const int32_t size = x.bits & 0x7fff;
  return size > kInfinity ? kInfinity + 1 : (x.bits & 0x8000) != 0 ? -size : size;
}
PYFT_HOST_DEVICE bool is_larger(Fp16 x, Fp16 largest) {
  const int32_t rank = rank_of(x);
  return (rank > rank_of(largest)) | (rank > 0x7c00);
}

template <class Element>
PYFT_HOST_DEVICE void take_larger(Element x, int32_t place, Element& largest, int32_t& at) {
  const bool take = is_larger(x, largest);
  largest = take ? x : largest;
  at = take ? place : at;
}

}  // namespace pyft
