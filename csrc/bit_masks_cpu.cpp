#include "bit_masks_cpu.h"

#include "clip_grads_math.h"
#include "run_on_target.h"

namespace pyft {
namespace {

template <class Element>
struct ReluLoop {
  const Element* x;
  Element* y;
  uint8_t* bits;
  int64_t length;

  PYFT_HOST_DEVICE void operator()() const {
    const Element* from = x;
    Element* to = y;
    pack_each(bits, length, [=](int64_t i) __attribute__((always_inline)) {
      const Element e = from[i];
      to[i] = relu(e);
      return ReluTest{}(to_fp32(e));
    });
  }
};

template <class Element, class Test>
struct PackLoop {
  const Element* x;
  uint8_t* bits;
  int64_t length;
  Test test;

  PYFT_HOST_DEVICE void operator()() const {
    const Element* from = x;
    const Test passes = test;
    pack_each(bits, length, [=](int64_t i) __attribute__((always_inline)) { return passes(to_fp32(from[i])); });
  }
};

struct PackBoolsLoop {
  const uint8_t* x;
  uint8_t* bits;
  int64_t length;

  PYFT_HOST_DEVICE void operator()() const {
    const uint8_t* from = x;
    pack_each(bits, length, [=](int64_t i) __attribute__((always_inline)) { return from[i] != 0; });
  }
};

template <class Element>
struct MaskLoop {
  const Element* x;
  const uint8_t* bits;
  Element* y;
  int64_t length;

  PYFT_HOST_DEVICE void operator()() const {
    const Element* from = x;
    Element* to = y;
    unpack_each(bits, length, [=](int64_t i, bool set) __attribute__((always_inline)) {
      const Element e = from[i];
      to[i] = set ? e : zero_of(e);
    });
  }
};

template <class Element>
struct SlopeLoop {
  const Element* x;
  const uint8_t* bits;
  Element* y;
  int64_t length;
  float on, off;

  PYFT_HOST_DEVICE void operator()() const {
    const Element* from = x;
    Element* to = y;
    const float if_set = on, if_not = off;
    unpack_each(bits, length, [=](int64_t i, bool set) __attribute__((always_inline)) {
      round_into(to[i], to_fp32(from[i]) * (set ? if_set : if_not));
    });
  }
};

struct AffineLoop {
  const float *x, *scale, *shift;
  float* y;
  uint8_t* bits;
  int64_t offset, length;
  ChannelLayout layout;

  PYFT_HOST_DEVICE void operator()() const {
    // Blocks that stay in the L1 cache between the two loops.
    constexpr int64_t kBlock = 2048;
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t count = length - first < kBlock ? length - first : kBlock;
      const float *from = x + first, *factor = scale, *addend = shift;
      float* to = y + first;
      by_channel(layout, offset + first, count,
                 [=](int64_t begin, int64_t n, int64_t channel, int64_t step) __attribute__((always_inline)) {
                   if (step == 0) {
                     const float a = factor[channel], b = addend[channel];
                     for (int64_t i = begin; i < begin + n; ++i) {
                       to[i] = relu(from[i] * a + b);
                     }
                   } else {
                     for (int64_t i = 0; i < n; ++i) {
                       to[begin + i] = relu(from[begin + i] * factor[channel + i] + addend[channel + i]);
                     }
                   }
                 });
      pack_each(bits + first / 8, count, [=](int64_t i) __attribute__((always_inline)) { return ReluTest{}(to[i]); });
    }
  }
};

struct MaskChannelsLoop {
  const float* x;
  const uint8_t* bits;
  const float* scale;
  float* y;
  int64_t offset, length;
  ChannelLayout layout;

