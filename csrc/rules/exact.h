// The weighted sum over chunks in fixed point: with a power of two u for each tensor
//   S <- S + q,   q = rint(w v / u),   S = carry 2^64 + sum,   mean = S u / sum of weights
// Integers have the same sum in any order. `sum` is an int64 that wraps; `carry` counts how often,
// and is touched only where that happens or where a contribution alone is as large.
#pragma once

#include "math.h"

namespace fbopt::rules {

// Contributions |w v / u| below kFits need no carry of their own; from kReach on none holds them.
constexpr double kFits = 0x1p62, kReach = 0x1p94;

FBOPT_RULE int64_t wrapping_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

FBOPT_RULE int64_t wrapping_subtract(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

// Negative where before + q wrapped to `result`.
FBOPT_RULE int64_t wrapped(int64_t before, int64_t q, int64_t result) {
  return (before ^ result) & (q ^ result);
}

// How often the sum wrapped when adding q gave `result`: 1, -1 or 0.
FBOPT_RULE int32_t wrap(int64_t result, int64_t q) {
  const int64_t before = wrapping_subtract(result, q);
  return static_cast<int32_t>((wrapped(before, q, result) >> 63) & ((q >> 63) | 1));
}

// rint(v s), s = w / u. A float's product with a scale of up to 29 significant bits is exact; that
// of a double is rounded first.
template <class A>
FBOPT_RULE int64_t quantised(A v, double scale) {
  if constexpr (sizeof(A) == sizeof(float)) return nearest(static_cast<double>(v), scale);
  return nearest(v * scale, 1);
}

// May wrap: a pass in which a carry does is discarded.
FBOPT_RULE void add_carry(int32_t& carry, int32_t by) {
  carry = static_cast<int32_t>(static_cast<uint32_t>(carry) + static_cast<uint32_t>(by));
}

// Adds x = v s, of any size. Values that the carry cannot hold are left out, and the maxima show
// them. Free of branches: those on the signs of gradients would often be mispredicted.
template <class A>
FBOPT_RULE void add_exact(int64_t& sum, int32_t& carry, A v, double scale) {
  constexpr double kRound = 0x1.8p52;  // added and taken away, it leaves the nearest integer
  const double product = static_cast<double>(v) * scale;
  const double x = magnitude(product) < kReach ? product : 0.0;
  const double high = (x * 0x1p-64 + kRound) - kRound;
  const double rest = fma(high, -0x1p64, x);  // exact, and at most 2^63, which no int64 holds
  const bool top = rest >= 0x1p63;
  const int64_t q = nearest(top ? -0x1p63 : rest, 1);
  sum = wrapping_add(sum, q);
  add_carry(carry, static_cast<int32_t>(high) + (top ? 1 : 0) + wrap(sum, q));
}

// S u / divisor for S = carry 2^64 + sum: with a carry |S| is at least 2^63, so nothing cancels.
FBOPT_RULE double exact_mean(double sum, double carry, double unit, double divisor) {
  return fma(carry, 0x1p64, sum) / divisor * unit;
}

// The unit for the mean: NaN if some contribution was not finite. Scales are powers of two, so that
// a product with it is exact, and cheaper than a division.
FBOPT_RULE double sound_unit(double scale, double maximum) {
  return 1 / (scale + (maximum - maximum));
}

}  // namespace fbopt::rules
