// Clipping lists of gradients in place, one parallel region for all of them.
#include <cmath>
#include <vector>

#include "clip_grads_cpu.h"
#include "cpu_target.h"
#include "grad_norm.h"
#include "grad_norm_tensors.h"
#include "gradient_rows.h"
#include "parallel.h"

namespace pyft {
namespace {

template <class Change>
void change_chunks(const std::vector<Tensor>& grads, const Change& change) {
  const std::vector<FloatData> data = checked_data(grads, "grads");
  const ChunkTable table = cut_into_chunks(numels_of_list(grads));
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  for_each_chunk(table, [&](int64_t c) {
    const Chunk& chunk = table.chunks[c];
    change(data[chunk.tensor], chunk.offset, chunk.length);
  });
}

Rows checked_rows(const Tensor& tensor, const char* list, size_t index) {
  const FloatData data = checked_data(tensor, list, index);
  const RowShape shape = row_shape(tensor, list, index);
  return {data, shape.rows, shape.length};
}

// factors[i][row] for matrices[i]; rows with the factor 1 are not written.
void scale_rows(const std::vector<Rows>& matrices, const std::vector<std::vector<float>>& factors) {
  const RowTable rows = cut_into_rows(matrices);
  for_each_chunk(rows.table, [&](int64_t c) {
    const Chunk& chunk = rows.table.chunks[c];
    const RowBlock& block = rows.blocks[chunk.tensor];
    const Rows& m = matrices[block.matrix];
    const int64_t begin = block.first_row * m.row_length + chunk.offset;
    const int64_t length = block.rows == 1 ? chunk.length : m.row_length;
    for (int64_t row = 0; row < block.rows; ++row) {
      const float factor = factors[block.matrix][block.first_row + row];
      if (factor != 1.0f) {
        scale_cpu(m.data, begin + row * length, length, factor);
      }
    }
  });
}

}  // namespace

void scale_grads_(const std::vector<Tensor>& grads, const Tensor& scale) {
  STD_TORCH_CHECK(scale.is_cpu() && scale.numel() == 1 && scale.scalar_type() == torch::headeronly::ScalarType::Float,
                  "scale must be one float32 number on the CPU");
  const float factor = *static_cast<const float*>(scale.const_data_ptr());
  change_chunks(grads, [=](FloatData x, int64_t offset, int64_t length) { scale_cpu(x, offset, length, factor); });
}

void clamp_grads_(const std::vector<Tensor>& grads, double limit) {
  STD_TORCH_CHECK(limit >= 0.0, "limit must be 0 or more, got ", limit);
  const float narrow = static_cast<float>(limit);
  change_chunks(grads, [=](FloatData x, int64_t offset, int64_t length) { clamp_cpu(x, offset, length, narrow); });
}

void agc_grads_(const std::vector<Tensor>& grads, const std::vector<Tensor>& params, double clipping, double eps) {
  check_same_count(params.size(), "params", grads.size(), "grads");
  std::vector<Rows> matrices(2 * grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_same_sizes(grads[i], params[i], i);
    matrices[i] = checked_rows(grads[i], "grads", i);
    matrices[grads.size() + i] = checked_rows(params[i], "params", i);
  }
  std::vector<std::vector<double>> sums;
  sum_of_squares_per_row(matrices, INFINITY, sums);
  matrices.resize(grads.size());
  std::vector<std::vector<float>> factors(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    for (int64_t row = 0; row < matrices[i].rows; ++row) {
      factors[i].push_back(static_cast<float>(agc_factor(sums[i][row], sums[grads.size() + i][row], clipping, eps)));
    }
  }
  scale_rows(matrices, factors);
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("scale_grads_", TORCH_BOX(&scale_grads_));
  library.impl("clamp_grads_", TORCH_BOX(&clamp_grads_));
  library.impl("agc_grads_", TORCH_BOX(&agc_grads_));
}

}  // namespace pyft
