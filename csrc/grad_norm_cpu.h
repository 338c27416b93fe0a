#pragma once

#include <cstdint>

namespace pyft {

// Sum of squares of `length` fp32 numbers, in double. The same bits for every CPU target.
double sum_of_squares_cpu(const float* x, int64_t length);

}  // namespace pyft
