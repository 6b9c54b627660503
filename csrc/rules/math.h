// What the rules need from the host and the device compiler: one marker, one fused multiply-add,
// rounding. Contraction is switched off for the whole build, so a rule rounds where it is written
// to round and gives the same bits in a vector loop, in its scalar tail and on the device.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define FBOPT_RULE __host__ __device__ inline
#else
#define FBOPT_RULE inline
#endif
// Set where the device's own functions are called; tests stand in for them.
#ifdef __CUDA_ARCH__
#define FBOPT_ON_DEVICE
#endif

namespace fbopt::rules {

// a * b + c with one rounding.
#ifdef __CUDA_ARCH__
FBOPT_RULE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FBOPT_RULE double fma(double a, double b, double c) { return ::fma(a, b, c); }
#else
FBOPT_RULE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FBOPT_RULE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// The integer nearest to x y, ties to even, for -2^63 <= x y < 2^63 and a product that a double
// holds. AVX2 has no instruction for it, so the host leaves it in the low bits of two doubles
// near 1.5 * 2^52: the multiple of 2^32, then what is left. 0x43380000 is what that constant's own
// bits would add.
FBOPT_RULE int64_t nearest(double x, double y) {
#ifdef FBOPT_ON_DEVICE
  return __double2ll_rn(x * y);
#else
  constexpr double kLow = 0x1.8p52, kHigh = kLow - 0x43380000;
  const double high = fma(x, y * 0x1p-32, kHigh);
  const double low = fma(x, y, fma(high, -0x1p32, kLow + kHigh * 0x1p32));
  return static_cast<int64_t>((std::bit_cast<uint64_t>(high) << 32) + std::bit_cast<uint64_t>(low));
#endif
}

FBOPT_RULE double magnitude(double x) { return x < 0 ? -x : x; }

}  // namespace fbopt::rules
