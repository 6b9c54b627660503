// Sums over chunks in fixed point on the CPU. float32 words per parameter and chunk, with stacks of
// K: accumulate_exact_ 1 + 4/K, accumulate_exact_penalty_ 2 + 4/K (3 + 4/K for central
// differences); exact_mean_ 4 per parameter. Carries are read and written only where a sum wraps.
#include "../rules/exact.h"

#include "passes.h"

namespace fbopt::cpu {
namespace {

// A magnitude as an integer: NaN is then larger than infinity, and that than the rest.
template <class A>
using Bits = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
template <class A>
Bits<A> magnitude(A v) {
  return std::bit_cast<Bits<A>>(v) & std::numeric_limits<Bits<A>>::max();
}

// maximum <- max(maximum, |value|), in the order of magnitudes. Threads may share a tensor.
void raise_to(double* maximum, double value) {
  value = std::bit_cast<double>(magnitude(value));
  double now = 0;
  __atomic_load(maximum, &now, __ATOMIC_RELAXED);
  while (
      magnitude(now) < magnitude(value) &&
      !__atomic_compare_exchange(maximum, &now, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Adds n contributions scale * v(j), and returns the largest |v|. Carries are read only if some sum
// has wrapped or some contribution is too large; the latter are subtracted again and added with
// their carries.
template <class A, class Values>
A add_tile(int64_t* __restrict sum, int32_t* __restrict carry, int64_t n, double scale,
           const Values& v) {
  Bits<A> most = 0;
  int64_t wraps = 0;
  for (int64_t j = 0; j < n; ++j) {
    const A value = v(j);
    const Bits<A> bits = magnitude(value);
    most = bits > most ? bits : most;
    const int64_t q = rules::quantised(value, scale);
    const int64_t result = rules::wrapping_add(sum[j], q);
    wraps |= rules::wrapped(sum[j], q, result);
    sum[j] = result;
  }
  if (static_cast<double>(std::bit_cast<A>(most)) * scale < rules::kFits) {
    if (wraps < 0)
      for (int64_t j = 0; j < n; ++j)
        rules::add_carry(carry[j], rules::wrap(sum[j], rules::quantised(v(j), scale)));
    return std::bit_cast<A>(most);
  }
  for (int64_t j = 0; j < n; ++j) {
    const A value = v(j);
    int64_t before = rules::wrapping_subtract(sum[j], rules::quantised(value, scale));
    rules::add_exact(before, carry[j], value, scale);
    sum[j] = before;
  }
  return std::bit_cast<A>(most);
}

// The lists that hold the sums, and each tensor's own numbers.
struct Sums {
  Layout layout;
  Operand sums, carries;
  double *maxima, *scales;

  Sums(const TensorList& sum_list, const TensorList& carry_list, const Meta& max, const Meta& scale)
      : layout(sum_list),
        sums("sums", sum_list, layout, ScalarType::Long),
        carries("carries", carry_list, layout, ScalarType::Int),
        maxima(per_tensor("maxima", max, layout)),
        scales(per_tensor("scales", scale, layout)) {}

  // Adds weights(k) * v for every chunk k; tile(i, k, e, n, add) calls add(v) for n elements v(j)
  // of tensor i, from element e on.
  template <class A, class Tile>
  void add(const Scalar& weights, int64_t chunks, const Tile& tile) {
    for_each_backwards(layout, chunks, [&](int64_t i, int64_t begin, int64_t end) {
      int64_t* sum = sums.at<int64_t>(i);
      int32_t* carry = carries.at<int32_t>(i);
      Bits<double> most = 0;
      for_each_chunk(chunks, begin, end, [&](int64_t k, int64_t first, int64_t last) {
        const double weight = weights(k), scale = weight * scales[i];
        tiles(first, last, 0, [&](int64_t e, int64_t n) {
          tile(i, k, e, n, [&](const auto& v) {
            const A largest = add_tile<A>(sum + e, carry + e, n, scale, v);
            most = std::max(most, magnitude(static_cast<double>(largest) * weight));
          });
        });
      });
      raise_to(maxima + i, std::bit_cast<double>(most));
    });
    sums.write_back();
    carries.write_back();
  }
};

void accumulate_exact_op(const TensorList& sums, const TensorList& carries, const Argument& maxima,
                         const TensorList& grads, const Argument& weight, const Argument& scales) {
  check_apart({{"sums", sums}, {"carries", carries}, {"maxima", maxima}},
              {{"grads", grads}, {"weight", weight}, {"scales", scales}});
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  Sums target(sums, carries, maxima, scales);
  const Operand g("grads", grads, target.layout, dtype, chunks);
  const Scalar weights = scalar("weight", weight, chunks);
  dispatch(dtype, [&](auto t) {
    using G = typename decltype(t)::type;
    using A = accumulate_t<G>;
    const auto tile = [&](int64_t i, int64_t k, int64_t e, int64_t n, const auto& add) {
      Buffer<G, A> bd;
      const A* d = widen<A>(g.at<const G>(i, k) + e, bd, n);
      add([=](int64_t j) { return d[j]; });
    };
    target.add<A>(weights, chunks.count, tile);
  });
}

void accumulate_exact_penalty_op(const TensorList& sums, const TensorList& carries,
                                 const Argument& maxima, const TensorList& grads,
                                 const TensorList& plus, const TensorList& minus,
                                 const Argument& weight, const Argument& scales,
                                 const Argument& coefficient, const Argument& squared_norm,
                                 double radius) {
  check_apart({{"sums", sums}, {"carries", carries}, {"maxima", maxima}},
              {{"grads", grads},
               {"plus", plus},
               {"minus", minus},
               {"weight", weight},
               {"scales", scales},
               {"coefficient", coefficient},
               {"squared_norm", squared_norm}});
  const Chunks chunks = chunks_of(weight);
  Sums target(sums, carries, maxima, scales);
  const Passes passes(grads, plus, minus, target.layout, chunks, coefficient, squared_norm, radius);
  const Scalar weights = scalar("weight", weight, chunks);
  dispatch(dtype_of(grads), [&](auto t) {
    using G = typename decltype(t)::type;
    using A = accumulate_t<G>;
    const auto tile = [&](int64_t i, int64_t k, int64_t e, int64_t n, const auto& add) {
      Buffer<G, A> bd, bp, bm;
      const A* d = widen<A>(passes.grads.at<const G>(i, k) + e, bd, n);
      const A* p = widen<A>(passes.plus.at<const G>(i, k) + e, bp, n);
      const A* m = widen<A>(passes.minus.at<const G>(i, k) + e, bm, n);
      const A f = static_cast<A>(passes.factors[k]);
      add([=](int64_t j) { return rules::penalised(d[j], p[j], m[j], f); });
    };
    target.add<A>(weights, chunks.count, tile);
  });
}

void exact_mean_op(const TensorList& means, const TensorList& sums, const TensorList& carries,
                   const Argument& maxima, const Argument& scales, const Argument& divisor) {
  check_apart({{"means", means}}, {{"sums", sums},
                                   {"carries", carries},
                                   {"maxima", maxima},
                                   {"scales", scales},
                                   {"divisor", divisor}});
  const ScalarType dtype = dtype_of(means);
  Sums source(sums, carries, maxima, scales);
  Operand out("means", means, source.layout, dtype);
  FBOPT_CHECK(dtype == accumulator_of(dtype), "means must be float32 or float64");
  const double total = scalar("divisor", divisor)();
  dispatch(dtype, [&](auto t) {
    using A = typename decltype(t)::type;
    const bool streams = exceeds_cache(source.layout.total() * (12 + int64_t{sizeof(A)}));
    for_each_backwards(source.layout, 1, [&](int64_t i, int64_t begin, int64_t end) {
      const int64_t* sum = source.sums.at<int64_t>(i);
      const int32_t* carry = source.carries.at<int32_t>(i);
      A* mean = out.at<A>(i);
      const double unit = rules::sound_unit(source.scales[i], source.maxima[i]);
      tiles(begin, end, streams ? misaligned(mean + begin) : 0, [&](int64_t e, int64_t n) {
        alignas(64) A means[kTile];
        for (int64_t j = 0; j < n; ++j)
          means[j] = static_cast<A>(rules::exact_mean(
              static_cast<double>(sum[e + j]), static_cast<double>(carry[e + j]), unit, total));
        streams ? stream(mean + e, means, n) : narrow_loop(mean + e, means, n);
      });
      if (streams) stream_fence();
    });
  });
  out.write_back();
}

}  // namespace
}  // namespace fbopt::cpu

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, CPU, m) {
  m.impl("accumulate_exact_", TORCH_BOX(&fbopt::cpu::accumulate_exact_op));
  m.impl("accumulate_exact_penalty_", TORCH_BOX(&fbopt::cpu::accumulate_exact_penalty_op));
  m.impl("exact_mean_", TORCH_BOX(&fbopt::cpu::exact_mean_op));
}

static const fbopt::direct::Ops direct_ops{
    {"accumulate_exact_", fbopt::direct::method<&fbopt::cpu::accumulate_exact_op, 0b111>},
    {"accumulate_exact_penalty_",
     fbopt::direct::method<&fbopt::cpu::accumulate_exact_penalty_op, 0b111>},
    {"exact_mean_", fbopt::direct::method<&fbopt::cpu::exact_mean_op, 0b1>},
};
