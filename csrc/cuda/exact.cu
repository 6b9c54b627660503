// Sums over chunks in fixed point on CUDA. float32 words per parameter and chunk as on the CPU,
// with stacks of K: accumulate_exact_ 1 + 4/K, accumulate_exact_penalty_ 2 + 4/K (3 + 4/K for
// central differences); exact_mean_ 4 per parameter. One launch per table of tensors and 64 chunks.
#include "multi_tensor.cuh"
#include "../rules/accumulate.h"
#include "../rules/exact.h"

namespace fbopt::cuda {
namespace {

// Arguments besides the lists: scalars, and one number for each tensor.
struct Exact {
  Scalar weight, coefficient, squared_norm;
  double radius;
  const double* scales;
  double* maxima;
};

// NaN is larger than infinity is larger than the rest, none of them negative.
struct Larger {
  __device__ double operator()(double a, double b) const {
    return __double_as_longlong(a) < __double_as_longlong(b) ? b : a;
  }
};

__device__ inline double without_sign(double x) {
  return __longlong_as_double(__double_as_longlong(x) & INT64_MAX);
}

// The lists of a call: sums, carries, grads; with a penalty plus, for central differences minus.
template <int Steps>
constexpr int kLists = 3 + Steps;

// What all elements of a tensor share in one chunk.
template <class A>
struct Factors {
  double weight, scale;
  A difference;
};

// A block's part of each list.
template <class G, class A, int Steps>
struct Share {
  const Factors<A>* factors;
  int chunks;
  int64_t numel;
  int64_t* sums;
  int32_t* carries;
  const G *grads, *plus, *minus;

  template <class Table>
  __device__ Share(const Table& table, const Span& span, const Group& group,
                   const Factors<A>* factors)
      : factors(factors), chunks(group.count), numel(table.numel[span.tensor]) {
    const int64_t first = group.first * numel + span.begin;
    sums = static_cast<int64_t*>(table.data[0][span.tensor]) + span.begin;
    carries = static_cast<int32_t*>(table.data[1][span.tensor]) + span.begin;
    grads = static_cast<const G*>(table.data[2][span.tensor]) + first;
    plus = minus = grads;
    if constexpr (Steps > 0) plus = static_cast<const G*>(table.data[3][span.tensor]) + first;
    if constexpr (Steps > 1) minus = static_cast<const G*>(table.data[4][span.tensor]) + first;
  }

  __device__ bool aligned() const {
    const bool slices = chunks == 1 || numel * static_cast<int64_t>(sizeof(G)) % kAccess == 0;
    return slices && is_aligned(sums) && is_aligned(grads) && is_aligned(plus) && is_aligned(minus);
  }

  // Adds elements from `first` on, N at a time; returns the first one left over. `most` becomes the
  // largest magnitude of a weighted one.
  template <int N>
  __device__ int sweep(int first, int n, double& most) const {
    const int packs = (n - first) / N;
    for (int j = threadIdx.x; j < packs; j += kThreads) {
      const int i = first + j * N;
      auto sum = *reinterpret_cast<const Pack<int64_t, N>*>(sums + i);
      int64_t at = i;
      for (int k = 0; k < chunks; ++k, at += numel) {
        const double largest = add(sum, carries + i, at, factors[k]);
        most = Larger{}(most, without_sign(largest * factors[k].weight));
      }
      *reinterpret_cast<Pack<int64_t, N>*>(sums + i) = sum;
    }
    return first + packs * N;
  }

  // Adds elements from i on; returns the largest magnitude.
  template <int N>
  __device__ double add(Pack<int64_t, N>& sum, int32_t* carry, int64_t i,
                        const Factors<A>& f) const {
    const auto g = *reinterpret_cast<const Pack<G, N>*>(grads + i);
    Pack<G, N> up = g, down = g;
    if constexpr (Steps > 0) up = *reinterpret_cast<const Pack<G, N>*>(plus + i);
    if constexpr (Steps > 1) down = *reinterpret_cast<const Pack<G, N>*>(minus + i);
    double largest = 0;
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      A v = static_cast<A>(g.lane[lane]);
      if constexpr (Steps > 0)
        v = rules::penalised(v, static_cast<A>(up.lane[lane]), static_cast<A>(down.lane[lane]),
                             f.difference);
      largest = Larger{}(largest, without_sign(static_cast<double>(v)));
      add_one(sum.lane[lane], carry + lane, v, f.scale);
    }
    return largest;
  }

