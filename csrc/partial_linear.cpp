// The gradient of the chosen rows of a Linear's weight.
#include "partial_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_target.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

std::vector<int64_t> checked_rows(const std::optional<Tensor>& rows, int64_t row_start, int64_t row_count,
                                  int64_t limit) {
  std::vector<int64_t> chosen(std::max<int64_t>(0, row_count));
  if (rows.has_value()) {
    STD_TORCH_CHECK(rows->is_cpu() && rows->scalar_type() == torch::headeronly::ScalarType::Long &&
                        rows->is_contiguous() && rows->numel() == row_count,
                    "rows must be ", row_count, " contiguous int64 on the CPU");
    const int64_t* from = static_cast<const int64_t*>(rows->data_ptr());
    std::copy(from, from + row_count, chosen.begin());
  } else {
    for (int64_t r = 0; r < row_count; ++r) {
      chosen[r] = row_start + r;
    }
  }
  for (int64_t row : chosen) {
    STD_TORCH_CHECK(row >= 0 && row < limit, "rows has ", row, " but grad has ", limit, " columns");
  }
  return chosen;
}

}  // namespace

void gradient_of_rows(const PartialGradient& work, float* packed, float* sums) {
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside a parallel region
  const int64_t packs = (work.tokens + kPackedAtOnce - 1) / kPackedAtOnce;
  std::vector<double> pack_sums(sums != nullptr ? packs * work.row_count : 0);
  // In memory's terms: a chosen entry costs the cache line that it lies in.
  const int64_t pack_cost =
      kPackedAtOnce * (work.run ? work.row_count : std::min(work.grad_stride, 16 * work.row_count));
  for_each_chunk(equal_tasks(packs, pack_cost), [&](int64_t pack) {
    pack_rows_cpu(work, pack * kPackedAtOnce, packed,
                  sums != nullptr ? pack_sums.data() + pack * work.row_count : nullptr);
  });
  // Tasks for four threads that end at different times; each packs its strip of the input for itself.
  constexpr int64_t kWanted = 16, kLeastRows = 96;
  const int64_t strips = (work.width + kStripWidth - 1) / kStripWidth;
  const int64_t most = std::max<int64_t>(1, work.row_count / kLeastRows);
  const int64_t parts = std::clamp<int64_t>((kWanted + strips - 1) / std::max<int64_t>(1, strips), 1, most);
  for_each_chunk(equal_tasks(strips * parts, work.tokens * work.row_count / parts * kStripWidth / 32),
                 [&](int64_t task) { strip_gradient_cpu(work, packed, {task / parts, task % parts, parts}); });
  for (int64_t r = 0; sums != nullptr && r < work.row_count; ++r) {
    double total = 0.0;
    for (int64_t pack = 0; pack < packs; ++pack) {
      total += pack_sums[pack * work.row_count + r];
    }
    sums[r] = static_cast<float>(total);
  }
}

// grad (T, O), input (T, N). Gives grad[:, rows]^T input, (r, N), and, with_sums, the sums of these columns, (r,).
std::tuple<Tensor, Tensor> partial_weight_gradient(const Tensor& grad, const Tensor& input,
                                                   const std::optional<Tensor>& rows, int64_t row_start,
                                                   int64_t row_count, bool with_sums) {
  check_fp32_rows(grad, "grad");
  check_fp32_rows(input, "input");
  STD_TORCH_CHECK(grad.size(0) == input.size(0), "grad has ", grad.size(0), " tokens but input has ", input.size(0));
  const std::vector<int64_t> chosen = checked_rows(rows, row_start, row_count, grad.size(1));
  const int64_t tokens = grad.size(0), width = input.size(1);
  Tensor out = torch::stable::new_empty(grad, {row_count, width});
  Tensor sums = torch::stable::new_empty(grad, {with_sums ? row_count : 0});
  if (tokens == 0 || row_count == 0) {
    torch::stable::zero_(out);
    torch::stable::zero_(sums);
    return {out, sums};
  }
  const PartialGradient work{static_cast<const float*>(grad.data_ptr()),
                             grad.stride(0),
                             static_cast<const float*>(input.data_ptr()),
                             input.stride(0),
                             chosen.data(),
                             !rows.has_value(),
                             nullptr,
                             row_count,
                             tokens,
                             width,
                             static_cast<float*>(out.mutable_data_ptr())};
  Tensor packed = torch::stable::new_empty(grad, {packed_floats(work)});
  gradient_of_rows(work, static_cast<float*>(packed.mutable_data_ptr()),
                   with_sums ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr);
  return {out, sums};
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("partial_weight_gradient", TORCH_BOX(&partial_weight_gradient));
}

}  // namespace pyft
