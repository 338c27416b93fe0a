#pragma once

#include <cstdint>

#include "adamw_math.h"

namespace pyft {

// Updates `length` elements in place. The four ranges must not overlap.
void adamw_cpu(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t length,
               const AdamWStep& step);

}  // namespace pyft
