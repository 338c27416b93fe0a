// The kernels of norms against sums in double: sums of squares of chunks, clamped and not, and norms of four orders.
#include "grad_norm_cuda.cu"
#include "seeded_driver.h"

namespace {

using namespace pyft;
using drive::Memory;

// The first does not begin at the place of a vector; the second has more chunks than one thread adds.
const std::vector<int64_t> kSizes{37, 4 * kDeviceChunk + 1203, kDeviceChunk + 6}, kChunks{256, 128, kDeviceChunk};

// Of the magnitudes' powers; p = 0 stands for the squares of clamped elements.
double term(double x, double p) {
  const double clamped = std::fmin(std::fmax(x, -0.5), 0.5);
  return p == 0.0 ? (std::isnan(x) ? x : clamped * clamped) : std::pow(std::fabs(x), p);
}

void check() {
  Memory<float> first(kSizes[0], 1), second(kSizes[1]);
  Memory<Bf16> third(kSizes[2], 3);
  for (int64_t i = 0; i < kSizes[0]; ++i) {
    first[i] = 3.0f * drive::number(1, i);
  }
  for (int64_t i = 0; i < kSizes[1]; ++i) {
    second[i] = drive::number(2, i);
  }
  for (int64_t i = 0; i < kSizes[2]; ++i) {
    third[i] = to_bf16(drive::number(3, i));
  }
  const auto element = [&](int tensor, int64_t i) {
    return tensor == 0 ? first[i] : tensor == 1 ? second[i] : to_fp32(third[i]);
  };
  DeviceChunkTable cut;
  for (int32_t t = 0; t < 3; ++t) {
    for (int64_t offset = 0; offset < kSizes[t]; offset += kChunks[t]) {
      cut.chunks.push_back({offset, t, static_cast<int32_t>(std::min(kChunks[t], kSizes[t] - offset))});
    }
    cut.begin.push_back(static_cast<int64_t>(cut.chunks.size()));
  }
  Memory<DeviceChunk> chunks(cut.chunks);
  Memory<int64_t> begin(cut.begin);
  Memory<DeviceFloats> tensors(std::vector<DeviceFloats>{{first.data(), static_cast<int64_t>(FloatFormat::fp32)},
                                                         {second.data(), static_cast<int64_t>(FloatFormat::fp32)},
                                                         {third.data(), static_cast<int64_t>(FloatFormat::bf16)}});
  const DeviceFloatsTable table{chunks.data(), chunks.size(), tensors.data(), begin.data(), 3};
  for (const bool with_nan : {false, true}) {
    first[30] = with_nan ? NAN : 1.0f;
    for (const float limit : {INFINITY, 0.5f}) {
      Memory<double> partial(chunks.size());
      drive::expect(launch_sum_of_squares(table, limit, partial.data(), nullptr) == cudaSuccess, "launch", 0, 1, 0);
      for (int64_t c = 0; c < chunks.size(); ++c) {
        double want = 0.0;
        for (int64_t i = 0; i < chunks[c].length; ++i) {
          want += term(element(chunks[c].tensor, chunks[c].offset + i), std::isinf(limit) ? 2.0 : 0.0);
        }
        drive::expect_near("partial", c, partial[c], want, 1e-12);
      }
      partial.expect_guards("what lies around sums");
    }
  }
  first[30] = 1.0f;
  for (const double p : {1.0, 2.0, 3.0, static_cast<double>(INFINITY)}) {
    Memory<double> scratch(norm_scratch(chunks.size(), 3));
    Memory<float> norm(1);
    drive::expect(launch_norm(table, p, scratch.data(), norm.data(), nullptr) == cudaSuccess, "launch", 1, 1, 0);
    double sum = 0.0, largest = 0.0;
    for (int tensor = 0; tensor < 3; ++tensor) {
      for (int64_t i = 0; i < kSizes[tensor]; ++i) {
        sum += term(element(tensor, i), p);
        largest = std::fmax(largest, std::fabs(element(tensor, i)));
      }
    }
    drive::expect_near("norm", static_cast<int64_t>(std::fmin(p, 9.0)), norm[0],
                       std::isinf(p) ? largest : std::pow(sum, 1.0 / p), 1e-7);
    scratch.expect_guards("what lies around sums");
    norm.expect_guards("what lies around the norm");
  }
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
