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
  const PartialGradient& work;
  int64_t token, column, rows, columns, rows_at_once;

  Ahead(const PartialGradient& of, int64_t first_token, int64_t first_column, int64_t calls)
      : work(of),
        token(first_token),
        column(first_column),
        rows(column < work.width ? std::min(kTokenBlock, work.tokens - token) : 0),
        columns(std::min(kStripWidth, work.width - column)),
        rows_at_once((rows + calls - 1) / calls) {}

  void fetch() {
    constexpr int64_t kLine = 16;
    for (int64_t row = 0; row < rows_at_once && rows > 0; ++row, --rows, ++token) {
      const float* from = work.input_of(token) + column;
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

// Several tokens at a time keep several streams of loads going.
constexpr int kTogether = 8;

struct Tokens {
  const float* grad[kTogether];
  int64_t count;
};

// One tile's rows of some tokens, token by token.
template <int64_t kHeight>
void pack_run(const Tokens& tokens, int64_t first_row, int64_t height, float* packed) {
  const int64_t rows = kHeight > 0 ? kHeight : height;
  for (int64_t k = 0; k < tokens.count; ++k) {
    std::copy_n(tokens.grad[k] + first_row, rows, packed + k * rows);
  }
}

void pack_chosen(const Tokens& tokens, const int64_t* rows, int64_t height, float* packed) {
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t k = 0; k < tokens.count; ++k) {
      packed[k * height + i] = tokens.grad[k][rows[i]];
    }
  }
}

// sums[r] += the sum over some tokens, added in pairs.
void add_columns(const PartialGradient& work, const Tokens& tokens, double* __restrict sums) {
  const float* g[kTogether];
  std::copy_n(tokens.grad, kTogether, g);
  if (tokens.count < kTogether) {
    for (int64_t k = 0; k < tokens.count; ++k) {
      for (int64_t r = 0; r < work.row_count; ++r) {
        sums[r] += g[k][work.rows[r]];
      }
    }
  } else if (work.run) {
    const int64_t first = work.rows[0];
    for (int64_t r = 0, i = first; r < work.row_count; ++r, ++i) {
      sums[r] += ((g[0][i] + g[1][i]) + (g[2][i] + g[3][i])) + ((g[4][i] + g[5][i]) + (g[6][i] + g[7][i]));
    }
  } else {
    for (int64_t r = 0; r < work.row_count; ++r) {
      const int64_t i = work.rows[r];
      sums[r] += ((g[0][i] + g[1][i]) + (g[2][i] + g[3][i])) + ((g[4][i] + g[5][i]) + (g[6][i] + g[7][i]));
    }
  }
}

}  // namespace

void pack_rows_cpu(const PartialGradient& work, int64_t first_token, float* packed, double* sums) {
  const int64_t full = tile_height(), end = std::min(work.tokens, first_token + kPackedAtOnce);
  const RowTiles rows(work.row_count, full);
  packed += first_token / kTokenBlock * packed_size(work.row_count);
  for (int64_t token = first_token; token < end; token += kTogether) {
    Tokens tokens{{}, std::min<int64_t>(kTogether, end - token)};
    for (int64_t k = 0; k < tokens.count; ++k) {
      tokens.grad[k] = work.grad_of(token + k);
    }
    for (int64_t t = 0; t < rows.tiles; ++t) {
      const int64_t first = rows.begin(t), height = rows.begin(t + 1) - first;
      float* to = packed + first * kTokenBlock + token % kTokenBlock * height;
      if (!work.run) {
        pack_chosen(tokens, work.rows + first, height, to);
      } else if (height == 6) {
        pack_run<6>(tokens, work.rows[0] + first, height, to);
      } else {
        pack_run<0>(tokens, work.rows[0] + first, height, to);
      }
    }
    if (sums != nullptr) {
      add_columns(work, tokens, sums);
    }
  }
}

void strip_gradient_cpu(const PartialGradient& work, const float* packed, const StripPart& part) {
#if PYFT_X86_TARGETS
  switch (cpu_target()) {
    case CpuTarget::avx512:
      return avx512::strip_gradient(work, packed, part);
    case CpuTarget::avx2:
      return avx2::strip_gradient(work, packed, part);
    default:
      break;
  }
#endif
  baseline::strip_gradient(work, packed, part);
}

}  // namespace pyft
