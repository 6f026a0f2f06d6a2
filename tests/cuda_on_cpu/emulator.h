// The emulator's inside: what its three parts share.
//   scheduler.cpp    fibers, launches, reports
//   memory.cpp       tracked memory, races, the functions that the instrumentation calls
//   primitives.cpp   barriers, shuffles, atomics, copies, matrices, numbers
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "cuda_on_cpu.h"

namespace dlkernels::emulated {

struct Block;

// ------------------------------------------------------------------------------------------ epochs

// block : 28 | clock : 24 | thread : 10. Block numbers count up within an entry, from 1 on.
constexpr int kThreadBits = 10, kClockBits = 24, kBlockShift = kThreadBits + kClockBits;
constexpr uint64_t kThreadMask = (1 << kThreadBits) - 1, kClockMask = (1 << kClockBits) - 1;
constexpr uint64_t kBefore = 1;            // written before the entry
constexpr uint64_t kPending = 1ull << 62;  // with an epoch: an async copy that has not arrived
constexpr uint64_t kRecord = 1ull << 63;   // with an index: the accesses are in a Record
constexpr uint64_t kBlockMask = (1 << 28) - 1;

inline uint64_t block_of(uint64_t epoch) { return (epoch >> kBlockShift) & kBlockMask; }
inline uint32_t clock_of(uint64_t epoch) { return uint32_t((epoch >> kThreadBits) & kClockMask); }
inline uint32_t thread_of(uint64_t epoch) { return uint32_t(epoch & kThreadMask); }

// ------------------------------------------------------------------------------------------ memory

// The last write of some bytes (0: none), and the reads since: none, one, or a record's index.
struct Cell {
  uint64_t write, read;
  uint32_t write_pc, read_pc;
};

// Concurrent accesses of lanes of one warp at one clock.
struct Accesses {
  uint64_t epoch;  // its thread: the warp's first
  uint32_t lanes, pc;
};

// What a cell cannot hold: several readers, and atomic accesses.
struct Record {
  std::vector<Accesses> reads, atomic_reads, atomic_writes;
};

struct Records {
  std::deque<Record> all;
  std::vector<uint32_t> free;
  uint32_t take();
  void give(uint32_t index);
  void clear();
};

struct Region {
  std::string name;
  Kind kind = Kind::kScratch;
  uintptr_t low = 0, base = 0;  // base: low, on 16 bytes, where the cells begin
  size_t bytes = 0;
  Cell* cells = nullptr;  // one for each 1 << shift bytes; inputs have none
  size_t cell_count = 0, capacity = 0;
  int shift = 2;
  Records* records = nullptr;
  Block* block = nullptr;  // whose shared memory it is
  int64_t item = 1;
  std::vector<int64_t> sizes, strides;

  Region() = default;
  Region(const Region&) = delete;
  ~Region();
  bool contains(uintptr_t address, size_t size) const {
    const uintptr_t offset = address - low;
    return offset < bytes && size <= bytes - offset;
  }
  Cell* cell(uintptr_t address) { return cells + ((address - base) >> shift); }
  void resize(int new_shift);  // forgets everything
};

struct Scope {
  std::vector<std::unique_ptr<Region>> regions;  // those that can be written first
  Records records;
  uint64_t next_block = 1;
  uint64_t launches = 0;
  bool failed = false;
};

// ------------------------------------------------------------------------------------------ fibers

struct Wait {
  enum Kind : uint8_t { kNone, kBlock, kWarp, kNamed, kGrid, kCluster, kMbarrier };
  Kind kind = kNone;
  const char* what = "";  // the operation, or the file of a sync_block
  int64_t a = 0, b = 0;
};

struct AsyncCopy {
  void* to;
  unsigned group;
  std::array<uint64_t, 2> data;
  uint32_t pc;
};

struct Fiber {
  // Read at every access.
  uintptr_t stack = 0;  // its lowest address
  uint64_t epoch = 0, block_low = 0, floor_span = 0;
  uintptr_t shared_low = 0;
  size_t shared_bytes = 0;

  void* context = nullptr;
  Block* block = nullptr;
  uint3 index{};
  unsigned rank = 0;
  bool ended = false;
  Wait wait;

  // Beside its own clock.
  Ref<Clock> base;
  Ref<Knowledge> foreign;
  Ref<Knowledge> released;  // at its last fence
  Ref<Knowledge> acquired;  // by atomics since its last fence

  // A meeting of lanes: what it brings, and what it gets.
  uint64_t in = 0, out = 0;
  int64_t argument = 0;
  void* data[3] = {};

  // Split barriers.
  bool at_cluster = false;
  uint64_t cluster_phase = 0;
  Ref<Clock> arrived_base;
  Ref<Knowledge> arrived_foreign;

  unsigned open_group = 0;
  std::vector<AsyncCopy> copies;

