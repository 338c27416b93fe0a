// Loops of attention of short sequences, for product_targets.h; there is no include guard.

namespace pyft::PYFT_LOOPS {

constexpr int kLanes = PYFT_LOOPS_LANES, kTileHeight = kLanes == 4 ? 2 : 6;

typedef float Vec __attribute__((vector_size(4 * PYFT_LOOPS_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * PYFT_LOOPS_LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * PYFT_LOOPS_LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourPlaces __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

PYFT_LOOPS_TARGET inline __attribute__((always_inline)) Vec load(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}

PYFT_LOOPS_TARGET inline __attribute__((always_inline)) void store(float* to, Vec x) {
  *reinterpret_cast<Unaligned*>(to) = x;
}

// A factor (rows, depth) of a product with any strides, as it lies.
struct Left {
  const float* data;
  int64_t row, column;
};

// A matrix whose rows lie side by side.
struct Rows {
  float* data;
  int64_t row;
};

// out = a b for kHeight rows and kVecs registers of columns, all of it in registers while the depth goes by.
template <int kHeight, int kVecs>
PYFT_LOOPS_TARGET void tile(Left a, const float* b, int64_t b_row, int64_t depth, Rows out) {
  Vec sums[kHeight][kVecs] = {};
  for (int64_t k = 0; k < depth; ++k, b += b_row, a.data += a.column) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      right[v] = load(b + v * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i) {
      const Vec factor = a.data[i * a.row] - Vec{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        sums[i][v] = PYFT_LOOPS_FMA(factor, right[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      store(out.data + i * out.row + v * kLanes, sums[i][v]);
    }
  }
}

using Tile = void (*)(Left a, const float* b, int64_t b_row, int64_t depth, Rows out);

template <int kVecs, int... kHeights>
constexpr std::array<Tile, sizeof...(kHeights)> tiles_of(std::integer_sequence<int, kHeights...>) {
  return {&tile<kHeights + 1, kVecs>...};
}

// [h - 1] has h rows.
constexpr auto kWide = tiles_of<2>(std::make_integer_sequence<int, kTileHeight>());
constexpr auto kNarrow = tiles_of<1>(std::make_integer_sequence<int, kTileHeight>());

// out (rows, columns) = a (rows, depth) b (depth, columns); `columns` is a multiple of kLanes.
void product(Left a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns, Rows out) {
  const int64_t tiles = (rows + kTileHeight - 1) / kTileHeight;
  for (int64_t column = 0; column < columns;) {
    const bool wide = column + 2 * kLanes <= columns;
    // Tiles of almost equal height: one of a single row would leave the multipliers waiting.
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows / tiles, height = (t + 1) * rows / tiles - row;
      (wide ? kWide : kNarrow)[height - 1]({a.data + row * a.row, a.row, a.column}, b + column, b_row, depth,
                                           {out.data + row * out.row + column, out.row});
    }
    column += wide ? 2 * kLanes : kLanes;
  }
}

// GCC 11 has only the older of the two, Clang only the newer one.
#if !defined(__clang__) && __GNUC__ < 12
#define PYFT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#else
#define PYFT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

// to (width, padded) = from (rows, width)^T, filled up with zeros; `width` is a multiple of 4.
PYFT_LOOPS_TARGET void transpose(const float* from, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                                 float* to) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, from += 4 * stride) {
    for (int64_t d = 0; d < width; d += 4) {
      Four in[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        in[i] = *reinterpret_cast<const UnalignedFour*>(from + i * stride + d);
      }
      const Four a = PYFT_SHUFFLE(in[0], in[1], 0, 4, 1, 5);
      const Four b = PYFT_SHUFFLE(in[2], in[3], 0, 4, 1, 5);
      const Four c = PYFT_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
      const Four e = PYFT_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
      float* place = to + d * padded + row;
      *reinterpret_cast<UnalignedFour*>(place) = PYFT_SHUFFLE(a, b, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour*>(place + padded) = PYFT_SHUFFLE(a, b, 2, 3, 6, 7);
      *reinterpret_cast<UnalignedFour*>(place + 2 * padded) = PYFT_SHUFFLE(c, e, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour*>(place + 3 * padded) = PYFT_SHUFFLE(c, e, 2, 3, 6, 7);
    }
  }
  for (; row < padded; ++row, from += stride) {
    for (int64_t d = 0; d < width; ++d) {
      to[d * padded + row] = row < rows ? from[d] : 0.0f;
    }
  }
}

#undef PYFT_SHUFFLE

// e^x of numbers that are not above 0 by more than a rounding; what would be denormal is 0. By halves of ln 2 and a
// polynomial of degree 6 (Cephes, expf), within 1 unit in the last place.
PYFT_LOOPS_TARGET inline __attribute__((always_inline)) Vec exponential(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the lowest bits
  const Vec shifted = PYFT_LOOPS_FMA(x, Vec{} + 1.44269504088896341f, Vec{} + kRound);
  const Vec whole = shifted - kRound;
  Vec r = PYFT_LOOPS_FMA(whole, Vec{} - 0.693359375f, x);
  r = PYFT_LOOPS_FMA(whole, Vec{} + 2.12194440e-4f, r);
  Vec y = Vec{} + 1.9875691500e-4f;
  y = PYFT_LOOPS_FMA(y, r, Vec{} + 1.3981999507e-3f);
  y = PYFT_LOOPS_FMA(y, r, Vec{} + 8.3334519073e-3f);
  y = PYFT_LOOPS_FMA(y, r, Vec{} + 4.1665795894e-2f);
  y = PYFT_LOOPS_FMA(y, r, Vec{} + 1.6666665459e-1f);
  y = PYFT_LOOPS_FMA(y, r, Vec{} + 5.0000001201e-1f);
  y = PYFT_LOOPS_FMA(y, r * r, r + 1.0f);
  const Vec scaled = (Vec)((IntVec)y + ((IntVec)shifted << 23));
  // NaN fails the comparison, and stays.
  const Vec kept = x < Vec{} - 87.3f ? Vec{} : scaled;
  return x == x ? kept : x;
}

PYFT_LOOPS_TARGET inline __attribute__((always_inline)) float sum_of(Vec x) {
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) {
    sum += x[i];
  }
  return sum;
}

// Rows of scores fill whole registers.
constexpr int64_t padded_keys(int64_t keys) { return (keys + kLanes - 1) / kLanes * kLanes; }

template <class Element, class Convert>
PYFT_LOOPS_TARGET inline __attribute__((always_inline)) void read_mask(const void* data, int64_t first, int64_t step,
                                                                       int64_t keys, float* bias,
                                                                       const Convert& convert) {
  const Element* from = static_cast<const Element*>(data) + first;
  if (step == 1) {
    for (int64_t s = 0; s < keys; ++s) {
      bias[s] = convert(from[s]);
    }
  } else {
    for (int64_t s = 0; s < keys; ++s) {
      bias[s] = convert(from[s * step]);
    }
  }
}

// What is added to a row of scores: the mask, and -infinity where the row ends.
PYFT_LOOPS_TARGET void fill_bias(const ShortAttention& work, int64_t b, int64_t h, int64_t t, int64_t padded,
                                 float* bias) {
  const AttentionMask& mask = work.mask;
  const int64_t first = b * mask.batch + h * mask.head + t * mask.row;
  const float forbidden = -std::numeric_limits<float>::infinity();
  if (mask.data == nullptr) {
    std::fill(bias, bias + work.keys, 0.0f);
  } else if (mask.is_bool) {
    read_mask<uint8_t>(mask.data, first, mask.column, work.keys, bias,
                       [=](uint8_t allowed) __attribute__((always_inline)) { return allowed != 0 ? 0.0f : forbidden; });
  } else {
    read_mask<float>(mask.data, first, mask.column, work.keys, bias,
                     [](float added) __attribute__((always_inline)) { return added; });
  }
  if (work.causal && t + 1 < work.keys) {
    std::fill(bias + t + 1, bias + work.keys, forbidden);
  }
  std::fill(bias + work.keys, bias + padded, forbidden);
}

// 1 where the weight is kept, else 0; whatever comes next where the row ends.
PYFT_LOOPS_TARGET void fill_kept(const ShortAttention& work, int64_t row, int64_t padded, float* kept) {
  const int64_t last = (work.weights - 1) >> 3;
  IntVec places;
  for (int i = 0; i < kLanes; ++i) {
    places[i] = 1 << i;
  }
  for (int64_t s = 0; s < padded; s += kLanes) {
    // The bits of a register are in three bytes at most.
    const int64_t bit = row * work.keys + s, byte = bit >> 3;
    int32_t bits = 0;
    for (int64_t i = 0; i < 3; ++i) {
      bits |= work.keep[std::min(byte + i, last)] << (8 * i);
    }
    const IntVec set = ((bits >> (bit & 7)) & places) != 0;
    store(kept + s, (Vec)(set & (IntVec)(Vec{} + 1.0f)));
  }
}

// Scores to weights in place; gives the logarithm of the sum of the exponentials.
PYFT_LOOPS_TARGET float softmax(float* row, const float* bias, float scale, int64_t padded, const float* kept,
                                float on) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Vec most = Vec{} + lowest;
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Vec x = PYFT_LOOPS_FMA(load(row + s), Vec{} + scale, load(bias + s));
    store(row + s, x);
    most = x > most ? x : most;
  }
  float top = most[0];
  for (int i = 1; i < kLanes; ++i) {
    top = most[i] > top ? most[i] : top;
  }
  // A row without any allowed place gives zeros, as in torch.
  top = top == lowest ? 0.0f : top;
  Vec sums = {};
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Vec x = exponential(load(row + s) - top);
    store(row + s, x);
    sums += x;
  }
  const float sum = sum_of(sums), factor = sum == 0.0f ? 0.0f : on / sum;
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Vec x = load(row + s) * factor;
    store(row + s, kept == nullptr ? x : x * load(kept + s));
  }
  return sum == 0.0f ? -lowest : top + std::log(sum);
}

