// One element of AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2,
// with the bias corrections of Kingma and Ba, "Adam", ICLR 2015, folded into two factors, as torch.optim does.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pyft {

// Constants of one tensor in one step, computed in double and rounded once.
struct AdamWStep {
  float grad_scale;       // clip factor, negative for maximize
  float decay;            // 1 - lr * weight_decay
  float one_minus_beta1;  // 1 - beta1
  float beta2;
  float one_minus_beta2;
  float step_size;                  // lr / (1 - beta1^step)
  float inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

PYFT_HOST_DEVICE void adamw_element(float& param, float grad, float& exp_avg, float& exp_avg_sq, const AdamWStep& h) {
  const float g = grad * h.grad_scale;
  const float m = exp_avg + (g - exp_avg) * h.one_minus_beta1;
  const float v = exp_avg_sq * h.beta2 + (g * g) * h.one_minus_beta2;
  const float denom = std::sqrt(v) * h.inv_sqrt_bias_correction2 + h.eps;
  param = param * h.decay - h.step_size * (m / denom);
  exp_avg = m;
  exp_avg_sq = v;
}

inline AdamWStep adamw_step_constants(double step, double lr, double beta1, double beta2, double eps,
                                      double weight_decay, bool maximize, double clip_coef) {
  const double bias_correction1 = 1.0 - std::pow(beta1, step);
  const double bias_correction2 = 1.0 - std::pow(beta2, step);
  AdamWStep h;
  h.grad_scale = static_cast<float>(maximize ? -clip_coef : clip_coef);
  h.decay = static_cast<float>(1.0 - lr * weight_decay);
  h.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  h.beta2 = static_cast<float>(beta2);
  h.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  h.step_size = static_cast<float>(lr / bias_correction1);
  h.inv_sqrt_bias_correction2 = static_cast<float>(1.0 / std::sqrt(bias_correction2));
  h.eps = static_cast<float>(eps);
  return h;
}

}  // namespace pyft
