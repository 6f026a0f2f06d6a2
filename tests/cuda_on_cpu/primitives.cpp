// Barriers, shuffles, atomics, copies, matrices and numbers, each by the PTX ISA's definition.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "emulator.h"

#define DLK_HERE_PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace dlkernels::emulated {

// --------------------------------------------------------------------------- releases and acquires

static void set_clock(Fiber& f, uint32_t clock) {
  if (clock >= kClockMask) fail("too many barriers and fences in one thread");
  f.epoch = f.block_low | uint64_t(clock) << kThreadBits | f.rank;
}

void advance(Fiber& f) { set_clock(f, f.clock() + 1); }

static void set_floor(Fiber& f, uint32_t floor) {
  f.floor_span = uint64_t(floor) << kThreadBits | kThreadMask;
}

static Ref<Clock> own_clock(const Fiber& f) {
  Ref<Clock> clock(new Clock(f.block->threads));
  if (f.base) clock->at = f.base->at;
  clock->at[f.rank] = f.clock();
  return clock;
}

Ref<Knowledge> release(Fiber& f) {
  Ref<Knowledge> result(new Knowledge);
  if (f.foreign)
    for (const Known& known : f.foreign->blocks)
      if (known.block != f.block->id) result->blocks.push_back(known);
  result->add({f.block->id, f.floor(), own_clock(f)});
  advance(f);
  return result;
}

void acquire(Fiber& f, const Ref<Knowledge>& knowledge) {
  if (!knowledge) return;
  if (const Known* own = knowledge->find(f.block->id)) {
    f.base = join(f.base, own->clock);
    set_floor(f, std::max(f.floor(), own->floor));
  }
  f.foreign = join(f.foreign, knowledge);
}

// A barrier of some threads of a block, all arrived.
static void join_threads(Fiber* const* fibers, size_t n) {
  Ref<Clock> joined = fibers[0]->base;
  Ref<Knowledge> foreign = fibers[0]->foreign;
  uint32_t floor = 0, used = 0;
  for (size_t i = 0; i < n; ++i) {
    used += joined && fibers[i]->base == joined;
    foreign = join(foreign, fibers[i]->foreign);
    floor = std::max(floor, fibers[i]->floor());
  }
  // Nobody else has this vector: `joined` itself is one more reference.
  if (!joined || used != n || joined->references != n + 1) {
    joined = Ref<Clock>(new Clock(fibers[0]->block->threads));
    const Clock* last = nullptr;
    for (size_t i = 0; i < n; ++i) {
      const Clock* base = fibers[i]->base.get();
      if (base && base != last)
        for (size_t t = 0; t < base->at.size(); ++t)
          joined->at[t] = std::max(joined->at[t], base->at[t]);
      last = base;
    }
  }
  for (size_t i = 0; i < n; ++i) joined->at[fibers[i]->rank] = fibers[i]->clock();
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = *fibers[i];
    f.base = joined;
    f.foreign = foreign;
    set_floor(f, floor);
    advance(f);
  }
}

// A barrier of the whole block.
static void join_block(Block& block) {
  uint32_t highest = 0;
  Ref<Knowledge> foreign = block.fibers[0]->foreign;
  for (unsigned t = 0; t < block.threads; ++t) {
    highest = std::max(highest, block.fibers[t]->clock());
    if (!(block.fibers[t]->foreign == foreign)) foreign = join(foreign, block.fibers[t]->foreign);
  }
  for (unsigned t = 0; t < block.threads; ++t) {
    Fiber& f = *block.fibers[t];
    if (f.base) f.base = {};
    if (!(f.foreign == foreign)) f.foreign = foreign;
    set_floor(f, highest);
    set_clock(f, highest + 1);
  }
}

// ---------------------------------------------------------------------------------- block barriers

static std::string ended_text(const Block& block) {
  for (unsigned t = 0; t < block.threads; ++t)
    if (block.fibers[t]->ended) return describe_thread(block.fibers[t]->epoch);
  return "";
}

