// A number of a call that lies in the memory of the call's device: one for all chunks, or one for
// each.
#pragma once

#include "rules/math.h"

namespace fbopt {

struct Scalar {
  const void* data = nullptr;
  bool wide = true;
  int64_t step = 0;  // from one chunk's to the next one's

  FBOPT_RULE double operator()(int64_t chunk = 0) const {
    const int64_t i = chunk * step;
    return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
};

}  // namespace fbopt
