// The perturbed point of a chunk on the CPU, and the norms that scale its step. float32 words per
// parameter and chunk, with stacks of K: perturb_ 3 + 1/K (one read for the norm, one and the
// parameters' for the result, a write); adaptive_norms 1 + 1/K for both norms, perturb_adaptive_
// 2 + 1/K.
#include "../rules/perturb.h"
#include "loops.h"

namespace fbopt::cpu {
namespace {

// |g|^2 and |T g|^2: 16 interleaved sums each, over two halves of the elements at once, in the
// order of SquareSum.
template <class A>
class AdaptiveSums {
  static constexpr int64_t kStreams = 2, kPerStream = 2, kStep = 4 * kPerStream;
  static constexpr int64_t kVectors = kStreams * kPerStream;

 public:
  explicit AdaptiveSums(double eta) : eta_(eta) {}

  void add(const A* p, const A* g, int64_t n) {
    const int64_t half = n / (kStreams * kStep) * kStep;
    const Wide eta = {eta_, eta_, eta_, eta_};
    Wide plain[kVectors], scaled[kVectors];
    for (int v = 0; v < kVectors; ++v) plain[v] = plain_[v], scaled[v] = scaled_[v];
    for (int64_t j = 0; j < half; j += kStep)
      for (int s = 0; s < kStreams; ++s)
        for (int v = 0; v < kPerStream; ++v) {
          const int64_t e = s * half + j + 4 * v, to = s * kPerStream + v;
          const Wide grad = load_wide(g + e);
          plain[to] = add_product<A>(plain[to], grad, grad);
          const Wide t = rules::scaled(load_wide(p + e), grad, eta);
          scaled[to] = add_product<double>(scaled[to], t, t);
        }
    for (int v = 0; v < kVectors; ++v) plain_[v] = plain[v], scaled_[v] = scaled[v];
    for (int64_t j = kStreams * half; j < n; ++j) {
      const double grad = g[j], moved = rules::scaled<double>(p[j], grad, eta_);
      plain_[j / 4 % kVectors][j % 4] += grad * grad;
      scaled_[j / 4 % kVectors][j % 4] += moved * moved;
    }
  }
  std::array<double, 2> totals() const {
    return {total((plain_[0] + plain_[1]) + (plain_[2] + plain_[3])),
            total((scaled_[0] + scaled_[1]) + (scaled_[2] + scaled_[3]))};
  }

 private:
  double eta_;
  Wide plain_[kVectors] = {}, scaled_[kVectors] = {};
};

template <class T>
std::array<double, 2> adaptive_sums(const T* p, const T* g, int64_t n, double eta) {
  using A = accumulate_t<T>;
  AdaptiveSums<A> sums(eta);
  if constexpr (kInPlace<T, A>) {
    sums.add(p, g, n);
  } else {
    tiles(0, n, 0, [&](int64_t i, int64_t count) {
      Buffer<T, A> bp, bg;
      sums.add(widen<A>(p + i, bp, count), widen<A>(g + i, bg, count), count);
    });
  }
  return sums.totals();
}

Numbers adaptive_norms_op(const TensorList& params, const TensorList& grads, double eta) {
  const ScalarType dtype = dtype_of(params);
  const Chunks chunks = chunks_of(params, grads, std::nullopt);
  const Layout layout(params);
  const Operand p("params", params, layout, dtype), g("grads", grads, layout, dtype, chunks);
  std::vector<double> sums;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    sums = sum_blocks<2>(layout, chunks.count, [&](int64_t i, int64_t k, int64_t begin, int64_t n) {
      return adaptive_sums(p.at<const T>(i) + begin, g.at<const T>(i, k) + begin, n, eta);
    });
  });
  return {sums, chunks.shape({2})};
}

// The lists of a call, and the flat buffer for the points.
struct Points {
  ScalarType dtype;
  Chunks chunks;
  Layout layout;
  Operand params, grads;
  Flat flat;
  void* data;