  PYFT_HOST_DEVICE void operator()() const {
    constexpr int64_t kBlock = 2048;
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t count = length - first < kBlock ? length - first : kBlock;
      const float *from = x + first, *factor = scale;
      float* to = y + first;
      by_channel(layout, offset + first, count,
                 [=](int64_t begin, int64_t n, int64_t channel, int64_t step) __attribute__((always_inline)) {
                   if (step == 0) {
                     const float a = factor[channel];
                     for (int64_t i = begin; i < begin + n; ++i) {
                       to[i] = from[i] * a;
                     }
                   } else {
                     for (int64_t i = 0; i < n; ++i) {
                       to[begin + i] = from[begin + i] * factor[channel + i];
                     }
                   }
                 });
      unpack_each(bits + first / 8, count,
                  [=](int64_t i, bool set) __attribute__((always_inline)) { to[i] = set ? to[i] : 0.0f; });
    }
  }
};

// Calls work(input, output) with both at `offset` and of the type of the format.
template <class Work>
void by_format(FloatData x, void* y, int64_t offset, const Work& work) {
  switch (x.format) {
    case FloatFormat::bf16:
      return work(static_cast<const Bf16*>(x.data) + offset, static_cast<Bf16*>(y) + offset);
    case FloatFormat::fp16:
      return work(static_cast<const Fp16*>(x.data) + offset, static_cast<Fp16*>(y) + offset);
    default:
      return work(static_cast<const float*>(x.data) + offset, static_cast<float*>(y) + offset);
  }
}

}  // namespace

void relu_bits_cpu(FloatData x, void* y, uint8_t* bits, int64_t offset, int64_t length) {
  by_format(x, y, offset, [&]<class Element>(const Element* from, Element* to) {
    run_on_target(ReluLoop<Element>{from, to, bits + offset / 8, length});
  });
}

void pack_bits_cpu(FloatData x, uint8_t* bits, int64_t offset, int64_t length, BitTest test, float low, float high) {
  uint8_t* place = bits + offset / 8;
  by_format(x, const_cast<void*>(x.data), offset, [&]<class Element>(const Element* from, Element*) {
    switch (test) {
      case BitTest::relu:
        return run_on_target(PackLoop<Element, ReluTest>{from, place, length, {}});
      case BitTest::positive:
        return run_on_target(PackLoop<Element, PositiveTest>{from, place, length, {}});
      case BitTest::inside:
        return run_on_target(PackLoop<Element, InsideTest>{from, place, length, {low, high}});
      default:
        return run_on_target(PackLoop<Element, NotOutsideTest>{from, place, length, {low, high}});
    }
  });
}

void pack_bools_cpu(const uint8_t* x, uint8_t* bits, int64_t offset, int64_t length) {
  run_on_target(PackBoolsLoop{x + offset, bits + offset / 8, length});
}

void mask_by_bits_cpu(FloatData x, const uint8_t* bits, void* y, int64_t offset, int64_t length, float off) {
  by_format(x, y, offset, [&]<class Element>(const Element* from, Element* to) {
    if (off == 0.0f) {
      run_on_target(MaskLoop<Element>{from, bits + offset / 8, to, length});
    } else {
      run_on_target(SlopeLoop<Element>{from, bits + offset / 8, to, length, 1.0f, off});
    }
  });
}

void scale_by_bits_cpu(FloatData x, const uint8_t* bits, void* y, int64_t offset, int64_t length, float on) {
  by_format(x, y, offset, [&]<class Element>(const Element* from, Element* to) {
    run_on_target(SlopeLoop<Element>{from, bits + offset / 8, to, length, on, 0.0f});
  });
}

void affine_relu_bits_cpu(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                          int64_t offset, int64_t length, ChannelLayout layout) {
  run_on_target(AffineLoop{x + offset, scale, shift, y + offset, bits + offset / 8, offset, length, layout});
}

void mask_channels_cpu(const float* x, const uint8_t* bits, const float* scale, float* y, int64_t offset,
                       int64_t length, ChannelLayout layout) {
  run_on_target(MaskChannelsLoop{x + offset, bits + offset / 8, scale, y + offset, offset, length, layout});
}

}  // namespace pyft
