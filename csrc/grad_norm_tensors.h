// What the ops over lists of gradients take: dense CPU tensors of the three formats.
#pragma once

#include <vector>

#include "float_formats.h"
#include "tensor_checks.h"

namespace pyft {

// Throws, naming list[index], unless it is a dense fp32, bf16 or fp16 tensor on the CPU.
FloatData checked_data(const Tensor& tensor, const char* list, size_t index);

std::vector<FloatData> checked_data(const std::vector<Tensor>& tensors, const char* list);

std::vector<int64_t> numels_of_list(const std::vector<Tensor>& tensors);

}  // namespace pyft
