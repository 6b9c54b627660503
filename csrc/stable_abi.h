// Torch's stable C++ ABI (target 2.10) as the kernels see it; nothing else includes a torch header.
// TensorList is a `Tensor[]` argument, Operand the pointers into one, Scalars are 0-dim tensors.
// A stack holds the tensors of K chunks as slices of one, along a first dimension more.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

// The ops' namespace, and the dispatch key of the CUDA kernels: tests run those on the CPU.
#ifndef FBOPT_LIBRARY
#define FBOPT_LIBRARY fbopt
#define FBOPT_CUDA_KEY CUDA
#endif
// One level of macro expansion more: torch 2.10 would not expand the namespace's name.
#define FBOPT_OPS(ns, m) STABLE_TORCH_LIBRARY(ns, m)

#define FBOPT_CHECK STD_TORCH_CHECK
// Checks the status that a C function of the ABI returns; torch 2.10 has another name for it.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define FBOPT_CALL STABLE_TORCH_ERROR_CODE_CHECK
#else
#define FBOPT_CALL TORCH_ERROR_CODE_CHECK
#endif

namespace fbopt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

struct Device {
  int32_t type, index;

  explicit Device(AtenTensorHandle t) {
    FBOPT_CALL(aoti_torch_get_device_type(t, &type));
    FBOPT_CALL(aoti_torch_get_device_index(t, &index));
  }
  Device(int32_t type, int32_t index) : type(type), index(index) {}
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// The facts about a tensor that a kernel needs; sizes and strides are borrowed from it.
struct Meta {
  int64_t numel, dim;
  int64_t *sizes, *strides;
  int32_t dtype;
  void* data;
  Device device;

  explicit Meta(AtenTensorHandle t) : device(t) {
    FBOPT_CALL(aoti_torch_get_dim(t, &dim));
    FBOPT_CALL(aoti_torch_get_sizes(t, &sizes));
    FBOPT_CALL(aoti_torch_get_strides(t, &strides));
    FBOPT_CALL(aoti_torch_get_dtype(t, &dtype));
    FBOPT_CALL(aoti_torch_get_data_ptr(t, &data));
    count();
  }
  Meta(const Tensor& t) : Meta(t.get()) {}
  Meta(int64_t dim, int64_t* sizes, int64_t* strides, int32_t dtype, void* data, Device device)
      : dim(dim), sizes(sizes), strides(strides), dtype(dtype), data(data), device(device) {
    count();
  }
  // Leaves out the first dimension: what is left is the first slice of a stack.
  void take_slice() {
    --dim, ++sizes, ++strides;
    count();
  }

 private:
  void count() {
    numel = 1;
    for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
  }
};

// Thrown, before anything is changed, where a call that came without handles needs one.
struct NeedsHandle {};

// A `Tensor` argument: its facts, and the handle they were read from, if there is one.
class Argument : public Meta {
 public:
  explicit Argument(AtenTensorHandle owned) : Meta(owned), owner_(owned) {}
  explicit Argument(const Meta& facts) : Meta(facts) {}

 private:
  std::optional<Tensor> owner_;
};

// What an op returns: a number, or several in a shape.
struct Numbers {
  std::vector<double> values;
  std::vector<int64_t> shape;
};

// Facts and handles of a list. A torch::stable::Tensor each would add a shared_ptr control block:
// for 1,000 small tensors that costs more than the arithmetic.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t n = 0;
    FBOPT_CALL(torch_list_size(list, &n));
    handles_.reserve(n);
    metas_.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      StableIValue item{};
      FBOPT_CALL(torch_list_get_item(list, i, &item));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
      metas_.emplace_back(handles_.back());
    }
    FBOPT_CALL(torch_delete_list(list));
  }
  explicit TensorList(std::vector<Meta> metas) : metas_(std::move(metas)) {}
  TensorList(TensorList&&) noexcept = default;
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    for (AtenTensorHandle h : handles_) aoti_torch_delete_tensor_object(h);
  }

  int64_t size() const { return static_cast<int64_t>(metas_.size()); }
  bool empty() const { return metas_.empty(); }
  const Meta& operator[](int64_t i) const { return metas_[i]; }
  AtenTensorHandle handle(int64_t i) const {
    if (handles_.empty()) throw NeedsHandle{};
    return handles_[i];
  }

 private:
  std::vector<AtenTensorHandle> handles_;
  std::vector<Meta> metas_;
};

