// The decision kernel against the formulas of clipping in long double: by tensor, by group, by rows, all together, and
// with gradients that are not finite.
#include "seeded_driver.h"
#include "step_decision_cuda.cu"

namespace {

using namespace pyft;
using drive::Memory;

// Parts of a tensor: kFewChunks are added by a thread, more by a warp, more than kManyChunks by all: behind those sums
// is a barrier that hides what is missing elsewhere.
using Begin = std::vector<int64_t>;
const Begin kPlain{0, 1, 97, 194, 260, 263}, kWithMany{0, 1, 97, 194, 2294, 2297};
const std::vector<int32_t> kGroups{0, 1, 0, 1, 0};
const std::vector<int64_t> kNumbers{14, 13, 12, 11, 10};
constexpr int kTensors = 5, kGroupCount = 2;

struct Limits {
  double tensor, group, global;
  bool by_rows, refuses;
  double third, fifth;  // added to a term of the third, and of the fifth tensor
};

double factor(double sum, double limit) {
  const double norm = std::sqrt(sum);
  return std::isfinite(norm) ? std::fmin(1.0, limit / (norm + 1e-6)) : 1.0;
}

void check_parts(const Limits& limits, const Begin& begin) {
  std::vector<double> terms(begin.back());
  std::vector<float> factors(begin.back());
  for (int64_t i = 0; i < begin.back(); ++i) {
    terms[i] = 1.0 + drive::number(1, i);
    factors[i] = 0.5f + 0.25f * drive::number(2, i);
  }
  terms[begin[3] + 6] += limits.third;
  terms[begin[4] + 1] += limits.fifth;
  Memory<double> device_terms(terms), sums(2 * kTensors), group_factors(kGroupCount), parts(part_size(kGroupCount));
  Memory<float> device_factors(factors), scales(kTensors);
  Memory<int64_t> device_begin(begin), numbers(kNumbers);
  Memory<int32_t> groups(kGroups);
  Memory<StepDecision> decision(std::vector<StepDecision>(1));
  decision[0].skipped = 4;
  const bool one_factor = !limits.by_rows && std::isinf(limits.tensor) && std::isinf(limits.group);
  const DecisionWork work{device_terms.data(),
                          device_begin.data(),
                          kTensors,
                          limits.by_rows ? device_factors.data() : nullptr,
                          groups.data(),
                          numbers.data(),
                          kGroupCount,
                          limits.tensor,
                          limits.group,
                          limits.global,
                          limits.refuses,
                          sums.data(),
                          group_factors.data(),
                          parts.data(),
                          1,
                          0,
                          one_factor ? nullptr : scales.data(),
                          decision.data()};
  drive::expect(launch_decision(work, DecisionStage::both, nullptr) == cudaSuccess, "launch", 0, 1, 0);

  double total = 0.0, left = 0.0, of_group[kGroupCount] = {}, of_tensor[kTensors], smallest_row[kTensors];
  int64_t bad = -1;
  for (int t = 0; t < kTensors; ++t) {
    double sum = 0.0, clipped = 0.0;
    smallest_row[t] = 1.0;
    for (int64_t i = begin[t]; i < begin[t + 1]; ++i) {
      sum += terms[i];
      clipped += terms[i] * factors[i] * factors[i];
      smallest_row[t] = std::fmin(smallest_row[t], factors[i]);
    }
    of_tensor[t] = limits.by_rows ? 1.0 : factor(sum, limits.tensor);
    smallest_row[t] = limits.by_rows ? smallest_row[t] : of_tensor[t];
    clipped = limits.by_rows ? clipped : sum * of_tensor[t] * of_tensor[t];
    total += sum;
    left += clipped;
    of_group[kGroups[t]] += clipped;
    bad = !std::isfinite(sum) && (bad < 0 || kNumbers[t] < bad) ? kNumbers[t] : bad;
  }
  const bool refused = limits.refuses && bad >= 0;
  double smallest = 1.0;
  for (int t = 0; t < kTensors; ++t) {
    const double last =
        std::isinf(limits.group) ? factor(left, limits.global) : factor(of_group[kGroups[t]], limits.group);
    smallest = std::fmin(smallest, smallest_row[t] * last);
    if (!one_factor) {
      drive::expect_near("scales", t, scales[t], of_tensor[t] * last, 1e-6);
    } else {
      drive::expect_near("coef", 0, decision[0].coef, last, 1e-6);
    }
  }
  drive::expect_near("total_norm", 0, decision[0].total_norm, std::sqrt(total), 1e-12);
  drive::expect_near("smallest", 0, decision[0].smallest, refused ? 1.0 : smallest, 1e-6);
  drive::expect(decision[0].bad == bad, "bad", 0, static_cast<double>(decision[0].bad), static_cast<double>(bad));
  drive::expect(decision[0].skip == refused, "skip", 0, static_cast<double>(decision[0].skip), refused);
  drive::expect(decision[0].skipped == 4 + refused, "skipped", 0, static_cast<double>(decision[0].skipped),
                4 + refused);
  for (const Memory<double>* memory : {&sums, &group_factors, &parts}) {
    memory->expect_guards("what lies around sums");
  }
  scales.expect_guards("what lies around scales");
}

void check_one(const Limits& limits) {
  check_parts(limits, kPlain);
  check_parts(limits, kWithMany);
}

void check() {
  check_one({INFINITY, INFINITY, 2.0, false, true, 0.0, 0.0});
  check_one({3.0, 4.0, INFINITY, false, true, 0.0, 0.0});
  check_one({INFINITY, INFINITY, 2.0, true, false, 0.0, 0.0});
  check_one({INFINITY, INFINITY, 2.0, false, true, NAN, INFINITY});
  check_one({3.0, INFINITY, INFINITY, false, true, INFINITY, 0.0});
}

}  // namespace

int main(int count, char** words) { return drive::run(count, words, check); }
