// The Python module: the ops for plain tensors of the CPU, and facts about this build, for `fbopt
// doctor`, benchmarks and bug reports. All other tensors reach the ops through torch.ops.

#include <pybind11/pybind11.h>

#include "direct.h"

namespace {

#define FBOPT_STRING_OF(x) #x
#define FBOPT_STRING(x) FBOPT_STRING_OF(x)
#define FBOPT_VERSION(a, b, c) FBOPT_STRING(a) "." FBOPT_STRING(b) "." FBOPT_STRING(c)

constexpr const char* compiler() {
#if defined(__clang__)
  return "clang " FBOPT_VERSION(__clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  return "g++ " FBOPT_VERSION(__GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
}

constexpr const char* instruction_set() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__AVX__)
  return "avx";
#elif defined(__SSE2__)
  return "sse2";
#elif defined(__ARM_FEATURE_SVE)
  return "sve";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "generic";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Ops on plain tensors of the CPU, and facts about the compiled kernels.";
  if (!fbopt::direct::add_methods(m.ptr())) throw pybind11::error_already_set();
  m.attr("compiler") = compiler();
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
  m.attr("instruction_set") = instruction_set();
  m.attr("torch_target") =
      pybind11::make_tuple(TORCH_TARGET_VERSION >> 56 & 0xff, TORCH_TARGET_VERSION >> 48 & 0xff);
}
