#pragma once

#include <cstdint>

#include "float_formats.h"

namespace pyft {

// Over elements offset .. offset + length - 1 of x, in double. The same bits for every CPU target. `next`: where that
// will be read which comes next, which is loaded meanwhile if `length` is short; null if nothing does.

// Of elements clamped to [-clip_value, clip_value]; not finite if one is not, before the clamp.
double sum_of_squares_cpu(FloatData x, int64_t offset, int64_t length, float clip_value, const void* next = nullptr);
double sum_of_magnitudes_cpu(FloatData x, int64_t offset, int64_t length, const void* next = nullptr);
// Of (|x| / largest)^p.
double sum_of_powers_cpu(FloatData x, int64_t offset, int64_t length, double largest, double p);
// NaN if an element is NaN; 0 for no elements.
float largest_magnitude_cpu(FloatData x, int64_t offset, int64_t length);

}  // namespace pyft
