#include "block_sums_cuda.h"
#include "four_elements_cuda.h"
#include "grad_norm_math.h"
#include "row_norms_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows up to this length are summed by one warp each, longer ones by the block.
constexpr int64_t kShortRow = 1024;

// This thread's part of a sum over elements begin .. begin + length - 1, as one of `threads`.
template <class Term>
__device__ __forceinline__ double part_of_sum(const DeviceFloats& x, int64_t begin, int64_t length, int thread,
                                              int threads, const Term& term) {
  const FloatFormat format = x.float_format();
  double sums[kFour] = {};
#pragma unroll 2
  for (int64_t i = static_cast<int64_t>(thread) * kFour; i < length; i += static_cast<int64_t>(threads) * kFour) {
    const int64_t left = length - i;
    const Four raw = load_four(x.data, bytes_of(format), begin + i, left < kFour ? static_cast<int>(left) : kFour);
#pragma unroll
    for (int k = 0; k < kFour; ++k) {
      sums[k] = term.add_to(sums[k], fp32_at(raw, format, k));
    }
  }
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

struct RowSums {
  double grad, param;
};

__device__ __forceinline__ RowSums parts_of_row(const RowNormsWork& work, int32_t tensor, int64_t begin, int64_t length,
                                                int thread, int threads) {
  const DeviceFloats grad = load(work.grads + tensor), param = load(work.params + tensor);
  return {work.clip_value < INFINITY ? part_of_sum(grad, begin, length, thread, threads, ClampedSquare{work.clip_value})
                                     : part_of_sum(grad, begin, length, thread, threads, Square{}),
          part_of_sum(param, begin, length, thread, threads, Square{})};
}

__device__ __forceinline__ void write_row(const RowNormsWork& work, int64_t row, const RowSums& sums) {
  if (work.sums != nullptr) {
    store(work.sums + row, sums.grad);
  }
  store(work.factors + row, static_cast<float>(agc_row_factor(sums.grad, sums.param, work.clipping, work.eps)));
}

__global__ void __launch_bounds__(kThreads) row_norms_kernel(RowNormsWork work) {
  PYFT_SHARED(double, of_grad, kWarps);
  PYFT_SHARED(double, of_param, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t number = blockIdx.x; number < work.num_tasks; number += gridDim.x) {
    const RowTask task = load(work.tasks + number);
    const DeviceRows rows = load(work.rows + task.tensor);
    if (rows.length <= kShortRow) {
      for (int64_t i = warp; i < task.rows; i += kWarps) {
        const int64_t row = task.first + i;
        RowSums sums = parts_of_row(work, task.tensor, row * rows.length, rows.length, lane, kWarp);
        sums = {warp_sum(sums.grad), warp_sum(sums.param)};
        if (lane == 0) {
          write_row(work, rows.first_row + row, sums);
        }
      }
      continue;
    }
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t row = task.first + i;
      RowSums sums = parts_of_row(work, task.tensor, row * rows.length, rows.length, threadIdx.x, kThreads);
      sums = {block_sum(sums.grad, of_grad), block_sum(sums.param, of_param)};
      if (threadIdx.x == 0) {
        write_row(work, rows.first_row + row, sums);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t launch_row_norms(const RowNormsWork& work, cudaStream_t stream) {
  return PYFT_LAUNCH(row_norms_kernel, UpTo{work.num_tasks}, kThreads, stream, work);
}

}  // namespace pyft
