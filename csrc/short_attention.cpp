// Attention of short sequences on the CPU, and its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu_target.h"
#include "parallel.h"
#include "short_attention_cpu.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

// A head's columns are read in whole registers of any target.
constexpr int64_t kWidthStep = 16;

// (batch, heads, rows, width) fp32 with the entries of a row side by side.
void check_operand(const Tensor& t, const char* name, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Float && t.dim() == 4, name,
                  " must be float32 on the CPU with dimensions (batch, heads, rows, width)");
  STD_TORCH_CHECK(t.size(0) == batch && t.size(1) == heads && t.size(2) == rows && t.size(3) == width, name,
                  " has sizes ", to_string(t.sizes()), ", expected (", batch, ", ", heads, ", ", rows, ", ", width,
                  ")");
  STD_TORCH_CHECK(t.stride(3) == 1 || width <= 1, name, " has strides ", to_string(t.strides()),
                  "; the entries of a row must lie side by side");
}

Strided<const float> read(const Tensor& t) {
  return {static_cast<const float*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// A new tensor (batch, heads, rows, width) in the order (batch, rows, heads, width), in which projections read it.
Tensor new_operand(const Tensor& like) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

Strided<float> written(Tensor& t) {
  return {static_cast<float*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

ShortAttention checked(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& keep, double on, double scale, bool causal) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4,
                  "query and key must have dimensions (batch, heads, rows, width), got ", query.dim(), " and ",
                  key.dim());
  const int64_t batch = query.size(0), heads = query.size(1), width = query.size(3);
  check_operand(query, "query", batch, heads, query.size(2), width);
  check_operand(key, "key", batch, heads, key.size(2), width);
  check_operand(value, "value", batch, heads, key.size(2), width);
  STD_TORCH_CHECK(width % kWidthStep == 0, "query has heads of width ", width, "; a multiple of ", kWidthStep,
                  " is expected");
  AttentionMask added{nullptr, false, 0, 0, 0, 0};
  if (mask.has_value()) {
    const bool is_bool = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
    STD_TORCH_CHECK(mask->is_cpu() && (is_bool || mask->scalar_type() == torch::headeronly::ScalarType::Float) &&
                        mask->dim() == 4 && mask->size(0) == batch && mask->size(1) == heads &&
                        mask->size(2) == query.size(2) && mask->size(3) == key.size(2),
                    "mask must be bool or float32 on the CPU, expanded to (", batch, ", ", heads, ", ", query.size(2),
                    ", ", key.size(2), "), got sizes ", to_string(mask->sizes()));
    added = {mask->data_ptr(), is_bool, mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)};
  }
  const int64_t weights = batch * heads * query.size(2) * key.size(2);
  STD_TORCH_CHECK(!keep.has_value() || (keep->is_cpu() && keep->is_contiguous() &&
                                        keep->scalar_type() == torch::headeronly::ScalarType::Byte &&
                                        keep->numel() == (weights + 7) / 8),
                  "keep must be ", (weights + 7) / 8, " contiguous uint8 on the CPU, one bit for each of ", weights,
                  " weights");
  return {read(query),
          read(key),
          read(value),
          added,
          keep.has_value() ? static_cast<const uint8_t*>(keep->data_ptr()) : nullptr,
          keep.has_value() ? static_cast<float>(on) : 1.0f,
          static_cast<float>(scale),
          causal,
          heads,
          query.size(2),
          key.size(2),
          width,
          weights,
          {nullptr, 0, 0, 0},
          nullptr};
}

// run(first, last, scratch) for all pairs of sample and head, in parallel.
template <class Run>
void for_pairs(const ShortAttention& work, int64_t pairs, bool backward, const Run& run) {
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside a parallel region
  // Tasks for a few threads that end at different times.
  constexpr int64_t kTasks = 32;
  const int64_t tasks = std::min(pairs, kTasks);
  // Sixteen products, or a quarter of an exponential, take about as long as the load of one number from memory.
  const int64_t pair = work.queries * work.keys * ((backward ? 5 : 2) * work.width / 16 + 4);
  for_each_chunk(equal_tasks(tasks, pairs * pair / tasks), [&](int64_t task) {
    const std::unique_ptr<float[]> scratch(
        new float[short_attention_scratch(work.queries, work.keys, work.width, backward)]);
    run(task * pairs / tasks, (task + 1) * pairs / tasks, scratch.get());
  });
}

}  // namespace

// Gives the output and, for the gradient, (batch, heads, queries) logarithms of sums.
std::tuple<Tensor, Tensor> short_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const std::optional<Tensor>& mask, const std::optional<Tensor>& keep,
                                           double on, double scale, bool causal) {
  ShortAttention work = checked(query, key, value, mask, keep, on, scale, causal);
  Tensor out = new_operand(query);
  Tensor log_sums = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  if (out.numel() > 0) {
    work.out = written(out);
    work.log_sums = static_cast<float*>(log_sums.mutable_data_ptr());
    for_pairs(work, query.size(0) * query.size(1), false,
              [&](int64_t first, int64_t last, float* scratch) { short_attention_cpu(work, first, last, scratch); });
  }
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                            const Tensor& value, const std::optional<Tensor>& mask,
                                                            const std::optional<Tensor>& keep, double on, double scale,
                                                            bool causal, const Tensor& log_sums) {
  ShortAttention work = checked(query, key, value, mask, keep, on, scale, causal);
  check_operand(grad, "grad", query.size(0), query.size(1), query.size(2), query.size(3));
  STD_TORCH_CHECK(log_sums.is_cpu() && log_sums.is_contiguous() &&
                      log_sums.scalar_type() == torch::headeronly::ScalarType::Float &&
                      log_sums.numel() == query.size(0) * query.size(1) * query.size(2),
                  "log_sums must be what short_attention gave");
  Tensor grad_query = new_operand(query), grad_key = new_operand(key), grad_value = new_operand(value);
  const int64_t pairs = query.size(0) * query.size(1);
  if (pairs * query.size(3) > 0) {
    // Only read here.
    work.log_sums = const_cast<float*>(static_cast<const float*>(log_sums.data_ptr()));
    const ShortAttentionGradient gradient{work, read(grad), written(grad_query), written(grad_key),
                                          written(grad_value)};
    for_pairs(work, pairs, true, [&](int64_t first, int64_t last, float* scratch) {
      short_attention_backward_cpu(gradient, first, last, scratch);
    });
  }
  return {grad_query, grad_key, grad_value};
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("short_attention", TORCH_BOX(&short_attention));
  library.impl("short_attention_backward", TORCH_BOX(&short_attention_backward));
}

}  // namespace pyft
