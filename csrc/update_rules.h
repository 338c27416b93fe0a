// The optimizer rules that the update loops know, and their constants for one tensor in one step.
#pragma once

#include <cstdint>

#include "adagrad_math.h"
#include "adam_math.h"
#include "lion_math.h"
#include "power_math.h"
#include "rmsprop_math.h"
#include "sgd_math.h"

namespace pyft {

enum class Rule : int8_t {
  adamw,
  adamw_amsgrad,
  adam,
  adam_amsgrad,
  sgd,
  sgd_momentum,
  sgd_nesterov,
  rmsprop,
  rmsprop_centered,
  rmsprop_momentum,
  rmsprop_centered_momentum,
  adagrad,
  lion,
};
constexpr int kRules = 13;
constexpr int kMoments = 3;

struct RuleInfo {
  const char* name;
  // Which of the three moments the rule has, and whether they may be negative.
  bool has[kMoments], is_signed[kMoments];
  int hyper_count;
  bool decoupled_decay;
};

constexpr int kHyperNumbers = 6;

// In the order of Rule.
constexpr RuleInfo kRuleInfo[kRules] = {
    {"adamw", {true, true, false}, {true, false, false}, 6, true},
    {"adamw_amsgrad", {true, true, true}, {true, false, false}, 6, true},
    {"adam", {true, true, false}, {true, false, false}, 6, false},
    {"adam_amsgrad", {true, true, true}, {true, false, false}, 6, false},
    {"sgd", {false, false, false}, {false, false, false}, 5, false},
    {"sgd_momentum", {true, false, false}, {true, false, false}, 5, false},
    {"sgd_nesterov", {true, false, false}, {true, false, false}, 5, false},
    {"rmsprop", {true, false, false}, {false, true, true}, 6, false},
    {"rmsprop_centered", {true, false, true}, {false, true, true}, 6, false},
    {"rmsprop_momentum", {true, true, false}, {false, true, true}, 6, false},
    {"rmsprop_centered_momentum", {true, true, true}, {false, true, true}, 6, false},
    {"adagrad", {true, false, false}, {false, false, false}, 5, false},
    {"lion", {true, false, false}, {true, false, false}, 5, true},
};

union RuleStep {
  AdamStep adam;
  SgdStep sgd;
  RmspropStep rmsprop;
  AdagradStep adagrad;
  LionStep lion;
};

// What Python gives for a parameter group; `numbers` are those of the rule's Hyper struct, `maximize` last.
struct RuleHyper {
  Rule rule;
  double numbers[kHyperNumbers];
  // Pull toward the first value, L2-SP: Li, Grandvalet and Davoine, ICML 2018, equation 4.
  double decay_to_init;

  PYFT_HOST_DEVICE double lr() const { return numbers[0]; }
  bool maximize() const { return numbers[kRuleInfo[static_cast<int>(rule)].hyper_count - 1] != 0.0; }
};

// What (param - init) is multiplied by.
PYFT_HOST_DEVICE float init_pull(bool decoupled, double lr, double decay_to_init) {
  return static_cast<float>(decoupled ? lr * decay_to_init : decay_to_init);
}
inline float init_pull(const RuleHyper& h) {
  return init_pull(kRuleInfo[static_cast<int>(h.rule)].decoupled_decay, h.lr(), h.decay_to_init);
}

// `step` counts from 1; `first`: the moments were made for this step; `power`: of power_math.h.
template <class Power>
PYFT_HOST_DEVICE RuleStep step_constants(const RuleHyper& h, double step, bool first, const Power& power) {
  const double* n = h.numbers;
  RuleStep s{};
  switch (h.rule) {
    case Rule::adamw:
    case Rule::adamw_amsgrad:
    case Rule::adam:
    case Rule::adam_amsgrad:
      s.adam = step_constants(AdamHyper{n[0], n[1], n[2], n[3], n[4], n[5]}, step, power);
      break;
    case Rule::sgd:
    case Rule::sgd_momentum:
    case Rule::sgd_nesterov:
      s.sgd = step_constants(SgdHyper{n[0], n[1], n[2], n[3], n[4]}, first);
      break;
    case Rule::rmsprop:
    case Rule::rmsprop_centered:
    case Rule::rmsprop_momentum:
    case Rule::rmsprop_centered_momentum:
      s.rmsprop = step_constants(RmspropHyper{n[0], n[1], n[2], n[3], n[4], n[5]});
      break;
    case Rule::adagrad:
      s.adagrad = step_constants(AdagradHyper{n[0], n[1], n[2], n[3], n[4]}, step);
      break;
    case Rule::lion:
      s.lion = step_constants(LionHyper{n[0], n[1], n[2], n[3], n[4]});
      break;
  }
  return s;
}

// One element of a rule. `first`, `second` and `third` are its moments as kRuleInfo tells.
template <Rule kRule>
PYFT_HOST_DEVICE void update_element(float& param, float scaled_grad, float& first, float& second, float& third,
                                     const RuleStep& step) {
  if constexpr (kRule <= Rule::adam_amsgrad) {
    constexpr bool kCoupled = kRule >= Rule::adam;
    constexpr bool kAmsgrad = kRule == Rule::adamw_amsgrad || kRule == Rule::adam_amsgrad;
    adam_element<kCoupled, kAmsgrad>(param, scaled_grad, first, second, third, step.adam);
  } else if constexpr (kRule == Rule::sgd) {
    sgd_element<SgdKind::plain>(param, scaled_grad, first, step.sgd);
  } else if constexpr (kRule == Rule::sgd_momentum) {
    sgd_element<SgdKind::momentum>(param, scaled_grad, first, step.sgd);
  } else if constexpr (kRule == Rule::sgd_nesterov) {
    sgd_element<SgdKind::nesterov>(param, scaled_grad, first, step.sgd);
  } else if constexpr (kRule <= Rule::rmsprop_centered_momentum) {
    constexpr bool kCentered = kRule == Rule::rmsprop_centered || kRule == Rule::rmsprop_centered_momentum;
    constexpr bool kMomentum = kRule == Rule::rmsprop_momentum || kRule == Rule::rmsprop_centered_momentum;
    rmsprop_element<kCentered, kMomentum>(param, scaled_grad, first, second, third, step.rmsprop);
  } else if constexpr (kRule == Rule::adagrad) {
    adagrad_element(param, scaled_grad, first, step.adagrad);
  } else {
    lion_element(param, scaled_grad, first, step.lion);
  }
}

}  // namespace pyft
