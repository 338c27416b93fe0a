// The chunk table: many tensors cut into pieces of bounded length, and the pieces grouped into tasks of about equal
// work, so that one parallel region serves one huge tensor as well as a thousand small ones.
#pragma once

#include <cstdint>
#include <vector>

namespace pyft {

// Long chunks keep the memory busy (128 K elements: 12 % faster than 32 K on 110 M parameters); short ones share out
// small tensors among many cores. Both are multiples of the 256 elements of a block of 8-bit state.
constexpr int64_t kLongChunk = 131072;
constexpr int64_t kShortChunk = 16384;
constexpr int64_t kLongTensor = 4 * kLongChunk;
// Fixed cost of starting a chunk, in elements, so that many small tensors are shared out fairly.
constexpr int64_t kChunkOverhead = 256;
constexpr int64_t kTaskCost = 16384;
// Waking a thread takes as long as this much work.
constexpr int64_t kWorthAThread = 131072;

struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t length;
};

struct ChunkTable {
  std::vector<Chunk> chunks;
  // Task t is chunks[task_begin[t]] .. chunks[task_begin[t + 1] - 1].
  std::vector<int64_t> task_begin{0};

  // Elements and the fixed costs of chunks, together.
  int64_t cost = 0;

  int64_t num_tasks() const { return static_cast<int64_t>(task_begin.size()) - 1; }
};

// The cut of a tensor depends on its own size alone, never on the number of threads or on other tensors: reductions
// over its chunks keep their shape.
inline ChunkTable cut_into_chunks(const std::vector<int64_t>& numels) {
  ChunkTable table;
  int64_t cost = 0;
  for (int64_t tensor = 0; tensor < static_cast<int64_t>(numels.size()); ++tensor) {
    const int64_t limit = numels[tensor] >= kLongTensor ? kLongChunk : kShortChunk;
    for (int64_t offset = 0; offset < numels[tensor]; offset += limit) {
      const int64_t left = numels[tensor] - offset;
      const int64_t length = left < limit ? left : limit;
      table.chunks.push_back({tensor, offset, length});
      cost += length + kChunkOverhead;
      table.cost += length + kChunkOverhead;
      if (cost >= kTaskCost) {
        table.task_begin.push_back(static_cast<int64_t>(table.chunks.size()));
        cost = 0;
      }
    }
  }
  if (cost > 0) {
    table.task_begin.push_back(static_cast<int64_t>(table.chunks.size()));
  }
  return table;
}

// On a GPU a chunk is the work of one thread block between two looks at the table. Those of long tensors are longer:
// small models keep more blocks busy, large ones have fewer sums to add.
constexpr int64_t kDeviceChunk = 4096;
constexpr int64_t device_chunk_of(int64_t numel) {
  return numel < int64_t{1} << 19 ? kDeviceChunk : numel < int64_t{1} << 26 ? 2 * kDeviceChunk : 4 * kDeviceChunk;
}

// 16 bytes: one load.
struct alignas(16) DeviceChunk {
  int64_t offset;
  int32_t tensor, length;
};

struct DeviceChunkTable {
  std::vector<DeviceChunk> chunks;
  // The chunks of tensor i are chunks[begin[i]] .. chunks[begin[i + 1] - 1].
  std::vector<int64_t> begin{0};
};

// As above, the cut of a tensor depends on its own size alone.
inline DeviceChunkTable cut_for_device(const std::vector<int64_t>& numels) {
  DeviceChunkTable table;
  for (int64_t tensor = 0; tensor < static_cast<int64_t>(numels.size()); ++tensor) {
    const int64_t limit = device_chunk_of(numels[tensor]);
    for (int64_t offset = 0; offset < numels[tensor]; offset += limit) {
      const int64_t left = numels[tensor] - offset;
      table.chunks.push_back({offset, static_cast<int32_t>(tensor), static_cast<int32_t>(left < limit ? left : limit)});
    }
    table.begin.push_back(static_cast<int64_t>(table.chunks.size()));
  }
  return table;
}

// `count` tasks of one chunk each, of equal `cost`.
inline ChunkTable equal_tasks(int64_t count, int64_t cost) {
  ChunkTable table;
  for (int64_t i = 0; i < count; ++i) {
    table.chunks.push_back({i, 0, 0});
    table.task_begin.push_back(i + 1);
  }
  table.cost = count * cost;
  return table;
}

}  // namespace pyft
