// Threads over tensor lists: an elementwise loop, and sums whose order depends on the shapes alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../direct.h"
#include "../rules/math.h"
#include "tile.h"

namespace fbopt::cpu {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;
// Threads split the elements at multiples of this, so that none begins inside a cache line.
constexpr int64_t kUnit = 1024;
// Elements per partial sum.
constexpr int64_t kBlock = 32768;
// Elements per run of the elementwise loop, which takes the runs backwards.
constexpr int64_t kRun = 131072;
// Elements that all chunks go through one after the other: what they share stays in the cache.
constexpr int64_t kShared = 2048;

// Whether the caches are unlikely to keep that much until it is read. A constant, since the sizes
// that machines report range from one core's share to the sum over all sockets.
inline bool exceeds_cache(int64_t bytes) { return bytes > int64_t{32} << 20; }

inline Scalar scalar(const char* name, const Meta& t, const Chunks& chunks = {}) {
  FBOPT_CHECK(t.device.type == aoti_torch_device_type_cpu(), name, " must be on the CPU");
  return scalar_of(name, t, chunks);
}

// body(i, begin, end): elements begin ... end of tensor i, each element once, from the last run
// to the first: after a forward sum over the same memory the caches still hold its end. An element
// is work for so many chunks; little work is done here and now.
template <class List, class Body>
void for_each_backwards(const List& list, int64_t chunks, const Body& body) {
  int64_t total = 0;
  for (int64_t i = 0; i < list.size(); ++i) total += list[i].numel;
  if (total * chunks <= kGrain) {
    for (int64_t i = list.size(); i-- > 0;)
      if (list[i].numel > 0) body(i, 0, list[i].numel);
    return;
  }
  std::vector<int64_t> ends(list.size());
  for (int64_t i = 0, end = 0; i < list.size(); ++i) ends[i] = end += list[i].numel;
  torch::stable::parallel_for(
      0, (total + kUnit - 1) / kUnit, std::max<int64_t>(1, kGrain / kUnit / chunks),
      [&](int64_t b, int64_t e) {
        int64_t end = std::min(e * kUnit, total);
        int64_t i = std::lower_bound(ends.begin(), ends.end(), end) - ends.begin();
        while (end > b * kUnit) {
          const int64_t start = ends[i] - list[i].numel;
          const int64_t begin = std::max({start, b * kUnit, (end - 1) / kRun * kRun});
          if (begin < end) body(i, begin - start, end - start);
          end = begin;
          if (end == start) --i;
        }
      });
}

// body(k, first, last): elements first ... last of chunk k, all chunks of a block in their order.
template <class Body>
void for_each_chunk(int64_t chunks, int64_t begin, int64_t end, const Body& body) {
  const int64_t block = chunks == 1 ? end - begin : kShared;
  for (int64_t first = begin; first < end; first += block)
    for (int64_t k = 0; k < chunks; ++k) body(k, first, std::min(first + block, end));
}

// Four doubles. Vector types, since the compiler would keep an array of sums in memory.
using Wide = double __attribute__((vector_size(32)));

inline Wide load_wide(const double* x) {
  Wide wide;
  std::memcpy(&wide, x, sizeof wide);
  return wide;
}
inline Wide load_wide(const float* x) {
#if defined(__AVX__)  // gcc converts vectors two elements at a time
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  return Wide{x[0], x[1], x[2], x[3]};
#endif
}

// sum + a b of values of the type A.
template <class A>
Wide add_product(Wide sum, Wide a, Wide b) {
#if defined(__FMA__)  // the product of floats is exact in double: one rounding, fused or not
  if constexpr (std::is_same_v<A, float>) return _mm256_fmadd_pd(a, b, sum);
#endif
  return sum + a * b;
}

// a b + c with one rounding.
inline Wide multiply_add(Wide a, Wide b, Wide c) {
#if defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  for (int lane = 0; lane < 4; ++lane) c[lane] = rules::fma(a[lane], b[lane], c[lane]);
  return c;
#endif
}

inline double total(Wide s) { return (s[0] + s[1]) + (s[2] + s[3]); }

// 32 interleaved sums over four quarters of the elements at once, combined pairwise. One stream of
// reads does not saturate the memory bandwidth, four do. An element's sum depends on its index
// alone, so every vector width gives the same bits.
template <class A>
class SquareSum {
  static constexpr int64_t kStreams = 4, kPerStream = 2, kStep = 4 * kPerStream;
  static constexpr int64_t kVectors = kStreams * kPerStream;

