// Ops called from Python on plain tensors of the CPU, past torch's dispatcher, whose handles cost
// more than the arithmetic on small tensors: DLPack's C exchange says where a tensor lies. A call
// that needs more of torch returns NotImplemented, before anything is changed.
#pragma once

#include <Python.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>

#include "stable_abi.h"

namespace fbopt::direct {

// The facts about a tensor. Throws NeedsHandle where they do not say how to read it: of a subclass,
// on another device, of another dtype than the ops take, sparse, or lazily negated.
Meta meta_of(PyObject* tensor, bool may_be_strided);
// Whether modes of torch want to see every op.
bool is_watched();
// Whether autograd would record a call with these arguments.
bool is_recorded(PyObject* const* args, Py_ssize_t count);
// Raises the versions of tensors that were written, for backward passes that need them as they
// were. Returns whether that worked.
bool mark_written(PyObject* argument);
PyObject* to_python(const Numbers& numbers);

// The arguments of a call by the types of an op's parameters; null for one that is left out.
template <class T>
struct From;
template <>
struct From<Argument> {
  static Argument call(PyObject* x) {
    if (x == nullptr) throw NeedsHandle{};
    return Argument(meta_of(x, true));
  }
};
template <>
struct From<TensorList> {
  static TensorList call(PyObject* x) {
    if (x == nullptr || !PyTuple_Check(x)) throw NeedsHandle{};  // lists are Held as tuples
    std::vector<Meta> metas;
    metas.reserve(PyTuple_GET_SIZE(x));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i)
      metas.push_back(meta_of(PyTuple_GET_ITEM(x, i), false));
    return TensorList(std::move(metas));
  }
};
template <>
struct From<double> {
  static double call(PyObject* x) {
    if (x == nullptr || (!PyFloat_Check(x) && !PyLong_Check(x))) throw NeedsHandle{};
    const double value = PyFloat_AsDouble(x);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      throw NeedsHandle{};
    }
    return value;
  }
};
template <>
struct From<bool> {
  static bool call(PyObject* x) {
    if (x != nullptr && !PyBool_Check(x)) throw NeedsHandle{};
    return x == Py_True;
  }
};
template <class T>
struct From<std::optional<T>> {
  static std::optional<T> call(PyObject* x) {
    if (x == nullptr || x == Py_None) return std::nullopt;
    return From<T>::call(x);
  }
};

// Lets other threads of Python run during a long call.
class Unlocked {
 public:
  explicit Unlocked(bool is_long) : state_(is_long ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// The arguments of a call, of which lists are tuples: torch's own functions let other threads run,
// which could take tensors out of a list.
template <Py_ssize_t kMost>
class Held {
 public:
  Held(PyObject* const* args, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; ++i) {
      all[i] = args[i];
      if (!PyList_Check(args[i])) continue;
      all[i] = own_[i] = PyList_AsTuple(args[i]);
      if (own_[i] == nullptr) throw std::bad_alloc();
    }
  }
  ~Held() {
    for (PyObject* tensors : own_) Py_XDECREF(tensors);
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  PyObject* all[kMost] = {};

 private:
  PyObject* own_[kMost] = {};
};

constexpr int64_t kLong = 1 << 17;  // elements, some tenths of a millisecond
inline bool is_long(const Argument& t) { return t.numel > kLong; }
inline bool is_long(const TensorList& list) {
  int64_t total = 0;
  for (int64_t i = 0; i < list.size(); ++i) total += list[i].numel;
  return total > kLong;
}
template <class T>
bool is_long(const T&) {
  return false;
}

template <class R, class... A, size_t... I>
PyObject* run(R (*op)(A...), PyObject* const* args, std::index_sequence<I...>) {
  std::tuple<std::decay_t<A>...> all{From<std::decay_t<A>>::call(args[I])...};
  const auto call = [&] {
    const Unlocked unlocked((is_long(std::get<I>(all)) || ...));
    return op(std::move(std::get<I>(all))...);
  };
  if constexpr (std::is_void_v<R>) {
    call();
    Py_RETURN_NONE;
  } else {
    return to_python(call());
  }
}

// `written` has a bit for each argument that the op writes.
template <class R, class... A>
PyObject* run(R (*op)(A...), unsigned written, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t most = sizeof...(A);
  if (count > most || is_watched()) throw NeedsHandle{};
  const Held<most> held(args, count);
  if (is_recorded(held.all, count)) throw NeedsHandle{};
  PyObject* found = run(op, held.all, std::index_sequence_for<A...>{});
  for (Py_ssize_t i = 0; written >> i != 0; ++i)
    if (found != nullptr && (written >> i & 1) != 0 && !mark_written(held.all[i])) Py_CLEAR(found);
  return found;
}

// What a call returns to Python, whatever it throws.
template <class Call>
PyObject* guarded(const Call& call, PyObject* if_needs_handle) {
  try {
    return call();
  } catch (const NeedsHandle&) {
    return Py_NewRef(if_needs_handle);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <auto op, unsigned written = 0>
PyObject* method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([=] { return run(op, written, args, count); }, Py_NotImplemented);
}

// The ops of a file, for the Python module; add_methods() adds those of all files to it, and
// alike().
using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
struct Ops {
  Ops(std::initializer_list<std::pair<const char*, Method>> methods);
};
bool add_methods(PyObject* module);

}  // namespace fbopt::direct
