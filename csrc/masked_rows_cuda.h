// The chosen columns of a matrix side by side, with their sums on the way; and a compact part written back into its
// rows and columns. Layers that train in part need both on a GPU. No torch header.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "float_formats.h"

namespace pyft {

// A matrix in device memory, of less than 2^31 columns; strides in elements.
template <class Pointer>
struct StridedMatrix {
  Pointer data;
  int64_t row_stride, column_stride;
};

// compact (rows, count), contiguous: compact[t][c] = full[t][columns[c]].
struct ColumnGather {
  StridedMatrix<const void*> full;
  const int64_t* columns;
  int64_t rows, count;
  void* compact;
  // Both null where no sums are wanted. partial: column_sum_slabs() * count floats to work in; sums: (count,).
  float* partial;
  void* sums;
};

// full[rows[i]][columns[j]] = part[i][j]; null stands for all in order.
struct PartWrite {
  StridedMatrix<void*> full;
  StridedMatrix<const void*> part;
  const int64_t* rows;
  const int64_t* columns;
  int64_t row_count, column_count;
};

// Rows are summed in slabs, whose number depends on these alone: the same bits for any size of the grid.
int64_t column_sum_slabs(FloatFormat format, int64_t rows, int64_t count);

// Sums are taken in fp32 and rounded once. Nothing is launched where there are no rows or no columns.
cudaError_t launch_gather_columns(FloatFormat format, const ColumnGather& gather, cudaStream_t stream);
cudaError_t launch_write_part(FloatFormat format, const PartWrite& write, cudaStream_t stream);

}  // namespace pyft
