// Activations that keep one bit for each element, on a GPU. No torch header.
#pragma once

#include <cstdint>

#include "bit_masks_math.h"
#include "cuda_launch.h"

namespace pyft {

// The same results as bit_masks_cpu.h gives, for all `length` elements at once. Any alignment; vectors of 16 bytes
// where x and y allow them. Nothing is launched for no elements.
cudaError_t launch_relu_bits(FloatData x, void* y, uint8_t* bits, int64_t length, cudaStream_t stream);
cudaError_t launch_pack_bits(FloatData x, uint8_t* bits, int64_t length, BitTest test, float low, float high,
                             cudaStream_t stream);
cudaError_t launch_pack_bools(const uint8_t* x, uint8_t* bits, int64_t length, cudaStream_t stream);
cudaError_t launch_mask_by_bits(FloatData x, const uint8_t* bits, void* y, int64_t length, float off,
                                cudaStream_t stream);
cudaError_t launch_scale_by_bits(FloatData x, const uint8_t* bits, void* y, int64_t length, float on,
                                 cudaStream_t stream);
cudaError_t launch_affine_relu_bits(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                                    int64_t length, ChannelLayout layout, cudaStream_t stream);
cudaError_t launch_mask_channels(const float* x, const uint8_t* bits, const float* scale, float* y, int64_t length,
                                 ChannelLayout layout, cudaStream_t stream);

}  // namespace pyft
