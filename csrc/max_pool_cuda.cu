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

template <int kLength>
using Floats = Vector<float, kLength>;

// -inf where the place is outside: it is never the larger one.
template <int kLength>
__device__ __forceinline__ Floats<kLength> value_at(const float* image, const Windows& w, int32_t row, int32_t column,
                                                    int64_t channels) {
  Floats<kLength> value;
  if (row >= 0 && row < w.height.in && column >= 0 && column < w.width.in) {
    return load_vector<kLength>(image + static_cast<int64_t>(row * w.width.in + column) * channels);
  }
#pragma unroll
  for (int c = 0; c < kLength; ++c) {
    value.at[c] = -INFINITY;
  }
  return value;
}

template <int kLength>
struct Largest {
  Floats<kLength> value;
  int32_t place[kLength];

  __device__ __forceinline__ explicit Largest(int32_t first) {
#pragma unroll
    for (int c = 0; c < kLength; ++c) {
      value.at[c] = -INFINITY;
      place[c] = first;
    }
  }

  __device__ __forceinline__ void take(const Floats<kLength>& x, int32_t at) {
#pragma unroll
    for (int c = 0; c < kLength; ++c) {
      take_larger(x.at[c], at, value.at[c], place[c]);
    }
  }
};

// kSide: side of a square window, all loads of which are then under way together; 0: any window. kLength channels a
// thread.
template <int kSide, int kLength>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const float* x, float* y, uint8_t* at, int64_t channels, Windows w, Grid grid) {
  for_each_place(grid, [&](int64_t i, const Grid::Place& place) {
    const int64_t plane = static_cast<int64_t>(w.height.in * w.width.in) * channels;
    const float* image = x + place.part * plane + place.group * kLength;
    const int32_t row = w.height.start(place.row), column = w.width.start(place.column);
    Largest<kLength> largest(w.height.first(place.row) * w.width.kernel + w.width.first(place.column));
    if constexpr (kSide > 0) {
      Floats<kLength> values[kSide * kSide];
#pragma unroll
      for (int k = 0; k < kSide * kSide; ++k) {
        values[k] = value_at<kLength>(image, w, row + k / kSide * w.height.dilation,
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
          largest.take(
              value_at<kLength>(image, w, row + ky * w.height.dilation, column + kx * w.width.dilation, channels),
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

// Channels last: kLength channels of one input.
template <int kLength>
__global__ void __launch_bounds__(kThreads)
    backward_last_kernel(const float* grad, const uint8_t* at, float* dx, int64_t channels, Windows w, Grid grid) {
  const auto by_height = [&](int32_t n) { return w.height_stride.quotient(n); };
  const auto by_width = [&](int32_t n) { return w.width_stride.quotient(n); };
  for_each_place(grid, [&](int64_t i, const Grid::Place& place) {
    Floats<kLength> sums = {};
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
            sums.at[c] = places.at[c] == ky * w.width.kernel + kx ? sums.at[c] + given.at[c] : sums.at[c];
          }
        }
      }
    }
    store_vector(dx + i * kLength, sums);
  });
}

// One channel: four inputs of a row, each window over them looked at once.
__global__ void __launch_bounds__(kThreads)
    backward_planes_kernel(const float* grad, const uint8_t* at, float* dx, bool aligned, Windows w, Grid grid) {
  const auto by_height = [&](int32_t n) { return w.height_stride.quotient(n); };
  const auto by_width = [&](int32_t n) { return w.width_stride.quotient(n); };
  for_each_place(grid, [&](int64_t, const Grid::Place& place) {
    Floats<kQuad> sums = {};
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
          const float given = load(grad + window);
#pragma unroll
          for (int c = 0; c < kQuad; ++c) {
            sums.at[c] = c == across ? sums.at[c] + given : sums.at[c];
          }
        }
      }
    }
    float* to = dx + (place.part * w.height.in + place.row) * w.width.in + first;
    if (aligned) {
      store_vector(to, sums);
      return;
    }
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      if (c < count) {
        store(to + c, sums.at[c]);
      }
    }
  });
}

UpTo blocks_for(const Grid& grid) { return {(grid.count + kThreads - 1) / kThreads}; }

template <int kSide, int kLength>
cudaError_t launch_pool(const float* x, float* y, uint8_t* at, int64_t channels, const Windows& w, const Grid& grid,
                        cudaStream_t stream) {
  return PYFT_LAUNCH((pool_kernel<kSide, kLength>), blocks_for(grid), kThreads, stream, x, y, at, channels, w, grid);
}

template <int kLength>
cudaError_t launch_pool_of_side(const float* x, float* y, uint8_t* at, int64_t channels, const Windows& w,
                                const Grid& grid, cudaStream_t stream) {
  switch (w.height.kernel == w.width.kernel ? w.height.kernel : 0) {
    case 2:
      return launch_pool<2, kLength>(x, y, at, channels, w, grid, stream);
    case 3:
      return launch_pool<3, kLength>(x, y, at, channels, w, grid, stream);
    default:
      return launch_pool<0, kLength>(x, y, at, channels, w, grid, stream);
  }
}

template <int kLength>
cudaError_t launch_backward_last(const float* grad, const uint8_t* at, float* dx, int64_t channels, const Windows& w,
                                 const Grid& grid, cudaStream_t stream) {
  return PYFT_LAUNCH(backward_last_kernel<kLength>, blocks_for(grid), kThreads, stream, grad, at, dx, channels, w,
                     grid);
}

cudaError_t launch_backward_planes(const float* grad, const uint8_t* at, float* dx, const Windows& w, const Grid& grid,
                                   cudaStream_t stream) {
  const bool aligned = w.width.in % kQuad == 0 && vector_aligned(dx);
  return PYFT_LAUNCH(backward_planes_kernel, blocks_for(grid), kThreads, stream, grad, at, dx, aligned, w, grid);
}

// Whether four channels lie together and begin at places where vectors may.
bool in_quads(int64_t channels, const float* one, const float* other, const uint8_t* at) {
  return channels % kQuad == 0 && vector_aligned(one, other) && reinterpret_cast<uintptr_t>(at) % kQuad == 0;
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

cudaError_t launch_max_pool(const float* x, float* y, uint8_t* at, int64_t parts, int64_t channels,
                            const PoolShape& shape, cudaStream_t stream) {
  if (parts == 0 || channels == 0) {
    return cudaSuccess;
  }
  const Windows windows(shape);
  const bool quads = in_quads(channels, x, y, at);
  const Grid grid(parts, shape.height.out, shape.width.out, quads ? channels / kQuad : channels);
  return quads ? launch_pool_of_side<kQuad>(x, y, at, channels, windows, grid, stream)
               : launch_pool_of_side<1>(x, y, at, channels, windows, grid, stream);
}

cudaError_t launch_max_pool_backward(const float* grad, const uint8_t* at, float* dx, int64_t parts, int64_t channels,
                                     const PoolShape& shape, cudaStream_t stream) {
  if (parts == 0 || channels == 0) {
    return cudaSuccess;
  }
  const Windows windows(shape);
  if (channels == 1) {
    const Grid grid(parts, shape.height.in, (shape.width.in + kQuad - 1) / kQuad, 1);
    return launch_backward_planes(grad, at, dx, windows, grid, stream);
  }
  const bool quads = in_quads(channels, grad, dx, at);
  const Grid grid(parts, shape.height.in, shape.width.in, quads ? channels / kQuad : channels);
  return quads ? launch_backward_last<kQuad>(grad, at, dx, channels, windows, grid, stream)
               : launch_backward_last<1>(grad, at, dx, channels, windows, grid, stream);
}

}  // namespace pyft
