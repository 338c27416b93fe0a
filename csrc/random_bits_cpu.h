// Draws of torch's generator on the CPU as bits.
#pragma once

#include <cstdint>

#include "random_bits_math.h"

namespace pyft {

// As torch keeps it: `left` - 1 words from `next` on were not given out yet.
struct Twister {
  uint32_t words[kTwisterWords];
  int64_t next, left;
};

// Bit i of `bits` (ceil(count / 8) bytes, the last filled with zeros): whether draw i is below `p`. The same bits for
// every CPU target. `state` moves on by 2 * count words.
void bernoulli_bits_cpu(Twister& state, int64_t count, double p, uint8_t* bits);

}  // namespace pyft
