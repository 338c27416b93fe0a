// The kernels of max pooling against plain loops: planes and channels last, fp32 and bf16, vectors and odd places.
#include "max_pool_cuda.cu"
#include "seeded_driver.h"

namespace {

using namespace pyft;
using drive::Memory;

float value_of(float x) { return x; }
float value_of(Bf16 x) { return to_fp32(x); }
void set(float& place, float x) { place = x; }
void set(Bf16& place, float x) { place = to_bf16(x); }

// Few levels, so that windows hold equal values; NaN; and windows in which all is -inf.
float input(int64_t i, int64_t lowest) {
  return i < lowest ? -INFINITY : i % 97 == 13 ? NAN : std::floor(drive::number(1, i) * 4.0f) / 4.0f;
}

template <class Element>
void check_one(int64_t parts, int64_t channels, const PoolShape& s, FloatFormat format, int64_t shift) {
  const int64_t ins = s.height.in * s.width.in, outs = s.height.out * s.width.out;
  Memory<Element> x(parts * ins * channels, shift), y(parts * outs * channels, shift);
  Memory<Element> grad(parts * outs * channels, shift), dx(parts * ins * channels, shift);
  Memory<uint8_t> at(parts * outs * channels);
  std::vector<float> largest(y.size(), -INFINITY);
  std::vector<double> sums(x.size(), 0.0);
  std::vector<int64_t> places(y.size());
  for (int64_t i = 0; i < x.size(); ++i) {
    set(x[i], input(i, ins * channels / 2));
  }
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t row = 0; row < s.height.out; ++row) {
      for (int64_t column = 0; column < s.width.out; ++column) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t to = ((part * s.height.out + row) * s.width.out + column) * channels + c;
          set(grad[to], drive::number(2, to));
          int64_t chosen = -1;
          for (int64_t k = 0; k < s.height.kernel * s.width.kernel; ++k) {
            const int64_t ky = k / s.width.kernel, kx = k % s.width.kernel;
            if (s.height.inside(row, ky) && s.width.inside(column, kx)) {
              const int64_t down = s.height.start(row) + ky * s.height.dilation;
              const int64_t across = s.width.start(column) + kx * s.width.dilation;
              const int64_t from = ((part * s.height.in + down) * s.width.in + across) * channels + c;
              const float value = value_of(x[from]);
              if (chosen < 0 || value > largest[to] || std::isnan(value)) {
                largest[to] = value;
                places[to] = k;
                chosen = from;
              }
            }
          }
          sums[chosen] += value_of(grad[to]);
        }
      }
    }
  }
  const FloatData data{x.data(), format}, given{grad.data(), format};
  drive::expect(launch_max_pool(data, y.data(), at.data(), parts, channels, s, nullptr) == cudaSuccess, "launch", 0, 1,
                0);
  for (int64_t i = 0; i < y.size(); ++i) {
    drive::expect_near("y", i, value_of(y[i]), largest[i], 0.0);
    drive::expect(at[i] == places[i], "at", i, at[i], static_cast<double>(places[i]));
  }
  drive::expect(launch_max_pool_backward(given, at.data(), dx.data(), parts, channels, s, nullptr) == cudaSuccess,
                "launch", 1, 1, 0);
  // Sums of up to nine numbers in fp32, then one rounding.
  const double rounding = format == FloatFormat::fp32 ? 1e-6 : 1.0 / 256.0;
  for (int64_t i = 0; i < dx.size(); ++i) {
    const double difference = std::fabs(value_of(dx[i]) - sums[i]);
    drive::expect(difference <= rounding * std::fabs(sums[i]) + 1e-6, "dx", i, value_of(dx[i]), sums[i]);
  }
  for (const auto* memory : {&y, &dx}) {
    memory->expect_guards("what lies around");
  }
  at.expect_guards("what lies around at");
}

void check() {
  const PoolShape square{{9, 5, 3, 2, 1, 1}, {10, 5, 3, 2, 1, 1}}, pairs{{8, 4, 2, 2, 0, 1}, {8, 4, 2, 2, 0, 1}};
  const PoolShape wide{{9, 7, 2, 1, 1, 3}, {14, 10, 5, 1, 2, 2}};
  for (const PoolShape& shape : {square, pairs, wide}) {
    check_one<float>(3, 1, shape, FloatFormat::fp32, 0);
    check_one<float>(2, 8, shape, FloatFormat::fp32, 0);
    check_one<float>(2, 8, shape, FloatFormat::fp32, 1);
    check_one<Bf16>(3, 1, shape, FloatFormat::bf16, 1);
    check_one<Bf16>(2, 16, shape, FloatFormat::bf16, 0);
    check_one<Bf16>(2, 12, shape, FloatFormat::bf16, 0);
  }
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
