// GELU and its gradient.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu_target.h"
#include "gelu_cpu.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

void check_floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && is_contiguous(view_of(t.get())), name,
      " must be contiguous float32 on the CPU");
}

// work(offset, length) for pieces of `numel` elements.
template <class Work>
void for_pieces(int64_t numel, const Work& work) {
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside a parallel region
  constexpr int64_t kPiece = 16384, kCostOfOne = 4;
  for_each_chunk(equal_tasks((numel + kPiece - 1) / kPiece, kPiece * kCostOfOne),
                 [&](int64_t piece) { work(piece * kPiece, std::min(kPiece, numel - piece * kPiece)); });
}

}  // namespace

// input of any sizes; gives the same.
Tensor gelu_forward(const Tensor& input) {
  check_floats(input, "input");
  Tensor out = torch::stable::empty_like(input);
  const float* x = static_cast<const float*>(input.data_ptr());
  float* y = static_cast<float*>(out.mutable_data_ptr());
  for_pieces(input.numel(), [&](int64_t offset, int64_t length) { gelu_cpu(x + offset, y + offset, length); });
  return out;
}

// grad and input of the same sizes; gives the gradient of input.
Tensor gelu_backward(const Tensor& grad, const Tensor& input) {
  check_floats(grad, "grad");
  check_floats(input, "input");
  STD_TORCH_CHECK(to_string(grad.sizes()) == to_string(input.sizes()), "grad has sizes ", to_string(grad.sizes()),
                  " but input has ", to_string(input.sizes()));
  Tensor out = torch::stable::empty_like(input);
  const float *g = static_cast<const float*>(grad.data_ptr()), *x = static_cast<const float*>(input.data_ptr());
  float* dx = static_cast<float*>(out.mutable_data_ptr());
  for_pieces(input.numel(),
             [&](int64_t offset, int64_t length) { gelu_backward_cpu(g + offset, x + offset, dx + offset, length); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("gelu", TORCH_BOX(&gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace pyft
