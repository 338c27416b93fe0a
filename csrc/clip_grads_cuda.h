// Clipping lists of gradients in place on a GPU, one launch for all of them. No torch header.
#pragma once

#include "cuda_launch.h"
#include "grad_norm_cuda.h"
#include "row_norms_cuda.h"

namespace pyft {

// By *factor, which lies in device memory. Where it is 1, nothing is read or written.
cudaError_t launch_scale(const DeviceFloatsTable& grads, const float* factor, cudaStream_t stream);

// To [-limit, limit]; NaN stays NaN.
cudaError_t launch_clamp(const DeviceFloatsTable& grads, float limit, cudaStream_t stream);

// Each row by its factor. Elements whose factor is 1 are not written.
cudaError_t launch_scale_rows(const DeviceFloatsTable& grads, const DeviceRows* rows, const float* factors,
                              cudaStream_t stream);

}  // namespace pyft