void sync_block(const char* file, int line) {
  Fiber& f = self();
  Block& block = *f.block;
  if (block.alive < block.threads)
    fail(concat("barrier divergence: sync_block at ", at(file, line), " will never be reached by ",
                ended_text(block), ", which has ended"));
  if (block.arrived.empty()) {
    block.file = file, block.line = line;
  } else if (block.line != line || (block.file != file && strcmp(block.file, file))) {
    fail(concat("barrier divergence: sync_block at ", at(file, line), ", while ",
                describe_thread(block.arrived[0]->epoch), " waits at that of ",
                at(block.file, block.line)));
  }
  block.arrived.push_back(&f);
  if (block.arrived.size() < block.threads) {
    f.wait = {Wait::kBlock, file, line, 0};
    suspend(f);
    return;
  }
  join_block(block);
  resume_all(block.arrived, &f);
  if (machine.random() & 1) yield(f);
}

void sync_named(int id, int threads) {
  Fiber& f = self();
  if (id < 1 || id > 15) fail(concat("sync_named: there is no barrier ", id, " but 1 to 15"));
  if (threads <= 0 || threads % 32) fail(concat("sync_named of ", threads, " threads: not warps"));
  auto& named = f.block->named[id];
  if (named.arrived.empty()) named.threads = threads;
  if (named.threads != threads)
    fail(concat("sync_named(", id, ", ", threads, ") while ",
                describe_thread(named.arrived[0]->epoch), " waits at sync_named(", id, ", ",
                named.threads, ")"));
  named.arrived.push_back(&f);
  if (named.arrived.size() < size_t(threads)) {
    f.wait = {Wait::kNamed, "", id, threads};
    suspend(f);
    return;
  }
  join_threads(named.arrived.data(), named.arrived.size());
  resume_all(named.arrived, &f);
  if (machine.random() & 1) yield(f);
}

// ----------------------------------------------------------------------------------- wide barriers

static void wide_arrive(WideBarrier& barrier, Fiber& f) {
  if (!barrier.collected) barrier.collected = Ref<Knowledge>(new Knowledge);
  f.arrived_base = f.base;
  f.arrived_foreign = f.foreign;
  f.cluster_phase = barrier.phase;
  Knowledge& collected = *barrier.collected;
  // The vectors of `collected` are its own: they are written.
  const auto entry = [&](uint64_t block) -> Known& {
    if (!collected.find(block)) {
      const Ref<Clock> clock(new Clock(f.block->threads));
      collected.add({block, 0, clock});
    }
    return const_cast<Known&>(*collected.find(block));
  };
  const auto add = [&](Known& known, uint32_t floor, const Ref<Clock>& clock) {
    known.floor = std::max(known.floor, floor);
    if (clock)
      for (size_t t = 0; t < clock->at.size(); ++t)
        known.clock->at[t] = std::max(known.clock->at[t], clock->at[t]);
  };
  // What it knows of other threads, most know as well: thread 0 brings it for all who know the
  // same.
  const Fiber& zero = *f.block->fibers[0];
  if (f.foreign && (f.rank == 0 || !(f.foreign == zero.foreign)))
    for (const Known& k : f.foreign->blocks)
      if (k.block != f.block->id) add(entry(k.block), k.floor, k.clock);
  Known& own = entry(f.block->id);
  add(own, f.floor(), f.rank == 0 || !(f.base == zero.base) ? f.base : Ref<Clock>());
  own.clock->at[f.rank] = f.clock();
  advance(f);
  if (++barrier.arrived < barrier.threads) return;
  // Where all of a block came at one clock, the floor says it.
  for (Known& k : collected.blocks) {
    const auto [low, high] = std::minmax_element(k.clock->at.begin(), k.clock->at.end());
    k.floor = std::max(k.floor, *low);
    if (*high <= k.floor) k.clock = {};
  }
  barrier.completed = std::move(barrier.collected);
  barrier.collected = {};
  barrier.arrived = 0;
  ++barrier.phase;
  resume_all(barrier.waiting, nullptr);
}

