// What Python sets and reads of the emulation that is linked into a library, through ctypes.
#include "cuda_emulation.h"

#define PYFT_VISIBLE extern "C" __attribute__((visibility("default")))

using namespace cuda_emulation;

// order: 0 ascending, 1 descending, 2 random by `seed`.
PYFT_VISIBLE void pyft_emulation_set(int order, uint64_t seed, int races_on, int traffic_on, int processors,
                                     int blocks_each) {
  settings = {static_cast<Order>(order), seed, races_on != 0, traffic_on != 0, processors, blocks_each};
}

// The next launch gives this error in place of running.
PYFT_VISIBLE void pyft_emulation_fail_next_launch(int error) { next_launch = static_cast<cudaError_t>(error); }

PYFT_VISIBLE void pyft_emulation_counters(int64_t* counts) {
  const int64_t now[] = {counters.launches, counters.synchronisations, counters.copies, counters.copied_bytes,
                         counters.fills,    counters.allocations};
  std::copy(std::begin(now), std::end(now), counts);
}

PYFT_VISIBLE void pyft_emulation_reset() {
  counters = {};
  traffic.by_kernel.clear();
}

// A line for each kernel: its name, launches, then of loads and of stores: accesses, bytes, accesses of 16 bytes,
// sectors, accesses by warps; with tabs between them. Valid until the next call.
PYFT_VISIBLE const char* pyft_emulation_traffic() {
  static std::string text;
  text.clear();
  for (const auto& [name, kernel] : traffic.by_kernel) {
    text += name + "\t" + std::to_string(kernel.launches);
    for (const Flow& flow : {kernel.loads, kernel.stores}) {
      for (int64_t number : {flow.accesses, flow.bytes, flow.wide, flow.sectors, flow.warp_accesses}) {
        text += "\t" + std::to_string(number);
      }
    }
    text += "\n";
  }
  return text.c_str();
}
