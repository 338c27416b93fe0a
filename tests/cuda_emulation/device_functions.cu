// What the emulation's functions give, against plain loops: device_functions ORDER [SEED]. A line for each that
// differs; then the order in which threads ran, and the traffic of two kernels.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda_launch.h"
#include "division_math.h"

namespace {

using namespace pyft;

constexpr int kThreads = 96;

struct Found {
  int index, up, down, turned, broadcast, within, count;
  unsigned ballot;
  bool any, all, at_least_one, everybody;
  double wide;
};

__global__ void warp_functions(Found* found) {
  const int t = threadIdx.x, lane = t % kWarp;
  Found f{};
  f.index = t;
  f.up = __shfl_up_sync(kAllLanes, t, 3);
  f.down = __shfl_down_sync(kAllLanes, t, 5);
  f.turned = __shfl_xor_sync(kAllLanes, t, 6);
  f.broadcast = __shfl_sync(kAllLanes, t, 9);
  f.within = __shfl_down_sync(kAllLanes, t, 3, 8);
  f.wide = __shfl_sync(kAllLanes, 0.1 * t, lane + 1);
  f.ballot = __ballot_sync(kAllLanes, t % 3 == 0);
  f.any = __any_sync(kAllLanes, t == 40) != 0;
  f.all = __all_sync(kAllLanes, t < 70) != 0;
  f.count = __syncthreads_count(t % 5 == 0);
  f.at_least_one = __syncthreads_or(t == 200) != 0;
  f.everybody = __syncthreads_and(t < 96) != 0;
  if (lane < 16) {
    f.turned += __shfl_xor_sync(0xffffu, t, 1);
  }
  store(found + t, f);
}

struct Atomics {
  int sum, largest, smallest;
  unsigned ring, swapped;
  unsigned long long long_sum;
  float float_sum;
  double double_sum;
};

__global__ void atomics(Atomics* a, int* tickets) {
  PYFT_SHARED(int, taken, 1);
  const int t = threadIdx.x + blockIdx.x * blockDim.x;
  if (threadIdx.x == 0) {
    taken[0] = 0;
  }
  __syncthreads();
  const int ticket = atomicAdd(&taken[0], 1);
  if (blockIdx.x == 0) {
    store(tickets + threadIdx.x, ticket);
  }
  atomicAdd(&a->sum, t);
  atomicMax(&a->largest, t);
  atomicMin(&a->smallest, -t);
  atomicInc(&a->ring, 9);
  atomicCAS(&a->swapped, 7u, 8u);
  atomicAdd(&a->long_sum, 1ull << 40);
  atomicAdd(&a->float_sum, 0.5f);
  atomicAdd(&a->double_sum, 0.25);
}

__global__ void copy_in_vectors(const float* x, float* y) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  store_vector(y + i, load_vector<4>(x + i));
}

__global__ void copy_every_eighth(const float* x, float* y) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  store(y + i, load(x + i));
}

void expect(bool right, const char* what, int i) {
  if (!right) {
    std::printf("wrong: %s at %d\n", what, i);
  }
}

void check_warp_functions() {
  std::vector<Found> found(kThreads);
  PYFT_LAUNCH(warp_functions, 1, kThreads, nullptr, found.data());
  for (int t = 0; t < kThreads; ++t) {
    const Found& f = found[t];
    const int first = t / 32 * 32, lane = t % 32;
    unsigned ballot = 0;
    for (int l = 0; l < 32; ++l) {
      ballot |= (first + l) % 3 == 0 ? 1u << l : 0u;
    }
    expect(f.index == t, "index", t);
    expect(f.up == (lane < 3 ? t : t - 3), "shuffle up", t);
    expect(f.down == (lane + 5 > 31 ? t : t + 5), "shuffle down", t);
    expect(f.turned == (t ^ 6) + (lane < 16 ? t ^ 1 : 0), "shuffle xor", t);
    expect(f.broadcast == first + 9, "shuffle", t);
    expect(f.within == (t % 8 + 3 > 7 ? t : t + 3), "shuffle of width 8", t);
    expect(f.wide == 0.1 * (first + (lane + 1) % 32), "shuffle of a double", t);
    expect(f.ballot == ballot, "ballot", t);
    expect(f.any == (first == 32), "any", t);
    expect(f.all == (first < 64), "all", t);
    expect(f.count == 20, "barrier that counts", t);
    expect(!f.at_least_one && f.everybody, "barrier that votes", t);
  }
}

