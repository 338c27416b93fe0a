// For programs that run a kernel of csrc with one seeded bug, or with none (-1): DRIVER BUG ORDER [SEED]. Exit status 0
// where all numbers are right, 1 where the emulation found a mistake, 2 where numbers are wrong. Global memory lies
// between guards of NaN, which reads beyond the end bring into results, and which writes there would change.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulation.h"

inline int chosen_bug = -1;
inline bool seeded(int bug) { return bug == chosen_bug; }

namespace drive {

inline int wrong = 0;

inline void expect(bool right, const char* what, int64_t place, double got, double want) {
  if (!right && ++wrong <= 5) {
    std::fprintf(stderr, "wrong: %s[%lld] is %.17g, not %.17g\n", what, static_cast<long long>(place), got, want);
  }
}

// A NaN is near to a NaN, and inf to inf.
inline void expect_near(const char* what, int64_t place, double got, double want, double tolerance) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  expect(same || std::fabs(got - want) <= tolerance * (1.0 + std::fabs(want)), what, place, got, want);
}

// `count` elements full of NaN, `shift` elements behind a place that vectors may begin at.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count, int64_t shift = 0) : count_(count), first_(kGuard + shift) {
    const size_t bytes = (kGuard + shift + count + kGuard) * sizeof(T);
    bytes_.assign((bytes + 63) / 64 * 64 + 64, '\xff');
    const uintptr_t place = reinterpret_cast<uintptr_t>(bytes_.data());
    begin_ = reinterpret_cast<T*>((place + 63) / 64 * 64) + first_;
  }
  Memory(const std::vector<T>& values) : Memory(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), begin_);
  }
  Memory(const Memory&) = delete;

  T* data() { return begin_; }
  T& operator[](int64_t i) { return begin_[i]; }
  int64_t size() const { return count_; }

  void expect_guards(const char* what) const {
    const char *from = bytes_.data(), *to = from + bytes_.size();
    const char *begin = reinterpret_cast<const char*>(begin_), *end = reinterpret_cast<const char*>(begin_ + count_);
    for (const char* p = from; p < to; p = p + 1 == begin ? end : p + 1) {
      expect(*p == '\xff', what, (p - begin) / static_cast<int64_t>(sizeof(T)), *p, -1);
    }
  }

 private:
  static constexpr int64_t kGuard = 64;
  int64_t count_, first_;
  std::vector<char> bytes_;
  T* begin_;
};

// Numbers between -1 and 1 that differ for each place and each `kind`.
inline float number(int kind, int64_t place) {
  uint32_t x = static_cast<uint32_t>(place) * 2654435761u + static_cast<uint32_t>(kind) * 40503u;
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  x ^= x >> 12;
  return static_cast<float>(x % 20001) / 10000.0f - 1.0f;
}

template <class Check>
int run(int count, char** words, const Check& check) {
  chosen_bug = std::atoi(words[1]);
  const std::string order = words[2];
  auto& settings = cuda_emulation::settings;
  settings.order = order == "ascending"    ? cuda_emulation::Order::ascending
                   : order == "descending" ? cuda_emulation::Order::descending
                                           : cuda_emulation::Order::random;
  settings.seed = count > 3 ? std::strtoull(words[3], nullptr, 10) : 0;
  // Two blocks, so that each has several chunks to do.
  settings.processors = 1;
  settings.blocks_each = 2;
  try {
    check();
  } catch (const cuda_emulation::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return wrong == 0 ? 0 : 2;
}

}  // namespace drive
