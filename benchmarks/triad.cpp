// The memory limit: a = b + s c over large arrays, with streaming and with plain stores. Threads as
// in the kernels (torch's own pool), so that the two can be compared.
#include <pybind11/pybind11.h>

#include "cpu/tile.h"

namespace {

void triad(uintptr_t to, uintptr_t from, uintptr_t scaled, float s, int64_t n, bool streams) {
  float* __restrict a = reinterpret_cast<float*>(to);
  const float* __restrict b = reinterpret_cast<const float*>(from);
  const float* __restrict c = reinterpret_cast<const float*>(scaled);
  constexpr int64_t unit = 1024;
  torch::stable::parallel_for(0, (n + unit - 1) / unit, 32, [=](int64_t first, int64_t last) {
    const int64_t end = last * unit < n ? last * unit : n;
    int64_t i = first * unit;
#if defined(__AVX__)
    // torch aligns its tensors to 64 bytes, and units are multiples of that.
    const __m256 factor = _mm256_set1_ps(s);
    for (; streams && i + 8 <= end; i += 8)
      _mm256_stream_ps(a + i, _mm256_add_ps(_mm256_loadu_ps(b + i),
                                            _mm256_mul_ps(factor, _mm256_loadu_ps(c + i))));
    if (streams) _mm_sfence();
#else
    (void)streams;
#endif
    for (; i < end; ++i) a[i] = b[i] + s * c[i];
  });
}

}  // namespace

PYBIND11_MODULE(triad, m) { m.def("triad", &triad); }
