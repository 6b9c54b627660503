// DLPack's C structures, version 1, as far as they are used here; torch's own header of them cannot
// be included with its stable ABI. Source: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace fbopt::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 1;
constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// The attribute __dlpack_c_exchange_api__ of a tensor's type: a capsule of this name. Functions
// return 0, or leave an error of Python.
constexpr const char* kExchange = "dlpack_exchange_api";
struct Exchange {
  Version version;
  Exchange* previous;
  void (*allocate)();
  void (*to_managed)();
  int (*from_managed)(ManagedTensor*, void** object);
  int (*borrow)(void* object, Tensor*);
  void (*current_stream)();
};

}  // namespace fbopt::dlpack
