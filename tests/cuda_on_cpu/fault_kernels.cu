// Each kernel is right, and wrong where the first number says so. All of them read an input of
// (blocks, threads) floats, write an output of that shape, and may use a scratch tensor of that
// shape and two counters that begin at 0.
#include "kernels.h"

namespace dlkernels {

struct Place {
  unsigned thread, block, threads, index;
  float* shared;
};

DLK_DEVICE Place here() {
  return {threadIdx.x, blockIdx.x, blockDim.x, blockIdx.x * blockDim.x + threadIdx.x,
          reinterpret_cast<float*>(shared_memory())};
}

DLK_DEVICE float sum_of_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  return x;
}

#define BROKEN(n) (a.number(0) == (n))
#define INPUT a.tensor(0)
#define OUTPUT a.tensor(1)
#define SCRATCH a.tensor(2)
#define COUNTERS a.tensor<unsigned>(3)

// ---------------------------------------------------------------------------------------- barriers

// Through shared memory: 1 reads before all have written, 2 writes again before all have read.
KERNEL(reverse) {
  const Place p = here();
  p.shared[p.thread] = 0;
  sync_block();
  for (int i = 0; i < 2; ++i) {
    p.shared[p.thread] = INPUT[p.index] + float(i);
    if (!BROKEN(1)) sync_block();
    OUTPUT[p.index] = p.shared[p.threads - 1 - p.thread];
    if (!BROKEN(2)) sync_block();
  }
}

// A sum that one thread reads after a shuffle: 1 takes the shuffle for a barrier.
KERNEL(lanes_through_shared) {
  const Place p = here();
  p.shared[p.thread] = INPUT[p.index];
  if (BROKEN(1))
    shuffle_xor(kAllLanes, 0, 1);
  else
    sync_warp();
  OUTPUT[p.index] = p.shared[p.thread ^ 1];
}

// A broadcast that all read: 1 lets thread 0 write the next one too early.
KERNEL(broadcast) {
  const Place p = here();
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    if (p.thread == 0) p.shared[0] = INPUT[p.index] + float(i);
    sync_block();
    sum += p.shared[0];
    if (!BROKEN(1)) sync_block();
  }
  OUTPUT[p.index] = sum;
}

// 1 a barrier that half of the block reaches, 2 two barriers, 3 threads that have ended.
KERNEL(divergent) {
  const Place p = here();
  OUTPUT[p.index] = INPUT[p.index];
  if (BROKEN(3) && p.thread == 5) return;
  if (BROKEN(1)) {
    if (p.thread < p.threads / 2) sync_block();
  } else if (BROKEN(2)) {
    if (p.thread % 2)
      sync_block();
    else
      sync_block();
  } else {
    sync_block();
  }
}

// From lane 3 over lane 2 to lane 1, and from there to all: 1 and 2 each without one of the two.
KERNEL(chain) {
  const Place p = here();
  const int l = lane();
  float* own = p.shared + 2 * warp_index();
  if (l == 3) own[0] = INPUT[p.index - 3];
  if (!BROKEN(1) && (l == 2 || l == 3)) sync_warp(0xc);
  if (!BROKEN(2) && (l == 1 || l == 2)) sync_warp(0x6);
  if (l == 1) own[1] = 2 * own[0];
  sync_named(1 + warp_index(), 32);
  OUTPUT[p.index] = own[1];
}

// Warp 0 makes, warp 1 uses: 1 without the barrier, 2 waits for a third warp that does not come,
// 3 disagrees on the number of threads.
KERNEL(named) {
  const Place p = here();
  const unsigned twin = p.thread ^ 32;
  if (warp_index() == 0) p.shared[p.thread] = INPUT[p.index] + INPUT[p.block * p.threads + twin];
  const bool late = warp_index() == 1;
  if (!BROKEN(1)) sync_named(3, BROKEN(2) ? 96 : BROKEN(3) && late ? 32 * 3 : 64);
  OUTPUT[p.index] = late ? p.shared[twin] : 0;
}

