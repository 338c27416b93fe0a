#pragma once

#include <cstdint>

#include "max_pool_math.h"

namespace pyft {

// Rows of outputs: x (planes, H, W), y and at (planes, OH, OW). `work` holds OW int32. Row r is row r % OH of plane
// r / OH.
void max_pool_rows_cpu(const float* x, float* y, uint8_t* at, int32_t* work, int64_t first_row, int64_t last_row,
                       const PoolShape& shape);
// The same with channels last: x (N, H, W, C). `work` holds C int32.
void max_pool_rows_last_cpu(const float* x, float* y, uint8_t* at, int32_t* work, int64_t channels, int64_t first_row,
                            int64_t last_row, const PoolShape& shape);

// dx (parts, H, W, channels) is written whole, grad and at (parts, OH, OW, channels): planes with one channel each, or
// images with channels last. Windows that overlap are added in torch's order.
void max_pool_backward_cpu(const float* grad, const uint8_t* at, float* dx, int64_t channels, int64_t first_part,
                           int64_t last_part, const PoolShape& shape);

}  // namespace pyft
