// Powers of the decay rates, for bias corrections.
#pragma once

#include <cmath>

#include "host_device.h"
#include "wide_double_math.h"

namespace pyft {

// The library's, on the host. On a GPU it is a call of many registers.
struct LibraryPower {
  double operator()(double base, double exponent) const { return std::pow(base, exponent); }
};

// For 0 <= base <= 1 and a whole exponent, by repeated squaring. Rounded once, which is what the library gives, too,
// but for the last bit now and then.
struct WholePower {
  PYFT_HOST_DEVICE double operator()(double base, double exponent) const {
    WideDouble power = {1.0, 0.0}, square = {base, 0.0};
    for (long long left = static_cast<long long>(exponent); left > 0; left /= 2) {
      if (left % 2 == 1) {
        power = multiply_wide(power, square);
      }
      square = multiply_wide(square, square);
    }
    return power.rounded();
  }
};

}  // namespace pyft
