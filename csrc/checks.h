// Argument checks of the ops, the same on every device.
#pragma once

#include <optional>
#include <type_traits>

#include "overlap.h"
#include "scalar.h"
#include "stable_abi.h"

namespace fbopt {

// The type of the arithmetic: half precision is computed in float.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A 0-dim tensor, or for stacks a 1-D one with a number for each chunk.
inline Scalar scalar_of(const char* name, const Meta& t, const Chunks& chunks) {
  if (chunks.stacked) {
    FBOPT_CHECK(t.dim == 1 && t.numel == chunks.count, name, " must be a 1-D tensor of ",
                chunks.count, " elements, one for each chunk");
  } else {
    FBOPT_CHECK(t.numel == 1, name, " must be a 0-dim tensor");
  }
  const ScalarType dtype = dtype_of(t);
  FBOPT_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, name,
              " must be float32 or float64");
  return {t.data, dtype == ScalarType::Double, t.numel == 1 ? 0 : *t.strides};
}

// Chunks with a weight each, or the one of a 0-dim weight.
inline Chunks chunks_of(const Meta& weight) {
  if (weight.dim == 0) return {};
  FBOPT_CHECK(
      weight.dim == 1 && weight.numel > 0,
      "weight must be a 0-dim tensor, or 1-D with one element for each chunk of the stacks");
  return {weight.numel, true};
}

// The chunks of stacks, at least one.
inline Chunks stacked(const char* name, const Meta& first) {
  FBOPT_CHECK(first.dim > 0 && *first.sizes > 0, name,
              "[0] must be a stack of at least one slice along its first dimension");
  return {*first.sizes, true};
}

// Gradients are stacks if they have one dimension more than their parameters.
inline Chunks chunks_of(const TensorList& params, const TensorList& grads,
                        const std::optional<Meta>& squared_norm) {
  if (params.empty() || grads.empty())
    return squared_norm && squared_norm->dim == 1 ? Chunks{squared_norm->numel, true} : Chunks{};
  return grads[0].dim == params[0].dim + 1 ? stacked("grads", grads[0]) : Chunks{};
}

inline void check_flat(const Meta& out, const Flat& flat) {
  FBOPT_CHECK(is_contiguous(out) && out.numel == flat.size, "out must be contiguous and have ",
              flat.size, " elements: params one after the other, each from a multiple of ", kAlign,
              " on, and of stacks as many copies of each as there are chunks");
}

// One float64 for each tensor of a list.
inline double* per_tensor(const char* name, const Meta& t, const Layout& layout) {
  FBOPT_CHECK(dtype_of(t) == ScalarType::Double && is_contiguous(t) && t.numel == layout.size(),
              name, " must be a contiguous float64 tensor of ", layout.size(),
              " elements, one for each of sums");
  FBOPT_CHECK(layout.size() == 0 || t.device == layout[0].device, name,
              " must be on the device of the tensors");
  return static_cast<double*>(t.data);
}

// Vectors as the rows of a matrix, float32 or float64, one after the other in memory.
struct Rows {
  int64_t count, columns;
  ScalarType dtype;
  void* data;
  Device device;

  explicit Rows(const Meta& rows) : data(rows.data), device(rows.device) {
    FBOPT_CHECK(rows.dim == 2 && is_contiguous(rows), "rows must be a contiguous matrix");
    count = rows.sizes[0], columns = rows.sizes[1], dtype = dtype_of(rows);
    FBOPT_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float,
                "rows must be float32 or float64");
  }
  template <class T>
  T* at(int64_t row) const {
    return static_cast<T*>(data) + row * columns;
  }
  // A place in the rows after `group` rows from r on, the same place if there are no more.
  template <class T>
  const T* ahead(const T* place, int64_t r, int64_t group) const {
    return r + 2 * group <= count ? place + group * columns : place;
  }
  // One element for each column.
  template <class T>
  T* vector(const char* name, const Meta& t) const {
    FBOPT_CHECK(is_contiguous(t) && t.numel == columns && dtype_of(t) == dtype, name,
                " must be contiguous, of the dtype of rows, and have ", columns,
                " elements, one for each column");
    FBOPT_CHECK(t.device == device, name, " must be on the device of rows");
    return static_cast<T*>(t.data);
  }
  // So many float64.
  double* numbers(const char* name, const Meta& t, int64_t size) const {
    FBOPT_CHECK(is_contiguous(t) && t.numel == size && dtype_of(t) == ScalarType::Double, name,
                " must be a contiguous float64 tensor of ", size, " elements");
    FBOPT_CHECK(t.device == device, name, " must be on the device of rows");
    return static_cast<double*>(t.data);
  }
};

// f(Type<T>) for float32 and float64.
template <class F>
void dispatch_wide(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(Type<double>{}) : f(Type<float>{});
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

// Gradients that are sums are written, too; others may each be the parameter itself.
inline void check_step_apart(const TensorList& params, const TensorList& grads,
                             const TensorList& momentum_buffers, bool are_sums, const Named& lr,
                             const Named& divisor, const Named& total_norm) {
  const Named p("params", params), g("grads", grads), m("momentum_buffers", momentum_buffers);
  if (are_sums) {
    check_apart({p, g, m}, {lr, divisor, total_norm});
  } else {
    check_apart({p, m}, {g, lr, divisor, total_norm}, "grads");
  }
}

inline void check_step(const TensorList& params, const TensorList& grads,
                       const TensorList& momentum_buffers, double momentum,
                       const std::optional<Meta>& total_norm,
                       const std::optional<double>& max_norm) {
  const ScalarType dtype = dtype_of(params), grad_dtype = dtype_of(grads, dtype);
  FBOPT_CHECK(grad_dtype == dtype || grad_dtype == accumulator_of(dtype),
              "grads must have the dtype of params, or that of their sums");
  FBOPT_CHECK(!max_norm || total_norm, "max_norm needs total_norm");
  FBOPT_CHECK(momentum != 0 ? momentum_buffers.size() == params.size() : momentum_buffers.empty(),
              "momentum_buffers must be as long as params, or empty without momentum");
}

}  // namespace fbopt
