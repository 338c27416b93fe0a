// A list of tensors given to an op, as the table in device memory that its kernels read.
#pragma once

#include <vector>

#include "cuda_table.h"
#include "grad_norm_cuda.h"
#include "tensor_checks.h"

namespace pyft {

// Dense fp32, bf16 or fp16 tensors on one GPU, at least one; throws, naming list[index], for others.
class TensorList {
 public:
  TensorList(const std::vector<Tensor>& tensors, const char* list) {
    STD_TORCH_CHECK(!tensors.empty(), list, " must not be empty");
    std::vector<DeviceFloats> floats;
    std::vector<int64_t> numels;
    for (size_t i = 0; i < tensors.size(); ++i) {
      STD_TORCH_CHECK(on_cuda(tensors[i]) && together(tensors[0], tensors[i]), element(list, i), " must be on ",
                      kCudaDevice, ", the same as ", element(list, 0));
      const FloatData data = dense_floats(tensors[i], list, i);
      floats.push_back({data.data, static_cast<int64_t>(data.format)});
      numels.push_back(tensors[i].numel());
    }
    DeviceChunkTable table = cut_for_device(numels);
    num_chunks_ = static_cast<int64_t>(table.chunks.size());
    chunks_.put(std::move(table.chunks), tensors[0]);
    begin_.put(std::move(table.begin), tensors[0]);
    floats_.put(std::move(floats), tensors[0]);
  }

  DeviceFloatsTable table() const {
    return {chunks_.data(), num_chunks_, floats_.data(), begin_.data(), floats_.size()};
  }

 private:
  int64_t num_chunks_ = 0;
  DeviceTable<DeviceChunk> chunks_;
  DeviceTable<int64_t> begin_;
  DeviceTable<DeviceFloats> floats_;
};

}  // namespace pyft
