// Norms of gradients on a GPU: each chunk is summed by a thread block, the sums of chunks by one. No torch header.
#pragma once

#include "chunks.h"
#include "cuda_launch.h"
#include "float_formats.h"

namespace pyft {

// The first element of a tensor in device memory. 16 bytes: one load.
struct alignas(16) DeviceFloats {
  const void* data;
  int64_t format;

  PYFT_HOST_DEVICE FloatFormat float_format() const { return static_cast<FloatFormat>(format); }
};

// All in device memory.
struct DeviceFloatsTable {
  const DeviceChunk* chunks;
  int64_t num_chunks;
  const DeviceFloats* tensors;
  // num_tensors + 1 numbers, see DeviceChunkTable.
  const int64_t* begin;
  int64_t num_tensors;
};

// Doubles that norms need to work in.
inline int64_t norm_scratch(int64_t num_chunks, int64_t num_tensors) { return num_chunks + num_tensors + 1; }

// partial[c]: the sum of squares of chunk c, clamped to [-clip_value, clip_value] first (INFINITY: not at all). Not
// finite if an element is not, before the clamp. The same bits for any size of the grid.
cudaError_t launch_sum_of_squares(const DeviceFloatsTable& table, float clip_value, double* partial,
                                  cudaStream_t stream);

// The p-norm of all elements of all tensors together, 0 < p <= INFINITY, rounded once to *norm. NaN if any element is
// NaN, else inf if any is infinite.
cudaError_t launch_norm(const DeviceFloatsTable& table, double p, double* scratch, float* norm, cudaStream_t stream);

}  // namespace pyft
