// Max pooling on a GPU. No torch header.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "float_formats.h"
#include "max_pool_math.h"

namespace pyft {

// Whether the kernels can count the places of one plane and the reach of its windows in 32 bits.
bool fits_cuda(const PoolShape& shape);

// x (parts, H, W, channels), y and at (parts, OH, OW, channels): planes with one channel each, or images with channels
// last; y of the format of x. The same bits as max_pool_cpu.h in fp32. Nothing is launched for no outputs.
cudaError_t launch_max_pool(FloatData x, void* y, uint8_t* at, int64_t parts, int64_t channels, const PoolShape& shape,
                            cudaStream_t stream);
// dx is written whole: each input gathers from the windows over it, in the order in which torch adds them, and in fp32,
// which is rounded once, as on a GPU in torch.
cudaError_t launch_max_pool_backward(FloatData grad, const uint8_t* at, void* dx, int64_t parts, int64_t channels,
                                     const PoolShape& shape, cudaStream_t stream);

}  // namespace pyft
