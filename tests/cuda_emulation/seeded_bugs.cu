// Kernels with one mistake each, and the same without it: seeded_bugs CASE broken|mended ORDER [SEED]. Exit status 0
// and the result on stdout, or 1 and what the emulation says on stderr.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_launch.h"

namespace {

using namespace pyft;

constexpr int kThreads = 128;

template <bool kMended>
__global__ void missing_barrier(const float* x, float* y) {
  PYFT_SHARED(float, turned, kThreads);
  turned[threadIdx.x] = load(x + threadIdx.x);
  if (kMended) {
    __syncthreads();
  }
  store(y + threadIdx.x, turned[kThreads - 1 - threadIdx.x]);
}

// Each round writes what the one before still reads.
template <bool kMended>
__global__ void missing_second_barrier(const float* x, float* y) {
  PYFT_SHARED(float, of_round, kThreads);
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    of_round[threadIdx.x] = load(x + threadIdx.x) + round;
    __syncthreads();
    sum += of_round[(threadIdx.x + 32) % kThreads];
    if (kMended) {
      __syncthreads();
    }
  }
  store(y + threadIdx.x, sum);
}

template <bool kMended>
__global__ void missing_syncwarp(const float* x, float* y) {
  PYFT_SHARED(float, turned, kThreads);
  turned[threadIdx.x] = load(x + threadIdx.x);
  if (kMended) {
    __syncwarp();
  }
  store(y + threadIdx.x, turned[threadIdx.x ^ 1]);
}

// A shuffle meets the lanes of a warp, but does not order their memory.
template <bool kMended>
__global__ void shuffle_for_a_fence(const float* x, float* y) {
  PYFT_SHARED(float, turned, kThreads);
  turned[threadIdx.x] = load(x + threadIdx.x);
  const float other = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  if (kMended) {
    __syncwarp();
  }
  store(y + threadIdx.x, turned[threadIdx.x ^ 1] * other);
}

template <bool kMended>
__global__ void barrier_for_some(const float* x, float* y) {
  if (kMended || threadIdx.x < 64) {
    __syncthreads();
  }
  store(y + threadIdx.x, load(x + threadIdx.x));
}

template <bool kMended>
__global__ void exit_before_barrier(const float* x, float* y) {
  if (!kMended && threadIdx.x == 5) {
    return;
  }
  __syncthreads();
  store(y + threadIdx.x, load(x + threadIdx.x));
}

template <bool kMended>
__global__ void two_barriers(const float* x, float* y) {
  if (kMended || threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(y + threadIdx.x, load(x + threadIdx.x));
}

template <bool kMended>
__global__ void exit_before_shuffle(const float* x, float* y) {
  const bool inside = threadIdx.x < 100;
  if (!kMended && !inside) {
    return;
  }
  const float sum = __shfl_down_sync(kAllLanes, inside ? load(x + threadIdx.x) : 0.0f, 1);
  if (inside) {
    store(y + threadIdx.x, sum);
  }
}

template <bool kMended>
__global__ void mask_without_caller(const float* x, float* y) {
  store(y + threadIdx.x, __shfl_xor_sync(kMended ? kAllLanes : 0x0000ffffu, load(x + threadIdx.x), 1));
}

template <bool kMended>
__global__ void mask_of_absent_lanes(const float* x, float* y) {
  float value = load(x + threadIdx.x);
  if (threadIdx.x % kWarp < 16) {
    value = __shfl_xor_sync(kMended ? 0x0000ffffu : kAllLanes, value, 1);
  }
  store(y + threadIdx.x, value);
}

template <bool kMended>
__global__ void shuffle_from_outside_its_mask(const float* x, float* y) {
  float value = load(x + threadIdx.x);
  if (threadIdx.x % kWarp < 16) {
    value = __shfl_xor_sync(0x0000ffffu, value, kMended ? 8 : 16);
  }
  store(y + threadIdx.x, value);
}

template <bool kMended>
__global__ void vector_tail(const float* x, float* y, int length) {
  const int first = 4 * threadIdx.x;
  if (first + 4 <= length || (!kMended && first < length)) {
    store_vector(y + first, load_vector<4>(x + first));
  } else {
    for (int i = first; i < length; ++i) {
      store(y + i, load(x + i));
    }
  }
}

template <bool kMended>
__global__ void misaligned(const float* x, float* y) {
  const float* from = x + 1;
  Vector<float, 4> value = {};
  if (kMended && !vector_aligned(from)) {
    for (int i = 0; i < 4; ++i) {
      value.at[i] = load(from + i);
    }
  } else {
    value = load_vector<4>(from);
  }
  if (threadIdx.x == 0) {
    store_vector(y, value);
  }
}

template <bool kMended>
__global__ void unwritten_shared(const float*, float* y) {
  PYFT_SHARED(float, sums, kThreads);
  if (kMended || threadIdx.x % 2 == 0) {
    sums[threadIdx.x] = 1.0f;
  }
  __syncthreads();
  store(y + threadIdx.x, sums[threadIdx.x ^ 1]);
}

template <bool kMended>
__global__ void beyond_shared(const float* x, float* y) {
  PYFT_SHARED(float, sums, kThreads);
  sums[threadIdx.x + (kMended ? 0 : 1)] = load(x + threadIdx.x);
  __syncthreads();
  store(y + threadIdx.x, sums[threadIdx.x + (kMended ? 0 : 1)]);
}

template <bool kMended>
__global__ void race_of_blocks(const float* x, float* y) {
  if (kMended) {
    atomicAdd(y, load(x + threadIdx.x));
  } else if (threadIdx.x == 0) {
    store(y, load(y) + load(x));
  }
}

// Bytes side by side, written by different blocks, are no race; the same byte is one.
template <bool kMended>
__global__ void race_of_bytes(const float*, float* y) {
  store(reinterpret_cast<unsigned char*>(y) + threadIdx.x * gridDim.x + (kMended ? blockIdx.x : 0),
        static_cast<unsigned char>(1));
}

// The last block adds what all have written: fences before the atomic that gives and after the one that takes.
template <bool kMended>
__global__ void last_block(const float* x, float* y) {
  PYFT_SHARED(int, is_last, 1);
  unsigned* arrived = reinterpret_cast<unsigned*>(y + kThreads);
  if (threadIdx.x == 0) {
    store(y + 1 + blockIdx.x, load(x + blockIdx.x));
    if (kMended) {
      __threadfence();
    }
    is_last[0] = atomicAdd(arrived, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] != 0 && threadIdx.x == 40) {
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) {
      sum += load(y + 1 + b);
    }
    store(y, sum);
  }
}

