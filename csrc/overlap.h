// Refuses calls whose results would be written over each other or over what they are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "stable_abi.h"

namespace fbopt {

// The memory of a tensor, from its first element to the end of its last one.
struct Span {
  uintptr_t begin = 0, end = 0;
  const Meta* tensor = nullptr;
  const char* name = nullptr;
  int64_t index = 0;

  Span(const char* name, const Meta& t, int64_t index = 0)
      : begin(reinterpret_cast<uintptr_t>(t.data)),
        end(begin),
        tensor(&t),
        name(name),
        index(index) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim; ++d) last += (t.sizes[d] - 1) * t.strides[d];
    if (t.numel > 0) end += (last + 1) * size_of(t);
  }
  bool touches(const Span& other) const { return begin < other.end && other.begin < end; }
  bool is_same(const Span& other) const {
    const Meta &a = *tensor, &b = *other.tensor;
    return index == other.index && begin == other.begin && a.dtype == b.dtype && same_places(a, b);
  }
  static bool same_places(const Meta& a, const Meta& b) {
    return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes) &&
           std::equal(a.strides, a.strides + a.dim, b.strides);
  }

  static int64_t size_of(const Meta& t) {
    static const int32_t wide[] = {code_of(ScalarType::Double), code_of(ScalarType::Long)};
    static const int32_t half[] = {code_of(ScalarType::BFloat16), code_of(ScalarType::Half)};
    return std::count(wide, wide + 2, t.dtype) ? 8 : std::count(half, half + 2, t.dtype) ? 2 : 4;
  }
};

// Where every element begins, in order. Only for tensors with gaps, or whose dimensions overlap.
inline std::vector<uintptr_t> places(const Meta& t) {
  std::vector<uintptr_t> found{reinterpret_cast<uintptr_t>(t.data)};
  if (t.numel == 0) found.clear();
  for (int64_t d = 0; d < t.dim && t.numel > 0; ++d) {
    const size_t before = found.size();
    for (int64_t i = 1; i < t.sizes[d]; ++i)
      for (size_t k = 0; k < before; ++k)
        found.push_back(found[k] + i * t.strides[d] * Span::size_of(t));
  }
  std::sort(found.begin(), found.end());
  return found;
}

// The strides (in bytes) and sizes of a tensor from the smallest stride on, if each stride is at
// least as large as what those before it cover: then no two elements have one place. Else none.
inline std::vector<std::pair<int64_t, int64_t>> layers(const Meta& t) {
  std::vector<std::pair<int64_t, int64_t>> found;
  const int64_t width = Span::size_of(t);
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] > 1) found.emplace_back(t.strides[d] * width, t.sizes[d]);
  std::sort(found.begin(), found.end());
  int64_t covered = width;
  for (const auto& [stride, size] : found) {
    if (stride < covered) return {};
    covered += (size - 1) * stride;
  }
  return found;
}

inline bool repeats(const Meta& t) {
  if (t.numel <= 1 || !layers(t).empty()) return false;
  const auto all = places(t);
  return std::adjacent_find(all.begin(), all.end()) != all.end();
}

// Whether two elements of tensors with the same `count` layers share a byte, their first elements
// being `distance` apart: sum_d k_d stride_d is nearer to it than an element is wide, |k_d| <
// size_d.
inline bool reaches(int64_t distance, const std::vector<std::pair<int64_t, int64_t>>& dims,
                    size_t count, int64_t width) {
  if (count == 0) return std::abs(distance) < width;
  const auto [stride, size] = dims[count - 1];
  const int64_t k = distance / stride;  // the layers below cover less than a stride
  for (int64_t steps = k - 1; steps <= k + 1; ++steps)
    if (std::abs(steps) < size && reaches(distance - steps * stride, dims, count - 1, width))
      return true;
  return false;
}

