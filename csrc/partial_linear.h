// The gradient of chosen rows of a weight, by all threads.
#pragma once

#include "partial_linear_cpu.h"

namespace pyft {

inline int64_t packed_floats(const PartialGradient& work) {
  return (work.tokens + kTokenBlock - 1) / kTokenBlock * packed_size(work.row_count);
}

// The whole of work.out and, unless null, `sums`, (row_count,). packed: room for packed_floats. There is a token.
void gradient_of_rows(const PartialGradient& work, float* packed, float* sums);

}  // namespace pyft
