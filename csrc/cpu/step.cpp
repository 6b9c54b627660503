// Clipping and the optimizer's step on the CPU. float32 words per parameter: clip_ 2, or none if
// nothing is clipped; sgd_step_ with momentum 5, and 1 more if it writes the mean to grads.
#include "../rules/clip.h"
#include "../rules/sgd.h"
#include "loops.h"

namespace fbopt::cpu {
namespace {

void clip_op(const TensorList& grads, const Argument& total_norm, double max_norm) {
  check_apart({{"grads", grads}}, {{"total_norm", total_norm}});
  const ScalarType dtype = dtype_of(grads);
  const Layout layout(grads);
  Operand g("grads", grads, layout, dtype);
  const double c = rules::clip_coefficient(max_norm, scalar("total_norm", total_norm)());
  if (c == 1.0) return;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const A coefficient = static_cast<A>(c);
    for_each_backwards(layout, 1, [&](int64_t i, int64_t begin, int64_t end) {
      T* grad = g.at<T>(i);
      tiles(begin, end, 0, [&](int64_t k, int64_t n) {
        Buffer<T, A> buffer;
        A* x = widen<A>(grad + k, buffer, n);
        for (int64_t j = 0; j < n; ++j) x[j] *= coefficient;
        narrow(grad + k, x, n);
      });
    });
  });
  g.write_back();
}

// T: parameters and momentum; G: gradients, or their sums in the accumulators' type.
template <class T, class G>
void step(const Layout& layout, const Operand& p, const Operand& g, const Operand* v,
          const rules::Sgd<accumulate_t<T>>& rule) {
  using A = accumulate_t<T>;
  const bool divides = rule.divisor != 1;
  for_each_backwards(layout, 1, [&](int64_t i, int64_t begin, int64_t end) {
    T* param = p.at<T>(i);
    G* grad = g.at<G>(i);
    T* velocity = v ? v->at<T>(i) : nullptr;
    tiles(begin, end, 0, [&](int64_t k, int64_t n) {
      Buffer<T, A> bx, bm;
      Buffer<G, A> bd;
      A unused[kTile] = {};
      A* __restrict x = widen<A>(param + k, bx, n);
      A copied[kTile], *found = widen<A>(grad + k, bd, n);
      if (found == x) found = std::copy(found, found + n, copied) - n;  // p.grad is p itself
      A* __restrict d = found;
      A* __restrict m = velocity ? widen<A>(velocity + k, bm, n) : unused;
      if (divides) {
        for (int64_t j = 0; j < n; ++j) d[j] = rules::mean(d[j], rule);
        narrow(grad + k, d, n);
      }
      for (int64_t j = 0; j < n; ++j) x[j] = rules::sgd(x[j], d[j], m[j], rule);
      if (velocity) narrow(velocity + k, m, n);
      narrow(param + k, x, n);
    });
  });
}

void sgd_step_op(const TensorList& params, const TensorList& grads,
                 const TensorList& momentum_buffers, const Argument& lr,
                 std::optional<Argument> divisor, std::optional<Argument> total_norm,
                 std::optional<double> max_norm, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first) {
  check_step_apart(params, grads, momentum_buffers, divisor.has_value(), {"lr", lr},
                   {"divisor", divisor}, {"total_norm", total_norm});
  const ScalarType dtype = dtype_of(params), grad_dtype = dtype_of(grads, dtype);
  check_step(params, grads, momentum_buffers, momentum, total_norm, max_norm);
  const Layout layout(params);
  Operand p("params", params, layout, dtype), g("grads", grads, layout, grad_dtype);
  std::optional<Operand> v;
  if (momentum != 0) v.emplace("momentum_buffers", momentum_buffers, layout, dtype);
  const rules::SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize, first};
  const double rate = scalar("lr", lr)();
  const double clip =
      max_norm ? rules::clip_coefficient(*max_norm, scalar("total_norm", *total_norm)()) : 1.0;
  const double weight = divisor ? scalar("divisor", *divisor)() : 1.0;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const rules::Sgd<A> rule = rules::sgd_rule<A>(options, rate, clip, weight);
    const Operand* velocity = v ? &*v : nullptr;
    if (grad_dtype == dtype) {
      step<T, T>(layout, p, g, velocity, rule);
    } else {
      step<T, A>(layout, p, g, velocity, rule);
    }
  });
  p.write_back();
  if (divisor) g.write_back();
  if (v) v->write_back();
}

}  // namespace
}  // namespace fbopt::cpu

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, CPU, m) {
  m.impl("clip_", TORCH_BOX(&fbopt::cpu::clip_op));
  m.impl("sgd_step_", TORCH_BOX(&fbopt::cpu::sgd_step_op));
}

// Gradients are written only where they are sums, with a divisor.
static PyObject* sgd_step_method(PyObject* module, PyObject* const* args, Py_ssize_t count) {
  using fbopt::cpu::sgd_step_op, fbopt::direct::method;
  const bool divides = count > 4 && args[4] != Py_None;
  return (divides ? method<&sgd_step_op, 0b111> : method<&sgd_step_op, 0b101>)(module, args, count);
}

static const fbopt::direct::Ops direct_ops{
    {"clip_", fbopt::direct::method<&fbopt::cpu::clip_op, 0b1>},
    {"sgd_step_", sgd_step_method},
};
