// What every kernel needs: its launch, the size of its grid, shared memory, and access to global memory.
// Kernels touch global memory through load, store, their vector forms and atomics alone, and shared memory through
// PYFT_SHARED: there the host emulation (tests/cuda_emulation) counts traffic and finds races. No torch header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

#ifdef PYFT_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
// cudaError_t of starting kernel(args...) on `grid`, a dim3 or UpTo. A kernel with several template arguments goes in
// parentheses.
#define PYFT_LAUNCH(kernel, grid, block, stream, ...) ::pyft::launch(kernel, grid, block, stream, __VA_ARGS__)
// `count` elements of an arithmetic type, used as name[i]; a device function takes `name` as a template argument.
#define PYFT_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace pyft {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;

// N elements that move as one access of at most 16 bytes; their place must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= kVectorBytes && (N & (N - 1)) == 0, "no such access");
  T at[N];
};

template <class T>
constexpr int kVectorLength = kVectorBytes / static_cast<int>(sizeof(T));

// Whether vectors may begin at each of these places.
template <class... Pointers>
bool vector_aligned(const Pointers*... places) {
  return ((reinterpret_cast<uintptr_t>(places) % kVectorBytes == 0) && ...);
}

// A grid of as many blocks as the current device runs at once, but no more than these and at least one.
struct UpTo {
  int64_t blocks;

  template <class Kernel>
  cudaError_t resolve(Kernel* kernel, dim3 block, dim3& grid) const {
    int device = 0, processors = 0, each = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(block.x), 0);
    }
    const int64_t room = static_cast<int64_t>(processors) * each;
    const int64_t fitting = blocks < room ? blocks : room;
    grid = dim3(static_cast<unsigned>(fitting < 1 ? 1 : fitting));
    return error;
  }
};

#ifdef PYFT_CUDA_EMULATION

using cuda_emulation::load;
using cuda_emulation::store;

template <class T>
T load_once(const T* place, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return load(place, site);
}
template <class T>
void store_once(T* place, std::type_identity_t<T> value, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  store(place, value, site);
}

#elif defined(__CUDACC__)

// A failed launch is told once, here: the next one's check must not find it again.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#ifdef PYFT_CUDA_SERVES_CPU
  if (error == cudaSuccess) {
    return cudaDeviceSynchronize();
  }
#endif
  return error == cudaSuccess ? error : cudaGetLastError();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), UpTo most, dim3 block, cudaStream_t stream, Arguments... arguments) {
  dim3 grid;
  const cudaError_t error = most.resolve(kernel, block, grid);
  return error != cudaSuccess ? error : launch(kernel, grid, block, stream, arguments...);
}

// The integers as which a type moves in one instruction, or the type itself.
template <class T>
struct MovesAs {
  template <class Bits>
  static constexpr bool kFits = sizeof(T) == sizeof(Bits) && alignof(T) >= alignof(Bits);
  using type =
      std::conditional_t<kFits<uint4>, uint4,
                         std::conditional_t<kFits<uint2>, uint2, std::conditional_t<kFits<unsigned>, unsigned, T> > >;
};

template <class T>
__device__ __forceinline__ T load(const T* place) {
  using Bits = typename MovesAs<T>::type;
  return __builtin_bit_cast(T, *reinterpret_cast<const Bits*>(place));
}

template <class T>
__device__ __forceinline__ void store(T* place, std::type_identity_t<T> value) {
  using Bits = typename MovesAs<T>::type;
  *reinterpret_cast<Bits*>(place) = __builtin_bit_cast(Bits, value);
}

// What this kernel looks at no more: the first to leave the cache.
template <class T>
__device__ __forceinline__ T load_once(const T* place) {
  using Bits = typename MovesAs<T>::type;
  return __builtin_bit_cast(T, __ldcs(reinterpret_cast<const Bits*>(place)));
}

template <class T>
__device__ __forceinline__ void store_once(T* place, std::type_identity_t<T> value) {
  using Bits = typename MovesAs<T>::type;
  __stcs(reinterpret_cast<Bits*>(place), __builtin_bit_cast(Bits, value));
}

#endif

#if defined(PYFT_CUDA_EMULATION)
#define PYFT_SITE , cuda_emulation::Site site = cuda_emulation::Site::current()
#define PYFT_AT_SITE , site
#elif defined(__CUDACC__)
#define PYFT_SITE
#define PYFT_AT_SITE
#endif

#ifdef PYFT_SITE

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector_once(const T* place PYFT_SITE) {
  return load_once(reinterpret_cast<const Vector<T, N>*>(place) PYFT_AT_SITE);
}

template <int N, class T>
__device__ __forceinline__ void store_vector_once(T* place, Vector<T, N> value PYFT_SITE) {
  store_once(reinterpret_cast<Vector<T, N>*>(place), value PYFT_AT_SITE);
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* place PYFT_SITE) {
  return load(reinterpret_cast<const Vector<T, N>*>(place) PYFT_AT_SITE);
}

template <int N, class T>
__device__ __forceinline__ void store_vector(T* place, Vector<T, N> value PYFT_SITE) {
  store(reinterpret_cast<Vector<T, N>*>(place), value PYFT_AT_SITE);
}

#endif

}  // namespace pyft
