// Loops of the gradient of chosen rows, for product_targets.h; there is no include guard.

namespace pyft::PYFT_LOOPS {

constexpr int kVecs = 2, kTileHeight = PYFT_LOOPS_LANES == 16 ? 12 : 6, kPanel = kVecs * PYFT_LOOPS_LANES;

typedef float Vec __attribute__((vector_size(4 * PYFT_LOOPS_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * PYFT_LOOPS_LANES), aligned(4), may_alias));

// c (+)= a^T b for `kHeight` rows of c: all of c stays in registers while the tokens of a block go by.
template <int kHeight>
PYFT_LOOPS_TARGET void tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add) {
  Vec sums[kHeight][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
    sums[i][0] = sums[i][1] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k, a += kHeight, b += kPanel) {
    const Vec left = *reinterpret_cast<const Unaligned*>(b);
    const Vec right = *reinterpret_cast<const Unaligned*>(b + PYFT_LOOPS_LANES);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i) {
      const Vec factor = a[i] - Vec{};
      sums[i][0] = PYFT_LOOPS_FMA(factor, left, sums[i][0]);
      sums[i][1] = PYFT_LOOPS_FMA(factor, right, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
    Unaligned* place = reinterpret_cast<Unaligned*>(c + i * stride);
    place[0] = add ? place[0] + sums[i][0] : sums[i][0];
    place[1] = add ? place[1] + sums[i][1] : sums[i][1];
  }
}

using Tile = void (*)(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add);

template <int... kHeights>
constexpr std::array<Tile, sizeof...(kHeights)> tiles_of(std::integer_sequence<int, kHeights...>) {
  return {&tile<kHeights + 1>...};
}

// kTiles[h - 1] has h rows.
constexpr auto kTiles = tiles_of(std::make_integer_sequence<int, kTileHeight>());

// All panels of a strip, row by row. Full panels are kPanel columns; the last may have fewer and is filled up with
// zeros.
PYFT_LOOPS_TARGET void pack_strip(const PartialGradient& work, int64_t token, int64_t depth, int64_t first_column,
                                  int64_t columns, float* to) {
  constexpr int64_t kPanelSize = kTokenBlock * kPanel, kLine = 16, kAhead = 12;
  for (int64_t k = 0; k < depth; ++k, to += kPanel) {
    const float* from = work.input_of(token + k) + first_column;
    // Rows are too far apart for the hardware to see a pattern.
    const float* ahead = work.input_of(std::min(token + k + kAhead, work.tokens - 1)) + first_column;
    for (int64_t line = 0; line < columns; line += kLine) {
      __builtin_prefetch(ahead + line);
    }
    float* panel = to;
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel, panel += kPanelSize) {
      const Vec left = *reinterpret_cast<const Unaligned*>(from + column);
      const Vec right = *reinterpret_cast<const Unaligned*>(from + column + PYFT_LOOPS_LANES);
      *reinterpret_cast<Unaligned*>(panel) = left;
      *reinterpret_cast<Unaligned*>(panel + PYFT_LOOPS_LANES) = right;
    }
    if (column < columns) {
      std::copy(from + column, from + columns, panel);
      std::fill(panel + columns - column, panel + kPanel, 0.0f);
    }
  }
}

void multiply_tile(const PartialGradient& work, const RowTiles& rows, int64_t t, const float* packed,
                   const float* panel, int64_t depth, int64_t first_column, bool add) {
  const int64_t columns = std::min<int64_t>(kPanel, work.width - first_column);
  const int64_t first = rows.begin(t), height = rows.begin(t + 1) - first;
  const float* a = packed + first * kTokenBlock;
  float* c = work.out + first * work.width + first_column;
  if (columns == kPanel) {
    kTiles[height - 1](a, panel, depth, c, work.width, add);
    return;
  }
  float narrow[kTileHeight * kPanel];
  kTiles[height - 1](a, panel, depth, narrow, kPanel, false);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      c[i * work.width + j] = (add ? c[i * work.width + j] : 0.0f) + narrow[i * kPanel + j];
    }
  }
}

void strip_gradient(const PartialGradient& work, const float* packed, const StripPart& part) {
  // So many tiles stay in an L2 cache while the panels of a strip go by.
  constexpr int64_t kTilesTogether = 16;
  alignas(64) float panels[kStripWidth * kTokenBlock];
  const RowTiles rows(work.row_count, kTileHeight);
  const int64_t begin = part.strip * kStripWidth;
  const int64_t end = std::min<int64_t>(work.width, begin + kStripWidth);
  const int64_t first_tile = part.part * rows.tiles / part.parts, last_tile = (part.part + 1) * rows.tiles / part.parts;
  for (int64_t token = 0; token < work.tokens; token += kTokenBlock, packed += packed_size(work.row_count)) {
    const int64_t depth = std::min<int64_t>(kTokenBlock, work.tokens - token);
    pack_strip(work, token, depth, begin, end - begin, panels);
    // What comes next is on its way from memory while this is multiplied.
    const bool same_strip = token + kTokenBlock < work.tokens;
    const int64_t next_token = same_strip ? token + kTokenBlock : 0, next_column = same_strip ? begin : end;
    Ahead ahead(work, next_token, next_column, (end - begin + kPanel - 1) / kPanel * (last_tile - first_tile));
    for (int64_t first = first_tile; first < last_tile; first += kTilesTogether) {
      const int64_t last = std::min(last_tile, first + kTilesTogether);
      const float* panel = panels;
      for (int64_t column = begin; column < end; column += kPanel, panel += kTokenBlock * kPanel) {
        for (int64_t t = first; t < last; ++t) {
          ahead.fetch();
          multiply_tile(work, rows, t, packed, panel, depth, column, token > 0);
        }
      }
    }
  }
}

}  // namespace pyft::PYFT_LOOPS
