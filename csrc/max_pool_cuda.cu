#include "clip_grads_math.h"
#include "division_math.h"
#include "max_pool_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;

using Axis = PoolAxisOf<int32_t>;

Axis narrow(const PoolAxis& axis) {
  const auto small = [](int64_t n) { return static_cast<int32_t>(n); };
  return {small(axis.in),     small(axis.out),     small(axis.kernel),
          small(axis.stride), small(axis.padding), small(axis.dilation)};
}

// One side of the windows and, of each, what the kernels divide by.
struct Windows {
  Axis height, width;
  Divisor height_stride, width_stride, kernel_width;

  explicit Windows(const PoolShape& shape)
      : height(narrow(shape.height)),
        width(narrow(shape.width)),
        height_stride(shape.height.stride),
        width_stride(shape.width.stride),
        kernel_width(shape.width.kernel) {}
};

// Numbers (part, row, column, group of channels), the last one fastest.
struct Grid {
  int64_t count;
  int32_t rows, columns, groups;
  Divisor by_rows, by_columns, by_groups;

  Grid(int64_t parts, int64_t rows, int64_t columns, int64_t groups)
      : count(parts * rows * columns * groups),
        rows(static_cast<int32_t>(rows)),
        columns(static_cast<int32_t>(columns)),
        groups(static_cast<int32_t>(groups)),
        by_rows(rows),
        by_columns(columns),
        by_groups(groups) {}

  struct Place {
    int64_t part;
    int32_t row, column, group;
  };

  __device__ __forceinline__ Place at(int64_t i) const {
    const int64_t position = by_groups.quotient(i), line = by_columns.quotient(position), part = by_rows.quotient(line);
    return {part, static_cast<int32_t>(line - part * rows), static_cast<int32_t>(position - line * columns),
            static_cast<int32_t>(i - position * groups)};
  }
};

template <class Work>
__device__ __forceinline__ void for_each_place(const Grid& grid, const Work& work) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < grid.count; i += step) {
    work(i, grid.at(i));
  }
}

// Channels that one thread takes where they lie together: 16 bytes.
template <class Element>
constexpr int kTogether = kVectorLength<Element>;

__device__ __forceinline__ float lowest(float) { return -INFINITY; }
__device__ __forceinline__ Bf16 lowest(Bf16) { return {0xff80}; }
__device__ __forceinline__ Fp16 lowest(Fp16) { return {0xfc00}; }

// -inf where the place is outside: it is never the larger one.
template <class Element, int kLength>
__device__ __forceinline__ Vector<Element, kLength> value_at(const Element* image, const Windows& w, int32_t row,
                                                             int32_t column, int64_t channels) {
  Vector<Element, kLength> value;
  if (row >= 0 && row < w.height.in && column >= 0 && column < w.width.in) {
    return load_vector<kLength>(image + static_cast<int64_t>(row * w.width.in + column) * channels);
  }
#pragma unroll
  for (int c = 0; c < kLength; ++c) {
    value.at[c] = lowest(Element{});
  }
  return value;
}

template <class Element, int kLength>
struct Largest {
  Vector<Element, kLength> value;
  int32_t place[kLength];

  __device__ __forceinline__ explicit Largest(int32_t first) {
#pragma unroll
    for (int c = 0; c < kLength; ++c) {
      value.at[c] = lowest(Element{});
      place[c] = first;
    }
  }

  __device__ __forceinline__ void take(const Vector<Element, kLength>& x, int32_t at) {
#pragma unroll
    for (int c = 0; c < kLength; ++c) {
      take_larger(x.at[c], at, value.at[c], place[c]);
    }
  }
};

// kSide: side of a square window, all loads of which are then under way together; 0: any window. kLength channels a
// thread.
template <class Element, int kSide, int kLength>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const Element* x, Element* y, uint8_t* at, int64_t channels, Windows w, Grid grid) {
  for_each_place(grid, [&](int64_t i, const Grid::Place& place) {
    const int64_t plane = static_cast<int64_t>(w.height.in * w.width.in) * channels;
    const Element* image = x + place.part * plane + place.group * kLength;
    const int32_t row = w.height.start(place.row), column = w.width.start(place.column);
    Largest<Element, kLength> largest(w.height.first(place.row) * w.width.kernel + w.width.first(place.column));
    if constexpr (kSide > 0) {
      Vector<Element, kLength> values[kSide * kSide];
#pragma unroll
      for (int k = 0; k < kSide * kSide; ++k) {
        values[k] = value_at<Element, kLength>(image, w, row + k / kSide * w.height.dilation,
                                               column + k % kSide * w.width.dilation, channels);
      }
#pragma unroll
      for (int k = 0; k < kSide * kSide; ++k) {
        largest.take(values[k], k);
      }
    } else {
      for (int32_t ky = 0; ky < w.height.kernel; ++ky) {
#pragma unroll 4
        for (int32_t kx = 0; kx < w.width.kernel; ++kx) {
          largest.take(value_at<Element, kLength>(image, w, row + ky * w.height.dilation,
                                                  column + kx * w.width.dilation, channels),
                       ky * w.width.kernel + kx);
        }
      }
    }
    Vector<uint8_t, kLength> bytes;
#pragma unroll
    for (int c = 0; c < kLength; ++c) {
      bytes.at[c] = static_cast<uint8_t>(largest.place[c]);
    }
    store_vector(y + i * kLength, largest.value);
    store_vector(at + i * kLength, bytes);
  });
}

