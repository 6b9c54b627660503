// The optimizer's step of one element, in torch.optim.SGD's own order and rounding:
//   m <- mean (sum / divisor);  g <- +-c m;  g <- g + wd p;  v <- mu v + (1 - tau) g  (first: v <-
//   g); g <- g + mu v (Nesterov) or v;  p <- p - lr g
#pragma once

#include "math.h"

namespace fbopt::rules {

// Uniform over all elements of a call. Flags rather than zeros: 0 * inf would be NaN.
template <class A>
struct Sgd {
  A negative_lr, scale, divisor, weight_decay, momentum,
      undamped;  // scale: the clip's factor, negative to maximize
  bool decays, has_momentum, nesterov, first;
};

// The options of a step, as the user gives them.
struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, first;
};

template <class A>
FBOPT_RULE Sgd<A> sgd_rule(const SgdOptions& o, double lr, double clip, double divisor) {
  return {
      .negative_lr = static_cast<A>(-lr),
      .scale = static_cast<A>(o.maximize ? -clip : clip),
      .divisor = static_cast<A>(divisor),
      .weight_decay = static_cast<A>(o.weight_decay),
      .momentum = static_cast<A>(o.momentum),
      .undamped = static_cast<A>(1 - o.dampening),
      .decays = o.weight_decay != 0,
      .has_momentum = o.momentum != 0,
      .nesterov = o.nesterov,
      .first = o.first,
  };
}

template <class A>
FBOPT_RULE A mean(A sum, const Sgd<A>& r) {
  return sum / r.divisor;
}

// Updates velocity in place and returns the new parameter; `grad` is the mean. Selections instead
// of branches let the compiler vectorise the loop.
template <class A>
FBOPT_RULE A sgd(A param, A grad, A& velocity, const Sgd<A>& r) {
  const A scaled = grad * r.scale;
  const A g = r.decays ? fma(r.weight_decay, param, scaled) : scaled;
  const A v = r.first ? g : fma(r.undamped, g, velocity * r.momentum);
  const A ahead = r.nesterov ? fma(r.momentum, v, g) : v;
  velocity = v;
  return fma(r.negative_lr, r.has_momentum ? ahead : g, param);
}

}  // namespace fbopt::rules
