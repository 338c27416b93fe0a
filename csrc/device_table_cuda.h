// Tables in device memory that are copied there when they change: from pinned memory, which torch keeps until the copy
// is over, so that nothing waits.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda_device.h"

namespace pyft {

// Room for `bytes` on the device of `like`.
inline torch::stable::Tensor device_bytes(int64_t bytes, const torch::stable::Tensor& like) {
  return torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, like.device());
}

// Fills `to`, of one dimension, from the host, in the order of the current stream.
inline void copy_to_device(const void* from, torch::stable::Tensor to) {
  torch::stable::Tensor staged = torch::stable::empty({to.numel()}, to.scalar_type(), std::nullopt, std::nullopt,
                                                      to.is_cuda() ? std::optional(true) : std::nullopt);
  std::memcpy(staged.mutable_data_ptr(), from, to.numel() * to.element_size());
  torch::stable::copy_(to, staged, true);
}

// Entries of a plain type.
template <class T>
class DeviceTable {
 public:
  // Whether they had to be copied.
  bool put(std::vector<T> values, const torch::stable::Tensor& like) {
    const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
    if (device_.has_value() && values.size() == values_.size() &&
        std::memcmp(values.data(), values_.data(), bytes) == 0) {
      return false;
    }
    if (!device_.has_value() || values.size() != values_.size()) {
      device_ = device_bytes(bytes, like);
    }
    values_ = std::move(values);
    if (bytes > 0) {
      copy_to_device(values_.data(), *device_);
    }
    return bytes > 0;
  }

  // Room for entries that kernels write.
  void reserve(int64_t count, const torch::stable::Tensor& like) {
    if (!device_.has_value() || device_->numel() != count * static_cast<int64_t>(sizeof(T))) {
      device_ = device_bytes(count * static_cast<int64_t>(sizeof(T)), like);
    }
  }

  T* data() const { return device_.has_value() ? static_cast<T*>(device_->mutable_data_ptr()) : nullptr; }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }

 private:
  std::vector<T> values_;
  std::optional<torch::stable::Tensor> device_;
};

}  // namespace pyft
