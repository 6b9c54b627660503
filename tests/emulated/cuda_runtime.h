// As much of CUDA as csrc/cuda uses, on the CPU: a block's threads are fibers that take turns, so
// that barriers, shuffles and shared memory mean what they mean on a GPU. Threads can be run in
// either order: a missing barrier then shows as another result.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100 };

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

// What tests set and read.
inline bool reversed = false, fails = false;
inline std::vector<dim3> grids;
constexpr size_t kParameterBytes = 32764, kStack = 1 << 16;

// The threads of the block at work. They are made once: between blocks they wait. Switching by
// setjmp costs no system call.
class Threads {
 public:
  // Every thread runs to its next barrier, then every thread to the one after.
  void run(unsigned count, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < count) fibers_.emplace_back();
    for (unsigned t = 0; t < count; ++t) fibers_[t].done = false;
    for (unsigned left = count; left > 0;) {
      left = 0;
      const char* barrier = nullptr;
      for (unsigned i = 0; i < count; ++i) {
        running_ = reversed ? count - 1 - i : i;
        Fiber& fiber = fibers_[running_];
        threadIdx = dim3(running_);
        if (!fiber.done) resume(fiber);
        if (fiber.done) continue;
        if (barrier && barrier != fiber.barrier) std::abort();  // threads diverged
        barrier = fiber.barrier;
        ++left;
      }
      if (left != 0 && left != count) std::abort();  // some ended before a barrier
    }
  }

  void wait(const char* barrier) {
    fibers_[running_].barrier = barrier;
    suspend();
  }

  // What the thread `partner` passes at the same time.
  double exchange(double value, unsigned partner) {
    fibers_[running_].value = value;
    wait("shuffle");
    const double other = fibers_[partner].value;
    wait("shuffled");
    return other;
  }

 private:
  struct Fiber {
    ucontext_t context{};
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false, done = false;
    const char* barrier = nullptr;
    double value = 0;
  };

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    makecontext(&fiber.context, &Threads::live, 0);
    setcontext(&fiber.context);
  }

  void suspend() {
    if (!_setjmp(fibers_[running_].place)) _longjmp(scheduler_, 1);
  }

  static void live();

  const std::function<void()>* body_ = nullptr;
  std::deque<Fiber> fibers_;
  jmp_buf scheduler_;
  unsigned running_ = 0;
};

inline Threads threads;

inline void Threads::live() {
  for (;;) {
    (*threads.body_)();
    threads.fibers_[threads.running_].done = true;
    threads.suspend();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::threads.wait("block"); }

inline double __shfl_xor_sync(unsigned, double value, int lane) {
  return emulated::threads.exchange(value, threadIdx.x ^ static_cast<unsigned>(lane));
}

inline int64_t __double_as_longlong(double x) { return std::bit_cast<int64_t>(x); }
inline double __longlong_as_double(int64_t x) { return std::bit_cast<double>(x); }
// Saturates, as cvt.rni.s64.f64 does.
inline int64_t __double2ll_rn(double x) {
  if (x >= 0x1p63) return INT64_MAX;
  if (x <= -0x1p63) return INT64_MIN;
  return x == x ? std::llrint(x) : INT64_MIN;
}
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at = before < value ? value : before;
  return before;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "no CUDA-capable device is detected";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  if (emulated::fails) return cudaErrorNoDevice;
  if ((sizeof(P) + ...) > emulated::kParameterBytes || grid.x == 0 || grid.y == 0 ||
      grid.y > 65535 || block.x > 1024)
    return cudaErrorInvalidValue;
  emulated::grids.push_back(grid);
  gridDim = grid;
  [&]<size_t... I>(std::index_sequence<I...>) {
    for (unsigned b = 0; b < grid.x * grid.y; ++b) {
      blockIdx = dim3(b % grid.x, b / grid.x);
      emulated::threads.run(
          block.x, [&] { kernel(*static_cast<std::remove_cvref_t<P>*>(arguments[I])...); });
    }
  }(std::index_sequence_for<P...>{});
  return cudaSuccess;
}
