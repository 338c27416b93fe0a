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

// Rows that are longer are cut into pieces, so that a few long ones keep a whole GPU busy.
constexpr int64_t kWholeRow = 16384;
constexpr int64_t kRowPiece = 8192;

PYFT_HOST_DEVICE int64_t pieces_of_row(int64_t length) {
  return length <= kWholeRow ? 1 : (length + kRowPiece - 1) / kRowPiece;
}

// The work of one thread block: whole rows of one gradient from number `first` on, or, of rows that are cut, the piece
// of number `first` in that gradient. 16 bytes: one load.
struct alignas(16) RowTask {
  int64_t first;
  int32_t tensor, rows;
};

// Of a gradient whose rows are cut: numbers of its first piece and its first row among all that are. 16 bytes.
struct alignas(16) DeviceCutRows {
  int64_t first_piece, first_row;
};

struct RowTasks {
  std::vector<RowTask> tasks;
  // For each gradient, and what there is in all.
  std::vector<DeviceCutRows> cut;
  int64_t num_pieces = 0, num_cut_rows = 0;
};

// About as many elements as a chunk has, or one row that may be longer, or a piece. The cut of a gradient depends on
// its own shape alone.
inline RowTasks cut_into_row_tasks(const std::vector<int64_t>& rows, const std::vector<int64_t>& lengths) {
  RowTasks made;
  for (size_t tensor = 0; tensor < rows.size(); ++tensor) {
    const int64_t pieces = pieces_of_row(lengths[tensor]);
    const int64_t fit = lengths[tensor] == 0 ? kDeviceChunk : kDeviceChunk / lengths[tensor];
    const int64_t together = fit < 1 ? 1 : fit, end = rows[tensor] * pieces;
    for (int64_t first = 0; first < end; first += together) {
      const int32_t left = static_cast<int32_t>(end - first < together ? end - first : together);
      made.tasks.push_back({first, static_cast<int32_t>(tensor), left});
    }
    made.cut.push_back({made.num_pieces, made.num_cut_rows});
    made.num_pieces += pieces > 1 ? end : 0;
    made.num_cut_rows += pieces > 1 ? rows[tensor] : 0;
  }
  return made;
}

// Sums of squares of a row, or of a piece of it. 16 bytes: one access.
struct alignas(16) RowSums {
  double grad, param;
};

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
  // For rows that are cut: their numbers by tensor, the sums of each piece, and how many pieces of each row are done: 0
  // before a launch and after it.
  const DeviceCutRows* cut;
  RowSums* pieces;
  uint32_t* done;
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
