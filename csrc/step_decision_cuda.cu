#include "block_sums_cuda.h"
#include "clip_grads_math.h"
#include "step_decision_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// x - x is 0 for finite numbers only.
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// A norm that is not finite scales nothing.
__device__ __forceinline__ double factor_of(double sum_of_squares, double limit) {
  return is_finite(sum_of_squares) ? clip_coefficient(sqrt(sum_of_squares), limit) : 1.0;
}

// The sum of squares of each tensor.
template <class Shared>
__device__ __forceinline__ void sum_tensors(const DecisionWork& work, Shared scratch) {
  const auto term = [&work](int64_t i) { return load(work.terms + i); };
  sum_of_each(term, work.begin, work.num_tensors, work.sums, scratch);
  __syncthreads();
}

// Whether neither parts of tensors nor tensors are clipped, so that the sums are what is left of them.
__device__ __forceinline__ bool leaves_tensors(const DecisionWork& work) {
  return work.factors == nullptr && !(work.tensor_limit < INFINITY);
}

// Behind these sums, what is left after the parts of each tensor and the tensor itself were clipped.
template <class Shared>
__device__ __forceinline__ void clip_tensors(const DecisionWork& work, Shared scratch) {
  double *sums = work.sums, *clipped = work.sums + work.num_tensors;
  if (work.factors != nullptr) {
    const auto clipped_term = [&work](int64_t i) {
      const double factor = load(work.factors + i);
      return load(work.terms + i) * factor * factor;
    };
    sum_of_each(clipped_term, work.begin, work.num_tensors, clipped, scratch);
  } else {
    for (int64_t t = threadIdx.x; t < work.num_tensors; t += kThreads) {
      const double sum = load(sums + t), factor = factor_of(sum, work.tensor_limit);
      store(clipped + t, sum * factor * factor);
    }
  }
  __syncthreads();
}

template <class Shared>
__device__ __forceinline__ void store_sum(const double* terms, int64_t count, Shared scratch, double* to) {
  WideDouble sum = {0.0, 0.0};
  for (int64_t t = threadIdx.x; t < count; t += kThreads) {
    sum = add_wide(sum, {load(terms + t), 0.0});
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    store(to, sum.high);
    store(to + 1, sum.low);
  }
  __syncthreads();
}

