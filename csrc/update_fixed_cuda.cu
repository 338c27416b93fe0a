#include "update_kernel_cuda.h"

namespace pyft {
namespace {

// By the first of these that is the launch's; nothing where none is.
template <class... Layouts>
struct OneOf {
  static std::optional<cudaError_t> launch(const UpdateWork& work, const UpdateLayout& layout, cudaStream_t stream) {
    std::optional<cudaError_t> error;
    (try_one<Layouts>(work, layout, stream, error) || ...);
    return error;
  }

 private:
  template <class Layout>
  static bool try_one(const UpdateWork& work, const UpdateLayout& layout, cudaStream_t stream,
                      std::optional<cudaError_t>& error) {
    if (layout != Layout::kLayout) {
      return false;
    }
    error = PYFT_LAUNCH(update_kernel<Layout>, UpTo{work.num_chunks}, kUpdateThreads, stream, work);
    return true;
  }
};

constexpr auto kFp32 = FloatFormat::fp32, kBf16 = FloatFormat::bf16, kFp16 = FloatFormat::fp16;
constexpr auto kFp32Moments = MomentFormat::fp32, kBf16Moments = MomentFormat::bf16, kInt8Moments = MomentFormat::int8;

template <Rule kRule>
using Fp32 = FixedLayout<kRule, WeightFormat::fp32, kFp32, kFp32Moments>;
template <WeightFormat kWeights, MomentFormat kMoment>
using Bf16AdamW = FixedLayout<Rule::adamw, kWeights, kBf16, kMoment>;

// What whole models are trained in. Each costs a second of compiling; what is missing runs by AnyLayouts.
using Common =
    OneOf<Fp32<Rule::adamw>, Fp32<Rule::adamw_amsgrad>, Fp32<Rule::adam>, Fp32<Rule::sgd_momentum>,
          Fp32<Rule::sgd_nesterov>, Fp32<Rule::rmsprop>, Fp32<Rule::adagrad>, Fp32<Rule::lion>,
          FixedLayout<Rule::sgd, WeightFormat::fp32, kFp32, MomentFormat::none>,
          FixedLayout<Rule::adamw, WeightFormat::fp32, kFp32, kBf16Moments>,
          FixedLayout<Rule::adamw, WeightFormat::fp32, kFp32, kInt8Moments>,
          FixedLayout<Rule::adam, WeightFormat::fp32, kFp32, kInt8Moments>,
          FixedLayout<Rule::adamw, WeightFormat::fp16, kFp16, kFp32Moments>,
          Bf16AdamW<WeightFormat::bf16, kFp32Moments>, Bf16AdamW<WeightFormat::bf16, kBf16Moments>,
          Bf16AdamW<WeightFormat::bf16, kInt8Moments>, Bf16AdamW<WeightFormat::bf16_split32, kFp32Moments>,
          Bf16AdamW<WeightFormat::bf16_split32, kInt8Moments>, Bf16AdamW<WeightFormat::bf16_kahan, kBf16Moments>,
          Bf16AdamW<WeightFormat::bf16_stochastic, kBf16Moments>,
          FixedLayout<Rule::lion, WeightFormat::bf16, kBf16, kBf16Moments>,
          FixedLayout<Rule::sgd_momentum, WeightFormat::bf16, kBf16, kFp32Moments>>;

}  // namespace

std::optional<cudaError_t> launch_fixed_update(const UpdateWork& work, const UpdateLayout& layout,
                                               cudaStream_t stream) {
  return Common::launch(work, layout, stream);
}

}  // namespace pyft