  // Reads a carry only where the sum wraps or v is too large for it.
  static __device__ void add_one(int64_t& sum, int32_t* carry, A v, double scale) {
    if (rules::magnitude(static_cast<double>(v) * scale) < rules::kFits) {
      const int64_t q = rules::quantised(v, scale);
      sum = rules::wrapping_add(sum, q);
      if (const int32_t wrap = rules::wrap(sum, q)) rules::add_carry(*carry, wrap);
    } else {
      rules::add_exact(sum, *carry, v, scale);
    }
  }
};

template <class G, class A, int Steps, int Capacity>
__global__ void __launch_bounds__(kThreads, 4)
    add_exact(const __grid_constant__ Table<kLists<Steps>, Capacity> table,
              const __grid_constant__ Exact call, const __grid_constant__ Group group) {
  __shared__ Factors<A> factors[kMaxChunks];
  const Span span = span_of(table, gridDim.x - 1 - blockIdx.x, kChunk);
  const int tensor = table.first + span.tensor;
  if (static_cast<int>(threadIdx.x) < group.count) {
    const int k = group.first + threadIdx.x;
    Factors<A>& own = factors[threadIdx.x];
    own.weight = call.weight(k);
    own.scale = own.weight * call.scales[tensor];
    if constexpr (Steps > 0)
      own.difference = static_cast<A>(rules::penalty_factor(
          call.coefficient(), sqrt(call.squared_norm(k)), call.radius, Steps));
  }
  __syncthreads();
  const Share<G, A, Steps> share(table, span, group, factors);
  double most = 0;
  constexpr int kLanes = kAccess / static_cast<int>(sizeof(G));
  const int done = share.aligned() ? share.template sweep<kLanes>(0, span.length, most) : 0;
  share.template sweep<1>(done, span.length, most);
  most = block_total<kThreads>(most, Larger{});
  // Integers: the largest is the same in any order.
  if (threadIdx.x == 0)
    atomicMax(reinterpret_cast<unsigned long long*>(call.maxima + tensor),
              static_cast<unsigned long long>(__double_as_longlong(most)));
}

// The lists that hold the sums, and the launcher that works on them.
struct Sums {
  Call call;
  Layout layout;
  Operand sums, carries;
  double *maxima, *scales;

  Sums(const TensorList& sum_list, const TensorList& carry_list, const Tensor& max,
       const Tensor& scale, const Tensor& weight)
      : call(sum_list.empty() ? Meta(weight) : sum_list[0]),
        layout(sum_list),
        sums("sums", sum_list, layout, ScalarType::Long),
        carries("carries", carry_list, layout, ScalarType::Int),
        maxima(per_tensor("maxima", max, layout)),
        scales(per_tensor("scales", scale, layout)) {}

