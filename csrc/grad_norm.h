#pragma once

#include <vector>

#include "chunks.h"

namespace pyft {

// Sum of squares of each chunk, in double; `data[c.tensor]` is the first element of the tensor of chunk c.
void sum_of_squares_per_chunk(const ChunkTable& table, const std::vector<const float*>& data,
                              std::vector<double>& partial);

// The partial sums added in chunk order: the same bits for any number of threads.
double add_in_order(const std::vector<double>& partial);

}  // namespace pyft
