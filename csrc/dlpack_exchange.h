// The part of DLPack 1.3 that looks at a tensor of another library in place: the structures and the table of functions
// behind `type(tensor).__dlpack_c_exchange_api__` (dmlc/dlpack, include/dlpack/dlpack.h). torch's copy of that header
// cannot be included beside the stable ABI; the layout is DLPack's own ABI and fixed for its major version.
#pragma once

#include <cstdint>

namespace pyft::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  // In elements. Both belong to the tensor.
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

// 0, or -1 with an error set in Python.
using LookAt = int (*)(void* tensor, View* view);

struct ExchangeTable {
  uint32_t major_version, minor_version;
  const ExchangeTable* previous;
  void *allocate, *export_tensor, *import_tensor;
  // May be null.
  LookAt look_at;
  void* current_stream;
};

static_assert(sizeof(View) == 48 && sizeof(ExchangeTable) == 56);

}  // namespace pyft::dlpack
