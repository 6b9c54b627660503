// How ops called directly reach Python's tensors.
#include "direct.h"

#include "dlpack.h"

namespace fbopt::direct {
namespace {

// What is needed of torch; the exchange is null where it has none.
const dlpack::Exchange* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *count_modes = nullptr,
         *is_neg = nullptr, *requires_grad = nullptr, *increment_version = nullptr;

// An element type as torch's ABI numbers it, and as DLPack describes it.
struct Element {
  ScalarType type;
  uint8_t code, bits;
  int32_t number;
};
Element elements[] = {
    {ScalarType::Float, dlpack::kFloat, 32, -1},     {ScalarType::Double, dlpack::kFloat, 64, -1},
    {ScalarType::BFloat16, dlpack::kBfloat, 16, -1}, {ScalarType::Half, dlpack::kFloat, 16, -1},
    {ScalarType::Long, dlpack::kInt, 64, -1},        {ScalarType::Int, dlpack::kInt, 32, -1},
};

int32_t number_of(const dlpack::DataType& t) {
  for (const Element& e : elements)
    if (e.code == t.code && e.bits == t.bits && t.lanes == 1) return e.number;
  throw NeedsHandle{};
}

// An attribute of a module, or of a class in it; null if there is none.
PyObject* attribute(const char* module, const char* name, const char* inner = nullptr) {
  PyObject* found = PyImport_ImportModule(module);
  for (const char* part : {name, inner}) {
    if (found == nullptr || part == nullptr) continue;
    PyObject* next = PyObject_GetAttrString(found, part);
    Py_DECREF(found);
    found = next;
  }
  PyErr_Clear();
  return found;
}

// Whether a function without further arguments, or of one tensor, returns another value.
bool differs(PyObject* found, PyObject* expected) {
  const int same = found == nullptr ? 0 : PyObject_RichCompareBool(found, expected, Py_EQ);
  Py_XDECREF(found);
  PyErr_Clear();
  return same != 1;
}

bool is_floating(int32_t number) {
  return std::any_of(std::begin(elements), std::end(elements), [=](const Element& e) {
    return e.number == number && e.code != dlpack::kInt;
  });
}

bool alike(const TensorList& list, const TensorList& others) {
  if (list.size() != others.size()) return false;
  for (int64_t i = 0; i < list.size(); ++i) {
    const Meta &a = list[i], &b = others[i];
    if (a.dtype != list[0].dtype || b.dtype != a.dtype || !is_floating(a.dtype)) return false;
    if (!same_shape(a, b) || !same_layout(a, b) || !is_dense(a)) return false;
  }
  return true;
}

// alike(list, *others): whether all are plain tensors of the CPU and of one dtype that the ops
// take, and lie in memory without gaps, each of the others as that in the list. A list alone is
// held against itself.
PyObject* alike_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto compare = [=] {
    if (count < 1) throw NeedsHandle{};
    const Held<1> held(args, 1);
    const TensorList list = From<TensorList>::call(held.all[0]);
    bool found = count > 1 || alike(list, list);
    for (Py_ssize_t i = 1; found && i < count; ++i) {
      const Held<1> other(args + i, 1);
      found = alike(list, From<TensorList>::call(other.all[0]));
    }
    return PyBool_FromLong(found);
  };
  return guarded(compare, Py_False);
}

std::vector<PyMethodDef>& methods() {
  static std::vector<PyMethodDef> all;
  return all;
}

}  // namespace

Meta meta_of(PyObject* tensor, bool may_be_strided) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (exchange == nullptr || (type != tensor_type && type != parameter_type)) throw NeedsHandle{};
  dlpack::Tensor t;
  if (exchange->borrow(tensor, &t) != 0) {
    PyErr_Clear();
    throw NeedsHandle{};
  }
  if (t.device.type != dlpack::kCpu) throw NeedsHandle{};
  const Meta meta(t.dim, t.shape, t.strides, number_of(t.dtype),
                  static_cast<char*>(t.data) + t.byte_offset,
                  Device(aoti_torch_device_type_cpu(), -1));
  if (t.data == nullptr && meta.numel > 0) throw NeedsHandle{};  // zeros without memory
  // Imaginary parts of conjugates are negated lazily. These leave out every second number, so that
  // as tensors of several elements, in a list, they are not dense, which needs a handle anyway. To
  // ask every tensor would cost as much as the rest; as_strided() could make a dense one.
  if ((may_be_strided || meta.numel < 2) && differs(PyObject_CallOneArg(is_neg, tensor), Py_False))
    throw NeedsHandle{};
  return meta;
}