static void wide_wait(WideBarrier& barrier, Fiber& f, Wait::Kind kind) {
  if (f.cluster_phase == barrier.phase) {
    barrier.waiting.push_back(&f);
    f.wait = {kind, "", 0, 0};
    suspend(f);
  }
  // All it knew when it arrived is in `completed`.
  const Known& own = *barrier.completed->find(f.block->id);
  set_floor(f, std::max(f.floor(), own.floor));
  f.base = f.base == f.arrived_base ? own.clock : join(f.base, own.clock);
  f.foreign =
      f.foreign == f.arrived_foreign ? barrier.completed : join(f.foreign, barrier.completed);
  f.arrived_base = {};
  f.arrived_foreign = {};
}

void sync_grid() {
  Fiber& f = self();
  if (!machine.launch.cooperative) fail("sync_grid in a launch that is not cooperative");
  if (f.at_cluster) fail("sync_grid between cluster_arrive and cluster_wait");
  if (machine.alive < machine.grid.threads)
    fail("barrier divergence: sync_grid will never be reached by threads that have ended");
  wide_arrive(machine.grid, f);
  wide_wait(machine.grid, f, Wait::kGrid);
}

unsigned cluster_rank() { return self().block->rank; }
unsigned cluster_blocks() { return self(), machine.launch.cluster; }

void cluster_arrive() {
  Fiber& f = self();
  if (f.at_cluster) fail("cluster_arrive twice without cluster_wait");
  const Cluster& cluster = *f.block->cluster;
  const size_t slot = size_t(cluster.first->fibers - machine.fibers.data()) / f.block->threads;
  for (unsigned b = 0; b < cluster.blocks; ++b)
    if (const Block& block = *machine.blocks[slot + b]; block.alive < block.threads)
      fail(concat("barrier divergence: cluster_arrive will never be reached by ", ended_text(block),
                  ", which has ended"));
  f.at_cluster = true;
  wide_arrive(f.block->cluster->barrier, f);
}

void cluster_wait() {
  Fiber& f = self();
  if (!f.at_cluster) fail("cluster_wait without cluster_arrive");
  wide_wait(f.block->cluster->barrier, f, Wait::kCluster);
  f.at_cluster = false;
}

void* cluster_shared(const void* mine, unsigned rank) {
  Fiber& f = self();
  if (rank >= f.block->cluster->blocks)
    fail(concat("cluster_shared of rank ", rank, " in a cluster of ", f.block->cluster->blocks));
  check_shared(f, mine, 0, "cluster_shared", DLK_HERE_PC);
  const size_t slot =
      size_t(f.block->cluster->first->fibers - machine.fibers.data()) / f.block->threads;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(mine) - f.shared_low;
  return reinterpret_cast<void*>(machine.blocks[slot + rank]->shared.low + offset);
}

// --------------------------------------------------------------------------------- lanes' meetings

// Waits for the lanes of the mask; the last to come calls complete(warp) before all go on. `what`
// is one pointer for each operation.
template <typename Complete>
static void meet(Fiber& f, const char* what, unsigned mask, Complete complete) {
  Warp& warp = f.block->warps[f.rank / 32];
  const unsigned own = 1u << f.lane();
  if (!(mask & own))
    fail(concat(what, ": mask ", hexadecimal(mask), " lacks the caller, lane ", f.lane()));
  if (mask & ~warp.present)
    fail(concat(what, ": lanes ", hexadecimal(mask & ~warp.present), " of mask ", hexadecimal(mask),
                " never come: the block has no such threads"));
  if (mask & warp.ended)
    fail(concat(what, ": lanes ", hexadecimal(mask & warp.ended), " of mask ", hexadecimal(mask),
                " never come: they have ended"));
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.mask == mask && m.what == what && !(m.arrived & own)) {
      meeting = &m;
    } else if ((m.mask & own) && (m.arrived & mask)) {  // each waits for the other
      const Fiber& other = *warp.lanes[__builtin_ctz(m.arrived & mask)];
      fail(concat(what, " with mask ", hexadecimal(mask), ": lane ", other.lane(),
                  " never comes: it waits at ", describe(other.wait)));
    }
  }
  if (!meeting) {
    warp.meetings.push_back({what, mask, 0});
    meeting = &warp.meetings.back();
  }
  meeting->arrived |= own;
  if (meeting->arrived != mask) {
    f.wait = {Wait::kWarp, what, mask, 0};
    suspend(f);
    return;
  }
  *meeting = warp.meetings.back();
  warp.meetings.pop_back();
  complete(warp);
  progress();
  const unsigned turn = machine.random() % 32;
  for (unsigned rest = mask & ~own; rest;) {  // from a random lane on
    const unsigned late = rest & (~0u << turn);
    const int lane = __builtin_ctz(late ? late : rest);
    resume(*warp.lanes[lane]);
    rest &= ~(1u << lane);
  }
}

