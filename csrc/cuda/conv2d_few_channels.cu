// The convolution of few channels on a GPU: at most 16 in, 64 out, kernels up to 7×7, strides 1 and
// 2, in whatever strides of memory; forward with bias, activation and, if wanted, a 2×2 max-pool,
// and the three gradients. Of so few channels a matrix unit would multiply mostly zeros: these are
// plain products, in float.
//
//   convolve         y = Σ_crs x·w, of images; and of the gradient d of the convolution's
//                    output, by phases: at a stride t every t-th row and column of dL/dx is a
//                    convolution of d with every t-th row and column of w, turned around
//   weight_gradient  dw = Σ_npq d·x and db = Σ_npq d, in pieces
//   add_pieces       their sums
//
// What is fused: d is made as it is read, of the upstream gradient, the output (the activation's
// derivative follows from it) and the pool's argmax; neither it nor the convolution's output before
// the pool is ever in memory.
//
// Tiles: `convolve` has a tile of the source in shared memory, all of it as floats, and the weights
// of 8 to 64 output channels; a thread has 2×2 pixels of 8 channels: for each row of the kernel 2
// rows of the source into registers, then 32 multiplications for every 8 weights, which the whole
// warp reads at once. The columns of a tile are dealt out modulo 2·stride: neighbouring lanes, 2
// pixels apart, then read neighbouring words. `weight_gradient` has tiles of both; a thread has one
// row of the kernel for 8 channels out and one in, and some of the rows of pixels. Loads from
// memory are by element: a row with its border begins anywhere, and there are few channels of it.
//
// NOT MEASURED: tiles and constants are reckoned; no GPU has timed them.
//
// The same bits every time: shapes alone fix how sums are cut, and the pieces are added in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "common.cuh"

namespace dlkernels {
namespace {

constexpr const char* kOp = "conv2d_few_channels";
constexpr int kMostIn = 16, kMostOut = 64, kMostTaps = 7, kMostStride = 2;

constexpr int kRows = 2, kColumns = 2, kChannels = 8;  // of a thread of `convolve`
constexpr int kChain = 16;                             // products in a row
constexpr int kThreads = 256;                          // most of a block
constexpr int kDepth = 16;                             // channels summed from one tile
constexpr int kPatches = 16;                           // most across a tile
constexpr int kSlices = 16;                            // most that share a tile's rows of pixels
constexpr int kTileColumns = 32, kTileRows = 16;       // most pixels of a tile of weight_gradient
constexpr int64_t kWeightBytes = 32 << 10;             // of a block, where 8 channels allow
constexpr int64_t kTileBytes = 48 << 10;
constexpr int64_t kBlocks = 512;      // of weight_gradient, where there are tiles for them
constexpr int64_t kManyTiles = 1024;  // of convolve: of more a block has several, and one weight
constexpr int kFour = 4;              // columns that weight_gradient reads at once
constexpr int kStrips = 8;            // of the pieces that add_pieces adds

// ----------------------------------------------------------------------------------------- sources

// Where a number of a tensor of images lies; less than 2^31 within one image.
struct Place {
  int64_t image;
  int channel, row, column;

  DLK_DEVICE int64_t at(int64_t n, int c, int y, int x) const {
    return n * image + (c * channel + y * row + x * column);
  }
  DLK_HOST_DEVICE bool is_channels_last() const { return channel == 1 && column != 1; }
};

// The input, with zeros around it.
template <typename S>
struct Image {
  const S* data;
  Place place;
  int64_t images;
  int rows, columns;

  DLK_DEVICE float value(int64_t n, int c, int y, int x) const {
    if (n >= images || unsigned(y) >= unsigned(rows) || unsigned(x) >= unsigned(columns)) return 0;
    return widen(data[place.at(n, c, y, x)]);
  }
};

// The gradient of the convolution's output, before pool and activation.
template <typename S>
struct Gradient {
  const S* data;
  Place place;
  int64_t images;
  int rows, columns;          // of the convolution's output
  const S* output;            // like data, null without an activation
  const uint8_t* argmax;      // like data, null without a pool
  int out_rows, out_columns;  // of data
  Activation activation;

