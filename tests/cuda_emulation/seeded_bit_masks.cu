// The kernels of bit masks against plain loops: whole tiles and what is left of one, vectors and odd places.
#include "bit_masks_cuda.cu"
#include "seeded_driver.h"

namespace {

using namespace pyft;
using drive::Memory;

// Less than a byte, less than a tile, just less than tiles, and several for each warp with an end or without one.
const int64_t kLengths[] = {1, 5, 300, 8188, 20480, 40965};

bool bit_at(Memory<uint8_t>& bits, int64_t i) { return (bits[i / 8] >> i % 8 & 1) != 0; }

template <class Wanted>
void check_bits(Memory<uint8_t>& bits, int64_t length, const Wanted& wanted) {
  for (int64_t i = 0; i < 8 * bits.size(); ++i) {
    const bool want = i < length && wanted(i);
    drive::expect(bit_at(bits, i) == want, "bits", i, bit_at(bits, i), want);
  }
  bits.expect_guards("what lies around bits");
}

template <class T>
void check_values(Memory<T>& y, const std::vector<float>& wanted) {
  for (int64_t i = 0; i < y.size(); ++i) {
    drive::expect(to_fp32(y[i]) == wanted[i], "y", i, to_fp32(y[i]), wanted[i]);
  }
  y.expect_guards("what lies around y");
}

void check_bools(int64_t length, int64_t shift, int64_t shift_of_bits) {
  Memory<uint8_t> x(length, shift), bits((length + 7) / 8, shift_of_bits);
  for (int64_t i = 0; i < length; ++i) {
    // 0, 1, and bytes that no kernel of torch gives.
    x[i] = drive::number(1, i) < 0.0f ? 0 : static_cast<uint8_t>(1 << i % 8);
  }
  drive::expect(launch_pack_bools(x.data(), bits.data(), length, nullptr) == cudaSuccess, "launch", 0, 1, 0);
  check_bits(bits, length, [&](int64_t i) { return x[i] != 0; });
}

void check_relu_and_mask(int64_t length, int64_t shift) {
  Memory<float> x(length, shift), y(length, shift), grad(length, shift), dx(length, shift);
  Memory<uint8_t> bits((length + 7) / 8, shift);
  std::vector<float> wanted(length), wanted_dx(length);
  for (int64_t i = 0; i < length; ++i) {
    x[i] = drive::number(2, i);
    grad[i] = drive::number(3, i);
    wanted[i] = x[i] > 0.0f ? x[i] : 0.0f;
    wanted_dx[i] = x[i] > 0.0f ? grad[i] : 0.0f;
  }
  const FloatData data{x.data(), FloatFormat::fp32}, given{grad.data(), FloatFormat::fp32};
  drive::expect(launch_relu_bits(data, y.data(), bits.data(), length, nullptr) == cudaSuccess, "launch", 0, 1, 0);
  check_values(y, wanted);
  check_bits(bits, length, [&](int64_t i) { return x[i] > 0.0f; });
  drive::expect(launch_mask_by_bits(given, bits.data(), dx.data(), length, 0.0f, nullptr) == cudaSuccess, "launch", 1,
                1, 0);
  check_values(dx, wanted_dx);
}

void check_scale_in_bf16(int64_t length, int64_t shift) {
  Memory<Bf16> x(length, shift), y(length, shift);
  Memory<uint8_t> bits((length + 7) / 8);
  std::vector<float> wanted(length);
  for (int64_t i = 0; i < bits.size(); ++i) {
    bits[i] = static_cast<uint8_t>(i * 37 + 11);
  }
  for (int64_t i = 0; i < length; ++i) {
    x[i] = to_bf16(drive::number(4, i));
    wanted[i] = bit_at(bits, i) ? to_fp32(to_bf16(to_fp32(x[i]) * 1.25f)) : 0.0f;
  }
  const FloatData data{x.data(), FloatFormat::bf16};
  drive::expect(launch_scale_by_bits(data, bits.data(), y.data(), length, 1.25f, nullptr) == cudaSuccess, "launch", 2,
                1, 0);
  check_values(y, wanted);
}

void check_channels(int64_t channels, int64_t inner, int64_t outer) {
  const int64_t length = outer * channels * inner;
  Memory<float> x(length), y(length), grad(length), dx(length), scale(channels), shift(channels);
  Memory<uint8_t> bits((length + 7) / 8);
  std::vector<float> wanted(length), wanted_dx(length);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = drive::number(5, c);
    shift[c] = drive::number(6, c);
  }
  for (int64_t i = 0; i < length; ++i) {
    const int64_t c = i / inner % channels;
    x[i] = drive::number(7, i);
    grad[i] = drive::number(8, i);
    const float made = x[i] * scale[c] + shift[c];
    wanted[i] = made > 0.0f ? made : 0.0f;
    wanted_dx[i] = made > 0.0f ? grad[i] * scale[c] : 0.0f;
  }
  const ChannelLayout layout{channels, inner};
  drive::expect(launch_affine_relu_bits(x.data(), scale.data(), shift.data(), y.data(), bits.data(), length, layout,
                                        nullptr) == cudaSuccess,
                "launch", 3, 1, 0);
  check_values(y, wanted);
  check_bits(bits, length, [&](int64_t i) { return wanted[i] > 0.0f; });
  drive::expect(
      launch_mask_channels(grad.data(), bits.data(), scale.data(), dx.data(), length, layout, nullptr) == cudaSuccess,
      "launch", 4, 1, 0);
  check_values(dx, wanted_dx);
}

void check() {
  for (int64_t length : kLengths) {
    check_bools(length, 0, 0);
    check_bools(length, 0, 1);  // two bytes of bits at once are not possible
    check_bools(length, 3, 0);
    for (int64_t shift : {0, 1}) {
      check_relu_and_mask(length, shift);
      check_scale_in_bf16(length, shift);
    }
  }
  check_channels(5, 7, 40);
  check_channels(6, 1, 1400);
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
