#pragma once

#include <cstdint>

#include "bit_masks_math.h"
#include "float_formats.h"

namespace pyft {

// All work on elements offset .. offset + length - 1, `offset` a multiple of 8; `bits` begins at element 0. The same
// bits for every CPU target. Inputs and outputs of one call have one format.

// y = max(x, 0) and where the gradient goes through; y may be x.
void relu_bits_cpu(FloatData x, void* y, uint8_t* bits, int64_t offset, int64_t length);
void pack_bits_cpu(FloatData x, uint8_t* bits, int64_t offset, int64_t length, BitTest test, float low, float high);
// Which of these bytes are not 0.
void pack_bools_cpu(const uint8_t* x, uint8_t* bits, int64_t offset, int64_t length);
// y = x where the bit is set, else x * off; off = 0 gives 0 whatever x is.
void mask_by_bits_cpu(FloatData x, const uint8_t* bits, void* y, int64_t offset, int64_t length, float off);
// y = x * (on where the bit is set, else 0).
void scale_by_bits_cpu(FloatData x, const uint8_t* bits, void* y, int64_t offset, int64_t length, float on);
// y = max(x * scale[channel] + shift[channel], 0) in fp32, and where the gradient goes through.
void affine_relu_bits_cpu(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                          int64_t offset, int64_t length, ChannelLayout layout);
// y = x * scale[channel] where the bit is set, else 0.
void mask_channels_cpu(const float* x, const uint8_t* bits, const float* scale, float* y, int64_t offset,
                       int64_t length, ChannelLayout layout);

}  // namespace pyft
