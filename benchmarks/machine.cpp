// What this machine can do at best: the ceilings that a benchmark row is held against.
// Built at run time by machine.py with the system compiler and called through ctypes; it is no
// part of the package. Wide instructions stand only in functions with a target attribute, and run
// only where the CPU says that it has them, so one build serves every x86-64 machine.
//
// Every function returns its best of several trials: a ceiling is what the machine reaches when
// nothing disturbs it. Negative means that it could not be measured.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

bool pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof(set), &set) == 0;  // 0: the calling thread only
}

// Runs work(0..threads-1) at once, each on a CPU of its own while there are enough, and returns
// the seconds from the moment that all are ready to the end of the last.
template <typename Work>
double timed_team(int threads, const Work& work) {
  const std::vector<int> cpus = allowed_cpus();
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      if (!cpus.empty()) pin(cpus[t % cpus.size()]);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  while (ready.load() < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& member : team) member.join();
  return seconds_since(start);
}

// Stores past the cache: an ordinary store first reads the line that it will overwrite, which
// makes three transfers of every two.
void stream_copy(float* to, const float* from, int64_t n) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < 16; j += 4) _mm_stream_ps(to + i + j, _mm_loadu_ps(from + i + j));
  _mm_sfence();
#else
  std::memcpy(to, from, n * sizeof(float));
#endif
}

// x <- x * a + b on independent chains, enough of them to hide the latency of an FMA (4 or 5
// cycles) on two ports.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) float fma_avx512(int64_t steps, float a, float b) {
  __m512 x[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_set1_ps(0.1f * i);
  const __m512 va = _mm512_set1_ps(a), vb = _mm512_set1_ps(b);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_fmadd_ps(x[i], va, vb);
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += _mm512_reduce_add_ps(x[i]);
  return sum;
}

__attribute__((target("avx2,fma"))) float fma_avx2(int64_t steps, float a, float b) {
  __m256 x[12];
  for (int i = 0; i < 12; ++i) x[i] = _mm256_set1_ps(0.1f * i);
  const __m256 va = _mm256_set1_ps(a), vb = _mm256_set1_ps(b);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = _mm256_fmadd_ps(x[i], va, vb);
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += _mm256_cvtss_f32(x[i]);
  return sum;
}
#endif

// Four lanes of the compiler's own vectors: SSE2 multiply and add, or NEON's fused one.
float fma_plain(int64_t steps, float a, float b) {
  typedef float Vec __attribute__((vector_size(16)));
  Vec x[12];
  for (int i = 0; i < 12; ++i) x[i] = Vec{} + 0.1f * i;
  const Vec va = Vec{} + a, vb = Vec{} + b;
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = x[i] * va + vb;
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += x[i][0];
  return sum;
}

}  // namespace

extern "C" {

// Nanoseconds that a cache line takes from one core to another: half a round trip, in which A
// writes, B answers, and A sees it. -1: fewer than two CPUs may be used. -2: the threads could not
// be pinned.
double core_latency_ns(int trips, int trials) {
  const std::vector<int> cpus = allowed_cpus();
  if (cpus.size() < 2) return -1;
  alignas(128) std::atomic<int> line{0};
  double best = 1e30;
  bool pinned = true;
  for (int trial = 0; trial < trials; ++trial) {
    line.store(0);
    std::atomic<bool> other_pinned{true}, other_ready{false};
    double elapsed = 0;
    std::thread other([&] {
      other_pinned.store(pin(cpus[1]));
      other_ready.store(true);
      for (int i = 0; i < trips; ++i) {
        while (line.load(std::memory_order_acquire) != 2 * i + 1) {
        }
        line.store(2 * i + 2, std::memory_order_release);
      }
    });
    std::thread first([&] {
      if (!pin(cpus[0])) pinned = false;
      while (!other_ready.load()) {
      }
      const auto start = Clock::now();
      for (int i = 0; i < trips; ++i) {
        line.store(2 * i + 1, std::memory_order_release);
        while (line.load(std::memory_order_acquire) != 2 * i + 2) {
        }
      }
      elapsed = seconds_since(start);
    });
    first.join();
    other.join();
    pinned = pinned && other_pinned.load();
    best = std::min(best, elapsed / trips / 2 * 1e9);
  }
  return pinned ? best : -2;
}

// GB/s, read and written bytes together, of copying `bytes` with streaming or ordinary stores,
// whichever is faster. -3: no memory.
double copy_gb_s(int threads, int64_t bytes, int trials) {
  const int64_t part = bytes / sizeof(float) / threads / 16 * 16;  // per thread, whole lines
  const size_t size = static_cast<size_t>(part) * threads * sizeof(float);
  float* from = static_cast<float*>(std::aligned_alloc(64, size));
  float* to = static_cast<float*>(std::aligned_alloc(64, size));
  double best = -3;
  if (from && to) {
    std::memset(from, 1, size);
    std::memset(to, 2, size);
    for (int trial = 0; trial < 2 * trials; ++trial) {
      const double elapsed = timed_team(threads, [&](int t) {
        if (trial % 2)
          std::memcpy(to + t * part, from + t * part, part * sizeof(float));
        else
          stream_copy(to + t * part, from + t * part, part);
      });
      best = std::max(best, 2.0 * size / elapsed * 1e-9);
    }
  }
  std::free(from);
  std::free(to);
  return best;
}

// GFLOP/s of float32 multiply-adds held in registers, all threads together; *lanes tells the
// vector width that was used.
double fma_gflops(int threads, int64_t steps, int trials, int* lanes) {
  float (*loop)(int64_t, float, float) = fma_plain;
  int chains = 12;
  *lanes = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    loop = fma_avx512, chains = 16, *lanes = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    loop = fma_avx2, *lanes = 8;
  }
#endif
  double best = 0;
  std::atomic<float> sink{0};
  for (int trial = 0; trial < trials; ++trial) {
    const double elapsed =
        timed_team(threads, [&](int) { sink.store(loop(steps, 0.999f, 0.001f)); });
    best = std::max(best, 2.0 * chains * *lanes * steps * threads / elapsed * 1e-9);
  }
  return best;
}

}  // extern "C"
