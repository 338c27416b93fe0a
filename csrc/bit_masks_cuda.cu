// A warp works on tiles of 64 bytes a lane: four loads under way, each contiguous over the warp. Where a tile is not
// whole, or x or y begins at an odd place, its lanes take one element each.
#include "bit_masks_cuda.h"
#include "clip_grads_math.h"
#include "division_math.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;
template <class Element>
constexpr int kTile = kLoads * kWarp * kVectorLength<Element>;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x % kWarp); }

// Work(first element of a tile) for each tile of this warp.
template <class Element, class Work>
__device__ __forceinline__ void for_each_tile(int64_t length, const Work& work) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * kTile<Element>;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kTile<Element>;
       first < length; first += step) {
    work(first);
  }
}

// parts[j]: bits of vector j of this lane. Two bytes belong to one lane of 8-bit elements, one to one of 16-bit
// elements, and one to two of fp32; those swap halves, so that the warp writes 32 bytes at once, or 64.
template <int kLength>
__device__ __forceinline__ void store_parts(uint8_t* bits, const unsigned (&parts)[kLoads]) {
  const int lane = lane_of_thread();
  if constexpr (kLength == 16) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      store(reinterpret_cast<uint16_t*>(bits) + j * kWarp + lane, static_cast<uint16_t>(parts[j]));
    }
  } else if constexpr (kLength == 8) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      store(bits + j * kWarp + lane, static_cast<uint8_t>(parts[j]));
    }
  } else {
    const int odd = lane & 1;
#pragma unroll
    for (int j = 0; j < kLoads; j += 2) {
      const unsigned given = odd ? parts[j] : parts[j + 1], kept = odd ? parts[j + 1] : parts[j];
      const unsigned taken = __shfl_xor_sync(kAllLanes, given, 1);
      const unsigned byte = odd ? taken | kept << 4 : kept | taken << 4;
      store(bits + (j + odd) * (kWarp / 2) + lane / 2, static_cast<uint8_t>(byte));
    }
  }
}

// The reverse.
template <int kLength>
__device__ __forceinline__ void load_parts(const uint8_t* bits, unsigned (&parts)[kLoads]) {
  const int lane = lane_of_thread();
  if constexpr (kLength == 8) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      parts[j] = load(bits + j * kWarp + lane);
    }
  } else {
    const int odd = lane & 1;
    unsigned bytes[kLoads / 2];
#pragma unroll
    for (int j = 0; j < kLoads; j += 2) {
      bytes[j / 2] = load(bits + (j + odd) * (kWarp / 2) + lane / 2);
    }
#pragma unroll
    for (int j = 0; j < kLoads; j += 2) {
      const unsigned mine = bytes[j / 2], other = __shfl_xor_sync(kAllLanes, mine, 1);
      parts[j] = odd ? other >> 4 : mine & 15u;
      parts[j + 1] = odd ? mine >> 4 : other & 15u;
    }
  }
}

// Rules that are the same for all elements.
template <class Rule>
struct Everywhere : Rule {
  __device__ __forceinline__ const Everywhere& at(int64_t) const { return *this; }
};

// The bits of a vector, whose elements become what the rule makes of them.
template <class Walk, class Element, int kLength>
__device__ __forceinline__ unsigned bits_of_vector(Walk walk, Vector<Element, kLength>& values) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kLength; ++i) {
    bool bit;
    values.at[i] = walk.next(values.at[i], bit);
    bits |= (bit ? 1u : 0u) << i;
  }
  return bits;
}

struct BoolTestRule {
  static constexpr bool kWrites = false;

  __device__ __forceinline__ uint8_t next(uint8_t e, bool& bit) const {
    bit = e != 0;
    return e;
  }
};

// Four bytes at once.
__device__ __forceinline__ unsigned bits_of_vector(Everywhere<BoolTestRule>, Vector<uint8_t, 16>& values) {
  const auto words = __builtin_bit_cast(Vector<uint32_t, 4>, values);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= nonzero_bytes(words.at[i]) << 4 * i;
  }
  return bits;
}

