// Tracked memory, the check of each access, and the functions that the instrumentation calls.
//
// The races are FastTrack's (Flanagan, Freund, 2009): a cell holds the last write and, where all
// reads since are ordered, the last read; a Record takes over where they are not. A read drops the
// reads that are before it: what is not ordered after those is not ordered after it either.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "emulator.h"

#define DLK_HERE_PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace dlkernels::emulated {

// ----------------------------------------------------------------------------------------- records

uint32_t Records::take() {
  if (free.empty()) {
    all.emplace_back();
    return uint32_t(all.size() - 1);
  }
  const uint32_t index = free.back();
  free.pop_back();
  return index;
}

void Records::give(uint32_t index) {
  Record& record = all[index];
  record.reads.clear(), record.atomic_reads.clear(), record.atomic_writes.clear();
  free.push_back(index);
}

void Records::clear() {
  if (all.size() > free.size()) {
    free.clear();
    for (size_t i = 0; i < all.size(); ++i) give(uint32_t(i));
  }
}

// ----------------------------------------------------------------------------------------- regions

static Cell* map_cells(size_t count) {
  void* cells = mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) throw std::bad_alloc();
  madvise(cells, count * sizeof(Cell), MADV_HUGEPAGE);  // neighbours in time are far in memory
  return static_cast<Cell*>(cells);
}

Region::~Region() {
  if (cells) munmap(cells, capacity * sizeof(Cell));
}

void Region::resize(int new_shift) {
  shift = new_shift;
  cell_count = (low + bytes - base + (size_t(1) << shift) - 1) >> shift;
  if (cell_count <= capacity) {
    std::fill(cells, cells + cell_count, Cell{});
    return;
  }
  if (cells) munmap(cells, capacity * sizeof(Cell));
  capacity = cell_count;
  cells = map_cells(capacity);
}

// To cells of half the bytes, until an access of `odd` (its address | size) meets whole ones.
static void refine(Region& r, uintptr_t odd) {
  int shift = r.shift;
  while (odd & ((uintptr_t(1) << shift) - 1)) --shift;
  const size_t parts = size_t(1) << (r.shift - shift);
  const size_t count = r.cell_count * parts;
  Cell* cells = map_cells(count);
  for (size_t i = 0; i < r.cell_count; ++i) {
    for (size_t p = 0; p < parts; ++p) {
      Cell& cell = cells[i * parts + p];
      cell = r.cells[i];
      if (p && (cell.read & kRecord)) {
        const uint32_t copy = r.records->take();
        r.records->all[copy] = r.records->all[uint32_t(cell.read)];
        cell.read = kRecord | copy;
      }
    }
  }
  munmap(r.cells, r.capacity * sizeof(Cell));
  r.cells = cells;
  r.cell_count = r.capacity = count;
  r.shift = shift;
  if (r.block) machine.shared_shift = std::min(machine.shared_shift, shift);
}

void open_shared(Block& block, size_t bytes) {
  Region& r = block.shared;
  const size_t slot = size_t(block.fibers - machine.fibers.data()) / block.threads;
  r.low = r.base = reinterpret_cast<uintptr_t>(machine.arena) + kGap + slot * machine.arena_stride;
  r.bytes = bytes;
  r.block = &block;
  r.records = &machine.shared_records;
  r.resize(machine.shared_shift);
  std::fill_n(reinterpret_cast<unsigned char*>(r.low), bytes, 0xff);
}

// --------------------------------------------------------------------------------------- reporting

static std::string block_text(const Block& block) {
  return concat("(", block.index.x, ", ", block.index.y, ", ", block.index.z, ")");
}

static std::string region_text(const Region& r) {
  if (!r.block) return concat("`", r.name, "` (", r.bytes, " bytes)");
  const bool own = running && running->block == r.block;
  return concat("shared memory (", r.bytes, " bytes)", own ? "" : " of block ",
                own ? "" : block_text(*r.block));
}

static std::string offset_text(const Region& r, uintptr_t address) {
  return concat("offset ", int64_t(address - r.low), " of ", region_text(r));
}

