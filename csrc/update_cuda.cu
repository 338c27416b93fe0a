#include <cstddef>

#include "block_sums_cuda.h"
#include "clip_grads_math.h"
#include "four_elements_cuda.h"
#include "row_norms_cuda.h"
#include "update_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// A warp updates kBlock elements at a time: each lane four of each half, so that every access of the warp is
// contiguous.
constexpr int kHalves = 2;
static_assert(kBlock == kHalves * kFour * kWarp);

constexpr int kRecordWords = sizeof(DeviceTensor) / sizeof(uint64_t);
static_assert(kRecordWords * sizeof(uint64_t) == sizeof(DeviceTensor));

// A DeviceTensor in shared memory, read where it is used: in registers it would halve the number of warps.
template <class Words>
struct SharedTensor {
  Words words;

  template <class T>
  __device__ __forceinline__ T* pointer(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(static_cast<uint64_t>(words[offset / 8])));
  }
  template <class T>
  __device__ __forceinline__ T number(size_t offset) const {
    const uint64_t word = words[offset / 8];
    return static_cast<T>(static_cast<int64_t>(word << (64 - 8 * (offset % 8 + sizeof(T)))) >> (64 - 8 * sizeof(T)));
  }

  __device__ __forceinline__ void* param() const { return pointer<void>(offsetof(DeviceTensor, param)); }
  __device__ __forceinline__ void* extra() const { return pointer<void>(offsetof(DeviceTensor, extra)); }
  __device__ __forceinline__ void* init() const { return pointer<void>(offsetof(DeviceTensor, init)); }
  __device__ __forceinline__ void* moment(int k) const {
    return pointer<void>(offsetof(DeviceTensor, moments) + 8 * k);
  }
  __device__ __forceinline__ float* scales(int k) const {
    return pointer<float>(offsetof(DeviceTensor, scales) + 8 * k);
  }
  __device__ __forceinline__ float* count() const { return pointer<float>(offsetof(DeviceTensor, count)); }
  __device__ __forceinline__ uint64_t key_number() const { return words[offsetof(DeviceTensor, number) / 8]; }
  __device__ __forceinline__ int64_t row_length() const { return number<int64_t>(offsetof(DeviceTensor, row_length)); }
  __device__ __forceinline__ int64_t first_row() const { return number<int64_t>(offsetof(DeviceTensor, first_row)); }
  __device__ __forceinline__ int32_t group() const { return number<int32_t>(offsetof(DeviceTensor, group)); }
  __device__ __forceinline__ WeightFormat weights() const {
    return static_cast<WeightFormat>(number<int8_t>(offsetof(DeviceTensor, weights)));
  }
  __device__ __forceinline__ FloatFormat init_format() const {
    return static_cast<FloatFormat>(number<int8_t>(offsetof(DeviceTensor, init_format)));
  }
  __device__ __forceinline__ MomentFormat format(int k) const {
    return static_cast<MomentFormat>(number<int8_t>(offsetof(DeviceTensor, formats) + k));
  }
};

constexpr int kStepFloats = sizeof(RuleStep) / sizeof(float);
struct StepFloats {
  float at[kStepFloats];
};
static_assert(sizeof(StepFloats) == sizeof(RuleStep));

// What all elements of a tensor have in common in this step.
struct Constants {
  RuleStep step;
  Rule rule;
  uint32_t moments, signs;
  bool decoupled;
  uint32_t key;
  float grad_scale, init_pull, clip_value;
  const float* row_factors;
};

// Places of shared memory.
constexpr int kStepAt = 0, kScaleAt = kStepFloats, kPullAt = kScaleAt + 1, kSharedFloats = kPullAt + 1;
constexpr int kRuleAt = 0, kMomentsAt = 1, kSignsAt = 2, kDecoupledAt = 3, kKeyAt = 4, kSharedNumbers = 5;

