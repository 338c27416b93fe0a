// A Linear layer in the tokens that are there: padding is neither multiplied nor read, and comes out as zeros.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "packed_linear.h"
#include "partial_linear.h"
#include "scratch.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

thread_local Scratch scratch;

// Frees memory of unusual size also where an error is thrown.
struct Trim {
  ~Trim() { scratch.trim(); }
};

const int64_t* checked_tokens(const Tensor& tokens, int64_t limit) {
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.scalar_type() == torch::headeronly::ScalarType::Long && tokens.dim() == 1 &&
                      tokens.is_contiguous(),
                  "tokens must be contiguous int64 of one dimension on the CPU");
  const int64_t* numbers = static_cast<const int64_t*>(tokens.data_ptr());
  for (int64_t i = 0, least = 0; i < tokens.numel(); least = numbers[i++] + 1) {
    STD_TORCH_CHECK(numbers[i] >= least && numbers[i] < limit, "tokens[", i, "] is ", numbers[i],
                    "; they must ascend and lie below ", limit);
  }
  return numbers;
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }

// x (T, N) times a weight (O, N) in some rows.
Tensor multiply(const Tensor& x, const StridedWeight& weight, const float* bias, const int64_t* tokens, int64_t count) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.outputs});
  if (count == 0) {
    return torch::stable::zero_(out);
  }
  if (out.numel() > 0) {
    float* packed = scratch.floats(packed_floats(weight));
    pack_weight(weight, packed);
    multiply_packed({floats(x), x.stride(0), packed, bias, tokens, count, x.size(0), weight.inputs, weight.outputs,
                     static_cast<float*>(out.mutable_data_ptr())});
  }
  return out;
}

}  // namespace

// input (T, N), weight (O, N), bias (O,), tokens (t,) ascending. Gives (T, O), zeros in rows that are no tokens.
Tensor token_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& tokens) {
  check_fp32_rows(input, "input");
  check_fp32_rows(weight, "weight");
  STD_TORCH_CHECK(weight.size(1) == input.size(1), "input has ", input.size(1), " columns but weight has ",
                  weight.size(1));
  const float* const of_bias = checked_bias(bias, weight.size(0));
  const int64_t* numbers = checked_tokens(tokens, input.size(0));
  const Trim trim;
  return multiply(input, {floats(weight), weight.stride(0), 1, weight.size(0), weight.size(1)}, of_bias, numbers,
                  tokens.numel());
}

// grad (T, O), and what token_linear was given. Gives the gradients of input, (T, N), of weight, (O, N), and of bias,
// (O,): those that are wanted, and nothing for the others.
std::tuple<Tensor, Tensor, Tensor> token_linear_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                         const Tensor& tokens, bool need_input, bool need_weight,
                                                         bool need_bias) {
  check_fp32_rows(grad, "grad");
  check_fp32_rows(weight, "weight");
  STD_TORCH_CHECK(grad.size(1) == weight.size(0), "grad has ", grad.size(1), " columns but weight has ", weight.size(0),
                  " rows");
  const int64_t* numbers = checked_tokens(tokens, grad.size(0));
  const int64_t count = tokens.numel(), outputs = weight.size(0), inputs = weight.size(1);
  const Trim trim;
  Tensor dx = need_input
                  ? multiply(grad, {floats(weight), 1, weight.stride(0), inputs, outputs}, nullptr, numbers, count)
                  : torch::stable::new_empty(grad, {0});
  Tensor dw =
      torch::stable::new_empty(grad, need_weight ? std::vector<int64_t>{outputs, inputs} : std::vector<int64_t>{0});
  Tensor db = torch::stable::new_empty(grad, {need_bias ? outputs : 0});
  if (!need_weight) {
    STD_TORCH_CHECK(!need_bias, "need_bias without need_weight is not supported");
    return {dx, dw, db};
  }
  check_fp32_rows(input, "input");
  STD_TORCH_CHECK(input.size(0) == grad.size(0) && input.size(1) == inputs, "input has sizes ",
                  to_string(input.sizes()), " but grad and weight ask for (", grad.size(0), ", ", inputs, ")");
  if (count == 0 || outputs == 0) {
    return {dx, torch::stable::zero_(dw), torch::stable::zero_(db)};
  }
  std::vector<int64_t> rows(outputs);
  for (int64_t r = 0; r < outputs; ++r) {
    rows[r] = r;
  }
  const PartialGradient work{floats(grad),
                             grad.stride(0),
                             floats(input),
                             input.stride(0),
                             rows.data(),
                             true,
                             numbers,
                             outputs,
                             count,
                             inputs,
                             static_cast<float*>(dw.mutable_data_ptr())};
  gradient_of_rows(work, scratch.floats(packed_floats(work)),
                   need_bias ? static_cast<float*>(db.mutable_data_ptr()) : nullptr);
  return {dx, dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("token_linear", TORCH_BOX(&token_linear));
  library.impl("token_linear_backward", TORCH_BOX(&token_linear_backward));
}

}  // namespace pyft
