// The penalised chunk update on the CPU. float32 words per parameter: perturb_ 4 (one read for the
// norm, two reads and a write for the result), accumulate_ 3, accumulate_penalty_ 4 (5 for central
// differences).
#include "../rules/accumulate.h"
#include "../rules/perturb.h"
#include "loops.h"

namespace fbopt::cpu {
namespace {

Tensor zero_dim(double value) {
  Tensor t = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(t.mutable_data_ptr()) = value;
  return t;
}

// Packing saves a fixed cost per tensor in later calls, so this one queries as few properties of
// each tensor as it can.
void pack_op(const Tensor& out, const TensorList& tensors) {
  const Meta target(out.get());
  FBOPT_CHECK(out.is_contiguous(), "out must be contiguous");
  const auto size = static_cast<int64_t>(out.element_size());
  std::vector<int64_t> bytes(tensors.size());
  int64_t total = 0;
  for (int64_t i = 0; i < tensors.size(); ++i) {
    int32_t dtype = 0;
    FBOPT_CALL(aoti_torch_get_dtype(tensors[i], &dtype));
    FBOPT_CALL(aoti_torch_get_numel(tensors[i], &bytes[i]));
    FBOPT_CHECK(dtype == target.dtype, "tensors[", i, "] has another dtype than out");
    total += bytes[i];
    bytes[i] *= size;
  }
  FBOPT_CHECK(total == target.numel, "out must have ", total, " elements, one for each of tensors");
  char* to = static_cast<char*>(target.data);
  for (int64_t i = 0; i < tensors.size(); to += bytes[i++]) {
    if (bytes[i] == 0) continue;
    bool contiguous = false;
    FBOPT_CALL(aoti_torch_is_contiguous(tensors[i], &contiguous));
    std::optional<Tensor> copy;
    if (!contiguous) copy = row_major(tensors[i]);
    void* from = nullptr;
    FBOPT_CALL(aoti_torch_get_data_ptr(copy ? copy->get() : tensors[i], &from));
    std::memcpy(to, from, bytes[i]);
  }
}

Tensor squared_norm_op(const TensorList& tensors) {
  const ScalarType dtype = dtype_of(tensors);
  const Layout layout(tensors);
  const Operand x("tensors", tensors, layout, dtype);
  double sum = 0;
  dispatch(dtype, [&](auto t) { sum = squared_norm<typename decltype(t)::type>(layout, x); });
  return zero_dim(sum);
}

template <class T>
void shift(const Layout& layout, const Operand& p, const Operand& g, T* out, double step) {
  using A = accumulate_t<T>;
  const bool streams = exceeds_cache(3 * layout.total() * static_cast<int64_t>(sizeof(T)));
  const A s = static_cast<A>(step);
  for_each_backwards(layout, [&](int64_t i, int64_t begin, int64_t end) {
    const T *param = p.at<T>(i), *grad = g.at<T>(i);
    T* to = out + layout.start(i);
    tiles(begin, end, streams ? misaligned(to + begin) : 0, [&](int64_t k, int64_t n) {
      Buffer<T, A> bx, bd;
      alignas(64) A moved[kTile];
      const A* __restrict x = widen<A>(param + k, bx, n);
      const A* __restrict d = widen<A>(grad + k, bd, n);
      for (int64_t j = 0; j < n; ++j) moved[j] = rules::perturb(x[j], d[j], s);
      streams ? stream(to + k, moved, n) : narrow_loop(to + k, moved, n);
    });
    if (streams) stream_fence();
  });
}

Tensor perturb_op(const Tensor& out, const TensorList& params, const TensorList& grads,
                  double radius, std::optional<Tensor> squared) {
  const ScalarType dtype = out.scalar_type();
  const Layout layout(params);
  const Operand p("params", params, layout, dtype), g("grads", grads, layout, dtype);
  check_flat(out, layout);
  double sum = 0;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    sum = squared ? scalar("squared_norm", *squared) : squared_norm<T>(layout, g);
    const double step = rules::perturb_step(radius, std::sqrt(sum));
    shift(layout, p, g, static_cast<T*>(out.mutable_data_ptr()), step);
  });
  return zero_dim(sum);
}

void accumulate_op(const TensorList& sums, const TensorList& grads, const Tensor& weight) {
  const ScalarType dtype = dtype_of(grads);
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Operand g("grads", grads, layout, dtype);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using G = typename decltype(gt)::type;
    using A = typename decltype(at)::type;
    const A w = static_cast<A>(scalar("weight", weight));
    for_each_backwards(layout, [&](int64_t i, int64_t begin, int64_t end) {
      A* sum = a.at<A>(i);
      const G* grad = g.at<G>(i);
      tiles(begin, end, 0, [&](int64_t k, int64_t n) {
        Buffer<G, A> bd;
        A* __restrict x = sum + k;
        const A* __restrict d = widen<A>(grad + k, bd, n);
        for (int64_t j = 0; j < n; ++j) x[j] = rules::accumulate(x[j], d[j], w);
      });
    });
  });
  a.write_back();
}

void accumulate_penalty_op(const TensorList& sums, const TensorList& grads, const TensorList& plus,
                           const TensorList& minus, const Tensor& weight, const Tensor& coefficient,
                           const Tensor& squared_norm, double radius) {
  const ScalarType dtype = dtype_of(grads);
  const bool central = !minus.empty();
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Operand g("grads", grads, layout, dtype), u("plus", plus, layout, dtype);
  const Operand v("minus", central ? minus : grads, layout, dtype);
  const double factor = rules::penalty_factor(scalar("coefficient", coefficient),
                                              std::sqrt(scalar("squared_norm", squared_norm)),
                                              radius, central ? 2 : 1);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using G = typename decltype(gt)::type;
    using A = typename decltype(at)::type;
    const A w = static_cast<A>(scalar("weight", weight)), k = static_cast<A>(factor);
    for_each_backwards(layout, [&](int64_t i, int64_t begin, int64_t end) {
      A* sum = a.at<A>(i);
      const G *grad = g.at<G>(i), *up = u.at<G>(i), *down = v.at<G>(i);
      tiles(begin, end, 0, [&](int64_t e, int64_t n) {
        Buffer<G, A> bd, bp, bm;
        A* __restrict x = sum + e;
        const A* d = widen<A>(grad + e, bd, n);
        const A* p = widen<A>(up + e, bp, n);
        const A* m = widen<A>(down + e, bm, n);
        for (int64_t j = 0; j < n; ++j)
          x[j] = rules::accumulate_penalty(x[j], d[j], p[j], m[j], k, w);
      });
    });
  });
  a.write_back();
}

}  // namespace
}  // namespace fbopt::cpu

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, CPU, m) {
  m.impl("pack_", TORCH_BOX(&fbopt::cpu::pack_op));
  m.impl("squared_norm", TORCH_BOX(&fbopt::cpu::squared_norm_op));
  m.impl("perturb_", TORCH_BOX(&fbopt::cpu::perturb_op));
  m.impl("accumulate_", TORCH_BOX(&fbopt::cpu::accumulate_op));
  m.impl("accumulate_penalty_", TORCH_BOX(&fbopt::cpu::accumulate_penalty_op));
}
