// The weighted sum over chunks:
//   without penalty   a <- a + w g
//   with penalty      a <- a + w (g + k (plus - minus)),   k (plus - minus) ~ lambda H g
#pragma once

#include "math.h"

namespace fbopt::rules {

template <class A>
FBOPT_RULE A accumulate(A sum, A grad, A weight) {
  return fma(weight, grad, sum);
}

template <class A>
FBOPT_RULE A penalised(A grad, A plus, A minus, A factor) {
  return fma(factor, plus - minus, grad);
}

template <class A>
FBOPT_RULE A accumulate_penalty(A sum, A grad, A plus, A minus, A factor, A weight) {
  return fma(weight, penalised(grad, plus, minus, factor), sum);
}

// k = lambda / (plus_shift - minus_shift) with shifts of +-radius / |g| along g; steps counts them:
// 1 for forward differences, 2 for central ones. A zero gradient has no direction and no penalty.
FBOPT_RULE double penalty_factor(double coefficient, double norm, double radius, int steps) {
  return norm > 0 || norm != norm ? coefficient * norm / (radius * steps) : 0.0;
}

}  // namespace fbopt::rules
