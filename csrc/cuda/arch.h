// The device primitives: the only file with inline PTX, and the only one that knows of two worlds.
//
// nvcc compiles each function to the instructions named beside it. A host compiler with
// DLKERNELS_EMULATED calls the emulator (tests/cuda_on_cpu/cuda_on_cpu.h on the include path), so
// that a kernel written on these names, on threadIdx, blockIdx, blockDim and gridDim, and on the
// functions of <cmath> runs in both. Kernels keep to:
//   - no static __shared__: shared_memory() is all of a block's shared memory
//   - no std::atomic, no volatile spins: the atomics below
//   - no threadIdx in a function that runs on the host
// A mask names exactly the lanes that make the call. Nothing but sync_* and fences orders memory:
// shuffles, votes, ldmatrix and mma do not.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef DLKERNELS_EMULATED
#include "cuda_on_cpu.h"
#define DLK_EITHER(emulated_body, ...) emulated_body
#define DLK_KERNEL
#define DLK_DEVICE inline
#define DLK_HOST_DEVICE inline
#define DLK_DEVICE_KEY CPU
#define DLK_SM90 1
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#define DLK_EITHER(emulated_body, ...) __VA_ARGS__
#define DLK_HERE
#define DLK_KERNEL __global__
#define DLK_DEVICE __device__ __forceinline__
#define DLK_HOST_DEVICE __host__ __device__ __forceinline__
#define DLK_DEVICE_KEY CUDA
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DLK_SM90 1
#else
#define DLK_SM90 0
#endif
#endif

// Where the primitive exists from sm_90 on; calls are behind `if constexpr (DLK_SM90)` or a launch
// that only sm_90 makes.
#if DLK_SM90
#define DLK_EITHER_SM90 DLK_EITHER
#else
#define DLK_EITHER_SM90(emulated_body, ...) __trap()
#endif

namespace dlkernels {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(16) Bits16 {
  uint32_t x[4];
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename To, typename From>
DLK_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------------------------------- geometry

// The place of a thread in its block, x fastest: lanes and warps are cut from it.
DLK_DEVICE unsigned thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
DLK_DEVICE int lane() { return int(thread_rank() % kWarp); }
DLK_DEVICE int warp_index() { return int(thread_rank() / kWarp); }

// The block's dynamic shared memory, on 128 bytes.
#ifdef DLKERNELS_EMULATED
DLK_DEVICE unsigned char* shared_memory() { return emulated::shared_memory(); }
#else
DLK_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dlkernels_shared[];
  return dlkernels_shared;
}
DLK_DEVICE unsigned shared_address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}
#endif

// ---------------------------------------------------------------------------------------- barriers

DLK_DEVICE void sync_block(DLK_HERE) {
  DLK_EITHER(emulated::sync_block(file, line), __syncthreads());
}

DLK_DEVICE void sync_warp(unsigned mask = kAllLanes) {
  DLK_EITHER(emulated::sync_warp(mask), __syncwarp(mask));
}