template <typename Function>
static void for_lanes(unsigned mask, Function function) {
  for (; mask; mask &= mask - 1) function(__builtin_ctz(mask));
}

void sync_warp(unsigned mask) {
  meet(self(), "sync_warp", mask, [mask](Warp& warp) {
    Fiber* fibers[32];
    size_t n = 0;
    for_lanes(mask, [&](int lane) { fibers[n++] = warp.lanes[lane]; });
    join_threads(fibers, n);
  });
}

// The source lane of each lane, or its own.
template <typename Source>
static uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int64_t argument,
                        Source source) {
  Fiber& f = self();
  f.in = value;
  f.argument = argument;
  meet(f, what, mask, [&](Warp& warp) {
    for_lanes(mask, [&](int lane) {
      Fiber& to = *warp.lanes[lane];
      const int from = source(lane, to.argument);
      to.argument = mask >> from & 1 ? -1 : from;
      to.out = warp.lanes[to.argument < 0 ? from : lane]->in;
    });
  });
  if (f.argument >= 0)
    fail(concat(what, " with mask ", hexadecimal(mask), ": lane ", f.lane(), " reads lane ",
                f.argument, ", which is not in the mask"));
  return f.out;
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes) {
  return shuffle("shuffle_xor", mask, value, lanes,
                 [](int lane, int64_t by) { return (lane ^ int(by)) & 31; });
}
uint64_t shuffle_down(unsigned mask, uint64_t value, int delta) {
  return shuffle("shuffle_down", mask, value, delta, [](int lane, int64_t by) {
    return uint64_t(lane) + uint64_t(by) < 32 ? lane + int(by) : lane;
  });
}
uint64_t shuffle_up(unsigned mask, uint64_t value, int delta) {
  return shuffle("shuffle_up", mask, value, delta,
                 [](int lane, int64_t by) { return by <= lane ? lane - int(by) : lane; });
}
uint64_t shuffle_from(unsigned mask, uint64_t value, int source) {
  return shuffle("shuffle_from", mask, value, source,
                 [](int, int64_t from) { return int(from & 31); });
}

unsigned ballot(unsigned mask, bool p) {
  Fiber& f = self();
  f.in = p;
  meet(f, "a vote", mask, [mask](Warp& warp) {
    unsigned votes = 0;
    for_lanes(mask, [&](int lane) { votes |= unsigned(warp.lanes[lane]->in) << lane; });
    for_lanes(mask, [&](int lane) { warp.lanes[lane]->out = votes; });
  });
  return unsigned(f.out);
}

// ----------------------------------------------------------------------------------------- atomics

void fence() {
  Fiber& f = self();
  acquire(f, f.acquired);
  f.acquired = {};
  f.released = release(f);
}

// What the atomics on an address have released.
static Ref<Knowledge>& releases(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool is_shared = address - reinterpret_cast<uintptr_t>(machine.arena) < machine.arena_bytes;
  return (is_shared ? machine.shared_releases : machine.releases)[address];
}

template <typename T, typename Change>
static T change(T* address, uintptr_t pc, Change function) {
  Fiber& f = self();
  if (machine.random() % 4 == 0) yield(f);
  check_atomic(f, address, sizeof(T), Atomic::kChange, pc);
  Ref<Knowledge>& released = releases(address);
  if (released) f.acquired = join(f.acquired, released);
  if (f.released) released = join(released, f.released);
  const T before = *address;
  const T after = function(before);
  *address = after;
  if (memcmp(&before, &after, sizeof(T)))
    progress();
  else
    spin(f);
  return before;
}

