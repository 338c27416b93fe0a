// The threads of one block: fibers that run until they wait for others, and the rules by which waiting ends.
#pragma once

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulated_fibers.h"
#include "emulated_types.h"

namespace cuda_emulation {

enum class Order { ascending, descending, random };

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 0;
  bool races = true;
  bool traffic = false;
  // What the emulated device says of itself: small, so that grids by occupancy leave work for loops.
  int processors = 3, blocks_each = 2;
};
inline Settings settings;

// Where in the source a thread called a function of the device.
struct Site {
  const char* file;
  int line;

  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
  }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { ready, at_barrier, in_warp_call, done };
enum class WarpKind { sync, ballot, any, all, shuffle, shuffle_up, shuffle_down, shuffle_xor };

struct WarpCall {
  WarpKind kind;
  unsigned mask;
  uint64_t value;
  int operand, width;
};

struct Thread {
  Fiber fiber;
  State state = State::done;
  Site site{"", 0};
  WarpCall call{};
  uint64_t result = 0;
  bool predicate = false;
  unsigned index = 0;
  int64_t accesses = 0;

  unsigned lane() const { return index % warpSize; }
  unsigned warp() const { return index / warpSize; }
};

constexpr int64_t kManyAccesses = 1 << 10, kMostAccesses = 1 << 20;

// What the lanes of a warp know of each other's accesses through __syncwarp: knows[a][b] is the number of steps of lane
// b, counted by its __syncwarp calls, that are over for lane a.
struct WarpClock {
  uint32_t step[warpSize] = {};
  uint32_t knows[warpSize][warpSize] = {};
};

class Block {
 public:
  // Runs body() in each thread of the block. Throws what a thread threw, or what is wrong with its waiting.
  void run(const std::string& kernel, uint3 place, uint64_t number, const std::function<void()>& body);

  Thread& current() { return *current_; }
  uint64_t number() const { return number_; }
  uint32_t epoch() const { return epoch_; }
  WarpClock& clock(unsigned warp) { return clocks_[warp]; }
  unsigned threads() const { return count_; }

  // Waits until all threads have come to the same barrier; gives the number of those with a true predicate.
  int barrier(bool predicate, Site site);
  uint64_t warp_call(WarpCall call, Site site);
  // Lets others go first: after atomics where order is random, else after many, for which the thread may be waiting.
  void yield_after_atomic();
  // Counts an access: a thread that makes no end of them waits for what nobody does.
  void count_access(Site site);
  [[noreturn]] void fail(const std::string& message, Site site);

 private:
  static void enter();
  void resume(Thread& thread);
  void wait(State state, Site site);
  void complete_warp_call(Thread& last);
  uint64_t result_for(const Thread& thread, const WarpCall& call, Site site);
  void release_barrier();
  [[noreturn]] void explain();
  Thread* lane_of(const Thread& thread, unsigned lane);
  std::string name_of(const Thread& thread) const;
  std::string where() const;

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<WarpClock> clocks_;
  std::vector<unsigned> order_;
  std::mt19937_64 random_;
  unsigned count_ = 0;
  uint64_t number_ = 0;
  uint32_t epoch_ = 0;
  int voted_ = 0;
  uint3 place_{};
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::string kernel_;
};

inline Block block;

// All that threads of the block did is now ordered before what they do next (emulated_races.h).
void end_epoch();

inline std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

inline std::string Block::where() const {
  return "kernel " + kernel_ + ", block " + triple(place_.x, place_.y, place_.z);
}

inline std::string Block::name_of(const Thread& thread) const {
  const unsigned row = thread.index / blockDim.x;
  return "thread " + triple(thread.index % blockDim.x, row % blockDim.y, row / blockDim.y);
}

inline void Block::fail(const std::string& message, Site site) {
  const std::string who = current_ == nullptr ? "" : ", " + name_of(*current_);
  throw Error(where() + who + ": " + message + " (" + site.text() + ")");
}

