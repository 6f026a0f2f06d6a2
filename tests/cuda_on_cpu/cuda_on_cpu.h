// CUDA on a CPU: runs a kernel that is written on csrc/cuda/arch.h, and checks it.
//
// A kernel is compiled by the host's g++ with -DDLKERNELS_EMULATED and -fsanitize=thread, whose
// instrumentation calls a function at every memory access. The emulator has these functions: it is
// compiled, and all is linked, without that flag. tests/emulator.py has the commands.
//
// A CUDA thread is a fiber; barriers, shuffles and waits switch between fibers, in an order drawn
// from a seed. Blocks run one after another, those of a cluster or of a cooperative grid together.
//
// A failure is an exception of launch(), or of the end of the entry, with kernel, block, thread,
// place in the source and offset into the buffer:
//   memory    access outside shared memory or tracked memory, write to an input, misaligned access,
//             another thread's stack, shared memory of an ended block of the cluster. (What misses
//             its tensor and meets another tracked one is an access to that one.)
//   values    read of shared, scratch or output memory that was not written; bytes of an async
//             copy before its wait; an output not entirely written when the entry ends;
//             load_streaming of memory that the launch writes
//   races     two accesses to a byte by two threads, one a write, not both atomic, neither before
//             the other by barriers (block, named, warp, cluster, grid, mbarrier) or by release and
//             acquire (load_acquire, store_release; fence() with an atomic, on both sides)
//   barriers  sync_block in divergent code or beside an ended thread; a mask without the caller or
//             with a lane that does not come; deadlock; a launch of impossible shape
// Ended threads and lanes count as faults also where the GPU would go on without them.
// Seed: DLKERNELS_EMULATED_SEED (a number), else another one at each launch; messages name it.
//
// A host entry opens an EntryScope that lives to its end, tracks each tensor, and launches:
//   launch({.name = "kernel", .grid = …, .block = …}, [=] { kernel(a, b); })
// with the arguments by value. Launches of one entry are ordered as in a stream. Entries may run in
// several threads at once; their launches take turns.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

// ---------------------------------------------------------------- names that CUDA C++ has built in

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (::dlkernels::emulated::thread_index())
#define blockIdx (::dlkernels::emulated::block_index())
#define blockDim (::dlkernels::emulated::block_dim())
#define gridDim (::dlkernels::emulated::grid_dim())

namespace dlkernels::emulated {

// ---------------------------------------------------------------------------------- for common.cuh

enum class Kind {
  kInput,    // read only
  kOutput,   // every element written by the end of the entry, none read before
  kInOut,    // read and written
  kScratch,  // read only where written in this entry
};

// Opens the tracking of a host entry's memory on this thread. The destructor throws when the entry
// ends without another exception and an output is not entirely written.
class EntryScope {
 public:
  EntryScope();
  ~EntryScope() noexcept(false);
  EntryScope(const EntryScope&) = delete;
  EntryScope& operator=(const EntryScope&) = delete;

 private:
  int exceptions_;
};

// Lets the launches of the entry use the elements of a tensor: sizes and strides in elements of
// `item` bytes. The same memory may be tracked again: as the same kind or as a part of an output
// (nothing happens), as an input and an output of an op in place, or as new scratch.
void track(const char* name, const void* data, int64_t item, int64_t dims, const int64_t* sizes,
           const int64_t* strides, Kind kind);

struct Launch {
  const char* name;
  dim3 grid = {}, block = {};
  size_t shared = 0;
  unsigned cluster = 1;  // blocks along x
  bool cooperative = false;
};

void run(const Launch& launch, const void* body, size_t bytes, void (*call)(const void*));

// Calls body() in every thread. The body holds the kernel's arguments by value.
template <typename Body>
void launch(const Launch& launch, const Body& body) {
  run(launch, &body, sizeof(Body), [](const void* b) { (*static_cast<const Body*>(b))(); });
}

// The device: DLKERNELS_EMULATED_CC=80 is one without clusters; _MULTIPROCESSORS and _SHARED (KB a
// block) make one on which work is cut otherwise.
int compute_capability();
int multiprocessors();
size_t shared_limit();  // bytes a block

// -------------------------------------------------------------------------------------- for arch.h

// Where a primitive is called, as default arguments.
#define DLK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
unsigned char* shared_memory();

void sync_block(const char* file, int line);
void sync_warp(unsigned mask);
void sync_named(int id, int threads);
void sync_grid();
void fence();

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive();
void cluster_wait();
void* cluster_shared(const void* mine, unsigned rank);

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes);
uint64_t shuffle_down(unsigned mask, uint64_t value, int delta);
uint64_t shuffle_up(unsigned mask, uint64_t value, int delta);
uint64_t shuffle_from(unsigned mask, uint64_t value, int source);
unsigned ballot(unsigned mask, bool p);

template <typename T>
T atomic_add(T* address, T value);
template <typename T>
T atomic_max(T* address, T value);
template <typename T>
T atomic_exchange(T* address, T value);
template <typename T>
T atomic_cas(T* address, T compare, T value);
unsigned load_acquire(const unsigned* address);
void store_release(unsigned* address, unsigned value);

struct Words16 {
  uint64_t low, high;
};
Words16 load16(const void* address);
Words16 load_streaming(const void* address);
void store16(void* address, Words16 value);

void copy_async16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, bool transposed);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16);
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

float exp2_approximate(float x);
float log2_approximate(float x);
float to_float_f16(uint16_t bits);
uint16_t from_float_f16(float x);
uint16_t from_float_bf16(float x);

[[noreturn]] void fail_index(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace dlkernels::emulated
