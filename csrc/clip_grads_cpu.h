#pragma once

#include <cstdint>

#include "float_formats.h"

namespace pyft {

// Writes elements offset .. offset + length - 1 of x, each rounded once to its format. The same bits on every target.
void scale_cpu(FloatData x, int64_t offset, int64_t length, float factor);
// To [-limit, limit]; NaN stays NaN.
void clamp_cpu(FloatData x, int64_t offset, int64_t length, float limit);

}  // namespace pyft