inline void Block::enter() {
  Thread& thread = block.current();
  thread.fiber.entered();
  try {
    (*block.body_)();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  thread.state = State::done;
  thread.fiber.leave(true);
  std::terminate();
}

inline void Block::resume(Thread& thread) {
  current_ = &thread;
  const unsigned row = thread.index / blockDim.x;
  threadIdx = {thread.index % blockDim.x, row % blockDim.y, row / blockDim.y};
  thread.fiber.resume();
  current_ = nullptr;
  if (error_) {
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

inline void Block::run(const std::string& kernel, uint3 place, uint64_t number, const std::function<void()>& body) {
  kernel_ = kernel;
  place_ = place;
  number_ = number;
  epoch_ = 0;
  body_ = &body;
  count_ = blockDim.x * blockDim.y * blockDim.z;
  random_.seed(settings.seed * 1000003 + number);
  clocks_.assign((count_ + warpSize - 1) / warpSize, WarpClock{});
  order_.resize(count_);
  while (threads_.size() < count_) {
    threads_.push_back(std::make_unique<Thread>());
  }
  for (unsigned t = 0; t < count_; ++t) {
    threads_[t]->index = t;
    threads_[t]->state = State::ready;
    threads_[t]->accesses = 0;
    threads_[t]->fiber.prepare(&Block::enter);
    order_[t] = settings.order == Order::descending ? count_ - 1 - t : t;
  }
  for (bool alive = true; alive;) {
    if (settings.order == Order::random) {
      std::shuffle(order_.begin(), order_.end(), random_);
    }
    bool ran = false;
    alive = false;
    for (unsigned t : order_) {
      Thread& thread = *threads_[t];
      if (thread.state == State::ready) {
        resume(thread);
        ran = true;
      }
      alive = alive || thread.state != State::done;
    }
    if (alive && !ran) {
      release_barrier();
    }
  }
}

inline void Block::wait(State state, Site site) {
  Thread& thread = *current_;
  thread.state = state;
  thread.site = site;
  thread.fiber.leave();
}

inline void Block::yield_after_atomic() {
  if (settings.order == Order::random || current_->accesses % kManyAccesses == 0) {
    wait(State::ready, current_->site);
  }
}

inline void Block::count_access(Site site) {
  if (++current_->accesses > kMostAccesses) {
    fail("more than " + std::to_string(kMostAccesses) + " accesses: does it wait for a thread that never comes?", site);
  }
}

inline int Block::barrier(bool predicate, Site site) {
  current_->predicate = predicate;
  wait(State::at_barrier, site);
  return voted_;
}

// Nobody can go on by itself: all must be at one barrier.
inline void Block::release_barrier() {
  voted_ = 0;
  for (unsigned t = 0; t < count_; ++t) {
    const Thread& thread = *threads_[t];
    if (thread.state != State::at_barrier || !(thread.site == threads_[0]->site)) {
      explain();
    }
    voted_ += thread.predicate ? 1 : 0;
  }
  ++epoch_;
  end_epoch();
  for (unsigned t = 0; t < count_; ++t) {
    threads_[t]->state = State::ready;
  }
}

// Two threads that wait for each other, or one that waits for a thread that has ended.
inline void Block::explain() {
  auto describe = [&](const Thread& thread) {
    switch (thread.state) {
      case State::at_barrier:
        return name_of(thread) + " waits at the barrier " + thread.site.text();
      case State::in_warp_call: {
        char mask[16];
        std::snprintf(mask, sizeof mask, "%#x", thread.call.mask);
        return name_of(thread) + " waits in the warp function " + thread.site.text() + " with mask " + mask;
      }
      default:
        return name_of(thread) + " has ended";
    }
  };
  // A warp function that cannot end is named before the barriers that others wait at for that reason.
  for (unsigned t = 0; t < count_; ++t) {
    const Thread& thread = *threads_[t];
    for (unsigned lane = 0; thread.state == State::in_warp_call && lane < warpSize; ++lane) {
      const Thread* other = lane_of(thread, lane);
      const bool named = (thread.call.mask >> lane & 1u) != 0;
      if (named && other != nullptr &&
          (other->state != State::in_warp_call || !(other->site == thread.site) ||
           other->call.mask != thread.call.mask || other->call.kind != thread.call.kind)) {
        throw Error(where() + ": " + describe(thread) + ", which names lane " + std::to_string(lane) + ", but " +
                    describe(*other));
      }
    }
  }
  const Thread* first = nullptr;
  for (unsigned t = 0; t < count_ && first == nullptr; ++t) {
    first = threads_[t]->state == State::at_barrier ? threads_[t].get() : nullptr;
  }
  for (unsigned t = 0; t < count_ && first != nullptr; ++t) {
    const Thread& other = *threads_[t];
    if (other.state != State::at_barrier || !(other.site == first->site)) {
      throw Error(where() + ": " + describe(*first) + ", but " + describe(other));
    }
  }
  throw Error(where() + ": no thread can go on");
}

inline Thread* Block::lane_of(const Thread& thread, unsigned lane) {
  const unsigned index = thread.warp() * warpSize + lane;
  return index < count_ ? threads_[index].get() : nullptr;
}

inline uint64_t Block::warp_call(WarpCall call, Site site) {
  Thread& thread = *current_;
  if ((call.mask >> thread.lane() & 1u) == 0) {
    fail("the mask of a warp function does not name the calling lane " + std::to_string(thread.lane()), site);
  }
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0 && lane_of(thread, lane) == nullptr) {
      fail("the mask of a warp function names lane " + std::to_string(lane) + ", which the block does not have", site);
    }
  }
  if (call.width < 1 || call.width > warpSize || (call.width & (call.width - 1)) != 0) {
    fail("the width of a shuffle must be a power of 2 up to 32, not " + std::to_string(call.width), site);
  }
  thread.call = call;
  thread.site = site;
  thread.state = State::in_warp_call;
  complete_warp_call(thread);
  if (thread.state == State::in_warp_call || settings.order == Order::random) {
    thread.fiber.leave();
  }
  return thread.result;
}

// If all lanes that the mask names have come to the same call, gives each its result and lets it go on.
inline void Block::complete_warp_call(Thread& last) {
  const WarpCall call = last.call;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0) {
      const Thread& other = *lane_of(last, lane);
      if (other.state != State::in_warp_call || other.call.mask != call.mask || other.call.kind != call.kind ||
          !(other.site == last.site)) {
        return;
      }
    }
  }
  WarpClock& clock = clocks_[last.warp()];
  uint32_t joined[warpSize] = {};
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0) {
      Thread& thread = *lane_of(last, lane);
      thread.result = result_for(thread, thread.call, last.site);
      for (unsigned other = 0; call.kind == WarpKind::sync && other < warpSize; ++other) {
        joined[other] = std::max(joined[other], clock.knows[lane][other]);
      }
    }
  }
  // Only __syncwarp orders memory: shuffles and votes do not.
  for (unsigned lane = 0; call.kind == WarpKind::sync && lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0) {
      joined[lane] = ++clock.step[lane];
    }
  }
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0) {
      lane_of(last, lane)->state = State::ready;
      if (call.kind == WarpKind::sync) {
        std::copy(joined, joined + warpSize, clock.knows[lane]);
      }
    }
  }
}

