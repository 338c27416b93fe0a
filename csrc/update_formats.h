// Loads and stores of one block of parameters, gradients and moments: any format to fp32 and back. Included once for
// each CPU target by update_loops.h. Loops do what update_formats_avx2.h leaves over, or all for other targets.

#ifdef PYFT_LOOPS_AVX2
#include "update_formats_avx2.h"
#endif

namespace pyft::PYFT_LOOPS {

#ifndef PYFT_LOOPS_AVX2
// How many elements were done by hand-written vectors: none.
template <class... Any>
constexpr int32_t widen_vectors(const Any&...) {
  return 0;
}
template <class... Any>
constexpr int32_t narrow_vectors(const Any&...) {
  return 0;
}
template <class... Any>
constexpr int32_t narrow_dithered_vectors(const Any&...) {
  return 0;
}
template <bool kSigned, class... Any>
constexpr int32_t decode_vectors(const Any&...) {
  return 0;
}
template <class... Any>
constexpr int32_t largest_vectors(const Any&...) {
  return 0;
}
template <bool kSigned, class... Any>
constexpr int32_t encode_vectors(const Any&...) {
  return 0;
}
#endif

template <class T>
PYFT_LOOPS_TARGET void widen(const T* __restrict__ from, float* __restrict__ to, int64_t length) {
  for (int64_t i = widen_vectors(from, to, length); i < length; ++i) {
    to[i] = to_fp32(from[i]);
  }
}

PYFT_LOOPS_TARGET inline void widen(const FloatData& from, int64_t begin, float* to, int64_t length) {
  switch (from.format) {
    case FloatFormat::fp32:
      return widen(static_cast<const float*>(from.data) + begin, to, length);
    case FloatFormat::bf16:
      return widen(static_cast<const Bf16*>(from.data) + begin, to, length);
    case FloatFormat::fp16:
      return widen(static_cast<const Fp16*>(from.data) + begin, to, length);
  }
}

PYFT_LOOPS_TARGET inline void fill_random(uint32_t key, int64_t begin, uint32_t* random, int64_t length) {
  const uint32_t of_place = key_of_place(key, begin), low = static_cast<uint32_t>(begin);
  for (int64_t i = 0; i < length; ++i) {
    random[i] = random_bits(of_place, low + static_cast<uint32_t>(i));
  }
}

// The parameter in fp32: the tensor itself, or its value in `buffer`.
PYFT_LOOPS_TARGET inline float* load_param(const TensorUpdate& t, int64_t begin, float* __restrict__ buffer,
                                           int64_t length) {
  const Bf16* bf16 = static_cast<const Bf16*>(t.param) + begin;
  switch (t.weights) {
    case WeightFormat::fp32:
      return static_cast<float*>(t.param) + begin;
    case WeightFormat::fp16:
      widen(static_cast<const Fp16*>(t.param) + begin, buffer, length);
      break;
    case WeightFormat::bf16:
    case WeightFormat::bf16_stochastic:
      widen(bf16, buffer, length);
      break;
    case WeightFormat::bf16_split32: {
      const int16_t* low = static_cast<const int16_t*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        buffer[i] = join(bf16[i], low[i]);
      }
      break;
    }
    case WeightFormat::bf16_kahan: {
      const Bf16* compensation = static_cast<const Bf16*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        buffer[i] = to_fp32(bf16[i]) + to_fp32(compensation[i]);
      }
      break;
    }
  }
  return buffer;
}

PYFT_LOOPS_TARGET inline void store_param(const TensorUpdate& t, int64_t begin, const float* __restrict__ value,
                                          int64_t length) {
  Bf16* __restrict__ bf16 = static_cast<Bf16*>(t.param) + begin;
  switch (t.weights) {
    case WeightFormat::fp32:
      return;
    case WeightFormat::fp16: {
      Fp16* __restrict__ fp16 = static_cast<Fp16*>(t.param) + begin;
      for (int64_t i = 0; i < length; ++i) {
        fp16[i].bits = to_fp16(value[i]).bits;
      }
      return;
    }
    case WeightFormat::bf16:
      for (int64_t i = narrow_vectors(value, bf16, length); i < length; ++i) {
        bf16[i] = to_bf16(value[i]);
      }
      return;
    case WeightFormat::bf16_stochastic: {
      uint32_t random[kBlock];
      fill_random(~t.key, begin, random, length);
      for (int64_t i = 0; i < length; ++i) {
        bf16[i] = to_bf16_stochastic(value[i], random[i] >> 16);
      }
      return;
    }
    case WeightFormat::bf16_split32: {
      int16_t* __restrict__ low = static_cast<int16_t*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        const uint16_t high = split_high(value[i]);
        bf16[i].bits = high;
        low[i] = split_low(value[i], high);
      }
      return;
    }
    case WeightFormat::bf16_kahan: {
      Bf16* __restrict__ compensation = static_cast<Bf16*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        const uint16_t rounded = to_bf16(value[i]).bits;
        bf16[i].bits = rounded;
        compensation[i].bits = to_bf16(value[i] - to_fp32(Bf16{rounded})).bits;
      }
      return;
    }
  }
}

