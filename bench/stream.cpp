// The fastest way found to read four fp32 arrays and write three of them in place: what an optimizer update can reach.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

__attribute__((target_clones("default", "avx2", "avx512f"))) static void add_block(float* __restrict__ a,
                                                                                  const float* __restrict__ b,
                                                                                  float* __restrict__ c,
                                                                                  float* __restrict__ d, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = b[i] * 0.5f;
    a[i] += x;
    c[i] += x;
    d[i] -= x;
  }
}

static void add_chunk(float* a, const float* b, float* c, float* d, int64_t n, int streams, int64_t block) {
  if (streams == 1) {
    return add_block(a, b, c, d, n);
  }
  constexpr int64_t kSkew = 512;
  const int64_t part = (n - kSkew * streams) / streams / block * block;
  for (int64_t i = 0; i < part; i += block) {
    for (int s = 0; s < streams; ++s) {
      const int64_t o = s * (part + kSkew) + i;
      add_block(a + o, b + o, c + o, d + o, block);
    }
  }
  for (int s = 0; s < streams; ++s) {
    const int64_t o = s * (part + kSkew) + part, end = s + 1 < streams ? (s + 1) * (part + kSkew) : n;
    add_block(a + o, b + o, c + o, d + o, end - o);
  }
}

extern "C" void stream(float* a, const float* b, float* c, float* d, int64_t n, int threads, int64_t chunk, int streams,
                       int64_t block) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t o = chunk * next++; o < n; o = chunk * next++) {
      const int64_t length = std::min(chunk, n - o);
      add_chunk(a + o, b + o, c + o, d + o, length, length < chunk ? 1 : streams, block);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back(work);
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}
