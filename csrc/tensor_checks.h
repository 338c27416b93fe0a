// The one place for messages about shape, dtype, device and layout of tensors given to an op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "owned_handles.h"

namespace pyft {

using torch::stable::Tensor;

inline std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::string text = "(";
  for (size_t i = 0; i < numbers.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  }
  return text + (numbers.size() == 1 ? ",)" : ")");
}

inline std::string element(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

inline bool same_layout(const Tensor& a, const Tensor& b) { return same_layout(view_of(a.get()), view_of(b.get())); }

// The elements fill numel() places of memory without a gap and without overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<bool> used(sizes.size(), false);
  int64_t expected = 1;
  for (size_t round = 0; round < sizes.size(); ++round) {
    bool found = false;
    for (size_t d = 0; d < sizes.size() && !found; ++d) {
      if (!used[d] && (sizes[d] == 1 || strides[d] == expected)) {
        used[d] = found = true;
        expected *= sizes[d];
      }
    }
    if (!found) {
      return t.numel() == 0;
    }
  }
  return true;
}

// Most tensors are: the general question costs a small tensor's whole norm.
inline bool is_contiguous(const TensorView& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != expected) {
      return false;
    }
    expected *= t.sizes[d];
  }
  return true;
}

// The elements of a dense tensor on any device. Throws, naming list[index], unless they are fp32, bf16 or fp16.
inline FloatData dense_floats(const Tensor& tensor, const char* list, size_t index) {
  STD_TORCH_CHECK(tensor.layout() == torch::headeronly::Layout::Strided, element(list, index),
                  " is sparse; only dense tensors are supported");
  const TensorView view = view_of(tensor.get());
  const std::optional<FloatFormat> format = float_format(view.dtype);
  STD_TORCH_CHECK(format.has_value(), element(list, index),
                  " must be float32, bfloat16 or float16 for the compiled core");
  STD_TORCH_CHECK(is_contiguous(view) || is_dense(tensor), element(list, index), " has sizes ",
                  to_string(tensor.sizes()), " and strides ", to_string(tensor.strides()),
                  ", with gaps or overlaps; the functions of pyft.ops take any layout");
  return {view.data, *format};
}

// Whether two tensors are on one device.
inline bool together(const Tensor& a, const Tensor& b) {
  return view_of(a.get()).device_type == view_of(b.get()).device_type && a.get_device_index() == b.get_device_index();
}

inline void check_fp32_cpu(const Tensor& t, const char* list, size_t index) {
  STD_TORCH_CHECK(t.is_cpu(), element(list, index), " must be on the CPU");
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided, element(list, index),
                  " is sparse; only dense tensors are supported");
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, element(list, index),
                  " must be float32 for the compiled core");
}

inline void check_fp32_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && t.dim() == 2, name,
                  " must be a float32 matrix on the CPU");
}

inline void check_fp32_rows(const Tensor& t, const char* name) {
  check_fp32_matrix(t, name);
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " has strides ", to_string(t.strides()),
                  "; the entries of a row must lie side by side");
}

// The first element of a bias of a linear layer with so many outputs, or null.
inline const float* checked_bias(const std::optional<Tensor>& bias, int64_t outputs) {
  if (!bias.has_value()) {
    return nullptr;
  }
  STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 &&
                      bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->numel() == outputs,
                  "bias must be ", outputs, " contiguous float32 on the CPU");
  return static_cast<const float*>(bias->data_ptr());
}

inline void check_same_layout(const Tensor& reference, const char* reference_list, const Tensor& t, const char* list,
                              size_t index) {
  STD_TORCH_CHECK(same_layout(reference, t), element(list, index), " has sizes ", to_string(t.sizes()), " and strides ",
                  to_string(t.strides()), " but ", element(reference_list, index), " has sizes ",
                  to_string(reference.sizes()), " and strides ", to_string(reference.strides()),
                  "; they must be the same: pyft.ops and pyft.optim accept any layout");
}

inline void check_same_count(size_t expected, const char* expected_list, size_t count, const char* list) {
  STD_TORCH_CHECK(count == expected, list, " has ", count, " tensors but ", expected_list, " has ", expected);
}

}  // namespace pyft
