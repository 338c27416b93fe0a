// The norm of a list of gradients on a GPU, as an op.
#include "grad_norm_cuda.h"

#include <torch/csrc/stable/library.h>

#include "cuda_device.h"
#include "cuda_tensor_list.h"

namespace pyft {
namespace {

Tensor grad_norm(const std::vector<Tensor>& grads, double norm_type) {
  STD_TORCH_CHECK(norm_type > 0.0, "norm_type must be above 0, got ", norm_type);
  STD_TORCH_CHECK(!grads.empty(), "grads must not be empty");
  const CudaDevice device(grads[0]);
  refuse_capture(device.stream(), "grad_norm");
  const TensorList list(grads, "grads");
  const DeviceFloatsTable table = list.table();
  DeviceTable<double> scratch;
  scratch.reserve(norm_scratch(table.num_chunks, table.num_tensors), grads[0]);
  Tensor norm = torch::stable::empty({}, torch::headeronly::ScalarType::Float, std::nullopt, grads[0].device());
  check_launch(
      launch_norm(table, norm_type, scratch.data(), static_cast<float*>(norm.mutable_data_ptr()), device.stream()),
      "grad_norm");
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, PYFT_CUDA_KEY, library) { library.impl("grad_norm", TORCH_BOX(&grad_norm)); }

}  // namespace pyft