template <typename T>
T atomic_add(T* address, T value) {
  return change(address, DLK_HERE_PC, [value](T before) { return T(before + value); });
}
template <typename T>
T atomic_max(T* address, T value) {
  return change(address, DLK_HERE_PC, [value](T before) { return std::max(before, value); });
}
template <typename T>
T atomic_exchange(T* address, T value) {
  return change(address, DLK_HERE_PC, [value](T) { return value; });
}
template <typename T>
T atomic_cas(T* address, T compare, T value) {
  return change(address, DLK_HERE_PC, [=](T before) { return before == compare ? value : before; });
}

#define DLK_INTEGER_ATOMICS(T)          \
  template T atomic_add<T>(T*, T);      \
  template T atomic_max<T>(T*, T);      \
  template T atomic_exchange<T>(T*, T); \
  template T atomic_cas<T>(T*, T, T);
DLK_INTEGER_ATOMICS(int)
DLK_INTEGER_ATOMICS(unsigned)
DLK_INTEGER_ATOMICS(uint64_t)
template float atomic_add<float>(float*, float);
template double atomic_add<double>(double*, double);
template float atomic_exchange<float>(float*, float);

unsigned load_acquire(const unsigned* address) {
  Fiber& f = self();
  spin(f);
  check_atomic(f, address, sizeof(unsigned), Atomic::kLoad, DLK_HERE_PC);
  acquire(f, releases(address));
  return *address;
}

void store_release(unsigned* address, unsigned value) {
  Fiber& f = self();
  check_atomic(f, address, sizeof(unsigned), Atomic::kStore, DLK_HERE_PC);
  releases(address) = release(f);
  *address = value;
  progress();
}

// ---------------------------------------------------------------------------------------- 16 bytes

Words16 load16(const void* address) {
  if (running) check_read(*running, address, 16, 16, DLK_HERE_PC);
  Words16 value;
  __builtin_memcpy(&value, address, 16);
  return value;
}

Words16 load_streaming(const void* address) {
  Fiber& f = self();
  check_read(f, address, 16, 16, DLK_HERE_PC);
  check_unwritten_in_launch(f, address, 16, DLK_HERE_PC);
  Words16 value;
  __builtin_memcpy(&value, address, 16);
  return value;
}

void store16(void* address, Words16 value) {
  if (running) check_write(*running, address, 16, 16, DLK_HERE_PC);
  __builtin_memcpy(address, &value, 16);
}

// ------------------------------------------------------------------------------------ async copies

void copy_async16(void* shared, const void* global, bool valid) {
  Fiber& f = self();
  const uintptr_t pc = DLK_HERE_PC;
  check_shared(f, shared, 16, "copy_async16", pc);
  AsyncCopy copy{shared, f.open_group, {}, short_pc(pc)};
  if (valid) {
    check_read(f, global, 16, 16, pc);
    __builtin_memcpy(&copy.data, global, 16);
  }
  begin_copy(f, shared, 16, pc);
  f.copies.push_back(copy);
}

void copy_async_commit() { ++self().open_group; }

void copy_async_wait(int groups) {
  Fiber& f = self();
  const auto is_late = [&](const AsyncCopy& copy) {
    return copy.group + unsigned(groups) < f.open_group;
  };
  for (const AsyncCopy& copy : f.copies) {
    if (!is_late(copy)) continue;
    __builtin_memcpy(copy.to, &copy.data, 16);
    end_copy(copy.to, 16, f.epoch, copy.pc);
  }
  f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), is_late), f.copies.end());
}

static Mbarrier& find_mbarrier(Fiber& f, uint64_t* barrier, const char* what, uintptr_t pc) {
  check_shared(f, barrier, 8, what, pc);
  const auto found = machine.mbarriers.find(reinterpret_cast<uintptr_t>(barrier));
  if (found == machine.mbarriers.end())
    fail_at(pc,
            concat(what, ": no mbarrier_init at ", place(reinterpret_cast<uintptr_t>(barrier))));
  check_atomic(f, barrier, 8, Atomic::kChange, pc);
  return found->second;
}

