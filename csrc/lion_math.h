// One element of Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
#pragma once

#include "host_device.h"

namespace pyft {

struct LionHyper {
  double lr, beta1, beta2, weight_decay, maximize;
};

struct LionStep {
  float lr, decay, one_minus_beta1, one_minus_beta2;
};

PYFT_HOST_DEVICE void lion_element(float& param, float scaled_grad, float& exp_avg, const LionStep& h) {
  const float change = scaled_grad - exp_avg;
  const float c = exp_avg + change * h.one_minus_beta1;
  // c * 0 carries a NaN into the parameter; the sign alone would hide it.
  const float sign = (c > 0.0f ? 1.0f : 0.0f) - (c < 0.0f ? 1.0f : 0.0f) + c * 0.0f;
  param = param * h.decay - h.lr * sign;
  exp_avg = exp_avg + change * h.one_minus_beta2;
}

PYFT_HOST_DEVICE LionStep step_constants(const LionHyper& hyper) {
  LionStep h;
  h.lr = static_cast<float>(hyper.lr);
  h.decay = static_cast<float>(1.0 - hyper.lr * hyper.weight_decay);
  h.one_minus_beta1 = static_cast<float>(1.0 - hyper.beta1);
  h.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  return h;
}

}  // namespace pyft
