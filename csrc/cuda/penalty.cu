// Norm, packing, and the addition of chunks' gradients on CUDA. float32 words per parameter and
// chunk as on the CPU, with stacks of K: squared_norm 1, accumulate_ 1 + 2/K, accumulate_penalty_ 2
// + 2/K (3 + 2/K for central differences). Launches per table of tensors and 64 chunks: 1, of the
// norm 2.
#include "multi_tensor.cuh"
#include "../rules/accumulate.h"

namespace fbopt::cuda {
namespace {

struct Nothing {};

template <class T>
struct Copy {
  using Operands = std::tuple<T, const T>;
  using Value = T;
  using Uniform = Nothing;

  __device__ Uniform uniform(int, int) const { return {}; }
  static __device__ bool idle(Uniform) { return false; }
  static __device__ constexpr bool stacked(int) { return false; }
  static __device__ constexpr bool reads(int k) { return k == 1; }
  static __device__ constexpr bool writes(int k) { return k == 0; }
  static __device__ void apply(Value (&x)[2], Uniform) { x[0] = x[1]; }
};

void pack_op(const Tensor& out, const TensorList& tensors) {
  check_apart({{"out", out}}, {{"tensors", tensors}});
  const Call call(out);
  const Meta target(out.get());
  FBOPT_CHECK(out.is_contiguous(), "out must be contiguous");
  std::vector<int64_t> sizes(tensors.size());
  std::vector<void*> to(tensors.size()), from(tensors.size());
  std::vector<Tensor> copies;
  int64_t total = 0;
  for (int64_t i = 0; i < tensors.size(); ++i) {
    const Meta& meta = tensors[i];
    FBOPT_CHECK(meta.dtype == target.dtype, "tensors[", i, "] has another dtype than out");
    FBOPT_CHECK(meta.device == target.device, "tensors[", i, "] is on another device than out");
    bool contiguous = false;
    FBOPT_CALL(aoti_torch_is_contiguous(tensors.handle(i), &contiguous));
    if (!contiguous) copies.push_back(row_major(tensors.handle(i)));
    from[i] = contiguous ? meta.data : copies.back().data_ptr();
    to[i] = static_cast<char*>(target.data) + total * static_cast<int64_t>(out.element_size());
    sizes[i] = meta.numel;
    total += meta.numel;
  }
  FBOPT_CHECK(total == target.numel, "out must have ", total, " elements, one for each of tensors");
  dispatch(out.scalar_type(),
           [&](auto t) { call.for_each(sizes, Copy<typename decltype(t)::type>{}, {&to, &from}); });
}

Tensor squared_norm_op(const TensorList& tensors, bool stacks) {
  FBOPT_CHECK(!tensors.empty(), "tensors must hold at least one");
  const Call call(tensors[0]);
  const ScalarType dtype = dtype_of(tensors);
  const Chunks chunks = stacks ? stacked("tensors", tensors[0]) : Chunks{};
  const Layout layout(tensors, chunks);
  const Operand x("tensors", tensors, layout, dtype, chunks);
  return call.squared_norm(dtype, layout, x, chunks);
}

template <class G, class A>
struct Accumulate {
  using Value = A;
  using Operands = std::tuple<A, const G>;  // sums, grads
  using Uniform = A;
  Scalar weight;

  __device__ Uniform uniform(int, int chunk) const { return static_cast<A>(weight(chunk)); }
  static __device__ bool idle(Uniform) { return false; }
  static __device__ constexpr bool stacked(int k) { return k > 0; }
  static __device__ constexpr bool reads(int) { return true; }
  static __device__ constexpr bool writes(int k) { return k == 0; }
  static __device__ void apply(A (&x)[2], Uniform w) { x[0] = rules::accumulate(x[0], x[1], w); }
};

void accumulate_op(const TensorList& sums, const TensorList& grads, const Tensor& weight) {
  check_apart({{"sums", sums}}, {{"grads", grads}, {"weight", weight}});
  const Call call(sums.empty() ? Meta(weight) : sums[0]);
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Operand g("grads", grads, layout, dtype, chunks);
  const Scalar w = call.scalar("weight", weight, chunks);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using Rule = Accumulate<typename decltype(gt)::type, typename decltype(at)::type>;
    call.for_each(call.sizes(layout), Rule{w}, {&a.pointers(), &g.pointers()}, chunks.count);
  });
  a.write_back();
}

