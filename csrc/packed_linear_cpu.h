// A Linear layer whose weight was packed once, for many products with it.
#pragma once

#include <cstdint>

namespace pyft {

// Outputs of a panel: the weights of so many outputs lie side by side, input by input.
constexpr int64_t kPanelWidth = 16;
// Inputs of a block, at most: what a panel has of them stays in an L1 cache beside the rows that it meets.
constexpr int64_t kDepth = 256;
// Rows of a task: with all their inputs they stay in an L2 cache while the panels go by.
constexpr int64_t kRowsAtOnce = 48;

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanelWidth - 1) / kPanelWidth; }

// out[t, o] = bias[o] + sum over n of input[t, n] * weight[o, n], added in the order of n, with a rounding to fp32
// after each block. With `rows`, `tokens` numbers that ascend, t runs over these; rows of the output that lie
// between them are zeros.
struct PackedLinear {
  const float* input;
  int64_t input_stride;
  const float* packed;
  const float* bias;    // null: zeros
  const int64_t* rows;  // null: all
  int64_t tokens, all_tokens, inputs, outputs;
  float* out;
};

// weight (outputs, inputs), one of the strides 1.
struct StridedWeight {
  const float* data;
  int64_t output_stride, input_stride, outputs, inputs;
};

// One panel of the packed weight (panels, inputs, kPanelWidth); what is missing is zeros.
void pack_panel_cpu(const StridedWeight& weight, int64_t panel, float* packed);

// Tokens first_token to last_token and panels first_panel to last_panel of the output.
void packed_linear_cpu(const PackedLinear& work, int64_t first_token, int64_t last_token, int64_t first_panel,
                       int64_t last_panel);

// Zeros in the rows of the output before each of these tokens and, after the last token of all, in those that follow.
void clear_between_cpu(const PackedLinear& work, int64_t first_token, int64_t last_token);

}  // namespace pyft
