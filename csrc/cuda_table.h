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

// Fills `to`, of one dimension, from the host, in the order of the current stream. Gives the memory that is copied: a
// captured graph reads it again in every replay, so it must be kept.
inline torch::stable::Tensor copy_to_device(const void* from, torch::stable::Tensor to) {
  torch::stable::Tensor staged = torch::stable::empty({to.numel()}, to.scalar_type(), std::nullopt, std::nullopt,
                                                      to.is_cuda() ? std::optional(true) : std::nullopt);
  std::memcpy(staged.mutable_data_ptr(), from, to.numel() * to.element_size());
  torch::stable::copy_(to, staged, true);
  return staged;
}

// For ops, whose tables end with the call: a graph would read them in every replay.
inline void refuse_capture(cudaStream_t stream, const char* op) {
#ifndef PYFT_CUDA_EMULATION
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream, &status), op);
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone, "pyft::", op,
                  " cannot be captured in a CUDA graph; steps of pyft.optim can, with their clip_norm");
#endif
}

// Entries of a plain type.
template <class T>
class DeviceTable {
 public:
  // The memory that was copied from, if entries have changed, or `anyway`: then from where they were before, since a
  // capture is no time to allocate.
  std::optional<torch::stable::Tensor> put(std::vector<T> values, const torch::stable::Tensor& like,
                                           bool anyway = false) {
    const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
    const bool fits = device_.has_value() && values.size() == values_.size();
    if (fits && (bytes == 0 || std::memcmp(values.data(), values_.data(), bytes) == 0)) {
      if (!anyway || bytes == 0) {
        return std::nullopt;
      }
      torch::stable::copy_(*device_, *staged_, true);
      return staged_;
    }
    if (!fits) {
      device_ = device_bytes(bytes, like);
    }
    values_ = std::move(values);
    staged_ = bytes > 0 ? std::optional(copy_to_device(values_.data(), *device_)) : std::nullopt;
    return staged_;
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
  std::optional<torch::stable::Tensor> device_, staged_;
};

}  // namespace pyft