static std::vector<Region*> shared_regions() {
  std::vector<Region*> result;
  for (size_t i = 0; i < machine.resident; ++i) result.push_back(&machine.blocks[i]->shared);
  return result;
}

// The address in words, also where it is just outside of something.
std::string place(uintptr_t address) {
  std::vector<Region*> regions = shared_regions();
  if (running) regions.insert(regions.begin(), &running->block->shared);
  for (const auto& r : machine.scope->regions) regions.push_back(r.get());
  const Region* nearest = nullptr;
  uintptr_t distance = 4096;
  for (const Region* r : regions) {
    if (r->contains(address, 1)) return offset_text(*r, address);
    if (!r->bytes && !r->block) continue;
    const uintptr_t d = address < r->low ? r->low - address : address - (r->low + r->bytes);
    if (d < distance) distance = d, nearest = r;
  }
  const std::string text = hexadecimal(address);
  return nearest ? concat(text, ", ", offset_text(*nearest, address)) : text;
}

enum class Way { kRead, kWrite, kAtomic };

static const char* verb(Way way) {
  return way == Way::kRead ? "read" : way == Way::kWrite ? "write" : "atomic access";
}

[[noreturn]] static void fail_access(uintptr_t pc, const char* what, Way way, uintptr_t address,
                                     size_t size, const std::string& more = "") {
  fail_at(pc, concat(what, ": ", verb(way), " of ", size, size == 1 ? " byte" : " bytes", " at ",
                     place(address), more));
}

[[noreturn]] static void fail_race(uintptr_t pc, Way way, uintptr_t address, size_t size, Way other,
                                   uint64_t epoch, uint32_t other_pc) {
  const char* did = other == Way::kRead    ? " read it at "
                    : other == Way::kWrite ? " wrote it at "
                                           : " accessed it atomically at ";
  fail_access(pc, "data race", way, address, size,
              concat("; ", describe_thread(epoch), did, at(long_pc(other_pc)),
                     ", and nothing orders the two"));
}

[[noreturn]] static void fail_pending(uintptr_t pc, Way way, uintptr_t address, size_t size,
                                      uint64_t epoch, uint32_t other_pc) {
  fail_access(pc, "async copy not waited for", way, address, size,
              concat("; ", describe_thread(epoch), " began the copy at ", at(long_pc(other_pc))));
}

// ------------------------------------------------------------------------------------------- order

bool is_before(const Fiber& f, uint64_t e) {
  if (e - f.block_low <= f.floor_span || e < machine.first_epoch) return true;
  const uint64_t block = block_of(e);
  const uint32_t thread = thread_of(e), clock = clock_of(e);
  if (block == f.block->id) return thread == f.rank || (f.base && clock <= f.base->at[thread]);
  const Known* known = f.foreign ? f.foreign->find(block) : nullptr;
  return known && known->covers(thread, clock);
}

// The lane among `accesses` that is not before the fiber, or −1.
static int unordered_lane(const Fiber& f, const Accesses& accesses) {
  if (accesses.epoch - f.block_low <= f.floor_span || accesses.epoch < machine.first_epoch)
    return -1;
  for (unsigned lanes = accesses.lanes; lanes; lanes &= lanes - 1)
    if (const int lane = __builtin_ctz(lanes); !is_before(f, accesses.epoch + unsigned(lane)))
      return lane;
  return -1;
}

static bool same_thread(const Fiber& f, uint64_t e) {
  return ((e ^ f.epoch) & ~(kClockMask << kThreadBits)) == 0;
}

static void add_access(Fiber& f, std::vector<Accesses>& list, uint32_t pc, bool drop) {
  const uint64_t epoch = f.epoch & ~uint64_t(31);
  const unsigned lane = 1u << f.lane();
  size_t looked = 0;
  for (size_t i = list.size(); i-- > 0 && looked++ < 40;) {
    if (list[i].epoch == epoch) {
      list[i].lanes |= lane;
      return;
    }
    if (drop && unordered_lane(f, list[i]) < 0) {
      list[i] = list.back();
      list.pop_back();
    }
  }
  list.push_back({epoch, lane, pc});
}

