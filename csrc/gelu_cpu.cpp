#include "gelu_cpu.h"

#include "gelu_math.h"
#include "run_on_target.h"

namespace pyft {
namespace {

struct GeluLoop {
  const float* x;
  float* y;
  int64_t length;

  PYFT_HOST_DEVICE void operator()() const {
    const float* from = x;
    float* to = y;
    for (int64_t i = 0; i < length; ++i) {
      to[i] = gelu(from[i]);
    }
  }
};

struct GeluBackwardLoop {
  const float *grad, *x;
  float* dx;
  int64_t length;

  PYFT_HOST_DEVICE void operator()() const {
    const float *g = grad, *from = x;
    float* to = dx;
    for (int64_t i = 0; i < length; ++i) {
      to[i] = g[i] * gelu_slope(from[i]);
    }
  }
};

}  // namespace

void gelu_cpu(const float* x, float* y, int64_t length) { run_on_target(GeluLoop{x, y, length}); }

void gelu_backward_cpu(const float* grad, const float* x, float* dx, int64_t length) {
  run_on_target(GeluBackwardLoop{grad, x, dx, length});
}

}  // namespace pyft