// bar.sync id, threads: the threads are whole warps; id 0 is sync_block's.
DLK_DEVICE void sync_named(int id, int threads) {
  DLK_EITHER(emulated::sync_named(id, threads),
             asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// Of a cooperative launch.
DLK_DEVICE void sync_grid() {
  DLK_EITHER(emulated::sync_grid(), cooperative_groups::this_grid().sync());
}

// Sequentially consistent, at gpu scope: with a relaxed atomic after it a release, before it an
// acquire.
DLK_DEVICE void fence() { DLK_EITHER(emulated::fence(), __threadfence()); }

// ---------------------------------------------------------------------------------------- clusters

// Below sm_90 each block is a cluster of its own.
#if DLK_SM90
DLK_DEVICE unsigned cluster_rank() {
  unsigned rank;
  DLK_EITHER(rank = emulated::cluster_rank(), asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}

DLK_DEVICE unsigned cluster_blocks() {
  unsigned blocks;
  DLK_EITHER(blocks = emulated::cluster_blocks(),
             asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks)));
  return blocks;
}

DLK_DEVICE void cluster_arrive() {
  DLK_EITHER(emulated::cluster_arrive(),
             asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}

DLK_DEVICE void cluster_wait() {
  DLK_EITHER(emulated::cluster_wait(),
             asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

DLK_DEVICE void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of the cluster's block `rank`, for plain loads and stores.
// That block must not have ended: let the last access come before a sync_cluster().
template <typename T>
DLK_DEVICE T* cluster_shared(T* mine, unsigned rank) {
  T* theirs;
  DLK_EITHER(theirs = static_cast<T*>(emulated::cluster_shared(mine, rank)),
             asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank)));
  return theirs;
}
#else
DLK_DEVICE unsigned cluster_rank() { return 0; }
DLK_DEVICE unsigned cluster_blocks() { return 1; }
DLK_DEVICE void cluster_arrive() {}
DLK_DEVICE void cluster_wait() { sync_block(); }
DLK_DEVICE void sync_cluster() { sync_block(); }
template <typename T>
DLK_DEVICE T* cluster_shared(T* mine, unsigned) {
  return mine;
}
#endif

// ------------------------------------------------------------------------------ shuffles and votes

template <typename T>
using shuffle_bits_t = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;

// From the lane whose number is this one's xor `lanes`.
template <typename T>
DLK_DEVICE T shuffle_xor(unsigned mask, T value, int lanes) {
  using Bits = shuffle_bits_t<T>;
  const Bits bits = bit_cast<Bits>(value);
  return bit_cast<T>(Bits(
      DLK_EITHER(emulated::shuffle_xor(mask, bits, lanes), __shfl_xor_sync(mask, bits, lanes))));
}

// From `delta` lanes further; its own value where there is none.
template <typename T>
DLK_DEVICE T shuffle_down(unsigned mask, T value, int delta) {
  using Bits = shuffle_bits_t<T>;
  const Bits bits = bit_cast<Bits>(value);
  return bit_cast<T>(Bits(DLK_EITHER(emulated::shuffle_down(mask, bits, delta),
                                     __shfl_down_sync(mask, bits, unsigned(delta)))));
}

template <typename T>
DLK_DEVICE T shuffle_up(unsigned mask, T value, int delta) {
  using Bits = shuffle_bits_t<T>;
  const Bits bits = bit_cast<Bits>(value);
  return bit_cast<T>(Bits(DLK_EITHER(emulated::shuffle_up(mask, bits, delta),
                                     __shfl_up_sync(mask, bits, unsigned(delta)))));
}

// From lane `source` modulo 32.
template <typename T>
DLK_DEVICE T shuffle_from(unsigned mask, T value, int source) {
  using Bits = shuffle_bits_t<T>;
  const Bits bits = bit_cast<Bits>(value);
  return bit_cast<T>(Bits(
      DLK_EITHER(emulated::shuffle_from(mask, bits, source), __shfl_sync(mask, bits, source))));
}

DLK_DEVICE unsigned ballot(unsigned mask, bool p) {
  return DLK_EITHER(emulated::ballot(mask, p), __ballot_sync(mask, p));
}
DLK_DEVICE bool any(unsigned mask, bool p) {
  return DLK_EITHER(emulated::ballot(mask, p) != 0, __any_sync(mask, p) != 0);
}
DLK_DEVICE bool all(unsigned mask, bool p) {
  return DLK_EITHER(emulated::ballot(mask, p) == mask, __all_sync(mask, p) != 0);
}

// ----------------------------------------------------------------------------------------- atomics

// Relaxed, at gpu scope, in global or shared memory; each returns the value before.
// T = int, unsigned, uint64_t, and for sums float and double.
#ifdef DLKERNELS_EMULATED
template <typename T>
DLK_DEVICE T atomic_add(T* address, std::type_identity_t<T> value) {
  return emulated::atomic_add(address, value);
}
template <typename T>
DLK_DEVICE T atomic_max(T* address, std::type_identity_t<T> value) {
  return emulated::atomic_max(address, value);
}
template <typename T>
DLK_DEVICE T atomic_exchange(T* address, std::type_identity_t<T> value) {
  return emulated::atomic_exchange(address, value);
}
template <typename T>
DLK_DEVICE T atomic_cas(T* address, std::type_identity_t<T> compare,
                        std::type_identity_t<T> value) {
  return emulated::atomic_cas(address, compare, value);
}
#else
// uint64_t is unsigned long, which the built-in functions do not know.
template <typename T>
using atomic_t = std::conditional_t<std::is_integral_v<T> && sizeof(T) == 8, unsigned long long, T>;
template <typename T>
DLK_DEVICE T atomic_add(T* address, std::type_identity_t<T> value) {
  return T(atomicAdd(reinterpret_cast<atomic_t<T>*>(address), atomic_t<T>(value)));
}
template <typename T>
DLK_DEVICE T atomic_max(T* address, std::type_identity_t<T> value) {
  return T(atomicMax(reinterpret_cast<atomic_t<T>*>(address), atomic_t<T>(value)));
}
template <typename T>
DLK_DEVICE T atomic_exchange(T* address, std::type_identity_t<T> value) {
  return T(atomicExch(reinterpret_cast<atomic_t<T>*>(address), atomic_t<T>(value)));
}
template <typename T>
DLK_DEVICE T atomic_cas(T* address, std::type_identity_t<T> compare,
                        std::type_identity_t<T> value) {
  return T(
      atomicCAS(reinterpret_cast<atomic_t<T>*>(address), atomic_t<T>(compare), atomic_t<T>(value)));
}
#endif

DLK_DEVICE unsigned load_acquire(const unsigned* address) {
  unsigned value;
  DLK_EITHER(value = emulated::load_acquire(address),
             asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"));
  return value;
}

DLK_DEVICE void store_release(unsigned* address, unsigned value) {
  DLK_EITHER(emulated::store_release(address, value),
             asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"));
}

// ----------------------------------------------------------------------- 16 bytes, all on 16 bytes

DLK_DEVICE Bits16 load16(const void* address) {
  return DLK_EITHER(bit_cast<Bits16>(emulated::load16(address)),
                    *static_cast<const Bits16*>(address));
}

DLK_DEVICE void store16(void* address, Bits16 v) {
  DLK_EITHER(emulated::store16(address, bit_cast<emulated::Words16>(v)),
             *static_cast<Bits16*>(address) = v);
}

// Of global memory that no thread of this launch writes, and that is read once: past L1.
DLK_DEVICE Bits16 load_streaming(const void* global) {
  Bits16 v;
  DLK_EITHER(
      v = bit_cast<Bits16>(emulated::load_streaming(global)),
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x[0]),
                   "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3]) : "l"(global)));
  return v;
}

// To global memory. Plain stores become four of 4 bytes where many branches lead to them.
DLK_DEVICE void store_global(void* global, Bits16 v) {
  DLK_EITHER(emulated::store16(global, bit_cast<emulated::Words16>(v)),
             asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x[0]),
                          "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3]) : "memory"));
}

// To global memory that will not be read soon: first to leave L2.
DLK_DEVICE void store_streaming(void* global, Bits16 v) {
  DLK_EITHER(emulated::store16(global, bit_cast<emulated::Words16>(v)),
             asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x[0]),
                          "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3]) : "memory"));
}

// ------------------------------------------------------------------------------------ async copies

// 16 bytes from global to shared memory, zeros where not valid (`global` is then not read). A
// thread waits for its own copies; the other threads' are seen after a barrier.
DLK_DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
  DLK_EITHER(
      emulated::copy_async16(shared, global, valid),
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                   "l"(global), "r"(valid ? 16 : 0) : "memory"));
}

DLK_DEVICE void copy_async_commit() {
  DLK_EITHER(emulated::copy_async_commit(), asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Until at most the N youngest groups are under way.
template <int N>
DLK_DEVICE void copy_async_wait() {
  DLK_EITHER(emulated::copy_async_wait(N),
             asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"));
}

// An mbarrier in shared memory: each phase ends when `arrivals` threads have arrived and all bytes
// announced for it are there. One thread initialises it, before a sync_block().
DLK_DEVICE void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#ifdef DLKERNELS_EMULATED
  emulated::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#if DLK_SM90  // to be seen by the other blocks of the cluster, and by the copy engine
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
#endif
}

DLK_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  DLK_EITHER(emulated::mbarrier_arrive(barrier, 0),
             asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                 shared_address(barrier)) : "memory"));
}

// Arrives, and announces bytes of bulk copies to this phase.
DLK_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  DLK_EITHER_SM90(emulated::mbarrier_arrive(barrier, bytes),
                  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                                   shared_address(barrier)),
                               "r"(bytes) : "memory"));
}