// -------------------------------------------------------------------------------- cells, slow ways

static uintptr_t address_of(const Region& r, const Cell& c) {
  return r.base + (size_t(&c - r.cells) << r.shift);
}

// Bytes of an op in place: the output's are those of the input.
static bool is_also_input(uintptr_t address, size_t size) {
  for (const auto& r : machine.scope->regions)
    if (r->kind == Kind::kInput && r->contains(address, size)) return true;
  return false;
}

static void check_list(Fiber& f, Region& r, Cell& c, uintptr_t pc, Way way,
                       const std::vector<Accesses>& list, Way other) {
  for (const Accesses& accesses : list)
    if (const int lane = unordered_lane(f, accesses); lane >= 0)
      fail_race(pc, way, address_of(r, c), size_t(1) << r.shift, other,
                accesses.epoch + unsigned(lane), accesses.pc);
}

static void check_last_write(Fiber& f, Region& r, Cell& c, uintptr_t pc, Way way) {
  const uintptr_t address = address_of(r, c);
  const size_t size = size_t(1) << r.shift;
  if (c.write == 0) {
    if (way == Way::kWrite || is_also_input(address, 1)) return;
    fail_access(pc, "never written", way, address, size);
  }
  if (c.write & kPending) fail_pending(pc, way, address, size, c.write, c.write_pc);
  if (!is_before(f, c.write)) fail_race(pc, way, address, size, Way::kWrite, c.write, c.write_pc);
}

__attribute__((noinline)) static void slow_read(Fiber& f, Region& r, Cell& c, uintptr_t pc) {
  check_last_write(f, r, c, pc, Way::kRead);
  const uint32_t here = short_pc(pc);
  if (c.read && !(c.read & kRecord) && !is_before(f, c.read)) {
    const uint32_t index = r.records->take();
    r.records->all[index].reads.push_back(
        {c.read & ~uint64_t(31), 1u << (thread_of(c.read) % 32), c.read_pc});
    c.read = kRecord | index;
  }
  if (!(c.read & kRecord)) {
    c.read = f.epoch;
    c.read_pc = here;
    return;
  }
  Record& record = r.records->all[uint32_t(c.read)];
  check_list(f, r, c, pc, Way::kRead, record.atomic_writes, Way::kAtomic);
  add_access(f, record.reads, here, true);
}

static void check_reads(Fiber& f, Region& r, Cell& c, uintptr_t pc, Way way) {
  if (c.read & kRecord) {
    const Record& record = r.records->all[uint32_t(c.read)];
    check_list(f, r, c, pc, way, record.reads, Way::kRead);
    if (way == Way::kAtomic) return;
    check_list(f, r, c, pc, way, record.atomic_reads, Way::kAtomic);
    check_list(f, r, c, pc, way, record.atomic_writes, Way::kAtomic);
  } else if (c.read && !is_before(f, c.read)) {
    fail_race(pc, way, address_of(r, c), size_t(1) << r.shift, Way::kRead, c.read, c.read_pc);
  }
}

__attribute__((noinline)) static void slow_write(Fiber& f, Region& r, Cell& c, uintptr_t pc) {
  check_last_write(f, r, c, pc, Way::kWrite);
  check_reads(f, r, c, pc, Way::kWrite);
  if (c.read & kRecord) r.records->give(uint32_t(c.read));
  c = {f.epoch, 0, short_pc(pc), 0};
}

static void atomic_cell(Fiber& f, Region& r, Cell& c, uintptr_t pc, Atomic kind) {
  if (c.write == 0 && kind == Atomic::kStore)
    c.write = kBefore;
  else
    check_last_write(f, r, c, pc, Way::kAtomic);
  if (kind != Atomic::kLoad) check_reads(f, r, c, pc, Way::kAtomic);
  if (!(c.read & kRecord)) {
    const uint32_t index = r.records->take();
    if (c.read)
      r.records->all[index].reads.push_back(
          {c.read & ~uint64_t(31), 1u << (thread_of(c.read) % 32), c.read_pc});
    c.read = kRecord | index;
  }
  Record& record = r.records->all[uint32_t(c.read)];
  if (kind == Atomic::kLoad)
    add_access(f, record.atomic_reads, short_pc(pc), true);
  else  // a later read must be ordered after each of these
    add_access(f, record.atomic_writes, short_pc(pc), false);
}

