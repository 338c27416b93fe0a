// CPU tensors in pinned memory: a GPU reaches them at the address that they have on the CPU.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

// Pinning a page takes long, so blocks are used again: by size, rounded up to a power of two and kept in front of them.
constexpr size_t kHeader = 64;
std::mutex mutex;
std::map<size_t, std::vector<void*>>& unused() {
  // Tensors may be freed after static objects.
  static auto* blocks = new std::map<size_t, std::vector<void*>>();
  return *blocks;
}

void free_block(void* data) {
  if (data != nullptr) {
    void* block = static_cast<char*>(data) - kHeader;
    const std::lock_guard<std::mutex> lock(mutex);
    unused()[*static_cast<size_t*>(block)].push_back(block);
  }
}

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      size_t size = 256;
      while (size < bytes + kHeader) {
        size *= 2;
      }
      const std::lock_guard<std::mutex> lock(mutex);
      auto& blocks = unused()[size];
      void* block = nullptr;
      if (blocks.empty()) {
        TORCH_CHECK(cudaMallocHost(&block, size) == cudaSuccess, "no pinned memory of ", size, " bytes");
      } else {
        block = blocks.back();
        blocks.pop_back();
      }
      *static_cast<size_t*>(block) = size;
      data = static_cast<char*>(block) + kHeader;
    }
    return {data, data, &free_block, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

extern "C" void pyft_pin_cpu_tensors() { c10::SetCPUAllocator(new PinnedAllocator(), 255); }
