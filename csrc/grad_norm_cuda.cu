#include "block_sums_cuda.h"
#include "four_elements_cuda.h"
#include "grad_norm_cuda.h"
#include "grad_norm_math.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
// Loads that each thread has under way.
constexpr int kLoads = 4;
constexpr int kElementsAtOnce = kThreads * kFour * kLoads;
constexpr int kFinishThreads = 512;

// Each thread adds places 4 t .. 4 t + 3 of every 1024, in four running sums; `add` gets one of them, its number and an
// element. Zeros where the chunk ends early.
template <FloatFormat kFormat, class Add>
__device__ __forceinline__ void for_each_of(const void* data, const DeviceChunk& chunk, const Add& add) {
  for (int begin = static_cast<int>(threadIdx.x) * kFour; begin < chunk.length; begin += kElementsAtOnce) {
    Four raw[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int place = begin + j * kThreads * kFour, left = chunk.length - place;
      raw[j] = load_four(data, bytes_of(kFormat), chunk.offset + place, left < 0 ? 0 : left < kFour ? left : kFour);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        add(i, fp32_at(raw[j], kFormat, i));
      }
    }
  }
}

template <class Add>
__device__ __forceinline__ void for_each_element(const DeviceFloats& tensor, const DeviceChunk& chunk, const Add& add) {
  const FloatFormat format = tensor.float_format();
  if (format == FloatFormat::fp32) {
    for_each_of<FloatFormat::fp32>(tensor.data, chunk, add);
  } else if (format == FloatFormat::bf16) {
    for_each_of<FloatFormat::bf16>(tensor.data, chunk, add);
  } else {
    for_each_of<FloatFormat::fp16>(tensor.data, chunk, add);
  }
}

template <class Term>
__global__ void __launch_bounds__(kThreads) sum_kernel(DeviceFloatsTable table, Term term, double* partial) {
  PYFT_SHARED(double, of_warps, kThreads / kWarp);
  for (int64_t c = blockIdx.x; c < table.num_chunks; c += gridDim.x) {
    const DeviceChunk chunk = load(table.chunks + c);
    double sums[kFour] = {};
    const auto known = term.known();
    for_each_element(load(table.tensors + chunk.tensor), chunk,
                     [&](int i, float x) { sums[i] = known.add_to(sums[i], x); });
    const double sum = block_sum((sums[0] + sums[2]) + (sums[1] + sums[3]), of_warps);
    if (threadIdx.x == 0) {
      store(partial + c, sum);
    }
    __syncthreads();
  }
}

// Bits of the largest magnitude of each chunk, as a double beside the other sums: whole numbers are exact there.
__global__ void __launch_bounds__(kThreads) largest_kernel(DeviceFloatsTable table, double* partial) {
  PYFT_SHARED(uint32_t, of_warps, kThreads / kWarp);
  for (int64_t c = blockIdx.x; c < table.num_chunks; c += gridDim.x) {
    const DeviceChunk chunk = load(table.chunks + c);
    uint32_t largest = 0;
    for_each_element(load(table.tensors + chunk.tensor), chunk, [&](int, float x) {
      const uint32_t bits = bits_of(x) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    });
    largest = warp_max(largest);
    if (threadIdx.x % kWarp == 0) {
      of_warps[threadIdx.x / kWarp] = largest;
    }
    __syncthreads();
    for (int i = 0; threadIdx.x == 0 && i < kThreads / kWarp; ++i) {
      largest = of_warps[i] > largest ? static_cast<uint32_t>(of_warps[i]) : largest;
    }
    if (threadIdx.x == 0) {
      store(partial + c, static_cast<double>(largest));
    }
    __syncthreads();
  }
}

// Terms that need nothing from device memory are known at the launch.
template <class Known>
struct Given {
  Known term;

  __device__ __forceinline__ Known known() const { return term; }
};

struct PowerOfLargest {
  const double* largest;
  double p;

  __device__ __forceinline__ ScaledPowerByLogarithm known() const { return {load(largest), p}; }
};