// Writes what it makes of each element (or nothing, if it is a test) and a bit for it. rule.at(i) begins at element i;
// next(e, bit) is called for one element after the other.
template <class Element, class Rule>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Element* x, Element* y, uint8_t* bits, int64_t length, bool aligned, Rule rule) {
  constexpr int kLength = kVectorLength<Element>;
  const int lane = lane_of_thread();
  for_each_tile<Element>(length, [&](int64_t first) {
    if (aligned && first + kTile<Element> <= length) {
      Vector<Element, kLength> values[kLoads];
      unsigned parts[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        values[j] = load_vector<kLength>(x + first + (j * kWarp + lane) * kLength);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t begin = first + (j * kWarp + lane) * kLength;
        parts[j] = bits_of_vector(rule.at(begin), values[j]);
        if constexpr (Rule::kWrites) {
          store_vector(y + begin, values[j]);
        }
      }
      store_parts<kLength>(bits + first / 8, parts);
      return;
    }
    const int64_t end = first + kTile<Element> < length ? first + kTile<Element> : length;
    for (int64_t begin = first; begin < end; begin += kLoads * kWarp) {
      Element values[kLoads] = {};
      unsigned words[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t i = begin + j * kWarp + lane;
        if (i < end) {
          values[j] = load(x + i);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t i = begin + j * kWarp + lane;
        bool bit = false;
        if (i < end) {
          const Element made = rule.at(i).next(values[j], bit);
          if constexpr (Rule::kWrites) {
            store(y + i, made);
          }
        }
        words[j] = __ballot_sync(kAllLanes, bit);
      }
      // Lane l writes byte l: bits may begin at any address and end with any byte.
      const unsigned word = lane < 8 ? (lane < 4 ? words[0] : words[1]) : (lane < 12 ? words[2] : words[3]);
      if (lane < 4 * kLoads && begin + 8 * lane < end) {
        store(bits + begin / 8 + lane, static_cast<uint8_t>(word >> 8 * (lane % 4)));
      }
    }
  });
}

// As above; next(e, bit) is given the bit.
template <class Element, class Rule>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const Element* x, const uint8_t* bits, Element* y, int64_t length, bool aligned, Rule rule) {
  constexpr int kLength = kVectorLength<Element>;
  const int lane = lane_of_thread();
  for_each_tile<Element>(length, [&](int64_t first) {
    if (aligned && first + kTile<Element> <= length) {
      Vector<Element, kLength> values[kLoads];
      unsigned parts[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        values[j] = load_vector<kLength>(x + first + (j * kWarp + lane) * kLength);
      }
      load_parts<kLength>(bits + first / 8, parts);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t begin = first + (j * kWarp + lane) * kLength;
        auto walk = rule.at(begin);
#pragma unroll
        for (int i = 0; i < kLength; ++i) {
          values[j].at[i] = walk.next(values[j].at[i], (parts[j] >> i & 1u) != 0);
        }
        store_vector(y + begin, values[j]);
      }
      return;
    }
    const int64_t end = first + kTile<Element> < length ? first + kTile<Element> : length;
    for (int64_t begin = first; begin < end; begin += kLoads * kWarp) {
      Element values[kLoads] = {};
      unsigned bytes[kLoads] = {};
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t i = begin + j * kWarp + lane;
        if (i < end) {
          values[j] = load(x + i);
          bytes[j] = load(bits + i / 8);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t i = begin + j * kWarp + lane;
        if (i < end) {
          store(y + i, rule.at(i).next(values[j], (bytes[j] >> i % 8 & 1u) != 0));
        }
      }
    }
  });
}

template <class Element>
struct ReluRule {
  static constexpr bool kWrites = true;

  __device__ __forceinline__ Element next(Element e, bool& bit) const {
    bit = ReluTest{}(to_fp32(e));
    return relu(e);
  }
};

template <class Element, class Test>
struct TestRule {
  static constexpr bool kWrites = false;
  Test test;

  __device__ __forceinline__ Element next(Element e, bool& bit) const {
    bit = test(to_fp32(e));
    return e;
  }
};

template <class Element>
struct MaskRule {
  __device__ __forceinline__ Element next(Element e, bool bit) const { return bit ? e : zero_of(e); }
};

template <class Element>
struct SlopeRule {
  float on, off;

  __device__ __forceinline__ Element next(Element e, bool bit) const {
    Element made;
    round_into(made, to_fp32(e) * (bit ? on : off));
    return made;
  }
};

// The channel of one element after the other.
struct ChannelWalk {
  int64_t channel, channels, inner, left;

  // To the next element; true when it belongs to another channel than the one before.
  __device__ __forceinline__ bool step() {
    const bool other = left == 0;
    left = (other ? inner : left) - 1;
    channel = !other ? channel : channel + 1 == channels ? 0 : channel + 1;
    return other;
  }
};

struct Channels {
  Divisor channels, inner;

  explicit Channels(ChannelLayout layout) : channels(layout.channels), inner(layout.inner) {}

  __device__ __forceinline__ ChannelWalk at(int64_t i) const {
    const int64_t run = inner.quotient(i);
    const int64_t channel = run - channels.quotient(run) * channels.divisor;
    return {channel, channels.divisor, inner.divisor, inner.divisor - (i - run * inner.divisor)};
  }
};

struct AffineReluRule {
  static constexpr bool kWrites = true;
  Channels channels;
  const float *scale, *shift;

  struct Walk {
    ChannelWalk place;
    const float *scale, *shift;
    float factor, addend;

    __device__ __forceinline__ float next(float x, bool& bit) {
      if (place.step()) {
        factor = load(scale + place.channel);
        addend = load(shift + place.channel);
      }
      const float y = relu(x * factor + addend);
      bit = ReluTest{}(y);
      return y;
    }
  };

  __device__ __forceinline__ Walk at(int64_t i) const {
    const ChannelWalk place = channels.at(i);
    return {place, scale, shift, load(scale + place.channel), load(shift + place.channel)};
  }
};

struct MaskChannelsRule {
  Channels channels;
  const float* scale;

  struct Walk {
    ChannelWalk place;
    const float* scale;
    float factor;