// Whether two tensors share an element. Those without gaps are what their spans are.
inline bool share_memory(const Span& a, const Span& b) {
  if (!a.touches(b)) return false;
  if (is_dense(*a.tensor) && is_dense(*b.tensor)) return true;
  if (a.tensor->dtype == b.tensor->dtype && Span::same_places(*a.tensor, *b.tensor)) {
    const auto dims = layers(*a.tensor);
    const auto distance = static_cast<int64_t>(b.begin) - static_cast<int64_t>(a.begin);
    if (!dims.empty()) return reaches(distance, dims, dims.size(), Span::size_of(*a.tensor));
  }
  const auto x = places(*a.tensor), y = places(*b.tensor);
  const auto of_x = static_cast<uintptr_t>(Span::size_of(*a.tensor));
  const auto of_y = static_cast<uintptr_t>(Span::size_of(*b.tensor));
  for (size_t i = 0, j = 0; i < x.size() && j < y.size();) {
    if (x[i] < y[j] ? y[j] - x[i] < of_x : x[i] - y[j] < of_y) return true;
    x[i] < y[j] ? ++i : ++j;
  }
  return false;
}

// A tensor, or those of a list, by the name of the argument.
struct Named {
  const char* name;
  std::optional<Meta> tensor;
  const TensorList* list = nullptr;

  Named(const char* name, const Meta& t) : name(name), tensor(t) {}
  Named(const char* name, const Tensor& t) : name(name), tensor(Meta(t)) {}
  Named(const char* name, const TensorList& list) : name(name), list(&list) {}
  template <class T>
  Named(const char* name, const std::optional<T>& t) : name(name) {
    if (t) tensor.emplace(*t);
  }

  void add_to(std::vector<Span>& spans) const {
    if (tensor) spans.emplace_back(name, *tensor);
    for (int64_t i = 0; list != nullptr && i < list->size(); ++i)
      spans.emplace_back(name, (*list)[i], i);
  }
};

inline std::vector<Span> spans_of(std::initializer_list<Named> arguments) {
  std::vector<Span> spans;
  for (const Named& argument : arguments) argument.add_to(spans);
  return spans;
}

// Checks that the elements of all outputs lie apart from each other, and from those of the inputs.
// Each tensor of the input `same`, a list, may be that of the first output at its place, as a
// whole.
inline void check_apart(std::initializer_list<Named> outputs, std::initializer_list<Named> inputs,
                        const char* same = nullptr) {
  std::vector<Span> out = spans_of(outputs);
  const auto first = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(out.begin(), out.end(), first)) std::sort(out.begin(), out.end(), first);
  uintptr_t end = 0;
  bool nested = false;  // spans with gaps may hold others
  for (const Span& span : out) {
    nested |= span.begin < end;
    end = std::max(end, span.end);
    FBOPT_CHECK(is_dense(*span.tensor) || !repeats(*span.tensor), span.name,
                ": an element of it is written to more than once, as it is expanded");
  }
  for (size_t i = 0; nested && i < out.size(); ++i)
    for (size_t j = i + 1; j < out.size(); ++j)
      FBOPT_CHECK(!share_memory(out[i], out[j]), out[i].name, " and ", out[j].name,
                  " share memory, and both are written to");
  for (const Span& in : spans_of(inputs)) {
    if (out.empty() || in.begin >= end || in.end <= out.front().begin) continue;
    const bool may_be_same = same != nullptr && std::strcmp(in.name, same) == 0;
    // Of outputs that lie apart the last that begins before the input's end; all of them where an
    // output, or an input with gaps, may hold others.
    auto last = std::lower_bound(out.begin(), out.end(), in.end,
                                 [](const Span& s, uintptr_t place) { return s.begin < place; });
    const bool all = nested || !is_dense(*in.tensor);
    for (auto it = all ? out.begin() : std::max(out.begin(), last - 1); it != last; ++it)
      FBOPT_CHECK((may_be_same && it->name == outputs.begin()->name && it->is_same(in)) ||
                      !share_memory(*it, in),
                  it->name, " is written to and shares memory with ", in.name,
                  ", which is read: give one of them memory of its own");
  }
}

}  // namespace fbopt
