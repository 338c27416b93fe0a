// What the host code of every CUDA op needs of torch: the tensor's device made current, its stream, and errors as
// exceptions that name the op. Through the stable ABI, so that the library also loads beside a torch without CUDA.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace pyft {

// The device whose kernels a library brings. Those of tests take the place of the CPU's: emulated ones, or a GPU's on
// memory that it shares with the CPU (tests/cuda/gpu_core.py).
#ifdef PYFT_CUDA_SERVES_CPU
#define PYFT_CUDA_KEY CPU
constexpr const char* kCudaDevice = "the CPU";
inline bool on_cuda(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
#else
#define PYFT_CUDA_KEY CUDA
constexpr const char* kCudaDevice = "a CUDA device";
inline bool on_cuda(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }
#endif

// The device of `tensor` is current while this lives, and `stream()` is torch's current stream there.
class CudaDevice {
 public:
  explicit CudaDevice(const torch::stable::Tensor& tensor) {
    // Kernels that a test runs on the CPU have neither.
    if (tensor.is_cuda()) {
      guard_.emplace(tensor.get_device_index());
      stream_ = torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle();
    }
  }

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// A launch that failed is a Python exception that names the op.
inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "pyft::", op, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

}  // namespace pyft
