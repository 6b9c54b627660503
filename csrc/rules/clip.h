// Global-norm clipping, as torch.nn.utils.clip_grad_norm_:
//   g <- c g,   c = min(1, max_norm / (|g| + 1e-6))
#pragma once

#include "math.h"

namespace fbopt::rules {

// A NaN norm gives a NaN coefficient, so that it reaches the user and does not pass as "not
// clipped".
FBOPT_RULE double clip_coefficient(double max_norm, double norm) {
  const double c = max_norm / (norm + 1e-6);
  return c > 1.0 ? 1.0 : c;
}

}  // namespace fbopt::rules