  DLK_DEVICE float value(int64_t n, int k, int y, int x) const {
    if (n >= images || unsigned(y) >= unsigned(rows) || unsigned(x) >= unsigned(columns)) return 0;
    int64_t at;
    if (argmax) {
      if (y / 2 >= out_rows || x / 2 >= out_columns) return 0;
      at = place.at(n, k, y / 2, x / 2);
      if (argmax[at] != 2 * (y % 2) + x % 2) return 0;
    } else {
      at = place.at(n, k, y, x);
    }
    const float gradient = widen(data[at]);
    return output ? before_activation(gradient, widen(output[at]), activation) : gradient;
  }
};

// A tile of a source in shared memory: images × channels × rows × columns, of each row column x at
// (x mod M)·spread + x / M.
struct Tile {
  int images, channels, rows, columns, pitch, spread;
};

// All of it, by all of the block.
template <int M, typename Source>
DLK_DEVICE void load_tile(float* to, const Source& from, const Tile& t, int64_t image, int channel,
                          int row, int column) {
  const auto place = [&](int x) { return x % M * t.spread + x / M; };
  const int warps = int(blockDim.x * blockDim.y) / kWarp;
  if (from.place.is_channels_last()) {
    for (int line = warp_index(); line < t.images * t.rows; line += warps) {
      const int i = line / t.rows, y = line % t.rows;
      for (int at = lane(); at < t.columns * t.channels; at += kWarp) {
        const int x = at / t.channels, c = at % t.channels;
        to[((i * t.channels + c) * t.rows + y) * t.pitch + place(x)] =
            from.value(image + i, channel + c, row + y, column + x);
      }
    }
    return;
  }
  for (int line = warp_index(); line < t.images * t.channels * t.rows; line += warps) {
    const int y = line % t.rows, c = line / t.rows % t.channels, i = line / t.rows / t.channels;
    for (int x = lane(); x < t.columns; x += kWarp)
      to[line * t.pitch + place(x)] = from.value(image + i, channel + c, row + y, column + x);
  }
}

// ---------------------------------------------------------------------------------------- convolve

// One direction of a convolution's plane, for the forward pass or for dL/dx.
struct Axis {
  int size;  // of the result
  int taps, stride, padding;
};

// Result i·result_step + result_first is Σ_j of source i·step + origin + j times tap
// first + j·tap_step.
struct Phase {
  int size, result_first, result_step;
  int taps, first, tap_step;
  int origin, step;
};

template <bool kBackward>
DLK_HOST_DEVICE Phase phase_of(const Axis& a, int phase) {
  if (!kBackward) return {a.size, 0, 1, a.taps, 0, 1, -a.padding, a.stride};
  // Row h = t·i + phase has d at (h + padding − r) / t where that is whole: r = rest, rest + t, …
  const int t = a.stride, rest = (phase + a.padding) % t;
  const int taps = (a.taps - rest + t - 1) / t;  // 0 for a single tap that is another phase's
  const int base = (phase + a.padding - rest) / t;
  return {(a.size - phase + t - 1) / t,
          phase,
          t,
          taps,
          rest + t * (taps - 1),
          -t,
          base - (taps - 1),
          1};
}

template <typename S, typename Source>
struct Convolution {
  Source source;
  const S* weight;
  struct {
    int out, in, row, column;  // of the channels of the sum's result and source
  } weight_place;
  const S* bias;  // or null
  S* result;
  Place result_place;
  uint8_t* argmax;  // like result, null without a pool
  int64_t images;
  int in, out;  // channels
  Axis vertical, horizontal;
  int result_rows, result_columns;  // of the pool
  Activation activation;
  bool wide_channels, wide_columns;  // whether 8 channels, 2 columns are aligned words
  // The tile: so many images, of each so many patches of kRows × kColumns; how many of them there
  // are, and the source's in shared memory.
  int tile_images, tile_rows, tile_columns, down, across, depth, pitch, spread, weight_floats;
  int64_t tiles;
};

// To the totals of a thread's pixels. A chain of products ends with the channel after kChain of
// them, and is added to the total: longer ones round more than stock's.
template <int kTaps, int kStep>
DLK_DEVICE void add_products(float (&total)[kRows][kColumns][kChannels], const float* tile,
                             const float* weight, int channels, int rows, int pitch, int spread,
                             int step, int taps, int width, int weight_pitch) {
  constexpr int kModulo = kColumns * kStep, kReach = (kColumns - 1) * kStep;
  float sum[kRows][kColumns][kChannels] = {};
  int chain = 0;
  for (int c = 0; c < channels; ++c) {
    for (int r = 0; r < taps; ++r) {
      const float* const line = tile + (c * rows + r) * pitch;
      float x[kRows][kReach + kTaps];
#pragma unroll
      for (int dy = 0; dy < kRows; ++dy)
#pragma unroll
        for (int e = 0; e < kReach + kTaps; ++e)
          if (e < kReach + width)
            x[dy][e] = line[dy * step * pitch + e % kModulo * spread + e / kModulo];
#pragma unroll
      for (int s = 0; s < kTaps; ++s) {
        if (s < width) {
          float w[kChannels];
          const Bits16 half[2] = {load16(weight), load16(weight + 4)};
          memcpy(w, half, sizeof(w));
          weight += weight_pitch;
#pragma unroll
          for (int dy = 0; dy < kRows; ++dy)
#pragma unroll
            for (int dx = 0; dx < kColumns; ++dx)
#pragma unroll
              for (int k = 0; k < kChannels; ++k)
                sum[dy][dx][k] = fmaf(x[dy][dx * kStep + s], w[k], sum[dy][dx][k]);
        }
      }
    }
    chain += taps * width;
    if (chain < kChain && c + 1 < channels) continue;
    chain = 0;
#pragma unroll
    for (int dy = 0; dy < kRows; ++dy)
#pragma unroll
      for (int dx = 0; dx < kColumns; ++dx)
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          total[dy][dx][k] += sum[dy][dx][k];
          sum[dy][dx][k] = 0;
        }
  }
}

// Eight channels of one pixel.
template <typename S>
DLK_DEVICE void store_channels(S* to, int64_t channel, const float (&v)[kChannels], int count,
                               bool wide) {
  if (wide) {
    constexpr int kParts = kChannels / kVector<S>;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float some[kVector<S>];
#pragma unroll
      for (int i = 0; i < kVector<S>; ++i) some[i] = v[part * kVector<S> + i];
      store16(to + part * kVector<S>, pack<S>(some));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k)
    if (k < count) to[k * channel] = narrow<S>(v[k]);
}

// Two columns of one channel.
template <typename S>
DLK_DEVICE void store_columns(S* to, float a, float b) {
  if constexpr (is_half<S>) {
    *reinterpret_cast<uint32_t*>(to) = pack2<S>(a, b);
  } else {
    const float two[2] = {a, b};
    *reinterpret_cast<uint64_t*>(to) = bit_cast<uint64_t>(two);
  }
}

template <typename S, typename Source>
DLK_DEVICE void store_plain(const Convolution<S, Source>& p, const Phase& v, const Phase& h,
                            int64_t n, int k, int y, int x,
                            const float (&sum)[kRows][kColumns][kChannels]) {
  static_assert(kColumns == 2);
  const int count = p.out - k;
#pragma unroll
  for (int dy = 0; dy < kRows; ++dy) {
    if (y + dy >= v.size) return;
    const int row = (y + dy) * v.result_step + v.result_first;
    if (p.wide_columns && x + kColumns <= h.size) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (c < count)
          store_columns(p.result + p.result_place.at(n, k + c, row, x), sum[dy][0][c],
                        sum[dy][1][c]);
      continue;
    }
#pragma unroll
    for (int dx = 0; dx < kColumns; ++dx) {
      if (x + dx < h.size) {
        const int column = (x + dx) * h.result_step + h.result_first;
        store_channels(p.result + p.result_place.at(n, k, row, column), p.result_place.channel,
                       sum[dy][dx], count, p.wide_channels);
      }
    }
  }
}

