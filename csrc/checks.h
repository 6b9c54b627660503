// Argument checks of the ops, the same on every device.
#pragma once

#include <optional>
#include <type_traits>

#include "stable_abi.h"

namespace fbopt {

// The type of the arithmetic: half precision is computed in float.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void check_flat(const Tensor& out, const Layout& layout) {
  FBOPT_CHECK(out.is_contiguous() && out.numel() == layout.flat_size(),
              "out must be contiguous and have ", layout.flat_size(),
              " elements: params one after the other, each from a multiple of ", kAlign, " on");
}

// One float64 for each tensor of a list.
inline double* per_tensor(const char* name, const Tensor& t, const Layout& layout) {
  FBOPT_CHECK(
      t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == layout.size(),
      name, " must be a contiguous float64 tensor of ", layout.size(),
      " elements, one for each of sums");
  FBOPT_CHECK(layout.size() == 0 || Device(t.get()) == layout[0].device, name,
              " must be on the device of the tensors");
  return static_cast<double*>(t.data_ptr());
}

// f(Type<G>, Type<A>) for the element types of gradients and of their sums.
template <class F>
void dispatch_sums(const TensorList& sums, ScalarType grads, F&& f) {
  FBOPT_CHECK(dtype_of(sums, accumulator_of(grads)) == accumulator_of(grads),
              "sums must be float32, or float64 for float64 grads");
  dispatch(grads, [&](auto g) {
    using G = typename decltype(g)::type;
    f(Type<G>{}, Type<accumulate_t<G>>{});
  });
}

inline void check_step(const TensorList& params, const TensorList& grads,
                       const TensorList& momentum_buffers, double momentum,
                       const std::optional<Tensor>& total_norm,
                       const std::optional<double>& max_norm) {
  const ScalarType dtype = dtype_of(params), grad_dtype = dtype_of(grads, dtype);
  FBOPT_CHECK(grad_dtype == dtype || grad_dtype == accumulator_of(dtype),
              "grads must have the dtype of params, or that of their sums");
  FBOPT_CHECK(!max_norm || total_norm, "max_norm needs total_norm");
  FBOPT_CHECK(momentum != 0 ? momentum_buffers.size() == params.size() : momentum_buffers.empty(),
              "momentum_buffers must be as long as params, or empty without momentum");
}

}  // namespace fbopt
