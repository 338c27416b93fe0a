// Barriers, warp functions and atomics.
#pragma once

#include <type_traits>

#include "emulated_block.h"
#include "emulated_memory.h"

using cuda_emulation::Site;

inline void __syncthreads(Site site = Site::current()) { cuda_emulation::block.barrier(false, site); }
inline int __syncthreads_count(int predicate, Site site = Site::current()) {
  return cuda_emulation::block.barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, Site site = Site::current()) {
  return cuda_emulation::block.barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, Site site = Site::current()) {
  return cuda_emulation::block.barrier(predicate != 0, site) == static_cast<int>(cuda_emulation::block.threads());
}

namespace cuda_emulation {

inline uint64_t vote(WarpKind kind, unsigned mask, bool predicate, Site site) {
  return block.warp_call({kind, mask, predicate ? 1u : 0u, 0, warpSize}, site);
}

template <class T>
T shuffle(WarpKind kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = block.warp_call({kind, mask, bits, operand, width}, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::current()) {
  cuda_emulation::vote(cuda_emulation::WarpKind::sync, mask, false, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<unsigned>(cuda_emulation::vote(cuda_emulation::WarpKind::ballot, mask, predicate != 0, site));
}
inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<int>(cuda_emulation::vote(cuda_emulation::WarpKind::any, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<int>(cuda_emulation::vote(cuda_emulation::WarpKind::all, mask, predicate != 0, site));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, Site site = Site::current()) {
  return cuda_emulation::shuffle(cuda_emulation::WarpKind::shuffle, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, Site site = Site::current()) {
  return cuda_emulation::shuffle(cuda_emulation::WarpKind::shuffle_up, mask, value, static_cast<int>(by), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, Site site = Site::current()) {
  return cuda_emulation::shuffle(cuda_emulation::WarpKind::shuffle_down, mask, value, static_cast<int>(by), width,
                                 site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = warpSize, Site site = Site::current()) {
  return cuda_emulation::shuffle(cuda_emulation::WarpKind::shuffle_xor, mask, value, with, width, site);
}

inline void __threadfence(Site = Site::current()) { cuda_emulation::races.fence(); }
inline void __threadfence_block() {}

namespace cuda_emulation {

// *place = change(*place) in one step; gives the old value.
template <class Place, class Change>
auto update_atomically(Place place, const Change& change, Site site) {
  using T = std::remove_reference_t<decltype(*address_of(place))>;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take 4 or 8 bytes");
  note_access(place, Access::atomic, site);
  T* at = address_of(place);
  const T old = *at;
  *at = change(old);
  block.yield_after_atomic();
  return old;
}

template <class Place>
using Pointee = std::remove_reference_t<decltype(*address_of(std::declval<Place>()))>;

}  // namespace cuda_emulation

#define PYFT_EMULATED_ATOMIC(name, expression)                                                                       \
  template <class Place>                                                                                             \
  auto name(Place place, cuda_emulation::Pointee<Place> value, Site site = Site::current()) {                        \
    return cuda_emulation::update_atomically(                                                                        \
        place, [value](cuda_emulation::Pointee<Place> old) -> cuda_emulation::Pointee<Place> { return expression; }, \
        site);                                                                                                       \
  }

PYFT_EMULATED_ATOMIC(atomicAdd, old + value)
PYFT_EMULATED_ATOMIC(atomicSub, old - value)
PYFT_EMULATED_ATOMIC(atomicMax, old < value ? value : old)
PYFT_EMULATED_ATOMIC(atomicMin, value < old ? value : old)
PYFT_EMULATED_ATOMIC(atomicExch, (static_cast<void>(old), value))
PYFT_EMULATED_ATOMIC(atomicOr, old | value)
PYFT_EMULATED_ATOMIC(atomicAnd, old& value)
PYFT_EMULATED_ATOMIC(atomicXor, old ^ value)
PYFT_EMULATED_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
PYFT_EMULATED_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef PYFT_EMULATED_ATOMIC

template <class Place>
auto atomicCAS(Place place, cuda_emulation::Pointee<Place> expected, cuda_emulation::Pointee<Place> value,
               Site site = Site::current()) {
  using T = cuda_emulation::Pointee<Place>;
  return cuda_emulation::update_atomically(
      place, [=](T old) -> T { return std::memcmp(&old, &expected, sizeof old) == 0 ? value : old; }, site);
}
