// A Linear layer whose weight was packed once: for weights that stay as they are, and products that come by the
// hundred.
#include "packed_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "cpu_target.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

// Rows and panels cut into a grid of tasks: all panels for some rows, or a part of them where rows are few.
struct Grid {
  int64_t row_parts, panel_parts;

  Grid(int64_t tokens, int64_t panels) : row_parts((tokens + kRowsAtOnce - 1) / kRowsAtOnce) {
    // Tasks for four threads that end at different times.
    constexpr int64_t kWanted = 16, kLeastPanels = 4;
    const int64_t most = std::max<int64_t>(1, panels / kLeastPanels);
    panel_parts = std::clamp<int64_t>((kWanted + row_parts - 1) / row_parts, 1, most);
  }
};

}  // namespace

void pack_weight(const StridedWeight& weight, float* packed) {
  for_each_chunk(equal_tasks(panels_of(weight.outputs), weight.inputs * kPanelWidth),
                 [&](int64_t panel) { pack_panel_cpu(weight, panel, packed); });
}

void multiply_packed(const PackedLinear& work) {
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside a parallel region
  const int64_t panels = panels_of(work.outputs);
  const Grid grid(work.tokens, panels);
  const int64_t tasks = grid.row_parts * grid.panel_parts;
  // Sixteen products take about as long as the load of one number from memory.
  const int64_t cost = tasks > 0 ? work.tokens * panels * (work.inputs + 1) / tasks : 0;
  for_each_chunk(equal_tasks(tasks, cost), [&](int64_t task) {
    const int64_t row = task / grid.panel_parts, part = task % grid.panel_parts;
    const int64_t first = row * work.tokens / grid.row_parts, last = (row + 1) * work.tokens / grid.row_parts;
    if (part == 0 && work.rows != nullptr) {
      clear_between_cpu(work, first, last);
    }
    packed_linear_cpu(work, first, last, part * panels / grid.panel_parts, (part + 1) * panels / grid.panel_parts);
  });
}

// weight (O, N), or a transposed view. Gives (panels, N, 16): the weights of 16 outputs side by side, input by input,
// filled up with zeros.
Tensor pack_linear(const Tensor& weight) {
  check_fp32_matrix(weight, "weight");
  const StridedWeight from{static_cast<const float*>(weight.data_ptr()), weight.stride(0), weight.stride(1),
                           weight.size(0), weight.size(1)};
  STD_TORCH_CHECK(from.input_stride == 1 || from.output_stride == 1 || weight.numel() == 0, "weight has strides ",
                  to_string(weight.strides()), "; the entries of a row or of a column must lie side by side");
  Tensor packed = torch::stable::new_empty(weight, {panels_of(from.outputs), from.inputs, kPanelWidth});
  if (packed.numel() > 0) {
    pack_weight(from, static_cast<float*>(packed.mutable_data_ptr()));
  }
  return packed;
}

// input (T, N), packed from a weight (O, N), bias (O,). Gives (T, O).
Tensor packed_linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  check_fp32_rows(input, "input");
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.scalar_type() == torch::headeronly::ScalarType::Float && packed.is_contiguous() &&
          packed.dim() == 3 && packed.size(2) == kPanelWidth && outputs >= 0 && packed.size(0) == panels_of(outputs),
      "packed must be what pack_linear gave for a weight of ", outputs, " rows, got sizes ", to_string(packed.sizes()));
  STD_TORCH_CHECK(packed.size(1) == input.size(1), "input has ", input.size(1), " columns but the weight has ",
                  packed.size(1));
  const float* const of_bias = checked_bias(bias, outputs);
  const int64_t tokens = input.size(0);
  Tensor out = torch::stable::new_empty(input, {tokens, outputs});
  if (out.numel() > 0) {
    multiply_packed({static_cast<const float*>(input.data_ptr()), input.stride(0),
                     static_cast<const float*>(packed.data_ptr()), of_bias, nullptr, tokens, tokens, input.size(1),
                     outputs, static_cast<float*>(out.mutable_data_ptr())});
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("pack_linear", TORCH_BOX(&pack_linear));
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace pyft