PYFT_LOOPS_TARGET void attend(const ShortAttention& work, int64_t first, int64_t last, float* scratch) {
  const int64_t padded = padded_keys(work.keys), width = work.width;
  float *keys = scratch, *weights = keys + width * padded, *bias = weights + work.queries * padded;
  float* kept = bias + padded;
  const bool same_bias = !work.causal && (work.mask.data == nullptr || work.mask.row == 0);
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t b = pair / work.heads, h = pair % work.heads;
    transpose(work.key.at(b, h), work.key.row, work.keys, width, padded, keys);
    product({work.query.at(b, h), work.query.row, 1}, keys, padded, work.queries, width, padded, {weights, padded});
    for (int64_t t = 0; t < work.queries; ++t) {
      if (t == 0 || !same_bias) {
        fill_bias(work, b, h, t, padded, bias);
      }
      if (work.keep != nullptr) {
        fill_kept(work, pair * work.queries + t, padded, kept);
      }
      const float log_sum =
          softmax(weights + t * padded, bias, work.scale, padded, work.keep == nullptr ? nullptr : kept, work.on);
      if (work.log_sums != nullptr) {
        work.log_sums[pair * work.queries + t] = log_sum;
      }
    }
    product({weights, padded, 1}, work.value.at(b, h), work.value.row, work.queries, work.keys, width,
            {work.out.at(b, h), work.out.row});
  }
}

