// Clipping lists of gradients in place on a GPU.
#include "clip_grads_cuda.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cuda_device.h"
#include "cuda_tensor_list.h"
#include "gradient_rows.h"

namespace pyft {
namespace {

void scale_grads_(const std::vector<Tensor>& grads, const Tensor& scale) {
  if (grads.empty()) {
    return;
  }
  STD_TORCH_CHECK(on_cuda(scale) && together(grads[0], scale) && scale.numel() == 1 &&
                      scale.scalar_type() == torch::headeronly::ScalarType::Float,
                  "scale must be one float32 number on the device of grads");
  const CudaDevice device(grads[0]);
  refuse_capture(device.stream(), "scale_grads_");
  const TensorList list(grads, "grads");
  check_launch(launch_scale(list.table(), static_cast<const float*>(scale.const_data_ptr()), device.stream()),
               "scale_grads_");
}

void clamp_grads_(const std::vector<Tensor>& grads, double limit) {
  STD_TORCH_CHECK(limit >= 0.0, "limit must be 0 or more, got ", limit);
  if (grads.empty()) {
    return;
  }
  const CudaDevice device(grads[0]);
  refuse_capture(device.stream(), "clamp_grads_");
  const TensorList list(grads, "grads");
  check_launch(launch_clamp(list.table(), static_cast<float>(limit), device.stream()), "clamp_grads_");
}

void agc_grads_(const std::vector<Tensor>& grads, const std::vector<Tensor>& params, double clipping, double eps) {
  check_same_count(params.size(), "params", grads.size(), "grads");
  if (grads.empty()) {
    return;
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    check_same_sizes(grads[i], params[i], i);
  }
  const CudaDevice device(grads[0]);
  refuse_capture(device.stream(), "agc_grads_");
  const TensorList of_grads(grads, "grads"), of_params(params, "params");
  STD_TORCH_CHECK(together(grads[0], params[0]), "params must be on the device of grads");
  std::vector<int64_t> rows, lengths;
  std::vector<DeviceRows> shapes;
  int64_t first_row = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const RowShape shape = row_shape(grads[i], "grads", i);
    row_shape(params[i], "params", i);
    // Nothing is to be read of rows without elements.
    rows.push_back(shape.length == 0 ? 0 : shape.rows);
    lengths.push_back(shape.length);
    shapes.push_back({shape.length, first_row});
    first_row += rows.back();
  }
  RowTasks made = cut_into_row_tasks(rows, lengths);
  DeviceTable<RowTask> tasks;
  DeviceTable<DeviceRows> device_rows;
  DeviceTable<DeviceCutRows> cut;
  DeviceTable<RowSums> pieces;
  DeviceTable<uint32_t> done;
  DeviceTable<float> factors;
  tasks.put(std::move(made.tasks), grads[0]);
  cut.put(std::move(made.cut), grads[0]);
  pieces.reserve(made.num_pieces, grads[0]);
  done.put(std::vector<uint32_t>(made.num_cut_rows, 0), grads[0]);
  device_rows.put(std::move(shapes), grads[0]);
  factors.reserve(first_row, grads[0]);
  const RowNormsWork work{tasks.data(),
                          tasks.size(),
                          device_rows.data(),
                          of_grads.table().tensors,
                          of_params.table().tensors,
                          INFINITY,
                          clipping,
                          eps,
                          nullptr,
                          factors.data(),
                          cut.data(),
                          pieces.data(),
                          done.data()};
  check_launch(launch_row_norms(work, device.stream()), "agc_grads_");
  check_launch(launch_scale_rows(of_grads.table(), device_rows.data(), factors.data(), device.stream()), "agc_grads_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) {
  library.impl("scale_grads_", TORCH_BOX(&scale_grads_));
  library.impl("clamp_grads_", TORCH_BOX(&clamp_grads_));
  library.impl("agc_grads_", TORCH_BOX(&agc_grads_));
}

}  // namespace pyft