// The largest of the 2×2, the first of equals; a NaN is larger than any number.
template <typename S, typename Source>
DLK_DEVICE void store_pooled(const Convolution<S, Source>& p, int64_t n, int k, int y, int x,
                             const float (&sum)[kRows][kColumns][kChannels]) {
  static_assert(kRows == 2 && kColumns == 2);
  const int count = p.out - k;
  if (y / 2 >= p.result_rows || x / 2 >= p.result_columns) return;
  float best[kChannels];
  uint8_t where[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    best[c] = sum[0][0][c];
    where[c] = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const float v = sum[i / 2][i % 2][c];
      if (v > best[c] || v != v) best[c] = v, where[c] = uint8_t(i);
    }
  }
  const int64_t at = p.result_place.at(n, k, y / 2, x / 2);
  store_channels(p.result + at, p.result_place.channel, best, count, p.wide_channels);
  if (p.wide_channels) {
    *reinterpret_cast<uint64_t*>(p.argmax + at) = bit_cast<uint64_t>(where);
  } else {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c < count) p.argmax[at + int64_t(c) * p.result_place.channel] = where[c];
  }
}

// What a thread has at the end.
template <typename S, typename Source>
DLK_DEVICE void finish(const Convolution<S, Source>& p, const Phase& v, const Phase& h, int64_t n,
                       int k, int y, int x, float (&sum)[kRows][kColumns][kChannels]) {
  if (n >= p.images || k >= p.out || y >= v.size || x >= h.size) return;
  if constexpr (!std::is_same_v<Source, Gradient<S>>) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float bias = p.bias && k + c < p.out ? widen(p.bias[k + c]) : 0;
#pragma unroll
      for (int dy = 0; dy < kRows; ++dy)
#pragma unroll
        for (int dx = 0; dx < kColumns; ++dx)
          // Rounded here: equals of the pool are equals of the dtype.
          sum[dy][dx][c] = widen(narrow<S>(activate(sum[dy][dx][c] + bias, p.activation)));
    }
    if (p.argmax) return store_pooled(p, n, k, y, x, sum);
  }
  store_plain(p, v, h, n, k, y, x, sum);
}

// Grid: blocks × blocks of output channels × phases. Block: patches × eights of channels.
// ptxas: <= 128 registers, 0 bytes static shared, 0 spills
template <typename S, typename Source, int kTaps, int kStep>
DLK_KERNEL void __launch_bounds__(kThreads, 2) convolve_kernel(Convolution<S, Source> p) {
  constexpr bool kBackward = std::is_same_v<Source, Gradient<S>>;
  const int phases = kBackward ? p.horizontal.stride : 1;
  const Phase v = phase_of<kBackward>(p.vertical, int(blockIdx.z) / phases);
  const Phase h = phase_of<kBackward>(p.horizontal, int(blockIdx.z) % phases);
  const int weight_pitch = int(blockDim.y) * kChannels;
  const int first_k = int(blockIdx.y) * weight_pitch;
  const int patch = int(threadIdx.x), px = patch % p.tile_columns;
  const int py = patch / p.tile_columns % p.tile_rows;
  const int i = patch / p.tile_columns / p.tile_rows;

  Tile tile{p.tile_images,
            p.depth,
            (p.tile_rows * kRows - 1) * v.step + v.taps,
            (p.tile_columns * kColumns - 1) * kStep + h.taps,
            p.pitch,
            p.spread};
  float* const weight = reinterpret_cast<float*>(shared_memory());
  float* const source = weight + p.weight_floats;
  for (int64_t at = blockIdx.x; at < p.tiles; at += gridDim.x) {
    const int64_t image = at / (p.across * p.down) * p.tile_images;
    const int within = int(at % (p.across * p.down));
    const int first_y = within / p.across * p.tile_rows * kRows;
    const int first_x = within % p.across * p.tile_columns * kColumns;
    float sum[kRows][kColumns][kChannels] = {};
    for (int c0 = 0; c0 < p.in; c0 += p.depth) {
      tile.channels = p.in - c0 < p.depth ? p.in - c0 : p.depth;
      const bool is_first = at == blockIdx.x && c0 == 0;
      if (!is_first) sync_block();
      load_tile<kColumns * kStep>(source, p.source, tile, image, c0, first_y * v.step + v.origin,
                                  first_x * kStep + h.origin);
      if (is_first || p.depth < p.in) {  // else they are there
        const int weights = tile.channels * v.taps * h.taps * weight_pitch;
        for (int j = int(thread_rank()); j < weights; j += int(blockDim.x * blockDim.y)) {
          const int k = first_k + j % weight_pitch, tap = j / weight_pitch, s = tap % h.taps;
          const int r = tap / h.taps % v.taps, c = tap / h.taps / v.taps;
          const auto& place = p.weight_place;
          const int from = k * place.out + (c0 + c) * place.in +
                           (v.first + r * v.tap_step) * place.row +
                           (h.first + s * h.tap_step) * place.column;
          weight[j] = k < p.out ? widen(p.weight[from]) : 0;
        }
      }
      sync_block();
      if (i < tile.images) {
        const int line = i * tile.channels * tile.rows + py * kRows * v.step;
        add_products<kTaps, kStep>(sum, source + line * tile.pitch + px,
                                   weight + int(threadIdx.y) * kChannels, tile.channels, tile.rows,
                                   tile.pitch, tile.spread, v.step, v.taps, h.taps, weight_pitch);
      }
    }
    if (i < tile.images)
      finish(p, v, h, image + i, first_k + int(threadIdx.y) * kChannels, first_y + py * kRows,
             first_x + px * kColumns, sum);
  }
}