// Until the phase of this parity has ended; phases are 0, 1, 0, …
DLK_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef DLKERNELS_EMULATED
  emulated::mbarrier_wait(barrier, parity);
#else
  unsigned done;
  do {
#if DLK_SM90
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
  } while (!done);
#endif
}

// `bytes` (a multiple of 16, both ends on 16) from global to shared memory, by the copy engine; to
// be called by one thread, after it has announced them.
DLK_DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  DLK_EITHER_SM90(emulated::bulk_copy(shared, global, bytes, barrier),
                  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                               "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                               "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
}

// ---------------------------------------------------------------------------------------- matrices

// Four 8×8 matrices of 16 bits: lane i gives the address of row i%8 of matrix i/8; r[j] of lane i
// gets elements (i/4, 2·(i%4) + {0, 1}) of matrix j, the transposed form those of its transpose.
DLK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  DLK_EITHER(emulated::ldmatrix_x4(r, shared_row, false),
             asm volatile(
                 "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                 "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory"));
}

DLK_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  DLK_EITHER(
      emulated::ldmatrix_x4(r, shared_row, true),
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
          "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory"));
}

// d += a·b of a warp: a 16×16, b 16×8, d 16×8, with g = lane/4 and t = lane%4
//   d[i]       (g + 8·(i/2), 2t + i%2)
//   a[i] pair  (g + 8·(i%2), 2t + 8·(i/2) + {0, 1})
//   b[i] pair  (2t + 8·i + {0, 1}, g)
template <typename T>
DLK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef DLKERNELS_EMULATED
  emulated::mma_m16n8k16(d, a, b, std::is_same_v<T, bf16>);
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same for 16×8 times 8×8 of TF32 (floats whose low 13 bits are not read):
//   a[i]  (g + 8·(i%2), t + 4·(i/2))
//   b[i]  (t + 4·i, g)
DLK_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  DLK_EITHER(emulated::mma_m16n8k8(d, a, b),
             asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                 "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                 "r"(b[0]), "r"(b[1])));
}