 public:
  void add(const A* x, int64_t n) {
    const int64_t quarter = n / (kStreams * kStep) * kStep;
    Wide sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = sums_[v];
    for (int64_t j = 0; j < quarter; j += kStep)
      for (int s = 0; s < kStreams; ++s)
        for (int v = 0; v < kPerStream; ++v) {
          Wide& sum = sums[s * kPerStream + v];
          const Wide wide = load_wide(x + s * quarter + j + 4 * v);
          sum = add_product<A>(sum, wide, wide);
        }
    for (int v = 0; v < kVectors; ++v) sums_[v] = sums[v];
    for (int64_t j = kStreams * quarter; j < n; ++j) {
      const double value = static_cast<double>(x[j]);
      sums_[j / 4 % kVectors][j % 4] += value * value;
    }
  }
  double total() const {
    return cpu::total(((sums_[0] + sums_[1]) + (sums_[2] + sums_[3])) +
                      ((sums_[4] + sums_[5]) + (sums_[6] + sums_[7])));
  }

 private:
  Wide sums_[kVectors] = {};
};

template <class T>
double sum_of_squares(const T* p, int64_t n) {
  using A = accumulate_t<T>;
  SquareSum<A> sum;
  if constexpr (kInPlace<T, A>) {
    sum.add(p, n);
  } else {
    tiles(0, n, 0, [&](int64_t i, int64_t count) {
      Buffer<T, A> buffer;
      sum.add(widen<A>(p + i, buffer, count), count);
    });
  }
  return sum.total();
}

// For each of `Count` kinds and each chunk a sum over all elements: one partial sum per block,
// added up in the blocks' order. block(i, k, begin, n) returns those of n elements of tensor i in
// chunk k. The chunks of a block are worked on together, as in for_each_backwards().
template <size_t Count, class Block>
std::vector<double> sum_blocks(const Layout& layout, int64_t chunks, const Block& block_sums) {
  std::vector<int64_t> ends(layout.size());
  int64_t blocks = 0;
  for (int64_t i = 0; i < layout.size(); ++i)
    ends[i] = blocks += (layout[i].numel + kBlock - 1) / kBlock;
  std::vector<std::array<double, Count>> partial(blocks * chunks);
  const int64_t grain =
      std::max<int64_t>(1, kGrain * blocks / std::max<int64_t>(1, layout.total()));
  torch::stable::parallel_for(0, blocks * chunks, grain, [&](int64_t b, int64_t e) {
    int64_t block = b / chunks, k = b % chunks;
    int64_t i = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
    for (int64_t part = b; part < e; ++part) {
      while (block >= ends[i]) ++i;
      const int64_t count = (layout[i].numel + kBlock - 1) / kBlock;
      const int64_t begin = (block - (ends[i] - count)) * kBlock;
      partial[part] = block_sums(i, k, begin, std::min(kBlock, layout[i].numel - begin));
      if (++k == chunks) ++block, k = 0;
    }
  });
  std::vector<double> sums(Count * chunks);
  for (int64_t part = 0; part < blocks * chunks; ++part)
    for (size_t kind = 0; kind < Count; ++kind)
      sums[kind * chunks + part % chunks] += partial[part][kind];
  return sums;
}

// For each chunk the sum over all tensors of |x|^2, in float64.
template <class T>
std::vector<double> squared_norm(const Layout& layout, const Operand& tensors, int64_t chunks) {
  return sum_blocks<1>(layout, chunks, [&](int64_t i, int64_t k, int64_t begin, int64_t n) {
    return std::array{sum_of_squares(tensors.at<T>(i, k) + begin, n)};
  });
}

}  // namespace fbopt::cpu
