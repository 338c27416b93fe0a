// Parameters and moments of all formats in AVX2 registers, 16 elements at a time, for loops that do several things at
// once. The bits of update_formats.h. Included by adam_blocks_avx2.h.

namespace pyft::avx2 {

#define PYFT_INLINE_AVX2 PYFT_TARGET_AVX2 inline __attribute__((always_inline))

// Which of 16 elements are in which of two registers: the first eight, or those at even places. By places, halves of a
// register are cheaper to part and to join.
enum class Order { in_turn, even_odd };

struct Two {
  __m256 first, second;
};

PYFT_INLINE_AVX2 __m256 as_float(__m256i bits) { return _mm256_castsi256_ps(bits); }
PYFT_INLINE_AVX2 __m256i as_bits(__m256 value) { return _mm256_castps_si256(value); }
PYFT_INLINE_AVX2 __m256i all(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }

struct TwoBits {
  __m256i first, second;
};

PYFT_INLINE_AVX2 Two load_two(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
PYFT_INLINE_AVX2 void store_two(float* to, const Two& value) {
  _mm256_storeu_ps(to, value.first);
  _mm256_storeu_ps(to + 8, value.second);
}

// 16 numbers of 16 bits as the upper halves of 32, and back.
template <Order kOrder>
PYFT_INLINE_AVX2 TwoBits load_upper(const void* from) {
  const Bf16* halves = static_cast<const Bf16*>(from);
  if constexpr (kOrder == Order::in_turn) {
    return {widened(halves), widened(halves + 8)};
  }
  const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return {_mm256_slli_epi32(both, 16), _mm256_and_si256(both, all(0xffff0000u))};
}
template <Order kOrder>
PYFT_INLINE_AVX2 void store_upper(void* to, const TwoBits& bits) {
  if constexpr (kOrder == Order::in_turn) {
    store_upper(static_cast<Bf16*>(to), bits.first, bits.second);
  } else {
    const __m256i joined = _mm256_blend_epi16(_mm256_srli_epi32(bits.first, 16), bits.second, 0xaa);
    _mm256_storeu_si256(static_cast<__m256i*>(to), joined);
  }
}

template <Order kOrder>
PYFT_INLINE_AVX2 Two load_floats(const float* from) {
  static_assert(kOrder == Order::in_turn);
  return load_two(from);
}
template <Order kOrder>
PYFT_INLINE_AVX2 Two load_floats(const Bf16* from) {
  const TwoBits bits = load_upper<kOrder>(from);
  return {as_float(bits.first), as_float(bits.second)};
}

// `first + place * kGolden` for the places of 16 elements; `later` leads to the next.
template <Order kOrder>
PYFT_INLINE_AVX2 TwoBits golden_multiples(uint32_t first) {
  if constexpr (kOrder == Order::in_turn) {
    const __m256i lower = dither8(first);
    return {lower, later(lower, 8)};
  }
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i of_even = _mm256_add_epi32(all(first), _mm256_mullo_epi32(even, all(kGolden)));
  return {of_even, later(of_even, 1)};
}
PYFT_INLINE_AVX2 TwoBits later(const TwoBits& multiples) {
  return {later(multiples.first, 16), later(multiples.second, 16)};
}

// The parameters: load_param and store_param. Blocks come in order, and so do the 16 elements of each in store().
template <WeightFormat kFormat, Order kOrder>
struct WeightBlocks;

template <Order kOrder>
struct WeightBlocks<WeightFormat::fp32, kOrder> {
  float* data;

  WeightBlocks(const TensorUpdate& t, int64_t begin) : data(static_cast<float*>(t.param) + begin) {}
  PYFT_INLINE_AVX2 void begin_block(int64_t) {}
  PYFT_INLINE_AVX2 Two load(int64_t i) const { return load_floats<kOrder>(data + i); }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) { store_two(data + i, value); }
};

template <Order kOrder>
struct WeightBlocks<WeightFormat::bf16, kOrder> {
  Bf16* data;

  WeightBlocks(const TensorUpdate& t, int64_t begin) : data(static_cast<Bf16*>(t.param) + begin) {}
  PYFT_INLINE_AVX2 void begin_block(int64_t) {}
  PYFT_INLINE_AVX2 Two load(int64_t i) const { return load_floats<kOrder>(data + i); }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    store_upper<kOrder>(data + i, {nearest(as_bits(value.first)), nearest(as_bits(value.second))});
  }
};