// ----------------------------------------------------------------------------------------- numbers

// 2^x to 2 ulp, log2 x to 2^-22 (absolute near 1); both take and give 0 for subnormal numbers.
DLK_DEVICE float exp2_approximate(float x) {
  float y;
  DLK_EITHER(y = emulated::exp2_approximate(x),
             asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
  return y;
}

DLK_DEVICE float log2_approximate(float x) {
  float y;
  DLK_EITHER(y = emulated::log2_approximate(x),
             asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
  return y;
}

DLK_DEVICE float tanh_accurate(float x) { return tanhf(x); }

DLK_DEVICE float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

DLK_DEVICE float to_float(f16 x) {
  float y;
  DLK_EITHER(y = emulated::to_float_f16(x.bits),
             asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)));
  return y;
}

// Round to nearest even; a NaN becomes 0x7fff. S = bf16, f16.
template <typename S>
DLK_DEVICE S from_float(float x) {
  S y;
  if constexpr (std::is_same_v<S, bf16>) {
    DLK_EITHER(y.bits = emulated::from_float_bf16(x),
               asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)));
  } else {
    static_assert(std::is_same_v<S, f16>);
    DLK_EITHER(y.bits = emulated::from_float_f16(x),
               asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)));
  }
  return y;
}

// Two S in 32 bits, the first in the low half.
template <typename S>
DLK_DEVICE void unpack2(uint32_t bits, float& low, float& high) {
  low = to_float(S{uint16_t(bits)});
  high = to_float(S{uint16_t(bits >> 16)});
}

template <typename S>
DLK_DEVICE uint32_t pack2(float low, float high) {
#ifdef DLKERNELS_EMULATED
  return from_float<S>(low).bits | uint32_t(from_float<S>(high).bits) << 16;
#else
  uint32_t bits;
  if constexpr (std::is_same_v<S, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#endif
}

// The larger of each half of two pairs; of a number and a NaN the number.
template <typename S>
DLK_DEVICE uint32_t max2(uint32_t a, uint32_t b) {
#ifdef DLKERNELS_EMULATED
  float low[2], high[2];
  unpack2<S>(a, low[0], high[0]);
  unpack2<S>(b, low[1], high[1]);
  return pack2<S>(std::fmax(low[0], low[1]), std::fmax(high[0], high[1]));
#else
  uint32_t c;
  if constexpr (std::is_same_v<S, bf16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#endif
}

// ----------------------------------------------------------------------------------------- failure

// On the GPU: prints, and ends the kernel as a failed assert does ("device-side assert triggered").
// Emulated: the launch throws std::out_of_range of the formatted text.
#ifdef DLKERNELS_EMULATED
#define DLK_DEVICE_CHECK_INDEX(condition, ...)        \
  do {                                                \
    if (!(condition)) [[unlikely]]                    \
      ::dlkernels::emulated::fail_index(__VA_ARGS__); \
  } while (0)
#else
#define DLK_DEVICE_CHECK_INDEX(condition, format, ...)         \
  do {                                                         \
    if (!(condition)) {                                        \
      printf(format "\n" __VA_OPT__(, ) __VA_ARGS__);          \
      __assert_fail(#condition, __FILE__, __LINE__, __func__); \
    }                                                          \
  } while (0)
#endif

}  // namespace dlkernels
