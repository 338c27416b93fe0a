// One bit for each element that the backward pass of an activation lets through, eight to a byte, the first in the
// lowest bit. Works on blocks of kMaskBlock elements, whose tests fit a few registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "float_formats.h"
#include "host_device.h"

namespace pyft {

constexpr int64_t kMaskBlock = 64;

enum class BitTest { relu, positive, inside, not_outside };

// torch's threshold_backward stops the gradient where output <= 0, so NaN lets it through.
struct ReluTest {
  PYFT_HOST_DEVICE bool operator()(float x) const { return !(x <= 0.0f); }
};

// torch's leaky_relu_backward.
struct PositiveTest {
  PYFT_HOST_DEVICE bool operator()(float x) const { return x > 0.0f; }
};

// torch's hardtanh_backward stops the gradient at and beyond both limits, and, where it is vectorised, at NaN.
struct InsideTest {
  float low, high;

  PYFT_HOST_DEVICE bool operator()(float x) const { return (x > low) & (x < high); }
};

// On a GPU it lets NaN through.
struct NotOutsideTest {
  float low, high;

  PYFT_HOST_DEVICE bool operator()(float x) const { return !((x <= low) | (x >= high)); }
};

PYFT_HOST_DEVICE float zero_of(float) { return 0.0f; }
PYFT_HOST_DEVICE Bf16 zero_of(Bf16) { return {0}; }
PYFT_HOST_DEVICE Fp16 zero_of(Fp16) { return {0}; }

// As torch: NaN and -0 stay what they are.
template <class Element>
PYFT_HOST_DEVICE Element relu(Element x) {
  return to_fp32(x) < 0.0f ? zero_of(x) : x;
}

// Eight bytes of 0 or 1 to eight bits: the product moves bit 8 i to bit 56 + i, and no two of its terms meet.
PYFT_HOST_DEVICE uint8_t pack_eight(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56);
}

// Bit i: whether byte i is not 0. The product moves bit 8 i to bit 24 + i, and no two of its terms meet.
PYFT_HOST_DEVICE uint32_t nonzero_bytes(uint32_t word) {
  const uint32_t set = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7 & 0x01010101u;
  return (set * 0x01020408u) >> 24;
}

// test(i) for each of `length` elements; the last byte is filled with zeros.
template <class Test>
PYFT_HOST_DEVICE void pack_each(uint8_t* bits, int64_t length, const Test& test) {
  int64_t i = 0;
  uint8_t bytes[kMaskBlock];
  for (; i + kMaskBlock <= length; i += kMaskBlock) {
    for (int64_t j = 0; j < kMaskBlock; ++j) {
      bytes[j] = test(i + j) ? 1 : 0;
    }
    for (int64_t k = 0; k < kMaskBlock / 8; ++k) {
      bits[i / 8 + k] = pack_eight(bytes + 8 * k);
    }
  }
  for (; i < length; i += 8) {
    uint8_t packed = 0;
    for (int64_t j = 0; j < 8 && i + j < length; ++j) {
      packed |= static_cast<uint8_t>(test(i + j) ? 1u << j : 0u);
    }
    bits[i / 8] = packed;
  }
}

// use(i, bit) for each element.
template <class Use>
PYFT_HOST_DEVICE void unpack_each(const uint8_t* bits, int64_t length, const Use& use) {
  int64_t i = 0;
  for (; i + 32 <= length; i += 32) {
    uint32_t word;
    std::memcpy(&word, bits + i / 8, 4);
    for (int64_t j = 0; j < 32; ++j) {
      use(i + j, ((word >> j) & 1u) != 0);
    }
  }
  for (; i < length; ++i) {
    use(i, ((bits[i / 8] >> (i % 8)) & 1) != 0);
  }
}

// Where the channels of a tensor lie in its memory: (outer, channels, inner).
struct ChannelLayout {
  int64_t channels, inner;
};

// run(first, count, channel, step) for pieces of begin .. begin + length - 1, counted from begin: `count` elements of
// which the i-th belongs to channel + i * step.
template <class Run>
PYFT_HOST_DEVICE void by_channel(ChannelLayout layout, int64_t begin, int64_t length, const Run& run) {
  int64_t done = 0;
  while (done < length) {
    const int64_t place = begin + done, left = length - done;
    if (layout.inner == 1) {
      const int64_t channel = place % layout.channels;
      const int64_t count = layout.channels - channel < left ? layout.channels - channel : left;
      run(done, count, channel, int64_t{1});
      done += count;
    } else {
      const int64_t until = layout.inner - place % layout.inner;
      const int64_t count = until < left ? until : left;
      run(done, count, (place / layout.inner) % layout.channels, int64_t{0});
      done += count;
    }
  }
}

}  // namespace pyft
