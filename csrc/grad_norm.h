// Norms of gradients over the chunk table, and row by row; shared by clipping and by the optimizer step.
#pragma once

#include <cmath>
#include <vector>

#include "chunks.h"
#include "float_formats.h"

namespace pyft {

// Sum of squares of each chunk, in double; `data[c.tensor]` is the first element of the tensor of chunk c. Elements
// are clamped to [-clip_value, clip_value] first (INFINITY: not at all). A chunk that holds NaN or inf, before the
// clamp, gives a sum that is not finite.
void sum_of_squares_per_chunk(const ChunkTable& table, const std::vector<FloatData>& data, float clip_value,
                              std::vector<double>& partial);

// One sum for each tensor: its chunks added in order.
std::vector<double> sum_per_tensor(const ChunkTable& table, const std::vector<double>& partial, int64_t num_tensors);

// Their sum, rounded once, hence the same bits for any order (Shewchuk, "Adaptive Precision Floating-Point Arithmetic",
// 1997, section 2.4; Python's math.fsum). Not finite if any term is not.
double add_exactly(const std::vector<double>& terms);

// The p-norm of all elements of all tensors together, 0 < p <= INFINITY. NaN if any element is NaN, else inf if any is
// infinite. The same bits for any number of threads and any order of tensors.
double norm_over_chunks(const ChunkTable& table, const std::vector<FloatData>& data, double p);

// A tensor whose first dimension is the slowest in memory, seen as a matrix. A tensor of one dimension or none is one
// row, as in Brock et al. 2021.
struct Rows {
  FloatData data;
  int64_t rows, row_length;
};

// Several whole rows of a matrix that fit one short chunk, or one row that may be longer.
struct RowBlock {
  int64_t matrix, first_row, rows;
};

// `chunks.tensor` is the number of a block. Chunks of a long row are those of a tensor of that size, so that a tensor
// of one row has the sum of squares that it has among whole tensors.
struct RowTable {
  std::vector<RowBlock> blocks;
  ChunkTable table;
};

RowTable cut_into_rows(const std::vector<Rows>& matrices);

// Sum of squares of each row of each matrix, in double, clamped as above: sums[i] has matrices[i].rows entries.
void sum_of_squares_per_row(const std::vector<Rows>& matrices, float clip_value,
                            std::vector<std::vector<double>>& sums);

// Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", eq. 3: the factor for a
// row of gradients, from the sums of squares of the row of gradients and of the row of weights. 1 where one of them is
// not finite.
double agc_factor(double grad_sum_of_squares, double param_sum_of_squares, double clipping, double eps);

}  // namespace pyft
