#include "packed_linear_cpu.h"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu_target.h"

#define PYFT_LOOPS_FILE "packed_linear_loops.h"
#include "product_targets.h"

namespace pyft {

void pack_panel_cpu(const StridedWeight& weight, int64_t panel, float* packed) {
  const int64_t first = panel * kPanelWidth, columns = std::min(kPanelWidth, weight.outputs - first);
  const float* from = weight.data + first * weight.output_stride;
  float* to = packed + first * weight.inputs;
  if (weight.output_stride == 1) {
    for (int64_t k = 0; k < weight.inputs; ++k, to += kPanelWidth, from += weight.input_stride) {
      std::copy(from, from + columns, to);
      std::fill(to + columns, to + kPanelWidth, 0.0f);
    }
    return;
  }
  for (int64_t k = 0; k < weight.inputs; ++k, to += kPanelWidth, ++from) {
    for (int64_t j = 0; j < kPanelWidth; ++j) {
      to[j] = j < columns ? from[j * weight.output_stride] : 0.0f;
    }
  }
}

void packed_linear_cpu(const PackedLinear& work, int64_t first_token, int64_t last_token, int64_t first_panel,
                       int64_t last_panel) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::multiply(work, first_token, last_token, first_panel, last_panel);
    case CpuTarget::avx2:
      return avx2::multiply(work, first_token, last_token, first_panel, last_panel);
    default:
      break;
  }
#endif
  baseline::multiply(work, first_token, last_token, first_panel, last_panel);
}

void clear_between_cpu(const PackedLinear& work, int64_t first_token, int64_t last_token) {
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill(work.out + begin * work.outputs, work.out + end * work.outputs, 0.0f);
  };
  for (int64_t t = first_token; t < last_token; ++t) {
    clear(t == 0 ? 0 : work.rows[t - 1] + 1, work.rows[t]);
  }
  if (last_token == work.tokens) {
    clear(work.rows[last_token - 1] + 1, work.all_tokens);
  }
}

}  // namespace pyft
