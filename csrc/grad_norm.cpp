#include "grad_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_target.h"
#include "grad_norm_cpu.h"
#include "grad_norm_math.h"
#include "grad_norm_tensors.h"
#include "parallel.h"

namespace pyft {
namespace {

// What is longer has time to load what comes next by itself.
constexpr int64_t kShort = 4096;

// partial[c] = value(data, offset, length, next) of chunk c; `next` is where the chunk after it begins.
template <class Value>
void reduce_chunks(const ChunkTable& table, const std::vector<FloatData>& data, std::vector<double>& partial,
                   const Value& value) {
  partial.resize(table.chunks.size());
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  for_each_chunk(table, [&](int64_t c) {
    const Chunk& chunk = table.chunks[c];
    const char* begin_of_next = nullptr;
    if (c + 1 < static_cast<int64_t>(table.chunks.size()) && chunk.length <= kShortChunk) {
      const Chunk& next = table.chunks[c + 1];
      const int64_t size = data[next.tensor].format == FloatFormat::fp32 ? 4 : 2;
      begin_of_next = static_cast<const char*>(data[next.tensor].data) + size * next.offset;
      if (chunk.length > kShort) {
        fetch_ahead(begin_of_next, size * next.length);
      }
    }
    partial[c] = value(data[chunk.tensor], chunk.offset, chunk.length, begin_of_next);
  });
}

double add_over_tensors(const ChunkTable& table, const std::vector<double>& partial, size_t num_tensors) {
  return add_exactly(sum_per_tensor(table, partial, static_cast<int64_t>(num_tensors)));
}

double largest_magnitude(const ChunkTable& table, const std::vector<FloatData>& data, std::vector<double>& partial) {
  reduce_chunks(table, data, partial, [](FloatData x, int64_t offset, int64_t length, const void*) {
    return largest_magnitude_cpu(x, offset, length);
  });
  double largest = 0.0;
  for (double magnitude : partial) {
    largest = largest >= magnitude ? largest : magnitude;
    if (std::isnan(magnitude)) {
      return std::numeric_limits<double>::quiet_NaN();
    }
  }
  return largest;
}

}  // namespace

void sum_of_squares_per_chunk(const ChunkTable& table, const std::vector<FloatData>& data, float clip_value,
                              std::vector<double>& partial) {
  reduce_chunks(table, data, partial, [=](FloatData x, int64_t offset, int64_t length, const void* next) {
    return sum_of_squares_cpu(x, offset, length, clip_value, next);
  });
}

std::vector<double> sum_per_tensor(const ChunkTable& table, const std::vector<double>& partial, int64_t num_tensors) {
  std::vector<double> sums(num_tensors, 0.0);
  for (size_t c = 0; c < partial.size(); ++c) {
    sums[table.chunks[c].tensor] += partial[c];
  }
  return sums;
}

double add_exactly(const std::vector<double>& terms) {
  // Numbers that do not overlap, from small to large, whose exact sum is that of the terms so far.
  std::vector<double> parts;
  double plain = 0.0;
  for (double term : terms) {
    plain += term;
    size_t kept = 0;
    for (double part : parts) {
      const double sum = term + part, of_part = sum - term;
      const double lost = (term - (sum - of_part)) + (part - of_part);
      if (lost != 0.0) {
        parts[kept++] = lost;
      }
      term = sum;
    }
    parts.resize(kept);
    parts.push_back(term);
  }
  if (!std::isfinite(plain)) {
    return plain;
  }
  double total = 0.0, lost = 0.0;
  size_t left = parts.size();
  while (left > 0 && lost == 0.0) {
    const double part = parts[--left], sum = total + part;
    lost = part - (sum - total);
    total = sum;
  }
  // Half-way cases are decided by what is left below.
  if (left > 0 && ((lost > 0.0 && parts[left - 1] > 0.0) || (lost < 0.0 && parts[left - 1] < 0.0))) {
    const double twice = 2.0 * lost, sum = total + twice;
    return twice == sum - total ? sum : total;
  }
  return total;
}

double norm_over_chunks(const ChunkTable& table, const std::vector<FloatData>& data, double p) {
  std::vector<double> partial;
  if (p == 2.0) {
    sum_of_squares_per_chunk(table, data, INFINITY, partial);
    return std::sqrt(add_over_tensors(table, partial, data.size()));
  }
  if (p == 1.0) {
    reduce_chunks(table, data, partial, sum_of_magnitudes_cpu);
    return add_over_tensors(table, partial, data.size());
  }
  const double largest = largest_magnitude(table, data, partial);
  if (std::isinf(p) || largest == 0.0 || !std::isfinite(largest)) {
    return largest;
  }
  reduce_chunks(table, data, partial, [=](FloatData x, int64_t offset, int64_t length, const void*) {
    return sum_of_powers_cpu(x, offset, length, largest, p);
  });
  return largest * std::pow(add_over_tensors(table, partial, data.size()), 1.0 / p);
}

RowTable cut_into_rows(const std::vector<Rows>& matrices) {
  RowTable rows;
  std::vector<int64_t> numels;
  for (int64_t i = 0; i < static_cast<int64_t>(matrices.size()); ++i) {
    const Rows& m = matrices[i];
    const int64_t together = std::max<int64_t>(1, kShortChunk / std::max<int64_t>(1, m.row_length));
    for (int64_t first = 0; first < m.rows; first += together) {
      rows.blocks.push_back({i, first, std::min(together, m.rows - first)});
      numels.push_back(rows.blocks.back().rows * m.row_length);
    }
  }
  rows.table = cut_into_chunks(numels);
  return rows;
}

void sum_of_squares_per_row(const std::vector<Rows>& matrices, float clip_value,
                            std::vector<std::vector<double>>& sums) {
  const RowTable rows = cut_into_rows(matrices);
  const std::vector<Chunk>& chunks = rows.table.chunks;
  sums.resize(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    sums[i].assign(matrices[i].rows, 0.0);
  }
  std::vector<double> partial(chunks.size(), 0.0);
  cpu_target();  // as above
  for_each_chunk(rows.table, [&](int64_t c) {
    const RowBlock& block = rows.blocks[chunks[c].tensor];
    const Rows& m = matrices[block.matrix];
    const int64_t begin = block.first_row * m.row_length + chunks[c].offset;
    if (block.rows == 1) {
      partial[c] = sum_of_squares_cpu(m.data, begin, chunks[c].length, clip_value);
      return;
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      sums[block.matrix][block.first_row + row] =
          sum_of_squares_cpu(m.data, begin + row * m.row_length, m.row_length, clip_value);
    }
  });
  // Pieces of one row, in order. A row among others has its sum already.
  for (size_t c = 0; c < chunks.size(); ++c) {
    const RowBlock& block = rows.blocks[chunks[c].tensor];
    sums[block.matrix][block.first_row] += partial[c];
  }
}

double agc_factor(double grad_sum_of_squares, double param_sum_of_squares, double clipping, double eps) {
  return agc_row_factor(grad_sum_of_squares, param_sum_of_squares, clipping, eps);
}

FloatData checked_data(const Tensor& tensor, const char* list, size_t index) {
  STD_TORCH_CHECK(tensor.is_cpu(), element(list, index), " must be on the CPU for the compiled core");
  return dense_floats(tensor, list, index);
}

std::vector<FloatData> checked_data(const std::vector<Tensor>& tensors, const char* list) {
  std::vector<FloatData> data(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    data[i] = checked_data(tensors[i], list, i);
  }
  return data;
}

std::vector<int64_t> numels_of_list(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> numels(tensors.size());
  std::transform(tensors.begin(), tensors.end(), numels.begin(), [](const Tensor& t) { return t.numel(); });
  return numels;
}

Tensor grad_norm(const std::vector<Tensor>& grads, double norm_type) {
  STD_TORCH_CHECK(norm_type > 0.0, "norm_type must be above 0, got ", norm_type);
  const std::vector<FloatData> data = checked_data(grads, "grads");
  const double norm = norm_over_chunks(cut_into_chunks(numels_of_list(grads)), data, norm_type);
  Tensor result = torch::stable::empty({}, torch::headeronly::ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(norm);
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { library.impl("grad_norm", TORCH_BOX(&grad_norm)); }

}  // namespace pyft
