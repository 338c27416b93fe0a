// A block has `across` threads beside each other, each with 16 bytes of a compact row, and kThreads / across rows at
// once. Where compact rows begin at 16 bytes these lie together and move as one access; else a thread's elements are
// `across` apart, so that a warp's accesses are contiguous. Columns that are neighbours in the full matrix, too, such
// as those of whole attention heads, move as one access there as well.
#include "division_math.h"
#include "masked_rows_cuda.h"

namespace pyft {
namespace {

constexpr int kThreads = 256;
// Rows of one thread in a slab.
constexpr int kRows = 8;
constexpr int kFinishColumns = 32;

template <class Element>
constexpr int kLength = kVectorLength<Element>;
// Rows that a thread has under way: 16 loads where columns are no neighbours.
template <class Element>
constexpr int kAtOnce = 16 / kLength<Element>;

// How a block's threads are laid over the compact matrix.
struct Tiling {
  int across;  // a power of two, at most a warp
  int64_t tiles, slabs;

  PYFT_HOST_DEVICE int down() const { return kThreads / across; }
};

Tiling tiling_of(int length, int64_t rows, int64_t count) {
  int across = 1;
  while (across < kWarp && static_cast<int64_t>(across) * length < count) {
    across *= 2;
  }
  const int64_t tile = static_cast<int64_t>(across) * length, slab = static_cast<int64_t>(kThreads / across) * kRows;
  return {across, (count + tile - 1) / tile, (rows + slab - 1) / slab};
}

// Column of element i of a thread in a compact row.
template <class Element>
__device__ __forceinline__ int64_t column_of(const Tiling& tiling, int64_t tile, bool vector, int i) {
  const int lane = static_cast<int>(threadIdx.x) % tiling.across;
  return tile * tiling.across * kLength<Element> + (vector ? lane * kLength<Element> + i : i * tiling.across + lane);
}

// A thread's columns in the full matrix; -1 beyond the last. Their numbers fit 32 bits: 64 would be spilled.
template <class Element>
struct Places {
  int at[kLength<Element>];
  int64_t stride;
  bool together;

  __device__ __forceinline__ Places(const Tiling& tiling, int64_t tile, bool vector, const int64_t* columns,
                                    int64_t count, int64_t column_stride, bool aligned)
      : stride(column_stride) {
    together = vector && aligned;
#pragma unroll
    for (int i = 0; i < kLength<Element>; ++i) {
      const int64_t c = column_of<Element>(tiling, tile, vector, i);
      at[i] = c >= count ? -1 : static_cast<int>(columns == nullptr ? c : load(columns + c));
      together = together && at[i] == at[0] + i;
    }
    together = together && at[0] >= 0 && at[0] % kLength<Element> == 0;
  }

  __device__ __forceinline__ Vector<Element, kLength<Element>> read(const Element* row) const {
    if (together) {
      return load_vector<kLength<Element>>(row + at[0]);
    }
    Vector<Element, kLength<Element>> values = {};
#pragma unroll
    for (int i = 0; i < kLength<Element>; ++i) {
      if (at[i] >= 0) {
        values.at[i] = load(row + at[i] * stride);
      }
    }
    return values;
  }

