// The update kernel on tensors of several rules, formats and sizes, and the one that knows them all to be fp32 and
// AdamW, against float64 formulas of AdamW and SGD.
#include "seeded_driver.h"
#include "update_cuda.cu"

namespace pyft {

using Known = FixedLayout<Rule::adamw, WeightFormat::fp32, FloatFormat::fp32, MomentFormat::fp32>;

// In the place of the many that csrc/update_fixed_cuda.cu compiles.
std::optional<cudaError_t> launch_fixed_update(const UpdateWork& work, const UpdateLayout&, cudaStream_t stream) {
  return PYFT_LAUNCH(update_kernel<Known>, UpTo{work.num_chunks}, kUpdateThreads, stream, work);
}

}  // namespace pyft

namespace {

using namespace pyft;
using drive::Memory;

constexpr double kLr = 0.01, kDecay = 0.1, kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-3, kMomentum = 0.8;

// Sizes end within vectors and blocks; the third and the second do not begin at the place of a vector.
struct Shape {
  int64_t size, shift, row_length;
  int32_t group;
  MomentFormat format;
};
const Shape kShapes[] = {{5887, 0, 203, 0, MomentFormat::fp32},
                         {37, 1, 37, 0, MomentFormat::fp32},
                         {1025, 3, 205, 1, MomentFormat::fp32},
                         {700, 0, 100, 0, MomentFormat::int8},
                         {5, 0, 5, 0, MomentFormat::fp32}};
constexpr int kTensors = 5;

struct OneTensor {
  OneTensor(int t, bool alike)
      : shape(alike ? Shape{kShapes[t].size, kShapes[t].shift, kShapes[t].size, 0, MomentFormat::fp32} : kShapes[t]),
        param(shape.size, shape.shift),
        grad(shape.size, shape.shift),
        first(shape.size, shape.shift),
        second(shape.size, shape.shift),
        first_codes(shape.size),
        second_codes(shape.size),
        scales((shape.size + kBlock - 1) / kBlock),
        count(1) {
    count[0] = 0.0f;
    for (int64_t i = 0; i < scales.size(); ++i) {
      scales[i] = 0.0f;
    }
    for (int64_t i = 0; i < shape.size; ++i) {
      param[i] = drive::number(t, i);
      grad[i] = drive::number(t + 10, i);
      first[i] = second[i] = 0.0f;
      first_codes[i] = second_codes[i] = 0;
    }
    wanted.assign(param.data(), param.data() + shape.size);
    m.assign(shape.size, 0.0);
    v.assign(shape.size, 0.0);
  }

  DeviceTensor record(int64_t first_row) {
    DeviceTensor t{};
    const bool codes = shape.format == MomentFormat::int8;
    t.param = param.data();
    t.moments[0] = codes ? static_cast<void*>(first_codes.data()) : first.data();
    t.moments[1] = codes ? static_cast<void*>(second_codes.data()) : second.data();
    t.scales[0] = scales.data();
    t.scales[1] = more_scales.data();
    t.count = count.data();
    t.row_length = shape.row_length;
    t.first_row = first_row;
    t.group = shape.group;
    t.weights = WeightFormat::fp32;
    for (MomentFormat& format : t.formats) {
      format = shape.format;
    }
    return t;
  }

  // AdamW, Loshchilov and Hutter 2019, algorithm 2; or the SGD of torch, uphill.
  void step(int number, double scale, const float* row_factors) {
    for (int64_t i = 0; i < shape.size; ++i) {
      double& p = wanted[i];
      const double g = grad[i] * scale * row_factors[i / shape.row_length];
      if (shape.group == 1) {
        m[i] = number == 1 ? -g : kMomentum * m[i] - 0.5 * g;
        p -= kLr * m[i];
        continue;
      }
      m[i] = kBeta1 * m[i] + (1.0 - kBeta1) * g;
      v[i] = kBeta2 * v[i] + (1.0 - kBeta2) * g * g;
      const double unbiased = m[i] / (1.0 - std::pow(kBeta1, number));
      const double size = std::sqrt(v[i] / (1.0 - std::pow(kBeta2, number)));
      p = p * (1.0 - kLr * kDecay) - kLr * unbiased / (size + kEps);
    }
  }