inline uint64_t Block::result_for(const Thread& thread, const WarpCall& call, Site site) {
  uint64_t set = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((call.mask >> lane & 1u) != 0 && lane_of(thread, lane)->call.value != 0) {
      set |= uint64_t{1} << lane;
    }
  }
  const int lane = static_cast<int>(thread.lane()), first = lane & ~(call.width - 1), end = first + call.width;
  int from = lane;
  switch (call.kind) {
    case WarpKind::sync:
      return 0;
    case WarpKind::ballot:
      return set;
    case WarpKind::any:
      return set != 0 ? 1 : 0;
    case WarpKind::all:
      return set == call.mask ? 1 : 0;
    case WarpKind::shuffle:
      from = first + (call.operand & (call.width - 1));
      break;
    case WarpKind::shuffle_up:
      from = lane - call.operand < first ? lane : lane - call.operand;
      break;
    case WarpKind::shuffle_down:
      from = lane + call.operand >= end ? lane : lane + call.operand;
      break;
    case WarpKind::shuffle_xor:
      from = (lane ^ call.operand) >= end ? lane : lane ^ call.operand;
      break;
  }
  if (from < 0 || from >= warpSize || (call.mask >> from & 1u) == 0) {
    fail("a shuffle reads lane " + std::to_string(from) + " for lane " + std::to_string(lane) +
             ", but its mask does not name it",
         site);
  }
  return lane_of(thread, static_cast<unsigned>(from))->call.value;
}

}  // namespace cuda_emulation