// --------------------------------------------------------------------------------- weight gradient

template <typename S>
struct WeightGradient {
  Image<S> input;
  Gradient<S> gradient;
  int in, out;
  Axis vertical, horizontal;
  bool bias;      // whether its gradient is wanted
  float* pieces;  // (pieces, out, in·taps + 1); the last is the bias'
  // The tile: pixels of the convolution's output, of one image; `tiles` of all images, of which a
  // block has `per_block`. Threads: items (eights of out × in × rows of the kernel) × slices.
  int tile_rows, tile_columns, down, across, per_block, items, slices, groups, pitch;
  int64_t tiles;
};

// Floats from one pixel of the gradient to the next, where a block has so many eights of channels.
DLK_HOST_DEVICE int gradient_pitch(int groups) { return groups * kChannels + 4; }

// Grid: blocks of tiles × blocks of eights of channels.
// ptxas: <= 128 registers, 0 bytes static shared, 0 spills
template <typename S, int kTaps, int kStep>
DLK_KERNEL void __launch_bounds__(kThreads, 2) weight_gradient_kernel(WeightGradient<S> p) {
  constexpr int kReach = (kFour - 1) * kStep;
  const Axis &v = p.vertical, &h = p.horizontal;
  const int item = int(threadIdx.x) % p.items, slice = int(threadIdx.x) / p.items;
  const int r = item % v.taps, c = item / v.taps % p.in, group = item / v.taps / p.in;
  const int first_k = int(blockIdx.y) * p.groups * kChannels, k = first_k + group * kChannels;
  const int pixel = gradient_pitch(p.groups);
  const Tile tile{
      1,       p.in, (p.tile_rows - 1) * v.stride + v.taps, (p.tile_columns - 1) * kStep + h.taps,
      p.pitch, 0};
  float* const gradient = reinterpret_cast<float*>(shared_memory());
  float* const input = gradient + p.tile_rows * p.tile_columns * pixel;

  float sum[kTaps][kChannels] = {}, bias[kChannels] = {};
  const int64_t begin = int64_t(blockIdx.x) * p.per_block;
  const int64_t end = begin + p.per_block < p.tiles ? begin + p.per_block : p.tiles;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / (p.across * p.down);
    const int within = int(at % (p.across * p.down));
    const int y = within / p.across * p.tile_rows, x = within % p.across * p.tile_columns;
    // The pixels that there are: others have no part, whatever they would be multiplied with.
    const int rows = p.gradient.rows - y < p.tile_rows ? p.gradient.rows - y : p.tile_rows;
    const int columns =
        p.gradient.columns - x < p.tile_columns ? p.gradient.columns - x : p.tile_columns;
    if (at > begin) sync_block();
    load_tile<1>(input, p.input, tile, image, 0, y * v.stride - v.padding, x * kStep - h.padding);
    const int warps = int(blockDim.x) / kWarp, width = p.groups * kChannels;
    if (p.gradient.place.is_channels_last()) {
      for (int q = warp_index(); q < rows * p.tile_columns; q += warps)
        for (int j = lane(); j < width; j += kWarp)
          gradient[q * pixel + j] =
              first_k + j < p.out ? p.gradient.value(image, first_k + j, y + q / p.tile_columns,
                                                     x + q % p.tile_columns)
                                  : 0;
    } else {
      for (int line = warp_index(); line < rows * width; line += warps)
        for (int q = lane(); q < p.tile_columns; q += kWarp) {
          const int j = line % width, row = line / width;
          gradient[(row * p.tile_columns + q) * pixel + j] =
              first_k + j < p.out ? p.gradient.value(image, first_k + j, y + row, x + q) : 0;
        }
    }
    sync_block();
    if (slice >= p.slices) continue;
    for (int row = slice; row < rows; row += p.slices) {
      const float* xs = input + (c * tile.rows + row * v.stride + r) * tile.pitch;
      const float* ds = gradient + row * p.tile_columns * pixel + group * kChannels;
      for (int q = 0; q < columns; q += kFour) {
        float some[kReach + kTaps];
#pragma unroll
        for (int e = 0; e < kReach + kTaps; ++e)
          if (e < kReach + h.taps) some[e] = xs[q * kStep + e];
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
          if (q + j < columns) {
            float d[kChannels];
            const float* const eight = ds + (q + j) * pixel;
            const Bits16 half[2] = {load16(eight), load16(eight + 4)};
            memcpy(d, half, sizeof(d));
#pragma unroll
            for (int s = 0; s < kTaps; ++s)
              if (s < h.taps)
#pragma unroll
                for (int i = 0; i < kChannels; ++i)
                  sum[s][i] = fmaf(d[i], some[j * kStep + s], sum[s][i]);
            if (p.bias) {
#pragma unroll
              for (int i = 0; i < kChannels; ++i) bias[i] += d[i];
            }
          }
        }
      }
    }
  }

  if (slice >= p.slices) return;
  const int64_t columns = int64_t(p.in) * v.taps * h.taps + 1;
  const int64_t piece = int64_t(blockIdx.x) * p.slices + slice;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (k + i >= p.out) return;
    float* const to = p.pieces + (piece * p.out + k + i) * columns;