// ----------------------------------------------------------------------------------------- lookups

// What is mapped for reading only: the constants of the library.
static bool is_constant(uintptr_t address, size_t size) {
  struct Ranges {
    std::vector<std::pair<uintptr_t, uintptr_t>> all;
    Ranges() {
      dl_iterate_phdr(
          [](dl_phdr_info* info, size_t, void* result) {
            std::vector<std::pair<uintptr_t, uintptr_t>> found;
            bool own = false;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
              const auto& header = info->dlpi_phdr[i];
              const uintptr_t low = info->dlpi_addr + header.p_vaddr, high = low + header.p_memsz;
              const auto here = reinterpret_cast<uintptr_t>(&map_cells);
              if (header.p_type == PT_LOAD) own |= here >= low && here < high;
              if ((header.p_type == PT_LOAD && !(header.p_flags & PF_W)) ||
                  header.p_type == PT_GNU_RELRO)
                found.emplace_back(low, high);
            }
            if (own) *static_cast<decltype(found)*>(result) = found;
            return int(own);
          },
          &all);
    }
  };
  static const Ranges ranges;
  for (const auto& [low, high] : ranges.all)
    if (address >= low && address + size <= high) return true;
  return false;
}

// The shared memory of another block, or none's.
static Region* find_shared(Fiber& f, uintptr_t address, size_t size, Way way, uintptr_t pc) {
  const intptr_t offset = intptr_t(address - f.shared_low);
  if (offset >= -intptr_t(kGap) && offset < intptr_t(f.shared_bytes + kGap))
    fail_access(pc, "out of bounds", way, address, size);
  for (Region* r : shared_regions()) {
    if (!r->contains(address, size)) continue;
    Block& block = *r->block;
    if (block.cluster != f.block->cluster)
      fail_access(pc, "shared memory of a block outside the cluster", way, address, size);
    if (!f.foreign || !f.foreign->find(block.id))
      fail_access(pc, "before any barrier of the cluster", way, address, size,
                  ": that block may not run yet");
    if (!block.alive) fail_access(pc, "shared memory of an ended block", way, address, size);
    block.used_by_others = true;
    return r;
  }
  fail_access(pc, "out of bounds", way, address, size);
}

// The region of an access; null where there is nothing to track; fails where it may not be.
__attribute__((noinline)) static Region* find(Fiber& f, uintptr_t address, size_t size, Way way,
                                              uintptr_t pc) {
  if (address - reinterpret_cast<uintptr_t>(machine.arena) < machine.arena_bytes)
    return find_shared(f, address, size, way, pc);
  for (const auto& r : machine.scope->regions) {
    if (!r->contains(address, size)) continue;
    if (r->kind == Kind::kInput && way != Way::kRead)
      fail_access(pc, "write to an input", way, address, size);
    return machine.last = r.get();
  }
  if (address - reinterpret_cast<uintptr_t>(machine.body) < machine.body_bytes) {
    if (way == Way::kRead) return nullptr;
    fail_access(pc, "write to a kernel's arguments", way, address, size);
  }
  for (const uintptr_t stacks : machine.stacks)
    if (address - stacks < kStackStride * kStacksAtOnce)
      fail_access(pc, "local memory of another thread", way, address, size);
  if (is_constant(address, size)) {
    if (way == Way::kRead) return nullptr;
    fail_access(pc, "write to a constant", way, address, size);
  }
  fail_access(pc, "out of bounds", way, address, size, ", which is not tracked memory");
}

template <Way kWay>
__attribute__((always_inline)) inline Region* lookup(Fiber& f, uintptr_t address, size_t size,
                                                     uintptr_t pc) {
  const uintptr_t offset = address - f.shared_low;
  if (offset < f.shared_bytes && size <= f.shared_bytes - offset) return &f.block->shared;
  Region* last = machine.last;
  if (last->contains(address, size) && (kWay == Way::kRead || last->kind != Kind::kInput))
    return last;
  return find(f, address, size, kWay, pc);
}

