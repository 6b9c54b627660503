// The finishing step of one element, in torch.optim.SGD's own order and rounding:
//   m <- mean (sum / divisor);  g <- +-c m;  g <- g + wd p;  v <- mu v + (1 - tau) g  (first: v <- g);
//   g <- g + mu v (Nesterov) or v;  p <- p - lr g
#pragma once

#include "math.h"

namespace fbopt::rules {

// Uniform over all elements of a call. Flags rather than zeros: 0 * inf would be NaN.
template <class A>
struct Sgd {
  A negative_lr, clip, divisor, weight_decay, momentum, undamped;
  bool divides, clips, decays, has_momentum, nesterov, maximize, first;
};

template <class A>
FBOPT_RULE A mean(A sum, const Sgd<A>& r) {
  return r.divides ? sum / r.divisor : sum;
}

// Updates velocity in place (if there is one) and returns the new parameter; `grad` is the mean.
template <class A>
FBOPT_RULE A sgd(A param, A grad, A& velocity, const Sgd<A>& r) {
  A g = r.maximize ? -grad : grad;
  if (r.clips) g = g * r.clip;
  if (r.decays) g = fma(r.weight_decay, param, g);
  if (r.has_momentum) {
    velocity = r.first ? g : fma(r.undamped, g, velocity * r.momentum);
    g = r.nesterov ? fma(r.momentum, velocity, g) : velocity;
  }
  return fma(r.negative_lr, g, param);
}

}  // namespace fbopt::rules