#pragma unroll
    for (int s = 0; s < kTaps; ++s)
      if (s < h.taps) to[(c * v.taps + r) * h.taps + s] = sum[s][i];
    if (c == 0 && r == 0) to[columns - 1] = bias[i];
  }
}

template <typename S>
struct Sums {
  const float* pieces;
  int64_t number;  // of pieces
  int out, in, rows, columns;
  S *weight, *bias;  // or null: not wanted
  struct {
    int64_t out, in, row, column;
  } weight_place;
};

// Block: kWarp numbers × kStrips of the pieces.
// ptxas: <= 40 registers, 0 bytes static shared, 0 spills
template <typename S>
DLK_KERNEL void add_pieces_kernel(Sums<S> p) {
  const int taps = p.rows * p.columns, columns = p.in * taps + 1;
  const int at = int(blockIdx.x) * kWarp + int(threadIdx.x);
  const int64_t per_strip = (p.number + kStrips - 1) / kStrips;
  const int64_t begin = threadIdx.y * per_strip;
  const int64_t end = begin + per_strip < p.number ? begin + per_strip : p.number;
  float* const strips = reinterpret_cast<float*>(shared_memory());
  const bool is_one = at < p.out * columns;
  float sum = 0;
  if (is_one)
    for (int64_t i = begin; i < end; ++i) sum += p.pieces[i * p.out * columns + at];
  strips[threadIdx.y * kWarp + threadIdx.x] = sum;
  sync_block();
  if (threadIdx.y > 0 || !is_one) return;
  for (int i = 1; i < kStrips; ++i) sum += strips[i * kWarp + threadIdx.x];
  const int k = at / columns, column = at % columns;
  if (column == columns - 1) {
    if (p.bias) p.bias[k] = narrow<S>(sum);
  } else if (p.weight) {
    const int s = column % p.columns, r = column / p.columns % p.rows, c = column / taps;
    p.weight[k * p.weight_place.out + c * p.weight_place.in + r * p.weight_place.row +
             s * p.weight_place.column] = narrow<S>(sum);
  }
}

// -----------------------------------------------------------------------------------------
// planning

// n in equal parts of at most `most`.
int balanced(int n, int most) { return int(divide_up(n, divide_up(n, std::max(1, most)))); }

template <bool kBackward>
int largest(const Axis& a, int Phase::* field) {
  int most = 0;
  for (int phase = 0; phase < (kBackward ? a.stride : 1); ++phase)
    most = std::max(most, phase_of<kBackward>(a, phase).*field);
  return most;
}

template <typename S, typename Source>
void run(Convolution<S, Source>& p, const char* name) {
  constexpr bool kBackward = std::is_same_v<Source, Gradient<S>>;
  const Axis &v = p.vertical, &h = p.horizontal;
  const int taps = largest<kBackward>(v, &Phase::taps), width = largest<kBackward>(h, &Phase::taps);
  const int step = kBackward ? 1 : v.stride, step_h = kBackward ? 1 : h.stride;
  const int rows = divide_up(largest<kBackward>(v, &Phase::size), kRows);
  const int columns = divide_up(largest<kBackward>(h, &Phase::size), kColumns);

  p.depth = std::min(p.in, kDepth);
  const int eights = divide_up(p.out, kChannels);
  const int64_t weight_bytes = int64_t(p.depth) * std::max(1, taps * width) * kChannels * 4;
  int groups = int(std::clamp<int64_t>(kWeightBytes / weight_bytes, 1, eights));
  groups = balanced(eights, groups);
  const int patches = std::max(kWarp, kThreads / groups / kWarp * kWarp);
  p.tile_columns = balanced(columns, kPatches);
  p.tile_rows = balanced(rows, patches / p.tile_columns);
  p.tile_images = 1;
  if (p.tile_columns == columns && p.tile_rows == rows)
    p.tile_images = int(std::min<int64_t>(p.images, patches / (rows * columns)));

  size_t floats;
  const auto lay_out = [&] {
    const int modulo = kColumns * step_h;
    p.spread = divide_up((p.tile_columns * kColumns - 1) * step_h + width, modulo);
    // The patches of the next row in the banks behind this row's, or near it.
    int nearest = 32;
    for (int pitch = modulo * p.spread; pitch < modulo * p.spread + 32; ++pitch) {
      const int off = ((kRows * step * pitch - p.tile_columns) % 32 + 32) % 32;
      if (std::min(off, 32 - off) < nearest) nearest = std::min(off, 32 - off), p.pitch = pitch;
    }
    const int lines = (p.tile_rows * kRows - 1) * step + taps;
    floats = size_t(p.tile_images) * p.depth * lines * p.pitch;
    return int64_t(floats) * 4 <= kTileBytes;
  };
  while (!lay_out()) {
    if (p.tile_images > 1)
      p.tile_images = (p.tile_images + 1) / 2;
    else if (p.depth > 4)
      p.depth /= 2;
    else if (p.tile_rows > 1)
      p.tile_rows = (p.tile_rows + 1) / 2;
    else
      break;
  }
  p.down = divide_up(rows, p.tile_rows);
  p.across = divide_up(columns, p.tile_columns);
  p.tiles = divide_up(p.images, p.tile_images) * p.down * p.across;
  const int64_t blocks = std::min(p.tiles, std::max(kManyTiles, divide_up(p.tiles, 8)));
  DLK_CHECK(blocks < int64_t(1) << 31, kOp, ": expected fewer than 2^34 tiles, got ", p.tiles);

  p.weight_floats = p.depth * taps * width * groups * kChannels;
  const int used = p.tile_images * p.tile_rows * p.tile_columns;
  const int phases = kBackward ? v.stride * h.stride : 1;
  const LaunchShape shape{
      .grid = {unsigned(blocks), unsigned(divide_up(eights, groups)), unsigned(phases)},
      .block = {unsigned(divide_up(used, kWarp) * kWarp), unsigned(groups)},
      .shared = (floats + p.weight_floats) * 4};
  const auto launch_for = [&](auto taps_tag, auto step_tag) {
    launch(convolve_kernel<S, Source, taps_tag, step_tag>, name, shape, p);
  };
  using Three = std::integral_constant<int, 3>;
  using Seven = std::integral_constant<int, 7>;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if constexpr (!kBackward)
    if (step_h == 2) return width <= 3 ? launch_for(Three{}, Two{}) : launch_for(Seven{}, Two{});
  width <= 3 ? launch_for(Three{}, One{}) : launch_for(Seven{}, One{});
}

