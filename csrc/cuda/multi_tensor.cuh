// The one launcher: an op's lists of tensors become tables, and each table a launch. Longer lists
// than a table holds take more launches; scalars stay on the device; nothing waits for it.
#pragma once

#include "../checks.h"
#include "kernels.cuh"

namespace fbopt::cuda {

// The pointers into each list.
template <size_t Depth>
using Pointers = std::array<const std::vector<void*>*, Depth>;

// Where a call runs: under a guard for the device, on torch's current stream.
class Call {
 public:
  explicit Call(const Meta& on) : device_(on.device), guard_(device_.index) {
    void* stream = nullptr;
    FBOPT_CALL(aoti_torch_get_current_cuda_stream(device_.index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Scalar scalar(const char* name, const Tensor& t, const Chunks& chunks = {}) const {
    FBOPT_CHECK(Device(t.get()) == device_, name, " must be on the device of the tensors");
    return scalar_of(name, t, chunks);
  }

  // How many elements each tensor has; all must be on the device.
  std::vector<int64_t> sizes(const Layout& layout) const {
    std::vector<int64_t> sizes(layout.size());
    for (int64_t i = 0; i < layout.size(); ++i) {
      FBOPT_CHECK(layout[i].device == device_, "tensor ", i, " is on another device than the rest");
      sizes[i] = layout[i].numel;
    }
    return sizes;
  }

  // One element of every list at a time, in all chunks; lists that are not used are null.
  template <class Rule>
  void for_each(const std::vector<int64_t>& sizes, const Rule& rule,
                const Pointers<Lists<Rule>::kDepth>& lists, int64_t chunks = 1) const {
    tables(sizes, lists, kChunk,
           [&]<int D, int Capacity>(const Table<D, Capacity>& table, int64_t, int64_t blocks) {
             groups(chunks, [&](const Group& group) {
               run(&cuda::for_each<Rule, Capacity>, dim3(blocks), kThreads, table, rule, group);
             });
           });
  }

  // body(group) for all chunks, as many at once as a launch takes.
  template <class Body>
  static void groups(int64_t chunks, const Body& body) {
    for (int64_t k = 0; k < chunks; k += kMaxChunks)
      body(Group{static_cast<int>(k), static_cast<int>(std::min<int64_t>(kMaxChunks, chunks - k))});
  }

  // For each chunk the sum of the squares of all elements, float64.
  Tensor squared_norm(ScalarType dtype, const Layout& layout, const Operand& tensors,
                      const Chunks& chunks) const {
    FBOPT_CHECK(chunks.count <= kMaxGridY, "stacks may have at most ", kMaxGridY, " slices");
    const std::vector<int64_t> lengths = sizes(layout);
    const Tensor sum = numbers(chunks);
    dispatch(dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      sum_blocks(lengths, Pointers<1>{&tensors.pointers()}, kSumChunk, chunks.count, sum,
                 [&]<int D, int Capacity>(const Table<D, Capacity>& table, int64_t launched,
                                          double* partial, int64_t blocks) {
                   run(&sum_squares<T, Capacity>, dim3(launched, chunks.count), kThreads, table,
                       partial, blocks);
                 });
    });
    return sum;
  }

  // Sets each of `rows` numbers to a sum over all elements, in two stages: body(table, blocks of
  // this launch, partial sums from its first block on, blocks of all) fills rows of partial sums.
  template <size_t Depth, class Body>
  void sum_blocks(const std::vector<int64_t>& sizes, const Pointers<Depth>& lists, int64_t chunk,
                  int64_t rows, const Tensor& sums, const Body& body) const {
    int64_t blocks = 0;
    for (const int64_t n : sizes) blocks += blocks_of(n, chunk);
    const Tensor partial = fresh({rows * blocks}, ScalarType::Double, device_);
    auto* out = static_cast<double*>(partial.data_ptr());
    tables(sizes, lists, chunk, [&](const auto& table, int64_t before, int64_t launched) {
      body(table, launched, out + before, blocks);
    });
    run(&finish_sum, dim3(rows), kFinishThreads, static_cast<const double*>(out), blocks,
        static_cast<double*>(sums.data_ptr()));
  }

  // A number for each chunk, or a row of them for each of some kinds; not set.
  Tensor numbers(const Chunks& chunks, std::vector<int64_t> kinds = {}) const {
    const std::vector<int64_t> shape = chunks.shape(std::move(kinds));
    const int64_t strides[] = {shape.size() > 1 ? shape[1] : 1, 1};
    return empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides,
                         code_of(ScalarType::Double), device_);
  }

  // body(table, blocks of earlier launches, blocks of this one) for every launch.
  template <size_t Depth, class Body>
  static void tables(const std::vector<int64_t>& sizes, const Pointers<Depth>& lists, int64_t chunk,
                     const Body& body) {
    constexpr int kDepth = static_cast<int>(Depth);
    if (sizes.size() <= kFew) {
      spread<kDepth, kFew>(sizes, lists, chunk, body);
    } else {
      spread<kDepth, capacity(kDepth)>(sizes, lists, chunk, body);
    }
  }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), const dim3& blocks, int threads,
           const Arguments&... arguments) const {
    static_assert((std::is_same_v<std::remove_cv_t<Parameters>, Arguments> && ...));
    static_assert((sizeof(Arguments) + ...) <= kParameterBytes);
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const cudaError_t status = cudaLaunchKernel(
        kernel, blocks, dim3(static_cast<unsigned>(threads)), pointers, 0, stream_);
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // cleared, so that later calls do not report it again
    FBOPT_CHECK(false, "a CUDA kernel of fbopt was not launched: ", cudaGetErrorString(status));
  }

 private:
  template <int Depth, int Capacity, class Body>
  static void spread(const std::vector<int64_t>& sizes, const Pointers<Depth>& lists, int64_t chunk,
                     const Body& body) {
    Table<Depth, Capacity> table;
    int64_t before = 0;
    for (const Launch& launch : plan(sizes, Capacity, chunk)) {
      if (launch.blocks == 0) continue;
      table.count = static_cast<int32_t>(launch.count);
      table.first = static_cast<int32_t>(launch.first);
      uint32_t end = 0;
      for (int64_t j = 0; j < launch.count; ++j) {
        const int64_t i = launch.first + j;
        for (int k = 0; k < Depth; ++k) table.data[k][j] = lists[k] ? (*lists[k])[i] : nullptr;
        table.numel[j] = sizes[i];
        table.end[j] = end += static_cast<uint32_t>(blocks_of(sizes[i], chunk));
      }
      body(table, before, launch.blocks);
      before += launch.blocks;
    }
  }

  Device device_;
  DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fbopt::cuda
