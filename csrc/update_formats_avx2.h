// The conversions of update_formats.h in AVX2 registers: what the compiler makes of their loops takes up to three times
// as long. Each gives the bits of the function of one element that it names, and tells how many elements it has done.

namespace pyft::avx2 {

PYFT_TARGET_AVX2 inline __m256i load8(const float* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
PYFT_TARGET_AVX2 inline void store8(float* to, __m256i bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
// 16 bytes in either half of a register: a shuffle then takes any of them to any place of its half.
PYFT_TARGET_AVX2 inline __m256i load16_twice(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// to_fp32
PYFT_TARGET_AVX2 inline __m256i widened(const Bf16* from) {
  const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_shuffle_epi8(load16_twice(from), upper);
}
PYFT_TARGET_AVX2 inline int32_t widen_vectors(const Bf16* from, float* to, int64_t length) {
  const int32_t done = static_cast<int32_t>(length / 16 * 16);
  for (int32_t i = 0; i < done; i += 16) {
    store8(to + i, widened(from + i));
    store8(to + i + 8, widened(from + i + 8));
  }
  return done;
}
template <class T>
constexpr int32_t widen_vectors(const T*, float*, int64_t) {
  return 0;
}

// The sum of bits and what they are rounded with, in the lower 16 bits. Of a sum that ran over into the sign only a NaN
// can be the cause; it stays as it is.
PYFT_TARGET_AVX2 inline __m256i rounded(__m256i bits, __m256i round) {
  const __m256i sum = _mm256_add_epi32(bits, round);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(bits),
                                              _mm256_castsi256_ps(_mm256_xor_si256(sum, bits))));
}
PYFT_TARGET_AVX2 inline void store_upper(Bf16* to, __m256i first, __m256i second) {
  const __m256i halves = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0xd8));
}

// to_bf16
PYFT_TARGET_AVX2 inline __m256i nearest(__m256i bits) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return rounded(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
PYFT_TARGET_AVX2 inline int32_t narrow_vectors(const float* from, Bf16* to, int64_t length) {
  int32_t i = 0;
  for (; i + 16 <= length; i += 16) {
    store_upper(to + i, nearest(load8(from + i)), nearest(load8(from + i + 8)));
  }
  return i;
}

// Random bits of eight elements from `first` on, and those of the eight that come `elements` later.
PYFT_TARGET_AVX2 inline __m256i dither8(uint32_t first) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)),
                          _mm256_mullo_epi32(place, _mm256_set1_epi32(static_cast<int>(kGolden))));
}
PYFT_TARGET_AVX2 inline __m256i later(__m256i dither, uint32_t elements) {
  return _mm256_add_epi32(dither, _mm256_set1_epi32(static_cast<int>(elements * kGolden)));
}

// to_bf16_stochastic
PYFT_TARGET_AVX2 inline int32_t narrow_dithered_vectors(const float* from, Bf16* to, uint32_t random, int32_t length) {
  __m256i first = dither8(random), second = later(first, 8);
  int32_t i = 0;
  for (; i + 16 <= length; i += 16) {
    store_upper(to + i, rounded(load8(from + i), _mm256_srli_epi32(first, 16)),
                rounded(load8(from + i + 8), _mm256_srli_epi32(second, 16)));
    first = later(first, 16);
    second = later(second, 16);
  }
  return i;
}

