// Activations that keep one bit for each element, in memory order, for their backward pass.
#include <tuple>

#include "bit_masks_cpu.h"
#include "chunks.h"
#include "cpu_target.h"
#include "grad_norm_tensors.h"
#include "parallel.h"

namespace pyft {
namespace {

int64_t bytes_for(int64_t numel) { return (numel + 7) / 8; }

Tensor new_bits(const Tensor& x) {
  return torch::stable::new_empty(x, {bytes_for(x.numel())}, torch::headeronly::ScalarType::Byte);
}

const uint8_t* checked_bits(const Tensor& bits, const Tensor& x) {
  STD_TORCH_CHECK(bits.scalar_type() == torch::headeronly::ScalarType::Byte && bits.is_cpu() && bits.is_contiguous() &&
                      bits.numel() == bytes_for(x.numel()),
                  "bits must be ", bytes_for(x.numel()), " contiguous uint8 on the CPU for ", x.numel(), " elements");
  return static_cast<const uint8_t*>(bits.data_ptr());
}

const float* channel_values(const Tensor& values, int64_t channels, const char* name) {
  STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == torch::headeronly::ScalarType::Float &&
                      values.is_contiguous() && values.numel() == channels,
                  name, " must be ", channels, " contiguous float32 on the CPU, one for each channel");
  return static_cast<const float*>(values.data_ptr());
}

// Channels are dimension 1, contiguous or last in memory.
ChannelLayout channel_layout(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have dimensions (N, C, ...), got ", to_string(x.sizes()));
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Float,
                  "x must be float32 on the CPU for the compiled core");
  const int64_t channels = x.size(1);
  if (x.is_contiguous()) {
    int64_t inner = 1;
    for (int64_t d = 2; d < x.dim(); ++d) {
      inner *= x.size(d);
    }
    return {channels, inner};
  }
  STD_TORCH_CHECK(is_dense(x) && x.stride(1) == 1 && (x.size(0) == 1 || x.stride(0) * x.size(0) == x.numel()),
                  "x has sizes ", to_string(x.sizes()), " and strides ", to_string(x.strides()),
                  "; its channels must be dimension 1, contiguous or last in memory");
  return {channels, 1};
}

template <class Work>
void over_chunks(const Tensor& x, const Work& work) {
  const ChunkTable table = cut_into_chunks({x.numel()});
  cpu_target();  // an unusable PYFT_CPU_TARGET is reported here, not inside the parallel region
  for_each_chunk(table, [&](int64_t c) { work(table.chunks[c].offset, table.chunks[c].length); });
}

void relu_into(const Tensor& x, void* y, uint8_t* bits) {
  const FloatData data = checked_data(x, "x", 0);
  over_chunks(x, [&](int64_t offset, int64_t length) { relu_bits_cpu(data, y, bits, offset, length); });
}

}  // namespace

std::tuple<Tensor, Tensor> relu_bits(const Tensor& x) {
  checked_data(x, "x", 0);
  Tensor y = torch::stable::empty_like(x), bits = new_bits(x);
  relu_into(x, y.mutable_data_ptr(), static_cast<uint8_t*>(bits.mutable_data_ptr()));
  return {y, bits};
}

Tensor relu_bits_(Tensor x) {
  checked_data(x, "x", 0);
  Tensor bits = new_bits(x);
  relu_into(x, x.mutable_data_ptr(), static_cast<uint8_t*>(bits.mutable_data_ptr()));
  return bits;
}

Tensor pack_bits(const Tensor& x, int64_t test, double low, double high) {
  STD_TORCH_CHECK(test >= 0 && test <= 2, "test must be 0, 1 or 2, got ", test);
  const FloatData data = checked_data(x, "x", 0);
  Tensor bits = new_bits(x);
  uint8_t* place = static_cast<uint8_t*>(bits.mutable_data_ptr());
  over_chunks(x, [&](int64_t offset, int64_t length) {
    pack_bits_cpu(data, place, offset, length, static_cast<BitTest>(test), static_cast<float>(low),
                  static_cast<float>(high));
  });
  return bits;
}

Tensor mask_by_bits(const Tensor& x, const Tensor& bits, double off) {
  const FloatData data = checked_data(x, "x", 0);
  const uint8_t* mask = checked_bits(bits, x);
  Tensor y = torch::stable::empty_like(x);
  void* place = y.mutable_data_ptr();
  over_chunks(x, [&](int64_t offset, int64_t length) {
    mask_by_bits_cpu(data, mask, place, offset, length, static_cast<float>(off));
  });
  return y;
}

Tensor scale_by_bits(const Tensor& x, const Tensor& bits, double on) {
  const FloatData data = checked_data(x, "x", 0);
  const uint8_t* mask = checked_bits(bits, x);
  Tensor y = torch::stable::empty_like(x);
  void* place = y.mutable_data_ptr();
  over_chunks(x, [&](int64_t offset, int64_t length) {
    scale_by_bits_cpu(data, mask, place, offset, length, static_cast<float>(on));
  });
  return y;
}

std::tuple<Tensor, Tensor> affine_relu_bits(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const ChannelLayout layout = channel_layout(x);
  const float *factor = channel_values(scale, layout.channels, "scale"),
              *addend = channel_values(shift, layout.channels, "shift");
  Tensor y = torch::stable::empty_like(x), bits = new_bits(x);
  const float* from = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  uint8_t* mask = static_cast<uint8_t*>(bits.mutable_data_ptr());
  over_chunks(x, [&](int64_t offset, int64_t length) {
    affine_relu_bits_cpu(from, factor, addend, to, mask, offset, length, layout);
  });
  return {y, bits};
}

Tensor mask_channels(const Tensor& x, const Tensor& bits, const Tensor& scale) {
  const ChannelLayout layout = channel_layout(x);
  const float* factor = channel_values(scale, layout.channels, "scale");
  const uint8_t* mask = checked_bits(bits, x);
  Tensor y = torch::stable::empty_like(x);
  const float* from = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  over_chunks(
      x, [&](int64_t offset, int64_t length) { mask_channels_cpu(from, mask, factor, to, offset, length, layout); });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pyft, CPU, library) {
  library.impl("relu_bits", TORCH_BOX(&relu_bits));
  library.impl("relu_bits_", TORCH_BOX(&relu_bits_));
  library.impl("pack_bits", TORCH_BOX(&pack_bits));
  library.impl("mask_by_bits", TORCH_BOX(&mask_by_bits));
  library.impl("scale_by_bits", TORCH_BOX(&scale_by_bits));
  library.impl("affine_relu_bits", TORCH_BOX(&affine_relu_bits));
  library.impl("mask_channels", TORCH_BOX(&mask_channels));
}

}  // namespace pyft
