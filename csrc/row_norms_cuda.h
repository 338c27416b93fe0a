// Adaptive clipping on a GPU: the norm of each row of gradients and weights, and the factor that follows. No torch
// header.
#pragma once

#include <vector>

#include "cuda_launch.h"
#include "grad_norm_cuda.h"

namespace pyft {

// A gradient whose first dimension is the slowest in memory; its rows have numbers from first_row on in what is
// written.
struct alignas(16) DeviceRows {
  int64_t length, first_row;
};

// Whole rows of one gradient, the work of one thread block. 16 bytes: one load.
struct alignas(16) RowTask {
  int64_t first;
  int32_t tensor, rows;
};

// About as many elements as a chunk has, or one row that may be longer.
inline std::vector<RowTask> cut_into_row_tasks(const std::vector<int64_t>& rows, const std::vector<int64_t>& lengths) {
  std::vector<RowTask> tasks;
  for (size_t tensor = 0; tensor < rows.size(); ++tensor) {
    const int64_t fit = lengths[tensor] == 0 ? kDeviceChunk : kDeviceChunk / lengths[tensor];
    const int64_t together = fit < 1 ? 1 : fit;
    for (int64_t first = 0; first < rows[tensor]; first += together) {
      const int64_t left = rows[tensor] - first;
      tasks.push_back({first, static_cast<int32_t>(tensor), static_cast<int32_t>(left < together ? left : together)});
    }
  }
  return tasks;
}

struct RowNormsWork {
  const RowTask* tasks;
  int64_t num_tasks;
  const DeviceRows* rows;
  const DeviceFloats *grads, *params;
  // Gradients are clamped to it first; INFINITY: not at all.
  float clip_value;
  double clipping, eps;
  // For each row: the sum of squares of the gradient, or null, and the factor.
  double* sums;
  float* factors;
};

cudaError_t launch_row_norms(const RowNormsWork& work, cudaStream_t stream);

#ifdef PYFT_SITE

// Factors of the rows that elements place .. place + count - 1 of a gradient lie in, count <= 4; 1 for the rest.
__device__ __forceinline__ void factors_of_rows(const float* factors, int64_t row_length, int64_t place, int count,
                                                float (&found)[4]) {
  int64_t row = place / row_length, left = row_length - place % row_length;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    found[i] = 1.0f;
    if (i < count) {
      if (left == 0) {
        ++row;
        left = row_length;
      }
      found[i] = load(factors + row);
      --left;
    }
  }
}

#endif

}  // namespace pyft
