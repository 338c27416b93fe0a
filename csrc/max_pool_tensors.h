// Max pooling over two dimensions that keeps one byte for each output: what both devices check. Kernels: constructed
// for the op's name, a tensor and the shape, it runs the op on the device of the tensor; kDevice names that device,
// is_here() knows it; k16Bits: whether it takes bf16 and fp16, too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "max_pool_math.h"
#include "tensor_checks.h"

namespace pyft {

// Whether the elements lie as (N, H, W, C) or as (N, C, H, W), whatever the strides of dimensions of size 1.
inline bool lies_as(const Tensor& x, bool channels_last) {
  const int order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (int d : order[channels_last ? 1 : 0]) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

// window: kernel, stride, padding, dilation, each as (height, width).
inline PoolShape shape_of(int64_t in_height, int64_t in_width, int64_t out_height, int64_t out_width,
                          const std::vector<int64_t>& window) {
  STD_TORCH_CHECK(window.size() == 8, "window must be 8 numbers, got ", window.size());
  for (size_t i = 0; i < window.size(); ++i) {
    STD_TORCH_CHECK(window[i] >= (i == 4 || i == 5 ? 0 : 1), "window[", i, "] must not be ", window[i]);
  }
  STD_TORCH_CHECK(window[0] * window[1] <= 256, "windows of at most 256 places fit one byte, got ",
                  window[0] * window[1]);
  const PoolShape shape{{in_height, out_height, window[0], window[2], window[4], window[6]},
                        {in_width, out_width, window[1], window[3], window[5], window[7]}};
  for (const PoolAxis& axis : {shape.height, shape.width}) {
    STD_TORCH_CHECK(axis.in > 0 && axis.out > 0, "the input and the output must not be empty");
    // Each window must meet the input, or there is nothing for its output to be; torch then writes out of bounds.
    for (int64_t o = 0; o < axis.out; ++o) {
      STD_TORCH_CHECK(axis.first(o) < axis.kernel && axis.inside(o, axis.first(o)), "window ", o,
                      " has no place inside the input of size ", axis.in);
    }
  }
  return shape;
}

template <class Kernels>
struct MaxPoolOps {
  static void check_image(const Tensor& x, const char* name) {
    const std::optional<FloatFormat> format = float_format(view_of(x.get()).dtype);
    STD_TORCH_CHECK(x.dim() == 4 && Kernels::is_here(x) && format && (*format == FloatFormat::fp32 || Kernels::k16Bits),
                    name, " must be (N, C, H, W) float32 ", Kernels::k16Bits ? "or of 16 bits " : "", "on ",
                    Kernels::kDevice, " for the compiled core");
  }

  static FloatData floats(const Tensor& x) { return {x.data_ptr(), *float_format(view_of(x.get()).dtype)}; }

  // Whether channels are last in memory, for the input side of the pool and the output side.
  static bool channels_last(const Tensor& in, const Tensor& out, const char* in_name, const char* out_name) {
    check_image(in, in_name);
    check_image(out, out_name);
    STD_TORCH_CHECK(together(in, out) && in.scalar_type() == out.scalar_type(), in_name, " and ", out_name,
                    " must be on one device and of one dtype");
    STD_TORCH_CHECK(in.size(0) == out.size(0) && in.size(1) == out.size(1), out_name, " must have the N and C of ",
                    in_name);
    const bool last = !lies_as(in, false);
    STD_TORCH_CHECK(lies_as(in, last) && lies_as(out, last), in_name, " has strides ", to_string(in.strides()), " and ",
                    out_name, " ", to_string(out.strides()),
                    "; both must be contiguous, or both have their channels last in memory");
    return last;
  }

  // y: an empty tensor of the output's size in the memory format of x.
  static Tensor offsets(const Tensor& x, Tensor y, std::vector<int64_t> window) {
    const bool last = channels_last(x, y, "x", "y");
    const int64_t images = x.size(0), channels = x.size(1);
    const PoolShape shape = shape_of(x.size(2), x.size(3), y.size(2), y.size(3), window);
    Tensor at = torch::stable::new_empty(y, {y.numel()}, torch::headeronly::ScalarType::Byte);
    Kernels("max_pool_offsets", x, shape)
        .pool(floats(x), y.mutable_data_ptr(), static_cast<uint8_t*>(at.mutable_data_ptr()),
              images * (last ? 1 : channels), last ? channels : 1);
    return at;
  }

  // dx: an empty tensor of the input's size in the memory format of grad.
  static void backward_(const Tensor& grad, const Tensor& at, Tensor dx, std::vector<int64_t> window) {
    const bool last = channels_last(dx, grad, "dx", "grad");
    const int64_t images = grad.size(0), channels = grad.size(1);
    STD_TORCH_CHECK(together(at, grad) && at.is_contiguous() && at.numel() == grad.numel() &&
                        at.scalar_type() == torch::headeronly::ScalarType::Byte,
                    "at must be ", grad.numel(), " contiguous uint8 on the device of grad");
    const PoolShape shape = shape_of(dx.size(2), dx.size(3), grad.size(2), grad.size(3), window);
    Kernels("max_pool_backward_", grad, shape)
        .backward(floats(grad), static_cast<const uint8_t*>(at.data_ptr()), dx.mutable_data_ptr(),
                  images * (last ? 1 : channels), last ? channels : 1);
  }

  template <class Library>
  static void add_to(Library& library) {
    library.impl("max_pool_offsets", TORCH_BOX(&offsets));
    library.impl("max_pool_backward_", TORCH_BOX(&backward_));
  }
};

}  // namespace pyft