template <Way kWay>
__attribute__((always_inline)) inline void access(Fiber& f, uintptr_t address, size_t size,
                                                  uintptr_t pc) {
  Region* r = lookup<kWay>(f, address, size, pc);
  if (!r || !r->cells) return;
  if ((address | size) & ((uintptr_t(1) << r->shift) - 1)) [[unlikely]]
    refine(*r, address | size);
  const uint64_t low = f.block_low, span = f.floor_span, epoch = f.epoch;
  const auto known = [&](uint64_t e) { return e - low <= span || same_thread(f, e); };
  Cell* c = r->cell(address);
  for (size_t n = size >> r->shift; n; --n, ++c) {
    if constexpr (kWay == Way::kRead) {
      if (c->read == epoch) continue;
      if (known(c->write) && (c->read == 0 || known(c->read))) {
        c->read = epoch;
        c->read_pc = short_pc(pc);
      } else {
        slow_read(f, *r, *c, pc);
      }
    } else {
      if ((c->write == 0 || known(c->write)) && (c->read == 0 || known(c->read)))
        *c = {epoch, 0, short_pc(pc), 0};
      else
        slow_write(f, *r, *c, pc);
    }
  }
}

// ------------------------------------------------------------------------------ for the primitives

[[noreturn]] static void fail_alignment(uintptr_t pc, Way way, uintptr_t address, size_t size) {
  fail_access(pc, "misaligned", way, address, size);
}

static bool is_on_stack(const Fiber& f, uintptr_t address) { return address - f.stack < kStack; }

void check_read(Fiber& f, const void* pointer, size_t size, size_t alignment, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignment) fail_alignment(pc, Way::kRead, address, size);
  if (!is_on_stack(f, address)) access<Way::kRead>(f, address, size, pc);
}

void check_write(Fiber& f, void* pointer, size_t size, size_t alignment, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignment) fail_alignment(pc, Way::kWrite, address, size);
  if (!is_on_stack(f, address)) access<Way::kWrite>(f, address, size, pc);
}

void check_atomic(Fiber& f, const void* pointer, size_t size, Atomic kind, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % size) fail_alignment(pc, Way::kAtomic, address, size);
  if (is_on_stack(f, address)) return;
  Region* r = kind == Atomic::kLoad ? lookup<Way::kRead>(f, address, size, pc)
                                    : lookup<Way::kAtomic>(f, address, size, pc);
  if (!r || !r->cells) return;
  if ((address | size) & ((uintptr_t(1) << r->shift) - 1)) refine(*r, address | size);
  Cell* c = r->cell(address);
  for (size_t n = size >> r->shift; n; --n, ++c) atomic_cell(f, *r, *c, pc, kind);
}

void check_unwritten_in_launch(Fiber& f, const void* pointer, size_t size, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Region* r = lookup<Way::kRead>(f, address, size, pc);
  if (r && r->block) fail_access(pc, "load_streaming of shared memory", Way::kRead, address, size);
  if (!r || !r->cells) return;
  const Cell* c = r->cell(address);
  for (size_t n = size >> r->shift; n; --n, ++c)
    if ((c->write & ~kPending) >= machine.first_epoch)
      fail_access(pc, "load_streaming of memory that this launch writes", Way::kRead, address,
                  size);
}

void check_shared(Fiber& f, const void* pointer, size_t size, const char* what, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t offset = address - f.shared_low;
  if (offset >= f.shared_bytes || size > f.shared_bytes - offset)
    fail_at(pc, concat(what, " out of bounds of the block's shared memory: ", size, " bytes at ",
                       place(address)));
}

void begin_copy(Fiber& f, void* pointer, size_t size, uintptr_t pc) {
  check_write(f, pointer, size, 16, pc);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Region& r = *lookup<Way::kWrite>(f, address, size, pc);
  Cell* c = r.cell(address);
  for (size_t n = size >> r.shift; n; --n, ++c) c->write |= kPending;
}