// 1 a mask without the caller, 2 a lane that has ended, 3 a lane in another shuffle, 4 a lane at a
// barrier, 5 a source outside of the mask, 6 a vote of a lane that is not there.
KERNEL(masks) {
  const Place p = here();
  OUTPUT[p.index] = INPUT[p.index];
  const int l = lane();
  if (BROKEN(2) && l == 7) return;
  const unsigned own = 0xffffu << (l & 16);
  float sum = shuffle_down(BROKEN(1) && l == 3 ? 0xfffffff7u : kAllLanes, INPUT[p.index], 1);
  if (BROKEN(3) && l == 9)
    sum += shuffle_up(kAllLanes, sum, 1);
  else
    sum += shuffle_xor(kAllLanes, sum, 1);
  if (BROKEN(4)) {
    if (l == 11) sync_block();
    sum += shuffle_from(kAllLanes, sum, 0);
    if (l != 11) sync_block();
  }
  sum += shuffle_xor(own, sum, BROKEN(5) ? 16 : 8);
  if (any(BROKEN(6) && l == 1 ? 3u : own, sum > 0)) OUTPUT[p.index] = sum;
}

// 1 nobody arrives for the second phase, 2 spins on a flag that nobody sets.
KERNEL(stuck) {
  const Place p = here();
  auto* barrier = reinterpret_cast<uint64_t*>(p.shared);
  if (p.thread == 0) mbarrier_init(barrier, p.threads);
  sync_block();
  OUTPUT[p.index] = INPUT[p.index];
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, BROKEN(1) ? 1 : 0);
  if (BROKEN(1)) mbarrier_wait(barrier, 0), mbarrier_wait(barrier, 1);
  if (BROKEN(2))
    while (load_acquire(COUNTERS) == 0) {
    }
}

// ------------------------------------------------------------------------------------------ memory

// 1 reads and 2 writes one row too far, 3 before the first, 4 at an address of the host.
KERNEL(rows) {
  const Place p = here();
  const unsigned next = p.index + p.threads;
  float x = INPUT[BROKEN(1) ? next : p.index];
  if (BROKEN(3) && p.block == 0) x += INPUT[int(p.thread) - 1];
  if (BROKEN(4)) x += *reinterpret_cast<const float*>(a.numbers[1]);
  OUTPUT[BROKEN(2) ? next : p.index] = x;
}

// 1 leaves out the last element.
KERNEL(tail) {
  const Place p = here();
  const unsigned n = gridDim.x * p.threads - (BROKEN(1) ? 1 : 0);
  if (p.index < n) OUTPUT[p.index] = INPUT[p.index];
}

// 1 writes to its input.
KERNEL(scale) {
  const Place p = here();
  if (BROKEN(1)) INPUT[p.index] *= 2;
  OUTPUT[p.index] = INPUT[p.index] * 2;
}

// 1 writes and 2 reads one element behind shared memory, 3 in front of it.
KERNEL(shared_bounds) {
  const Place p = here();
  p.shared[p.thread + (BROKEN(1) ? 1 : 0)] = INPUT[p.index];
  sync_block();
  OUTPUT[p.index] = p.shared[int(p.thread) + (BROKEN(2) ? 1 : BROKEN(3) ? -1 : 0)];
}

// What nobody has written: 1 of shared memory, 2 of scratch, 3 of the output.
KERNEL(unwritten) {
  const Place p = here();
  if (!BROKEN(1) || p.thread != 9) p.shared[p.thread] = INPUT[p.index];
  if (!BROKEN(2) || p.thread != 9) SCRATCH[p.index] = INPUT[p.index];
  sync_block();
  float x = p.shared[p.thread] + SCRATCH[p.index];
  if (BROKEN(3)) x += OUTPUT[p.index];
  OUTPUT[p.index] = x;
}

// 1 a vector load and 2 a float that are not aligned.
KERNEL(alignment) {
  const Place p = here();
  const float* row = INPUT + p.block * p.threads;
  const Bits16 v = load16(row + p.thread / 4 * 4 - (BROKEN(1) && p.thread >= 4 ? 1 : 0));
  float x = bit_cast<float>(v.x[p.thread % 4]);
  if (BROKEN(2) && p.thread == 1)
    x = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(row) + 2);
  OUTPUT[p.index] = x;
}

// 1 lets another thread read a local array.
KERNEL(local_memory) {
  const Place p = here();
  float array[4] = {INPUT[p.index], 1, 2, 3};
  auto** pointers = reinterpret_cast<float**>(p.shared);
  pointers[p.thread] = array;
  sync_block();
  OUTPUT[p.index] = pointers[BROKEN(1) ? p.thread ^ 1 : p.thread][0];
  sync_block();
}

