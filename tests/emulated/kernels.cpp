// The CUDA kernels and their launcher, compiled for the CPU as the ops fbopt_emulated::*, and what
// tests look at besides: launches, and the arithmetic of their plan.
#define FBOPT_ON_DEVICE
#include <cuda_runtime.h>

#include "../../csrc/schema.cpp"
#include "../../csrc/cuda/exact.cu"
#include "../../csrc/cuda/history.cu"
#include "../../csrc/cuda/penalty.cu"
#include "../../csrc/cuda/perturb.cu"
#include "../../csrc/cuda/step.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

// The parts of torch that ask for a GPU.
EXPORT AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
EXPORT AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

EXPORT void run_backwards(bool reversed) { emulated::reversed = reversed; }
EXPORT void fail_launches(bool fails) { emulated::fails = fails; }

// The number of launches since the last call, and up to n of their sizes in blocks.
EXPORT int64_t launches(int64_t* blocks, int64_t n) {
  const auto count = static_cast<int64_t>(emulated::grids.size());
  for (int64_t i = 0; i < count && i < n; ++i) blocks[i] = emulated::grids[i].x;
  emulated::grids.clear();
  return count;
}

EXPORT int64_t capacity(int64_t depth) { return fbopt::cuda::capacity(static_cast<int>(depth)); }
EXPORT int64_t few() { return fbopt::cuda::kFew; }

// Rows of (first, count, blocks); returns how many.
EXPORT int64_t plan(const int64_t* sizes, int64_t n, int64_t capacity, int64_t chunk,
                    int64_t* rows) {
  const auto launches = fbopt::cuda::plan({sizes, sizes + n}, capacity, chunk);
  for (const auto& launch : launches) {
    *rows++ = launch.first;
    *rows++ = launch.count;
    *rows++ = launch.blocks;
  }
  return static_cast<int64_t>(launches.size());
}

// Tensor, begin and length of what a block of a launch over n <= 72 tensors works on.
EXPORT void span(const int64_t* sizes, int64_t n, int64_t chunk, int64_t block, int64_t* row) {
  fbopt::cuda::Table<1, fbopt::cuda::kFew> table{};
  table.count = static_cast<int32_t>(n);
  uint32_t end = 0;
  for (int64_t i = 0; i < n; ++i) {
    table.numel[i] = sizes[i];
    table.end[i] = end += static_cast<uint32_t>(fbopt::cuda::blocks_of(sizes[i], chunk));
  }
  const auto span =
      fbopt::cuda::span_of(table, static_cast<uint32_t>(block), static_cast<int>(chunk));
  row[0] = span.tensor;
  row[1] = span.begin;
  row[2] = span.length;
}