  __device__ __forceinline__ void write(Element* row, const Vector<Element, kLength<Element>>& values) const {
    if (together) {
      store_vector(row + at[0], values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLength<Element>; ++i) {
      if (at[i] >= 0) {
        store(row + at[i] * stride, values.at[i]);
      }
    }
  }
};

// Two blocks at once leave a thread 128 registers; left to choose, ptxas takes fewer and spills.
constexpr int kBlocks = 2;

// Steps that a warp has under way.
template <int kN>
constexpr int kPlaneSteps = kN == 1 ? 8 : 4;

// Work(tile, slab) for each of this block.
template <class Work>
__device__ __forceinline__ void for_each_tile(const Tiling& tiling, const Work& work) {
  for (int64_t task = blockIdx.x; task < tiling.tiles * tiling.slabs; task += gridDim.x) {
    work(task % tiling.tiles, task / tiling.tiles);
  }
}

// `read(row)` and then `write(row, values)` for the rows of this thread in a slab, several under way.
template <class Element, class Read, class Write>
__device__ __forceinline__ void for_each_row(const Tiling& tiling, int64_t slab, int64_t rows, const Read& read,
                                             const Write& write) {
  const int down = tiling.down();
  const int64_t first = slab * down * kRows + static_cast<int>(threadIdx.x) / tiling.across;
  // Unrolled once more it would spill.
#pragma unroll 1
  for (int r = 0; r < kRows; r += kAtOnce<Element>) {
    Vector<Element, kLength<Element>> values[kAtOnce<Element>] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce<Element>; ++u) {
      if (const int64_t row = first + (r + u) * down; row < rows) {
        values[u] = read(row);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce<Element>; ++u) {
      if (const int64_t row = first + (r + u) * down; row < rows) {
        write(row, values[u]);
      }
    }
  }
}

// The sums of a block's threads that have the same columns, in the threads of the first row: a tree.
template <class Sums>
__device__ __forceinline__ void sum_down(const Tiling& tiling, Sums& sums, int length) {
  __syncthreads();
  for (int half = tiling.down() / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half * tiling.across) {
      for (int i = 0; i < length; ++i) {
        const int mine = i * kThreads + static_cast<int>(threadIdx.x);
        sums[mine] = sums[mine] + sums[mine + half * tiling.across];
      }
    }
    __syncthreads();
  }
}

template <class Element, bool kSum>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(ColumnGather gather, Tiling tiling, bool vector, bool aligned) {
  constexpr int kN = kLength<Element>;
  PYFT_SHARED(float, sums, kSum ? kThreads * kN : 1);
  const Element* full = static_cast<const Element*>(gather.full.data);
  Element* compact = static_cast<Element*>(gather.compact);
  for_each_tile(tiling, [&](int64_t tile, int64_t slab) {
    const Places<Element> from(tiling, tile, vector, gather.columns, gather.count, gather.full.column_stride, aligned);
    const Places<Element> to(tiling, tile, vector, nullptr, gather.count, 1, true);
    float total[kN] = {};
    for_each_row<Element>(
        tiling, slab, gather.rows, [&](int64_t row) { return from.read(full + row * gather.full.row_stride); },
        [&](int64_t row, const Vector<Element, kN>& values) {
          to.write(compact + row * gather.count, values);
          if constexpr (kSum) {
#pragma unroll
            for (int i = 0; i < kN; ++i) {
              total[i] += to_fp32(values.at[i]);
            }
          }
        });
    if constexpr (kSum) {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        sums[i * kThreads + static_cast<int>(threadIdx.x)] = total[i];
      }
      sum_down(tiling, sums, kN);
      if (static_cast<int>(threadIdx.x) < tiling.across) {
        for (int i = 0; i < kN; ++i) {
          if (to.at[i] >= 0) {
            store(gather.partial + slab * gather.count + to.at[i], sums[i * kThreads + static_cast<int>(threadIdx.x)]);
          }
        }
      }
      __syncthreads();
    }
  });
}

// How the warps of a grid are laid over planes, image by image and channel by channel: in one step a warp moves a tile,
// `across` lanes beside each other in each of kWarp / across planes. Steps that follow each other are neighbours in
// memory.
struct PlaneTiling {
  int across;  // a power of two, a whole warp where there are several tiles
  int64_t tiles, planes, steps;
  Divisor by_tiles, by_count;
};

PlaneTiling plane_tiling(int length, const PlaneGather& gather) {
  int across = 1;
  while (across < kWarp && static_cast<int64_t>(across) * length < gather.size) {
    across *= 2;
  }
  const int64_t tile = static_cast<int64_t>(across) * length, tiles = (gather.size + tile - 1) / tile;
  const int64_t down = kWarp / across, planes = gather.images * gather.count;
  return {across, tiles, planes, (planes + down - 1) / down * tiles, Divisor(tiles), Divisor(gather.count)};
}

// Where a lane's elements of one step lie, and whether there are any.
struct PlanePlace {
  int64_t plane, at;
  uint32_t image, channel, tile;
  bool inside;

