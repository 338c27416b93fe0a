// The gradient of chosen rows of a weight: gathered, packed and multiplied, without a copy of the chosen columns.
#pragma once

#include <cstdint>

namespace pyft {

// out[r, n] = sum over t of grad[t, rows[r]] * input[t, n].
struct PartialGradient {
  const float* grad;
  int64_t grad_stride;
  const float* input;
  int64_t input_stride;
  const int64_t* rows;
  int64_t row_count, tokens, width;
  float* out;
};

// Tokens are worked on in blocks of this many: a panel of the input of so many rows fits half of an L1 cache.
constexpr int64_t kTokenBlock = 256;
// Columns of a strip, several panels: the rows of the input are read in pieces of some length.
constexpr int64_t kStripWidth = 64;

// Floats that a packed block of tokens takes.
inline int64_t packed_size(int64_t row_count) { return kTokenBlock * row_count; }

// Tokens of one call of pack_rows_cpu: a part of a block, so that there is work for many threads.
constexpr int64_t kPackedAtOnce = 64;

// The chosen columns of up to kPackedAtOnce tokens, to their places among the packed blocks, which lie one after the
// other. `sums`, unless null, gets the sum of each column over these tokens added.
void pack_rows_cpu(const PartialGradient& work, int64_t first_token, float* packed, double* sums);

// All chosen rows for the kStripWidth columns of one strip. `packed` holds the blocks one after the other. Terms are
// added in the order of tokens, with a rounding to fp32 after each block.
void strip_gradient_cpu(const PartialGradient& work, const float* packed, int64_t strip);

}  // namespace pyft
