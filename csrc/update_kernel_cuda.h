// The update of all tensors on a GPU, for one layout of their storage or for any. Its kernels are made in
// update_cuda.cu and update_fixed_cuda.cu, which compile side by side.
#pragma once

#include "update_block_cuda.h"

namespace pyft {

#ifdef PYFT_SITE

// Few, so that what registers are left over holds one block more.
constexpr int kUpdateThreads = 128;
constexpr int kUpdateWarps = kUpdateThreads / kWarp;

// The block that is done last moves the counters on, when nobody reads them any more.
template <class Numbers>
__device__ __forceinline__ void finish_step(const UpdateWork& work, Numbers numbers) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    numbers[0] = atomicAdd(&work.decision->done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (numbers[0] == 0) {
    return;
  }
  for (int64_t i = threadIdx.x; i < work.num_tensors; i += kUpdateThreads) {
    float* count = load(&work.tensors[i].count);
    if (count != nullptr && work.advance) {
      store(count, load(count) + 1.0f);
    }
    store(work.fresh + i, static_cast<uint8_t>(0));
  }
  if (threadIdx.x == 0) {
    store(&work.decision->applied, load(&work.decision->applied) + 1);
    store(&work.decision->done, 0u);
  }
}

template <class Layout, class Tensor>
__device__ __forceinline__ void update_chunk(const Tensor& t, const DeviceFloats& grad, const Constants& constants,
                                             const DeviceChunk& chunk) {
  const Layout layout(t, grad, constants);
  const int64_t end = chunk.offset + chunk.length;
  const bool by_four = moves_by_four(layout, t, grad);
  for (int64_t begin = chunk.offset + threadIdx.x / kWarp * kBlock; begin < end; begin += kUpdateWarps * kBlock) {
    if (!Layout::kMayBePulled && by_four && begin + kBlock <= end) {
      update_block<true>(layout, t, grad, constants, begin, end);
    } else {
      update_block<false>(layout, t, grad, constants, begin, end);
    }
  }
}

template <class Layout>
__global__ void __launch_bounds__(kUpdateThreads, Layout::kBlocks) update_kernel(UpdateWork work) {
  PYFT_SHARED(uint64_t, record, kRecordWords);
  PYFT_SHARED(float, floats, kSharedFloats);
  PYFT_SHARED(uint32_t, numbers, kSharedNumbers);
  if (load(&work.decision->skip) != 0) {
    return;
  }
  int32_t tensor = -1;
  KnownStep known;
  DeviceChunk next = {};
  if (blockIdx.x < work.num_chunks) {
    next = load(work.chunks + blockIdx.x);
  }
  for (int64_t c = blockIdx.x; c < work.num_chunks; c += gridDim.x) {
    const DeviceChunk chunk = next;
    if (c + gridDim.x < work.num_chunks) {
      next = load(work.chunks + c + gridDim.x);
    }
    const DeviceFloats grad = load(work.grads + chunk.tensor);
    if (chunk.tensor != tensor) {
      tensor = chunk.tensor;
      __syncthreads();
      if (threadIdx.x < kRecordWords) {
        record[threadIdx.x] = load(reinterpret_cast<const uint64_t*>(work.tensors + tensor) + threadIdx.x);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        fill_constants(work, SharedTensor<decltype(record + 0)>{record}, tensor, known, floats, numbers);
      }
      __syncthreads();
    }
    const SharedTensor<decltype(record + 0)> t{record};
    update_chunk<typename Layout::template For<SharedTensor<decltype(record + 0)>>>(
        t, grad, read_constants(work, t, floats, numbers), chunk);
  }
  finish_step(work, numbers);
}

#endif

}  // namespace pyft
