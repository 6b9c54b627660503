// L-BFGS's stored vectors, R rows, on CUDA. Words per parameter: row_products_ R + 2 and, from the
// cache where blocks of the same columns run together, 2 more for every 8 rows; combine_rows_
// R + 1. Launches: 2 and 1.
#include "multi_tensor.cuh"
#include "../rules/history.h"

namespace fbopt::cuda {
namespace {

// Rows that share a block's reads of the two vectors.
constexpr int kRows = 8;

// Adds the products of N columns from j on.
template <int N, class T>
__device__ inline void add_products(double (&sums)[2][kRows], const T* const (&rows)[kRows],
                                    const T* a, const T* b, int64_t j) {
  const auto x = *reinterpret_cast<const Pack<T, N>*>(a + j);
  const auto y = *reinterpret_cast<const Pack<T, N>*>(b + j);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const auto row = *reinterpret_cast<const Pack<T, N>*>(rows[r] + j);
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      sums[0][r] = rules::add_product(sums[0][r], row.lane[lane], x.lane[lane]);
      sums[1][r] = rules::add_product(sums[1][r], row.lane[lane], y.lane[lane]);
    }
  }
}

// partial[(v R + r) blocks + c]: the product of row r with vector v over column block c. Blocks of
// the same columns follow each other. A thread takes the same elements in the same order whether it
// can load them by packs or has to one by one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_products(const T* matrix, int count, int64_t n, const T* a, const T* b, double* partial) {
  constexpr int kLanes = kAccess / static_cast<int>(sizeof(T)), kStride = kThreads * kLanes;
  const int groups = (count + kRows - 1) / kRows;
  const int first = static_cast<int>(blockIdx.x % groups) * kRows;
  const int64_t block = blockIdx.x / groups, blocks = gridDim.x / groups;
  const int64_t begin = block * kSumChunk, end = begin + kSumChunk < n ? begin + kSumChunk : n;
  const T* rows[kRows];  // beyond the last row its own once more
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    rows[r] = matrix + (first + r < count ? first + r : count - 1) * n;
  double sums[2][kRows] = {};
  int64_t j = begin + threadIdx.x * kLanes;
  if (is_aligned(matrix) && is_aligned(a) && is_aligned(b) && n % kLanes == 0)
    for (; j + kLanes <= end; j += kStride) add_products<kLanes>(sums, rows, a, b, j);
  for (; j < end; j += kStride)
    for (int64_t k = j; k < j + kLanes && k < end; ++k) add_products<1>(sums, rows, a, b, k);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const double sum = block_total<kThreads>(sums[v][r]);
      if (threadIdx.x == 0 && first + r < count)
        partial[(v * static_cast<int64_t>(count) + first + r) * blocks + block] = sum;
      __syncthreads();  // before the next total takes the place of this one
    }
  }
}

// N columns a thread, of all rows in their order.
template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    combine_rows(T* out, const T* rows, const double* coefficients, int count, int64_t n) {
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (j >= n) return;
  double sums[N] = {};
#pragma unroll 8
  for (int r = 0; r < count; ++r) {
    const auto row = *reinterpret_cast<const Pack<T, N>*>(rows + r * n + j);
#pragma unroll
    for (int lane = 0; lane < N; ++lane)
      sums[lane] = rules::combine(sums[lane], coefficients[r], row.lane[lane]);
  }
  Pack<T, N> pack;
#pragma unroll
  for (int lane = 0; lane < N; ++lane) pack.lane[lane] = static_cast<T>(sums[lane]);
  *reinterpret_cast<Pack<T, N>*>(out + j) = pack;
}

void row_products_op(const Tensor& out, const Tensor& rows, const Tensor& a, const Tensor& b) {
  check_apart({{"out", out}}, {{"rows", rows}, {"a", a}, {"b", b}});
  const Call call(rows);
  const Rows matrix(rows);
  double* to = matrix.numbers("out", out, 2 * matrix.count);
  dispatch_wide(matrix.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const T *x = matrix.vector<T>("a", a), *y = matrix.vector<T>("b", b);
    const int64_t blocks = blocks_of(matrix.columns, kSumChunk);
    const int64_t groups = blocks_of(matrix.count, kRows);
    if (groups == 0) return;
    const Tensor partial = fresh({2 * matrix.count * blocks}, ScalarType::Double, matrix.device);
    auto* sums = static_cast<double*>(partial.data_ptr());
    if (blocks > 0)
      call.run(&row_products<T>, dim3(groups * blocks), kThreads, matrix.at<const T>(0),
               static_cast<int>(matrix.count), matrix.columns, x, y, sums);
    call.run(&finish_sum, dim3(2 * matrix.count), kFinishThreads, static_cast<const double*>(sums),
             blocks, to);
  });
}

template <int N, class T>
void combine(const Call& call, T* out, const Rows& rows, const double* coefficients) {
  const int64_t blocks = blocks_of(rows.columns, int64_t{kThreads} * N);
  call.run(&combine_rows<N, T>, dim3(blocks), kThreads, out, rows.at<const T>(0), coefficients,
           static_cast<int>(rows.count), rows.columns);
}

void combine_rows_op(const Tensor& out, const Tensor& rows, const Tensor& coefficients) {
  check_apart({{"out", out}}, {{"rows", rows}, {"coefficients", coefficients}});
  const Call call(rows);
  const Rows matrix(rows);
  const double* c = matrix.numbers("coefficients", coefficients, matrix.count);
  dispatch_wide(matrix.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kLanes = kAccess / static_cast<int>(sizeof(T));
    T* to = matrix.vector<T>("out", out);
    if (matrix.columns == 0) return;
    const bool packs =
        is_aligned(to) && is_aligned(matrix.at<T>(0)) && matrix.columns % kLanes == 0;
    packs ? combine<kLanes>(call, to, matrix, c) : combine<1>(call, to, matrix, c);
  });
}

}  // namespace
}  // namespace fbopt::cuda

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, FBOPT_CUDA_KEY, m) {
  m.impl("row_products_", TORCH_BOX(&fbopt::cuda::row_products_op));
  m.impl("combine_rows_", TORCH_BOX(&fbopt::cuda::combine_rows_op));
}
