// Max pooling on a GPU.
#include "max_pool_cuda.h"

#include "cuda_device.h"
#include "max_pool_tensors.h"

namespace pyft {
namespace {

class CudaMaxPool {
 public:
  static constexpr const char* kDevice = kCudaDevice;
  static constexpr bool k16Bits = true;
  static bool is_here(const Tensor& x) { return on_cuda(x); }

  CudaMaxPool(const char* op, const Tensor& x, const PoolShape& shape) : op_(op), device_(x), shape_(shape) {
    STD_TORCH_CHECK(fits_cuda(shape), "pyft::", op, ": one plane must have at most 2^30 places on ", kDevice);
  }

  void pool(FloatData x, void* y, uint8_t* at, int64_t parts, int64_t channels) const {
    check_launch(launch_max_pool(x, y, at, parts, channels, shape_, device_.stream()), op_);
  }
  void backward(FloatData grad, const uint8_t* at, void* dx, int64_t parts, int64_t channels) const {
    check_launch(launch_max_pool_backward(grad, at, dx, parts, channels, shape_, device_.stream()), op_);
  }

 private:
  const char* op_;
  CudaDevice device_;
  PoolShape shape_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) { MaxPoolOps<CudaMaxPool>::add_to(library); }

}  // namespace pyft