void end_copy(void* pointer, size_t size, uint64_t epoch, uint32_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (Region* r : shared_regions()) {
    if (!r->contains(address, size)) continue;
    Cell* c = r->cell(address);
    for (size_t n = size >> r->shift; n; --n, ++c) *c = {epoch, 0, pc, 0};
  }
}

void check_ended(Block& block) {
  if (!block.used_by_others) return;
  const Region& r = block.shared;
  const auto check = [&](uint64_t epoch, uint32_t pc, const Cell& c) {
    if (epoch == 0 || block_of(epoch) == block.id) return;
    for (unsigned t = 0; t < block.threads; ++t)
      if (is_before(*block.fibers[t], epoch)) return;
    fail(concat("the block ends, and nothing lets it wait for ", describe_thread(epoch),
                ", which uses ", place(address_of(r, c)), " at ", at(long_pc(pc))));
  };
  for (size_t i = 0; i < r.cell_count; ++i) {
    const Cell& c = r.cells[i];
    check(c.write & ~kPending, c.write_pc, c);
    if (!(c.read & kRecord)) {
      check(c.read, c.read_pc, c);
      continue;
    }
    const Record& record = r.records->all[uint32_t(c.read)];
    for (const auto* list : {&record.reads, &record.atomic_reads, &record.atomic_writes})
      for (const Accesses& accesses : *list)
        for (unsigned lanes = accesses.lanes; lanes; lanes &= lanes - 1)
          check(accesses.epoch + unsigned(__builtin_ctz(lanes)), accesses.pc, c);
  }
}

// ----------------------------------------------------------------------------------------- entries

static thread_local std::vector<std::unique_ptr<Scope>> scopes;

Scope& current_scope() {
  if (scopes.empty()) throw std::logic_error("no EntryScope is open on this thread");
  return *scopes.back();
}

EntryScope::EntryScope() : exceptions_(std::uncaught_exceptions()) {
  scopes.push_back(std::make_unique<Scope>());
}

// The index of an element of the output that is not written, as text; empty if there is none.
static std::string unwritten(Region& r) {
  const auto is_written = [&](uintptr_t address) {
    const Cell* c = r.cell(address);
    for (int64_t byte = 0; byte < r.item; byte += int64_t(1) << r.shift, ++c)
      if (c->write == 0 || (c->write & kPending)) return false;
    return true;
  };
  std::vector<int64_t> index(r.sizes.size());
  std::string first;
  int64_t missing = 0, count = 1;
  for (const int64_t size : r.sizes) count *= size;
  uintptr_t address = r.low;
  for (int64_t i = 0; i < count; ++i) {
    if (!is_written(address) && missing++ == 0)
      for (const int64_t at : index) first += (first.empty() ? "" : ", ") + std::to_string(at);
    for (size_t d = r.sizes.size(); d-- > 0;) {
      address += uintptr_t(r.strides[d] * r.item);
      if (++index[d] < r.sizes[d]) break;
      address -= uintptr_t(r.strides[d] * r.item * r.sizes[d]);
      index[d] = 0;
    }
  }
  if (!missing) return "";
  return concat(missing, " of ", count, " elements of output `", r.name,
                "` are not written, the first at [", first, "]");
}

EntryScope::~EntryScope() noexcept(false) {
  const std::unique_ptr<Scope> scope = std::move(scopes.back());
  scopes.pop_back();
  if (scope->failed || std::uncaught_exceptions() > exceptions_) return;
  for (const auto& r : scope->regions) {
    if (r->kind != Kind::kOutput) continue;
    if (const std::string text = unwritten(*r); !text.empty()) throw std::runtime_error(text);
  }
}

