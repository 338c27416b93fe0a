// Division by a number that is known before the kernel starts: a product and a shift in place of some hundred
// instructions.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyft {

// Granlund and Montgomery, "Division by invariant integers using multiplication", figure 4.1: for n below 2^31 the sum
// of the high product and n has no carry.
struct Divisor {
  int64_t divisor;
  uint32_t factor = 0, shift = 0;

  explicit Divisor(int64_t by) : divisor(by) {
    if (by <= kMost) {
      while ((int64_t{1} << shift) < by) {
        ++shift;
      }
      factor = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
    }
  }

  // n / divisor for n >= 0.
  PYFT_HOST_DEVICE int64_t quotient(int64_t n) const {
    if (n > kMost || divisor > kMost) {
      return n / divisor;
    }
    return quotient_of_31_bits(static_cast<uint32_t>(n));
  }

  // n / divisor where both fit 31 bits: no division is compiled for larger ones.
  PYFT_HOST_DEVICE uint32_t quotient_of_31_bits(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> 32);
    return (high + n) >> shift;
  }

 private:
  static constexpr int64_t kMost = 0x7fffffff;
};

}  // namespace pyft