// Waits for a thread of its block that has not begun.
template <bool kMended>
__global__ void endless_wait(const float*, float* y) {
  int* flag = reinterpret_cast<int*>(y);
  if (kMended && threadIdx.x == 77) {
    atomicExch(flag, 1);
  }
  while (atomicAdd(flag, 0) == 0) {
  }
}

template <bool kMended>
__global__ void too_much_shared(const float* x, float* y) {
  PYFT_SHARED(double, large, kMended ? 6144 : 6145);
  large[threadIdx.x] = load(x + threadIdx.x);
  store(y + threadIdx.x, static_cast<float>(large[threadIdx.x]));
}

struct Data {
  std::vector<float> x, y;
};

using Kernel = void (*)(const float*, float*);

struct Case {
  const char* name;
  Kernel broken, mended;
  unsigned grid = 1;
};

#define CASE(name, ...) {#name, name<false>, name<true>, ##__VA_ARGS__}

const Case kCases[] = {CASE(missing_barrier),
                       CASE(missing_second_barrier),
                       CASE(missing_syncwarp),
                       CASE(shuffle_for_a_fence),
                       CASE(barrier_for_some),
                       CASE(exit_before_barrier),
                       CASE(two_barriers),
                       CASE(exit_before_shuffle),
                       CASE(mask_without_caller),
                       CASE(mask_of_absent_lanes),
                       CASE(shuffle_from_outside_its_mask),
                       CASE(misaligned),
                       CASE(unwritten_shared),
                       CASE(beyond_shared),
                       CASE(race_of_blocks, 4),
                       CASE(race_of_bytes, 3),
                       CASE(last_block, 4),
                       CASE(endless_wait),
                       CASE(too_much_shared)};

void print(const std::vector<float>& y, int count) {
  for (int i = 0; i < count; ++i) {
    std::printf("%g ", y[i]);
  }
  std::printf("\n");
}

cudaError_t run(const std::string& name, bool mended) {
  // No more than is needed, so that AddressSanitizer sees an access beyond.
  std::vector<float> x(kThreads + 8), y(kThreads + 8);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i);
  }
  if (name == "vector_tail") {
    x.resize(509);
    x.shrink_to_fit();
    y.assign(509, 0.0f);
    y.shrink_to_fit();
    const cudaError_t error = mended ? PYFT_LAUNCH(vector_tail<true>, 1, kThreads, nullptr, x.data(), y.data(), 509)
                                     : PYFT_LAUNCH(vector_tail<false>, 1, kThreads, nullptr, x.data(), y.data(), 509);
    print(y, 4);
    return error;
  }
  for (const Case& one : kCases) {
    if (name == one.name) {
      const Kernel kernel = mended ? one.mended : one.broken;
      const cudaError_t error =
          cuda_emulation::launch(one.name, kernel, one.grid, kThreads, nullptr, x.data(), y.data());
      print(y, 4);
      return error;
    }
  }
  std::fprintf(stderr, "there is no case %s\n", name.c_str());
  return cudaErrorInvalidValue;
}

}  // namespace

int main(int count, char** words) {
  const std::string order = words[3];
  cuda_emulation::settings.order = order == "ascending"    ? cuda_emulation::Order::ascending
                                   : order == "descending" ? cuda_emulation::Order::descending
                                                           : cuda_emulation::Order::random;
  cuda_emulation::settings.seed = count > 4 ? std::stoull(words[4]) : 0;
  cuda_emulation::settings.races = count <= 5;
  try {
    return run(words[1], std::string(words[2]) == "mended") == cudaSuccess ? 0 : 1;
  } catch (const cuda_emulation::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
