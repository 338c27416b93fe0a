// Bit masks of activations on the CPU.
#include "bit_masks_cpu.h"
#include "bit_masks_tensors.h"
#include "chunks.h"
#include "cpu_target.h"
#include "parallel.h"

namespace pyft {
namespace {

class CpuBitMasks {
 public:
  static constexpr const char* kDevice = "the CPU";
  static bool is_here(const Tensor& x) { return x.is_cpu(); }

  CpuBitMasks(const char*, const Tensor& x) : table_(cut_into_chunks({x.numel()})) {
    cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  }

  void relu(FloatData x, void* y, uint8_t* bits) const {
    over_chunks([&](int64_t offset, int64_t length) { relu_bits_cpu(x, y, bits, offset, length); });
  }
  void pack(FloatData x, uint8_t* bits, BitTest test, float low, float high) const {
    over_chunks([&](int64_t offset, int64_t length) { pack_bits_cpu(x, bits, offset, length, test, low, high); });
  }
  void pack_bools(const uint8_t* x, uint8_t* bits) const {
    over_chunks([&](int64_t offset, int64_t length) { pack_bools_cpu(x, bits, offset, length); });
  }
  void mask(FloatData x, const uint8_t* bits, void* y, float off) const {
    over_chunks([&](int64_t offset, int64_t length) { mask_by_bits_cpu(x, bits, y, offset, length, off); });
  }
  void scale(FloatData x, const uint8_t* bits, void* y, float on) const {
    over_chunks([&](int64_t offset, int64_t length) { scale_by_bits_cpu(x, bits, y, offset, length, on); });
  }
  void affine_relu(const float* x, const float* scale, const float* shift, float* y, uint8_t* bits,
                   ChannelLayout layout) const {
    over_chunks([&](int64_t offset, int64_t length) {
      affine_relu_bits_cpu(x, scale, shift, y, bits, offset, length, layout);
    });
  }
  void mask_channels(const float* x, const uint8_t* bits, const float* scale, float* y, ChannelLayout layout) const {
    over_chunks([&](int64_t offset, int64_t length) { mask_channels_cpu(x, bits, scale, y, offset, length, layout); });
  }

 private:
  template <class Work>
  void over_chunks(const Work& work) const {
    for_each_chunk(table_, [&](int64_t c) { work(table_.chunks[c].offset, table_.chunks[c].length); });
  }

  ChunkTable table_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) { BitMaskOps<CpuBitMasks>::add_to(library); }

}  // namespace pyft
