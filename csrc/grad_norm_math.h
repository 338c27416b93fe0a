// Sum of squares of one chunk with a fixed shape: four quarters, kLanes running sums in each, then a tree. The shape
// does not depend on the vector width, so every CPU target gives the same bits. A square of an fp32 number is exact in
// double and cannot overflow there, so the norm is right even where torch's fp32 one becomes inf.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

constexpr int kLanes = 8;
// One core does not keep the memory busy with one stream of loads: four, fetched this many elements ahead.
constexpr int kStreams = 4;
constexpr int64_t kFetchAhead = 512;

PYFT_HOST_DEVICE double square(float x) {
  const double wide = x;
  return wide * wide;
}

PYFT_HOST_DEVICE double sum_of_squares_chunk(const float* x, int64_t length) {
  constexpr int kSums = kStreams * kLanes;
  double sums[kSums] = {};
  const int64_t quarter = length / kSums * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes) {
#ifndef __CUDACC__
    // Written out: a prefetch inside the loop over streams keeps it from being vectorised.
    __builtin_prefetch(x + i + kFetchAhead);
    __builtin_prefetch(x + quarter + i + kFetchAhead);
    __builtin_prefetch(x + 2 * quarter + i + kFetchAhead);
    __builtin_prefetch(x + 3 * quarter + i + kFetchAhead);
#endif
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[stream * kLanes + lane] += square(x[stream * quarter + i + lane]);
      }
    }
  }
  // A sum indexed at run time would keep all of them out of registers, so the rest is padded with zeros.
  float rest[kSums] = {};
  for (int64_t i = kStreams * quarter; i < length; ++i) {
    rest[i - kStreams * quarter] = x[i];
  }
  for (int lane = 0; lane < kSums; ++lane) {
    sums[lane] += square(rest[lane]);
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
    }
  }
  return sums[0];
}

}  // namespace pyft
