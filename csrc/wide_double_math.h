// Numbers of two doubles each: sums that do not depend on the order of their terms but for one in some 2^50, and powers
// without the error that repeated squaring would pile up. Dekker, "A Floating-Point Technique for Extending the
// Available Precision", Numerische Mathematik 18, 1971.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pyft {

struct WideDouble {
  double high, low;

  // What is not finite stays as it is; its low part would be NaN.
  PYFT_HOST_DEVICE double rounded() const { return high - high == 0.0 ? high + low : high; }
};

PYFT_HOST_DEVICE WideDouble add_wide(WideDouble a, WideDouble b) {
  const double sum = a.high + b.high, of_b = sum - a.high;
  const double lost = (a.high - (sum - of_b)) + (b.high - of_b);
  const double low = lost + (a.low + b.low);
  const double high = sum + low;
  return sum - sum == 0.0 ? WideDouble{high, low - (high - sum)} : WideDouble{sum, 0.0};
}

PYFT_HOST_DEVICE WideDouble multiply_wide(WideDouble a, WideDouble b) {
  const double product = a.high * b.high;
  const double low = fma(a.high, b.high, -product) + (a.high * b.low + a.low * b.high);
  const double high = product + low;
  return {high, low - (high - product)};
}

}  // namespace pyft
