// Marks functions that both the host compiler and nvcc compile.
#pragma once

#ifdef __CUDACC__
#define PYFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYFT_HOST_DEVICE inline __attribute__((always_inline))
#endif
