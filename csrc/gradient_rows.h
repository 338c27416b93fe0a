// Gradients as rows, for clipping row by row on any device.
#pragma once

#include "tensor_checks.h"

namespace pyft {

struct RowShape {
  int64_t rows, length;
};

// Of a tensor whose first dimension is the slowest in memory; throws for others. One of one dimension or none is one
// row, as in Brock et al. 2021.
inline RowShape row_shape(const Tensor& tensor, const char* list, size_t index) {
  if (tensor.dim() <= 1) {
    return {1, tensor.numel()};
  }
  const int64_t rows = tensor.size(0), length = rows == 0 ? 0 : tensor.numel() / rows;
  STD_TORCH_CHECK(rows <= 1 || length == 0 || tensor.stride(0) == length, element(list, index), " has sizes ",
                  to_string(tensor.sizes()), " and strides ", to_string(tensor.strides()),
                  ", so its rows are not contiguous; pyft.ops.agc_grads_ takes any layout");
  return {rows, length};
}

inline void check_same_sizes(const Tensor& grad, const Tensor& param, size_t index) {
  bool same = grad.dim() == param.dim();
  for (int64_t d = 0; same && d < grad.dim(); ++d) {
    same = grad.size(d) == param.size(d);
  }
  STD_TORCH_CHECK(same, element("grads", index), " has sizes ", to_string(grad.sizes()), " but ",
                  element("params", index), " has sizes ", to_string(param.sizes()));
}

}  // namespace pyft
