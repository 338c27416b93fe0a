// One element of RMSprop as torch.optim.RMSprop has it: Tieleman and Hinton, "Lecture 6.5", COURSERA 2012; centered:
// Graves, "Generating Sequences With Recurrent Neural Networks", 2013, equations 38 to 41, with eps outside the root.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pyft {

struct RmspropHyper {
  double lr, alpha, eps, weight_decay, momentum, maximize;
};

struct RmspropStep {
  float lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
};

template <bool kCentered, bool kMomentum>
PYFT_HOST_DEVICE void rmsprop_element(float& param, float scaled_grad, float& square_avg, float& momentum_buffer,
                                      float& grad_avg, const RmspropStep& h) {
  const float g = scaled_grad + h.weight_decay * param;
  const float v = square_avg * h.alpha + (g * g) * h.one_minus_alpha;
  float variance = v;
  if (kCentered) {
    const float mean = grad_avg + (g - grad_avg) * h.one_minus_alpha;
    variance = v - mean * mean;
    // Rounding can make it negative where gradients hardly vary; its root would be NaN.
    variance = variance < 0.0f ? 0.0f : variance;
    grad_avg = mean;
  }
  const float update = g / (std::sqrt(variance) + h.eps);
  square_avg = v;
  if (kMomentum) {
    const float velocity = momentum_buffer * h.momentum + update;
    momentum_buffer = velocity;
    param = param - h.lr * velocity;
  } else {
    param = param - h.lr * update;
  }
}

PYFT_HOST_DEVICE RmspropStep step_constants(const RmspropHyper& hyper) {
  RmspropStep h;
  h.lr = static_cast<float>(hyper.lr);
  h.alpha = static_cast<float>(hyper.alpha);
  h.one_minus_alpha = static_cast<float>(1.0 - hyper.alpha);
  h.eps = static_cast<float>(hyper.eps);
  h.weight_decay = static_cast<float>(hyper.weight_decay);
  h.momentum = static_cast<float>(hyper.momentum);
  return h;
}

}  // namespace pyft
