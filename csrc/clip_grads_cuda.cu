#include "clip_grads_cuda.h"
#include "clip_grads_math.h"
#include "four_elements_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;

__device__ __forceinline__ uint32_t bits_in_format(FloatFormat format, float x) {
  return format == FloatFormat::fp32 ? bits_of(x) : format == FloatFormat::bf16 ? to_bf16(x).bits : to_fp16(x).bits;
}

// Changes: all() tells whether there is anything to do, begin(tensor) what is needed of a tensor, and
// change(place, count, values) changes four elements and tells whether they are to be written.
struct ScaleAll {
  const float* factor;

  struct OfTensor {
    ScaleBy scale;
    __device__ __forceinline__ bool change(int64_t, int, float (&x)[kFour]) const {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        x[i] = scale(x[i]);
      }
      return true;
    }
  };
  __device__ __forceinline__ bool all() const { return load(factor) != 1.0f; }
  __device__ __forceinline__ OfTensor begin(int32_t) const { return {{load(factor)}}; }
};

struct ClampAll {
  ClampTo clamp;

  __device__ __forceinline__ bool all() const { return true; }
  __device__ __forceinline__ ClampAll begin(int32_t) const { return *this; }
  __device__ __forceinline__ bool change(int64_t, int, float (&x)[kFour]) const {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      x[i] = clamp(x[i]);
    }
    return true;
  }
};

struct ScaleRows {
  const DeviceRows* rows;
  const float* factors;

  struct OfTensor {
    const float* factors;
    int64_t length;

    __device__ __forceinline__ bool change(int64_t place, int count, float (&x)[kFour]) const {
      float found[kFour];
      factors_of_rows(factors, length, place, count, found);
      bool any = false;
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        any = any || found[i] != 1.0f;
        x[i] = ScaleBy{found[i]}(x[i]);
      }
      return any;
    }
  };
  __device__ __forceinline__ bool all() const { return true; }
  __device__ __forceinline__ OfTensor begin(int32_t tensor) const {
    const DeviceRows of_tensor = load(rows + tensor);
    return {factors + of_tensor.first_row, of_tensor.length};
  }
};

template <class Change>
__global__ void __launch_bounds__(kThreads) change_kernel(DeviceFloatsTable table, Change change) {
  if (!change.all()) {
    return;
  }
  for (int64_t c = blockIdx.x; c < table.num_chunks; c += gridDim.x) {
    const DeviceChunk chunk = load(table.chunks + c);
    const DeviceFloats tensor = load(table.tensors + chunk.tensor);
    const FloatFormat format = tensor.float_format();
    const int bytes = bytes_of(format);
    const auto of_tensor = change.begin(chunk.tensor);
    for (int first = static_cast<int>(threadIdx.x) * kFour; first < chunk.length; first += kThreads * kFour * kLoads) {
      Four raw[kLoads];
      int count[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int place = first + j * kThreads * kFour, left = chunk.length - place;
        count[j] = left < 0 ? 0 : left < kFour ? left : kFour;
        raw[j] = load_four(tensor.data, bytes, chunk.offset + place, count[j]);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t place = chunk.offset + first + j * kThreads * kFour;
        float values[kFour];
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          values[i] = fp32_at(raw[j], format, i);
        }
        if (count[j] > 0 && of_tensor.change(place, count[j], values)) {
          Four changed = {};
#pragma unroll
          for (int i = 0; i < kFour; ++i) {
            put_bits(changed, bytes, i, bits_in_format(format, values[i]));
          }
          store_four(const_cast<void*>(tensor.data), bytes, place, count[j], changed);
        }
      }
    }
  }
}

template <class Change>
cudaError_t launch_change(const DeviceFloatsTable& table, const Change& change, cudaStream_t stream) {
  return PYFT_LAUNCH(change_kernel<Change>, UpTo{table.num_chunks}, kThreads, stream, table, change);
}

}  // namespace

cudaError_t launch_scale(const DeviceFloatsTable& grads, const float* factor, cudaStream_t stream) {
  return launch_change(grads, ScaleAll{factor}, stream);
}

cudaError_t launch_clamp(const DeviceFloatsTable& grads, float limit, cudaStream_t stream) {
  return launch_change(grads, ClampAll{{limit}}, stream);
}

cudaError_t launch_scale_rows(const DeviceFloatsTable& grads, const DeviceRows* rows, const float* factors,
                              cudaStream_t stream) {
  return launch_change(grads, ScaleRows{rows, factors}, stream);
}

}  // namespace pyft
