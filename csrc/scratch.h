// Memory of a thread that one call after the other works in: new pages for each would cost as much as their use.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace pyft {

class Scratch {
 public:
  // Room for so many floats, aligned to a cache line; what was there before is lost.
  float* floats(int64_t count) {
    if (count > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), kLine)));
      size_ = count;
    }
    return data_.get();
  }

  // Gives back what is more than a thread should keep for good.
  void trim() {
    constexpr int64_t kMostKept = int64_t{1} << 23;
    if (size_ > kMostKept) {
      data_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace pyft
