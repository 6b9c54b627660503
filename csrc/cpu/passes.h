// What a penalised chunk update adds up: gradients at the parameters and at the shifted points, and
// for each chunk the factor of their difference.
#pragma once

#include "../rules/accumulate.h"
#include "loops.h"

namespace fbopt::cpu {

struct Passes {
  Operand grads, plus, minus;
  std::vector<double> factors;

  // Forward differences have no list `minus`: grads stand for it.
  Passes(const TensorList& at, const TensorList& ahead, const TensorList& behind,
         const Layout& layout, const Chunks& chunks, const Meta& coefficient,
         const Meta& squared_norm, double radius)
      : grads("grads", at, layout, dtype_of(at), chunks),
        plus("plus", ahead, layout, dtype_of(at), chunks),
        minus("minus", behind.empty() ? at : behind, layout, dtype_of(at), chunks),
        factors(chunks.count) {
    const Scalar square = scalar("squared_norm", squared_norm, chunks);
    const double c = scalar("coefficient", coefficient)();
    for (int64_t k = 0; k < chunks.count; ++k)
      factors[k] = rules::penalty_factor(c, std::sqrt(square(k)), radius, behind.empty() ? 1 : 2);
  }
};

}  // namespace fbopt::cpu