  Points(const Argument& out, const TensorList& at, const TensorList& along,
         const std::optional<Meta>& squared)
      : dtype(dtype_of(out)),
        chunks(chunks_of(at, along, squared)),
        layout(at),
        params("params", at, layout, dtype),
        grads("grads", along, layout, dtype, chunks),
        flat(layout, chunks),
        data(out.data) {
    check_flat(out, flat);
  }

  // The squared norm of each chunk, as it was given.
  std::vector<double> given(const Argument& squared) const {
    const Scalar each = scalar("squared_norm", squared, chunks);
    std::vector<double> values(chunks.count);
    for (int64_t k = 0; k < chunks.count; ++k) values[k] = each(k);
    return values;
  }

  // out <- move(p, g, s), s = radius / sqrt(square) of each chunk.
  template <class T, class Move>
  void write(double radius, const std::vector<double>& squares, const Move& move) const {
    using A = accumulate_t<T>;
    const bool streams =
        exceeds_cache((1 + 2 * chunks.count) * layout.total() * static_cast<int64_t>(sizeof(T)));
    for_each_backwards(layout, chunks.count, [&](int64_t i, int64_t begin, int64_t end) {
      const T* param = params.at<T>(i);
      for_each_chunk(chunks.count, begin, end, [&](int64_t k, int64_t first, int64_t last) {
        const T* grad = grads.at<T>(i, k);
        T* to = static_cast<T*>(data) + flat.starts[i] + k * layout[i].numel;
        const A s = rules::perturb_step<A>(radius, std::sqrt(squares[k]));
        tiles(first, last, streams ? misaligned(to + first) : 0, [&](int64_t e, int64_t n) {
          Buffer<T, A> bx, bd;
          alignas(64) A moved[kTile];
          const A* __restrict x = widen<A>(param + e, bx, n);
          const A* __restrict d = widen<A>(grad + e, bd, n);
          for (int64_t j = 0; j < n; ++j) moved[j] = move(x[j], d[j], s);
          streams ? stream(to + e, moved, n) : narrow_loop(to + e, moved, n);
        });
      });
      if (streams) stream_fence();
    });
  }
};

Numbers perturb_op(const Argument& out, const TensorList& params, const TensorList& grads,
                   double radius, std::optional<Argument> squared) {
  check_apart({{"out", out}}, {{"params", params}, {"grads", grads}, {"squared_norm", squared}});
  const Points points(out, params, grads, squared);
  std::vector<double> squares;
  if (squared) squares = points.given(*squared);
  dispatch(points.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (!squared) squares = squared_norm<T>(points.layout, points.grads, points.chunks.count);
    points.write<T>(radius, squares,
                    [](auto x, auto d, auto s) { return rules::perturb(x, d, s); });
  });
  return {squares, points.chunks.shape()};
}

void perturb_adaptive_op(const Argument& out, const TensorList& params, const TensorList& grads,
                         double radius, double eta, const Argument& squared) {
  check_apart({{"out", out}}, {{"params", params}, {"grads", grads}, {"squared_norm", squared}});
  const Points points(out, params, grads, squared);
  const std::vector<double> squares = points.given(squared);
  dispatch(points.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    points.write<T>(radius, squares,
                    [e = static_cast<accumulate_t<T>>(eta)](auto x, auto d, auto s) {
                      return rules::perturb_adaptive(x, d, s, e);
                    });
  });
}

}  // namespace
}  // namespace fbopt::cpu

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, CPU, m) {
  m.impl("perturb_", TORCH_BOX(&fbopt::cpu::perturb_op));
  m.impl("adaptive_norms", TORCH_BOX(&fbopt::cpu::adaptive_norms_op));
  m.impl("perturb_adaptive_", TORCH_BOX(&fbopt::cpu::perturb_adaptive_op));
}

static const fbopt::direct::Ops direct_ops{
    {"perturb_", fbopt::direct::method<&fbopt::cpu::perturb_op, 0b1>},
    {"adaptive_norms", fbopt::direct::method<&fbopt::cpu::adaptive_norms_op>},
    {"perturb_adaptive_", fbopt::direct::method<&fbopt::cpu::perturb_adaptive_op, 0b1>},
};
