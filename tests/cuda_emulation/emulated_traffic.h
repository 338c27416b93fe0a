// What each kernel moves to and from global memory: accesses, bytes, how many are 128 bits wide, and the sectors of 32
// bytes that each access of a warp touches.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulated_block.h"

namespace cuda_emulation {

constexpr uintptr_t kSectorBytes = 32;

struct Flow {
  int64_t accesses = 0, bytes = 0, wide = 0, sectors = 0, warp_accesses = 0;
};

struct KernelTraffic {
  int64_t launches = 0;
  Flow loads, stores;
};

class Traffic {
 public:
  void begin_launch(const std::string& kernel) {
    kernel_ = &by_kernel[kernel];
    ++kernel_->launches;
    // What a launch that ended in an error left.
    turns_.clear();
    touched_[0].clear();
    touched_[1].clear();
  }

  void see(const void* place, size_t bytes, bool is_store, Site site) {
    Flow& flow = is_store ? kernel_->stores : kernel_->loads;
    ++flow.accesses;
    flow.bytes += static_cast<int64_t>(bytes);
    flow.wide += bytes == 16 ? 1 : 0;
    // The n-th time that a lane comes to a place of the source belongs to the n-th time of the others.
    const Thread& thread = block.current();
    const uint64_t where =
        reinterpret_cast<uintptr_t>(site.file) * 65599 + static_cast<uint64_t>(site.line) * 2 + is_store;
    const uint64_t turn = turns_[where * 1024 + thread.index]++;
    std::vector<uintptr_t>& sectors = touched_[is_store][(where * 1048573 + turn) * 32 + thread.warp()];
    const uintptr_t address = reinterpret_cast<uintptr_t>(place);
    for (uintptr_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s) {
      sectors.push_back(s);
    }
  }

  void end_block() {
    for (bool is_store : {false, true}) {
      Flow& flow = is_store ? kernel_->stores : kernel_->loads;
      for (auto& [key, sectors] : touched_[is_store]) {
        std::sort(sectors.begin(), sectors.end());
        flow.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
        ++flow.warp_accesses;
      }
      touched_[is_store].clear();
    }
    turns_.clear();
  }

  std::map<std::string, KernelTraffic> by_kernel;

 private:
  KernelTraffic* kernel_ = nullptr;
  std::unordered_map<uint64_t, uint64_t> turns_;
  std::unordered_map<uint64_t, std::vector<uintptr_t>> touched_[2];
};

inline Traffic traffic;

}  // namespace cuda_emulation
