// Max pooling on the CPU.
#include <algorithm>
#include <vector>

#include "cpu_target.h"
#include "max_pool_cpu.h"
#include "max_pool_tensors.h"
#include "parallel.h"

namespace pyft {
namespace {

class CpuMaxPool {
 public:
  static constexpr const char* kDevice = "the CPU";
  // torch adds up gradients of 16 bits in 16 bits here, and in fp32 on a GPU.
  static constexpr bool k16Bits = false;
  static bool is_here(const Tensor& x) { return x.is_cpu(); }

  CpuMaxPool(const char*, const Tensor&, const PoolShape& shape) : shape_(shape) {
    cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  }

  // parts: planes with one channel each, or images with channels last.
  void pool(FloatData input, void* output, uint8_t* at, int64_t parts, int64_t channels) const {
    const float* x = static_cast<const float*>(input.data);
    float* y = static_cast<float*>(output);
    const PoolAxis &h = shape_.height, &w = shape_.width;
    const int64_t row_cost = w.out * h.kernel * w.kernel * channels;
    torch::stable::parallel_for(0, parts * h.out, 1 + kWorthAThread / std::max<int64_t>(1, row_cost),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<int32_t> work(channels > 1 ? channels : w.out);
                                  if (channels > 1) {
                                    max_pool_rows_last_cpu(x, y, at, work.data(), channels, begin, end, shape_);
                                  } else {
                                    max_pool_rows_cpu(x, y, at, work.data(), begin, end, shape_);
                                  }
                                });
  }

  void backward(FloatData output, const uint8_t* at, void* input, int64_t parts, int64_t channels) const {
    const float* grad = static_cast<const float*>(output.data);
    float* dx = static_cast<float*>(input);
    const int64_t cost = shape_.height.in * shape_.width.in * channels;
    torch::stable::parallel_for(
        0, parts, 1 + kWorthAThread / std::max<int64_t>(1, cost),
        [&](int64_t begin, int64_t end) { max_pool_backward_cpu(grad, at, dx, channels, begin, end, shape_); });
  }

 private:
  PoolShape shape_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { MaxPoolOps<CpuMaxPool>::add_to(library); }

}  // namespace pyft
