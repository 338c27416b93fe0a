// The chosen columns of a matrix, or channels of images, side by side, with their sums on the way; and a compact part
// written back into its rows and columns. Layers that train in part need these on a GPU. No torch header.
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
  // Both null where no sums are wanted. partial: column_sum_room() floats to work in; sums: (count,).
  float* partial;
  void* sums;
};

// compact (images, count, size), contiguous: compact[i][c] = full[i][channels[c]], each a run of `size` elements.
struct PlaneGather {
  const void* full;
  int64_t image_stride, channel_stride;
  const int64_t* channels;
  int64_t images, count, size;
  void* compact = nullptr;
  // Both null where no sums are wanted. partial: plane_sum_room() floats to work in; sums: (count,).
  float* partial = nullptr;
  void* sums = nullptr;
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
int64_t column_sum_room(FloatFormat format, int64_t rows, int64_t count);
// Of planes the slabs depend on whether all begin at 16 bytes, too.
int64_t plane_sum_room(FloatFormat format, const PlaneGather& gather);

// Sums are taken in fp32 within a slab, in double over slabs, and rounded once. Nothing is launched where there is
// nothing to move.
cudaError_t launch_gather_columns(FloatFormat format, const ColumnGather& gather, cudaStream_t stream);
// Planes and what warps move of them at once are counted in 31 bits.
bool fits_31_bits(const PlaneGather& gather);
cudaError_t launch_gather_planes(FloatFormat format, const PlaneGather& gather, cudaStream_t stream);
cudaError_t launch_write_part(FloatFormat format, const PartWrite& write, cudaStream_t stream);

}  // namespace pyft
