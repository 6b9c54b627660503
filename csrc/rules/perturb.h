// The perturbed point of the finite differences:  out <- p + s g,   s = radius / |g|.
#pragma once

#include "math.h"

namespace fbopt::rules {

template <class A>
FBOPT_RULE A perturb(A param, A grad, A step) {
  return fma(step, grad, param);
}

// A zero gradient has no direction: the perturbation is zero, not NaN.
FBOPT_RULE double perturb_step(double radius, double norm) {
  return norm > 0 || norm != norm ? radius / norm : 0.0;
}

}  // namespace fbopt::rules