// The chunks of a call: those of stacks, or one without a dimension for it.
struct Chunks {
  int64_t count = 1;
  bool stacked = false;

  // The shape of a number for each chunk, or of some.
  std::vector<int64_t> shape(std::vector<int64_t> some = {}) const {
    if (stacked) some.push_back(count);
    return some;
  }

  // Makes of a tensor of the call the one of its first chunk. Returns whether those of the others
  // follow it in memory.
  bool take_first(const char* name, int64_t i, Meta& t) const {
    if (!stacked) return true;
    FBOPT_CHECK(t.dim > 0 && *t.sizes == count, name, "[", i, "] must be a stack of ", count,
                " slices, one for each chunk: its first dimension must be ", count);
    const int64_t stride = *t.strides;
    t.take_slice();
    return count == 1 || stride == t.numel;
  }
};

inline bool same_shape(const Meta& a, const Meta& b) {
  if (a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

// Same element at the same offset: strides agree wherever a dimension has more than one index.
inline bool same_layout(const Meta& a, const Meta& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// Non-overlapping and without gaps, in any order of dimensions: the ABI's is_contiguous() knows no
// memory format, so channels_last has to be recognised by its strides.
inline bool is_dense(const Meta& t) {
  int64_t expected = 1;
  for (int64_t covered = 1; covered < t.numel; covered = expected) {
    int64_t d = 0;
    while (d < t.dim && (t.sizes[d] == 1 || t.strides[d] != expected)) ++d;
    if (d == t.dim) return false;
    expected *= t.sizes[d];
  }
  return true;
}

inline Tensor borrow(AtenTensorHandle t) {
  AtenTensorHandle copy = nullptr;
  FBOPT_CALL(aoti_torch_new_tensor_handle(t, &copy));
  return Tensor(copy);
}

inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// A fresh tensor, its elements not set.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype, const Device& device) {
  AtenTensorHandle fresh = nullptr;
  FBOPT_CALL(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &fresh));
  return Tensor(fresh);
}

// The same, 0-dim or 1-D.
inline Tensor fresh(std::initializer_list<int64_t> size, ScalarType dtype, const Device& device) {
  const int64_t stride = 1;
  return empty_strided(static_cast<int64_t>(size.size()), size.begin(), &stride, code_of(dtype),
                       device);
}

inline bool is_contiguous(const Meta& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim; d-- > 0; expected *= t.sizes[d])
    if (t.sizes[d] != 1 && t.strides[d] != expected && t.numel > 0) return false;
  return true;
}

// A copy with its elements in row-major order.
inline Tensor row_major(AtenTensorHandle t) {
  const Meta meta(t);
  std::vector<int64_t> strides(meta.dim);
  int64_t stride = 1;
  for (int64_t d = meta.dim; d-- > 0; stride *= meta.sizes[d]) strides[d] = stride;
  Tensor copy = empty_strided(meta.dim, meta.sizes, strides.data(), meta.dtype, meta.device);
  torch::stable::copy_(copy, borrow(t));
  return copy;
}

// Tensors that lie one after the other in a flat buffer begin at multiples of this many elements:
// 16-byte accesses are then aligned for every dtype.
constexpr int64_t kAlign = 16;
inline int64_t aligned(int64_t offset) { return (offset + kAlign - 1) / kAlign * kAlign; }

// The memory layout of every slot of a call: that of its first list, or a dense stand-in for it. Of
// stacks that of a slice.
class Layout {
 public:
  explicit Layout(const TensorList& list, const Chunks& chunks = {}) {
    metas_.reserve(list.size());
    for (int64_t i = 0; i < list.size(); ++i) {
      metas_.push_back(list[i]);
      chunks.take_first("tensors", i, metas_.back());
      if (is_dense(metas_.back())) continue;
      Tensor own = borrow(list.handle(i));
      if (chunks.stacked) own = torch::stable::select(own, 0, 0);
      stand_ins_.push_back(torch::stable::empty_like(own));
      metas_.back() = Meta(stand_ins_.back().get());
    }
  }
  const Meta& operator[](int64_t i) const { return metas_[i]; }
  int64_t size() const { return static_cast<int64_t>(metas_.size()); }
  int64_t total() const {
    int64_t sum = 0;
    for (const Meta& m : metas_) sum += m.numel;
    return sum;
  }

 private:
  std::vector<Meta> metas_;
  std::vector<Tensor> stand_ins_;
};

