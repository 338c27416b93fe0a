// One element of SGD with momentum as torch.optim.SGD has it: Sutskever et al., "On the importance of initialization
// and momentum in deep learning", ICML 2013, with the learning rate outside the velocity; Nesterov as there.
#pragma once

#include "host_device.h"

namespace pyft {

struct SgdHyper {
  double lr, momentum, dampening, weight_decay, maximize;
};

struct SgdStep {
  float lr, momentum, one_minus_dampening, weight_decay;
};

enum class SgdKind { plain, momentum, nesterov };

template <SgdKind kKind>
PYFT_HOST_DEVICE void sgd_element(float& param, float scaled_grad, float& momentum_buffer, const SgdStep& h) {
  float g = scaled_grad + h.weight_decay * param;
  if (kKind != SgdKind::plain) {
    const float velocity = momentum_buffer * h.momentum + g * h.one_minus_dampening;
    momentum_buffer = velocity;
    g = kKind == SgdKind::nesterov ? g + h.momentum * velocity : velocity;
  }
  param = param - h.lr * g;
}

// The buffer of a first step is zero and takes the whole gradient, without dampening.
PYFT_HOST_DEVICE SgdStep step_constants(const SgdHyper& hyper, bool first) {
  SgdStep h;
  h.lr = static_cast<float>(hyper.lr);
  h.momentum = static_cast<float>(hyper.momentum);
  h.one_minus_dampening = first ? 1.0f : static_cast<float>(1.0 - hyper.dampening);
  h.weight_decay = static_cast<float>(hyper.weight_decay);
  return h;
}

}  // namespace pyft
