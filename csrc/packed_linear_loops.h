// Loops of a Linear layer with a packed weight, for product_targets.h; there is no include guard.

namespace pyft::PYFT_LOOPS {

// Rows of a tile: as many sums as there are registers for.
constexpr int kTileHeight = PYFT_LOOPS_LANES == 16 ? 12 : PYFT_LOOPS_LANES == 8 ? 6 : 2;
constexpr int kVecs = kPanelWidth / PYFT_LOOPS_LANES;

typedef float Vec __attribute__((vector_size(4 * PYFT_LOOPS_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * PYFT_LOOPS_LANES), aligned(4), may_alias));

// What a tile reads and writes: row rows[i] of `a`, and of `out`, or row i where the output is `narrow`.
struct Rows {
  const int64_t* rows;
  const float* a;
  int64_t a_stride;
  float* out;
  int64_t out_stride;
  bool narrow;
};

// out = start + a panel^T for `kHeight` rows: all of it stays in registers while a block of inputs goes by. Where
// `start` is null, it is added to what `out` has.
template <int kHeight>
PYFT_LOOPS_TARGET void tile(const Rows& at, const float* panel, int64_t depth, const float* start) {
  const float* a[kHeight];
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
    a[i] = at.a + at.rows[i] * at.a_stride;
  }
  Vec sums[kHeight][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      sums[i][v] = start == nullptr ? Vec{} : *reinterpret_cast<const Unaligned*>(start + v * PYFT_LOOPS_LANES);
    }
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanelWidth) {
    Vec weights[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      weights[v] = *reinterpret_cast<const Unaligned*>(panel + v * PYFT_LOOPS_LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i) {
      const Vec factor = a[i][k] - Vec{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        sums[i][v] = PYFT_LOOPS_FMA(factor, weights[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* out = at.out + (at.narrow ? i : at.rows[i]) * at.out_stride;
      Unaligned* place = reinterpret_cast<Unaligned*>(out + v * PYFT_LOOPS_LANES);
      *place = start == nullptr ? *place + sums[i][v] : sums[i][v];
    }
  }
}

using Tile = void (*)(const Rows& at, const float* panel, int64_t depth, const float* start);

template <int... kHeights>
constexpr std::array<Tile, sizeof...(kHeights)> tiles_of(std::integer_sequence<int, kHeights...>) {
  return {&tile<kHeights + 1>...};
}

// kTiles[h - 1] has h rows.
constexpr auto kTiles = tiles_of(std::make_integer_sequence<int, kTileHeight>());

void multiply(const PackedLinear& work, int64_t first_token, int64_t last_token, int64_t first_panel,
              int64_t last_panel) {
  const int64_t count = last_token - first_token, tiles = (count + kTileHeight - 1) / kTileHeight;
  const int64_t blocks = std::max<int64_t>(1, (work.inputs + kDepth - 1) / kDepth);
  int64_t rows[kRowsAtOnce];
  for (int64_t t = 0; t < count; ++t) {
    rows[t] = work.rows == nullptr ? first_token + t : work.rows[first_token + t];
  }
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t first_output = panel * kPanelWidth;
    const int64_t columns = std::min(kPanelWidth, work.outputs - first_output);
    alignas(64) float bias[kPanelWidth] = {};
    if (work.bias != nullptr) {
      std::copy(work.bias + first_output, work.bias + first_output + columns, bias);
    }
    // The last panel may be wider than the output.
    const bool narrow = columns < kPanelWidth;
    alignas(64) float sums[kRowsAtOnce * kPanelWidth];
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * work.inputs / blocks, depth = (block + 1) * work.inputs / blocks - k;
      const float* weights = work.packed + (panel * work.inputs + k) * kPanelWidth;
      // Tiles of almost equal height: one of a single row would leave the multipliers waiting.
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * count / tiles, height = (t + 1) * count / tiles - first;
        float* out = narrow ? sums + first * kPanelWidth : work.out + first_output;
        const int64_t out_stride = narrow ? kPanelWidth : work.outputs;
        kTiles[height - 1]({rows + first, work.input + k, work.input_stride, out, out_stride, narrow}, weights, depth,
                           block == 0 ? bias : nullptr);
      }
    }
    for (int64_t t = 0; narrow && t < count; ++t) {
      const float* from = sums + t * kPanelWidth;
      std::copy(from, from + columns, work.out + rows[t] * work.outputs + first_output);
    }
  }
}

}  // namespace pyft::PYFT_LOOPS