template <class Element, int kLength>
__device__ __forceinline__ Vector<Element, kLength> rounded(const float (&sums)[kLength]) {
  Vector<Element, kLength> made;
#pragma unroll
  for (int c = 0; c < kLength; ++c) {
    round_into(made.at[c], sums[c]);
  }
  return made;
}

// Channels last: kLength channels of one input.
template <class Element, int kLength>
__global__ void __launch_bounds__(kThreads)
    backward_last_kernel(const Element* grad, const uint8_t* at, Element* dx, int64_t channels, Windows w, Grid grid) {
  const auto by_height = [&](int32_t n) { return w.height_stride.quotient(n); };
  const auto by_width = [&](int32_t n) { return w.width_stride.quotient(n); };
  for_each_place(grid, [&](int64_t i, const Grid::Place& place) {
    float sums[kLength] = {};
    const int64_t outputs = place.part * w.height.out;
    const int32_t last_row = w.height.last_over(place.row, by_height);
    const int32_t last_column = w.width.last_over(place.column, by_width);
    for (int32_t row = w.height.first_over(place.row, by_height); row <= last_row; ++row) {
      const int32_t down = place.row - w.height.start(row), ky = down / w.height.dilation;
      for (int32_t column = w.width.first_over(place.column, by_width); column <= last_column; ++column) {
        const int32_t across = place.column - w.width.start(column), kx = across / w.width.dilation;
        if (ky * w.height.dilation != down || kx * w.width.dilation != across) {
          continue;
        }
        const int64_t window = ((outputs + row) * w.width.out + column) * channels + place.group * kLength;
        const auto places = load_vector<kLength>(at + window);
        bool any = false;
#pragma unroll
        for (int c = 0; c < kLength; ++c) {
          any |= places.at[c] == ky * w.width.kernel + kx;
        }
        if (any) {
          const auto given = load_vector<kLength>(grad + window);
#pragma unroll
          for (int c = 0; c < kLength; ++c) {
            sums[c] = places.at[c] == ky * w.width.kernel + kx ? sums[c] + to_fp32(given.at[c]) : sums[c];
          }
        }
      }
    }
    store_vector(dx + i * kLength, rounded<Element>(sums));
  });
}

// One channel: four inputs of a row, each window over them looked at once.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    backward_planes_kernel(const Element* grad, const uint8_t* at, Element* dx, bool aligned, Windows w, Grid grid) {
  const auto by_height = [&](int32_t n) { return w.height_stride.quotient(n); };
  const auto by_width = [&](int32_t n) { return w.width_stride.quotient(n); };
  for_each_place(grid, [&](int64_t, const Grid::Place& place) {
    float sums[kQuad] = {};
    const int32_t first = place.column * kQuad, left = w.width.in - first, count = left < kQuad ? left : kQuad;
    const int64_t outputs = place.part * w.height.out;
    const int32_t last_row = w.height.last_over(place.row, by_height);
    const int32_t last_column = w.width.last_over(first + count - 1, by_width);
    for (int32_t row = w.height.first_over(place.row, by_height); row <= last_row; ++row) {
      for (int32_t column = w.width.first_over(first, by_width); column <= last_column; ++column) {
        const int64_t window = (outputs + row) * w.width.out + column;
        const int32_t k = load(at + window), ky = static_cast<int32_t>(w.kernel_width.quotient(k));
        const int32_t across = w.width.start(column) + (k - ky * w.width.kernel) * w.width.dilation - first;
        if (w.height.start(row) + ky * w.height.dilation == place.row && across >= 0 && across < count) {
          const float given = to_fp32(load(grad + window));
#pragma unroll
          for (int c = 0; c < kQuad; ++c) {
            sums[c] = c == across ? sums[c] + given : sums[c];
          }
        }
      }
    }
    Element* to = dx + (place.part * w.height.in + place.row) * w.width.in + first;
    const auto made = rounded<Element>(sums);
    if (aligned) {
      store_vector(to, made);
      return;
    }
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      if (c < count) {
        store(to + c, made.at[c]);
      }
    }
  });
}

UpTo blocks_for(const Grid& grid) { return {(grid.count + kThreads - 1) / kThreads}; }

template <class Element, int kSide, int kLength>
cudaError_t launch_pool(const Element* x, Element* y, uint8_t* at, int64_t channels, const Windows& w, const Grid& grid,
                        cudaStream_t stream) {
  return PYFT_LAUNCH((pool_kernel<Element, kSide, kLength>), blocks_for(grid), kThreads, stream, x, y, at, channels, w,
                     grid);
}