// decode_signed, decode_unsigned
template <bool kSigned>
PYFT_TARGET_AVX2 inline __m256i decoded(__m256i code_on_top, __m256i lowest) {
  const __m256i size = kSigned ? _mm256_abs_epi32(code_on_top) : code_on_top;
  const __m256i bits = _mm256_add_epi32(_mm256_srli_epi32(size, 24 - kCodeShift), lowest);
  if (!kSigned) {
    return bits;
  }
  const __m256 value = _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(lowest));
  const __m256i sign = _mm256_and_si256(code_on_top, _mm256_set1_epi32(INT32_MIN));
  return _mm256_or_si256(_mm256_castps_si256(value), sign);
}
// 16 codes, each in the upper byte of a number.
struct CodesOnTop {
  __m256i first, second;
};
PYFT_TARGET_AVX2 inline CodesOnTop codes_on_top(const int8_t* codes) {
  const __m256i first = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3,  //
                                         -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
  // -1, which stands for 0, keeps its upper bit.
  const __m256i second = _mm256_or_si256(first, _mm256_set1_epi32(0x08000000));
  const __m256i both = load16_twice(codes);
  return {_mm256_shuffle_epi8(both, first), _mm256_shuffle_epi8(both, second)};
}
template <bool kSigned>
PYFT_TARGET_AVX2 inline int32_t decode_vectors(const int8_t* codes, float* value, uint32_t lowest, int32_t length) {
  static_assert(24 - kCodeShift == 4);
  const __m256i low = _mm256_set1_epi32(static_cast<int>(lowest));
  int32_t i = 0;
  for (; i + 16 <= length; i += 16) {
    const CodesOnTop top = codes_on_top(codes + i);
    store8(value + i, decoded<kSigned>(top.first, low));
    store8(value + i + 8, decoded<kSigned>(top.second, low));
  }
  return i;
}

PYFT_TARGET_AVX2 inline uint32_t largest_lane(__m256i sizes) {
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sizes);
  uint32_t largest = 0;
  for (uint32_t lane : lanes) {
    largest = lane > largest ? lane : largest;
  }
  return largest;
}
PYFT_TARGET_AVX2 inline int32_t largest_vectors(const float* value, int32_t length, uint32_t& largest) {
  const __m256i size = _mm256_set1_epi32(0x7fffffff);
  __m256i first = _mm256_setzero_si256(), second = first;
  int32_t i = 0;
  for (; i + 16 <= length; i += 16) {
    first = _mm256_max_epu32(first, _mm256_and_si256(load8(value + i), size));
    second = _mm256_max_epu32(second, _mm256_and_si256(load8(value + i + 8), size));
  }
  largest = largest_lane(_mm256_max_epu32(first, second));
  return i;
}

// encode_signed, encode_unsigned, in 32 bits
template <bool kSigned>
PYFT_TARGET_AVX2 inline __m256i encoded(const float* value, __m256i lowest, __m256i dither) {
  const __m256i bits = load8(value), round = _mm256_srli_epi32(dither, 32 - kCodeShift);
  if (!kSigned) {
    const __m256i above = _mm256_sub_epi32(_mm256_max_epu32(bits, lowest), lowest);
    return _mm256_srli_epi32(_mm256_add_epi32(above, round), kCodeShift);
  }
  const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(size), _mm256_castsi256_ps(lowest));
  const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(sum), lowest);
  const __m256i code = _mm256_srli_epi32(_mm256_add_epi32(above, round), kCodeShift);
  // Of zeros, whose code is 0, this makes 0.
  return _mm256_sign_epi32(code, bits);
}
template <bool kSigned>
PYFT_TARGET_AVX2 inline void encode32(int8_t* codes, const float* value, __m256i lowest, __m256i dither) {
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i a = encoded<kSigned>(value, lowest, dither);
  const __m256i b = encoded<kSigned>(value + 8, lowest, later(dither, 8));
  const __m256i c = encoded<kSigned>(value + 16, lowest, later(dither, 16));
  const __m256i d = encoded<kSigned>(value + 24, lowest, later(dither, 24));
  const __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
  const __m256i packed = kSigned ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(packed, in_order));
}
template <bool kSigned>
PYFT_TARGET_AVX2 inline int32_t encode_vectors(int8_t* codes, const float* value, uint32_t lowest, uint32_t random,
                                               int32_t length) {
  const __m256i low = _mm256_set1_epi32(static_cast<int>(lowest));
  __m256i dither = dither8(random);
  int32_t i = 0;
  for (; i + 32 <= length; i += 32, dither = later(dither, 32)) {
    encode32<kSigned>(codes + i, value + i, low, dither);
  }
  return i;
}

}  // namespace pyft::avx2