template <typename S>
void run(WeightGradient<S>& p, Sums<S>& sums, const Tensor& like) {
  const Axis &v = p.vertical, &h = p.horizontal;
  const int eights = divide_up(p.out, kChannels), rows_of_kernels = p.in * v.taps;
  p.groups = balanced(eights, kThreads / rows_of_kernels);
  p.items = p.groups * rows_of_kernels;
  p.slices = std::clamp(kThreads / p.items, 1, kSlices);
  // Whole fours of columns: the last four read their inputs too.
  p.tile_columns = divide_up(balanced(p.gradient.columns, kTileColumns), kFour) * kFour;
  p.tile_rows = balanced(p.gradient.rows, kTileRows);
  size_t floats;
  const auto lay_out = [&] {
    p.pitch = ((p.tile_columns - 1) * h.stride + h.taps) | 1;
    floats = size_t(p.tile_rows) * p.tile_columns * gradient_pitch(p.groups) +
             size_t(p.in) * ((p.tile_rows - 1) * v.stride + v.taps) * p.pitch;
    return int64_t(floats) * 4 <= kTileBytes;
  };
  while (!lay_out()) {
    if (p.tile_rows > 1)
      p.tile_rows = (p.tile_rows + 1) / 2;
    else if (p.tile_columns > kFour)
      p.tile_columns = divide_up(p.tile_columns / 2, kFour) * kFour;
    else
      break;
  }
  p.slices = std::min(p.slices, p.tile_rows);
  p.down = divide_up(p.gradient.rows, p.tile_rows);
  p.across = divide_up(p.gradient.columns, p.tile_columns);
  p.tiles = p.input.images * p.down * p.across;
  const int blocks_of_groups = divide_up(eights, p.groups);
  const int64_t most = std::max<int64_t>(1, kBlocks / blocks_of_groups);
  p.per_block = divide_up(p.tiles, std::min(p.tiles, most));
  const int blocks = divide_up(p.tiles, p.per_block);

  sums.number = int64_t(blocks) * p.slices;
  const int64_t columns = int64_t(p.in) * v.taps * h.taps + 1;
  const Tensor pieces =
      torch::stable::new_empty(like, Sizes{sums.number, p.out, columns}, ScalarType::Float);
  sums.pieces = p.pieces = scratch_pointer<float>("pieces", pieces);
  const LaunchShape shape{.grid = {unsigned(blocks), unsigned(blocks_of_groups)},
                          .block = unsigned(divide_up(p.items * p.slices, kWarp) * kWarp),
                          .shared = floats * 4};
  constexpr const char* name = "conv2d_few_channels weight gradient";
  if (h.stride == 2)
    h.taps <= 3 ? launch(weight_gradient_kernel<S, 3, 2>, name, shape, p)
                : launch(weight_gradient_kernel<S, 7, 2>, name, shape, p);
  else
    h.taps <= 3 ? launch(weight_gradient_kernel<S, 3, 1>, name, shape, p)
                : launch(weight_gradient_kernel<S, 7, 1>, name, shape, p);
  const LaunchShape adding{.grid = unsigned(divide_up(p.out * columns, kWarp)),
                           .block = {kWarp, kStrips},
                           .shared = kWarp * kStrips * 4};
  launch(add_pieces_kernel<S>, "conv2d_few_channels sums", adding, sums);
}

// ------------------------------------------------------------------------------------ host entries

// Whether offsets along the dimensions from `first` on are ints.
bool is_small(const Tensor& x, int first) {
  int64_t last = 0;
  for (int d = first; d < 4; ++d) last += (x.size(d) - 1) * x.stride(d);
  return last < int64_t(1) << 31;
}