// Scores and the gradient of weights with dropout, in place: to these weights, and to the gradient of the products of
// query and key.
PYFT_LOOPS_TARGET void softmax_backward(float* row, float* grads, const float* bias, float log_sum, int64_t padded,
                                        const ShortAttention& work, const float* kept) {
  Vec sums = {};
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Vec x = PYFT_LOOPS_FMA(load(row + s), Vec{} + work.scale, load(bias + s));
    const Vec weight = exponential(x - log_sum);
    const Vec grad = kept == nullptr ? load(grads + s) : load(grads + s) * (load(kept + s) * work.on);
    store(row + s, weight);
    store(grads + s, grad);
    sums = PYFT_LOOPS_FMA(weight, grad, sums);
  }
  const float mean = sum_of(sums);
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Vec weight = load(row + s);
    store(grads + s, weight * (load(grads + s) - mean) * work.scale);
    if (kept != nullptr) {
      store(row + s, weight * (load(kept + s) * work.on));
    }
  }
}

PYFT_LOOPS_TARGET void attend_backward(const ShortAttentionGradient& work, int64_t first, int64_t last,
                                       float* scratch) {
  const ShortAttention& from = work.forward;
  const int64_t padded = padded_keys(from.keys), width = from.width;
  float *turned = scratch, *weights = turned + width * padded, *bias = weights + from.queries * padded;
  float *kept = bias + padded, *grads = kept + padded;
  const bool same_bias = !from.causal && (from.mask.data == nullptr || from.mask.row == 0);
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t b = pair / from.heads, h = pair % from.heads;
    const float *query = from.query.at(b, h), *grad = work.grad.at(b, h);
    transpose(from.key.at(b, h), from.key.row, from.keys, width, padded, turned);
    product({query, from.query.row, 1}, turned, padded, from.queries, width, padded, {weights, padded});
    transpose(from.value.at(b, h), from.value.row, from.keys, width, padded, turned);
    product({grad, work.grad.row, 1}, turned, padded, from.queries, width, padded, {grads, padded});
    for (int64_t t = 0; t < from.queries; ++t) {
      if (t == 0 || !same_bias) {
        fill_bias(from, b, h, t, padded, bias);
      }
      if (from.keep != nullptr) {
        fill_kept(from, pair * from.queries + t, padded, kept);
      }
      softmax_backward(weights + t * padded, grads + t * padded, bias, from.log_sums[pair * from.queries + t], padded,
                       from, from.keep == nullptr ? nullptr : kept);
    }
    product({grads, padded, 1}, from.key.at(b, h), from.key.row, from.queries, from.keys, width,
            {work.grad_query.at(b, h), work.grad_query.row});
    product({grads, 1, padded}, query, from.query.row, from.keys, from.queries, width,
            {work.grad_key.at(b, h), work.grad_key.row});
    product({weights, 1, padded}, grad, work.grad.row, from.keys, from.queries, width,
            {work.grad_value.at(b, h), work.grad_value.row});
  }
}

}  // namespace pyft::PYFT_LOOPS
