// Sums over a warp, a thread block, and the chunks of a tensor, with a shape that depends on sizes alone.
#pragma once

#include "cuda_launch.h"
#include "wide_double_math.h"

namespace pyft {

// Chunks that one thread adds; more are shared out among a warp.
constexpr int kFewChunks = 16;

#ifdef PYFT_SITE

// In lane 0. For all lanes of a warp.
__device__ __forceinline__ double warp_sum(double x) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    x += __shfl_down_sync(kAllLanes, x, width);
  }
  return x;
}

__device__ __forceinline__ WideDouble warp_sum(WideDouble x) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const double high = __shfl_down_sync(kAllLanes, x.high, width), low = __shfl_down_sync(kAllLanes, x.low, width);
    x = add_wide(x, {high, low});
  }
  return x;
}

// In all lanes.
__device__ __forceinline__ double warp_min(double x) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, x, width);
    x = other < x ? other : x;
  }
  return x;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, width);
    x = other > x ? other : x;
  }
  return x;
}

// In thread 0. `scratch`: shared, a double for each warp; free again after the next barrier.
template <class Shared>
__device__ __forceinline__ double block_sum(double x, Shared scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) {
    scratch[warp] = x;
  }
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; threadIdx.x == 0 && i < warps; ++i) {
    sum += scratch[i];
  }
  return sum;
}

// As above, with two doubles for each warp.
template <class Shared>
__device__ __forceinline__ WideDouble block_sum(WideDouble x, Shared scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) {
    scratch[2 * warp] = x.high;
    scratch[2 * warp + 1] = x.low;
  }
  __syncthreads();
  WideDouble sum = {0.0, 0.0};
  for (int i = 0; threadIdx.x == 0 && i < warps; ++i) {
    sum = add_wide(sum, {scratch[2 * i], scratch[2 * i + 1]});
  }
  return sum;
}

// sums[t] of term(begin[t]) .. term(begin[t + 1] - 1), by one thread block. A barrier makes them visible to it.
template <class Term>
__device__ __forceinline__ void sum_of_each(const Term& term, const int64_t* begin, int64_t count, double* sums) {
  for (int64_t t = threadIdx.x; t < count; t += blockDim.x) {
    const int64_t first = load(begin + t), last = load(begin + t + 1);
    if (last - first <= kFewChunks) {
      double sum = 0.0;
#pragma unroll 4
      for (int64_t c = first; c < last; ++c) {
        sum += term(c);
      }
      store(sums + t, sum);
    }
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = threadIdx.x / kWarp; t < count; t += blockDim.x / kWarp) {
    const int64_t first = load(begin + t), last = load(begin + t + 1);
    if (last - first > kFewChunks) {
      double sum = 0.0;
#pragma unroll 8
      for (int64_t c = first + lane; c < last; c += kWarp) {
        sum += term(c);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        store(sums + t, sum);
      }
    }
  }
}

#endif

}  // namespace pyft
