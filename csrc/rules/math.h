// Portability of the rules between host and device compilers: function attributes, fused
// multiply-add, rounding. The build switches contraction off, so that a rule rounds exactly where
// it says and gives the same bits in a vector loop, in its scalar tail and on the device.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define FBOPT_RULE __host__ __device__ inline
#else
#define FBOPT_RULE inline
#endif
// Defined where the device's own functions are called; tests emulate these.
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

// The integer nearest to x y, ties to even, for -2^63 <= x y < 2^63 and a product that is exact in
// a double. AVX2 has no instruction for it, so the host takes it from the low bits of two doubles
// near 1.5 * 2^52: the multiple of 2^32, then the rest. 0x43380000 cancels that constant's own high
// bits.
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

// The largest finite number.
template <class A>
FBOPT_RULE constexpr double largest() {
  return sizeof(A) == sizeof(float) ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
}

// Also of vectors, element by element. That of -0 is -0, of NaN NaN.
template <class A>
FBOPT_RULE A magnitude(A x) {
  return x < 0 ? -x : x;
}

}  // namespace fbopt::rules
