// Activations that keep one bit for each element, in memory order, for their backward pass: what both devices check and
// allocate. Kernels: constructed for the op's name and x, it runs the op on the device of x; kDevice names that device,
// is_here() knows it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "bit_masks_math.h"
#include "tensor_checks.h"

namespace pyft {

template <class Kernels>
struct BitMaskOps {
  static int64_t bytes_for(int64_t numel) { return (numel + 7) / 8; }

  static Tensor new_bits(const Tensor& x) {
    return torch::stable::new_empty(x, {bytes_for(x.numel())}, torch::headeronly::ScalarType::Byte);
  }

  static FloatData checked_input(const Tensor& x) {
    STD_TORCH_CHECK(Kernels::is_here(x), "x must be on ", Kernels::kDevice, " for the compiled core");
    return dense_floats(x, "x", 0);
  }

  static const uint8_t* checked_bits(const Tensor& bits, const Tensor& x) {
    STD_TORCH_CHECK(bits.scalar_type() == torch::headeronly::ScalarType::Byte && together(bits, x) &&
                        bits.is_contiguous() && bits.numel() == bytes_for(x.numel()),
                    "bits must be ", bytes_for(x.numel()), " contiguous uint8 on the device of x for ", x.numel(),
                    " elements");
    return static_cast<const uint8_t*>(bits.data_ptr());
  }

  static const float* channel_values(const Tensor& values, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(together(values, x) && values.scalar_type() == torch::headeronly::ScalarType::Float &&
                        values.is_contiguous() && values.numel() == x.size(1),
                    name, " must be ", x.size(1), " contiguous float32 on the device of x, one for each channel");
    return static_cast<const float*>(values.data_ptr());
  }

  // Channels are dimension 1, contiguous or last in memory.
  static ChannelLayout channel_layout(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 2, "x must have dimensions (N, C, ...), got ", to_string(x.sizes()));
    STD_TORCH_CHECK(Kernels::is_here(x) && x.scalar_type() == torch::headeronly::ScalarType::Float,
                    "x must be float32 on ", Kernels::kDevice, " for the compiled core");
    const int64_t channels = x.size(1);
    if (x.is_contiguous()) {
      int64_t inner = 1;
      for (int64_t d = 2; d < x.dim(); ++d) {
        inner *= x.size(d);
      }
      return {channels, inner};
    }
    STD_TORCH_CHECK(is_dense(x) && x.stride(1) == 1 && (x.size(0) == 1 || x.stride(0) * x.size(0) == x.numel()),
                    "x has sizes ", to_string(x.sizes()), " and strides ", to_string(x.strides()),
                    "; its channels must be dimension 1, contiguous or last in memory");
    return {channels, 1};
  }

  static uint8_t* bytes_of(Tensor& bits) { return static_cast<uint8_t*>(bits.mutable_data_ptr()); }

  static std::tuple<Tensor, Tensor> relu_bits(const Tensor& x) {
    const FloatData data = checked_input(x);
    Tensor y = torch::stable::empty_like(x), bits = new_bits(x);
    Kernels("relu_bits", x).relu(data, y.mutable_data_ptr(), bytes_of(bits));
    return {y, bits};
  }

  static Tensor relu_bits_(Tensor x) {
    const FloatData data = checked_input(x);
    Tensor bits = new_bits(x);
    Kernels("relu_bits_", x).relu(data, x.mutable_data_ptr(), bytes_of(bits));
    return bits;
  }

  static Tensor pack_bits(const Tensor& x, int64_t test, double low, double high) {
    STD_TORCH_CHECK(test >= 0 && test <= 3, "test must be 0, 1, 2 or 3, got ", test);
    const FloatData data = checked_input(x);
    Tensor bits = new_bits(x);
    Kernels("pack_bits", x)
        .pack(data, bytes_of(bits), static_cast<BitTest>(test), static_cast<float>(low), static_cast<float>(high));
    return bits;
  }

  static Tensor pack_bools(const Tensor& x) {
    STD_TORCH_CHECK(Kernels::is_here(x) && x.scalar_type() == torch::headeronly::ScalarType::Bool && is_dense(x),
                    "x must be bool without gaps in memory on ", Kernels::kDevice, " for the compiled core");
    Tensor bits = new_bits(x);
    Kernels("pack_bools", x).pack_bools(static_cast<const uint8_t*>(x.data_ptr()), bytes_of(bits));
    return bits;
  }

  static Tensor mask_by_bits(const Tensor& x, const Tensor& bits, double off) {
    const FloatData data = checked_input(x);
    const uint8_t* mask = checked_bits(bits, x);
    Tensor y = torch::stable::empty_like(x);
    Kernels("mask_by_bits", x).mask(data, mask, y.mutable_data_ptr(), static_cast<float>(off));
    return y;
  }

  static Tensor scale_by_bits(const Tensor& x, const Tensor& bits, double on) {
    const FloatData data = checked_input(x);
    const uint8_t* mask = checked_bits(bits, x);
    Tensor y = torch::stable::empty_like(x);
    Kernels("scale_by_bits", x).scale(data, mask, y.mutable_data_ptr(), static_cast<float>(on));
    return y;
  }

  static std::tuple<Tensor, Tensor> affine_relu_bits(const Tensor& x, const Tensor& scale, const Tensor& shift) {
    const ChannelLayout layout = channel_layout(x);
    const float *factor = channel_values(scale, x, "scale"), *addend = channel_values(shift, x, "shift");
    Tensor y = torch::stable::empty_like(x), bits = new_bits(x);
    Kernels("affine_relu_bits", x)
        .affine_relu(static_cast<const float*>(x.data_ptr()), factor, addend, static_cast<float*>(y.mutable_data_ptr()),
                     bytes_of(bits), layout);
    return {y, bits};
  }

  static Tensor mask_channels(const Tensor& x, const Tensor& bits, const Tensor& scale) {
    const ChannelLayout layout = channel_layout(x);
    const float* factor = channel_values(scale, x, "scale");
    const uint8_t* mask = checked_bits(bits, x);
    Tensor y = torch::stable::empty_like(x);
    Kernels("mask_channels", x)
        .mask_channels(static_cast<const float*>(x.data_ptr()), mask, factor, static_cast<float*>(y.mutable_data_ptr()),
                       layout);
    return y;
  }

  template <class Library>
  static void add_to(Library& library) {
    library.impl("relu_bits", TORCH_BOX(&relu_bits));
    library.impl("relu_bits_", TORCH_BOX(&relu_bits_));
    library.impl("pack_bits", TORCH_BOX(&pack_bits));
    library.impl("pack_bools", TORCH_BOX(&pack_bools));
    library.impl("mask_by_bits", TORCH_BOX(&mask_by_bits));
    library.impl("scale_by_bits", TORCH_BOX(&scale_by_bits));
    library.impl("affine_relu_bits", TORCH_BOX(&affine_relu_bits));
    library.impl("mask_channels", TORCH_BOX(&mask_channels));
  }
};

}  // namespace pyft
