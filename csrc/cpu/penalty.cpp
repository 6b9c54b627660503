// Norm, packing, and the addition of chunks' gradients on the CPU. float32 words per parameter and
// chunk, with stacks of K: squared_norm 1, accumulate_ 1 + 2/K, accumulate_penalty_ 2 + 2/K (3 +
// 2/K for central differences).
#include "passes.h"

namespace fbopt::cpu {
namespace {

// Packing saves a fixed cost per tensor in later calls.
void pack_op(const Argument& out, const TensorList& tensors) {
  check_apart({{"out", out}}, {{"tensors", tensors}});
  FBOPT_CHECK(is_contiguous(out), "out must be contiguous");
  int64_t total = 0;
  for (int64_t i = 0; i < tensors.size(); ++i) {
    FBOPT_CHECK(tensors[i].dtype == out.dtype, "tensors[", i, "] has another dtype than out");
    total += tensors[i].numel;
  }
  FBOPT_CHECK(total == out.numel, "out must have ", total, " elements, one for each of tensors");
  std::vector<std::optional<Tensor>> copies(tensors.size());
  for (int64_t i = 0; i < tensors.size(); ++i)
    if (!is_contiguous(tensors[i])) copies[i] = row_major(tensors.handle(i));
  dispatch(dtype_of(out), [&](auto t) {
    using T = typename decltype(t)::type;
    const bool streams = exceeds_cache(2 * total * static_cast<int64_t>(sizeof(T)));
    std::vector<T*> starts(tensors.size());
    T* next = static_cast<T*>(out.data);
    for (int64_t i = 0; i < tensors.size(); next += tensors[i++].numel) starts[i] = next;
    for_each_backwards(tensors, 1, [&](int64_t i, int64_t begin, int64_t end) {
      const void* data = copies[i] ? copies[i]->data_ptr() : tensors[i].data;
      const T* from = static_cast<const T*>(data);
      T* to = starts[i];
      if (!streams) {
        std::memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
        return;
      }
      tiles(begin, end, misaligned(to + begin),
            [&](int64_t e, int64_t n) { stream(to + e, from + e, n); });
      stream_fence();
    });
  });
}

Numbers squared_norm_op(const TensorList& tensors, bool stacks) {
  FBOPT_CHECK(!stacks || !tensors.empty(), "tensors must hold at least one stack");
  const ScalarType dtype = dtype_of(tensors);
  const Chunks chunks = stacks ? stacked("tensors", tensors[0]) : Chunks{};
  const Layout layout(tensors, chunks);
  const Operand x("tensors", tensors, layout, dtype, chunks);
  std::vector<double> sums;
  dispatch(dtype, [&](auto t) {
    sums = squared_norm<typename decltype(t)::type>(layout, x, chunks.count);
  });
  return {sums, chunks.shape()};
}

void accumulate_op(const TensorList& sums, const TensorList& grads, const Argument& weight) {
  check_apart({{"sums", sums}}, {{"grads", grads}, {"weight", weight}});
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Operand g("grads", grads, layout, dtype, chunks);
  const Scalar weights = scalar("weight", weight, chunks);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using G = typename decltype(gt)::type;
    using A = typename decltype(at)::type;
    for_each_backwards(layout, chunks.count, [&](int64_t i, int64_t begin, int64_t end) {
      A* sum = a.at<A>(i);
      for_each_chunk(chunks.count, begin, end, [&](int64_t k, int64_t first, int64_t last) {
        const G* grad = g.at<G>(i, k);
        const A w = static_cast<A>(weights(k));
        tiles(first, last, 0, [&](int64_t e, int64_t n) {
          Buffer<G, A> bd;
          A* __restrict x = sum + e;
          const A* __restrict d = widen<A>(grad + e, bd, n);
          for (int64_t j = 0; j < n; ++j) x[j] = rules::accumulate(x[j], d[j], w);
        });
      });
    });
  });
  a.write_back();
}

void accumulate_penalty_op(const TensorList& sums, const TensorList& grads, const TensorList& plus,
                           const TensorList& minus, const Argument& weight,
                           const Argument& coefficient, const Argument& squared_norm,
                           double radius) {
  check_apart({{"sums", sums}}, {{"grads", grads},
                                 {"plus", plus},
                                 {"minus", minus},
                                 {"weight", weight},
                                 {"coefficient", coefficient},
                                 {"squared_norm", squared_norm}});
  const ScalarType dtype = dtype_of(grads);
  const Chunks chunks = chunks_of(weight);
  const Layout layout(sums);
  Operand a("sums", sums, layout, accumulator_of(dtype));
  const Passes passes(grads, plus, minus, layout, chunks, coefficient, squared_norm, radius);
  const Scalar weights = scalar("weight", weight, chunks);
  dispatch_sums(sums, dtype, [&](auto gt, auto at) {
    using G = typename decltype(gt)::type;
    using A = typename decltype(at)::type;
    for_each_backwards(layout, chunks.count, [&](int64_t i, int64_t begin, int64_t end) {
      A* sum = a.at<A>(i);
      for_each_chunk(chunks.count, begin, end, [&](int64_t k, int64_t first, int64_t last) {
        const G *grad = passes.grads.at<G>(i, k), *up = passes.plus.at<G>(i, k),
                *down = passes.minus.at<G>(i, k);
        const A w = static_cast<A>(weights(k)), f = static_cast<A>(passes.factors[k]);
        tiles(first, last, 0, [&](int64_t e, int64_t n) {
          Buffer<G, A> bd, bp, bm;
          A* __restrict x = sum + e;
          const A* d = widen<A>(grad + e, bd, n);
          const A* p = widen<A>(up + e, bp, n);
          const A* m = widen<A>(down + e, bm, n);
          for (int64_t j = 0; j < n; ++j)
            x[j] = rules::accumulate_penalty(x[j], d[j], p[j], m[j], f, w);
        });
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
  m.impl("accumulate_", TORCH_BOX(&fbopt::cpu::accumulate_op));
  m.impl("accumulate_penalty_", TORCH_BOX(&fbopt::cpu::accumulate_penalty_op));
}

static const fbopt::direct::Ops direct_ops{
    {"pack_", fbopt::direct::method<&fbopt::cpu::pack_op, 0b1>},
    {"squared_norm", fbopt::direct::method<&fbopt::cpu::squared_norm_op>},
    {"accumulate_", fbopt::direct::method<&fbopt::cpu::accumulate_op, 0b1>},
    {"accumulate_penalty_", fbopt::direct::method<&fbopt::cpu::accumulate_penalty_op, 0b1>},
};