// A flat buffer over all slots, with one slice of each slot for every chunk: where each begins, and
// the number of elements of all.
struct Flat {
  std::vector<int64_t> starts;
  int64_t size = 0;

  Flat(const Layout& layout, const Chunks& chunks) {
    starts.reserve(layout.size());
    for (int64_t i = 0; i < layout.size(); ++i) {
      starts.push_back(aligned(size));
      size = starts.back() + layout[i].numel * chunks.count;
    }
  }
};

// Linear pointers into one list; the slices of a stack lie one after the other. A tensor that lies
// otherwise in memory than its slot is staged through a dense copy; write_back() returns the staged
// results.
class Operand {
 public:
  Operand(const char* name, const TensorList& list, const Layout& layout, ScalarType dtype,
          const Chunks& chunks = {})
      : list_(list), layout_(layout) {
    FBOPT_CHECK(list.size() == layout.size(), name, " has ", list.size(), " tensors, expected ",
                layout.size());
    const int32_t expected = code_of(dtype);
    pointers_.reserve(list.size());
    for (int64_t i = 0; i < list.size(); ++i) {
      Meta meta = list[i];
      const bool in_row = chunks.take_first(name, i, meta);
      FBOPT_CHECK(meta.dtype == expected, name, "[", i, "] has another dtype than the op expects");
      FBOPT_CHECK(same_shape(meta, layout[i]), name, "[", i,
                  "] has another shape than the tensor it belongs to",
                  chunks.stacked ? ", after the dimension of the chunks" : "");
      FBOPT_CHECK(meta.device == layout[i].device, name, "[", i,
                  "] is on another device than the tensor it belongs to");
      pointers_.push_back(in_row && same_layout(meta, layout[i]) ? meta.data : stage(i, chunks));
    }
  }

  // Slice k of tensor i.
  template <class T>
  T* at(int64_t i, int64_t k = 0) const {
    return static_cast<T*>(pointers_[i]) + k * layout_[i].numel;
  }
  const std::vector<void*>& pointers() const { return pointers_; }

  void write_back() {
    for (auto& [i, copy] : staged_) {
      Tensor target = borrow(list_.handle(i));
      torch::stable::copy_(target, copy);
    }
  }

 private:
  void* stage(int64_t i, const Chunks& chunks) {
    const Meta& slot = layout_[i];
    std::vector<int64_t> sizes(slot.sizes, slot.sizes + slot.dim);
    std::vector<int64_t> strides(slot.strides, slot.strides + slot.dim);
    if (chunks.stacked) {
      sizes.insert(sizes.begin(), chunks.count);
      strides.insert(strides.begin(), slot.numel);
    }
    Tensor copy = empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                list_[i].dtype, slot.device);
    torch::stable::copy_(copy, borrow(list_.handle(i)));
    void* data = copy.data_ptr();
    staged_.emplace_back(i, std::move(copy));
    return data;
  }

  const TensorList& list_;
  const Layout& layout_;
  std::vector<void*> pointers_;
  std::vector<std::pair<int64_t, Tensor>> staged_;
};

inline ScalarType dtype_of(const Meta& t) {
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(t.dtype));
}

inline ScalarType dtype_of(const TensorList& list, ScalarType if_empty = ScalarType::Float) {
  return list.empty() ? if_empty : dtype_of(list[0]);
}

// Sums of float64 are kept in float64, all others in float32.
inline ScalarType accumulator_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type at hand.
template <class F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      FBOPT_CHECK(false, "fbopt takes float32, float64, bfloat16 and float16 tensors");
  }
}

}  // namespace fbopt

namespace torch::stable::detail {
template <>
struct FromImpl<fbopt::Numbers> {
  static StableIValue call(const fbopt::Numbers& numbers, uint64_t, bool) {
    using torch::headeronly::ScalarType;
    Tensor t = empty(numbers.shape, ScalarType::Double);
    std::copy(numbers.values.begin(), numbers.values.end(),
              static_cast<double*>(t.mutable_data_ptr()));
    return from(t);
  }
};
template <>
struct ToImpl<fbopt::Argument> {
  static fbopt::Argument call(StableIValue value, uint64_t, bool) {
    return fbopt::Argument(to<AtenTensorHandle>(value));
  }
};
template <>
struct ToImpl<fbopt::TensorList> {
  static fbopt::TensorList call(StableIValue value, uint64_t, bool) {
    return fbopt::TensorList(to<StableListHandle>(value));
  }
};
}  // namespace torch::stable::detail
