// Ops called from Python on plain tensors of the CPU, past torch's dispatcher, whose handles cost
// more than the arithmetic on small tensors: DLPack's C exchange says where a tensor lies. A call
// that needs more of torch returns NotImplemented, before anything is changed.
#pragma once

#include <Python.h>

#include <exception>
#include <tuple>
#include <type_traits>

#include "stable_abi.h"

namespace fbopt::direct {

// The facts about a tensor. Throws NeedsHandle where they do not say how to read it: of a subclass,
// on another device, of another dtype than the ops take, sparse, or lazily negated.
Meta meta_of(PyObject* tensor, bool may_be_strided);
// Whether modes of torch want to see every op.
bool is_watched();
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
    if (x == nullptr || (!PyList_Check(x) && !PyTuple_Check(x))) throw NeedsHandle{};
    std::vector<Meta> metas;
    metas.reserve(PySequence_Fast_GET_SIZE(x));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(x); ++i)
      metas.push_back(meta_of(PySequence_Fast_GET_ITEM(x, i), false));
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

// Lets other threads of Python run during a long call, and keeps its tensors, which these could
// take out of their lists.
class Unlocked {
 public:
  Unlocked(bool is_long, PyObject* const* args, size_t count) {
    if (!is_long) return;
    for (size_t i = 0; i < count; ++i)
      if (args[i] != nullptr && PyList_Check(args[i])) kept_.push_back(PyList_AsTuple(args[i]));
    state_ = PyEval_SaveThread();
  }
  ~Unlocked() {
    if (state_ == nullptr) return;
    PyEval_RestoreThread(state_);
    for (PyObject* tensors : kept_) Py_XDECREF(tensors);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_ = nullptr;
  std::vector<PyObject*> kept_;
};

inline bool is_long(const TensorList& list) {
  constexpr int64_t kLong = 1 << 17;  // elements, some tenths of a millisecond
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
    const Unlocked unlocked((is_long(std::get<I>(all)) || ...), args, sizeof...(I));
    return op(std::move(std::get<I>(all))...);
  };
  if constexpr (std::is_void_v<R>) {
    call();
    Py_RETURN_NONE;
  } else {
    return to_python(call());
  }
}

template <class R, class... A>
PyObject* run(R (*op)(A...), PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t most = sizeof...(A);
  if (count > most || is_watched()) throw NeedsHandle{};
  PyObject* all[most] = {};
  std::copy(args, args + count, all);
  return run(op, all, std::index_sequence_for<A...>{});
}

template <auto op>
PyObject* method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return run(op, args, count);
  } catch (const NeedsHandle&) {
    Py_RETURN_NOTIMPLEMENTED;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// The ops of a file, for the Python module; add_methods() adds those of all files to it, and
// alike().
using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
struct Ops {
  Ops(std::initializer_list<std::pair<const char*, Method>> methods);
};
bool add_methods(PyObject* module);

}  // namespace fbopt::direct