static void finish_phase(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.completed = b.collected;
  b.pending = b.arrivals;
  ++b.phase;
  for (Fiber* f : b.waiting) acquire(*f, b.completed);
  resume_all(b.waiting, nullptr);
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  Fiber& f = self();
  const uintptr_t pc = DLK_HERE_PC;
  check_shared(f, barrier, 8, "mbarrier_init", pc);
  if (!arrivals || arrivals >= 1u << 20) fail_at(pc, "mbarrier_init: 1 to 2^20 - 1 arrivals");
  check_write(f, barrier, 8, 8, pc);
  Mbarrier& b = machine.mbarriers[reinterpret_cast<uintptr_t>(barrier)];
  b = {};
  b.arrivals = b.pending = arrivals;
}

void mbarrier_arrive(uint64_t* barrier, unsigned bytes) {
  Fiber& f = self();
  const uintptr_t pc = DLK_HERE_PC;
  Mbarrier& b = find_mbarrier(f, barrier, "mbarrier_arrive", pc);
  if (!b.pending) fail_at(pc, "mbarrier_arrive: more arrivals than the phase has");
  b.bytes += bytes;
  b.collected = join(b.collected, release(f));
  --b.pending;
  finish_phase(b);
}

// The bytes of its bulk copies come when somebody waits for them.
static void deliver(Mbarrier& b) {
  for (const auto& copy : b.copies) {
    memcpy(copy.to, copy.data.data(), copy.data.size());
    end_copy(copy.to, copy.data.size(), copy.epoch, copy.pc);
    b.bytes -= int64_t(copy.data.size());
  }
  b.copies.clear();
  finish_phase(b);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  Fiber& f = self();
  Mbarrier& b = find_mbarrier(f, barrier, "mbarrier_wait", DLK_HERE_PC);
  if ((b.phase & 1) == parity) deliver(b);
  if ((b.phase & 1) != parity) {
    acquire(f, b.completed);
    return;
  }
  b.waiting.push_back(&f);
  f.wait = {Wait::kMbarrier, "", int64_t(reinterpret_cast<uintptr_t>(barrier)), parity};
  suspend(f);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  Fiber& f = self();
  const uintptr_t pc = DLK_HERE_PC;
  Mbarrier& b = find_mbarrier(f, barrier, "bulk_copy", pc);
  if (!bytes || bytes % 16)
    fail_at(pc, concat("bulk_copy of ", bytes, " bytes: no multiple of 16"));
  check_shared(f, shared, bytes, "bulk_copy", pc);
  check_read(f, global, bytes, 16, pc);
  begin_copy(f, shared, bytes, pc);
  const auto* data = static_cast<const unsigned char*>(global);
  b.copies.push_back({shared, {data, data + bytes}, f.epoch, short_pc(pc)});
  b.collected = join(b.collected, release(f));
  if (!b.waiting.empty()) deliver(b);
}

// ---------------------------------------------------------------------------------------- matrices

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, bool transposed) {
  Fiber& f = self();
  const uintptr_t pc = DLK_HERE_PC;
  check_read(f, shared_row, 16, 16, pc);
  uint16_t row[8];
  __builtin_memcpy(row, shared_row, 16);
  f.data[0] = row;
  f.data[1] = r;
  meet(f, transposed ? "ldmatrix_x4_transposed" : "ldmatrix_x4", ~0u, [&](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const auto element = [&](int i, int j) {
          if (transposed) std::swap(i, j);
          return static_cast<const uint16_t*>(warp.lanes[8 * m + i]->data[0])[j];
        };
        static_cast<uint32_t*>(warp.lanes[lane]->data[1])[m] =
            element(lane / 4, lane % 4 * 2) | uint32_t(element(lane / 4, lane % 4 * 2 + 1)) << 16;
      }
    }
  });
}