// One block. scratch[0]: the largest magnitude of all chunks.
__global__ void __launch_bounds__(kFinishThreads)
    finish_largest_kernel(const double* partial, int64_t num_chunks, double* largest_of_all, float* norm) {
  PYFT_SHARED(uint32_t, of_warps, kFinishThreads / kWarp);
  uint32_t largest = 0;
  for (int64_t c = threadIdx.x; c < num_chunks; c += kFinishThreads) {
    const uint32_t bits = static_cast<uint32_t>(load(partial + c));
    largest = bits > largest ? bits : largest;
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = largest;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kFinishThreads / kWarp; ++i) {
      largest = of_warps[i] > largest ? static_cast<uint32_t>(of_warps[i]) : largest;
    }
    store(largest_of_all, static_cast<double>(float_of(largest)));
    store(norm, float_of(largest));
  }
}

// One block. `largest`: null for p = 1 and 2.
__global__ void __launch_bounds__(kFinishThreads)
    finish_norm_kernel(DeviceFloatsTable table, const double* partial, double* sums, const double* largest, double p,
                       float* norm) {
  PYFT_SHARED(double, of_warps, 2 * kFinishThreads / kWarp);
  sum_of_each([=](int64_t c) { return load(partial + c); }, table.begin, table.num_tensors, sums, of_warps);
  __syncthreads();
  WideDouble mine = {0.0, 0.0};
  for (int64_t t = threadIdx.x; t < table.num_tensors; t += kFinishThreads) {
    mine = add_wide(mine, {load(sums + t), 0.0});
  }
  const double total = block_sum(mine, of_warps).rounded();
  if (threadIdx.x != 0) {
    return;
  }
  if (largest == nullptr) {
    store(norm, static_cast<float>(p == 2.0 ? sqrt(total) : total));
    return;
  }
  const double size = load(largest);
  // x - x is 0 for finite numbers only.
  const bool plain = size != 0.0 && size - size == 0.0;
  store(norm, static_cast<float>(plain ? size * exp2(log2(total) / p) : size));
}

template <class Term>
cudaError_t launch_sum(const DeviceFloatsTable& table, const Term& term, double* partial, cudaStream_t stream) {
  return PYFT_LAUNCH(sum_kernel<Term>, UpTo{table.num_chunks}, kThreads, stream, table, term, partial);
}

cudaError_t launch_largest(const DeviceFloatsTable& table, double* partial, cudaStream_t stream) {
  return PYFT_LAUNCH(largest_kernel, UpTo{table.num_chunks}, kThreads, stream, table, partial);
}

}  // namespace

cudaError_t launch_sum_of_squares(const DeviceFloatsTable& table, float clip_value, double* partial,
                                  cudaStream_t stream) {
  return clip_value < INFINITY ? launch_sum(table, Given<ClampedSquare>{{clip_value}}, partial, stream)
                               : launch_sum(table, Given<Square>{}, partial, stream);
}

cudaError_t launch_norm(const DeviceFloatsTable& table, double p, double* scratch, float* norm, cudaStream_t stream) {
  double *partial = scratch, *sums = partial + table.num_chunks, *largest = sums + table.num_tensors;
  const bool scaled = p != 1.0 && p != 2.0;
  cudaError_t error = cudaSuccess;
  if (scaled) {
    error = launch_largest(table, partial, stream);
    if (error == cudaSuccess) {
      error = PYFT_LAUNCH(finish_largest_kernel, 1, kFinishThreads, stream, partial, table.num_chunks, largest, norm);
    }
    if (error != cudaSuccess || std::isinf(p)) {
      return error;
    }
    error = launch_sum(table, PowerOfLargest{largest, p}, partial, stream);
  } else {
    error = p == 2.0 ? launch_sum(table, Given<Square>{}, partial, stream)
                     : launch_sum(table, Given<Magnitude>{}, partial, stream);
  }
  if (error != cudaSuccess) {
    return error;
  }
  return PYFT_LAUNCH(finish_norm_kernel, 1, kFinishThreads, stream, table, partial, sums, scaled ? largest : nullptr, p,
                     norm);
}

}  // namespace pyft