  unsigned lane() const { return rank % 32; }
  uint32_t clock() const { return clock_of(epoch); }
  uint32_t floor() const { return uint32_t(floor_span >> kThreadBits); }
};

extern __thread Fiber* running __attribute__((tls_model("initial-exec")));

struct Meeting {
  const char* what;
  unsigned mask, arrived;
};

struct Warp {
  unsigned present = 0, ended = 0;
  Fiber** lanes = nullptr;
  std::vector<Meeting> meetings;
};

struct Mbarrier {
  unsigned arrivals, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
  Ref<Knowledge> collected, completed;
  std::vector<Fiber*> waiting;
  struct Bulk {
    void* to;
    std::vector<unsigned char> data;
    uint64_t epoch;
    uint32_t pc;
  };
  std::vector<Bulk> copies;
};

// A barrier with arrive and wait apart, of a cluster or of a grid.
struct WideBarrier {
  size_t threads = 0, arrived = 0;
  uint64_t phase = 0;
  Ref<Knowledge> collected, completed;
  std::vector<Fiber*> waiting;
};

struct Cluster {
  Block* first = nullptr;
  unsigned blocks = 1;
  WideBarrier barrier;
};

struct Block {
  uint64_t id = 0;
  uint3 index{};
  Fiber** fibers = nullptr;
  unsigned threads = 0, alive = 0;
  std::vector<Warp> warps;
  std::vector<Fiber*> arrived;  // at sync_block, called at
  const char* file = nullptr;
  int line = 0;
  struct Named {
    int threads = 0;
    std::vector<Fiber*> arrived;
  } named[16];
  Region shared;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  bool used_by_others = false;
};

struct Random {
  uint64_t state = 1;
  uint64_t operator()() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
  }
};

struct Failure {
  std::string text;
  bool is_index = false, any = false;
};

// All that a launch needs; one runs at a time.
struct Machine {
  Launch launch;
  const void* body = nullptr;
  size_t body_bytes = 0;
  void (*call)(const void*) = nullptr;
  Scope* scope = nullptr;
  uint64_t seed = 0, first_block = 0, first_epoch = 0;
  Random random;
  Failure failure;

  std::vector<std::unique_ptr<Fiber>> owned;
  std::vector<Fiber*> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  size_t resident = 0, alive = 0;  // blocks, fibers
  void* context = nullptr;
  uint64_t idle = 0;

  std::vector<Fiber*> ready;  // a ring
  size_t head = 0, tail = 0;

  unsigned char* arena = nullptr;  // the blocks' shared memory, each with a gap behind it
  size_t arena_bytes = 0, arena_capacity = 0, arena_stride = 0;
  int shared_shift = 2;
  Records shared_records;
  Region* last = nullptr;  // the tracked memory used last
  std::vector<uintptr_t> stacks;

  WideBarrier grid;
  std::unordered_map<uintptr_t, Ref<Knowledge>> releases, shared_releases;  // by atomics
  std::unordered_map<uintptr_t, Mbarrier> mbarriers;
};
extern Machine machine;

constexpr size_t kStack = 64 << 10,
                 kStackStride = kStack + 17 * 64;  // their tops fall into all sets
constexpr size_t kStacksAtOnce = 256, kBelowStacks = 1 << 20;
constexpr size_t kGap = 1024;

// --------------------------------------------------------------------------------------- scheduler

// The fiber that calls a primitive.
[[noreturn]] void fail_outside();
inline Fiber& self() {
  if (!running) [[unlikely]]
    fail_outside();
  return *running;
}
void suspend(Fiber& fiber);  // until it is resumed
void resume(Fiber& fiber);
void resume_all(std::vector<Fiber*>& fibers, const Fiber* except);  // in another order; clears
void yield(Fiber& fiber);
void spin(Fiber& fiber);  // yields in a loop that waits for another thread's store
inline void progress() { machine.idle = 0; }

// Ends the launch. A place in the code stands in a text as at(pc).
[[noreturn]] void fail(const std::string& text);
[[noreturn]] void fail_at(uintptr_t pc, const std::string& text);
std::string at(uintptr_t pc);
std::string at(const char* file, int line);
std::string describe(const Wait& wait);
std::string describe_thread(uint64_t epoch);  // "thread (1, 0, 0) of block (2, 0, 0)"
std::string hexadecimal(uint64_t value);
extern const uintptr_t library_base;
inline uint32_t short_pc(uintptr_t pc) { return uint32_t(pc - library_base); }
inline uintptr_t long_pc(uint32_t pc) { return pc ? library_base + pc : 0; }

template <typename... Args>
std::string concat(const Args&... args) {
  std::string result;
  const auto add = [&](const auto& arg) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(arg)>>)
      result += std::to_string(arg);
    else
      result += arg;
  };
  (add(args), ...);
  return result;
}

// ------------------------------------------------------------------------------------------ memory

enum class Atomic { kLoad, kStore, kChange };

void check_read(Fiber& fiber, const void* address, size_t size, size_t alignment, uintptr_t pc);
void check_write(Fiber& fiber, void* address, size_t size, size_t alignment, uintptr_t pc);
void check_atomic(Fiber& fiber, const void* address, size_t size, Atomic kind, uintptr_t pc);
void check_unwritten_in_launch(Fiber& fiber, const void* address, size_t size, uintptr_t pc);
void check_shared(Fiber& fiber, const void* address, size_t size, const char* what, uintptr_t pc);
// The bytes of an async copy: under way, and there, as a write of that epoch.
void begin_copy(Fiber& fiber, void* address, size_t size, uintptr_t pc);
void end_copy(void* address, size_t size, uint64_t epoch, uint32_t pc);
void open_shared(Block& block, size_t bytes);
void check_ended(Block& block);  // nobody else may still be using its shared memory
bool is_before(const Fiber& fiber, uint64_t epoch);
std::string place(uintptr_t address);

// -------------------------------------------------------------------------------------- primitives

void advance(Fiber& fiber);            // its clock
Ref<Knowledge> release(Fiber& fiber);  // all it knows; advances
void acquire(Fiber& fiber, const Ref<Knowledge>& knowledge);
void check_end(Fiber& fiber);  // nobody may be waiting for it

}  // namespace dlkernels::emulated
