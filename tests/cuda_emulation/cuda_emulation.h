// CUDA on the host: compiles the .cu files of csrc with g++ and runs the threads of a block as fibers, in an order of
// choice. A barrier that threads miss, a wrong mask, a misaligned or racing access is an exception that names the
// kernel, the block and the thread; nothing hangs. Included by csrc/cuda_launch.h under PYFT_CUDA_EMULATION.
#pragma once

#include "emulated_types.h"
//
#include "emulated_memory.h"
#include "emulated_runtime.h"
#include "emulated_warp.h"

#define PYFT_LAUNCH(kernel, grid, block, stream, ...)                                                                \
  ::cuda_emulation::launch(::cuda_emulation::kernel_name(#kernel, __PRETTY_FUNCTION__), kernel, grid, block, stream, \
                           __VA_ARGS__)
#define PYFT_SHARED(type, name, count)      \
  static const char name##_declaration = 0; \
  const auto name = ::cuda_emulation::shared_array<type>(&name##_declaration, #name, count)
