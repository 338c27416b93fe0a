// Bit masks of activations on a GPU.
#include "bit_masks_cuda.h"

#include "bit_masks_tensors.h"
#include "cuda_device.h"

namespace pyft {
namespace {

class CudaBitMasks {
 public:
  static constexpr const char* kDevice = kCudaDevice;
  static bool is_here(const Tensor& x) { return on_cuda(x); }

  CudaBitMasks(const char* op, const Tensor& x) : op_(op), length_(x.numel()), device_(x) {}

  void relu(FloatData x, void* y, uint8_t* bits) const {
    check_launch(launch_relu_bits(x, y, bits, length_, device_.stream()), op_);
  }
  void pack(FloatData x, uint8_t* bits, BitTest test, float low, float high) const {
    check_launch(launch_pack_bits(x, bits, length_, test, low, high, device_.stream()), op_);
  }
  void pack_bools(const uint8_t* x, uint8_t* bits) const {
    check_launch(launch_pack_bools(x, bits, length_, device_.stream()), op_);
  }
  void mask(FloatData x, const uint8_t* bits, void* y, float off) const {
    check_launch(launch_mask_by_bits(x, bits, y, length_, off, device_.stream()), op_);
  }
  void scale(FloatData x, const uint8_t* bits, void* y, float on) const {
    check_launch(launch_scale_by_bits(x, bits, y, length_, on, device_.stream()), op_);
  }
  void affine_relu(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                   ChannelLayout layout) const {
    check_launch(launch_affine_relu_bits(x, scale, shift, y, bits, length_, layout, device_.stream()), op_);
  }
  void mask_channels(const float* x, const uint8_t* bits, const float* scale, float* y, ChannelLayout layout) const {
    check_launch(launch_mask_channels(x, bits, scale, y, length_, layout, device_.stream()), op_);
  }

 private:
  const char* op_;
  int64_t length_;
  CudaDevice device_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) { BitMaskOps<CudaBitMasks>::add_to(library); }

}  // namespace pyft