// Each warp takes a group at a time.
__device__ __forceinline__ void store_group_sums(const DecisionWork& work, double* part) {
  const double* clipped = leaves_tensors(work) ? work.sums : work.sums + work.num_tensors;
  const int lane = threadIdx.x % kWarp;
  for (int64_t group = threadIdx.x / kWarp; group < work.num_groups; group += kWarps) {
    WideDouble sum = {0.0, 0.0};
    for (int64_t t = lane; t < work.num_tensors; t += kWarp) {
      if (load(work.groups + t) == group) {
        sum = add_wide(sum, {load(clipped + t), 0.0});
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      store(part + kPartNumbers + 2 * group, sum.high);
      store(part + kPartNumbers + 2 * group + 1, sum.low);
    }
  }
}

template <class Shared>
__device__ __forceinline__ double block_min(double x, Shared scratch) {
  x = warp_min(x);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  for (int i = 0; threadIdx.x == 0 && i < kWarps; ++i) {
    x = scratch[i] < x ? static_cast<double>(scratch[i]) : x;
  }
  return x;
}

template <class Shared>
__device__ __forceinline__ void fill_part(const DecisionWork& work, Shared scratch) {
  double* part = work.parts + work.device * part_size(work.num_groups);
  store_sum(work.sums, work.num_tensors, scratch, part);
  if (leaves_tensors(work)) {
    if (threadIdx.x < 2) {
      store(part + 2 + threadIdx.x, load(part + threadIdx.x));
    }
  } else {
    clip_tensors(work, scratch);
    store_sum(work.sums + work.num_tensors, work.num_tensors, scratch, part + 2);
  }
  double bad = INFINITY;
  for (int64_t t = threadIdx.x; t < work.num_tensors; t += kThreads) {
    const double number = static_cast<double>(load(work.numbers + t));
    bad = !is_finite(load(work.sums + t)) && number < bad ? number : bad;
  }
  bad = block_min(bad, scratch);
  if (threadIdx.x == 0) {
    store(part + 4, bad);
  }
  if (work.group_limit < INFINITY) {
    store_group_sums(work, part);
  }
  __syncthreads();
}

// Over the devices, in their order, so that all of them come to the same.
__device__ __forceinline__ double sum_of_parts(const DecisionWork& work, int64_t place) {
  WideDouble sum = {0.0, 0.0};
  for (int64_t d = 0; d < work.devices; ++d) {
    const double* part = work.parts + d * part_size(work.num_groups) + place;
    sum = add_wide(sum, {load(part), load(part + 1)});
  }
  return sum.rounded();
}

__device__ __forceinline__ double first_bad(const DecisionWork& work) {
  double bad = INFINITY;
  for (int64_t d = 0; d < work.devices; ++d) {
    const double other = load(work.parts + d * part_size(work.num_groups) + 4);
    bad = other < bad ? other : bad;
  }
  return bad;
}

// The factor of each tensor, and the smallest that this thread has seen.
__device__ __forceinline__ double fill_scales(const DecisionWork& work) {
  const bool by_group = work.group_limit < INFINITY;
  if (by_group) {
    for (int64_t group = threadIdx.x; group < work.num_groups; group += kThreads) {
      store(work.group_factors + group, factor_of(sum_of_parts(work, kPartNumbers + 2 * group), work.group_limit));
    }
    __syncthreads();
  }
  const double of_all = by_group ? 1.0 : factor_of(sum_of_parts(work, 2), work.global_limit);
  double smallest = 1.0;
  for (int64_t t = threadIdx.x; t < work.num_tensors; t += kThreads) {
    const double last = by_group ? load(work.group_factors + load(work.groups + t)) : of_all;
    const double factor = work.factors == nullptr ? factor_of(load(work.sums + t), work.tensor_limit) * last : last;
    store(work.scales + t, static_cast<float>(factor));
    smallest = factor < smallest ? factor : smallest;
  }
  // Tensors may have many rows: a warp for each.
  for (int64_t t = threadIdx.x / kWarp; work.factors != nullptr && t < work.num_tensors; t += kWarps) {
    const double last = by_group ? load(work.group_factors + load(work.groups + t)) : of_all;
    const int64_t end = load(work.begin + t + 1);
    for (int64_t i = load(work.begin + t) + threadIdx.x % kWarp; i < end; i += kWarp) {
      const double factor = load(work.factors + i) * last;
      smallest = factor < smallest ? factor : smallest;
    }
  }
  return smallest;
}

template <class Shared>
__device__ __forceinline__ void decide(const DecisionWork& work, Shared scratch) {
  double smallest = 1.0;
  if (work.scales != nullptr) {
    smallest = block_min(fill_scales(work), scratch);
  }
  if (threadIdx.x != 0) {
    return;
  }
  StepDecision* decision = work.decision;
  const double sum = sum_of_parts(work, 0), bad = first_bad(work);
  const bool refused = work.refuses && bad < INFINITY;
  if (work.scales == nullptr) {
    const double coef = factor_of(sum, work.global_limit);
    store(&decision->coef, static_cast<float>(coef));
    smallest = coef;
  }
  store(&decision->total_norm, sqrt(sum));
  store(&decision->smallest, refused ? 1.0 : smallest);
  store(&decision->bad, bad < INFINITY ? static_cast<int64_t>(bad) : int64_t{-1});
  store(&decision->skip, static_cast<int64_t>(refused));
  if (refused) {
    store(&decision->skipped, load(&decision->skipped) + 1);
  }
}

__global__ void __launch_bounds__(kThreads, 1) decision_kernel(DecisionWork work, DecisionStage stage) {
  PYFT_SHARED(double, scratch, 2 * kWarps);
  if (stage != DecisionStage::rest && stage != DecisionStage::after_sums) {
    sum_tensors(work, scratch);
  }
  if (stage != DecisionStage::rest && stage != DecisionStage::sums) {
    fill_part(work, scratch);
  }
  if (stage != DecisionStage::part && stage != DecisionStage::sums) {
    decide(work, scratch);
  }
}

}  // namespace

cudaError_t launch_decision(const DecisionWork& work, DecisionStage stage, cudaStream_t stream) {
  return PYFT_LAUNCH(decision_kernel, 1, kThreads, stream, work, stage);
}

}  // namespace pyft