// 1 loads by the path of constant data what the launch writes.
KERNEL(streaming) {
  const Place p = here();
  if (p.thread % 4 == 0) {
    const Bits16 v = load_streaming(INPUT + p.index);
    store_streaming(SCRATCH + p.index, v);
    store16(OUTPUT + p.index, BROKEN(1) ? load_streaming(SCRATCH + p.index) : v);
  }
}

// ----------------------------------------------------------------------------------- across blocks

// 1 all blocks write one element, 2 one adds to it without an atomic.
KERNEL(total) {
  const Place p = here();
  OUTPUT[p.index] = INPUT[p.index];
  if (p.thread != 0) return;
  if (BROKEN(1) || (BROKEN(2) && p.block == 1))
    COUNTERS[0] += 1;
  else
    atomic_add(COUNTERS, 1u);
}

// The last block adds up what all have written: 1 without the fence before the ticket, 2 without
// that after it, 3 with a ticket that is not atomic, 4 without the barrier before the fence.
KERNEL(last_block) {
  const Place p = here();
  OUTPUT[p.index] = INPUT[p.index];
  SCRATCH[p.index] = INPUT[p.index];
  if (!BROKEN(4)) sync_block();
  if (p.thread == 0) {
    if (!BROKEN(1)) fence();
    const unsigned ticket = BROKEN(3) ? COUNTERS[0]++ : atomic_add(COUNTERS, 1u);
    if (!BROKEN(2)) fence();
    p.shared[0] = float(ticket);
  }
  sync_block();
  if (p.shared[0] == float(gridDim.x - 1)) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += SCRATCH[b * p.threads + p.thread];
    OUTPUT[p.index] = sum;
  }
}

// Cooperative: 1 without the barrier of the grid.
KERNEL(neighbours) {
  const Place p = here();
  SCRATCH[p.index] = INPUT[p.index];
  if (!BROKEN(1)) sync_grid();
  OUTPUT[p.index] = SCRATCH[(p.index + p.threads) % (gridDim.x * p.threads)];
}

// Cooperative: a flag from block to block; 1 sets it without release, 2 without waiting for the
// block's writes, 3 reads it without acquire.
KERNEL(flag) {
  const Place p = here();
  if (p.block == 0) {
    SCRATCH[p.thread] = INPUT[p.thread];
    if (!BROKEN(2)) sync_block();
    if (p.thread == 0) {
      if (BROKEN(1))
        COUNTERS[0] = 1;
      else
        store_release(COUNTERS, 1);
    }
  } else {
    if (p.thread == 0) {
      if (BROKEN(3))
        while (*static_cast<volatile unsigned*>(COUNTERS) == 0) {
        }
      else
        while (load_acquire(COUNTERS) == 0) {
        }
    }
    sync_block();
  }
  OUTPUT[p.index] = SCRATCH[p.thread];
}

// Clusters: 1 reads before the barrier, 2 before the others have written, 3 lets a block end whose
// memory is still read, 4 does so behind a barrier that it does not wait for.
KERNEL(ring) {
  const Place p = here();
  if (!BROKEN(1)) sync_cluster();
  p.shared[p.thread] = INPUT[p.index];
  if (BROKEN(2) || BROKEN(1))
    sync_block();
  else
    sync_cluster();
  const float* theirs = cluster_shared(p.shared, (cluster_rank() + 1) % cluster_blocks());
  OUTPUT[p.index] = theirs[p.thread];
  if (!BROKEN(3)) sync_cluster();
  if (BROKEN(4)) OUTPUT[p.index] = theirs[p.thread];
}

// Arrives early and waits late: 1 writes after it has arrived, 2 arrives twice, 3 never waits, 4
// waits without having arrived.
KERNEL(split) {
  const Place p = here();
  if (!BROKEN(1)) p.shared[p.thread] = INPUT[p.index];
  if (!BROKEN(4)) cluster_arrive();
  if (BROKEN(2)) cluster_arrive();
  if (BROKEN(1)) p.shared[p.thread] = INPUT[p.index];
  SCRATCH[p.index] = 1;
  cluster_wait();
  const float* theirs = cluster_shared(p.shared, (cluster_rank() + 1) % cluster_blocks());
  const float x = theirs[p.thread];
  cluster_arrive();
  OUTPUT[p.index] = x * SCRATCH[p.index];
  if (!BROKEN(3)) cluster_wait();
}