__device__ __forceinline__ RuleHyper hyper_of(const DeviceGroup* group) {
  RuleHyper hyper;
  hyper.rule = load(&group->hyper.rule);
#pragma unroll
  for (int i = 0; i < kHyperNumbers; ++i) {
    hyper.numbers[i] = load(&group->hyper.numbers[i]);
  }
  hyper.decay_to_init = load(&group->hyper.decay_to_init);
  const float* lr = load(&group->lr);
  if (lr != nullptr) {
    hyper.numbers[0] = load(lr);
  }
  return hyper;
}

// What the constants of a rule were computed for: tensors of a group mostly share them.
struct KnownStep {
  int32_t group = -1;
  double count = -1.0;
  bool first = false;
};

// By one thread of the block.
template <class Words, class Floats, class Numbers>
__device__ __forceinline__ void fill_constants(const UpdateWork& work, const SharedTensor<Words>& t, int32_t tensor,
                                               KnownStep& known, Floats floats, Numbers numbers) {
  const float* counter = t.count();
  const double count = counter == nullptr ? 1.0 : load(counter) + (work.advance ? 1.0 : 0.0);
  const int32_t number_of_group = t.group();
  const bool first = load(work.fresh + tensor) != 0;
  const DeviceGroup* group = work.groups + number_of_group;
  if (number_of_group != known.group || count != known.count || first != known.first) {
    known = {number_of_group, count, first};
    const RuleHyper hyper = hyper_of(group);
    const StepFloats step = __builtin_bit_cast(StepFloats, step_constants(hyper, count, first, WholePower{}));
#pragma unroll
    for (int i = 0; i < kStepFloats; ++i) {
      floats[kStepAt + i] = step.at[i];
    }
    const bool decoupled = load(&group->decoupled) != 0;
    floats[kPullAt] = init_pull(decoupled, hyper.lr(), hyper.decay_to_init);
    numbers[kRuleAt] = static_cast<uint32_t>(hyper.rule);
    numbers[kMomentsAt] = static_cast<uint32_t>(load(&group->has));
    numbers[kSignsAt] = static_cast<uint32_t>(load(&group->is_signed));
    numbers[kDecoupledAt] = decoupled;
  }
  const float scale = work.scales == nullptr ? load(work.coef) : load(work.scales + tensor);
  floats[kScaleAt] = load(&group->maximize) != 0 ? -scale : scale;
  numbers[kKeyAt] = random_key(work.seed, t.key_number(), static_cast<uint64_t>(count));
}

template <class Words, class Floats, class Numbers>
__device__ __forceinline__ Constants read_constants(const UpdateWork& work, const SharedTensor<Words>& t, Floats floats,
                                                    Numbers numbers) {
  StepFloats step;
#pragma unroll
  for (int i = 0; i < kStepFloats; ++i) {
    step.at[i] = floats[kStepAt + i];
  }
  return {__builtin_bit_cast(RuleStep, step),
          static_cast<Rule>(static_cast<int8_t>(numbers[kRuleAt])),
          numbers[kMomentsAt],
          numbers[kSignsAt],
          numbers[kDecoupledAt] != 0,
          numbers[kKeyAt],
          floats[kScaleAt],
          t.init() == nullptr ? 0.0f : static_cast<float>(floats[kPullAt]),
          work.clip_value,
          work.row_factors == nullptr ? nullptr : work.row_factors + t.first_row()};
}

// Four elements of a tensor, from `at` on; fewer where it ends.
struct Place {
  int64_t at;
  int count;
};

__device__ __forceinline__ void widen(const Four& raw, FloatFormat format, float (&values)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    values[i] = fp32_at(raw, format, i);
  }
}

__device__ __forceinline__ FloatFormat float_format_of(WeightFormat weights) {
  return weights == WeightFormat::fp32   ? FloatFormat::fp32
         : weights == WeightFormat::fp16 ? FloatFormat::fp16
                                         : FloatFormat::bf16;
}

__device__ __forceinline__ bool has_extra(WeightFormat weights) {
  return weights == WeightFormat::bf16_split32 || weights == WeightFormat::bf16_kahan;
}

