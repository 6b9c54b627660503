// The Python module of the CUDA library: facts about this build.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Facts about the compiled CUDA kernels.";
  m.attr("cuda_version") = pybind11::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  // As in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX".
  m.attr("architectures") = FBOPT_CUDA_ARCHITECTURES;
}
