// Clipping and the optimizer's step on CUDA. float32 words per parameter as on the CPU: clip_ 2, or
// none if nothing is clipped; sgd_step_ with momentum 5, and 1 more if it writes the mean to grads.
// One launch per table of tensors.
#include "multi_tensor.cuh"
#include "../rules/clip.h"
#include "../rules/sgd.h"

namespace fbopt::cuda {
namespace {

template <class T>
struct Clip {
  using Value = accumulate_t<T>;
  using Operands = std::tuple<T>;  // grads
  using Uniform = Value;
  Scalar total_norm;
  double max_norm;

  __device__ Uniform uniform(int, int) const {
    return static_cast<Value>(rules::clip_coefficient(max_norm, total_norm()));
  }
  static __device__ bool idle(Uniform coefficient) { return coefficient == Value(1); }
  static __device__ constexpr bool stacked(int) { return false; }
  static __device__ constexpr bool reads(int) { return true; }
  static __device__ constexpr bool writes(int) { return true; }
  static __device__ void apply(Value (&x)[1], Uniform coefficient) { x[0] *= coefficient; }
};

void clip_op(const TensorList& grads, const Tensor& total_norm, double max_norm) {
  check_apart({{"grads", grads}}, {{"total_norm", total_norm}});
  const Call call(grads.empty() ? Meta(total_norm) : grads[0]);
  const ScalarType dtype = dtype_of(grads);
  const Layout layout(grads);
  Operand g("grads", grads, layout, dtype);
  const Scalar norm = call.scalar("total_norm", total_norm);
  dispatch(dtype, [&](auto t) {
    using Rule = Clip<typename decltype(t)::type>;
    call.for_each(call.sizes(layout), Rule{norm, max_norm}, {&g.pointers()});
  });
  g.write_back();
}

// T: parameters and momentum; G: gradients, or their sums in the accumulators' type.
template <class T, class G>
struct Step {
  using Value = accumulate_t<T>;
  using Operands = std::tuple<T, G, T>;  // params, grads, momentum_buffers
  using Uniform = rules::Sgd<Value>;
  rules::SgdOptions options;
  Scalar lr, divisor, total_norm;
  double max_norm;
  bool divides, clips;

  __device__ Uniform uniform(int, int) const {
    const double clip = clips ? rules::clip_coefficient(max_norm, total_norm()) : 1.0;
    return rules::sgd_rule<Value>(options, lr(), clip, divides ? divisor() : 1.0);
  }
  static __device__ bool idle(const Uniform&) { return false; }
  static __device__ constexpr bool stacked(int) { return false; }
  __device__ bool reads(int k) const { return k < 2 || (options.momentum != 0 && !options.first); }
  __device__ bool writes(int k) const {
    return k == 0 || (k == 1 ? divides : options.momentum != 0);
  }
  static __device__ void apply(Value (&x)[3], const Uniform& rule) {
    x[1] = rules::mean(x[1], rule);
    x[0] = rules::sgd(x[0], x[1], x[2], rule);
  }
};

void sgd_step_op(const TensorList& params, const TensorList& grads,
                 const TensorList& momentum_buffers, const Tensor& lr,
                 std::optional<Tensor> divisor, std::optional<Tensor> total_norm,
                 std::optional<double> max_norm, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first) {
  check_step_apart(params, grads, momentum_buffers, divisor.has_value(), {"lr", lr},
                   {"divisor", divisor}, {"total_norm", total_norm});
  const Call call(params.empty() ? Meta(lr) : params[0]);
  const ScalarType dtype = dtype_of(params), grad_dtype = dtype_of(grads, dtype);
  check_step(params, grads, momentum_buffers, momentum, total_norm, max_norm);
  const Layout layout(params);
  Operand p("params", params, layout, dtype), g("grads", grads, layout, grad_dtype);
  std::optional<Operand> v;
  if (momentum != 0) v.emplace("momentum_buffers", momentum_buffers, layout, dtype);
  const rules::SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize, first};
  const Scalar rate = call.scalar("lr", lr);
  const Scalar weight = divisor ? call.scalar("divisor", *divisor) : Scalar{};
  const Scalar norm = max_norm ? call.scalar("total_norm", *total_norm) : Scalar{};
  const auto run = [&](auto rule) {
    call.for_each(call.sizes(layout), rule,
                  {&p.pointers(), &g.pointers(), v ? &v->pointers() : nullptr});
  };
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto launch = [&](auto grad) {
      run(Step<T, typename decltype(grad)::type>{
          .options = options,
          .lr = rate,
          .divisor = weight,
          .total_norm = norm,
          .max_norm = max_norm.value_or(0),
          .divides = divisor.has_value(),
          .clips = max_norm.has_value(),
      });
    };
    grad_dtype == dtype ? launch(Type<T>{}) : launch(Type<accumulate_t<T>>{});
  });
  p.write_back();
  if (divisor) g.write_back();
  if (v) v->write_back();
}

}  // namespace
}  // namespace fbopt::cuda

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, FBOPT_CUDA_KEY, m) {
  m.impl("clip_", TORCH_BOX(&fbopt::cuda::clip_op));
  m.impl("sgd_step_", TORCH_BOX(&fbopt::cuda::sgd_step_op));
}
