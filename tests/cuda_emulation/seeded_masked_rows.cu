// The gathers of chosen columns and channels against plain loops, in planes that begin at 16 bytes and such that do
// not, of one step to several blocks, and the writing of parts.
#include "masked_rows_cuda.cu"
#include "seeded_driver.h"

namespace {

using namespace pyft;
using drive::Memory;

void expect_sums(Memory<float>& sums, const std::vector<double>& want) {
  for (size_t c = 0; c < want.size(); ++c) {
    drive::expect_near("sums", static_cast<int64_t>(c), sums[static_cast<int64_t>(c)], want[c], 1e-5);
  }
  sums.expect_guards("what lies around sums");
}

// `shift` elements behind a place that vectors may begin at; `gap` elements between planes.
void check_planes(int64_t images, int64_t total, int64_t size, int64_t shift, int64_t gap) {
  const std::vector<int64_t> chosen = {total - 1, 0, total / 2};
  const int64_t count = static_cast<int64_t>(chosen.size()), stride = size + gap;
  Memory<float> full(images * total * stride, shift), compact(images * count * size), sums(count);
  Memory<int64_t> channels(chosen);
  for (int64_t i = 0; i < images * total * stride; ++i) {
    full[i] = drive::number(1, i);
  }
  PlaneGather gather{full.data(), total * stride, stride,         channels.data(), images,
                     count,       size,           compact.data(), nullptr,         nullptr};
  Memory<float> room(plane_sum_room(FloatFormat::fp32, gather));
  gather.partial = room.data();
  gather.sums = sums.data();
  drive::expect(launch_gather_planes(FloatFormat::fp32, gather, nullptr) == cudaSuccess, "launch", 0, 1, 0);
  std::vector<double> want(count, 0.0);
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t s = 0; s < size; ++s) {
        const float there = full[(i * total + chosen[c]) * stride + s];
        drive::expect(compact[(i * count + c) * size + s] == there, "compact", (i * count + c) * size + s,
                      compact[(i * count + c) * size + s], there);
        want[c] += there;
      }
    }
  }
  expect_sums(sums, want);
  compact.expect_guards("what lies around compact");
  room.expect_guards("what lies around the room for sums");
}

void check_columns(int64_t rows, int64_t total, int64_t shift) {
  std::vector<int64_t> chosen;
  for (int64_t c = 0; c < total; ++c) {
    if (c % 3 != 0) {
      chosen.push_back(total - 1 - c);
    }
  }
  const int64_t count = static_cast<int64_t>(chosen.size());
  Memory<float> full(rows * total, shift), compact(rows * count), sums(count);
  Memory<int64_t> columns(chosen);
  for (int64_t i = 0; i < rows * total; ++i) {
    full[i] = drive::number(2, i);
  }
  Memory<float> room(column_sum_room(FloatFormat::fp32, rows, count));
  const ColumnGather gather{{full.data(), total, 1}, columns.data(), rows,       count,
                            compact.data(),          room.data(),    sums.data()};
  drive::expect(launch_gather_columns(FloatFormat::fp32, gather, nullptr) == cudaSuccess, "launch", 0, 1, 0);
  std::vector<double> want(count, 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < count; ++c) {
      drive::expect(compact[r * count + c] == full[r * total + chosen[c]], "compact", r * count + c,
                    compact[r * count + c], full[r * total + chosen[c]]);
      want[c] += full[r * total + chosen[c]];
    }
  }
  expect_sums(sums, want);
  compact.expect_guards("what lies around compact");
  room.expect_guards("what lies around the room for sums");
}

void check_write() {
  constexpr int64_t kHeight = 40, kWidth = 23;
  const std::vector<int64_t> rows = {39, 3, 17}, columns = {22, 0, 1, 2, 5, 6, 8};
  Memory<float> full(kHeight * kWidth, 1), part(static_cast<int64_t>(rows.size() * columns.size()));
  Memory<int64_t> row_index(rows), column_index(columns);
  std::vector<float> want(kHeight * kWidth, 5.0f);
  for (int64_t i = 0; i < full.size(); ++i) {
    full[i] = 5.0f;
  }
  const int64_t width = static_cast<int64_t>(columns.size());
  for (int64_t i = 0; i < part.size(); ++i) {
    part[i] = want[rows[i / width] * kWidth + columns[i % width]] = drive::number(3, i);
  }
  const PartWrite write{{full.data(), kWidth, 1}, {part.data(), width, 1},           row_index.data(),
                        column_index.data(),      static_cast<int64_t>(rows.size()), width};
  drive::expect(launch_write_part(FloatFormat::fp32, write, nullptr) == cudaSuccess, "launch", 0, 1, 0);
  for (int64_t i = 0; i < full.size(); ++i) {
    drive::expect(full[i] == want[i], "full", i, full[i], want[i]);
  }
  full.expect_guards("what lies around full");
}

void check() {
  check_planes(3, 5, 16, 0, 0);
  check_planes(3, 5, 16, 1, 0);
  check_planes(2, 4, 12, 0, 2);
  check_planes(2, 4, 10, 0, 2);
  check_planes(4, 3, 49, 0, 0);
  check_planes(1, 3, 260, 0, 4);
  check_planes(2, 3, 1040, 0, 0);
  check_planes(90, 3, 2, 0, 0);
  check_planes(500, 3, 1, 2, 3);
  check_columns(70, 24, 0);
  check_columns(70, 24, 3);
  check_columns(1030, 3, 0);
  check_columns(700, 70, 0);
  check_write();
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
