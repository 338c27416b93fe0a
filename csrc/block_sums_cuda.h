// Sums over a warp, a thread block, and the chunks of a tensor, with a shape that depends on sizes alone.
#pragma once

#include "cuda_launch.h"
#include "wide_double_math.h"

namespace pyft {

// Chunks that one thread adds; more are shared out among a warp, and many among the block.
constexpr int kFewChunks = 96;
constexpr int kManyChunks = 2048;

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
  if (warp == 0) {
    if (lane < warps) {
      sum = {scratch[2 * lane], scratch[2 * lane + 1]};
    }
    sum = warp_sum(sum);
  }
  return sum;
}

// sums[t] of term(begin[t]) .. term(begin[t + 1] - 1), by one thread block. A barrier makes them visible to it.
// `scratch`: shared, a double for each warp.
template <class Term, class Shared>
__device__ __forceinline__ void sum_of_each(const Term& term, const int64_t* begin, int64_t count, double* sums,
                                            Shared scratch) {
  for (int64_t t = threadIdx.x; t < count; t += blockDim.x) {
    const int64_t first = load(begin + t), last = load(begin + t + 1);
    if (last - first <= kFewChunks) {
      double sum = 0.0;
#pragma unroll 8
      for (int64_t c = first; c < last; ++c) {
        sum += term(c);
      }
      store(sums + t, sum);
    }
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = threadIdx.x / kWarp; t < count; t += blockDim.x / kWarp) {
    const int64_t first = load(begin + t), last = load(begin + t + 1);
    if (last - first > kFewChunks && last - first <= kManyChunks) {
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
  // Every warp's tensors are asked about at once: few tensors, or none, have so many.
  for (int64_t start = 0; start < count; start += kWarp) {
    const int64_t mine = start + lane;
    const bool many = mine < count && load(begin + mine + 1) - load(begin + mine) > kManyChunks;
    for (uint32_t left = __ballot_sync(kAllLanes, many); left != 0; left &= left - 1) {
      const int64_t t = start + __ffs(left) - 1, last = load(begin + t + 1);
      double sum = 0.0;
#pragma unroll 8
      for (int64_t c = load(begin + t) + threadIdx.x; c < last; c += blockDim.x) {
        sum += term(c);
      }
      sum = block_sum(sum, scratch);
      if (threadIdx.x == 0) {
        store(sums + t, sum);
      }
      __syncthreads();
    }
  }
}

#endif

}  // namespace pyft
