// L-BFGS's stored vectors, R rows, on the CPU. Words per parameter: row_products_ R + 2,
// combine_rows_ R + 1.
#include "../rules/history.h"

#include "loops.h"

namespace fbopt::cpu {
namespace {

// Columns that all rows go through before the next ones: what the rows share stays in the cache.
constexpr int64_t kColumns = 1024;
// Columns of a thread's turn, and of a partial sum.
constexpr int64_t kTurn = 16 * kColumns;
// Rows at once, each a stream of reads.
constexpr int64_t kRows = 4;

// body(turn, first, last) for all columns, so many rows each. What goes through the rows next
// begins at the other end, where the caches still hold some.
template <bool kBackwards, class Body>
void for_each_turn(int64_t columns, int64_t rows, const Body& body) {
  const int64_t turns = (columns + kTurn - 1) / kTurn;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kTurn * std::max<int64_t>(1, rows)));
  torch::stable::parallel_for(0, turns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t turn = kBackwards ? begin + end - 1 - i : i;
      body(turn, turn * kTurn, std::min((turn + 1) * kTurn, columns));
    }
  });
}

// body(Count, r) for groups of kRows rows from r on, then for those left over one by one.
template <class Body>
void for_each_group(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) body(std::integral_constant<int64_t, kRows>{}, r);
  for (; r < rows; ++r) body(std::integral_constant<int64_t, 1>{}, r);
}

// body(j) for every fourth column of those that fill cache lines, from the first on; returns the
// first column left over. Rows from `ahead` on are read next: the processor foresees that within a
// page alone.
template <int64_t Count, class T, class Body>
int64_t for_each_four(const T* ahead, int64_t stride, int64_t n, const Body& body) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t j = 0;
  for (; j + kLine <= n; j += kLine) {
    for (int64_t r = 0; r < Count; ++r) __builtin_prefetch(ahead + r * stride + j);
    for (int64_t k = j; k < j + kLine; k += 4) body(k);
  }
  return j;
}

// Adds to with_a[r] and with_b[r] the products of rows `stride` apart with a and b, over n columns.
template <int64_t Count, class T>
void add_products(const T* rows, const T* ahead, int64_t stride, const T* a, const T* b, int64_t n,
                  double* with_a, double* with_b) {
  Wide sums[2][Count] = {};
  int64_t j = for_each_four<Count>(ahead, stride, n, [&](int64_t k) {
    const Wide x = load_wide(a + k), y = load_wide(b + k);
    for (int64_t r = 0; r < Count; ++r) {
      const Wide row = load_wide(rows + r * stride + k);
      sums[0][r] = add_product<T>(sums[0][r], row, x);
      sums[1][r] = add_product<T>(sums[1][r], row, y);
    }
  });
  for (; j < n; ++j)
    for (int64_t r = 0; r < Count; ++r) {
      sums[0][r][j % 4] = rules::add_product(sums[0][r][j % 4], rows[r * stride + j], a[j]);
      sums[1][r][j % 4] = rules::add_product(sums[1][r][j % 4], rows[r * stride + j], b[j]);
    }
  for (int64_t r = 0; r < Count; ++r) {
    with_a[r] += total(sums[0][r]);
    with_b[r] += total(sums[1][r]);
  }
}

template <class T>
void products(const Rows& rows, const T* a, const T* b, double* out) {
  const int64_t n = rows.columns;
  std::vector<double> partial((n + kTurn - 1) / kTurn * 2 * rows.count);
  for_each_turn<false>(n, rows.count, [&](int64_t turn, int64_t begin, int64_t end) {
    double* sums = partial.data() + turn * 2 * rows.count;
    for (int64_t first = begin; first < end; first += kColumns)
      for_each_group(rows.count, [&](auto count, int64_t r) {
        const T* here = rows.at<T>(r) + first;
        add_products<count()>(here, rows.ahead(here, r, count()), n, a + first, b + first,
                              std::min(kColumns, end - first), sums + r, sums + rows.count + r);
      });
  });
  std::fill_n(out, 2 * rows.count, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) out[i % (2 * rows.count)] += partial[i];
}

// sum[j] <- sum[j] + the rows' elements j, each times its coefficient.
template <int64_t Count, class T>
void add_rows(double* sum, const T* rows, const T* ahead, int64_t stride,
              const double* coefficients, int64_t n) {
  double c[Count];
  std::copy_n(coefficients, Count, c);
  int64_t j = for_each_four<Count>(ahead, stride, n, [&](int64_t k) {
    Wide s = load_wide(sum + k);
    for (int64_t r = 0; r < Count; ++r)
      s = multiply_add(Wide{c[r], c[r], c[r], c[r]}, load_wide(rows + r * stride + k), s);
    std::memcpy(sum + k, &s, sizeof s);
  });
  for (; j < n; ++j)
    for (int64_t r = 0; r < Count; ++r) sum[j] = rules::combine(sum[j], c[r], rows[r * stride + j]);
}

template <class T>
void combine(T* out, const Rows& rows, const double* coefficients) {
  for_each_turn<true>(rows.columns, rows.count, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t n = std::min(kColumns, end - first);
      double sum[kColumns] = {};
      for_each_group(rows.count, [&](auto count, int64_t r) {
        const T* here = rows.at<T>(r) + first;
        add_rows<count()>(sum, here, rows.ahead(here, r, count()), rows.columns, coefficients + r,
                          n);
      });
      for (int64_t j = 0; j < n; ++j) out[first + j] = static_cast<T>(sum[j]);
    }
  });
}

void row_products_op(const Argument& out, const Argument& rows, const Argument& a,
                     const Argument& b) {
  check_apart({{"out", out}}, {{"rows", rows}, {"a", a}, {"b", b}});
  const Rows matrix(rows);
  double* to = matrix.numbers("out", out, 2 * matrix.count);
  dispatch_wide(matrix.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    products(matrix, matrix.vector<T>("a", a), matrix.vector<T>("b", b), to);
  });
}

void combine_rows_op(const Argument& out, const Argument& rows, const Argument& coefficients) {
  check_apart({{"out", out}}, {{"rows", rows}, {"coefficients", coefficients}});
  const Rows matrix(rows);
  const double* c = matrix.numbers("coefficients", coefficients, matrix.count);
  dispatch_wide(matrix.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    combine(matrix.vector<T>("out", out), matrix, c);
  });
}

}  // namespace
}  // namespace fbopt::cpu

STABLE_TORCH_LIBRARY_IMPL(FBOPT_LIBRARY, CPU, m) {
  m.impl("row_products_", TORCH_BOX(&fbopt::cpu::row_products_op));
  m.impl("combine_rows_", TORCH_BOX(&fbopt::cpu::combine_rows_op));
}

static const fbopt::direct::Ops direct_ops{
    {"row_products_", fbopt::direct::method<&fbopt::cpu::row_products_op, 0b1>},
    {"combine_rows_", fbopt::direct::method<&fbopt::cpu::combine_rows_op, 0b1>},
};