template <Order kOrder>
struct WeightBlocks<WeightFormat::bf16_stochastic, kOrder> {
  Bf16* data;
  int64_t begin;
  uint32_t key;
  TwoBits places;

  PYFT_INLINE_AVX2 WeightBlocks(const TensorUpdate& t, int64_t begin)
      : data(static_cast<Bf16*>(t.param) + begin), begin(begin), key(~t.key) {
    begin_block(0);
  }
  PYFT_INLINE_AVX2 void begin_block(int64_t at) {
    const int64_t place = begin + at;
    places = golden_multiples<kOrder>(key_of_place(key, place) + static_cast<uint32_t>(place) * kGolden);
  }
  PYFT_INLINE_AVX2 Two load(int64_t i) const { return load_floats<kOrder>(data + i); }
  // The upper 16 of random_bits.
  static PYFT_INLINE_AVX2 __m256i random(__m256i x) {
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), all(kMix1));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), all(kMix2));
    return _mm256_srli_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), 16);
  }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    store_upper<kOrder>(data + i, {rounded(as_bits(value.first), random(places.first)),
                                   rounded(as_bits(value.second), random(places.second))});
    places = later(places);
  }
};

template <Order kOrder>
struct WeightBlocks<WeightFormat::bf16_split32, kOrder> {
  Bf16* data;
  int16_t* low;

  WeightBlocks(const TensorUpdate& t, int64_t begin)
      : data(static_cast<Bf16*>(t.param) + begin), low(static_cast<int16_t*>(t.extra) + begin) {}
  PYFT_INLINE_AVX2 void begin_block(int64_t) {}
  static PYFT_INLINE_AVX2 __m256 joined(__m256i high, __m256i low_on_top) {
    return as_float(_mm256_add_epi32(high, _mm256_srai_epi32(low_on_top, 16)));
  }
  PYFT_INLINE_AVX2 Two load(int64_t i) const {
    const TwoBits high = load_upper<kOrder>(data + i), low_on_top = load_upper<kOrder>(low + i);
    return {joined(high.first, low_on_top.first), joined(high.second, low_on_top.second)};
  }
  // split_high; the upper half of the rest, moved up, is split_low.
  static PYFT_INLINE_AVX2 __m256i split(__m256 value, __m256i& low_on_top) {
    const __m256i bits = as_bits(value), nan = as_bits(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i nearest = _mm256_add_epi32(bits, all(0x8000u)), quiet = _mm256_or_si256(bits, all(0x400000u));
    const __m256i high = _mm256_blendv_epi8(nearest, quiet, nan);
    low_on_top = _mm256_andnot_si256(nan, _mm256_slli_epi32(bits, 16));
    return high;
  }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    TwoBits high, low_on_top;
    high.first = split(value.first, low_on_top.first);
    high.second = split(value.second, low_on_top.second);
    store_upper<kOrder>(data + i, high);
    store_upper<kOrder>(low + i, low_on_top);
  }
};

template <Order kOrder>
struct WeightBlocks<WeightFormat::bf16_kahan, kOrder> {
  Bf16 *data, *compensation;

  WeightBlocks(const TensorUpdate& t, int64_t begin)
      : data(static_cast<Bf16*>(t.param) + begin), compensation(static_cast<Bf16*>(t.extra) + begin) {}
  PYFT_INLINE_AVX2 void begin_block(int64_t) {}
  PYFT_INLINE_AVX2 Two load(int64_t i) const {
    const Two high = load_floats<kOrder>(data + i), rest = load_floats<kOrder>(compensation + i);
    return {_mm256_add_ps(high.first, rest.first), _mm256_add_ps(high.second, rest.second)};
  }
  static PYFT_INLINE_AVX2 __m256i rest(__m256 value, __m256i high) {
    return nearest(as_bits(_mm256_sub_ps(value, as_float(_mm256_and_si256(high, all(0xffff0000u))))));
  }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    const TwoBits high = {nearest(as_bits(value.first)), nearest(as_bits(value.second))};
    store_upper<kOrder>(data + i, high);
    store_upper<kOrder>(compensation + i, {rest(value.first, high.first), rest(value.second, high.second)});
  }
};

// The moments of one block after the other. Arrays stay outside, or the registers of these structs would be memory.
template <MomentFormat kFormat, bool kSigned, Order kOrder>
struct MomentBlocks;

