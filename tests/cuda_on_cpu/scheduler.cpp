// Fibers and launches.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator.h"

#if defined(__x86_64__) && !defined(DLKERNELS_UCONTEXT)
#define DLK_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace dlkernels::emulated {

__thread Fiber* running = nullptr;
Machine machine;

// ---------------------------------------------------------------------------------------- contexts

static void fiber_main();

#if DLK_SWITCH
// Keeps what a call keeps: rbx, rbp, r12-r15. The jump, not a ret, goes to the other fiber, whose
// return address the processor's stack of them does not have.
extern "C" __attribute__((visibility("hidden"))) void dlkernels_switch(void** from, void* to);
asm(R"(
.text
.type dlkernels_switch, @function
.hidden dlkernels_switch
.globl dlkernels_switch
dlkernels_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size dlkernels_switch, .-dlkernels_switch
)");

static void prepare(Fiber& fiber) {
  auto* top = reinterpret_cast<void**>((fiber.stack + kStack) & ~uintptr_t(15));
  *--top = nullptr;  // the caller of fiber_main: none; a call leaves the stack at 8 modulo 16
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
}
static inline void switch_context(void** from, void* to) { dlkernels_switch(from, to); }
#else
static void prepare(Fiber& fiber) {
  if (!fiber.context) fiber.context = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<void*>(fiber.stack);
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, &fiber_main, 0);
}
static inline void switch_context(void** from, void* to) {
  if (!*from) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#endif

// --------------------------------------------------------------------------------------- scheduler

static Fiber* next_ready() {
  if (machine.head == machine.tail) return nullptr;
  return machine.ready[machine.head++ & (machine.ready.size() - 1)];
}

static void leave(void** context) {
  Fiber* next = next_ready();
  running = next;
  if (next)
    switch_context(context, next->context);
  else
    switch_context(context, machine.context);
}

void resume(Fiber& fiber) { machine.ready[machine.tail++ & (machine.ready.size() - 1)] = &fiber; }

void suspend(Fiber& fiber) {
  leave(&fiber.context);
  fiber.wait.kind = Wait::kNone;
}

void yield(Fiber& fiber) {
  if (machine.head == machine.tail) return;
  resume(fiber);
  leave(&fiber.context);
}

// All of the alive may spin; each may count some thousand rounds down.
void spin(Fiber& fiber) {
  if (++machine.idle > 20000 * (machine.alive + 10))
    fail(
        "deadlock: every thread that does not wait at a barrier spins on a value that nobody "
        "stores");
  yield(fiber);
}

// Step through n places from a random one on, by a stride that meets each once.
static size_t random_stride(size_t n) {
  constexpr size_t kStrides[] = {1, 3, 5, 7, 11, 13, 17, 19};
  const size_t stride = kStrides[machine.random() % 8];
  return n % stride ? stride : 1;
}

void resume_all(std::vector<Fiber*>& fibers, const Fiber* except) {
  progress();
  const size_t n = fibers.size();
  if (n == 0) return;
  const size_t stride = random_stride(n);
  for (size_t i = 0, at = machine.random() % n; i < n; ++i) {
    if (fibers[at] != except) resume(*fibers[at]);
    for (at += stride; at >= n;) at -= n;
  }
  fibers.clear();
}

void fail_outside() { throw std::logic_error("a device function is called outside a kernel"); }

static void fiber_main() {
  Fiber& fiber = *running;
  std::string error;
  try {
    machine.call(machine.body);
  } catch (const std::exception& thrown) {
    error = concat("exception in a kernel: ", thrown.what());
  } catch (...) {
    error = "exception in a kernel";
  }
  if (!error.empty()) fail(error);
  check_end(fiber);
  fiber.ended = true;
  --machine.alive;
  progress();
  leave(&fiber.context);
  __builtin_unreachable();
}

// ----------------------------------------------------------------------------------------- reports

static std::string triple(uint3 v) { return concat("(", v.x, ", ", v.y, ", ", v.z, ")"); }

static uintptr_t find_library() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&fiber_main), &info);
  return reinterpret_cast<uintptr_t>(info.dli_fbase);
}
const uintptr_t library_base = find_library();

std::string hexadecimal(uint64_t value) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Resolved when the launch has ended: a fiber's stack is no place for that.
std::string at(uintptr_t pc) { return pc ? concat("\1", hexadecimal(pc), "\2") : ""; }

std::string at(const char* file, int line) {
  const char* slash = strrchr(file, '/');
  return concat(slash ? slash + 1 : file, ":", line);
}