void track(const char* name, const void* data, int64_t item, int64_t dims, const int64_t* sizes,
           const int64_t* strides, Kind kind) {
  Scope& scope = current_scope();
  int64_t last = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return;
    if (strides[d] < 0) throw std::logic_error("a negative stride");
    last += (sizes[d] - 1) * strides[d];
  }
  auto r = std::make_unique<Region>();
  r->name = name;
  r->kind = kind;
  r->low = reinterpret_cast<uintptr_t>(data);
  r->base = r->low & ~uintptr_t(15);
  r->bytes = size_t((last + 1) * item);
  r->records = &scope.records;
  r->item = item;
  r->sizes.assign(sizes, sizes + dims);
  r->strides.assign(strides, strides + dims);
  const bool written = kind != Kind::kInput;
  for (auto it = scope.regions.begin(); it != scope.regions.end();) {
    const Region& other = **it;
    const bool meets = r->low < other.low + other.bytes && other.low < r->low + r->bytes;
    if (meets && other.low == r->low && other.bytes == r->bytes && other.kind == kind) return;
    if (!meets || !written || other.kind == Kind::kInput) {
      ++it;
    } else if (other.kind == Kind::kScratch) {  // freed, and used again
      it = scope.regions.erase(it);
    } else if (other.contains(r->low, r->bytes)) {
      return;  // a part of an output
    } else {
      throw std::logic_error(concat("`", name, "` overlaps `", other.name, "`"));
    }
  }
  if (written) {
    int shift = 0;
    while (shift < 3 && (int64_t(2) << shift) <= item) ++shift;
    r->resize(shift);
    if (kind == Kind::kInOut)
      for (size_t i = 0; i < r->cell_count; ++i) r->cells[i].write = kBefore;
  }
  scope.regions.insert(written ? scope.regions.begin() : scope.regions.end(), std::move(r));
}

// --------------------------------------------------------------------- the instrumentation's calls

namespace {

template <Way kWay>
__attribute__((always_inline)) inline void instrumented(void* pointer, size_t size, bool aligned,
                                                        uintptr_t pc) {
  Fiber* f = running;
  if (!f) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_on_stack(*f, address)) return;
  if (aligned && address % size) [[unlikely]]
    fail_alignment(pc, kWay, address, size);
  access<kWay>(*f, address, size, pc);
}

}  // namespace
}  // namespace dlkernels::emulated

using dlkernels::emulated::instrumented;
using dlkernels::emulated::kStack;
using dlkernels::emulated::running;
using dlkernels::emulated::Way;

#pragma GCC visibility push(hidden)
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {
  constexpr intptr_t kLeft = 8192;  // for the emulator itself
  if (running &&
      intptr_t(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - running->stack) < kLeft)
    dlkernels::emulated::fail("the stack of a thread overflows: its local arrays, or a recursion");
}
void __tsan_func_exit() {}

#define DLK_ACCESSES(size)                                                                    \
  void __tsan_read##size(void* p) { instrumented<Way::kRead>(p, size, true, DLK_HERE_PC); }   \
  void __tsan_write##size(void* p) { instrumented<Way::kWrite>(p, size, true, DLK_HERE_PC); } \
  void __tsan_unaligned_read##size(void* p) {                                                 \
    instrumented<Way::kRead>(p, size, false, DLK_HERE_PC);                                    \
  }                                                                                           \
  void __tsan_unaligned_write##size(void* p) {                                                \
    instrumented<Way::kWrite>(p, size, false, DLK_HERE_PC);                                   \
  }                                                                                           \
  void __tsan_volatile_read##size(void* p) {                                                  \
    if (running) dlkernels::emulated::spin(*running);                                         \
    instrumented<Way::kRead>(p, size, true, DLK_HERE_PC);                                     \
  }                                                                                           \
  void __tsan_volatile_write##size(void* p) {                                                 \
    instrumented<Way::kWrite>(p, size, true, DLK_HERE_PC);                                    \
  }                                                                                           \
  void __tsan_unaligned_volatile_read##size(void* p) {                                        \
    instrumented<Way::kRead>(p, size, false, DLK_HERE_PC);                                    \
  }                                                                                           \
  void __tsan_unaligned_volatile_write##size(void* p) {                                       \
    instrumented<Way::kWrite>(p, size, false, DLK_HERE_PC);                                   \
  }
DLK_ACCESSES(1)
DLK_ACCESSES(2)
DLK_ACCESSES(4)
DLK_ACCESSES(8)
DLK_ACCESSES(16)

