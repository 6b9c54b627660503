// The perturbed point of the finite differences:
//   out <- p + s g,       s = radius / |g|
//   out <- p + s T^2 g,   s = radius / |T g|,   T = |p| + eta for each element (adaptive)
#pragma once

#include "math.h"

namespace fbopt::rules {

template <class A>
FBOPT_RULE A perturb(A param, A grad, A step) {
  return fma(step, grad, param);
}

// T g; also of vectors.
template <class A>
FBOPT_RULE A scaled(A param, A grad, A eta) {
  return (magnitude(param) + eta) * grad;
}

// A factor T on either side, so that none of the products leaves the range of A before the shift.
template <class A>
FBOPT_RULE A perturb_adaptive(A param, A grad, A step, A eta) {
  const A scale = magnitude(param) + eta;
  return fma(step * scale, scale * grad, param);
}

// A zero gradient has no direction: the perturbation is zero, not NaN. One so small that the step
// would leave the range of A has the largest step of A: a shorter perturbation.
template <class A>
FBOPT_RULE A perturb_step(double radius, double norm) {
  const double step = norm > 0 || norm != norm ? radius / norm : 0.0, most = largest<A>();
  return static_cast<A>(step > most ? most : step < -most ? -most : step);
}

}  // namespace fbopt::rules
