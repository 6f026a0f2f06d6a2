// Each primitive by itself, for comparison with its definition.
#include "kernels.h"

namespace dlkernels {

DLK_DEVICE unsigned linear_index() {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  return block * blockDim.x * blockDim.y * blockDim.z + thread_rank();
}

// 14 numbers of each thread.
KERNEL(geometry) {
  int* out = a.tensor<int>(0) + 14 * linear_index();
  const unsigned values[14] = {threadIdx.x,      threadIdx.y,
                               threadIdx.z,      blockIdx.x,
                               blockIdx.y,       blockIdx.z,
                               blockDim.x,       blockDim.y,
                               blockDim.z,       gridDim.x,
                               gridDim.y,        gridDim.z,
                               unsigned(lane()), unsigned(warp_index())};
  for (int i = 0; i < 14; ++i) out[i] = int(values[i]);
}

// Lanes of the mask only; 4 and 8 bytes. Lanes outside write 0.
template <typename T>
DLK_DEVICE T shuffled(int way, unsigned mask, T x, int by) {
  return way == 0   ? shuffle_xor(mask, x, by)
         : way == 1 ? shuffle_down(mask, x, by)
         : way == 2 ? shuffle_up(mask, x, by)
                    : shuffle_from(mask, x, by);
}

KERNEL(shuffles) {
  const unsigned mask = unsigned(a.numbers[2]);
  const int i = int(threadIdx.x);
  float x = 0;
  double y = 0;
  if (mask >> lane() & 1) {
    x = shuffled(a.number(0), mask, a.tensor(0)[i], a.tensor<int>(4)[i]);
    y = shuffled(a.number(0), mask, a.tensor<double>(1)[i], a.tensor<int>(4)[i]);
  }
  a.tensor(2)[i] = x;
  a.tensor<double>(3)[i] = y;
}

KERNEL(votes) {
  const unsigned mask = unsigned(a.numbers[0]);
  const int i = int(threadIdx.x);
  const bool p = a.tensor<int>(0)[i];
  int* out = a.tensor<int>(1) + 3 * i;
  const bool takes_part = mask >> lane() & 1;
  out[0] = takes_part ? int(ballot(mask, p)) : 0;
  out[1] = takes_part ? any(mask, p) : 0;
  out[2] = takes_part ? all(mask, p) : 0;
}

// Sums of 1 and maxima of the index by every thread of every block, and one winner.
template <typename T>
DLK_DEVICE void count(T* counters, T* before, unsigned i) {
  before[i] = atomic_add(counters, T(1));
  atomic_max(counters + 1, T(i));
  if (atomic_cas(counters + 2, T(0), T(i + 1)) == T(0)) atomic_add(counters + 3, T(i + 1));
  atomic_exchange(counters + 4, T(i));
}

KERNEL(atomics) {
  const unsigned i = linear_index();
  count(a.tensor<int>(0), a.tensor<int>(1), i);
  count(a.tensor<unsigned>(0) + 5, a.tensor<unsigned>(2), i);
  count(a.tensor<uint64_t>(3), a.tensor<uint64_t>(4), i);
  atomic_add(a.tensor<float>(5), 0.5f);
  atomic_add(a.tensor<double>(5) + 1, 0.25);
}

// The same on shared memory.
KERNEL(shared_atomics) {
  auto* counter = reinterpret_cast<unsigned*>(shared_memory());
  if (threadIdx.x == 0) *counter = 0;
  sync_block();
  a.tensor<unsigned>(0)[linear_index()] = atomic_add(counter, 1u);
}

// Each thread reads two rows of 16 bytes; beyond the end zeros.
KERNEL(zero_fill) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int i = 4 * int(threadIdx.x), n = a.number(0);
  copy_async16(shared + i, a.tensor(0) + i, i < n);
  copy_async_commit();
  copy_async_wait<0>();
  for (int k = i; k < i + 4; ++k) a.tensor(1)[k] = shared[k];
}

// The 32 rows of 16 bytes in the order of the lanes; out: (lane, matrix) as 32 bits.
KERNEL(load_matrices) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int l = lane();
  for (int i = 0; i < 4; ++i) shared[i * 32 + l] = a.tensor<uint32_t>(0)[i * 32 + l];
  sync_warp();
  const auto* row = shared + 4 * l;
  uint32_t r[4];
  if (a.number(0))
    ldmatrix_x4_transposed(r, row);
  else
    ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) a.tensor<uint32_t>(1)[4 * l + i] = r[i];
}

// (lane, register) of a, b and d.
KERNEL(multiply_matrices) {
  const int l = lane();
  uint32_t x[4], y[2];
  float d[4];
  for (int i = 0; i < 4; ++i) x[i] = a.tensor<uint32_t>(0)[4 * l + i];
  for (int i = 0; i < 2; ++i) y[i] = a.tensor<uint32_t>(1)[2 * l + i];
  for (int i = 0; i < 4; ++i) d[i] = a.tensor(2)[4 * l + i];
  if (a.number(0) == 0) mma_m16n8k16<bf16>(d, x, y);
  if (a.number(0) == 1) mma_m16n8k16<f16>(d, x, y);
  if (a.number(0) == 2) mma_m16n8k8(d, x, y);
  for (int i = 0; i < 4; ++i) a.tensor(2)[4 * l + i] = d[i];
}

KERNEL(widen) {
  const auto bits = uint16_t(linear_index());
  a.tensor(0)[bits] = to_float(bf16{bits});
  a.tensor(1)[bits] = to_float(f16{bits});
  float low, high;
  unpack2<bf16>(bits | uint32_t(uint16_t(~bits)) << 16, low, high);
  a.tensor(2)[2 * bits] = low, a.tensor(2)[2 * bits + 1] = high;
  unpack2<f16>(bits | uint32_t(uint16_t(~bits)) << 16, low, high);
  a.tensor(3)[2 * bits] = low, a.tensor(3)[2 * bits + 1] = high;
}

KERNEL(narrow) {
  const unsigned i = linear_index();
  if (int(i) >= a.number(0)) return;
  const float low = a.tensor(0)[2 * i], high = a.tensor(0)[2 * i + 1];
  a.tensor<bf16>(1)[2 * i] = from_float<bf16>(low);
  a.tensor<bf16>(1)[2 * i + 1] = from_float<bf16>(high);
  a.tensor<f16>(2)[2 * i] = from_float<f16>(low);
  a.tensor<f16>(2)[2 * i + 1] = from_float<f16>(high);
  a.tensor<uint32_t>(3)[i] = pack2<bf16>(low, high);
  a.tensor<uint32_t>(4)[i] = pack2<f16>(low, high);
}

KERNEL(approximations) {
  const unsigned i = linear_index();
  a.tensor(1)[i] = exp2_approximate(a.tensor(0)[i]);
  a.tensor(2)[i] = log2_approximate(a.tensor(0)[i]);
  a.tensor(3)[i] = tanh_accurate(a.tensor(0)[i]);
}

// What one launch wrote the next may read: number 0 says which one this is.
KERNEL(increment) { a.tensor<int>(0)[linear_index()] += 1; }

KERNEL(many_barriers) {
  for (int i = 0; i < a.number(0); ++i) sync_block();
}

KERNEL(deep) {
  float array[32768];
  for (int i = 0; i < 32768; ++i) array[i] = a.tensor(0)[i % 4];
  float sum = 0;
  for (int i = 0; i < 32768; ++i) sum += array[(i * 7 + int(threadIdx.x)) % 32768];
  a.tensor(1)[threadIdx.x] = sum;
}

}  // namespace dlkernels
