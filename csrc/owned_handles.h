// References to tensors held for the length of one call. torch::stable::Tensor costs a shared_ptr for each, which over
// 400 parameters and their gradients is a tenth of a small step.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "float_formats.h"

namespace pyft {

class OwnedHandles {
 public:
  explicit OwnedHandles(size_t capacity) { handles_.reserve(capacity); }
  OwnedHandles(const OwnedHandles&) = delete;
  OwnedHandles& operator=(const OwnedHandles&) = delete;
  OwnedHandles(OwnedHandles&& other) noexcept = default;
  OwnedHandles& operator=(OwnedHandles&&) = delete;
  ~OwnedHandles() {
    for (AtenTensorHandle handle : handles_) {
      if (handle != nullptr) {
        aoti_torch_delete_tensor_object(handle);
      }
    }
  }

  void take(AtenTensorHandle handle) { handles_.push_back(handle); }
  // Gives one reference up early. May be called from any thread, once for each.
  void release(size_t i) {
    aoti_torch_delete_tensor_object(handles_[i]);
    handles_[i] = nullptr;
  }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// What a step must know of a tensor. Pointers are valid while the tensor lives.
struct TensorView {
  void* data;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dtype, device_type;

  bool is_cpu() const {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    return device_type == cpu;
  }
  bool is_fp32_cpu() const {
    static const int32_t fp32 = aoti_torch_dtype_float32();
    return dtype == fp32 && is_cpu();
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) {
      count *= sizes[d];
    }
    return count;
  }
};

inline TensorView view_of(AtenTensorHandle tensor) {
  TensorView view;
  int64_t *sizes = nullptr, *strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &view.data));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &view.dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &view.dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &view.device_type));
  view.sizes = sizes;
  view.strides = strides;
  return view;
}

// The storage format of a dtype, if it is one of the three.
inline std::optional<FloatFormat> float_format(int32_t dtype) {
  static const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       fp16 = aoti_torch_dtype_float16();
  if (dtype == fp32) {
    return FloatFormat::fp32;
  }
  if (dtype == bf16) {
    return FloatFormat::bf16;
  }
  return dtype == fp16 ? std::optional(FloatFormat::fp16) : std::nullopt;
}

inline std::vector<TensorView> views_of(const OwnedHandles& tensors) {
  std::vector<TensorView> views(tensors.size());
  for (size_t i = 0; i < views.size(); ++i) {
    views[i] = view_of(tensors[i]);
  }
  return views;
}

// Where torch keeps what view_of reads, so that it can be fetched before it is read: nothing is taken from there. Only
// a hint: the record's address is the first word behind the handle, and addresses of what belongs to it are among the
// first words of the record. If that should change in another torch, a prefetch of any address does no harm.
class Record {
 public:
  // The tensor must outlive this.
  explicit Record(AtenTensorHandle tensor) : Record(*reinterpret_cast<const char* const*>(tensor)) {}
  explicit Record(const char* record) : record_(record) {}

  void fetch() const {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(record_ + 64 * line);
    }
  }
  // Reads the record, which should have been fetched.
  void fetch_storage() const { __builtin_prefetch(word(2) + 16); }
  void fetch_autograd() const { __builtin_prefetch(word(3)); }
  void fetch_version() const { __builtin_prefetch(word(5)); }

 private:
  const char* word(int place) const { return reinterpret_cast<const char* const*>(record_)[place]; }

  const char* record_;
};

inline bool is_one_number(const TensorView& t) {
  for (int64_t d = 0; d < t.dim; ++d) {
    if (t.sizes[d] != 1) {
      return false;
    }
  }
  return true;
}

// Sizes, then strides.
inline std::vector<int64_t> layout_of(const TensorView& t) {
  std::vector<int64_t> layout(t.sizes, t.sizes + t.dim);
  layout.insert(layout.end(), t.strides, t.strides + t.dim);
  return layout;
}

inline bool has_layout(const TensorView& t, const std::vector<int64_t>& layout) {
  return layout.size() == static_cast<size_t>(2 * t.dim) && std::equal(t.sizes, t.sizes + t.dim, layout.begin()) &&
         std::equal(t.strides, t.strides + t.dim, layout.begin() + t.dim);
}

// Sizes are equal, and strides are wherever a dimension has more than one entry.
inline bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.dim != b.dim) {
    return false;
  }
  bool same_strides = true, empty = false;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != b.sizes[d]) {
      return false;
    }
    empty = empty || a.sizes[d] == 0;
    same_strides = same_strides && (a.sizes[d] == 1 || a.strides[d] == b.strides[d]);
  }
  return same_strides || empty;
}

}  // namespace pyft
