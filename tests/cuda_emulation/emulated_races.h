// Finds accesses that nothing orders: who last wrote and read each place of memory in this launch, kept beside it. What
// it says does not depend on timing: threads of a block are ordered by __syncthreads, lanes of a warp also by
// __syncwarp, blocks by __threadfence before an atomic that gives and after one that takes.
#pragma once

#include <cstring>
#include <unordered_map>

#include "emulated_block.h"

namespace cuda_emulation {

enum class Access : uint16_t { none, read, write, atomic };

struct Seen {
  uint32_t block = 0, epoch = 0, step = 0;
  uint16_t line = 0;
  uint16_t thread : 12 = 0;
  uint16_t access : 4 = 0;

  Access kind() const { return static_cast<Access>(access); }
};

// Two readers: whichever thread writes next, one of them is another.
struct Cell {
  Seen write, read, other_read;
};

class Races {
 public:
  void begin_launch() {
    ++launch_;
    published_.clear();
    if (pages_.size() > kMostPages) {
      pages_.clear();
      recent_ = nullptr;
    }
  }

  void begin_block() {
    taken_.assign(1, {});
    pending_.clear();
    fenced_.clear();
  }

  void end_epoch() {
    for (size_t t = 1; t < taken_.size(); ++t) {
      for (const auto& [from, until] : taken_[t]) {
        taken_[0].insert_or_assign(from, until);
      }
      taken_[t].clear();
    }
  }

  void see(Cell& cell, Access access, Site site, const char* what) {
    const Thread& thread = block.current();
    const Seen now{static_cast<uint32_t>(block.number()),
                   block.epoch(),
                   block.clock(thread.warp()).step[thread.lane()],
                   static_cast<uint16_t>(site.line),
                   static_cast<uint16_t>(thread.index),
                   static_cast<uint16_t>(access)};
    if (!(access == Access::atomic && cell.write.kind() == Access::atomic)) {
      check(cell.write, now, what, site);
    }
    if (access == Access::read) {
      const bool renew =
          cell.read.kind() == Access::none || cell.read.thread == now.thread || cell.read.epoch < now.epoch;
      const bool same_block = cell.read.kind() == Access::none || cell.read.block == now.block;
      (renew && same_block ? cell.read : cell.other_read) = now;
      return;
    }
    check(cell.read, now, what, site);
    check(cell.other_read, now, what, site);
    cell.write = now;
  }

  void see_global(const void* place, size_t bytes, Access access, Site site) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(place);
    Page& page = page_of(address >> kPageShift);
    if (!page.by_byte && (address % 4 != 0 || bytes % 4 != 0)) {
      page.split();
    }
    const int shift = page.by_byte ? 0 : 2;
    const uintptr_t first = (address & (kPageBytes - 1)) >> shift;
    for (uintptr_t i = first; i < first + (bytes >> shift); ++i) {
      if (i == page.cells.size()) {
        // An access over the end of a page: rare, as it is aligned.
        see_global(reinterpret_cast<const char*>(place) + ((i - first) << shift), bytes - ((i - first) << shift),
                   access, site);
        return;
      }
      see(page.cells[i], access, site, "global memory");
    }
    if (access == Access::atomic) {
      meet(address);
    }
  }

  // What this thread did before, and has seen of others, is given by its next atomics; what the last ones met is taken.
  void fence() {
    const unsigned thread = block.current().index;
    fenced_[thread] = block.epoch();
    if (taken_.size() <= thread + 1) {
      taken_.resize(thread + 2);
    }
    for (const auto& [from, until] : pending_[thread]) {
      taken_[thread + 1].insert_or_assign(from, until);
    }
    pending_[thread].clear();
  }

 private:
  static constexpr int kPageShift = 12;
  static constexpr uintptr_t kPageBytes = uintptr_t{1} << kPageShift;
  static constexpr size_t kMostPages = 4096;

  struct Page {
    uint64_t launch = 0;
    bool by_byte = false;
    std::vector<Cell> cells;

    void split() {
      std::vector<Cell> bytes(kPageBytes);
      for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = cells[i / 4];
      }
      cells.swap(bytes);
      by_byte = true;
    }
  };

  // What a block had done when one of its threads gave it away.
  struct Until {
    uint32_t epoch;
    unsigned thread;
  };
  using Blocks = std::unordered_map<uint32_t, Until>;

  Page& page_of(uintptr_t number) {
    if (recent_ == nullptr || recent_number_ != number) {
      recent_ = &pages_[number];
      recent_number_ = number;
    }
    if (recent_->launch != launch_) {
      recent_->launch = launch_;
      recent_->by_byte = false;
      recent_->cells.assign(kPageBytes / 4, Cell{});
    }
    return *recent_;
  }

  void meet(uintptr_t address) {
    const unsigned thread = block.current().index;
    Blocks& given = published_[address];
    for (const auto& [from, until] : given) {
      pending_[thread].insert_or_assign(from, until);
    }
    if (const auto fenced = fenced_.find(thread); fenced != fenced_.end()) {
      given.insert_or_assign(static_cast<uint32_t>(block.number()), Until{fenced->second, thread});
    }
  }

  bool is_taken(const Seen& before, size_t by) const {
    if (by >= taken_.size()) {
      return false;
    }
    const auto found = taken_[by].find(before.block);
    return found != taken_[by].end() && (before.epoch < found->second.epoch || before.thread == found->second.thread);
  }

  bool ordered(const Seen& before, const Seen& now) const {
    if (before.block != now.block) {
      return is_taken(before, 0) || is_taken(before, now.thread + size_t{1});
    }
    if (before.thread == now.thread || before.epoch < now.epoch) {
      return true;
    }
    const unsigned warp = now.thread / warpSize;
    return before.thread / warpSize == warp &&
           block.clock(warp).knows[now.thread % warpSize][before.thread % warpSize] > before.step;
  }

  void check(const Seen& before, const Seen& now, const char* what, Site site) const {
    if (before.kind() == Access::none || ordered(before, now)) {
      return;
    }
    static const char* const kNames[] = {"", "a read", "a write", "an atomic"};
    block.fail(std::string("race: ") + kNames[now.access] + " of " + what + ", unordered with " +
                   kNames[before.access] + " by thread " + std::to_string(before.thread) + " of block " +
                   std::to_string(before.block) + " in line " + std::to_string(before.line),
               site);
  }

  uint64_t launch_ = 0;
  std::unordered_map<uintptr_t, Page> pages_;
  Page* recent_ = nullptr;
  uintptr_t recent_number_ = 0;
  // By address of the atomic; by thread; 0 is the whole block and t + 1 thread t.
  std::unordered_map<uintptr_t, Blocks> published_;
  std::unordered_map<unsigned, Blocks> pending_;
  std::unordered_map<unsigned, uint32_t> fenced_;
  std::vector<Blocks> taken_;
};

inline Races races;

inline void end_epoch() { races.end_epoch(); }

}  // namespace cuda_emulation
