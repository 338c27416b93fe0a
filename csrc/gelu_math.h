// GELU, x Phi(x), with Phi the normal distribution (Hendrycks and Gimpel 2016, without the approximation by tanh), and
// its derivative, Phi(x) + x phi(x): both are 1/2 and an odd function that ends at 1/2, as a quotient of polynomials.
#pragma once

#include "host_device.h"

namespace pyft {

// erf(x / sqrt(2)) within 5e-7, coefficients fitted in float64 (largest error 1.1e-8); 1 beyond 5.4.
PYFT_HOST_DEVICE float erf_of_gelu(float x) {
  constexpr float kEnd = 5.4f;
  const float inner = x > kEnd ? kEnd : x < -kEnd ? -kEnd : x;
  const float s = inner * inner * (1.0f / (kEnd * kEnd));
  const float p = ((((0.9861367f * s + 9.196849f) * s + 8.148708f) * s + 7.9092946f) * s + 1.946271f) * s + 0.79788446f;
  const float q = ((((25.649704f * s + 52.34688f) * s + 46.09335f) * s + 24.130579f) * s + 7.299272f) * s + 1.0f;
  const float erf = inner * p / q;
  const float bounded = erf > 1.0f ? 1.0f : erf < -1.0f ? -1.0f : erf;
  return x > kEnd ? 1.0f : x < -kEnd ? -1.0f : bounded;
}

PYFT_HOST_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erf_of_gelu(x)); }

// Phi(x) + x phi(x) within 5e-7, fitted in the same way (1.2e-7); beyond 5.7 it is 0 or 1.
PYFT_HOST_DEVICE float gelu_slope(float x) {
  constexpr float kEnd = 5.7f;
  const float inner = x > kEnd ? kEnd : x < -kEnd ? -kEnd : x;
  const float s = inner * inner * (1.0f / (kEnd * kEnd));
  const float p =
      (((((18.003422f * s + 100.69773f) * s + 35.65999f) * s + 35.924084f) * s + 12.407367f) * s + 0.8264715f) * s +
      0.79788476f;
  const float q =
      (((((803.01764f * s + 745.9714f) * s + 485.78607f) * s + 216.68674f) * s + 64.88444f) * s + 11.865881f) * s +
      1.0f;
  return x > kEnd ? 1.0f : x < -kEnd ? 0.0f : 0.5f + inner * p / q;
}

}  // namespace pyft
