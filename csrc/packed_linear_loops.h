// Loops of a Linear layer with a packed weight, for product_targets.h; there is no include guard.

namespace pyft::PYFT_LOOPS {

// Rows of a tile: as many sums as there are registers for.
constexpr int kTileHeight = PYFT_LOOPS_LANES == 16 ? 12 : PYFT_LOOPS_LANES == 8 ? 6 : 2;
constexpr int kVecs = kPanelWidth / PYFT_LOOPS_LANES;

typedef float Vec __attribute__((vector_size(4 * PYFT_LOOPS_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * PYFT_LOOPS_LANES), aligned(4), may_alias));

// out = start + a panel^T for `kHeight` rows: all of it stays in registers while a block of inputs goes by. Where
// `start` is null, it is added to what `out` has.
template <int kHeight>
PYFT_LOOPS_TARGET void tile(const float* a, int64_t a_stride, const float* panel, int64_t depth, const float* start,
                            float* out, int64_t out_stride) {
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
      const Vec factor = a[i * a_stride + k] - Vec{};
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
      Unaligned* place = reinterpret_cast<Unaligned*>(out + i * out_stride + v * PYFT_LOOPS_LANES);
      *place = start == nullptr ? *place + sums[i][v] : sums[i][v];
    }
  }
}

using Tile = void (*)(const float* a, int64_t a_stride, const float* panel, int64_t depth, const float* start,
                      float* out, int64_t out_stride);

template <int... kHeights>
constexpr std::array<Tile, sizeof...(kHeights)> tiles_of(std::integer_sequence<int, kHeights...>) {
  return {&tile<kHeights + 1>...};
}

// kTiles[h - 1] has h rows.
constexpr auto kTiles = tiles_of(std::make_integer_sequence<int, kTileHeight>());

void multiply(const PackedLinear& work, int64_t first_token, int64_t last_token, int64_t first_panel,
              int64_t last_panel) {
  const int64_t rows = last_token - first_token, tiles = (rows + kTileHeight - 1) / kTileHeight;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t first_output = panel * kPanelWidth;
    const int64_t columns = std::min(kPanelWidth, work.outputs - first_output);
    alignas(64) float bias[kPanelWidth] = {};
    if (work.bias != nullptr) {
      std::copy(work.bias + first_output, work.bias + first_output + columns, bias);
    }
    // The last panel may be wider than the output.
    alignas(64) float narrow[kRowsAtOnce * kPanelWidth];
    float* out = columns == kPanelWidth ? work.out + first_token * work.outputs + first_output : narrow;
    const int64_t out_stride = columns == kPanelWidth ? work.outputs : kPanelWidth;
    for (int64_t k = 0; k == 0 || k < work.inputs; k += kDepth) {
      const float* weights = work.packed + (panel * work.inputs + k) * kPanelWidth;
      // Tiles of almost equal height: one of a single row would leave the multipliers waiting.
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
        kTiles[height - 1](work.input + (first_token + row) * work.input_stride + k, work.input_stride, weights,
                           std::min(kDepth, work.inputs - k), k == 0 ? bias : nullptr, out + row * out_stride,
                           out_stride);
      }
    }
    for (int64_t row = 0; columns < kPanelWidth && row < rows; ++row) {
      const float* from = narrow + row * kPanelWidth;
      std::copy(from, from + columns, work.out + (first_token + row) * work.outputs + first_output);
    }
  }
}

}  // namespace pyft::PYFT_LOOPS
