// How a list of tensors is spread over launches and blocks: arithmetic alone, no torch, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FBOPT_ANYWHERE __host__ __device__ inline
#else
#define FBOPT_ANYWHERE inline
#endif

namespace fbopt::cuda {

// What CUDA >= 12.1 hands a kernel by value; and that minus what is passed beside the table.
constexpr int64_t kParameterBytes = 32764, kTableBytes = kParameterBytes - 256;
// A small table for short lists: what the driver copies for a launch then stays under 4 KB.
constexpr int kFew = 72;
constexpr int64_t kMaxBlocks = INT32_MAX, kMaxGridY = 65535;

// The tensors of one launch: where they lie, how long they are, and which block works on which.
template <int Depth, int Capacity>
struct Table {
  void* data[Depth][Capacity];
  int64_t numel[Capacity];
  uint32_t end[Capacity];  // blocks of this tensor and of those before it
  int32_t count, first;    // first: the place of the table's first tensor in the call's lists
};

constexpr int capacity(int depth) { return static_cast<int>((kTableBytes - 8) / (8 * depth + 12)); }

struct Launch {
  int64_t first, count, blocks;
};

inline int64_t blocks_of(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

// Launches of at most `capacity` tensors and kMaxBlocks blocks, each block working on up to `chunk`
// elements of one tensor. Tensors keep their order; an empty one takes a place and no block.
inline std::vector<Launch> plan(const std::vector<int64_t>& sizes, int64_t capacity,
                                int64_t chunk) {
  std::vector<Launch> launches;
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
    const int64_t blocks = blocks_of(sizes[i], chunk);
    const bool full = launches.empty() || launches.back().count == capacity ||
                      launches.back().blocks + blocks > kMaxBlocks;
    if (full) launches.push_back({i, 0, 0});
    ++launches.back().count;
    launches.back().blocks += blocks;
  }
  return launches;
}

// The tensor a block works on: the first whose blocks end after it.
FBOPT_ANYWHERE int tensor_of(const uint32_t* end, int count, uint32_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The part of a tensor that a block works on.
struct Span {
  int tensor;
  int64_t begin;
  int length;
};

template <int Depth, int Capacity>
FBOPT_ANYWHERE Span span_of(const Table<Depth, Capacity>& table, uint32_t block, int chunk) {
  const int tensor = tensor_of(table.end, table.count, block);
  const int64_t begin = static_cast<int64_t>(block - (tensor ? table.end[tensor - 1] : 0)) * chunk;
  const int64_t left = table.numel[tensor] - begin;
  return {tensor, begin, static_cast<int>(left < chunk ? left : chunk)};
}

}  // namespace fbopt::cuda