  void check(int number) {
    for (int64_t i = 0; i < shape.size; ++i) {
      // Codes of 8 bits hold the moments of later steps less well.
      const double tolerance = shape.format == MomentFormat::int8 && number > 1 ? 4e-3 : 1e-6;
      drive::expect_near("param", i, param[i], wanted[i], tolerance);
    }
    drive::expect(count[0] == number, "count", 0, count[0], number);
    for (const Memory<float>* memory : {&param, &grad, &first, &second, &scales, &more_scales, &count}) {
      memory->expect_guards("what lies around a tensor");
    }
    first_codes.expect_guards("what lies around codes");
    second_codes.expect_guards("what lies around codes");
  }

  Shape shape;
  Memory<float> param, grad, first, second;
  Memory<uint8_t> first_codes, second_codes;
  Memory<float> scales, more_scales{std::vector<float>(shape.size / kBlock + 1, 0.0f)}, count;
  std::vector<double> wanted, m, v;
};

DeviceGroup group(Rule rule, std::initializer_list<double> numbers, bool maximize) {
  DeviceGroup made{};
  made.hyper.rule = rule;
  std::copy(numbers.begin(), numbers.end(), made.hyper.numbers);
  const RuleInfo& info = kRuleInfo[static_cast<int>(rule)];
  for (int k = 0; k < kMoments; ++k) {
    made.has |= info.has[k] << k;
    made.is_signed |= info.is_signed[k] << k;
  }
  made.decoupled = info.decoupled_decay;
  made.maximize = maximize;
  return made;
}

// alike: all of one layout, and no factors of rows.
void check_update(bool alike) {
  std::vector<std::unique_ptr<OneTensor>> tensors;
  std::vector<DeviceTensor> records;
  std::vector<DeviceFloats> grads;
  std::vector<int64_t> sizes, first_rows;
  std::vector<float> row_factors, scales;
  for (int t = 0; t < kTensors; ++t) {
    tensors.push_back(std::make_unique<OneTensor>(t, alike));
    OneTensor& one = *tensors.back();
    first_rows.push_back(static_cast<int64_t>(row_factors.size()));
    records.push_back(one.record(first_rows.back()));
    grads.push_back({one.grad.data(), static_cast<int64_t>(FloatFormat::fp32)});
    sizes.push_back(one.shape.size);
    scales.push_back(1.0f / static_cast<float>(1 << t));
    for (int64_t row = 0; row < one.shape.size / one.shape.row_length; ++row) {
      row_factors.push_back(alike || row % 3 == 0 ? 1.0f : 0.25f * static_cast<float>(1 + row % 5));
    }
  }
  Memory<DeviceChunk> chunks(cut_for_device(sizes).chunks);
  Memory<DeviceTensor> device_records(records);
  Memory<DeviceFloats> device_grads(grads);
  Memory<float> device_scales(scales), device_factors(row_factors);
  Memory<DeviceGroup> groups(
      std::vector<DeviceGroup>{group(Rule::adamw, {kLr, kBeta1, kBeta2, kEps, kDecay, 0.0}, false),
                               group(Rule::sgd_momentum, {kLr, kMomentum, 0.5, 0.0, 1.0}, true)});
  Memory<uint8_t> fresh(std::vector<uint8_t>(kTensors, 1));
  Memory<StepDecision> decision(std::vector<StepDecision>(1));
  const UpdateWork work{chunks.data(),
                        chunks.size(),
                        device_records.data(),
                        device_grads.data(),
                        kTensors,
                        groups.data(),
                        fresh.data(),
                        decision.data(),
                        &decision[0].coef,
                        device_scales.data(),
                        alike ? nullptr : device_factors.data(),
                        INFINITY,
                        true,
                        7};
  const auto layout = alike ? std::optional(Known::kLayout) : std::nullopt;
  for (int number = 1; number <= 3; ++number) {
    // The third is refused: nothing may change.
    decision[0].skip = number == 3;
    const int taken = number < 3 ? number : 2;
    drive::expect(launch_update(work, layout, nullptr) == cudaSuccess, "launch", number, 1, 0);
    for (int t = 0; t < kTensors; ++t) {
      if (number < 3) {
        tensors[t]->step(number, scales[t], row_factors.data() + first_rows[t]);
      }
      tensors[t]->check(taken);
      drive::expect(fresh[t] == 0, "fresh", t, fresh[t], 0);
    }
    drive::expect(decision[0].applied == taken, "applied", 0, static_cast<double>(decision[0].applied), taken);
    drive::expect(decision[0].done == 0, "done", 0, decision[0].done, 0);
  }
}

void check() {
  check_update(false);
  check_update(true);
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