void check_atomics() {
  Atomics a{0, -1000, 1000, 0, 7, 0, 0.0f, 0.0};
  std::vector<int> tickets(kThreads);
  PYFT_LAUNCH(atomics, 2, kThreads, nullptr, &a, tickets.data());
  const int n = 2 * kThreads;
  expect(a.sum == n * (n - 1) / 2, "atomicAdd", a.sum);
  expect(a.largest == n - 1 && a.smallest == 1 - n, "atomicMax, atomicMin", a.largest);
  expect(a.ring == n % 10, "atomicInc", static_cast<int>(a.ring));
  expect(a.swapped == 8, "atomicCAS", static_cast<int>(a.swapped));
  expect(a.long_sum == static_cast<unsigned long long>(n) << 40, "atomicAdd of 64 bits", 0);
  expect(a.float_sum == n / 2.0f && a.double_sum == n / 4.0, "atomicAdd of floats", 0);
  std::printf("order");
  for (int ticket : tickets) {
    std::printf(" %d", ticket);
  }
  std::printf("\n");
}

void check_divisors() {
  const std::vector<int64_t> edges = {1,     2,          3,          5,          7,          64,       641,
                                      65537, 0x40000000, 0x7ffffffe, 0x7fffffff, 0x80000000, 1ll << 40};
  for (int64_t by : edges) {
    const Divisor divisor(by);
    for (int64_t times : edges) {
      for (int64_t more : {-1, 0, 1}) {
        const int64_t n = times * (times < (1 << 20) ? by : 1) + more;
        expect(divisor.quotient(n) == n / by, "quotient", static_cast<int>(by));
      }
    }
  }
}

void show_traffic() {
  std::vector<float> x(8 * 256 + 8), y(x.size());
  float* from = x.data() + (8 - reinterpret_cast<uintptr_t>(x.data()) / 4 % 8) % 8;
  float* to = y.data() + (8 - reinterpret_cast<uintptr_t>(y.data()) / 4 % 8) % 8;
  cuda_emulation::settings.traffic = true;
  PYFT_LAUNCH(copy_in_vectors, 2, 256, nullptr, from, to);
  PYFT_LAUNCH(copy_every_eighth, 1, 256, nullptr, from, to);
  for (const auto& [name, kernel] : cuda_emulation::traffic.by_kernel) {
    for (const auto& flow : {kernel.loads, kernel.stores}) {
      if (flow.accesses > 0) {
        std::printf("%s %ld %ld %ld %ld %ld\n", name.c_str(), flow.accesses, flow.bytes, flow.wide, flow.sectors,
                    flow.warp_accesses);
      }
    }
  }
}

void check_runtime() {
  dim3 grid;
  for (const auto [blocks, expected] : {std::pair{1000, 6u}, {2, 2u}, {0, 1u}}) {
    const cudaError_t fitted = UpTo{blocks}.resolve(atomics, 256, grid);
    expect(fitted == cudaSuccess && grid.x == expected, "grid by occupancy and need", static_cast<int>(grid.x));
  }
  const cudaError_t error = PYFT_LAUNCH(atomics, 1, 2000, nullptr, nullptr, nullptr);
  expect(error == cudaErrorInvalidConfiguration, "block of 2000 threads", error);
}

}  // namespace

int main(int count, char** words) {
  const std::string order = words[1];
  cuda_emulation::settings.order = order == "ascending"    ? cuda_emulation::Order::ascending
                                   : order == "descending" ? cuda_emulation::Order::descending
                                                           : cuda_emulation::Order::random;
  cuda_emulation::settings.seed = count > 2 ? std::stoull(words[2]) : 0;
  check_warp_functions();
  check_atomics();
  check_divisors();
  check_runtime();
  show_traffic();
}