    __device__ __forceinline__ float next(float x, bool bit) {
      if (place.step()) {
        factor = load(scale + place.channel);
      }
      return bit ? x * factor : 0.0f;
    }
  };

  __device__ __forceinline__ Walk at(int64_t i) const {
    const ChannelWalk place = channels.at(i);
    return {place, scale, load(scale + place.channel)};
  }
};

template <class Element>
int64_t blocks_for(int64_t length) {
  constexpr int64_t kBlockElements = static_cast<int64_t>(kThreads / kWarp) * kTile<Element>;
  return (length + kBlockElements - 1) / kBlockElements;
}

template <class Element, class Rule>
cudaError_t launch_pack(const Element* x, Element* y, uint8_t* bits, int64_t length, Rule rule, cudaStream_t stream) {
  if (length == 0) {
    return cudaSuccess;
  }
  // A lane of 8-bit elements writes two bytes at once.
  const bool even = kVectorLength<Element> <= 8 || reinterpret_cast<uintptr_t>(bits) % 2 == 0;
  return PYFT_LAUNCH((pack_kernel<Element, Rule>), UpTo{blocks_for<Element>(length)}, kThreads, stream, x, y, bits,
                     length, even && vector_aligned(x, y), rule);
}

template <class Element, class Rule>
cudaError_t launch_unpack(const Element* x, const uint8_t* bits, Element* y, int64_t length, Rule rule,
                          cudaStream_t stream) {
  if (length == 0) {
    return cudaSuccess;
  }
  return PYFT_LAUNCH((unpack_kernel<Element, Rule>), UpTo{blocks_for<Element>(length)}, kThreads, stream, x, bits, y,
                     length, vector_aligned(x, y), rule);
}

// Calls work(input, output), both of the type of the format.
template <class Work>
cudaError_t by_format(FloatData x, void* y, const Work& work) {
  switch (x.format) {
    case FloatFormat::bf16:
      return work(static_cast<const Bf16*>(x.data), static_cast<Bf16*>(y));
    case FloatFormat::fp16:
      return work(static_cast<const Fp16*>(x.data), static_cast<Fp16*>(y));
    default:
      return work(static_cast<const float*>(x.data), static_cast<float*>(y));
  }
}

}  // namespace

cudaError_t launch_relu_bits(FloatData x, void* y, uint8_t* bits, int64_t length, cudaStream_t stream) {
  return by_format(x, y, [&]<class Element>(const Element* from, Element* to) {
    return launch_pack(from, to, bits, length, Everywhere<ReluRule<Element>>{}, stream);
  });
}

cudaError_t launch_pack_bits(FloatData x, uint8_t* bits, int64_t length, BitTest test, float low, float high,
                             cudaStream_t stream) {
  return by_format(x, nullptr, [&]<class Element>(const Element* from, Element* to) {
    switch (test) {
      case BitTest::relu:
        return launch_pack(from, to, bits, length, Everywhere<TestRule<Element, ReluTest>>{}, stream);
      case BitTest::positive:
        return launch_pack(from, to, bits, length, Everywhere<TestRule<Element, PositiveTest>>{}, stream);
      case BitTest::inside:
        return launch_pack(from, to, bits, length, Everywhere<TestRule<Element, InsideTest>>{{{low, high}}}, stream);
      default:
        return launch_pack(from, to, bits, length, Everywhere<TestRule<Element, NotOutsideTest>>{{{low, high}}},
                           stream);
    }
  });
}

cudaError_t launch_pack_bools(const uint8_t* x, uint8_t* bits, int64_t length, cudaStream_t stream) {
  return launch_pack<uint8_t>(x, nullptr, bits, length, Everywhere<BoolTestRule>{}, stream);
}

cudaError_t launch_mask_by_bits(FloatData x, const uint8_t* bits, void* y, int64_t length, float off,
                                cudaStream_t stream) {
  return by_format(x, y, [&]<class Element>(const Element* from, Element* to) {
    return off == 0.0f ? launch_unpack(from, bits, to, length, Everywhere<MaskRule<Element>>{}, stream)
                       : launch_unpack(from, bits, to, length, Everywhere<SlopeRule<Element>>{{1.0f, off}}, stream);
  });
}

cudaError_t launch_scale_by_bits(FloatData x, const uint8_t* bits, void* y, int64_t length, float on,
                                 cudaStream_t stream) {
  return by_format(x, y, [&]<class Element>(const Element* from, Element* to) {
    return launch_unpack(from, bits, to, length, Everywhere<SlopeRule<Element>>{{on, 0.0f}}, stream);
  });
}

cudaError_t launch_affine_relu_bits(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                                    int64_t length, ChannelLayout layout, cudaStream_t stream) {
  return length == 0 ? cudaSuccess
                     : launch_pack(x, y, bits, length, AffineReluRule{Channels(layout), scale, shift}, stream);
}

cudaError_t launch_mask_channels(const float* x, const uint8_t* bits, const float* scale, float* y, int64_t length,
                                 ChannelLayout layout, cudaStream_t stream) {
  return length == 0 ? cudaSuccess
                     : launch_unpack(x, bits, y, length, MaskChannelsRule{Channels(layout), scale}, stream);
}

}  // namespace pyft
