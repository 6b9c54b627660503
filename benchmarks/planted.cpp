// Faults that a sanitizer has to find before its silence counts: what `python -m
// benchmarks.sanitized --plant` runs.
#include <cstdint>
#include <memory>

#include "stable_abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Writes one number past the end of n.
EXPORT void overflow(int64_t n) {
  const std::unique_ptr<volatile int64_t[]> numbers(new volatile int64_t[n]);
  numbers[n] = 1;
}

// The sum of n and 1, which does not exist for the largest n.
EXPORT int64_t undefined(int64_t n) { return n + 1; }

// Counts to n with torch's threads, without a lock.
EXPORT int64_t race(int64_t n) {
  volatile int64_t count = 0;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) count = count + 1;
  });
  return count;
}
