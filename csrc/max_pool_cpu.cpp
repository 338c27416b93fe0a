#include "max_pool_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_target.h"

namespace pyft {
namespace {

// Compares a row of inputs, `step` apart, with the largest so far.
PYFT_HOST_DEVICE void compare(const float* x, int64_t step, int64_t count, int32_t place, float* largest, int32_t* at) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) {
      take_larger(x[i], place, largest[i], at[i]);
    }
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) {
      take_larger(x[2 * i], place, largest[i], at[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      take_larger(x[step * i], place, largest[i], at[i]);
    }
  }
}

PYFT_HOST_DEVICE void narrow(const int32_t* wide, uint8_t* at, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    at[i] = static_cast<uint8_t>(wide[i]);
  }
}

PYFT_HOST_DEVICE void pool_rows(const float* x, float* y, uint8_t* at, int32_t* work, int64_t first_row,
                                int64_t last_row, const PoolShape& s) {
  const PoolAxis h = s.height, w = s.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t oy = row % h.out;
    const float* plane = x + row / h.out * h.in * w.in;
    float* largest = y + row * w.out;
    for (int64_t ox = 0; ox < w.out; ++ox) {
      largest[ox] = -INFINITY;
      work[ox] = static_cast<int32_t>(h.first(oy) * w.kernel + w.first(ox));
    }
    for (int64_t ky = 0; ky < h.kernel; ++ky) {
      if (!h.inside(oy, ky)) {
        continue;
      }
      const float* line = plane + (h.start(oy) + ky * h.dilation) * w.in;
      for (int64_t kx = 0; kx < w.kernel; ++kx) {
        const int64_t begin = w.begin(kx), end = w.end(kx);
        if (begin < end) {
          compare(line + w.start(begin) + kx * w.dilation, w.stride, end - begin,
                  static_cast<int32_t>(ky * w.kernel + kx), largest + begin, work + begin);
        }
      }
    }
    narrow(work, at + row * w.out, w.out);
  }
}

PYFT_HOST_DEVICE void pool_rows_last(const float* x, float* y, uint8_t* at, int32_t* work, int64_t channels,
                                     int64_t first_row, int64_t last_row, const PoolShape& s) {
  const PoolAxis h = s.height, w = s.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t oy = row % h.out;
    const float* image = x + row / h.out * h.in * w.in * channels;
    for (int64_t ox = 0; ox < w.out; ++ox) {
      float* largest = y + (row * w.out + ox) * channels;
      std::fill(largest, largest + channels, -INFINITY);
      std::fill(work, work + channels, static_cast<int32_t>(h.first(oy) * w.kernel + w.first(ox)));
      for (int64_t ky = 0; ky < h.kernel; ++ky) {
        for (int64_t kx = 0; kx < w.kernel; ++kx) {
          if (h.inside(oy, ky) && w.inside(ox, kx)) {
            const int64_t place = (h.start(oy) + ky * h.dilation) * w.in + w.start(ox) + kx * w.dilation;
            compare(image + place * channels, 1, channels, static_cast<int32_t>(ky * w.kernel + kx), largest, work);
          }
        }
      }
      narrow(work, at + (row * w.out + ox) * channels, channels);
    }
  }
}

#if PYFT_X86_TARGETS
PYFT_TARGET_AVX2 void pool_rows_avx2(const float* x, float* y, uint8_t* at, int32_t* work, int64_t first, int64_t last,
                                     const PoolShape& shape) {
  pool_rows(x, y, at, work, first, last, shape);
}

PYFT_TARGET_AVX512 void pool_rows_avx512(const float* x, float* y, uint8_t* at, int32_t* work, int64_t first,
                                         int64_t last, const PoolShape& shape) {
  pool_rows(x, y, at, work, first, last, shape);
}

PYFT_TARGET_AVX2 void pool_rows_last_avx2(const float* x, float* y, uint8_t* at, int32_t* work, int64_t channels,
                                          int64_t first, int64_t last, const PoolShape& shape) {
  pool_rows_last(x, y, at, work, channels, first, last, shape);
}

PYFT_TARGET_AVX512 void pool_rows_last_avx512(const float* x, float* y, uint8_t* at, int32_t* work, int64_t channels,
                                              int64_t first, int64_t last, const PoolShape& shape) {
  pool_rows_last(x, y, at, work, channels, first, last, shape);
}
#endif

}  // namespace

void max_pool_rows_cpu(const float* x, float* y, uint8_t* at, int32_t* work, int64_t first_row, int64_t last_row,
                       const PoolShape& shape) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return pool_rows_avx512(x, y, at, work, first_row, last_row, shape);
    case CpuTarget::avx2:
      return pool_rows_avx2(x, y, at, work, first_row, last_row, shape);
    default:
      break;
  }
#endif
  pool_rows(x, y, at, work, first_row, last_row, shape);
}

void max_pool_rows_last_cpu(const float* x, float* y, uint8_t* at, int32_t* work, int64_t channels, int64_t first_row,
                            int64_t last_row, const PoolShape& shape) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return pool_rows_last_avx512(x, y, at, work, channels, first_row, last_row, shape);
    case CpuTarget::avx2:
      return pool_rows_last_avx2(x, y, at, work, channels, first_row, last_row, shape);
    default:
      break;
  }
#endif
  pool_rows_last(x, y, at, work, channels, first_row, last_row, shape);
}

void max_pool_backward_cpu(const float* grad, const uint8_t* at, float* dx, int64_t channels, int64_t first_part,
                           int64_t last_part, const PoolShape& shape) {
  const PoolAxis h = shape.height, w = shape.width;
  // Where in the input a place of the window lies, from the window's start.
  std::vector<int64_t> places(256, 0);
  for (int64_t k = 0; k < h.kernel * w.kernel; ++k) {
    places[k] = k / w.kernel * h.dilation * w.in + k % w.kernel * w.dilation;
  }
  const uint64_t plane = static_cast<uint64_t>(h.in * w.in);
  for (int64_t part = first_part; part < last_part; ++part) {
    float* to = dx + part * h.in * w.in * channels;
    std::fill(to, to + h.in * w.in * channels, 0.0f);
    const float* from = grad + part * h.out * w.out * channels;
    const uint8_t* places_of = at + part * h.out * w.out * channels;
    for (int64_t oy = 0; oy < h.out; ++oy) {
      for (int64_t ox = 0; ox < w.out; ++ox) {
        const int64_t start = h.start(oy) * w.in + w.start(ox);
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t place = start + places[*places_of++];
          // Offsets that do not come from the forward pass must not write elsewhere.
          if (static_cast<uint64_t>(place) < plane) {
            to[place * channels + c] += *from;
          }
          ++from;
        }
      }
    }
  }
}

}  // namespace pyft
