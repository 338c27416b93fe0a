#include "block_sums_cuda.h"
#include "four_elements_cuda.h"
#include "grad_norm_math.h"
#include "row_norms_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows up to this length are summed by one warp each, longer ones by the block, those above kWholeRow by several.
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

// In thread 0. The barrier of each sum frees the scratch of the other.
template <class Shared>
__device__ __forceinline__ RowSums sums_of_block(const RowSums& mine, Shared of_grad, Shared of_param) {
  const double grad = block_sum(mine.grad, of_grad);
  return {grad, block_sum(mine.param, of_param)};
}

// The sums of one piece; those of its row by the block that is done last, in the order of the pieces.
template <class Shared, class Flag>
__device__ __forceinline__ void sum_piece(const RowNormsWork& work, const RowTask& task, const DeviceRows& rows,
                                          Shared of_grad, Shared of_param, Flag is_last) {
  const DeviceCutRows cut = load(work.cut + task.tensor);
  // No memory holds 2^32 pieces, and a division of 64 bits is a call.
  const uint32_t count = static_cast<uint32_t>(pieces_of_row(rows.length)), number = static_cast<uint32_t>(task.first);
  const int64_t row = number / count, begin = number % count * kRowPiece, left = rows.length - begin;
  uint32_t* done = work.done + cut.first_row + row;
  const RowSums sums = sums_of_block(parts_of_row(work, task.tensor, row * rows.length + begin,
                                                  left < kRowPiece ? left : kRowPiece, threadIdx.x, kThreads),
                                     of_grad, of_param);
  if (threadIdx.x == 0) {
    store(work.pieces + cut.first_piece + task.first, sums);
    __threadfence();
    is_last[0] = atomicAdd(done, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0) {
    return;
  }
  const RowSums* pieces = work.pieces + cut.first_piece + row * count;
  RowSums all = {0.0, 0.0};
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const RowSums piece = load(pieces + i);
    all = {all.grad + piece.grad, all.param + piece.param};
  }
  all = sums_of_block(all, of_grad, of_param);
  if (threadIdx.x == 0) {
    write_row(work, rows.first_row + row, all);
    store(done, 0u);
  }
}

__global__ void __launch_bounds__(kThreads) row_norms_kernel(RowNormsWork work) {
  PYFT_SHARED(double, of_grad, kWarps);
  PYFT_SHARED(double, of_param, kWarps);
  PYFT_SHARED(int, is_last, 1);
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
    if (rows.length > kWholeRow) {
      sum_piece(work, task, rows, of_grad, of_param, is_last);
      continue;
    }
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t row = task.first + i;
      const RowSums mine = parts_of_row(work, task.tensor, row * rows.length, rows.length, threadIdx.x, kThreads);
      const RowSums sums = sums_of_block(mine, of_grad, of_param);
      if (threadIdx.x == 0) {
        write_row(work, rows.first_row + row, sums);
      }
    }
  }
}

}  // namespace

cudaError_t launch_row_norms(const RowNormsWork& work, cudaStream_t stream) {
  return PYFT_LAUNCH(row_norms_kernel, UpTo{work.num_tasks}, kThreads, stream, work);
}

}  // namespace pyft