__device__ __forceinline__ void read_weights(WeightFormat weights, const Four& raw, const Four& extra,
                                             float (&p)[kFour]) {
  widen(raw, float_format_of(weights), p);
  if (!has_extra(weights)) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint16_t high = static_cast<uint16_t>(bits_at(raw, 2, i)), more = static_cast<uint16_t>(bits_at(extra, 2, i));
    p[i] = weights == WeightFormat::bf16_split32 ? join(Bf16{high}, static_cast<int16_t>(more))
                                                 : p[i] + to_fp32(Bf16{more});
  }
}

template <class Tensor>
__device__ __forceinline__ void write_weights(const Tensor& t, const Place& place, uint32_t key,
                                              const float (&p)[kFour]) {
  const WeightFormat weights = t.weights();
  const int bytes = bytes_of(weights);
  Four raw = {}, extra = {};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    uint32_t bits = 0, more = 0;
    if (weights == WeightFormat::fp32) {
      bits = bits_of(p[i]);
    } else if (weights == WeightFormat::fp16) {
      bits = to_fp16(p[i]).bits;
    } else if (weights == WeightFormat::bf16_stochastic) {
      const uint32_t random = random_bits(key_of_place(~key, place.at), static_cast<uint32_t>(place.at) + i);
      bits = to_bf16_stochastic(p[i], random >> 16).bits;
    } else if (weights == WeightFormat::bf16_split32) {
      bits = split_high(p[i]);
      more = static_cast<uint16_t>(split_low(p[i], static_cast<uint16_t>(bits)));
    } else {
      bits = to_bf16(p[i]).bits;
      more = to_bf16(p[i] - to_fp32(Bf16{static_cast<uint16_t>(bits)})).bits;
    }
    put_bits(raw, bytes, i, bits);
    put_bits(extra, 2, i, more);
  }
  store_four(t.param(), bytes, place.at, place.count, raw);
  if (has_extra(weights)) {
    store_four(t.extra(), 2, place.at, place.count, extra);
  }
}

__device__ __forceinline__ void read_moment(MomentFormat format, bool is_signed, const Four& raw, float scale,
                                            float (&m)[kFour]) {
  if (format != MomentFormat::int8) {
    widen(raw, format == MomentFormat::fp32 ? FloatFormat::fp32 : FloatFormat::bf16, m);
    return;
  }
  const uint32_t lowest = is_signed ? lowest_signed(scale) : lowest_unsigned(scale);
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint8_t code = static_cast<uint8_t>(bits_at(raw, 1, i));
    m[i] = is_signed ? decode_signed(static_cast<int8_t>(code), lowest) : decode_unsigned(code, lowest);
  }
}

// `random`: of the tensor, the step, the moment and the block; `lowest`: of the codes, where there are some.
__device__ __forceinline__ void write_moment(void* data, MomentFormat format, bool is_signed, const Place& place,
                                             uint32_t random, uint32_t lowest, const float (&m)[kFour]) {
  const int bytes = bytes_of(format);
  random += static_cast<uint32_t>(place.at) % kBlock * kGolden;
  Four raw = {};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    uint32_t bits = bits_of(m[i]);
    if (format == MomentFormat::bf16) {
      bits = to_bf16_stochastic(m[i], random >> 16).bits;
    } else if (format == MomentFormat::int8) {
      // Only this NaN has a code.
      const float value = is_nan_bits(bits) ? float_of(0x7fc00000u) : m[i];
      bits = is_signed ? static_cast<uint8_t>(encode_signed(value, lowest, random))
                       : encode_unsigned(value, lowest, random);
    }
    random += kGolden;
    put_bits(raw, bytes, i, bits);
  }
  store_four(data, bytes, place.at, place.count, raw);
}

// The gradient as the rule takes it but for its scale: clamped, and its rows clipped.
__device__ __forceinline__ void shape_gradient(const Constants& c, int64_t row_length, const Place& place,
                                               float (&g)[kFour]) {
  if (c.clip_value < INFINITY) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      g[i] = ClampTo{c.clip_value}(g[i]);
    }
  }
  if (c.row_factors != nullptr) {
    float factors[kFour];
    factors_of_rows(c.row_factors, row_length, place.at, place.count, factors);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      g[i] *= factors[i];
    }
  }
}

