// The numbers of torch's generator on the CPU: Mersenne Twister MT19937 (Matsumoto and Nishimura 1998).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

constexpr int kTwisterWords = 624, kTwisterShift = 397;

// What replaces a word of the state: from it, the next one, and the one kTwisterShift places on.
PYFT_HOST_DEVICE uint32_t twisted(uint32_t word, uint32_t next, uint32_t shifted) {
  const uint32_t mixed = (word & 0x80000000u) | (next & 0x7fffffffu);
  return shifted ^ (mixed >> 1) ^ ((0u - (next & 1u)) & 0x9908b0dfu);
}

PYFT_HOST_DEVICE uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// Whether a draw is below p: torch takes the lower 53 bits of two words, the first the higher one, as a fraction of 1.
struct BelowProbability {
  uint32_t high, low;

  // 0 <= p <= 1; p * 2^53 is exact, and a whole number is below it where it is below the next whole one.
  explicit BelowProbability(double p) {
    const double scaled = p * 9007199254740992.0;
    uint64_t limit = static_cast<uint64_t>(scaled);
    limit += static_cast<double>(limit) < scaled;
    high = static_cast<uint32_t>(limit >> 32);
    low = static_cast<uint32_t>(limit);
  }

  PYFT_HOST_DEVICE bool operator()(uint32_t first, uint32_t second) const {
    const uint32_t top = first & 0x1fffffu;
    return (top < high) | ((top == high) & (second < low));
  }
};

}  // namespace pyft