static float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// d (16×8) += a (16×k)·b (k×8), products and their sum exact to double.
template <int kDepth, typename A, typename B>
static void multiply(Warp& warp, A a_of, B b_of) {
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    a_of(lane, static_cast<const uint32_t*>(warp.lanes[lane]->data[1]), a);
    b_of(lane, static_cast<const uint32_t*>(warp.lanes[lane]->data[2]), b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* d = static_cast<float*>(warp.lanes[lane]->data[0]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      d[i] = float(sum);
    }
  }
}

static void bring(Fiber& f, void* d, const void* a, const void* b) {
  f.data[0] = d;
  f.data[1] = const_cast<void*>(a);
  f.data[2] = const_cast<void*>(b);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16) {
  Fiber& f = self();
  bring(f, d, a, b);
  const auto number = [is_bf16](uint32_t bits, int half) -> double {
    const auto value = uint16_t(bits >> (16 * half));
    return is_bf16 ? bits_float(uint32_t(value) << 16) : to_float_f16(value);
  };
  meet(f, is_bf16 ? "mma_m16n8k16 of bf16" : "mma_m16n8k16 of f16", ~0u, [&](Warp& warp) {
    multiply<16>(
        warp,
        [&](int lane, const uint32_t* r, double (*m)[16]) {
          for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
              m[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2) + half] = number(r[i], half);
        },
        [&](int lane, const uint32_t* r, double (*m)[8]) {
          for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
              m[2 * (lane % 4) + 8 * i + half][lane / 4] = number(r[i], half);
        });
  });
}

void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fiber& f = self();
  bring(f, d, a, b);
  const auto number = [](uint32_t bits) -> double { return bits_float(bits & ~0x1fffu); };
  meet(f, "mma_m16n8k8", ~0u, [&](Warp& warp) {
    multiply<8>(
        warp,
        [&](int lane, const uint32_t* r, double (*m)[8]) {
          for (int i = 0; i < 4; ++i)
            m[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = number(r[i]);
        },
        [&](int lane, const uint32_t* r, double (*m)[8]) {
          for (int i = 0; i < 2; ++i) m[lane % 4 + 4 * i][lane / 4] = number(r[i]);
        });
  });
}

// ----------------------------------------------------------------------------------------- numbers

static float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

float exp2_approximate(float x) { return flush(std::exp2(flush(x))); }
float log2_approximate(float x) { return flush(std::log2(flush(x))); }

float to_float_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 31) return bits_float(fraction ? 0x7fffffff : sign | 0x7f800000);
  const float magnitude = exponent ? std::ldexp(float(fraction | 0x400), int(exponent) - 25)
                                   : std::ldexp(float(fraction), -24);
  return std::copysign(magnitude, bits_float(sign));
}

uint16_t from_float_f16(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: multiples of 2^-24
    const float scaled = std::ldexp(bits_float(magnitude), 24);
    return sign | uint16_t(std::nearbyint(scaled));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | uint16_t((rounded - 0x38000000) >> 13);
}

uint16_t from_float_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ----------------------------------------------------------------------------------------- the end

void check_end(Fiber& f) {
  Block& block = *f.block;
  if (!block.arrived.empty())
    fail(concat("barrier divergence: the thread ends while ",
                describe_thread(block.arrived[0]->epoch), " waits at sync_block at ",
                at(block.file, block.line)));
  if (f.at_cluster) fail("the thread ends between cluster_arrive and cluster_wait");
  Warp& warp = block.warps[f.rank / 32];
  const unsigned own = 1u << f.lane();
  for (const Meeting& meeting : warp.meetings) {
    if (!(meeting.mask & own)) continue;
    const Fiber& other = *warp.lanes[__builtin_ctz(meeting.arrived)];
    fail(concat("the thread ends while lane ", other.lane(), " waits at ", describe(other.wait),
                ": lane ", f.lane(), " never comes"));
  }
  warp.ended |= own;
  if (--block.alive) return;
  for (const auto& [address, barrier] : machine.mbarriers)
    if (!barrier.copies.empty() && block.shared.contains(address, 8))
      fail(concat("the block ends while a bulk_copy to it is under way, begun at ",
                  at(long_pc(barrier.copies[0].pc))));
  check_ended(block);
}

}  // namespace dlkernels::emulated