  template <class G, class A, int Steps, class... Others>
  void add(const Exact& rule, int64_t chunks, const Others&... others) {
    call.tables(
        call.sizes(layout),
        Pointers<kLists<Steps>>{&sums.pointers(), &carries.pointers(), &others.pointers()...},
        kChunk, [&]<int D, int Capacity>(const Table<D, Capacity>& table, int64_t, int64_t blocks) {
          Call::groups(chunks, [&](const Group& group) {
            call.run(&add_exact<G, A, Steps, Capacity>, dim3(blocks), kThreads, table, rule, group);
          });
        });
    sums.write_back();
    carries.write_back();
  }
};

void accumulate_exact_op(const TensorList& sums, const TensorList& carries, const Tensor& maxima,
                         const TensorList& grads, const Tensor& weight, const Tensor& scales) {
  check_apart({{"sums", sums}, {"carries", carries}, {"maxima", maxima}},
              {{"grads", grads}, {"weight", weight}, {"scales", scales}});
  Sums target(sums, carries, maxima, scales, weight);
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  const Operand g("grads", grads, target.layout, dtype, chunks);
  Exact rule{};
  rule.weight = target.call.scalar("weight", weight, chunks);
  rule.scales = target.scales;
  rule.maxima = target.maxima;
  dispatch(dtype, [&](auto t) {
    using G = typename decltype(t)::type;
    target.add<G, accumulate_t<G>, 0>(rule, chunks.count, g);
  });
}

void accumulate_exact_penalty_op(const TensorList& sums, const TensorList& carries,
                                 const Tensor& maxima, const TensorList& grads,
                                 const TensorList& plus, const TensorList& minus,
                                 const Tensor& weight, const Tensor& scales,
                                 const Tensor& coefficient, const Tensor& squared_norm,
                                 double radius) {
  check_apart({{"sums", sums}, {"carries", carries}, {"maxima", maxima}},
              {{"grads", grads},
               {"plus", plus},
               {"minus", minus},
               {"weight", weight},
               {"scales", scales},
               {"coefficient", coefficient},
               {"squared_norm", squared_norm}});
  Sums target(sums, carries, maxima, scales, weight);
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  const bool central = !minus.empty();
  const Layout& layout = target.layout;
  const Operand g("grads", grads, layout, dtype, chunks), u("plus", plus, layout, dtype, chunks);
  const Operand v("minus", central ? minus : grads, layout, dtype, chunks);
  const Exact rule{
      .weight = target.call.scalar("weight", weight, chunks),
      .coefficient = target.call.scalar("coefficient", coefficient),
      .squared_norm = target.call.scalar("squared_norm", squared_norm, chunks),
      .radius = radius,
      .scales = target.scales,
      .maxima = target.maxima,
  };
  dispatch(dtype, [&](auto t) {
    using G = typename decltype(t)::type;
    using A = accumulate_t<G>;
    central ? target.add<G, A, 2>(rule, chunks.count, g, u, v)
            : target.add<G, A, 1>(rule, chunks.count, g, u);
  });
}

template <class A>
struct Mean {
  using Operands = std::tuple<A, const int64_t, const int32_t>;  // means, sums, carries
  using Value = double;
  struct Uniform {
    double unit, divisor;
  };
  Scalar divisor;
  const double *maxima, *scales;

  __device__ Uniform uniform(int tensor, int) const {
    return {rules::sound_unit(scales[tensor], maxima[tensor]), divisor()};
  }
  static __device__ bool idle(const Uniform&) { return false; }
  static __device__ constexpr bool stacked(int) { return false; }
  static __device__ constexpr bool reads(int k) { return k > 0; }
  static __device__ constexpr bool writes(int k) { return k == 0; }
  static __device__ void apply(Value (&x)[3], const Uniform& u) {
    x[0] = rules::exact_mean(x[1], x[2], u.unit, u.divisor);
  }
};

void exact_mean_op(const TensorList& means, const TensorList& sums, const TensorList& carries,
                   const Tensor& maxima, const Tensor& scales, const Tensor& divisor) {
  check_apart({{"means", means}}, {{"sums", sums},
                                   {"carries", carries},
                                   {"maxima", maxima},
                                   {"scales", scales},
                                   {"divisor", divisor}});
  Sums source(sums, carries, maxima, scales, divisor);
  const ScalarType dtype = dtype_of(means);
  Operand out("means", means, source.layout, dtype);
  const Scalar total = source.call.scalar("divisor", divisor);
  const auto launch = [&](auto rule) {
    source.call.for_each(source.call.sizes(source.layout), rule,
                         {&out.pointers(), &source.sums.pointers(), &source.carries.pointers()});
  };
  FBOPT_CHECK(dtype == accumulator_of(dtype), "means must be float32 or float64");
  dtype == ScalarType::Double ? launch(Mean<double>{total, source.maxima, source.scales})
                              : launch(Mean<float>{total, source.maxima, source.scales});
  out.write_back();
}

}  // namespace
}  // namespace fbopt::cuda

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, FBOPT_CUDA_KEY, m) {
  m.impl("accumulate_exact_", TORCH_BOX(&fbopt::cuda::accumulate_exact_op));
  m.impl("accumulate_exact_penalty_", TORCH_BOX(&fbopt::cuda::accumulate_exact_penalty_op));
  m.impl("exact_mean_", TORCH_BOX(&fbopt::cuda::exact_mean_op));
}
