// What the rules need from the host and the device compiler: one marker and one fused multiply-add.
// Contraction is switched off for the whole build, so a rule rounds where it is written to round
// and gives the same bits in a vector loop, in its scalar tail and on the device.
#pragma once

#ifdef __CUDACC__
#define FBOPT_RULE __host__ __device__ inline
#else
#define FBOPT_RULE inline
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

}  // namespace fbopt::rules