  __device__ __forceinline__ PlanePlace(const PlaneTiling& tiling, const PlaneGather& gather, int64_t step, int lane,
                                        int length) {
    // Beyond the last step there may be no 31 bits.
    const uint32_t bounded = static_cast<uint32_t>(step < tiling.steps ? step : 0);
    const uint32_t group = tiling.by_tiles.quotient_of_31_bits(bounded);
    tile = bounded - group * static_cast<uint32_t>(tiling.tiles);
    plane = static_cast<int64_t>(group) * (kWarp / tiling.across) + lane / tiling.across;
    at = (static_cast<int64_t>(tile) * tiling.across + lane % tiling.across) * length;
    inside = step < tiling.steps && plane < tiling.planes && at < gather.size;
    const uint32_t known = inside ? static_cast<uint32_t>(plane) : 0;
    image = tiling.by_count.quotient_of_31_bits(known);
    channel = known - image * static_cast<uint32_t>(gather.count);
  }
};

// kN elements move as one access: those of 16 bytes, or one where a plane does not begin or end at 16 bytes.
template <class Element, int kN, bool kSum>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_planes_kernel(PlaneGather gather, PlaneTiling tiling) {
  constexpr int kSteps = kPlaneSteps<kN>;
  const Element* full = static_cast<const Element*>(gather.full);
  Element* compact = static_cast<Element*>(gather.compact);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = blockIdx.x * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp) * kSteps;
  for (int64_t first = warp * kSteps; first < tiling.steps; first += stride) {
    Vector<Element, kN> values[kSteps] = {};
    // Negative where there is nothing.
    int64_t to[kSteps], slot[kSum ? kSteps : 1];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const PlanePlace place(tiling, gather, first + u, lane, kN);
      to[u] = place.inside ? place.plane * gather.size + place.at : -1;
      if constexpr (kSum) {
        slot[u] = place.inside ? (place.image * tiling.tiles + place.tile) * gather.count + place.channel : -1;
      }
      if (place.inside) {
        const int64_t channel = load(gather.channels + place.channel);
        values[u] =
            load_vector<kN>(full + place.image * gather.image_stride + channel * gather.channel_stride + place.at);
      }
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (to[u] >= 0) {
        store_vector(compact + to[u], values[u]);
      }
    }
    if constexpr (kSum) {
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          sum += to_fp32(values[u].at[i]);
        }
        for (int width = tiling.across / 2; width > 0; width /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, width);
        }
        if (slot[u] >= 0 && lane % tiling.across == 0) {
          store(gather.partial + slot[u], sum);
        }
      }
    }
  }
}

__device__ __forceinline__ void store_rounded(float* place, float x) { store(place, x); }
__device__ __forceinline__ void store_rounded(Bf16* place, float x) { store(place, to_bf16(x)); }
__device__ __forceinline__ void store_rounded(Fp16* place, float x) { store(place, to_fp16(x)); }

// The sums of every `each` slabs, a row of sums for each: eight running sums for each column, and a tree, in double.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(const float* partial, int64_t slabs, int64_t each, int64_t count, Element* sums_of_columns) {
  PYFT_SHARED(double, sums, kThreads);
  const Tiling tiling = {kFinishColumns, (count + kFinishColumns - 1) / kFinishColumns, (slabs + each - 1) / each};
  for_each_tile(tiling, [&](int64_t tile, int64_t group) {
    const int64_t column = tile * kFinishColumns + static_cast<int>(threadIdx.x) % kFinishColumns;
    const int64_t end = (group + 1) * each < slabs ? (group + 1) * each : slabs;
    double total = 0.0;
    if (column < count) {
#pragma unroll 4
      for (int64_t slab = group * each + static_cast<int>(threadIdx.x) / kFinishColumns; slab < end;
           slab += tiling.down()) {
        total += load(partial + slab * count + column);
      }
    }
    sums[static_cast<int>(threadIdx.x)] = total;
    sum_down(tiling, sums, 1);
    if (static_cast<int>(threadIdx.x) < kFinishColumns && column < count) {
      store_rounded(sums_of_columns + group * count + column, static_cast<float>(sums[static_cast<int>(threadIdx.x)]));
    }
    __syncthreads();
  });
}

