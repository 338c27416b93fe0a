// Four consecutive elements of any storage format, moved as one access: 16 bytes of fp32, 8 of bf16, 4 of 8-bit state.
// A warp's accesses are contiguous whatever the formats are, which eight bf16 elements a thread would not be beside
// fp32 moments. Where a tensor begins at an odd place, or ends, elements move one by one.
#pragma once

#include "cuda_launch.h"
#include "float_formats.h"
#include "rounding_math.h"

namespace pyft {

constexpr int kFour = 4;

// Their bits, one after the other. Converted late, so that the loads of several tensors are under way together.
struct Four {
  uint32_t words[kFour];
};

PYFT_HOST_DEVICE int bytes_of(FloatFormat format) { return format == FloatFormat::fp32 ? 4 : 2; }
PYFT_HOST_DEVICE int bytes_of(WeightFormat format) { return format == WeightFormat::fp32 ? 4 : 2; }
PYFT_HOST_DEVICE int bytes_of(MomentFormat format) {
  return format == MomentFormat::fp32 ? 4 : format == MomentFormat::bf16 ? 2 : 1;
}

// Element i of `raw`, with zeros above it.
PYFT_HOST_DEVICE uint32_t bits_at(const Four& raw, int bytes, int i) {
  return bytes == 4   ? raw.words[i]
         : bytes == 2 ? raw.words[i / 2] >> 16 * (i % 2) & 0xffffu
                      : raw.words[0] >> 8 * i & 0xffu;
}
PYFT_HOST_DEVICE float fp32_at(const Four& raw, FloatFormat format, int i) {
  const uint32_t bits = bits_at(raw, bytes_of(format), i);
  return format == FloatFormat::fp32   ? float_of(bits)
         : format == FloatFormat::bf16 ? to_fp32(Bf16{static_cast<uint16_t>(bits)})
                                       : to_fp32(Fp16{static_cast<uint16_t>(bits)});
}

// The reverse; elements above i are overwritten by later calls.
PYFT_HOST_DEVICE void put_bits(Four& raw, int bytes, int i, uint32_t bits) {
  if (bytes == 4) {
    raw.words[i] = bits;
  } else if (bytes == 2) {
    raw.words[i / 2] = i % 2 == 0 ? bits : raw.words[i / 2] | bits << 16;
  } else {
    raw.words[0] = i == 0 ? bits : raw.words[0] | bits << 8 * i;
  }
}

#ifdef PYFT_SITE

// Tensors' addresses come out of a table, where the compiler cannot see that they are global ones.
template <class T>
__device__ __forceinline__ T* in_global(T* place) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(place));
#endif
  return place;
}

__device__ __forceinline__ bool begins_by_four(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % (kFour * bytes) == 0;
}

// Elements first .. first + 3 of `bytes` bytes each, as one access. kOnce: nobody looks at them again soon.
template <bool kOnce>
__device__ __forceinline__ Four load_at_once(const void* data, int bytes, int64_t first) {
  const char* place = in_global(static_cast<const char*>(data) + first * bytes);
  const auto words = reinterpret_cast<const uint32_t*>(place);
  Four raw = {};
  if (bytes == 4) {
    const auto found = kOnce ? load_vector_once<4>(words) : load_vector<4>(words);
    for (int i = 0; i < 4; ++i) {
      raw.words[i] = found.at[i];
    }
  } else if (bytes == 2) {
    const auto found = kOnce ? load_vector_once<2>(words) : load_vector<2>(words);
    raw.words[0] = found.at[0];
    raw.words[1] = found.at[1];
  } else {
    raw.words[0] = kOnce ? load_once(words) : load(words);
  }
  return raw;
}

template <bool kOnce>
__device__ __forceinline__ void store_at_once(void* data, int bytes, int64_t first, const Four& raw) {
  const auto words = reinterpret_cast<uint32_t*>(in_global(static_cast<char*>(data) + first * bytes));
  if (bytes == 4) {
    const Vector<uint32_t, 4> four{{raw.words[0], raw.words[1], raw.words[2], raw.words[3]}};
    kOnce ? store_vector_once(words, four) : store_vector(words, four);
  } else if (bytes == 2) {
    const Vector<uint32_t, 2> two{{raw.words[0], raw.words[1]}};
    kOnce ? store_vector_once(words, two) : store_vector(words, two);
  } else {
    kOnce ? store_once(words, raw.words[0]) : store(words, raw.words[0]);
  }
}

// Elements first .. first + count - 1, 0 <= count <= 4; zeros in the place of the rest.
__device__ __forceinline__ Four load_four(const void* data, int bytes, int64_t first, int count) {
  const char* place = in_global(static_cast<const char*>(data) + first * bytes);
  if (count == kFour && begins_by_four(place, bytes)) {
    return load_at_once<false>(data, bytes, first);
  }
  Four raw = {};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < count) {
      put_bits(raw, bytes, i,
               bytes == 4   ? load(reinterpret_cast<const uint32_t*>(place) + i)
               : bytes == 2 ? load(reinterpret_cast<const uint16_t*>(place) + i)
                            : load(reinterpret_cast<const uint8_t*>(place) + i));
    }
  }
  return raw;
}

__device__ __forceinline__ void store_four(void* data, int bytes, int64_t first, int count, const Four& raw) {
  char* place = in_global(static_cast<char*>(data) + first * bytes);
  if (count == kFour && begins_by_four(place, bytes)) {
    return store_at_once<false>(data, bytes, first, raw);
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < count) {
      const uint32_t bits = bits_at(raw, bytes, i);
      if (bytes == 4) {
        store(reinterpret_cast<uint32_t*>(place) + i, bits);
      } else if (bytes == 2) {
        store(reinterpret_cast<uint16_t*>(place) + i, static_cast<uint16_t>(bits));
      } else {
        store(reinterpret_cast<uint8_t*>(place) + i, static_cast<uint8_t>(bits));
      }
    }
  }
}

#endif

}  // namespace pyft