// A tensor whose images are less than 2^31 elements long.
Tensor placed(const char* argument, const Tensor& x) {
  if (is_small(x, 1)) return x;
  const Tensor dense = torch::stable::contiguous(x);
  DLK_CHECK(is_small(dense, 1), kOp, ": expected fewer than 2^31 elements of ", argument,
            " in an image, got shape ", shape_string(x.sizes()));
  return dense;
}

Place place_of(const Tensor& x) {
  // Where there is one channel or column its stride says nothing.
  const int channel = x.size(1) == 1 ? 0 : int(x.stride(1));
  return {x.stride(0), channel, int(x.stride(2)), x.size(3) == 1 ? 0 : int(x.stride(3))};
}

struct Problem {
  int64_t images, in, out;
  Axis vertical, horizontal;  // of the convolution
  Sizes convolved, result;    // shapes of the output, before and behind the pool
  Activation activation;
  bool pool;
};

Problem checked(const Tensor& input, const Tensor& weight, const Sizes& stride,
                const Sizes& padding, const std::string& activation, bool pool) {
  check_on_gpu(kOp, "input", input, input);
  check_on_gpu(kOp, "weight", weight, input);
  const ScalarType dtype = input.scalar_type();
  DLK_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
      ": expected input of dtype float32, bfloat16 or float16, got ",
      torch::headeronly::toString(dtype));
  check_dtype(kOp, "weight", weight, dtype);
  DLK_CHECK(input.dim() == 4, kOp, ": expected input of 4 dimensions, got shape ",
            shape_string(input.sizes()));
  DLK_CHECK(weight.dim() == 4 && weight.size(1) == input.size(1), kOp,
            ": expected weight of shape [K, ", input.size(1), ", R, S], got ",
            shape_string(weight.sizes()));
  DLK_CHECK(input.size(1) >= 1 && input.size(1) <= kMostIn && weight.size(0) >= 1 &&
                weight.size(0) <= kMostOut,
            kOp, ": expected 1 to ", kMostIn, " channels in and 1 to ", kMostOut,
            " out, got weight of shape ", shape_string(weight.sizes()));
  Problem p{input.size(0),
            input.size(1),
            weight.size(0),
            {},
            {},
            {},
            {},
            parse_activation(kOp, activation),
            pool};
  Sizes size(2);
  for (int d = 0; d < 2; ++d) {
    const int64_t taps = weight.size(2 + d), extent = input.size(2 + d);
    DLK_CHECK(taps >= 1 && taps <= kMostTaps, kOp, ": expected kernels of 1 to ", kMostTaps,
              " rows and columns, got weight of shape ", shape_string(weight.sizes()));
    DLK_CHECK(stride.size() == 2 && stride[d] >= 1 && stride[d] <= kMostStride, kOp,
              ": expected two strides of 1 to ", kMostStride, ", got ", shape_string(stride));
    DLK_CHECK(padding.size() == 2 && padding[d] >= 0 && padding[d] < int64_t(1) << 24, kOp,
              ": expected two paddings from 0, got ", shape_string(padding));
    DLK_CHECK(extent < int64_t(1) << 24, kOp, ": expected images of fewer than 2^24 rows and ",
              "columns, got input of shape ", shape_string(input.sizes()));
    const int64_t room = extent + 2 * padding[d] - taps;
    DLK_CHECK(room >= 0, kOp, ": expected a kernel no larger than the padded input, got ",
              "input of shape ", shape_string(input.sizes()), ", weight of shape ",
              shape_string(weight.sizes()));
    size[d] = room / stride[d] + 1;
    (d ? p.horizontal : p.vertical) = {int(size[d]), int(taps), int(stride[d]), int(padding[d])};
  }
  p.convolved = p.result = {p.images, p.out, size[0], size[1]};
  if (pool) p.result = {p.images, p.out, size[0] / 2, size[1] / 2};
  DLK_CHECK(p.result[2] >= 1 && p.result[3] >= 1, kOp,
            ": expected 2 rows and columns to pool, got ", shape_string(p.convolved));
  DLK_CHECK(p.out * size[0] * size[1] < int64_t(1) << 31, kOp,
            ": expected fewer than 2^31 elements in an image of the output, got shape ",
            shape_string(p.convolved));
  return p;
}

template <typename Body>
void for_float(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(bf16{});
  body(f16{});
}

template <typename S>
Image<S> image_of(const Tensor& x) {
  return {input_pointer<S>("input", x), place_of(x), x.size(0), int(x.size(2)), int(x.size(3))};
}

template <typename S, typename Source>
void set_result(Convolution<S, Source>& p, const char* name, const Tensor& result) {
  p.result = output_pointer<S>(name, result);
  p.result_place = place_of(result);
  p.images = result.size(0);
  p.result_rows = int(result.size(2));
  p.result_columns = int(result.size(3));
  const bool aligned = is_aligned(p.result);
  p.wide_channels = aligned && p.result_place.is_channels_last() && p.out % kChannels == 0;
  p.wide_columns = aligned && p.result_place.column == 1 && p.result_columns % kColumns == 0;
}