template <bool kSigned>
PYFT_LOOPS_TARGET void decode_block(const int8_t* __restrict__ codes, float* __restrict__ value, uint32_t lowest,
                                    int32_t length) {
  for (int32_t i = decode_vectors<kSigned>(codes, value, lowest, length); i < length; ++i) {
    value[i] = kSigned ? decode_signed(codes[i], lowest) : decode_unsigned(static_cast<uint8_t>(codes[i]), lowest);
  }
}

// Where the rule reads and writes a moment: the tensor itself, or `buffer` with its value.
PYFT_LOOPS_TARGET inline float* load_moment(const Moment& moment, int64_t begin, float* __restrict__ buffer,
                                            int32_t length) {
  switch (moment.format) {
    case MomentFormat::none:
      return nullptr;
    case MomentFormat::fp32:
      return static_cast<float*>(moment.data) + begin;
    case MomentFormat::bf16:
      widen(static_cast<const Bf16*>(moment.data) + begin, buffer, length);
      break;
    case MomentFormat::int8: {
      const int8_t* codes = static_cast<const int8_t*>(moment.data) + begin;
      const float scale = moment.scale[begin / kBlock];
      if (moment.is_signed) {
        decode_block<true>(codes, buffer, lowest_signed(scale), length);
      } else {
        decode_block<false>(codes, buffer, lowest_unsigned(scale), length);
      }
      break;
    }
  }
  return buffer;
}

// Bits of floats without their sign are in the order of their sizes, and an integer maximum keeps NaN.
PYFT_LOOPS_TARGET inline uint32_t largest_size(const float* __restrict__ value, int32_t length) {
  uint32_t largest = 0;
  for (int32_t i = largest_vectors(value, length, largest); i < length; ++i) {
    const uint32_t size = bits_of(value[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

template <bool kSigned>
PYFT_LOOPS_TARGET void encode_block(int8_t* __restrict__ codes, const float* __restrict__ value, uint32_t lowest,
                                    uint32_t random, int32_t length) {
  const int32_t done = encode_vectors<kSigned>(codes, value, lowest, random, length);
  random += static_cast<uint32_t>(done) * kGolden;
  for (int32_t i = done; i < length; ++i) {
    codes[i] = kSigned ? encode_signed(value[i], lowest, random)
                       : static_cast<int8_t>(encode_unsigned(value[i], lowest, random));
    random += kGolden;
  }
}

// Only this NaN has a code.
PYFT_LOOPS_TARGET inline void keep_one_nan(float* __restrict__ value, int32_t length) {
  for (int32_t i = 0; i < length; ++i) {
    value[i] = is_nan_bits(bits_of(value[i])) ? float_of(0x7fc00000u) : value[i];
  }
}

PYFT_LOOPS_TARGET inline void store_int8(const Moment& moment, int64_t begin, float* value, uint32_t random,
                                         int32_t length) {
  const uint32_t largest = largest_size(value, length);
  if (largest > kInfinityBits) {
    keep_one_nan(value, length);
  }
  const float scale = block_scale(largest);
  moment.scale[begin / kBlock] = scale;
  int8_t* codes = static_cast<int8_t*>(moment.data) + begin;
  if (moment.is_signed) {
    encode_block<true>(codes, value, lowest_signed(scale), random, length);
  } else {
    encode_block<false>(codes, value, lowest_unsigned(scale), random, length);
  }
}

PYFT_LOOPS_TARGET inline void store_bf16(Bf16* __restrict__ to, const float* __restrict__ value, uint32_t random,
                                         int32_t length) {
  const int32_t done = narrow_dithered_vectors(value, to, random, length);
  random += static_cast<uint32_t>(done) * kGolden;
  for (int32_t i = done; i < length; ++i) {
    to[i] = to_bf16_stochastic(value[i], random >> 16);
    random += kGolden;
  }
}

// Rounded with random bits of the tensor, the step, the moment and the block.
PYFT_LOOPS_TARGET inline void store_moment(const TensorUpdate& t, int moment, int64_t begin, float* value,
                                           int32_t length) {
  const Moment& to = t.moments[moment];
  const uint32_t random = random_bits(t.key + static_cast<uint32_t>(moment), static_cast<uint32_t>(begin / kBlock));
  if (to.format == MomentFormat::int8) {
    store_int8(to, begin, value, random, length);
  } else if (to.format == MomentFormat::bf16) {
    store_bf16(static_cast<Bf16*>(to.data) + begin, value, random, length);
  }
}

}  // namespace pyft::PYFT_LOOPS
