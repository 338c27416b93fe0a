// The kernel of adaptive clipping against eq. 3 of Brock et al. 2021 in double, on rows of one element to many pieces.
#include "row_norms_cuda.cu"
#include "seeded_driver.h"

namespace {

using namespace pyft;
using drive::Memory;

constexpr double kClipping = 0.6, kEps = 1e-3;
constexpr float kLimit = 0.5f;

struct Shape {
  int64_t rows, length, shift;
};
// Of the last three, rows are summed by one block, and by several.
const Shape kShapes[] = {{40, 7, 1},   {5, 1, 0},    {1, 0, 0},     {9, 260, 0},
                         {3, 1300, 0}, {2, 9003, 2}, {2, 16385, 3}, {1, 40962, 0}};

void check_one(float clip_value) {
  std::vector<std::unique_ptr<Memory<float>>> grads, params;
  std::vector<DeviceFloats> of_grads, of_params;
  std::vector<DeviceRows> shapes;
  std::vector<int64_t> rows, lengths;
  int64_t row_count = 0;
  for (const Shape& shape : kShapes) {
    const int64_t size = shape.rows * shape.length;
    grads.push_back(std::make_unique<Memory<float>>(size, shape.shift));
    params.push_back(std::make_unique<Memory<float>>(size));
    const int kind = static_cast<int>(grads.size());
    for (int64_t i = 0; i < size; ++i) {
      (*grads.back())[i] = drive::number(kind, i) * static_cast<float>(1 + i / shape.length % 4) / 2.0f;
      (*params.back())[i] = drive::number(kind + 20, i);
    }
    of_grads.push_back({grads.back()->data(), static_cast<int64_t>(FloatFormat::fp32)});
    of_params.push_back({params.back()->data(), static_cast<int64_t>(FloatFormat::fp32)});
    shapes.push_back({shape.length, row_count});
    rows.push_back(shape.rows);
    lengths.push_back(shape.length);
    row_count += shape.rows;
  }
  const RowTasks made = cut_into_row_tasks(rows, lengths);
  drive::expect(made.num_pieces == 2 * 3 + 6 && made.num_cut_rows == 3, "pieces", 0,
                static_cast<double>(made.num_pieces), 12);
  Memory<RowTask> tasks(made.tasks);
  Memory<DeviceCutRows> cut(made.cut);
  Memory<RowSums> pieces(made.num_pieces);
  Memory<uint32_t> done(std::vector<uint32_t>(made.num_cut_rows, 0));
  Memory<DeviceRows> device_shapes(shapes);
  Memory<DeviceFloats> device_grads(of_grads), device_params(of_params);
  Memory<double> sums(row_count);
  Memory<float> factors(row_count);
  const RowNormsWork work{
      tasks.data(), tasks.size(), device_shapes.data(), device_grads.data(), device_params.data(), clip_value,
      kClipping,    kEps,         sums.data(),          factors.data(),      cut.data(),           pieces.data(),
      done.data()};
  std::vector<double> bits;
  for (int blocks : {2, 5}) {
    cuda_emulation::settings.blocks_each = blocks;
    std::fill_n(sums.data(), row_count, NAN);
    std::fill_n(factors.data(), row_count, NAN);
    std::fill_n(pieces.data(), pieces.size(), RowSums{NAN, NAN});
    drive::expect(launch_row_norms(work, nullptr) == cudaSuccess, "launch", 0, 1, 0);
    for (size_t t = 0; t < grads.size(); ++t) {
      for (int64_t row = 0; row < rows[t]; ++row) {
        double grad = 0.0, param = 0.0;
        for (int64_t i = row * lengths[t]; i < (row + 1) * lengths[t]; ++i) {
          const double g = std::fmin(std::fmax((*grads[t])[i], -clip_value), clip_value), p = (*params[t])[i];
          grad += g * g;
          param += p * p;
        }
        const double limit = kClipping * std::fmax(std::sqrt(param), kEps);
        const int64_t place = shapes[t].first_row + row;
        drive::expect_near("sums", place, sums[place], grad, 1e-12);
        drive::expect_near("factors", place, factors[place], std::sqrt(grad) > limit ? limit / std::sqrt(grad) : 1.0,
                           1e-7);
      }
    }
    bits.insert(bits.end(), sums.data(), sums.data() + row_count);
    for (int64_t row = 0; row < row_count; ++row) {
      drive::expect(sums[row] == bits[row], "bits of sums with another grid", row, sums[row], bits[row]);
    }
    pieces.expect_guards("what lies around pieces");
    done.expect_guards("what lies around counts");
    sums.expect_guards("what lies around sums");
    factors.expect_guards("what lies around factors");
  }
}

void check() {
  check_one(INFINITY);
  check_one(kLimit);
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
