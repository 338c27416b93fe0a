#include "partial_linear_cpu.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "cpu_target.h"

namespace pyft {
namespace {

// Rows in tiles of almost equal height: one of a single row would leave the multipliers waiting for each other.
struct RowTiles {
  int64_t row_count, tiles;

  RowTiles(int64_t count, int64_t height) : row_count(count), tiles((count + height - 1) / height) {}
  int64_t begin(int64_t tile) const { return tile * row_count / tiles; }
};

// Loads a block of a strip into the cache, a few rows with each call of fetch().
struct Ahead {
  const float* from;
  int64_t stride, rows, columns, rows_at_once;

  Ahead(const PartialGradient& work, int64_t token, int64_t column, int64_t calls)
      : from(work.input + token * work.input_stride + column),
        stride(work.input_stride),
        rows(column < work.width ? std::min(kTokenBlock, work.tokens - token) : 0),
        columns(std::min(kStripWidth, work.width - column)),
        rows_at_once((rows + calls - 1) / calls) {}

  void fetch() {
    constexpr int64_t kLine = 16;
    for (int64_t row = 0; row < rows_at_once && rows > 0; ++row, --rows, from += stride) {
      for (int64_t line = 0; line < columns; line += kLine) {
        __builtin_prefetch(from + line);
      }
    }
  }
};

}  // namespace
}  // namespace pyft

#define PYFT_LOOPS_FILE "partial_linear_loops.h"
#include "product_targets.h"

namespace pyft {
namespace {

int64_t tile_height() {
#if PYFT_X86_TARGETS
  return cpu_target() == CpuTarget::avx512 ? avx512::kTileHeight : avx2::kTileHeight;
#else
  return baseline::kTileHeight;
#endif
}

// Where the first token of a row goes, and how far apart its tokens are there.
struct Place {
  int64_t first, step;
};

template <int kTokens>
void gather_tokens(const PartialGradient& work, int64_t token, const std::vector<Place>& places, float* packed,
                   double* sums) {
  const float* from = work.grad + token * work.grad_stride;
  for (int64_t r = 0; r < work.row_count; ++r) {
    const float* column = from + work.rows[r];
    float* to = packed + places[r].first + token % kTokenBlock * places[r].step;
    for (int k = 0; k < kTokens; ++k) {
      to[k * places[r].step] = column[k * work.grad_stride];
    }
  }
  for (int64_t r = 0; sums != nullptr && r < work.row_count; ++r) {
    for (int k = 0; k < kTokens; ++k) {
      sums[r] += from[work.rows[r] + k * work.grad_stride];
    }
  }
}

}  // namespace

void pack_rows_cpu(const PartialGradient& work, int64_t first_token, float* packed, double* sums) {
  const RowTiles rows(work.row_count, tile_height());
  std::vector<Place> places(work.row_count);
  for (int64_t t = 0; t < rows.tiles; ++t) {
    const int64_t first = rows.begin(t), height = rows.begin(t + 1) - first;
    for (int64_t i = 0; i < height; ++i) {
      places[first + i] = {first * kTokenBlock + i, height};
    }
  }
  // Several tokens at a time keep several streams of loads going.
  constexpr int kTogether = 8;
  packed += first_token / kTokenBlock * packed_size(work.row_count);
  const int64_t end = std::min(work.tokens, first_token + kPackedAtOnce);
  int64_t token = first_token;
  for (; token + kTogether <= end; token += kTogether) {
    gather_tokens<kTogether>(work, token, places, packed, sums);
  }
  for (; token < end; ++token) {
    gather_tokens<1>(work, token, places, packed, sums);
  }
}

void strip_gradient_cpu(const PartialGradient& work, const float* packed, int64_t strip) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::strip_gradient(work, packed, strip);
    case CpuTarget::avx2:
      return avx2::strip_gradient(work, packed, strip);
    default:
      break;
  }
#endif
  baseline::strip_gradient(work, packed, strip);
}

}  // namespace pyft