template <class Element>
__global__ void __launch_bounds__(kThreads, kBlocks)
    write_part_kernel(PartWrite job, Tiling tiling, bool vector, bool aligned) {
  Element* full = static_cast<Element*>(job.full.data);
  const Element* part = static_cast<const Element*>(job.part.data);
  for_each_tile(tiling, [&](int64_t tile, int64_t slab) {
    const Places<Element> from(tiling, tile, vector, nullptr, job.column_count, job.part.column_stride, true);
    const Places<Element> to(tiling, tile, vector, job.columns, job.column_count, job.full.column_stride, aligned);
    for_each_row<Element>(
        tiling, slab, job.row_count, [&](int64_t row) { return from.read(part + row * job.part.row_stride); },
        [&](int64_t row, const Vector<Element, kLength<Element>>& values) {
          to.write(full + (job.rows == nullptr ? row : load(job.rows + row)) * job.full.row_stride, values);
        });
  });
}

// Whether every row begins at 16 bytes and its elements are neighbours.
template <class Element, class Pointer>
bool rows_aligned(const StridedMatrix<Pointer>& matrix) {
  return matrix.column_stride == 1 && matrix.row_stride % kLength<Element> == 0 && vector_aligned(matrix.data);
}

// Sums of a few columns are few blocks' work, so that of many slabs each block takes so many first.
constexpr int64_t kFinishSlabs = 256;

// Slabs and the rows of sums that are made of them on the way.
int64_t room_for_sums(int64_t slabs, int64_t count) {
  return (slabs + (slabs > kFinishSlabs ? (slabs + kFinishSlabs - 1) / kFinishSlabs : 0)) * count;
}

template <class Element, class Gather>
cudaError_t finish_sums(const Gather& gather, int64_t slabs, cudaStream_t stream) {
  const int64_t tiles = (gather.count + kFinishColumns - 1) / kFinishColumns;
  const float* partial = gather.partial;
  if (slabs > kFinishSlabs) {
    float* sums = gather.partial + slabs * gather.count;
    const int64_t groups = (slabs + kFinishSlabs - 1) / kFinishSlabs;
    const cudaError_t error = PYFT_LAUNCH(finish_sums_kernel<float>, UpTo{tiles * groups}, kThreads, stream, partial,
                                          slabs, kFinishSlabs, gather.count, sums);
    if (error != cudaSuccess) {
      return error;
    }
    partial = sums;
    slabs = groups;
  }
  return PYFT_LAUNCH(finish_sums_kernel<Element>, UpTo{tiles}, kThreads, stream, partial, slabs, slabs, gather.count,
                     static_cast<Element*>(gather.sums));
}

template <class Element, bool kSum>
cudaError_t gather_columns(const ColumnGather& gather, cudaStream_t stream) {
  constexpr int kN = kLength<Element>;
  const Tiling tiling = tiling_of(kN, gather.rows, gather.count);
  const bool vector = gather.count % kN == 0 && vector_aligned(gather.compact);
  cudaError_t error = PYFT_LAUNCH((gather_kernel<Element, kSum>), UpTo{tiling.tiles * tiling.slabs}, kThreads, stream,
                                  gather, tiling, vector, rows_aligned<Element>(gather.full));
  if constexpr (kSum) {
    error = error == cudaSuccess ? finish_sums<Element>(gather, tiling.slabs, stream) : error;
  }
  return error;
}

// Whether every plane begins and ends at 16 bytes, in both places.
template <class Element>
bool planes_aligned(const PlaneGather& gather) {
  constexpr int kN = kLength<Element>;
  return gather.size % kN == 0 && gather.image_stride % kN == 0 && gather.channel_stride % kN == 0 &&
         vector_aligned(gather.full, gather.compact);
}