// Cooperative: three steps, each of which reads what the neighbour wrote in the one before; 1
// writes in place, for which one barrier a step is too few.
KERNEL(steps) {
  const Place p = here();
  const unsigned n = gridDim.x * p.threads;
  OUTPUT[p.index] = INPUT[p.index];
  SCRATCH[p.index] = 0;
  for (int step = 0; step < 3; ++step) {
    sync_grid();
    const float* from = step % 2 && !BROKEN(1) ? SCRATCH : OUTPUT;
    float* to = step % 2 || BROKEN(1) ? OUTPUT : SCRATCH;
    to[p.index] = from[(p.index + p.threads) % n];
  }
  sync_grid();
  if (!BROKEN(1)) OUTPUT[p.index] = SCRATCH[p.index];
}

// ----------------------------------------------------------------------------- asynchronous copies

// Rows of the input through two buffers: 1 does not wait, 2 waits for one group too few, 3 without
// the barrier for the other threads' copies, 4 overwrites a buffer that is still read, 5 waits for
// what was not committed.
KERNEL(pipeline) {
  const Place p = here();
  const int steps = int(gridDim.x);
  const auto load = [&](int step) {
    if (p.thread % 4 == 0 && step < steps)
      copy_async16(p.shared + (step % 2) * p.threads + p.thread,
                   INPUT + unsigned(step) * p.threads + p.thread, true);
    if (!BROKEN(5)) copy_async_commit();
  };
  float sum = 0;
  load(0);
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    if (BROKEN(2))
      copy_async_wait<2>();
    else if (!BROKEN(1))
      copy_async_wait<1>();
    if (!BROKEN(3)) sync_block();
    sum += p.shared[(step % 2) * int(p.threads) + int(p.threads - 1 - p.thread)];
    if (!BROKEN(4)) sync_block();
  }
  OUTPUT[p.index] = sum;
}

// The same by the copy engine: 1 does not wait, 2 announces too few bytes, 3 waits for the phase
// before.
KERNEL(bulk) {
  const Place p = here();
  auto* barrier = reinterpret_cast<uint64_t*>(p.shared + p.threads);
  const unsigned bytes = p.threads * 4;
  if (p.thread == 0) mbarrier_init(barrier, 1);
  sync_block();
  float sum = 0;
  for (unsigned step = 0; step < gridDim.x; ++step) {
    if (p.thread == 0) {
      mbarrier_arrive_expect(barrier, bytes - (BROKEN(2) ? 16 : 0));
      bulk_copy(p.shared, INPUT + step * p.threads, bytes, barrier);
    }
    if (!BROKEN(1)) mbarrier_wait(barrier, (step & 1) ^ (BROKEN(3) ? 1 : 0));
    sum += p.shared[p.threads - 1 - p.thread];
    sync_block();
  }
  OUTPUT[p.index] = sum;
}

// Lane 0 of warp 0 copies, warp 1 reads, through two buffers that are full or empty: 1 does not
// wait for an empty buffer, 2 lets lane 0 say for all that they have read, 3 says so before
// reading.
KERNEL(specialised) {
  const Place p = here();
  auto* full = reinterpret_cast<uint64_t*>(p.shared + 64);
  uint64_t* empty = full + 2;
  const unsigned steps = 2 * gridDim.x;
  if (p.thread < 4) mbarrier_init(full + p.thread, 1);
  sync_block();
  float sum = 0;
  for (unsigned step = 0; step < steps; ++step) {
    const unsigned stage = step % 2, round = step / 2;
    float* buffer = p.shared + 32 * stage;
    if (p.thread == 0) {
      if (round > 0 && !BROKEN(1)) mbarrier_wait(empty + stage, (round - 1) & 1);
      mbarrier_arrive_expect(full + stage, 128);
      bulk_copy(buffer, INPUT + 32 * step, 128, full + stage);
    } else if (warp_index() == 1) {
      mbarrier_wait(full + stage, round & 1);
      if (BROKEN(3) && lane() == 0) mbarrier_arrive(empty + stage);
      sum += buffer[lane() ^ 1];
      if (!BROKEN(2)) sync_warp();
      if (!BROKEN(3) && lane() == 0) mbarrier_arrive(empty + stage);
    }
  }
  OUTPUT[p.index] = sum;
}

// ----------------------------------------------------------------------------------------- failure

KERNEL(target) {
  const Place p = here();
  OUTPUT[p.index] = INPUT[p.index];
  const long long wanted = BROKEN(1) && p.thread == 3 ? 1ll << 40 : 7;
  DLK_DEVICE_CHECK_INDEX(wanted < 10, "Target %lld is out of bounds.", wanted);
}

}  // namespace dlkernels
