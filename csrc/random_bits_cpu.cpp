#include "random_bits_cpu.h"

#include <algorithm>

#include "bit_masks_math.h"
#include "run_on_target.h"

namespace pyft {
namespace {

PYFT_HOST_DEVICE void twist(uint32_t* words) {
  constexpr int kFirst = kTwisterWords - kTwisterShift;
  for (int i = 0; i < kFirst; ++i) {
    words[i] = twisted(words[i], words[i + 1], words[i + kTwisterShift]);
  }
  for (int i = kFirst; i < kTwisterWords - 1; ++i) {
    words[i] = twisted(words[i], words[i + 1], words[i - kFirst]);
  }
  words[kTwisterWords - 1] = twisted(words[kTwisterWords - 1], words[0], words[kTwisterShift - 1]);
}

// `count` of the generator's numbers.
PYFT_HOST_DEVICE void draw(Twister& state, int64_t count, uint32_t* to) {
  while (count > 0) {
    if (state.left <= 1) {
      twist(state.words);
      state.next = 0;
      state.left = kTwisterWords + 1;
    }
    const int64_t taken = state.left - 1 < count ? state.left - 1 : count;
    const uint32_t* from = state.words + state.next;
    for (int64_t i = 0; i < taken; ++i) {
      to[i] = tempered(from[i]);
    }
    to += taken;
    count -= taken;
    state.next += taken;
    state.left -= taken;
  }
}

struct BernoulliLoop {
  Twister* state;
  int64_t count;
  BelowProbability below;
  uint8_t* bits;

  PYFT_HOST_DEVICE void operator()() const {
    // A multiple of 8, whose words stay in an L1 cache.
    constexpr int64_t kBlock = 1024;
    uint32_t words[2 * kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t length = count - first < kBlock ? count - first : kBlock;
      draw(*state, 2 * length, words);
      const uint32_t* from = words;
      const BelowProbability passes = below;
      pack_each(bits + first / 8, length,
                [=](int64_t i) __attribute__((always_inline)) { return passes(from[2 * i], from[2 * i + 1]); });
    }
  }
};

}  // namespace

void bernoulli_bits_cpu(Twister& state, int64_t count, double p, uint8_t* bits) {
  run_on_target(BernoulliLoop{&state, count, BelowProbability(p), bits});
}

}  // namespace pyft
