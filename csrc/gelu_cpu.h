#pragma once

#include <cstdint>

namespace pyft {

// The same bits for every CPU target.

// y = gelu(x); y may be x.
void gelu_cpu(const float* x, float* y, int64_t length);
// dx = grad times the slope of gelu at x; dx may be grad.
void gelu_backward_cpu(const float* grad, const float* x, float* dx, int64_t length);

}  // namespace pyft
