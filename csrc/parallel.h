// One parallel region over a chunk table, in which no thread waits for a slower one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "chunks.h"

namespace pyft {

// Begins to load the first bytes of what comes next. A chunk is begun before the hardware has seen the pattern of
// its accesses, so each begins with a wait unless it was announced.
inline void fetch_ahead(const void* data, int64_t bytes) {
  constexpr int64_t kMost = 2048, kLine = 64;
  const char* first = static_cast<const char*>(data);
  for (int64_t offset = 0; offset < std::min(bytes, kMost); offset += kLine) {
    __builtin_prefetch(first + offset);
  }
}

// Tasks of one worker that nobody has begun yet. A cache line each.
struct alignas(64) TaskRange {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Calls work(c) for each chunk c. A worker begins with its own share, the same in every call, so that what one pass
// left in its cache serves the next; then it takes over tasks of those that other programs on the machine slow down.
template <class Work>
void for_each_chunk(const ChunkTable& table, const Work& work) {
  const int64_t tasks = table.num_tasks();
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), tasks, table.cost / kWorthAThread + 1});
  std::vector<TaskRange> ranges(workers);
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next = w * tasks / workers;
    ranges[w].end = (w + 1) * tasks / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t turn = begin * workers; turn < end * workers; ++turn) {
      TaskRange& range = ranges[(turn / workers + turn % workers) % workers];
      for (int64_t t = range.next++; t < range.end; t = range.next++) {
        for (int64_t c = table.task_begin[t]; c < table.task_begin[t + 1]; ++c) {
          work(c);
        }
      }
    }
  });
}

}  // namespace pyft
