// One element of Adagrad: Duchi et al., "Adaptive Subgradient Methods", JMLR 2011, figure 1 with diagonal matrices,
// with the decay of the learning rate that torch.optim.Adagrad has.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pyft {

struct AdagradHyper {
  double lr, lr_decay, eps, weight_decay, maximize;
};

struct AdagradStep {
  float lr, eps, weight_decay;
};

PYFT_HOST_DEVICE void adagrad_element(float& param, float scaled_grad, float& sum, const AdagradStep& h) {
  const float g = scaled_grad + h.weight_decay * param;
  const float total = sum + g * g;
  param = param - h.lr * (g / (std::sqrt(total) + h.eps));
  sum = total;
}

PYFT_HOST_DEVICE AdagradStep step_constants(const AdagradHyper& hyper, double step) {
  AdagradStep h;
  h.lr = static_cast<float>(hyper.lr / (1.0 + (step - 1.0) * hyper.lr_decay));
  h.eps = static_cast<float>(hyper.eps);
  h.weight_decay = static_cast<float>(hyper.weight_decay);
  return h;
}

}  // namespace pyft
