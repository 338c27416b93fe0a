// Max pooling over two dimensions that keeps one byte for each output.
#include <algorithm>
#include <vector>

#include "cpu_target.h"
#include "max_pool_cpu.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

// Whether the elements lie as (N, H, W, C) or as (N, C, H, W), whatever the strides of dimensions of size 1.
bool lies_as(const Tensor& x, bool channels_last) {
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

void check_image(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Float, name,
                  " must be (N, C, H, W) float32 on the CPU for the compiled core");
}

// Whether channels are last in memory, for the input side of the pool and the output side.
bool channels_last(const Tensor& in, const Tensor& out, const char* in_name, const char* out_name) {
  check_image(in, in_name);
  check_image(out, out_name);
  STD_TORCH_CHECK(in.size(0) == out.size(0) && in.size(1) == out.size(1), out_name, " must have the N and C of ",
                  in_name);
  const bool last = !lies_as(in, false);
  STD_TORCH_CHECK(lies_as(in, last) && lies_as(out, last), in_name, " has strides ", to_string(in.strides()), " and ",
                  out_name, " ", to_string(out.strides()),
                  "; both must be contiguous, or both have their channels last in memory");
  return last;
}

// window: kernel, stride, padding, dilation, each as (height, width).
PoolShape shape_of(int64_t in_height, int64_t in_width, int64_t out_height, int64_t out_width,
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

}  // namespace

// y: an empty tensor of the output's size in the memory format of x.
Tensor max_pool_offsets(const Tensor& x, Tensor y, std::vector<int64_t> window) {
  const bool last = channels_last(x, y, "x", "y");
  const int64_t images = x.size(0), channels = x.size(1);
  const PoolShape shape = shape_of(x.size(2), x.size(3), y.size(2), y.size(3), window);
  Tensor at = torch::stable::new_empty(y, {y.numel()}, torch::headeronly::ScalarType::Byte);
  const float* from = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  uint8_t* offsets = static_cast<uint8_t*>(at.mutable_data_ptr());
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  const int64_t rows = images * (last ? 1 : channels) * shape.height.out;
  const int64_t row_cost = shape.width.out * window[0] * window[1] * (last ? channels : 1);
  torch::stable::parallel_for(0, rows, 1 + kWorthAThread / std::max<int64_t>(1, row_cost),
                              [&](int64_t begin, int64_t end) {
                                std::vector<int32_t> work(last ? channels : shape.width.out);
                                if (last) {
                                  max_pool_rows_last_cpu(from, to, offsets, work.data(), channels, begin, end, shape);
                                } else {
                                  max_pool_rows_cpu(from, to, offsets, work.data(), begin, end, shape);
                                }
                              });
  return at;
}

// dx: an empty tensor of the input's size in the memory format of grad.
void max_pool_backward_(const Tensor& grad, const Tensor& at, Tensor dx, std::vector<int64_t> window) {
  const bool last = channels_last(dx, grad, "dx", "grad");
  const int64_t images = grad.size(0), channels = grad.size(1);
  STD_TORCH_CHECK(at.is_cpu() && at.is_contiguous() && at.numel() == grad.numel() &&
                      at.scalar_type() == torch::headeronly::ScalarType::Byte,
                  "at must be ", grad.numel(), " contiguous uint8 on the CPU");
  const PoolShape shape = shape_of(dx.size(2), dx.size(3), grad.size(2), grad.size(3), window);
  const float* from = static_cast<const float*>(grad.data_ptr());
  const uint8_t* offsets = static_cast<const uint8_t*>(at.data_ptr());
  float* to = static_cast<float*>(dx.mutable_data_ptr());
  const int64_t cost = dx.size(2) * dx.size(3) * (last ? channels : 1);
  torch::stable::parallel_for(0, images * (last ? 1 : channels), 1 + kWorthAThread / std::max<int64_t>(1, cost),
                              [&](int64_t begin, int64_t end) {
                                max_pool_backward_cpu(from, offsets, to, last ? channels : 1, begin, end, shape);
                              });
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("max_pool_offsets", TORCH_BOX(&max_pool_offsets));
  library.impl("max_pool_backward_", TORCH_BOX(&max_pool_backward_));
}

}  // namespace pyft