template <Rule kRule>
__device__ __forceinline__ void apply_rule(float (&p)[kFour], const float (&g)[kFour], float (&m)[kMoments][kFour],
                                           const RuleStep& step) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    update_element<kRule>(p[i], g[i], m[0][i], m[1][i], m[2][i], step);
  }
}

__device__ __forceinline__ void apply_rule(const Constants& c, float (&p)[kFour], const float (&g)[kFour],
                                           float (&m)[kMoments][kFour]) {
#define PYFT_RULE(name) \
  case Rule::name:      \
    return apply_rule<Rule::name>(p, g, m, c.step);
  switch (c.rule) {
    PYFT_RULE(adamw)
    PYFT_RULE(adamw_amsgrad)
    PYFT_RULE(adam)
    PYFT_RULE(adam_amsgrad)
    PYFT_RULE(sgd)
    PYFT_RULE(sgd_momentum)
    PYFT_RULE(sgd_nesterov)
    PYFT_RULE(rmsprop)
    PYFT_RULE(rmsprop_centered)
    PYFT_RULE(rmsprop_momentum)
    PYFT_RULE(rmsprop_centered_momentum)
    PYFT_RULE(adagrad)
    PYFT_RULE(lion)
  }
#undef PYFT_RULE
}

// One step of four elements; their moments, in fp32, are left in m. Formats and rule are the same for a whole chunk, so
// that asking for them costs a few instructions beside the wait for memory, and one kernel serves them all.
template <class Tensor>
__device__ __forceinline__ void update_four(const Tensor& t, const DeviceFloats& grad, const Constants& c,
                                            const float (&scales)[kMoments], const Place& place,
                                            float (&m)[kMoments][kFour]) {
  // All loads come before what is done with any of them.
  const bool pulled = c.init_pull != 0.0f;
  const WeightFormat weights = t.weights();
  const Four p_raw = load_four(t.param(), bytes_of(weights), place.at, place.count);
  const Four g_raw = load_four(grad.data, bytes_of(grad.float_format()), place.at, place.count);
  Four m_raw[kMoments] = {}, extra = {}, init = {};
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if ((c.moments >> k & 1) != 0) {
      m_raw[k] = load_four(t.moment(k), bytes_of(t.format(k)), place.at, place.count);
    }
  }
  if (has_extra(weights)) {
    extra = load_four(t.extra(), 2, place.at, place.count);
  }
  if (pulled) {
    init = load_four(t.init(), bytes_of(t.init_format()), place.at, place.count);
  }
  float p[kFour], g[kFour], pull[kFour] = {};
  read_weights(weights, p_raw, extra, p);
  widen(g_raw, grad.float_format(), g);
  shape_gradient(c, t.row_length(), place, g);
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    read_moment((c.moments >> k & 1) != 0 ? t.format(k) : MomentFormat::fp32, (c.signs >> k & 1) != 0, m_raw[k],
                scales[k], m[k]);
  }
  if (pulled) {
    widen(init, t.init_format(), pull);
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    pull[i] = c.init_pull * (p[i] - pull[i]);
    g[i] = g[i] * c.grad_scale;
    if (pulled && !c.decoupled) {
      g[i] = g[i] + pull[i];
    }
  }
  apply_rule(c, p, g, m);
  if (pulled && c.decoupled) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      p[i] = p[i] - pull[i];
    }
  }
  write_weights(t, place, c.key, p);
}

// Bits of the largest size of a moment in the block, in all lanes: as integers, they are in the order of the sizes.
__device__ __forceinline__ uint32_t largest_size(const Place (&places)[kHalves], const float (&first)[kFour],
                                                 const float (&second)[kFour]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const uint32_t a = i < places[0].count ? bits_of(first[i]) & 0x7fffffffu : 0u;
    const uint32_t b = i < places[1].count ? bits_of(second[i]) & 0x7fffffffu : 0u;
    largest = a > largest ? a : largest;
    largest = b > largest ? b : largest;
  }
  return warp_max(largest);
}