// "file:line" of a return address, from the inside out where functions are inlined.
static std::string source_line(uintptr_t pc) {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&fiber_main), &info);
  const std::string offset = hexadecimal(pc - 1 - library_base);
  std::string result;
  const std::string command =
      concat("addr2line -s -i -e '", info.dli_fname, "' ", offset, " 2>/dev/null");
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof line, pipe)) {
      line[strcspn(line, " \n")] = 0;
      if (line[0] && line[0] != '?' && strncmp(line, "arch.h:", 7))
        result += (result.empty() ? "" : " in ") + std::string(line);
    }
    pclose(pipe);
  }
  return result.empty() ? "+" + offset : result;
}

static std::string resolve(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\1') {
      result += text[i];
      continue;
    }
    const size_t end = text.find('\2', i);
    result += source_line(std::stoull(text.substr(i + 1, end - i - 1), nullptr, 16));
    i = end;
  }
  return result;
}

std::string describe(const Wait& wait) {
  switch (wait.kind) {
    case Wait::kBlock:
      return concat("sync_block at ", at(wait.what, int(wait.a)));
    case Wait::kWarp:
      return concat(wait.what, " with mask ", hexadecimal(uint64_t(wait.a)));
    case Wait::kNamed:
      return concat("sync_named(", wait.a, ", ", wait.b, ")");
    case Wait::kGrid:
      return "sync_grid";
    case Wait::kCluster:
      return "cluster_wait";
    case Wait::kMbarrier:
      return concat("mbarrier_wait of parity ", wait.b, " at ", place(uintptr_t(wait.a)));
    case Wait::kNone:
      break;
  }
  return "nothing";
}

static size_t mix(size_t group, size_t groups);
static uint3 block_coordinates(size_t linear) {
  const dim3& grid = machine.launch.grid;
  return {unsigned(linear % grid.x), unsigned(linear / grid.x % grid.y),
          unsigned(linear / grid.x / grid.y)};
}

// The block that runs at this place of the order.
static uint3 block_at(size_t position) {
  const Launch& launch = machine.launch;
  const size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (launch.cooperative) return block_coordinates(position);
  const size_t group = mix(position / launch.cluster, blocks / launch.cluster);
  return block_coordinates(group * launch.cluster + position % launch.cluster);
}

