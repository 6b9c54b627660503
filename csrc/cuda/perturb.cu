// The perturbed point of a chunk on CUDA, and the norms that scale its step. float32 words per
// parameter and chunk as on the CPU, with stacks of K: perturb_ 3 + 1/K, adaptive_norms 1 + 1/K,
// perturb_adaptive_ 2 + 1/K. Launches per table of tensors and 64 chunks: perturb_ 3 (two of them
// the norm's), perturb_adaptive_ 1; adaptive_norms 2 for any number of chunks.
#include "multi_tensor.cuh"
#include "../rules/perturb.h"

namespace fbopt::cuda {
namespace {

// A thread's elements of a block's span, by packs; zeros beyond its end. The same ones whether they
// can be loaded by packs or not.
template <class T, class A, int Packs, int Lanes>
__device__ inline void load_span(const T* x, int n, A (&to)[Packs][Lanes]) {
  const bool aligned = is_aligned(x);
#pragma unroll
  for (int j = 0; j < Packs; ++j) {
    const int i = (j * kThreads + static_cast<int>(threadIdx.x)) * Lanes;
    Pack<T, Lanes> pack{};
    if (aligned && i + Lanes <= n) {
      pack = *reinterpret_cast<const Pack<T, Lanes>*>(x + i);
    } else {
#pragma unroll
      for (int lane = 0; lane < Lanes; ++lane)
        if (i + lane < n) pack.lane[lane] = x[i + lane];
    }
#pragma unroll
    for (int lane = 0; lane < Lanes; ++lane) to[j][lane] = static_cast<A>(pack.lane[lane]);
  }
}

// Of each block's elements the sums of |g|^2 and of |T g|^2, for chunk k in rows k and chunks + k
// of `partial`, `stride` apart. The parameters stay in registers for all chunks.
template <class T, int Capacity>
__global__ void __launch_bounds__(kThreads)
    sum_adaptive(const __grid_constant__ Table<2, Capacity> table, double eta, double* partial,
                 int64_t stride, int64_t chunks) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kAccess / static_cast<int>(sizeof(T));
  constexpr int kPacks = kChunk / kThreads / kLanes;
  const Span span = span_of(table, blockIdx.x, kChunk);
  A param[kPacks][kLanes], grad[kPacks][kLanes];
  load_span(static_cast<const T*>(table.data[0][span.tensor]) + span.begin, span.length, param);
  const T* g = static_cast<const T*>(table.data[1][span.tensor]) + span.begin;
  for (int64_t k = 0; k < chunks; ++k, g += table.numel[span.tensor]) {
    load_span(g, span.length, grad);
    double plain = 0, scaled = 0;
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const double x = grad[j][lane], y = rules::scaled<double>(param[j][lane], x, eta);
        plain = rules::fma(x, x, plain);
        scaled = rules::fma(y, y, scaled);
      }
    plain = block_total<kThreads>(plain);
    __syncthreads();  // both totals, and those of the next chunk, take the same shared memory
    scaled = block_total<kThreads>(scaled);
    __syncthreads();
    if (threadIdx.x == 0) {
      partial[k * stride + blockIdx.x] = plain;
      partial[(chunks + k) * stride + blockIdx.x] = scaled;
    }
  }
}

Tensor adaptive_norms_op(const TensorList& params, const TensorList& grads, double eta) {
  FBOPT_CHECK(!params.empty(), "params must hold at least one");
  const Call call(params[0]);
  const ScalarType dtype = dtype_of(params);
  const Chunks chunks = chunks_of(params, grads, std::nullopt);
  const Layout layout(params);
  const Operand p("params", params, layout, dtype), g("grads", grads, layout, dtype, chunks);
  const Tensor sums = call.numbers(chunks, {2});
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    call.sum_blocks(call.sizes(layout), Pointers<2>{&p.pointers(), &g.pointers()}, kChunk,
                    2 * chunks.count, sums,
                    [&]<int D, int Capacity>(const Table<D, Capacity>& table, int64_t launched,
                                             double* partial, int64_t blocks) {
                      call.run(&sum_adaptive<T, Capacity>, dim3(launched), kThreads, table, eta,
                               partial, blocks, chunks.count);
                    });
  });
  return sums;
}