bool is_watched() {
  if (exchange == nullptr) return true;  // a torch without what direct calls need
  static PyObject* const none = PyLong_FromLong(0);
  return differs(PyObject_CallNoArgs(count_modes), none);
}

bool is_recorded(PyObject* const* args, Py_ssize_t count) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  const auto wants = [](PyObject* x) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (type != tensor_type && type != parameter_type) return false;
    return differs(PyObject_GetAttr(x, requires_grad), Py_False);
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (wants(args[i])) return true;
    for (Py_ssize_t k = 0; PyTuple_Check(args[i]) && k < PyTuple_GET_SIZE(args[i]); ++k)
      if (wants(PyTuple_GET_ITEM(args[i], k))) return true;
  }
  return false;
}

bool mark_written(PyObject* argument) {
  PyObject* tensors = PyTuple_Check(argument) ? Py_NewRef(argument) : PyTuple_Pack(1, argument);
  PyObject* done = tensors == nullptr ? nullptr : PyObject_CallOneArg(increment_version, tensors);
  Py_XDECREF(tensors);
  Py_XDECREF(done);
  return done != nullptr;
}

PyObject* to_python(const Numbers& numbers) {
  struct Own {
    std::vector<double> values;
    std::vector<int64_t> shape, strides;
    dlpack::ManagedTensor managed;
  };
  auto* own = new Own{numbers.values, numbers.shape, numbers.shape, {}};
  int64_t stride = 1;
  for (size_t d = own->shape.size(); d-- > 0; stride *= own->shape[d]) own->strides[d] = stride;
  own->managed = {{dlpack::kMajor, dlpack::kMinor},
                  own,
                  [](dlpack::ManagedTensor* t) { delete static_cast<Own*>(t->context); },
                  0,
                  {own->values.data(),
                   {dlpack::kCpu, 0},
                   static_cast<int32_t>(own->shape.size()),
                   {dlpack::kFloat, 64, 1},
                   own->shape.data(),
                   own->strides.data(),
                   0}};
  void* tensor = nullptr;
  if (exchange->from_managed(&own->managed, &tensor) != 0) return nullptr;
  return static_cast<PyObject*>(tensor);
}

Ops::Ops(std::initializer_list<std::pair<const char*, Method>> ops) {
  for (const auto& [name, method] : ops)
    methods().push_back({name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method)),
                         METH_FASTCALL, nullptr});
}

bool add_methods(PyObject* module) {
  for (Element& e : elements) e.number = code_of(e.type);
  tensor_type = attribute("torch", "Tensor");
  parameter_type = attribute("torch.nn", "Parameter");
  count_modes = attribute("torch._C", "_len_torch_dispatch_stack");
  is_neg = attribute("torch", "Tensor", "is_neg");
  requires_grad = PyUnicode_InternFromString("requires_grad");
  increment_version = attribute("torch._C", "_increment_version");
  PyObject* capsule = attribute("torch", "Tensor", "__dlpack_c_exchange_api__");
  if (capsule != nullptr && count_modes != nullptr && is_neg != nullptr && tensor_type != nullptr &&
      increment_version != nullptr) {
    void* found = PyCapsule_GetPointer(capsule, dlpack::kExchange);
    PyErr_Clear();
    exchange = static_cast<const dlpack::Exchange*>(found);
    if (exchange != nullptr && exchange->version.major != dlpack::kMajor) exchange = nullptr;
  }
  static const Ops others{{"alike", alike_method}};
  methods().push_back({});
  return PyModule_AddFunctions(module, methods().data()) == 0;
}

}  // namespace fbopt::direct
