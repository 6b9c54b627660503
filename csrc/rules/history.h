// L-BFGS's stored vectors as rows x_i of a matrix, in float64:
//   products   sum <- sum + x_i v        combination   out <- c_1 x_1 + ... + c_R x_R
#pragma once

#include "math.h"

namespace fbopt::rules {

// The product of doubles is rounded before it is added, as where vectors have no fused operation.
template <class T>
FBOPT_RULE double add_product(double sum, T a, T b) {
  return sum + static_cast<double>(a) * static_cast<double>(b);
}

template <class T>
FBOPT_RULE double combine(double sum, double coefficient, T element) {
  return fma(coefficient, static_cast<double>(element), sum);
}

}  // namespace fbopt::rules