static uint3 thread_coordinates(unsigned rank) {
  const dim3& block = machine.launch.block;
  return {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
}

std::string describe_thread(uint64_t epoch) {
  return concat("thread ", triple(thread_coordinates(thread_of(epoch))), " of block ",
                triple(block_at(block_of(epoch) - machine.first_block)));
}

static std::string seed_text() { return concat(" (DLKERNELS_EMULATED_SEED=", machine.seed, ")"); }

[[noreturn]] static void stop(Failure failure) {
  machine.failure = std::move(failure);
  machine.failure.any = true;
  void* never = nullptr;
  running = nullptr;
  switch_context(&never, machine.context);
  __builtin_unreachable();
}

void fail(const std::string& text) {
  const Fiber& f = *running;
  stop({concat("kernel ", machine.launch.name, ", block ", triple(f.block->index), ", thread ",
               triple(f.index), ": ", text, seed_text())});
}

void fail_at(uintptr_t pc, const std::string& text) { fail(concat(at(pc), ": ", text)); }

void fail_index(const char* format, ...) {
  self();
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  stop({text, true});
}

// Nobody can run, and some have not ended.
static std::string deadlock() {
  struct Group {
    size_t threads = 0;
    const Fiber* first = nullptr;
  };
  std::map<std::string, Group> groups;
  std::string never;
  for (size_t i = 0; i < machine.resident * machine.blocks[0]->threads; ++i) {
    const Fiber& f = *machine.fibers[i];
    if (f.ended) continue;
    Group& group = groups[describe(f.wait)];
    if (!group.threads++) group.first = &f;
    if (f.wait.kind != Wait::kWarp || !never.empty()) continue;
    const Warp& warp = f.block->warps[f.rank / 32];
    for (const Meeting& meeting : warp.meetings) {
      const unsigned missing = meeting.mask & ~meeting.arrived;
      if (!(meeting.mask >> f.lane() & 1) || !missing) continue;
      const Fiber& late = *warp.lanes[__builtin_ctz(missing)];
      never = concat("lanes ", hexadecimal(missing), " never come to ", describe(f.wait), ": lane ",
                     late.lane(), " waits at ", describe(late.wait), "; ");
    }
  }
  std::string text = concat("kernel ", machine.launch.name, ": deadlock: ", never);
  for (const auto& [what, group] : groups)
    text += concat(group.threads, group.threads == 1 ? " thread waits" : " threads wait", " at ",
                   what, " (first: ", describe_thread(group.first->epoch), "); ");
  const size_t ended = machine.resident * machine.blocks[0]->threads - machine.alive;
  return text + concat(ended, " have ended", seed_text());
}

// ---------------------------------------------------------------------------------------- launches

// A permutation of the groups of blocks, by the seed.
static size_t mix(size_t group, size_t groups) {
  size_t factor = (machine.seed * 2 + 1) % groups;
  while (std::gcd(factor, groups) != 1) ++factor;
  return (group * factor + machine.seed % groups) % groups;
}

static void take_fibers(size_t count) {
  while (machine.fibers.size() < count) {
    // A frame that is too large is seen when it is there: the first stack has room below.
    void* stacks = mmap(nullptr, kBelowStacks + kStackStride * kStacksAtOnce,
                        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    machine.stacks.push_back(reinterpret_cast<uintptr_t>(stacks) + kBelowStacks);
    for (size_t i = 0; i < kStacksAtOnce; ++i) {
      machine.owned.push_back(std::make_unique<Fiber>());
      machine.owned.back()->stack = machine.stacks.back() + i * kStackStride;
      machine.fibers.push_back(machine.owned.back().get());
    }
  }
  size_t capacity = 2;
  while (capacity < count + 1) capacity *= 2;
  if (machine.ready.size() < capacity) machine.ready.resize(capacity);
}

static void take_arena(size_t blocks, size_t shared) {
  machine.arena_stride = (shared + kGap + 127) / 128 * 128;
  machine.arena_bytes = kGap + blocks * machine.arena_stride;
  if (machine.arena_bytes <= machine.arena_capacity) return;
  if (machine.arena) munmap(machine.arena, machine.arena_capacity);
  machine.arena_capacity = (machine.arena_bytes + 0xfffff) & ~size_t(0xfffff);
  void* arena = mmap(nullptr, machine.arena_capacity, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) throw std::bad_alloc();
  machine.arena = static_cast<unsigned char*>(arena);
}

static void open_block(Block& block, size_t position, size_t slot) {
  const Launch& launch = machine.launch;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  block.id = machine.first_block + position;
  block.index = block_at(position);
  block.fibers = machine.fibers.data() + slot * threads;
  block.threads = block.alive = threads;
  block.arrived.clear();
  for (auto& named : block.named) named = {};
  block.used_by_others = false;
  block.cluster = machine.clusters[slot / launch.cluster].get();
  block.rank = unsigned(slot % launch.cluster);
  open_shared(block, launch.shared);
  block.warps.resize((threads + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const unsigned lanes = std::min(32u, threads - unsigned(w) * 32);
    block.warps[w].present = lanes == 32 ? ~0u : (1u << lanes) - 1;
    block.warps[w].ended = 0;
    block.warps[w].lanes = block.fibers + w * 32;
    block.warps[w].meetings.clear();
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = *block.fibers[t];
    f.block = &block;
    f.rank = t;
    f.index = thread_coordinates(t);
    f.block_low = block.id << kBlockShift;
    f.epoch = f.block_low | 1 << kThreadBits | t;
    f.floor_span = kThreadMask;
    f.shared_low = block.shared.low;
    f.shared_bytes = block.shared.bytes;
    f.ended = f.at_cluster = false;
    f.wait = {};
    f.base = f.arrived_base = {};
    f.foreign = f.released = f.acquired = f.arrived_foreign = {};
    f.cluster_phase = 0;
    f.open_group = 0;
    f.copies.clear();
    prepare(f);
  }
}

static void run_group(size_t first, size_t blocks) {
  const dim3& block = machine.launch.block;
  const unsigned threads = block.x * block.y * block.z;
  machine.shared_records.clear();
  machine.mbarriers.clear();
  machine.shared_releases.clear();
  machine.resident = blocks;
  machine.alive = blocks * threads;
  machine.head = machine.tail = 0;
  machine.grid = {};
  machine.grid.threads = machine.alive;
  for (size_t slot = 0; slot < blocks; ++slot) {
    if (slot % machine.launch.cluster == 0) {
      Cluster& cluster = *machine.clusters[slot / machine.launch.cluster];
      cluster.first = machine.blocks[slot].get();
      cluster.blocks = machine.launch.cluster;
      cluster.barrier = {};
      cluster.barrier.threads = size_t(threads) * cluster.blocks;
    }
    open_block(*machine.blocks[slot], first + slot, slot);
  }
  std::vector<Fiber*> all(machine.fibers.begin(), machine.fibers.begin() + long(machine.alive));
  resume_all(all, nullptr);
  leave(&machine.context);
  running = nullptr;
  if (!machine.failure.any && machine.alive) machine.failure = {deadlock(), false, true};
}

static std::string shape_text(const Launch& l) {
  return concat("kernel ", l.name, ", grid ", triple({l.grid.x, l.grid.y, l.grid.z}), ", block ",
                triple({l.block.x, l.block.y, l.block.z}), ", ", l.shared,
                " bytes of shared memory, clusters of ", l.cluster);
}

static void check_shape(const Launch& l) {
  const auto check = [&](bool condition, const std::string& text) {
    if (!condition) throw std::runtime_error(concat(shape_text(l), ": ", text));
  };
  const size_t threads = size_t(l.block.x) * l.block.y * l.block.z;
  check(threads >= 1 && threads <= 1024 && l.block.z <= 64, "a block has 1 to 1024 threads");
  check(l.grid.x >= 1 && l.grid.y >= 1 && l.grid.z >= 1, "an empty grid");
  check(l.grid.x <= 0x7fffffff && l.grid.y <= 65535 && l.grid.z <= 65535, "too large a grid");
  check(size_t(l.grid.x) * l.grid.y * l.grid.z < kBlockMask / 4, "too large a grid to emulate");
  check(l.shared <= shared_limit(), concat("a block has at most ", shared_limit(), " bytes"));
  check(l.cluster >= 1 && l.cluster <= 8, "a cluster has 1 to 8 blocks");
  check(l.cluster == 1 || compute_capability() >= 90, "clusters need compute capability 9.0");
  check(l.grid.x % l.cluster == 0, "the grid's x is no multiple of the cluster");
  if (l.cooperative) {
    const size_t by_shared = (shared_limit() + 1024) / (l.shared + 1024);
    const size_t most = multiprocessors() * std::min({2048 / threads, by_shared, size_t(32)});
    check(size_t(l.grid.x) * l.grid.y * l.grid.z <= most,
          concat("a cooperative grid has at most ", most, " blocks here"));
  }
}

static std::mutex& turn() {
  static std::mutex& mutex = *[] {
    static std::mutex made;
    // A child must not inherit another thread's launch.
    pthread_atfork([] { turn().lock(); }, [] { turn().unlock(); }, [] { turn().unlock(); });
    return &made;
  }();
  return mutex;
}
static std::mutex& turn_at_load = turn();

static void execute(Scope& scope, const Launch& launch, const void* body, size_t bytes,
                    void (*call)(const void*)) {
  static uint64_t launches = 0;
  machine.launch = launch;
  machine.body = body;
  machine.body_bytes = bytes;
  machine.call = call;
  machine.scope = &scope;
  const char* wanted = getenv("DLKERNELS_EMULATED_SEED");
  machine.seed = wanted && *wanted ? strtoull(wanted, nullptr, 0) : launches++;
  machine.random.state = (machine.seed + 1) * 0x9e3779b97f4a7c15ull + scope.launches++;
  const size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  const size_t group = launch.cooperative ? blocks : launch.cluster;
  if (scope.next_block + blocks >= kBlockMask)
    throw std::runtime_error("too many blocks for one entry");
  machine.first_block = scope.next_block;
  machine.first_epoch = machine.first_block << kBlockShift;
  scope.next_block += blocks;
  machine.failure = {};
  machine.idle = 0;
  machine.shared_shift = 2;
  static Region none;
  machine.last = &none;
  machine.releases.clear();
  take_fibers(group * threads);
  take_arena(group, launch.shared);
  while (machine.blocks.size() < group) machine.blocks.push_back(std::make_unique<Block>());
  while (machine.clusters.size() < group) machine.clusters.push_back(std::make_unique<Cluster>());
  for (size_t first = 0; first < blocks && !machine.failure.any; first += group)
    run_group(first, group);
  machine.scope = nullptr;
}

void run(const Launch& launch, const void* body, size_t bytes, void (*call)(const void*)) {
  extern Scope& current_scope();
  if (running) throw std::logic_error("a launch inside a kernel");
  check_shape(launch);
  Scope& scope = current_scope();
  Failure failure;
  {
    std::lock_guard<std::mutex> guard(turn());
    execute(scope, launch, body, bytes, call);
    failure = std::move(machine.failure);
  }
  if (!failure.any) return;
  scope.failed = true;
  if (failure.is_index) throw std::out_of_range(failure.text);
  throw std::runtime_error(resolve(failure.text));
}

// ----------------------------------------------------------------------------- device and geometry

static int from_environment(const char* name, int otherwise) {
  const char* wanted = getenv(name);
  return wanted && *wanted ? atoi(wanted) : otherwise;
}

int compute_capability() { return from_environment("DLKERNELS_EMULATED_CC", 90); }
int multiprocessors() { return from_environment("DLKERNELS_EMULATED_MULTIPROCESSORS", 4); }
size_t shared_limit() {
  const int kilobytes = compute_capability() >= 90 ? 227 : 163;
  return size_t(from_environment("DLKERNELS_EMULATED_SHARED", kilobytes)) << 10;
}

uint3 thread_index() { return self().index; }
uint3 block_index() { return self().block->index; }
dim3 block_dim() { return self(), machine.launch.block; }
dim3 grid_dim() { return self(), machine.launch.grid; }
unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(self().shared_low); }

}  // namespace dlkernels::emulated
