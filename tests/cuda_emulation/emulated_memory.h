// Global memory through load and store; shared memory that is fresh, full of NaN and checked.
#pragma once

#include <concepts>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <type_traits>

#include "emulated_block.h"
#include "emulated_races.h"
#include "emulated_traffic.h"

namespace cuda_emulation {

inline void note_access(const void* place, size_t bytes, size_t alignment, Access access, Site site) {
  block.count_access(site);
  if (reinterpret_cast<uintptr_t>(place) % alignment != 0) {
    block.fail("an access of " + std::to_string(bytes) + " bytes is misaligned: its address is " +
                   std::to_string(reinterpret_cast<uintptr_t>(place) % alignment) + " modulo " +
                   std::to_string(alignment),
               site);
  }
  if (settings.races) {
    races.see_global(place, bytes, access, site);
  }
  if (settings.traffic) {
    if (access != Access::write) {
      traffic.see(place, bytes, false, site);
    }
    if (access != Access::read) {
      traffic.see(place, bytes, true, site);
    }
  }
}

template <class T>
void note_access(const T* place, Access access, Site site) {
  note_access(place, sizeof(T), alignof(T), access, site);
}

template <class T>
T* address_of(T* place) {
  return place;
}

template <class T>
T load(const T* place, Site site = Site::current()) {
  note_access(place, Access::read, site);
  return *place;
}

template <class T>
void store(T* place, std::type_identity_t<T> value, Site site = Site::current()) {
  note_access(place, Access::write, site);
  *place = value;
}

// One array of shared memory of the running block.
struct SharedStorage {
  std::unique_ptr<char, decltype(&std::free)> bytes{nullptr, &std::free};
  std::vector<Cell> cells;
  std::string name;
};

class SharedMemory {
 public:
  void begin_block() {
    arrays_.clear();
    used_ = 0;
  }

  SharedStorage& array(const void* declaration, const char* name, size_t count, size_t each) {
    auto [place, fresh] = arrays_.try_emplace(declaration);
    SharedStorage& storage = place->second;
    if (fresh) {
      used_ += (count * each + 15) / 16 * 16;
      if (used_ > kMostShared) {
        block.fail("the block uses " + std::to_string(used_) + " bytes of shared memory; there are 49152",
                   Site::current());
      }
      storage.bytes.reset(static_cast<char*>(std::aligned_alloc(16, (count * each + 15) / 16 * 16)));
      std::memset(storage.bytes.get(), 0xff, count * each);
      storage.cells.resize(count);
      storage.name = name;
    }
    return storage;
  }

 private:
  static constexpr size_t kMostShared = 48 << 10;
  std::map<const void*, SharedStorage> arrays_;
  size_t used_ = 0;
};

inline SharedMemory shared_memory;

// Carries the place in the source into operator[].
struct Index {
  int64_t value;
  Site site;

  template <std::integral Integer>
  Index(Integer value, Site site = Site::current()) : value(static_cast<int64_t>(value)), site(site) {}
};

template <class T>
class SharedElement;

template <class T>
class SharedArray {
 public:
  SharedArray(SharedStorage* storage, int64_t offset) : storage_(storage), offset_(offset) {}

  SharedElement<T> operator[](Index index) const { return {*this + index.value, index.site}; }
  SharedElement<T> operator*() const { return (*this)[0]; }
  SharedArray operator+(int64_t by) const { return {storage_, offset_ + by}; }
  SharedArray operator-(int64_t by) const { return {storage_, offset_ - by}; }

  T* address() const { return reinterpret_cast<T*>(storage_->bytes.get()) + offset_; }

  void note(Access access, Site site) const {
    block.count_access(site);
    const int64_t count = static_cast<int64_t>(storage_->cells.size());
    if (offset_ < 0 || offset_ >= count) {
      block.fail("index " + std::to_string(offset_) + " is outside the shared array " + storage_->name + " of " +
                     std::to_string(count),
                 site);
    }
    if (!settings.races) {
      return;
    }
    Cell& cell = storage_->cells[offset_];
    if (access != Access::write && cell.write.kind() == Access::none) {
      block.fail("element " + std::to_string(offset_) + " of the shared array " + storage_->name +
                     " is read before anything was written to it",
                 site);
    }
    races.see(cell, access, site, storage_->name.c_str());
  }

 private:
  SharedStorage* storage_;
  int64_t offset_;
};

// What name[i] is: a read where a value is wanted, a write where one is assigned.
template <class T>
class SharedElement {
 public:
  SharedElement(SharedArray<T> place, Site site) : place_(place), site_(site) {}

  operator T() const {
    place_.note(Access::read, site_);
    return *place_.address();
  }
  T operator=(T value) const {
    place_.note(Access::write, site_);
    return *place_.address() = value;
  }
  T operator=(const SharedElement& other) const { return *this = static_cast<T>(other); }
  T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
  T operator-=(T value) const { return *this = static_cast<T>(*this) - value; }
  T operator*=(T value) const { return *this = static_cast<T>(*this) * value; }
  T operator|=(T value) const { return *this = static_cast<T>(*this) | value; }
  T operator&=(T value) const { return *this = static_cast<T>(*this) & value; }
  SharedArray<T> operator&() const { return place_; }

 private:
  SharedArray<T> place_;
  Site site_;
};

template <class T>
SharedArray<T> shared_array(const void* declaration, const char* name, size_t count) {
  return {&shared_memory.array(declaration, name, count, sizeof(T)), 0};
}

template <class T>
T* address_of(SharedArray<T> place) {
  return place.address();
}

template <class T>
void note_access(SharedArray<T> place, Access access, Site site) {
  place.note(access, site);
}

}  // namespace cuda_emulation

#define PYFT_EMULATED_LOAD(name)                                                        \
  template <class T>                                                                    \
  T name(const T* place, cuda_emulation::Site site = cuda_emulation::Site::current()) { \
    return cuda_emulation::load(place, site);                                           \
  }
#define PYFT_EMULATED_STORE(name)                                                                                   \
  template <class T>                                                                                                \
  void name(T* place, std::type_identity_t<T> value, cuda_emulation::Site site = cuda_emulation::Site::current()) { \
    cuda_emulation::store(place, value, site);                                                                      \
  }

PYFT_EMULATED_LOAD(__ldg)
PYFT_EMULATED_LOAD(__ldcs)
PYFT_EMULATED_LOAD(__ldcg)
PYFT_EMULATED_LOAD(__ldca)
PYFT_EMULATED_STORE(__stcs)
PYFT_EMULATED_STORE(__stcg)
PYFT_EMULATED_STORE(__stwb)
#undef PYFT_EMULATED_LOAD
#undef PYFT_EMULATED_STORE
