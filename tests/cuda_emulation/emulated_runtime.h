// The CUDA runtime of one emulated device whose memory is the host's. Everything is over when a call returns; what
#include <utility>
// would have waited or copied is counted.
#pragma once

#include <mutex>
#include <tuple>

#include "emulated_block.h"
#include "emulated_memory.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
// Of the toolkit whose interface this is.
#define CUDART_VERSION 13000

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace cuda_emulation {

struct Counters {
  int64_t launches = 0, synchronisations = 0, copies = 0, copied_bytes = 0, fills = 0, allocations = 0;
};
inline Counters counters;
inline cudaError_t last_error = cudaSuccess;
// Given by the next launch in place of running it, so that tests see what a failed one becomes.
inline cudaError_t next_launch = cudaSuccess;
inline std::recursive_mutex one_launch_at_a_time;

inline cudaError_t give(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

// The kernel as the source names it, and what the template arguments in that name are.
inline std::string kernel_name(const std::string& kernel, const std::string& launcher) {
  const size_t with = launcher.find(" [with ");
  const bool parenthesised = !kernel.empty() && kernel.front() == '(' && kernel.back() == ')';
  const std::string name = parenthesised ? kernel.substr(1, kernel.size() - 2) : kernel;
  return with == std::string::npos || name.find('<') == std::string::npos ? name : name + launcher.substr(with);
}

inline bool fits(dim3 grid, dim3 threads) {
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         count > 0 && count <= 1024 && threads.z <= 64;
}

inline std::vector<uint64_t> order_of_blocks(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t b = 0; b < count; ++b) {
    order[b] = settings.order == Order::descending ? count - 1 - b : b;
  }
  if (settings.order == Order::random) {
    std::mt19937_64 random(settings.seed);
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

inline void run_grid(const std::string& kernel, dim3 grid, dim3 threads, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads;
  races.begin_launch();
  traffic.begin_launch(kernel);
  for (uint64_t number : order_of_blocks(uint64_t{grid.x} * grid.y * grid.z)) {
    const uint64_t row = number / grid.x;
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(row % grid.y),
                static_cast<unsigned>(row / grid.y)};
    shared_memory.begin_block();
    races.begin_block();
    block.run(kernel, blockIdx, number, body);
    traffic.end_block();
  }
}

// Throws Error where a kernel does what it must not.
template <class... Parameters, class... Arguments>
cudaError_t launch(const std::string& name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, cudaStream_t,
                   Arguments... arguments) {
  const std::lock_guard guard(one_launch_at_a_time);
  ++counters.launches;
  if (next_launch != cudaSuccess) {
    return std::exchange(next_launch, cudaSuccess);
  }
  if (!fits(grid, threads)) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Parameters...> values{static_cast<Parameters>(arguments)...};
  run_grid(name, grid, threads, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

// `wanted` finds the grid from what the device holds at once, as pyft::UpTo does.
template <class... Parameters, class Wanted, class... Arguments>
  requires requires(const Wanted& wanted) { wanted.blocks; }
cudaError_t launch(const std::string& name, void (*kernel)(Parameters...), const Wanted& wanted, dim3 threads,
                   cudaStream_t stream, Arguments... arguments) {
  dim3 grid;
  const cudaError_t error = wanted.resolve(kernel, threads, grid);
  return error != cudaSuccess ? error : launch(name, kernel, grid, threads, stream, arguments...);
}

inline cudaError_t copy(void* to, const void* from, size_t bytes) {
  ++counters.copies;
  counters.copied_bytes += static_cast<int64_t>(bytes);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t synchronise() {
  ++counters.synchronisations;
  return cudaSuccess;
}

}  // namespace cuda_emulation

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return cuda_emulation::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unspecified launch failure";
  }
}
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "cudaErrorLaunchFailure";
  }
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return cuda_emulation::give(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulation::settings.processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    default:
      return cuda_emulation::give(cudaErrorInvalidValue);
  }
  return cuda_emulation::give(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel*, int threads, size_t) {
  *count = cuda_emulation::settings.blocks_each;
  return cuda_emulation::give(threads > 0 && threads <= 1024 ? cudaSuccess : cudaErrorInvalidValue);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cuda_emulation::synchronise(); }
inline cudaError_t cudaDeviceSynchronize() { return cuda_emulation::synchronise(); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  return cuda_emulation::copy(to, from, bytes);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  cuda_emulation::synchronise();
  return cuda_emulation::copy(to, from, bytes);
}
inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t = nullptr) {
  ++cuda_emulation::counters.fills;
  std::memset(place, value, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** place, size_t bytes) {
  ++cuda_emulation::counters.allocations;
  *place = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return cuda_emulation::give(*place == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}
inline cudaError_t cudaFree(void* place) {
  // As on a device, memory is not given back while work may use it.
  cuda_emulation::synchronise();
  std::free(place);
  return cudaSuccess;
}
