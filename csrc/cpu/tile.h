// A tile of up to 512 elements: widened to the type of the arithmetic, put through a rule in a
// plain loop that the compiler vectorises, and narrowed again. Tensors of that type are used in
// place.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../checks.h"

namespace fbopt::cpu {

constexpr int64_t kTile = 512;

template <class T, class A>
constexpr bool kInPlace = std::is_same_v<T, A>;

// A buffer for a widened tile; empty where the tensor is used in place.
template <class T, class A>
using Buffer = A[kInPlace<T, A> ? 1 : kTile];

inline void widen_loop(const Half* p, float* x, int64_t n) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(x + j,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j))));
#endif
  for (; j < n; ++j) x[j] = p[j];
}

inline void narrow_loop(Half* p, const float* x, int64_t n) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; j < n; ++j) p[j] = x[j];
}

template <class T, class A>
inline void widen_loop(const T* p, A* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = static_cast<A>(p[j]);
}

template <class T, class A>
inline void narrow_loop(T* p, const A* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) p[j] = static_cast<T>(x[j]);
}

// n elements at p in the type A: p itself, or a copy in the buffer.
template <class A, class T>
inline auto* widen(T* p, A* buffer, int64_t n) {
  if constexpr (kInPlace<std::remove_const_t<T>, A>) {
    return p;
  } else {
    widen_loop(p, buffer, n);
    return buffer;
  }
}

// Writes n results to p, unless they were computed there.
template <class A, class T>
inline void narrow(T* p, const A* x, int64_t n) {
  if constexpr (!kInPlace<T, A>) narrow_loop(p, x, n);
}

// Elements before p is aligned to a cache line.
template <class T>
inline int64_t misaligned(const T* p) {
  return static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(T));
}

// Non-temporal stores of n results, for memory that is not read soon: they save reading the cache
// lines first. Plain stores where p is not aligned to a cache line, and for half precision.
template <class T, class A>
inline void stream(T* p, const A* x, int64_t n) {
  int64_t j = 0;
#if defined(__AVX__)
  constexpr int64_t kWidth = 32 / sizeof(T);
  if constexpr (kInPlace<T, A>) {
    for (const int64_t end = misaligned(p) == 0 ? n : 0; j + kWidth <= end; j += kWidth) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + j), bits);
    }
  }
#endif
  narrow_loop(p + j, x + j, n - j);
}

// Streamed lines must be visible to the thread that continues.
inline void stream_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// body(i, n): tiles of n elements from begin to end; `head` elements come alone before the first.
template <class Body>
inline void tiles(int64_t begin, int64_t end, int64_t head, const Body& body) {
  int64_t i = begin;
  if (head > 0) {
    const int64_t n = head < end - begin ? head : end - begin;
    body(i, n);
    i += n;
  }
  for (; i < end; i += kTile) body(i, kTile < end - i ? kTile : end - i);
}

}  // namespace fbopt::cpu
