// Products with a packed weight, by all threads.
#pragma once

#include "packed_linear_cpu.h"

namespace pyft {

inline int64_t packed_floats(const StridedWeight& weight) {
  return panels_of(weight.outputs) * weight.inputs * kPanelWidth;
}

// packed: room for packed_floats.
void pack_weight(const StridedWeight& weight, float* packed);

// The whole of work.out.
void multiply_packed(const PackedLinear& work);

}  // namespace pyft