// Steps: 1 for forward differences, where grads stand for minus as well, 2 for central ones.
template <class G, class A, int Steps>
struct AccumulatePenalty {
  using Value = A;
  // sums, grads, plus, minus
  using Operands = std::conditional_t<Steps == 2, std::tuple<A, const G, const G, const G>,
                                      std::tuple<A, const G, const G>>;
  struct Uniform {
    A factor, weight;
  };
  Scalar weight, coefficient, squared_norm;
  double radius;

  __device__ Uniform uniform(int, int chunk) const {
    const double norm = sqrt(squared_norm(chunk));
    return {static_cast<A>(rules::penalty_factor(coefficient(), norm, radius, Steps)),
            static_cast<A>(weight(chunk))};
  }
  static __device__ bool idle(const Uniform&) { return false; }
  static __device__ constexpr bool stacked(int k) { return k > 0; }
  static __device__ constexpr bool reads(int) { return true; }
  static __device__ constexpr bool writes(int k) { return k == 0; }
  static __device__ void apply(Value (&x)[Steps + 2], const Uniform& u) {
    const Value minus = x[Steps == 2 ? 3 : 1];
    x[0] = rules::accumulate_penalty(x[0], x[1], x[2], minus, u.factor, u.weight);
  }
};

void accumulate_penalty_op(const TensorList& sums, const TensorList& grads, const TensorList& plus,
                           const TensorList& minus, const Tensor& weight, const Tensor& coefficient,
                           const Tensor& squared_norm, double radius) {
  check_apart({{"sums", sums}}, {{"grads", grads},
                                 {"plus", plus},
                                 {"minus", minus},
                                 {"weight", weight},
                                 {"coefficient", coefficient},
                                 {"squared_norm", squared_norm}});
  const Call call(sums.empty() ? Meta(weight) : sums[0]);
  const ScalarType dtype = dtype_of(grads);
  const bool central = !minus.empty();
  const Chunks chunks = chunks_of(weight);
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Operand g("grads", grads, layout, dtype, chunks), u("plus", plus, layout, dtype, chunks);
  const Operand v("minus", central ? minus : grads, layout, dtype, chunks);
  const Scalar w = call.scalar("weight", weight, chunks);
  const Scalar c = call.scalar("coefficient", coefficient);
  const Scalar s = call.scalar("squared_norm", squared_norm, chunks);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using G = typename decltype(gt)::type;
    using A = typename decltype(at)::type;
    if (central) {
      call.for_each(call.sizes(layout), AccumulatePenalty<G, A, 2>{w, c, s, radius},
                    {&a.pointers(), &g.pointers(), &u.pointers(), &v.pointers()}, chunks.count);
    } else {
      call.for_each(call.sizes(layout), AccumulatePenalty<G, A, 1>{w, c, s, radius},
                    {&a.pointers(), &g.pointers(), &u.pointers()}, chunks.count);
    }
  });
  a.write_back();
}

}  // namespace
}  // namespace fbopt::cuda

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, FBOPT_CUDA_KEY, m) {
  m.impl("pack_", TORCH_BOX(&fbopt::cuda::pack_op));
  m.impl("squared_norm", TORCH_BOX(&fbopt::cuda::squared_norm_op));
  m.impl("accumulate_", TORCH_BOX(&fbopt::cuda::accumulate_op));
  m.impl("accumulate_penalty_", TORCH_BOX(&fbopt::cuda::accumulate_penalty_op));
}
