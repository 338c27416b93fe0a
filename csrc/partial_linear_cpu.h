// The gradient of chosen rows of a weight: gathered, packed and multiplied, without a copy of the chosen columns.
#pragma once

#include <cstdint>

namespace pyft {

// out[r, n] = sum over t of grad[t, rows[r]] * input[t, n], over all tokens or, where `token_rows` is not null, over
// those. With `run`, rows follow each other.
struct PartialGradient {
  const float* grad;
  int64_t grad_stride;
  const float* input;
  int64_t input_stride;
  const int64_t* rows;
  bool run;
  const int64_t* token_rows;
  int64_t row_count, tokens, width;
  float* out;

  int64_t row_of(int64_t token) const { return token_rows == nullptr ? token : token_rows[token]; }
  const float* grad_of(int64_t token) const { return grad + row_of(token) * grad_stride; }
  const float* input_of(int64_t token) const { return input + row_of(token) * input_stride; }
};

// Tokens are worked on in blocks of this many: a panel of the input of so many rows fits half of an L1 cache.
constexpr int64_t kTokenBlock = 384;
// Columns of a strip, several panels: the rows of the input are read in pieces of some length.
constexpr int64_t kStripWidth = 64;

// Floats that a packed block of tokens takes.
inline int64_t packed_size(int64_t row_count) { return kTokenBlock * row_count; }

// Tokens of one call of pack_rows_cpu: a part of a block, so that there is work for many threads.
constexpr int64_t kPackedAtOnce = 32;

// The chosen columns of up to kPackedAtOnce tokens, to their places among the packed blocks, which lie one after the
// other. `sums`, unless null, gets the sum of each column over these tokens added.
void pack_rows_cpu(const PartialGradient& work, int64_t first_token, float* packed, double* sums);

// A task: one of `parts` of the chosen rows, for the kStripWidth columns of a strip.
struct StripPart {
  int64_t strip, part, parts;
};

// `packed` holds the blocks one after the other. Terms are added in the order of tokens, with a rounding to fp32 after
// each block.
void strip_gradient_cpu(const PartialGradient& work, const float* packed, const StripPart& part);

}  // namespace pyft