std::tuple<Tensor, Tensor> conv2d_few_channels_forward(Tensor input, Tensor weight, Optional bias,
                                                       Sizes stride, Sizes padding, Text activation,
                                                       bool pool) {
  const Problem q = checked(input, weight, stride, padding, activation, pool);
  if (bias) {
    check_on_gpu(kOp, "bias", *bias, input);
    check_dtype(kOp, "bias", *bias, input.scalar_type());
    check_shape(kOp, "bias", *bias, Sizes{q.out});
    bias = torch::stable::contiguous(*bias);
  }
  const DeviceScope scope(input);
  MemoryFormat format = MemoryFormat::Contiguous;
  if (q.images > 0 && (suggests_channels_last(input) || suggests_channels_last(weight)))
    format = MemoryFormat::ChannelsLast;
  const Tensor output = empty(input, q.result, format, input.scalar_type());
  const Tensor argmax = pool ? empty(input, q.result, format, ScalarType::Byte)
                             : torch::stable::new_empty(input, Sizes{0}, ScalarType::Byte);
  if (output.numel() == 0) return {output, argmax};
  input = placed("input", input);
  if (!is_small(weight, 0)) weight = torch::stable::contiguous(weight);
  for_float(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Convolution<S, Image<S>> p{};
    p.source = image_of<S>(input);
    p.weight = input_pointer<S>("weight", weight);
    p.weight_place = {int(weight.stride(0)), int(weight.stride(1)), int(weight.stride(2)),
                      int(weight.stride(3))};
    if (bias) p.bias = input_pointer<S>("bias", *bias);
    p.in = int(q.in);
    p.out = int(q.out);
    p.vertical = q.vertical;
    p.horizontal = q.horizontal;
    p.activation = q.activation;
    set_result(p, "output", output);
    if (pool) p.argmax = output_pointer<uint8_t>("argmax", argmax);
    p.wide_channels = p.wide_channels && (!pool || is_aligned(p.argmax));
    run(p, "conv2d_few_channels forward");
  });
  return {output, argmax};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_few_channels_backward(
    Tensor grad_output, Tensor input, Tensor weight, Tensor output, Tensor argmax, Sizes stride,
    Sizes padding, Text activation, bool pool, bool want_input, bool want_weight, bool want_bias) {
  const Problem q = checked(input, weight, stride, padding, activation, pool);
  const bool activated = q.activation != Activation::kNone;
  const auto check = [&](const char* argument, const Tensor& x, ScalarType dtype) {
    check_on_gpu(kOp, argument, x, input);
    check_dtype(kOp, argument, x, dtype);
    check_shape(kOp, argument, x, q.result);
  };
  check("grad_output", grad_output, input.scalar_type());
  if (activated) check("output", output, input.scalar_type());
  if (pool) check("argmax", argmax, ScalarType::Byte);
  const DeviceScope scope(input);
  const auto none = [&] { return torch::stable::new_empty(input, Sizes{0}); };
  const Sizes shape(input.sizes().begin(), input.sizes().end());
  const Tensor grad_input =
      want_input ? empty(input, shape, suggested_format(input), input.scalar_type()) : none();
  Tensor grad_weight = want_weight ? torch::stable::empty_like(weight) : none();
  Tensor grad_bias = want_bias ? torch::stable::new_empty(input, Sizes{q.out}) : none();
  if (q.images == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }
  // The three in one layout.
  const Tensor& first = pool ? argmax : activated ? output : grad_output;
  const MemoryFormat format = suggested_format(first);
  grad_output = torch::stable::contiguous(grad_output, format);
  if (activated) output = torch::stable::contiguous(output, format);
  if (pool) argmax = torch::stable::contiguous(argmax, format);
  input = placed("input", input);
  if (!is_small(weight, 0)) weight = torch::stable::contiguous(weight);
  for_float(input.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const Gradient<S> gradient{input_pointer<S>("grad_output", grad_output),
                               place_of(grad_output),
                               q.images,
                               q.vertical.size,
                               q.horizontal.size,
                               activated ? input_pointer<S>("output", output) : nullptr,
                               pool ? input_pointer<uint8_t>("argmax", argmax) : nullptr,
                               int(q.result[2]),
                               int(q.result[3]),
                               q.activation};
    if (want_input) {
      Convolution<S, Gradient<S>> p{};
      p.source = gradient;
      p.weight = input_pointer<S>("weight", weight);
      p.weight_place = {int(weight.stride(1)), int(weight.stride(0)), int(weight.stride(2)),
                        int(weight.stride(3))};
      p.in = int(q.out);
      p.out = int(q.in);
      p.vertical = q.vertical;
      p.horizontal = q.horizontal;
      set_result(p, "grad_input", grad_input);
      p.vertical.size = p.result_rows;
      p.horizontal.size = p.result_columns;
      p.wide_columns = p.wide_columns && q.horizontal.stride == 1;
      run(p, "conv2d_few_channels input gradient");
    }
    if (want_weight || want_bias) {
      WeightGradient<S> p{};
      p.input = image_of<S>(input);
      p.gradient = gradient;
      p.in = int(q.in);
      p.out = int(q.out);
      p.vertical = q.vertical;
      p.horizontal = q.horizontal;
      p.bias = want_bias;
      Sums<S> sums{};
      sums.out = p.out;
      sums.in = p.in;
      sums.rows = q.vertical.taps;
      sums.columns = q.horizontal.taps;
      if (want_weight) {
        sums.weight = output_pointer<S>("grad_weight", grad_weight);
        sums.weight_place = {grad_weight.stride(0), grad_weight.stride(1), grad_weight.stride(2),
                             grad_weight.stride(3)};
      }
      if (want_bias) sums.bias = output_pointer<S>("grad_bias", grad_bias);
      run(p, sums, input);
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dlkernels

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLK_DEVICE_KEY, m) {
  m.impl("conv2d_few_channels_forward", TORCH_BOX(&dlkernels::conv2d_few_channels_forward));
  m.impl("conv2d_few_channels_backward", TORCH_BOX(&dlkernels::conv2d_few_channels_backward));
}