template <class Element, int kN, bool kSum>
cudaError_t gather_planes(const PlaneGather& gather, cudaStream_t stream) {
  constexpr int64_t kStepsOfBlock = kThreads / kWarp * kPlaneSteps<kN>;
  const PlaneTiling tiling = plane_tiling(kN, gather);
  const UpTo blocks = {(tiling.steps + kStepsOfBlock - 1) / kStepsOfBlock};
  cudaError_t error = PYFT_LAUNCH((gather_planes_kernel<Element, kN, kSum>), blocks, kThreads, stream, gather, tiling);
  if constexpr (kSum) {
    error = error == cudaSuccess ? finish_sums<Element>(gather, gather.images * tiling.tiles, stream) : error;
  }
  return error;
}

template <class Element, bool kSum>
cudaError_t gather_planes(const PlaneGather& gather, cudaStream_t stream) {
  return planes_aligned<Element>(gather) ? gather_planes<Element, kLength<Element>, kSum>(gather, stream)
                                         : gather_planes<Element, 1, kSum>(gather, stream);
}

template <class Element>
cudaError_t gather_columns(const ColumnGather& gather, cudaStream_t stream) {
  return gather.sums == nullptr ? gather_columns<Element, false>(gather, stream)
                                : gather_columns<Element, true>(gather, stream);
}

template <class Element>
cudaError_t write_part(const PartWrite& write, cudaStream_t stream) {
  constexpr int kN = kLength<Element>;
  const Tiling tiling = tiling_of(kN, write.row_count, write.column_count);
  const bool vector = write.column_count % kN == 0 && rows_aligned<Element>(write.part);
  return PYFT_LAUNCH(write_part_kernel<Element>, UpTo{tiling.tiles * tiling.slabs}, kThreads, stream, write, tiling,
                     vector, rows_aligned<Element>(write.full));
}

}  // namespace

int64_t column_sum_room(FloatFormat format, int64_t rows, int64_t count) {
  return room_for_sums(tiling_of(format == FloatFormat::fp32 ? kLength<float> : kLength<Bf16>, rows, count).slabs,
                       count);
}

cudaError_t launch_gather_columns(FloatFormat format, const ColumnGather& gather, cudaStream_t stream) {
  if (gather.rows == 0 || gather.count == 0) {
    return cudaSuccess;
  }
  switch (format) {
    case FloatFormat::bf16:
      return gather_columns<Bf16>(gather, stream);
    case FloatFormat::fp16:
      return gather_columns<Fp16>(gather, stream);
    default:
      return gather_columns<float>(gather, stream);
  }
}

bool fits_31_bits(const PlaneGather& gather) {
  const PlaneTiling tiling = plane_tiling(1, gather);
  return tiling.planes < INT32_MAX && tiling.steps < INT32_MAX;
}

int64_t plane_sum_room(FloatFormat format, const PlaneGather& gather) {
  const bool wide = format == FloatFormat::fp32;
  const bool aligned = wide ? planes_aligned<float>(gather) : planes_aligned<Bf16>(gather);
  const int length = aligned ? (wide ? kLength<float> : kLength<Bf16>) : 1;
  return room_for_sums(gather.images * plane_tiling(length, gather).tiles, gather.count);
}

cudaError_t launch_gather_planes(FloatFormat format, const PlaneGather& gather, cudaStream_t stream) {
  if (gather.images == 0 || gather.count == 0 || gather.size == 0) {
    return cudaSuccess;
  }
  if (gather.sums == nullptr) {
    // Bits are moved as they are, so both 16-bit formats share a kernel.
    return format == FloatFormat::fp32 ? gather_planes<float, false>(gather, stream)
                                       : gather_planes<Bf16, false>(gather, stream);
  }
  switch (format) {
    case FloatFormat::bf16:
      return gather_planes<Bf16, true>(gather, stream);
    case FloatFormat::fp16:
      return gather_planes<Fp16, true>(gather, stream);
    default:
      return gather_planes<float, true>(gather, stream);
  }
}

cudaError_t launch_write_part(FloatFormat format, const PartWrite& write, cudaStream_t stream) {
  if (write.row_count == 0 || write.column_count == 0) {
    return cudaSuccess;
  }
  // Bits are moved as they are, so both 16-bit formats share a kernel.
  return format == FloatFormat::fp32 ? write_part<float>(write, stream) : write_part<Bf16>(write, stream);
}

}  // namespace pyft