// What both kinds of points share: the lists are out, params, grads.
template <class T>
struct Shift {
  using Value = accumulate_t<T>;
  using Operands = std::tuple<T, const T, const T>;
  Scalar squared_norm;
  double radius;

  __device__ Value step(int chunk) const {
    return rules::perturb_step<Value>(radius, sqrt(squared_norm(chunk)));
  }
  static __device__ constexpr bool stacked(int k) { return k != 1; }
  static __device__ constexpr bool reads(int k) { return k > 0; }
  static __device__ constexpr bool writes(int k) { return k == 0; }
};

template <class T>
struct Perturb : Shift<T> {
  using Value = typename Shift<T>::Value;
  using Uniform = Value;

  __device__ Uniform uniform(int, int chunk) const { return this->step(chunk); }
  static __device__ bool idle(Uniform) { return false; }
  static __device__ void apply(Value (&x)[3], Uniform step) {
    x[0] = rules::perturb(x[1], x[2], step);
  }
};

template <class T>
struct PerturbAdaptive : Shift<T> {
  using Value = typename Shift<T>::Value;
  struct Uniform {
    Value step, eta;
  };
  double eta;

  __device__ Uniform uniform(int, int chunk) const {
    return {this->step(chunk), static_cast<Value>(eta)};
  }
  static __device__ bool idle(const Uniform&) { return false; }
  static __device__ void apply(Value (&x)[3], const Uniform& u) {
    x[0] = rules::perturb_adaptive(x[1], x[2], u.step, u.eta);
  }
};

// The lists of a call, and the flat buffer for the points.
struct Points {
  Call call;
  ScalarType dtype;
  Chunks chunks;
  Layout layout;
  Operand params, grads;
  Flat flat;
  char* data;

  Points(const Tensor& out, const TensorList& at, const TensorList& along,
         const std::optional<Meta>& squared)
      : call(out),
        dtype(out.scalar_type()),
        chunks(chunks_of(at, along, squared)),
        layout(at),
        params("params", at, layout, dtype),
        grads("grads", along, layout, dtype, chunks),
        flat(layout, chunks),
        data(static_cast<char*>(out.data_ptr())) {
    check_flat(out, flat);
  }

  template <class T, class Rule>
  void write(const Rule& rule) const {
    std::vector<void*> to;
    for (const int64_t start : flat.starts) to.push_back(reinterpret_cast<T*>(data) + start);
    call.for_each(call.sizes(layout), rule, {&to, &params.pointers(), &grads.pointers()},
                  chunks.count);
  }
};

Tensor perturb_op(const Tensor& out, const TensorList& params, const TensorList& grads,
                  double radius, std::optional<Tensor> squared) {
  check_apart({{"out", out}}, {{"params", params}, {"grads", grads}, {"squared_norm", squared}});
  const Points points(out, params, grads, squared);
  const auto& [call, dtype, chunks, layout, p, g, flat, data] = points;
  if (squared) call.scalar("squared_norm", *squared, chunks);
  Tensor sums = squared ? call.numbers(chunks) : call.squared_norm(dtype, layout, g, chunks);
  if (squared) torch::stable::copy_(sums, *squared);
  const Scalar source = call.scalar("squared_norm", sums, chunks);
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    points.write<T>(Perturb<T>{{source, radius}});
  });
  return sums;
}

void perturb_adaptive_op(const Tensor& out, const TensorList& params, const TensorList& grads,
                         double radius, double eta, const Tensor& squared) {
  check_apart({{"out", out}}, {{"params", params}, {"grads", grads}, {"squared_norm", squared}});
  const Points points(out, params, grads, squared);
  const Scalar source = points.call.scalar("squared_norm", squared, points.chunks);
  dispatch(points.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    points.write<T>(PerturbAdaptive<T>{{source, radius}, eta});
  });
}

}  // namespace
}  // namespace fbopt::cuda

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, FBOPT_CUDA_KEY, m) {
  m.impl("perturb_", TORCH_BOX(&fbopt::cuda::perturb_op));
  m.impl("adaptive_norms", TORCH_BOX(&fbopt::cuda::adaptive_norms_op));
  m.impl("perturb_adaptive_", TORCH_BOX(&fbopt::cuda::perturb_adaptive_op));
}
