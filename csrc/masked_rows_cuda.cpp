// Chosen columns, channels and compact parts on a GPU: checks, unpacks tensors, launches.
#include "masked_rows_cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda_device.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

using torch::headeronly::ScalarType;

FloatFormat format_of(const Tensor& x, const char* name) {
  const auto format = float_format(view_of(x.get()).dtype);
  STD_TORCH_CHECK(on_cuda(x) && x.dim() == 2 && format.has_value(), name,
                  " must be a float32, bfloat16 or float16 matrix on ", kCudaDevice);
  STD_TORCH_CHECK(x.size(1) < INT32_MAX, name, " has ", x.size(1), " columns; less than 2^31 are supported");
  return *format;
}

FloatFormat format_of_planes(const Tensor& x) {
  const auto format = float_format(view_of(x.get()).dtype);
  STD_TORCH_CHECK(on_cuda(x) && x.dim() == 3 && format.has_value(),
                  "x must be float32, bfloat16 or float16 (images, channels, places) on ", kCudaDevice);
  STD_TORCH_CHECK(x.size(2) <= 1 || x.stride(2) == 1, "x has strides ", to_string(x.strides()),
                  "; the places of a channel must lie side by side");
  return *format;
}

// Null where there is no index. Its values are the caller's to check: reading them here would wait for the GPU.
const int64_t* index_of(const std::optional<Tensor>& index, const Tensor& beside, int64_t count, const char* name) {
  if (!index.has_value()) {
    return nullptr;
  }
  STD_TORCH_CHECK(on_cuda(*index) && index->get_device_index() == beside.get_device_index() && index->dim() == 1 &&
                      index->is_contiguous() && index->scalar_type() == ScalarType::Long && index->numel() == count,
                  name, " must be ", count, " contiguous int64 on the device of the matrix");
  return static_cast<const int64_t*>(index->data_ptr());
}

}  // namespace

// (rows, count) and, where wanted, the sum of each of these columns; else an empty tensor.
std::tuple<Tensor, Tensor> gather_columns(const Tensor& x, const Tensor& columns, bool with_sums) {
  const FloatFormat format = format_of(x, "x");
  const int64_t rows = x.size(0), count = columns.numel();
  const int64_t* places = index_of(columns, x, count, "columns");
  const CudaDevice device(x);
  Tensor compact = torch::stable::new_empty(x, {rows, count});
  Tensor sums = with_sums && rows == 0 ? torch::stable::new_zeros(x, {count})
                                       : torch::stable::new_empty(x, {with_sums ? count : 0});
  ColumnGather gather{
      {x.data_ptr(), x.stride(0), x.stride(1)}, places, rows, count, compact.data_ptr(), nullptr, nullptr};
  std::optional<Tensor> partial;
  if (with_sums) {
    partial = torch::stable::new_empty(x, {column_sum_room(format, rows, count)}, ScalarType::Float);
    gather.partial = static_cast<float*>(partial->data_ptr());
    gather.sums = sums.data_ptr();
  }
  check_launch(launch_gather_columns(format, gather, device.stream()), "gather_columns");
  return {compact, sums};
}

// (images, count, places) and, where wanted, the sum of each of these channels; else an empty tensor.
std::tuple<Tensor, Tensor> gather_planes(const Tensor& x, const Tensor& channels, bool with_sums) {
  const FloatFormat format = format_of_planes(x);
  const int64_t images = x.size(0), count = channels.numel(), size = x.size(2);
  const int64_t* places = index_of(channels, x, count, "channels");
  // The stride between images of which there is one is nobody's.
  PlaneGather gather{x.data_ptr(), images > 1 ? x.stride(0) : 0, x.stride(1), places, images, count, size};
  const bool nothing = images == 0 || count == 0 || size == 0;
  STD_TORCH_CHECK(nothing || fits_31_bits(gather), images, " images of ", count, " channels of ", size,
                  " places; less than 2^31 planes and pieces of 32 places are supported");
  const CudaDevice device(x);
  Tensor compact = torch::stable::new_empty(x, {images, count, size});
  Tensor sums = with_sums && nothing ? torch::stable::new_zeros(x, {count})
                                     : torch::stable::new_empty(x, {with_sums ? count : 0});
  gather.compact = compact.data_ptr();
  std::optional<Tensor> partial;
  if (with_sums && !nothing) {
    partial = torch::stable::new_empty(x, {plane_sum_room(format, gather)}, ScalarType::Float);
    gather.partial = static_cast<float*>(partial->data_ptr());
    gather.sums = sums.data_ptr();
  }
  check_launch(launch_gather_planes(format, gather, device.stream()), "gather_planes");
  return {compact, sums};
}

void write_part_(Tensor full, const Tensor& part, const std::optional<Tensor>& rows,
                 const std::optional<Tensor>& columns) {
  const FloatFormat format = format_of(full, "full");
  STD_TORCH_CHECK(format_of(part, "part") == format && part.get_device_index() == full.get_device_index(),
                  "part must have the dtype and device of full");
  STD_TORCH_CHECK(
      (rows.has_value() || part.size(0) == full.size(0)) && (columns.has_value() || part.size(1) == full.size(1)),
      "part is ", to_string(part.sizes()), " and full ", to_string(full.sizes()),
      "; where rows or columns are not named they must be the same");
  const PartWrite write{{full.data_ptr(), full.stride(0), full.stride(1)},
                        {part.data_ptr(), part.stride(0), part.stride(1)},
                        index_of(rows, full, part.size(0), "rows"),
                        index_of(columns, full, part.size(1), "columns"),
                        part.size(0),
                        part.size(1)};
  const CudaDevice device(full);
  check_launch(launch_write_part(format, write, device.stream()), "write_part_");
}

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) {
  library.impl("gather_columns", TORCH_BOX(&gather_columns));
  library.impl("gather_planes", TORCH_BOX(&gather_planes));
  library.impl("write_part_", TORCH_BOX(&write_part_));
}

}  // namespace pyft