template <int kLength, class Element>
cudaError_t launch_pool_of_side(const Element* x, Element* y, uint8_t* at, int64_t channels, const Windows& w,
                                const Grid& grid, cudaStream_t stream) {
  switch (w.height.kernel == w.width.kernel ? w.height.kernel : 0) {
    case 2:
      return launch_pool<Element, 2, kLength>(x, y, at, channels, w, grid, stream);
    case 3:
      return launch_pool<Element, 3, kLength>(x, y, at, channels, w, grid, stream);
    default:
      return launch_pool<Element, 0, kLength>(x, y, at, channels, w, grid, stream);
  }
}

template <int kLength, class Element>
cudaError_t launch_backward_last(const Element* grad, const uint8_t* at, Element* dx, int64_t channels,
                                 const Windows& w, const Grid& grid, cudaStream_t stream) {
  return PYFT_LAUNCH((backward_last_kernel<Element, kLength>), blocks_for(grid), kThreads, stream, grad, at, dx,
                     channels, w, grid);
}

template <class Element>
cudaError_t launch_backward_planes(const Element* grad, const uint8_t* at, Element* dx, const Windows& w,
                                   const Grid& grid, cudaStream_t stream) {
  const bool aligned = w.width.in % kQuad == 0 && vector_aligned(dx);
  return PYFT_LAUNCH(backward_planes_kernel<Element>, blocks_for(grid), kThreads, stream, grad, at, dx, aligned, w,
                     grid);
}

// Whether the channels of a vector lie together and begin at places where vectors may.
template <class Element>
bool in_vectors(int64_t channels, const Element* one, const Element* other, const uint8_t* at) {
  return channels % kTogether<Element> == 0 && vector_aligned(one, other) &&
         reinterpret_cast<uintptr_t>(at) % kTogether<Element> == 0;
}

template <class Element>
cudaError_t launch_pool_of(const Element* x, Element* y, uint8_t* at, int64_t parts, int64_t channels,
                           const PoolShape& shape, cudaStream_t stream) {
  constexpr int kLength = kTogether<Element>;
  const Windows windows(shape);
  const bool vectors = in_vectors(channels, x, y, at);
  const Grid grid(parts, shape.height.out, shape.width.out, vectors ? channels / kLength : channels);
  return vectors ? launch_pool_of_side<kLength>(x, y, at, channels, windows, grid, stream)
                 : launch_pool_of_side<1>(x, y, at, channels, windows, grid, stream);
}

template <class Element>
cudaError_t launch_backward_of(const Element* grad, const uint8_t* at, Element* dx, int64_t parts, int64_t channels,
                               const PoolShape& shape, cudaStream_t stream) {
  constexpr int kLength = kTogether<Element>;
  const Windows windows(shape);
  if (channels == 1) {
    const Grid grid(parts, shape.height.in, (shape.width.in + kQuad - 1) / kQuad, 1);
    return launch_backward_planes(grad, at, dx, windows, grid, stream);
  }
  const bool vectors = in_vectors(channels, grad, dx, at);
  const Grid grid(parts, shape.height.in, shape.width.in, vectors ? channels / kLength : channels);
  return vectors ? launch_backward_last<kLength>(grad, at, dx, channels, windows, grid, stream)
                 : launch_backward_last<1>(grad, at, dx, channels, windows, grid, stream);
}

// Calls work(input, output), both of the type of the format.
template <class Work>
cudaError_t by_format(FloatData x, void* y, const Work& work) {
  switch (x.format) {
    case FloatFormat::bf16:
      return work(static_cast<const Bf16*>(x.data), static_cast<Bf16*>(y));
    case FloatFormat::fp16:
      return work(static_cast<const Fp16*>(x.data), static_cast<Fp16*>(y));
    default:
      return work(static_cast<const float*>(x.data), static_cast<float*>(y));
  }
}

}  // namespace

bool fits_cuda(const PoolShape& shape) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const PoolAxis& axis : {shape.height, shape.width}) {
    // Each first, so that the sum cannot overflow.
    if (axis.in > kMost || axis.out > kMost || axis.stride > kMost || axis.padding > kMost || axis.dilation > kMost ||
        axis.in + axis.padding + axis.stride + axis.kernel * axis.dilation > kMost) {
      return false;
    }
  }
  return shape.height.in * shape.width.in <= kMost && shape.height.out * shape.width.out <= kMost;
}

cudaError_t launch_max_pool(FloatData x, void* y, uint8_t* at, int64_t parts, int64_t channels, const PoolShape& shape,
                            cudaStream_t stream) {
  return parts == 0 || channels == 0 ? cudaSuccess : by_format(x, y, [&](auto* from, auto* to) {
    return launch_pool_of(from, to, at, parts, channels, shape, stream);
  });
}

cudaError_t launch_max_pool_backward(FloatData grad, const uint8_t* at, void* dx, int64_t parts, int64_t channels,
                                     const PoolShape& shape, cudaStream_t stream) {
  return parts == 0 || channels == 0 ? cudaSuccess : by_format(grad, dx, [&](auto* from, auto* to) {
    return launch_backward_of(from, at, to, parts, channels, shape, stream);
  });
}

}  // namespace pyft
