// The two kernels: one applies a rule to every element of some lists of tensors, for all chunks of
// stacks one after the other; the other sums squares in an order that depends on the shapes alone.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../scalar.h"
#include "plan.h"

namespace fbopt::cuda {

constexpr int kThreads = 256;
// Elements a block works on: enough blocks for every multiprocessor from models of a million
// parameters on, and several 16-byte accesses per thread.
constexpr int kChunk = 4096, kSumChunk = 8192;
// The most chunks of one launch.
constexpr int kMaxChunks = 64;
// Accesses in flight before the first is used.
constexpr int kUnroll = 2;
constexpr int kAccess = 16;

// The chunks of a launch.
struct Group {
  int first, count;
};

// n elements that are loaded and stored by 16-byte accesses.
template <class T, int N>
struct alignas(sizeof(T) * N < kAccess ? sizeof(T) * N : kAccess) Pack {
  T lane[N];
};

inline __host__ __device__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kAccess == 0;
}

// A rule over lists: `Operands` is a tuple of their element types, const where they are only read;
// `Value` the type of the arithmetic; stacked(l) whether list l holds stacks; uniform(i, k) what
// all elements of tensor i share in chunk k, read from the device once per block; apply() changes
// one element of each list. reads() and writes() may depend on the call.
template <class Rule>
struct Lists {
  using Value = typename Rule::Value;
  using Operands = typename Rule::Operands;
  using Uniform = typename Rule::Uniform;
  static constexpr int kDepth = std::tuple_size_v<Operands>;
  template <int K>
  using Element = std::remove_const_t<std::tuple_element_t<K, Operands>>;

  static constexpr auto kAll = std::make_index_sequence<kDepth>{};
  template <size_t... K>
  static constexpr std::array<int, kDepth> sizes(std::index_sequence<K...>) {
    return {static_cast<int>(sizeof(Element<K>))...};
  }
  // Elements per access of the list with the smallest ones; the others take several.
  static constexpr int kLanes = kAccess / std::ranges::min(sizes(kAll));

  static constexpr bool kStacks = [] {
    for (int k = 0; k < kDepth; ++k)
      if (Rule::stacked(k)) return true;
    return false;
  }();

  template <int N, int K>
  static __device__ void load(const Rule& rule, char* const (&base)[kDepth], int64_t i,
                              Value (&x)[kDepth][N]) {
    if (!rule.reads(K)) {
#pragma unroll
      for (int lane = 0; lane < N; ++lane) x[K][lane] = Value{};
      return;
    }
    using T = Element<K>;
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(base[K] + sizeof(T) * i);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) x[K][lane] = static_cast<Value>(pack.lane[lane]);
  }

  template <int N, int K>
  static __device__ void store(const Rule& rule, char* const (&base)[kDepth], int64_t i,
                               const Value (&x)[kDepth][N]) {
    if constexpr (!std::is_const_v<std::tuple_element_t<K, Operands>>) {
      if (!rule.writes(K)) return;
      using T = Element<K>;
      Pack<T, N> pack;
#pragma unroll
      for (int lane = 0; lane < N; ++lane) pack.lane[lane] = static_cast<T>(x[K][lane]);
      *reinterpret_cast<Pack<T, N>*>(base[K] + sizeof(T) * i) = pack;
    }
  }

  // Elements first ... n - 1 of all chunks, N at a time; returns the first one left over. Slices of
  // stacks are `numel` elements apart; what is no stack is read before the chunks and written after
  // them.
  template <int N, size_t... K>
  static __device__ int sweep(const Rule& rule, const Uniform* uniforms, int chunks, int64_t numel,
                              char* const (&base)[kDepth], int first, int n,
                              std::index_sequence<K...>) {
    const int packs = (n - first) / N;
    for (int j = threadIdx.x; j < packs; j += kThreads * kUnroll) {
      Value x[kUnroll][kDepth][N];
      // f(i, x) for each pack at hand, from element i on.
      const auto each = [&](const auto& f) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (j + u * kThreads < packs) f(first + (j + u * kThreads) * N, x[u]);
      };
      each([&](int64_t i, auto& e) {
        ((Rule::stacked(K) ? void() : load<N, K>(rule, base, i, e)), ...);
      });
      for (int k = 0; k < chunks; ++k) {
        const Uniform uniform = uniforms[k];
        const int64_t slice = k * numel;
        each([&](int64_t i, auto& e) {
          ((Rule::stacked(K) ? load<N, K>(rule, base, slice + i, e) : void()), ...);
        });
        each([&](int64_t i, auto& e) {
#pragma unroll
          for (int lane = 0; lane < N; ++lane) {
            Value element[kDepth] = {e[K][lane]...};
            Rule::apply(element, uniform);
            ((e[K][lane] = element[K]), ...);
          }
          ((Rule::stacked(K) ? store<N, K>(rule, base, slice + i, e) : void()), ...);
        });
      }
      each([&](int64_t i, auto& e) {
        ((Rule::stacked(K) ? void() : store<N, K>(rule, base, i, e)), ...);
      });
    }
    return first + packs * N;
  }
};