// The kBlock elements from `begin` on, or those below `end`. All lanes of a warp come here together.
template <class Tensor>
__device__ __forceinline__ void update_block(const Tensor& t, const DeviceFloats& grad, const Constants& c,
                                             int64_t begin, int64_t end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Place places[kHalves];
  float scales[kMoments] = {}, m[kHalves][kMoments][kFour];
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if ((c.moments >> k & 1) != 0 && t.format(k) == MomentFormat::int8) {
      // By the lane that will write it.
      const float scale = lane == 0 ? load(in_global(t.scales(k) + begin / kBlock)) : 0.0f;
      scales[k] = __shfl_sync(kAllLanes, scale, 0);
    }
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    places[h].at = begin + (h * kWarp + lane) * kFour;
    const int64_t left = end - places[h].at;
    places[h].count = left < 0 ? 0 : left < kFour ? static_cast<int>(left) : kFour;
    update_four(t, grad, c, scales, places[h], m[h]);
  }
#pragma unroll
  for (int k = 0; k < kMoments; ++k) {
    if ((c.moments >> k & 1) == 0) {
      continue;
    }
    const MomentFormat format = t.format(k);
    const bool is_signed = (c.signs >> k & 1) != 0;
    const uint32_t random = random_bits(c.key + static_cast<uint32_t>(k), static_cast<uint32_t>(begin / kBlock));
    uint32_t lowest = 0;
    if (format == MomentFormat::int8) {
      const float scale = block_scale(largest_size(places, m[0][k], m[1][k]));
      lowest = is_signed ? lowest_signed(scale) : lowest_unsigned(scale);
      if (lane == 0) {
        store(in_global(t.scales(k) + begin / kBlock), scale);
      }
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      write_moment(t.moment(k), format, is_signed, places[h], random, lowest, m[h][k]);
    }
  }
}

// The block that is done last moves the counters on, when nobody reads them any more.
template <class Numbers>
__device__ __forceinline__ void finish_step(const UpdateWork& work, Numbers numbers) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    numbers[0] = atomicAdd(&work.decision->done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (numbers[0] == 0) {
    return;
  }
  for (int64_t i = threadIdx.x; i < work.num_tensors; i += kThreads) {
    float* count = load(&work.tensors[i].count);
    if (count != nullptr && work.advance) {
      store(count, load(count) + 1.0f);
    }
    store(work.fresh + i, static_cast<uint8_t>(0));
  }
  if (threadIdx.x == 0) {
    store(&work.decision->applied, load(&work.decision->applied) + 1);
    store(&work.decision->done, 0u);
  }
}

__global__ void __launch_bounds__(kThreads, 2) update_kernel(UpdateWork work) {
  PYFT_SHARED(uint64_t, record, kRecordWords);
  PYFT_SHARED(float, floats, kSharedFloats);
  PYFT_SHARED(uint32_t, numbers, kSharedNumbers);
  if (load(&work.decision->skip) != 0) {
    return;
  }
  int32_t tensor = -1;
  KnownStep known;
  for (int64_t c = blockIdx.x; c < work.num_chunks; c += gridDim.x) {
    const DeviceChunk chunk = load(work.chunks + c);
    if (chunk.tensor != tensor) {
      tensor = chunk.tensor;
      __syncthreads();
      if (threadIdx.x < kRecordWords) {
        record[threadIdx.x] = load(reinterpret_cast<const uint64_t*>(work.tensors + tensor) + threadIdx.x);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        fill_constants(work, SharedTensor<decltype(record + 0)>{record}, tensor, known, floats, numbers);
      }
      __syncthreads();
    }
    const SharedTensor<decltype(record + 0)> t{record};
    const DeviceFloats grad = load(work.grads + tensor);
    const Constants constants = read_constants(work, t, floats, numbers);
    const int64_t end = chunk.offset + chunk.length;
    for (int64_t begin = chunk.offset + threadIdx.x / kWarp * kBlock; begin < end; begin += kWarps * kBlock) {
      update_block(t, grad, constants, begin, end);
    }
  }
  finish_step(work, numbers);
}

}  // namespace

cudaError_t launch_update(const UpdateWork& work, cudaStream_t stream) {
  return PYFT_LAUNCH(update_kernel, UpTo{work.num_chunks}, kThreads, stream, work);
}

}  // namespace pyft
