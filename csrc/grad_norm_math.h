// Sum of squares of one chunk with a fixed shape: two halves, kLanes running sums in each, then a tree. The shape does
// not depend on the vector width, so every CPU target gives the same bits. A square of an fp32 number is exact in
// double and cannot overflow there, so the norm is right even where torch's fp32 one becomes inf.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

constexpr int kLanes = 16;
// One core does not keep the memory busy with one stream of loads: two streams, fetched this many elements ahead.
constexpr int64_t kFetchAhead = 1024;

PYFT_HOST_DEVICE double square(float x) {
  const double wide = x;
  return wide * wide;
}

PYFT_HOST_DEVICE double sum_of_squares_chunk(const float* x, int64_t length) {
  double sums[2 * kLanes] = {};
  const int64_t half = length / (2 * kLanes) * kLanes;
  for (int64_t i = 0; i < half; i += kLanes) {
#ifndef __CUDACC__
    __builtin_prefetch(x + i + kFetchAhead);
    __builtin_prefetch(x + half + i + kFetchAhead);
#endif
    for (int stream = 0; stream < 2; ++stream) {
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[stream * kLanes + lane] += square(x[stream * half + i + lane]);
      }
    }
  }
  // A sum indexed at run time would keep all of them out of registers, so the rest is padded with zeros.
  float rest[2 * kLanes] = {};
  for (int64_t i = 2 * half; i < length; ++i) {
    rest[i - 2 * half] = x[i];
  }
  for (int lane = 0; lane < 2 * kLanes; ++lane) {
    sums[lane] += square(rest[lane]);
  }
  for (int width = kLanes; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
    }
  }
  return sums[0];
}

}  // namespace pyft