void __tsan_read_range(void* p, unsigned long size) {
  if (size) instrumented<Way::kRead>(p, size, false, DLK_HERE_PC);
}
void __tsan_write_range(void* p, unsigned long size) {
  if (size) instrumented<Way::kWrite>(p, size, false, DLK_HERE_PC);
}
void __tsan_vptr_update(void** p, void*) {
  instrumented<Way::kWrite>(p, sizeof(void*), true, DLK_HERE_PC);
}
void __tsan_vptr_read(void** p) { instrumented<Way::kRead>(p, sizeof(void*), true, DLK_HERE_PC); }

// What the compiler does not open up into accesses it calls by name. Only tracked memory is looked
// at: the emulator's own copies come here too.
static bool is_tracked(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  using dlkernels::emulated::machine;
  if (address - reinterpret_cast<uintptr_t>(machine.arena) < machine.arena_bytes) return true;
  for (const auto& r : machine.scope->regions)
    if (r->contains(address, 1)) return true;
  return false;
}

#define DLK_BYTES(way, p)               \
  if (running && size && is_tracked(p)) \
  instrumented<way>(const_cast<void*>(p), size, false, DLK_HERE_PC)

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void* memmove(void* to,
                                                                            const void* from,
                                                                            size_t size) {
  DLK_BYTES(Way::kRead, from);
  DLK_BYTES(Way::kWrite, to);
  auto* t = static_cast<unsigned char*>(to);
  auto* f = static_cast<const unsigned char*>(from);
  if (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from) >= size) {
#ifdef __x86_64__
    asm volatile("rep movsb" : "+D"(t), "+S"(f), "+c"(size) : : "memory");
#else
    for (size_t i = 0; i < size; ++i) t[i] = f[i];
#endif
  } else {
    while (size-- > 0) t[size] = f[size];
  }
  return to;
}

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void* memcpy(void* to,
                                                                           const void* from,
                                                                           size_t size) {
  DLK_BYTES(Way::kRead, from);
  DLK_BYTES(Way::kWrite, to);
  auto* t = static_cast<unsigned char*>(to);
  auto* f = static_cast<const unsigned char*>(from);
#ifdef __x86_64__
  asm volatile("rep movsb" : "+D"(t), "+S"(f), "+c"(size) : : "memory");
#else
  for (size_t i = 0; i < size; ++i) t[i] = f[i];
#endif
  return to;
}

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void* memset(void* to, int value,
                                                                           size_t size) {
  DLK_BYTES(Way::kWrite, to);
  auto* t = static_cast<unsigned char*>(to);
  for (size_t i = 0; i < size; ++i) t[i] = static_cast<unsigned char>(value);
  return to;
}

// std::atomic and function-local statics of host code in the same file.
#define DLK_ATOMIC_FETCH(bits, type, operation)                                 \
  type __tsan_atomic##bits##_fetch_##operation(volatile type* p, type v, int) { \
    return __atomic_fetch_##operation(p, v, __ATOMIC_SEQ_CST);                  \
  }
#define DLK_ATOMICS(bits, type)                                                                    \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                   \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) {                                \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  DLK_ATOMIC_FETCH(bits, type, add)                                                                \
  DLK_ATOMIC_FETCH(bits, type, sub)                                                                \
  DLK_ATOMIC_FETCH(bits, type, and)                                                                \
  DLK_ATOMIC_FETCH(bits, type, or)                                                                 \
  DLK_ATOMIC_FETCH(bits, type, xor)                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* e, type v, int, int) { \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* e, type v, int, int) {   \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                \
  type __tsan_atomic##bits##_compare_exchange_val(volatile type* p, type e, type v, int, int) {    \
    __atomic_compare_exchange_n(p, &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
    return e;                                                                                      \
  }
DLK_ATOMICS(8, unsigned char)
DLK_ATOMICS(16, unsigned short)
DLK_ATOMICS(32, unsigned)
DLK_ATOMICS(64, unsigned long)

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
#pragma GCC visibility pop
