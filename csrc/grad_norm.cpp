#include "grad_norm.h"

#include <cmath>

#include "cpu_target.h"
#include "grad_norm_cpu.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace pyft {

void sum_of_squares_per_chunk(const ChunkTable& table, const std::vector<const float*>& data,
                              std::vector<double>& partial) {
  partial.resize(table.chunks.size());
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  for_each_chunk(table, [&](int64_t c) {
    const Chunk& chunk = table.chunks[c];
    partial[c] = sum_of_squares_cpu(data[chunk.tensor] + chunk.offset, chunk.length);
  });
}

double add_in_order(const std::vector<double>& partial) {
  double total = 0.0;
  for (double sum : partial) {
    total += sum;
  }
  return total;
}

Tensor grad_norm(const std::vector<Tensor>& grads) {
  std::vector<int64_t> numels(grads.size());
  std::vector<const float*> data(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_fp32_cpu(grads[i], "grads", i);
    STD_TORCH_CHECK(is_dense(grads[i]), element("grads", i), " has sizes ", to_string(grads[i].sizes()),
                    " and strides ", to_string(grads[i].strides()),
                    ", with gaps or overlaps; pass a contiguous copy, or use pyft.ops.grad_norm");
    numels[i] = grads[i].numel();
    data[i] = static_cast<const float*>(grads[i].const_data_ptr());
  }
  std::vector<double> partial;
  sum_of_squares_per_chunk(cut_into_chunks(numels), data, partial);
  Tensor norm = torch::stable::empty({}, torch::headeronly::ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(add_in_order(partial)));
  return norm;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { library.impl("grad_norm", TORCH_BOX(&grad_norm)); }

}  // namespace pyft
