// One element of Adam and AdamW. Kingma and Ba, "Adam", ICLR 2015, algorithm 1; weight decay added to the gradient, or
// decoupled: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; AMSGrad: Reddi et
// al., "On the Convergence of Adam and Beyond", ICLR 2018, algorithm 2. Bias corrections are folded into two factors,
// as torch.optim does.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pyft {

// Of one parameter group, in this order from Python.
struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay, maximize;
};

// Constants of one tensor in one step, computed in double and rounded once.
struct AdamStep {
  float decay;            // decoupled: 1 - lr * weight_decay
  float weight_decay;     // coupled: times the parameter, added to the gradient
  float one_minus_beta1;  // 1 - beta1
  float beta2;
  float one_minus_beta2;
  float step_size;                  // lr / (1 - beta1^step)
  float inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

template <bool kCoupled, bool kAmsgrad>
PYFT_HOST_DEVICE void adam_element(float& param, float scaled_grad, float& exp_avg, float& exp_avg_sq,
                                   float& max_exp_avg_sq, const AdamStep& h) {
  const float g = kCoupled ? scaled_grad + h.weight_decay * param : scaled_grad;
  const float m = exp_avg + (g - exp_avg) * h.one_minus_beta1;
  const float v = exp_avg_sq * h.beta2 + (g * g) * h.one_minus_beta2;
  float second = v;
  if (kAmsgrad) {
    // NaN stays NaN.
    second = max_exp_avg_sq > v ? max_exp_avg_sq : v;
    max_exp_avg_sq = second;
  }
  const float denom = std::sqrt(second) * h.inv_sqrt_bias_correction2 + h.eps;
  const float kept = kCoupled ? param : param * h.decay;
  param = kept - h.step_size * (m / denom);
  exp_avg = m;
  exp_avg_sq = v;
}

template <class Power>
PYFT_HOST_DEVICE AdamStep step_constants(const AdamHyper& hyper, double step, const Power& power) {
  AdamStep h;
  h.decay = static_cast<float>(1.0 - hyper.lr * hyper.weight_decay);
  h.weight_decay = static_cast<float>(hyper.weight_decay);
  h.one_minus_beta1 = static_cast<float>(1.0 - hyper.beta1);
  h.beta2 = static_cast<float>(hyper.beta2);
  h.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  h.step_size = static_cast<float>(hyper.lr / (1.0 - power(hyper.beta1, step)));
  h.inv_sqrt_bias_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - power(hyper.beta2, step)));
  h.eps = static_cast<float>(hyper.eps);
  return h;
}

}  // namespace pyft