// One block per span, from the last to the first: after a forward sum over the same memory the
// cache still holds its end.
template <class Rule, int Capacity>
__global__ void __launch_bounds__(kThreads)
    for_each(const __grid_constant__ Table<Lists<Rule>::kDepth, Capacity> table,
             const __grid_constant__ Rule rule, const __grid_constant__ Group group) {
  using L = Lists<Rule>;
  __shared__ typename L::Uniform uniforms[L::kStacks ? kMaxChunks : 1];
  const Span span = span_of(table, gridDim.x - 1 - blockIdx.x, kChunk);
  const int chunks = L::kStacks ? group.count : 1;
  if (static_cast<int>(threadIdx.x) < chunks)
    uniforms[threadIdx.x] = rule.uniform(table.first + span.tensor, group.first + threadIdx.x);
  __syncthreads();
  if (Rule::idle(uniforms[0])) return;
  constexpr auto sizes = L::sizes(L::kAll);
  const int64_t numel = table.numel[span.tensor];
  char* base[L::kDepth];
  bool aligned = true;
#pragma unroll
  for (int k = 0; k < L::kDepth; ++k) {
    const int64_t slices = Rule::stacked(k) ? group.first * numel : 0;
    base[k] = static_cast<char*>(table.data[k][span.tensor]) + sizes[k] * (slices + span.begin);
    aligned = aligned && is_aligned(base[k]);
    if (Rule::stacked(k)) aligned = aligned && (chunks == 1 || sizes[k] * numel % kAccess == 0);
  }
  int done = 0;
  if (aligned)
    done =
        L::template sweep<L::kLanes>(rule, uniforms, chunks, numel, base, 0, span.length, L::kAll);
  L::template sweep<1>(rule, uniforms, chunks, numel, base, done, span.length, L::kAll);
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Combines the values of a block's threads in thread 0, in a fixed order.
template <int Threads, class Combine = Sum>
__device__ inline double block_total(double value, const Combine& combine = {}) {
  constexpr int kWarp = 32;
  __shared__ double warps[Threads / kWarp];
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, lane));
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < Threads / kWarp; ++w) total = combine(total, warps[w]);
  return total;
}

template <class T, int N>
__device__ inline double add_squares(double sum, const T* x) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(x);
#pragma unroll
  for (int lane = 0; lane < N; ++lane) {
    const double value = static_cast<double>(pack.lane[lane]);
    sum = rules::fma(value, value, sum);
  }
  return sum;
}

// partial[b] = sum of squares of block b's elements, of chunk k those of its slice, `stride`
// further on for each. A thread takes the same elements in the same order whether it can load them
// by packs or has to one by one.
template <class T, int Capacity>
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ Table<1, Capacity> table, double* partial, int64_t stride) {
  constexpr int kLanes = kAccess / static_cast<int>(sizeof(T)), kStride = kThreads * kLanes;
  const Span span = span_of(table, blockIdx.x, kSumChunk);
  const int64_t slice = blockIdx.y * table.numel[span.tensor];
  const T* x = static_cast<const T*>(table.data[0][span.tensor]) + slice + span.begin;
  int i = threadIdx.x * kLanes;
  double sum = 0;
  if (is_aligned(x)) {
#pragma unroll 4
    for (; i + kLanes <= span.length; i += kStride) sum = add_squares<T, kLanes>(sum, x + i);
  }
  for (; i < span.length; i += kStride) {
    const int end = i + kLanes < span.length ? i + kLanes : span.length;
    for (int j = i; j < end; ++j) sum = add_squares<T, 1>(sum, x + j);
  }
  sum = block_total<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * stride + blockIdx.x] = sum;
}

constexpr int kFinishThreads = 1024;

// One block for each chunk: out[k] = the sum of its n partial sums.
static __global__ void __launch_bounds__(kFinishThreads)
    finish_sum(const double* partial, int64_t n, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kFinishThreads) sum += partial[blockIdx.x * n + i];
  sum = block_total<kFinishThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace fbopt::cuda
