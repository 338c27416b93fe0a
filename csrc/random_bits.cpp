// Draws of torch's generator on the CPU, one bit each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cpu_target.h"
#include "random_bits_cpu.h"
#include "tensor_checks.h"

namespace pyft {
namespace {

// torch.get_rng_state(): the seed, `left` and whether there is one (int32 each), `next`, words in 8 bytes each, and
// what torch.randn keeps for its next call.
constexpr int64_t kStateBytes = 5056, kLeft = 8, kNext = 16, kWords = 24;

template <class Number>
Number number_at(const uint8_t* data) {
  Number number;
  std::memcpy(&number, data, sizeof(number));
  return number;
}

}  // namespace

// state (5056,) uint8, moved on in place. Gives ceil(count / 8) uint8.
Tensor bernoulli_bits(Tensor state, int64_t count, double p) {
  STD_TORCH_CHECK(state.is_cpu() && state.scalar_type() == torch::headeronly::ScalarType::Byte &&
                      state.is_contiguous() && state.numel() == kStateBytes,
                  "state must be ", kStateBytes, " contiguous uint8 on the CPU, as torch.get_rng_state() gives them");
  STD_TORCH_CHECK(count >= 0 && p >= 0.0 && p <= 1.0, "count must be 0 or more and p from 0 to 1, got ", count, " and ",
                  p);
  uint8_t* data = static_cast<uint8_t*>(state.mutable_data_ptr());
  Twister twister;
  twister.left = number_at<int32_t>(data + kLeft);
  twister.next = number_at<int64_t>(data + kNext);
  STD_TORCH_CHECK(twister.left >= 1 && twister.next >= 0 && twister.left - 1 + twister.next <= kTwisterWords,
                  "state is not that of torch's generator");
  for (int i = 0; i < kTwisterWords; ++i) {
    twister.words[i] = static_cast<uint32_t>(number_at<uint64_t>(data + kWords + 8 * i));
  }
  Tensor bits = torch::stable::new_empty(state, {(count + 7) / 8});
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here
  bernoulli_bits_cpu(twister, count, p, static_cast<uint8_t*>(bits.mutable_data_ptr()));
  const int32_t left = static_cast<int32_t>(twister.left);
  std::memcpy(data + kLeft, &left, sizeof(left));
  std::memcpy(data + kNext, &twister.next, sizeof(twister.next));
  for (int i = 0; i < kTwisterWords; ++i) {
    const uint64_t word = twister.words[i];
    std::memcpy(data + kWords + 8 * i, &word, sizeof(word));
  }
  return bits;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { library.impl("bernoulli_bits", TORCH_BOX(&bernoulli_bits)); }

}  // namespace pyft