template <bool kSigned>
struct MomentBlocks<MomentFormat::fp32, kSigned, Order::in_turn> {
  float* kept;

  MomentBlocks(const TensorUpdate& t, int moment, int64_t begin, float (&)[2][kBlock])
      : kept(static_cast<float*>(t.moments[moment].data) + begin) {}
  PYFT_INLINE_AVX2 void begin_block() {}
  PYFT_INLINE_AVX2 Two load(int64_t i) const { return load_two(kept + i); }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) { store_two(kept + i, value); }
  PYFT_INLINE_AVX2 void encode(int64_t) {}
  PYFT_INLINE_AVX2 void end_block() { kept += kBlock; }
};

template <bool kSigned, Order kOrder>
struct MomentBlocks<MomentFormat::bf16, kSigned, kOrder> {
  Bf16* data;
  int64_t block;
  uint32_t key;
  TwoBits random;
  float* kept;  // fp32 of this block

  PYFT_INLINE_AVX2 MomentBlocks(const TensorUpdate& t, int moment, int64_t begin, float (&buffers)[2][kBlock])
      : data(static_cast<Bf16*>(t.moments[moment].data) + begin),
        block(begin / kBlock),
        key(t.key + static_cast<uint32_t>(moment)),
        kept(buffers[0]) {}
  PYFT_INLINE_AVX2 void begin_block() {
    random = golden_multiples<kOrder>(random_bits(key, static_cast<uint32_t>(block)));
  }
  PYFT_INLINE_AVX2 Two load(int64_t i) const { return load_floats<kOrder>(data + i); }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    store_upper<kOrder>(data + i, {rounded(as_bits(value.first), _mm256_srli_epi32(random.first, 16)),
                                   rounded(as_bits(value.second), _mm256_srli_epi32(random.second, 16))});
    random = later(random);
    if constexpr (kSigned) {
      store_two(kept + i, value);
    }
  }
  PYFT_INLINE_AVX2 void encode(int64_t) {}
  PYFT_INLINE_AVX2 void end_block() {
    data += kBlock;
    ++block;
  }
};

template <bool kSigned>
struct MomentBlocks<MomentFormat::int8, kSigned, Order::in_turn> {
  int8_t* data;
  float* scale;
  int64_t block;
  uint32_t key;
  __m256i lowest, largest;
  float *kept, *kept_before;  // fp32 of this block and the one before, which is yet to be encoded
  __m256i lowest_before, random_before;

  PYFT_INLINE_AVX2 MomentBlocks(const TensorUpdate& t, int moment, int64_t begin, float (&buffers)[2][kBlock])
      : data(static_cast<int8_t*>(t.moments[moment].data) + begin),
        scale(t.moments[moment].scale),
        block(begin / kBlock),
        key(t.key + static_cast<uint32_t>(moment)),
        kept(buffers[0]),
        kept_before(buffers[1]) {
    lowest_before = random_before = _mm256_setzero_si256();
  }
  static uint32_t lowest_of(float of) { return kSigned ? lowest_signed(of) : lowest_unsigned(of); }
  PYFT_INLINE_AVX2 void begin_block() {
    lowest = all(lowest_of(scale[block]));
    largest = _mm256_setzero_si256();
  }
  PYFT_INLINE_AVX2 Two load(int64_t i) const {
    const CodesOnTop top = codes_on_top(data + i);
    return {as_float(decoded<kSigned>(top.first, lowest)), as_float(decoded<kSigned>(top.second, lowest))};
  }
  PYFT_INLINE_AVX2 void store(int64_t i, const Two& value) {
    store_two(kept + i, value);
    const __m256i mask = all(kSigned ? 0x7fffffffu : ~0u);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(as_bits(value.first), mask));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(as_bits(value.second), mask));
  }
  PYFT_INLINE_AVX2 void encode(int64_t i) {
    encode32<kSigned>(data - kBlock + i, kept_before + i, lowest_before, random_before);
    random_before = later(random_before, 32);
  }
  PYFT_INLINE_AVX2 void end_block() {
    const uint32_t size = largest_lane(largest);
    if (size > kInfinityBits) {
      keep_one_nan(kept, kBlock);
    }
    scale[block] = block_scale(size);
    lowest_before = all(lowest_of(scale[block]));
    random_before = dither8(random_bits(key, static_cast<uint32_t>(block)));
    data += kBlock;
    ++block;
    std::swap(kept, kept_before);
  }
};

}  // namespace pyft::avx2
