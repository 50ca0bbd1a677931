// Adapters with the norms and residuals around them, on tensor cores by mma.sync, for compute capability 8.0 and newer.
// A block owns a tile of rows of one adapter and walks channels and bottleneck in chunks of 128 bytes. Between products
// rows pass through shared memory, so that whatever is element by element is done by threads that have 16 bytes of a
// row ("pieces", eight to a chunk) and read and write memory in whole lines. mmkernels/ops/adapter/README.md has the
// derivation and the time model.
#include <climits>
#include <type_traits>

#include "adapter/adapter_block.cuh"

namespace mmk::adapter {
namespace {

// --- The backward ---

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ Adapter d) {
  const Block<T> block(d, 2);
  constexpr int V = Block<T>::V, kWidth = Block<T>::kWidth;
  using Sums = typename Block<T>::Sums;
  const int chunks = block.chunks(d.channels);
  const float columns = static_cast<float>(d.channels);
  const float* statistics = d.statistics;
  // A block beyond the last tile has no rows; it writes zeros into sums.
  for (int row = threadIdx.x; row < block.tile; row += kThreads) {
    const int64_t m = block.numbers[row];
    const float* found = statistics;
    if (d.norm_weight.data) {
      if (m >= 0) block.fact(kMean, row) = found[m], block.fact(kRstd, row) = found[d.rows + m];
      found += 2 * d.rows;
    }
    block.fact(kFirst, row) = block.fact(kSecond, row) = block.fact(kThird, row) = 0.0f;
    if (d.out_weight.data && m >= 0) block.fact(kFirst, row) = found[m], block.fact(kSecond, row) = found[d.rows + m];
  }
  __syncthreads();

  // The bottleneck, and the slope of the activation.
  block.down(true);

  // The result again, for the averages that its norm's gradient subtracts; normalised it waits in dy.
  struct Averages {
    float plain = 0.0f, normed = 0.0f;
  };
  auto keep_averages = [&](PerPiece<Averages>& sums) {  // over a row, in kFirst and kThird
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own)) continue;
      const float plain = sum_of_row(sums.values[own].plain), normed = sum_of_row(sums.values[own].normed);
      if (threadIdx.x % kPieces != 0) continue;
      block.fact(kFirst, block.row(own)) = plain / columns;
      block.fact(kThird, block.row(own)) = normed / columns;
    }
    __syncthreads();
  };
  if (d.out_weight.data) {
    PerPiece<Averages> averages;
    float dgain[V], dbias[V];
    auto clear = [&] {
#pragma unroll
      for (int i = 0; i < V; ++i) dgain[i] = dbias[i] = 0.0f;
    };
    clear();
    block.template up<true>(
        block.hidden, d.w_up,
        [&](int own, int row, int64_t m, int c, int valid, float (&y)[V]) {
          block.finish(y, row, c, valid);
          float incoming[V], gain[V];
          block.load_dense(incoming, d.dout, m, c, valid);
          block.load_vector(gain, d.out_weight, c, valid);
          Averages sum;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            y[i] = (y[i] - block.fact(kFirst, row)) * block.fact(kSecond, row);
            dgain[i] += incoming[i] * y[i];
            dbias[i] += incoming[i];
            sum.plain += product(incoming[i], gain[i]);
            sum.normed += incoming[i] * gain[i] * y[i];
          }
          block.store_dense(d.dy, m, c, y, valid);
          averages.change(own, [&](Averages& all) { all.plain += sum.plain, all.normed += sum.normed; });
        },
        [&](int n) {
          if (!d.out_sums) return;
          block.store_column_sums(d.out_sums + int64_t{blockIdx.x} * d.channels, n, dgain);
          block.store_column_sums(d.out_sums + (int64_t{gridDim.x} + blockIdx.x) * d.channels, n, dbias);
          clear();
        });
    keep_averages(averages);
  }

  // Through the up projection and the activation.
  const void* dy = d.out_weight.data ? d.dy : d.dout;
  PerPiece<float> of_bias;
  const int half_rows[2] = {block.first_row + block.lane / 4, block.first_row + block.lane / 4 + 8};
  float* of_rows = block.sums;  // (across, rows): of dgate
  __syncthreads();              // the sums of columns have been read
  if (threadIdx.x < kMostTile) of_rows[threadIdx.x] = 0.0f;
  block.template products<false>(
      d.bottleneck, d.channels,
      [&](unsigned char* to, int n, int k) {
        block.fill_weight(to, d.w_up, d.channels, d.bottleneck, k, n);
        const bool of_gate = d.dgate && d.b_up.data && block.known && n == 0;
        const bool copied = !d.out_weight.data && !of_gate && !d.scale.data && !d.seed;
        block.fill_chunk(to + kChunkBytesOf<T>, k, copied ? kDense : kComputed,
                         [&](int own, int row, int64_t m, int c, int valid, float (&dl)[V]) {
                           float other[V];
                           if (d.out_weight.data && n == 0) {
                             float normed[V];
                             block.load_dense(dl, d.dout, m, c, valid);
                             block.load_vector(other, d.out_weight, c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i) dl[i] = product(dl[i], other[i]) - block.fact(kFirst, row);
                             block.load_dense(normed, dy, m, c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i)
                               dl[i] = (dl[i] - normed[i] * block.fact(kThird, row)) * block.fact(kSecond, row);
                             block.store_dense(d.dy, m, c, dl, valid);
                           } else {
                             block.load_dense(dl, dy, m, c, valid);
                           }
                           if (d.scale.data) {
                             block.load_scale(other, c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i) dl[i] *= other[i];
                           }
#pragma unroll
                           for (int i = 0; i < V; ++i) {
                             if (d.seed) dl[i] = block.survives(row, c + i) ? dl[i] * d.gain : 0.0f;
                             if (i >= valid) dl[i] = 0.0f;
                           }
                           if (of_gate) {
                             block.load_vector(other, d.b_up, int64_t{block.adapter} * d.channels + c, valid);
                             of_bias.change(own, [&](float& sum) {
#pragma unroll
                               for (int i = 0; i < V; ++i) sum += dl[i] * other[i] * d.factor;
                             });
                           }
                         });
      },
      [&](unsigned char* from, int, int step) { return block.plain(from + kChunkBytesOf<T>, step); },
      [&](unsigned char*, int n, Sums& sums) {
        float total[2] = {};
        block.each_element([&](int j, int i, int row, int column) {
          const float da = block.known ? sums[j][i] * d.factor : 0.0f;
          T* a = block.at(block.hidden + n * block.row_chunk, row, column);
          T* dz = block.at(block.dhidden + n * block.row_chunk, row, column);
          if (block.known) total[i / 2] += da * to_float(*a);
          *dz = from_float<T>(block.known ? da * block.fact(kGain, row) * to_float(*dz) : 0.0f);
        });
        if (d.dgate) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(total[half]);
            if (block.lane % 4 == 0) of_rows[block.share * block.tile + half_rows[half]] += sum;
          }
        }
      });
  __syncthreads();
  if (d.dgate) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own)) continue;
      float sum = sum_of_row(of_bias.values[own]);
      const int64_t m = block.numbers[block.row(own)];
      if (threadIdx.x % kPieces != 0 || m < 0) continue;
      for (int w = 0; w < block.across; ++w) sum += of_rows[w * block.tile + block.row(own)];
      d.dgate[m] = sum;
    }
  }
  // For the gradients of the weights.
  for (int n = 0; n < block.chunks(d.bottleneck); ++n) {
    const int j = n * kWidth + block.piece_column(), valid = min(d.bottleneck - j, V);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own) || block.numbers[block.row(own)] < 0 || valid <= 0) continue;
      const int64_t to = (block.begin + block.row(own)) * d.bottleneck + j;
      const bool by_vector = d.bottleneck % V == 0;
      float values[V];
      load_piece<T, V>(values, block.at(block.hidden + n * block.row_chunk, block.row(own), j - n * kWidth), V, true);
      store_piece<T, V>(static_cast<T*>(d.hidden) + to, values, valid, by_vector);
      load_piece<T, V>(values, block.at(block.dhidden + n * block.row_chunk, block.row(own), j - n * kWidth), V, true);
      store_piece<T, V>(static_cast<T*>(d.dhidden) + to, values, valid, by_vector);
    }
  }
  if (!d.dx && !d.dinput && !d.norm_sums) return;

  // Through the down projection and the first norm; before its averages are known the gradient waits in dx or dinput.
  float dgain[V], dbias[V];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < V; ++i) dgain[i] = dbias[i] = 0.0f;
  };
  clear();
  PerPiece<Averages> averages;
  void* waiting = d.dx ? d.dx : d.dinput;
  auto store = [&](int64_t m, int c, const float (&ds)[V], int valid) {
    float own[V] = {}, value[V];
    if (d.skip & 3) block.load_dense(own, dy, m, c, valid);
    if (d.dx) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = d.skip & 1 ? ds[i] + own[i] : ds[i];
      block.store_dense(d.dx, m, c, value, valid);
    }
    if (d.dinput) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = d.skip & 2 ? ds[i] + own[i] : ds[i];
      block.store_dense(d.dinput, m, c, value, valid);
    }
  };
  block.template up<false>(
      block.dhidden, d.w_down,
      [&](int own, int row, int64_t m, int c, int valid, float (&ds)[V]) {
        if (d.skip & 4) {
          float incoming[V];
          block.load_dense(incoming, dy, m, c, valid);
#pragma unroll
          for (int i = 0; i < V; ++i) ds[i] += incoming[i];
        }
        if (!d.norm_weight.data) {
          store(m, c, ds, valid);
          return;
        }
        float s[V], gain[V];
        block.load_s(s, row, c, valid);
        block.load_vector(gain, d.norm_weight, c, valid);
        Averages sum;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float normed = (s[i] - block.fact(kMean, row)) * block.fact(kRstd, row);
          if (i >= valid) ds[i] = 0.0f;
          dgain[i] += ds[i] * normed;
          dbias[i] += ds[i];
          ds[i] = product(ds[i], gain[i]);
          sum.plain += ds[i];
          sum.normed += ds[i] * normed;
        }
        if (waiting) block.store_dense(waiting, m, c, ds, valid);
        averages.change(own, [&](Averages& all) { all.plain += sum.plain, all.normed += sum.normed; });
      },
      [&](int n) {
        if (!d.norm_sums) return;
        block.store_column_sums(d.norm_sums + int64_t{blockIdx.x} * d.channels, n, dgain);
        block.store_column_sums(d.norm_sums + (int64_t{gridDim.x} + blockIdx.x) * d.channels, n, dbias);
        clear();
      });
  if (!d.norm_weight.data || !waiting) return;
  keep_averages(averages);
  for (int k = 0; k < chunks; ++k) {
    block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
      float s[V], ds[V];
      block.load_s(s, row, c, valid);
      block.load_dense(ds, waiting, m, c, valid);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float normed = (s[i] - block.fact(kMean, row)) * block.fact(kRstd, row);
        ds[i] = (ds[i] - block.fact(kFirst, row) - normed * block.fact(kThird, row)) * block.fact(kRstd, row);
      }
      store(m, c, ds, valid);
    });
  }
}

// --- The gradients of the weights ---

constexpr int kPartRows = 64;

// One part of an adapter's rows, a chunk of channels and one of the bottleneck: warps 0 to 3 make dz^T u, 4 to 7 dl^T
// a.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) weight_kernel(const __grid_constant__ Adapter d) {
  constexpr int kWidth = kChunk<T>, V = kWide<T>, kTile = kPartRows * kRowBytes;
  const int channel_chunks = (d.channels + kWidth - 1) / kWidth;
  const int hidden_chunks = (d.bottleneck + kWidth - 1) / kWidth;
  const int first_c = blockIdx.x % channel_chunks * kWidth;
  const int first_j = blockIdx.x / channel_chunks % hidden_chunks * kWidth;
  const int64_t part = blockIdx.x / (channel_chunks * hidden_chunks);
  int64_t begin = part * d.part, end = min(begin + d.part, d.rows);
  if (d.mode == Mode::grouped) {
    const Piece piece = find(d.begins, d.adapters, d.group_rows, d.part, part);
    if (piece.group >= d.adapters) return;
    begin = piece.begin, end = piece.end;
  }
  unsigned char* shared = shared_memory();
  unsigned char *dz_tile = shared, *u_tile = shared + kTile, *dl_tile = shared + 2 * kTile,
                *a_tile = shared + 3 * kTile;
  auto* sums = reinterpret_cast<float*>(shared + 4 * kTile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = threadIdx.x % kPieces * V;
  const int c = first_c + column, j = first_j + column;
  const int valid_c = max(min(d.channels - c, V), 0), valid_j = max(min(d.bottleneck - j, V), 0);
  const bool want_down = d.down_parts || d.bias_parts, want_up = d.up_parts || d.dl_parts;
  const bool by_vector = d.bottleneck % V == 0;
  const float* mean = d.statistics;
  auto* rows_m = reinterpret_cast<int64_t*>(sums + kWarps * kWidth);  // and offsets of x and input_residual
  auto* gains = reinterpret_cast<float*>(rows_m + 3 * kPartRows);     // and the words of dropout
  float dz_sum[V] = {}, dl_sum[V] = {}, acc[kWidth / 8][4] = {};
#pragma unroll 1
  for (int64_t first = begin; first < end; first += kPartRows) {
    __syncthreads();
    if (const int row = threadIdx.x; row < kPartRows && first + row < end) {
      const int64_t m = rows_m[row] = row_of(d, first + row);
      rows_m[kPartRows + row] = offset(d, d.x, m);
      rows_m[2 * kPartRows + row] = d.input_residual.data ? offset(d, d.input_residual, m) : 0;
      gains[row] = (d.gate.data ? parameter<T>(d.gate, m / d.gate_rows) : 1.0f) * d.factor;
      if (d.seed) {
        const DropoutRow drop = dropout_row(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(m));
        gains[kPartRows + row] = __uint_as_float(drop.low), gains[2 * kPartRows + row] = __uint_as_float(drop.high);
      }
    }
    __syncthreads();
#pragma unroll
    for (int own = 0; own < kPartRows * kPieces / kThreads; ++own) {
      const int row = (threadIdx.x + own * kThreads) / kPieces,
                at = row * kRowBytes + column * static_cast<int>(sizeof(T));
      const int64_t p = first + row;
      float dz[V] = {}, u[V] = {}, dl[V] = {}, a[V] = {};
      if (p < end) {
        const int64_t m = rows_m[row];
        if (want_down && valid_j > 0)
          load_piece<T, V>(dz, static_cast<const T*>(d.dhidden) + p * d.bottleneck + j, valid_j, by_vector);
        if (d.down_parts && valid_c > 0) {
          load_piece<T, V>(u, static_cast<const T*>(d.x.data) + rows_m[kPartRows + row] + c, valid_c, d.by_vector);
          if (d.input_residual.data) {
            float other[V];
            load_piece<T, V>(other, static_cast<const T*>(d.input_residual.data) + rows_m[2 * kPartRows + row] + c,
                             valid_c, d.by_vector);
#pragma unroll
            for (int i = 0; i < V; ++i) u[i] = to_float(from_float<T>(u[i] + other[i]));
          }
          if (d.norm_weight.data) {
            float gain[V], bias[V] = {};
            load_parameter<T, V>(gain, d.norm_weight, c, valid_c, d.by_vector);
            if (d.norm_bias.data) load_parameter<T, V>(bias, d.norm_bias, c, valid_c, d.by_vector);
#pragma unroll
            for (int i = 0; i < V; ++i)
              u[i] = i < valid_c ? (u[i] - mean[m]) * mean[d.rows + m] * gain[i] + bias[i] : 0.0f;
          }
        }
        if (want_up && valid_c > 0) {
          load_piece<T, V>(dl, static_cast<const T*>(d.dy) + m * d.channels + c, valid_c, d.by_vector);
          const float gain = gains[row];
#pragma unroll
          for (int i = 0; i < V; ++i) dl[i] *= gain;
          if (d.seed) {
            const DropoutRow drop{__float_as_uint(gains[kPartRows + row]), __float_as_uint(gains[2 * kPartRows + row])};
#pragma unroll
            for (int i = 0; i < V; ++i)
              dl[i] = dropout_bits(drop, static_cast<uint32_t>(c + i)) >= d.threshold ? dl[i] * d.gain : 0.0f;
          }
        }
        if (d.up_parts && valid_j > 0)
          load_piece<T, V>(a, static_cast<const T*>(d.hidden) + p * d.bottleneck + j, valid_j, by_vector);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) dz_sum[i] += dz[i], dl_sum[i] += dl[i];
      store_elements<T, V>(reinterpret_cast<T*>(dz_tile + at), 0, dz);
      store_elements<T, V>(reinterpret_cast<T*>(u_tile + at), 0, u);
      store_elements<T, V>(reinterpret_cast<T*>(dl_tile + at), 0, dl);
      store_elements<T, V>(reinterpret_cast<T*>(a_tile + at), 0, a);
    }
    __syncthreads();
    const int fragment = warp % 4;
    if (fragment * 16 >= kWidth || (warp < 4 ? !d.down_parts : !d.up_parts)) continue;
    const unsigned char *left = warp < 4 ? dz_tile : dl_tile, *right = warp < 4 ? u_tile : a_tile;
#pragma unroll
    for (int step = 0; step < kPartRows / kStep<T>; ++step) {
      const Operand<T> operand = load_left_turned<T>(left, kRowBytes, fragment * 16, step);
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[4];
        load_right<T, false>(b, right, kRowBytes, n * 8, step);
        multiply<T, true>(acc[n], operand, b[0], b[1]);
        multiply<T, true>(acc[n + 1], operand, b[2], b[3]);
      }
    }
  }
  float* out = warp < 4 ? d.down_parts : d.up_parts;
  const int rows = warp < 4 ? d.bottleneck : d.channels, columns = warp < 4 ? d.channels : d.bottleneck;
  const int first_row = warp < 4 ? first_j : first_c, first_column = warp < 4 ? first_c : first_j;
  if (out && warp % 4 * 16 < kWidth) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + warp % 4 * 16 + lane / 4 + i / 2 * 8;
        const int at = first_column + n * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && at < columns) out[part * rows * columns + int64_t{row} * columns + at] = acc[n][i];
      }
    }
  }
  auto store_sums = [&](float* to, const float (&own)[V], int first, int size) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float total = own[i] + __shfl_xor_sync(0xffffffffu, own[i], 8);
      total += __shfl_xor_sync(0xffffffffu, total, 16);
      if (lane < kPieces) sums[warp * kWidth + lane * V + i] = total;
    }
    __syncthreads();
    const int at = threadIdx.x;
    if (at >= kWidth || first + at >= size) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kWidth + at];
    to[part * size + first + at] = sum;
  };
  if (d.bias_parts && first_c == 0) store_sums(d.bias_parts, dz_sum, first_j, d.bottleneck);
  if (d.dl_parts && first_j == 0) store_sums(d.dl_parts, dl_sum, first_c, d.channels);
}

struct Parts {
  int64_t first, end;
};

// The parts of an adapter. Every warp looks for itself.
__device__ __forceinline__ Parts parts_of(const Adapter& d, int adapter) {
  if (d.mode != Mode::grouped) return {0, (d.rows + d.part - 1) / d.part};
  int64_t before = 0, own = 0;
  for (int g = threadIdx.x % 32; g <= adapter; g += 32) {
    const int64_t rows = (d.begins[g + 1] - d.begins[g]) * d.group_rows, parts = (rows + d.part - 1) / d.part;
    (g == adapter ? own : before) += parts;
  }
  for (int bits = 16; bits; bits /= 2) {
    before += __shfl_xor_sync(0xffffffffu, before, bits);
    own += __shfl_xor_sync(0xffffffffu, own, bits);
  }
  return {before, before + own};
}

// out[adapter] = the sum of its parts of `size` numbers, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    part_sum_kernel(const __grid_constant__ Adapter d, const float* parts, T* out, int64_t size, int64_t blocks) {
  const int adapter = static_cast<int>(blockIdx.x / blocks);
  const Parts own = parts_of(d, adapter);
  const int64_t i = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t p = own.first; p < own.end; ++p) sum += parts[p * size + i];
  out[adapter * size + i] = from_float<T>(sum);
}

// With P and q the sums of an adapter's parts of dl^T a and of dl: scale P, scale q, <P_c, W_up_c> + q b_up. A warp has
// a channel.
template <class T>
__global__ void __launch_bounds__(kThreads) up_sum_kernel(const __grid_constant__ Adapter d) {
  const int blocks = (d.channels + kWarps - 1) / kWarps, adapter = blockIdx.x / blocks, lane = threadIdx.x % 32;
  const Parts own = parts_of(d, adapter);
  const int c = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (c >= d.channels) return;
  const bool used = own.first < own.end;  // whatever an adapter without rows holds, its gradients are 0
  const int64_t at = int64_t{adapter} * d.channels + c;
  const float scale =
      d.scale.data && used ? parameter<T>(d.scale, adapter * d.scale_adapter + c * d.scale_channel) : 1.0f;
  float of_scale = 0.0f;
  if (d.up_parts) {
    for (int j = lane; j < d.bottleneck; j += 32) {
      float sum = 0.0f;
      for (int64_t p = own.first; p < own.end; ++p) sum += d.up_parts[(p * d.channels + c) * d.bottleneck + j];
      if (d.dw_up) static_cast<T*>(d.dw_up)[at * d.bottleneck + j] = from_float<T>(sum * scale);
      if (d.dscale && used) of_scale += sum * to_float(static_cast<const T*>(d.w_up)[at * d.bottleneck + j]);
    }
  }
  for (int bits = 16; bits; bits /= 2) of_scale += __shfl_xor_sync(0xffffffffu, of_scale, bits);
  if (lane != 0 || !d.dl_parts) return;
  float sum = 0.0f;
  for (int64_t p = own.first; p < own.end; ++p) sum += d.dl_parts[p * d.channels + c];
  if (d.db_up) d.db_up[at] = sum * scale;
  if (d.dscale) d.dscale[at] = of_scale + (d.b_up.data && used ? sum * parameter<T>(d.b_up, at) : 0.0f);
}

// One group a block: where it begins, and its items in their order.
__global__ void __launch_bounds__(kThreads)
    group_kernel(const int64_t* index, int count, int adapters, int* begins, int* order) {
  auto* warps = reinterpret_cast<int*>(shared_memory());
  const int group = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) before += group_of(index[i], adapters) < group;
  for (int bits = 16; bits; bits /= 2) before += __shfl_xor_sync(0xffffffffu, before, bits);
  if (lane == 0) warps[warp] = before;
  __syncthreads();
  int place = 0;
  for (int w = 0; w < kWarps; ++w) place += warps[w];
  if (threadIdx.x == 0) begins[group] = place, begins[adapters + 2] = count;
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + threadIdx.x;
    const bool own = i < count && group_of(index[i], adapters) == group;
    const unsigned found = __ballot_sync(0xffffffffu, own);
    int here = 0, all = 0;
    for (int l = 0; l < 32; ++l) here += l < lane ? found >> l & 1 : 0, all += found >> l & 1;
    __syncthreads();
    if (lane == 0) warps[warp] = all;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) here += warps[w];
    }
    if (own) order[place + here] = i;
    for (int w = 0; w < kWarps; ++w) place += warps[w];
  }
}

template <class T>
int start_weights(const Adapter& d, void* stream) {
  constexpr int kWidth = kChunk<T>;
  const int64_t tiles = int64_t{(d.channels + kWidth - 1) / kWidth} * ((d.bottleneck + kWidth - 1) / kWidth);
  const int64_t blocks = d.parts * tiles;
  if (blocks > INT_MAX) return 1;
  return launch(weight_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                4 * kPartRows * kRowBytes + kWarps * kWidth * 4 + kPartRows * (3 * 8 + 3 * 4), stream, d);
}

template <class T>
int start_sums(const Adapter& d, void* stream) {
  int code = 0;
  auto sum = [&](const float* parts, auto* out, int64_t size) {
    const int64_t of_adapter = (size + kThreads - 1) / kThreads, all = of_adapter * d.adapters;
    if (code || !parts) return;
    if (all > INT_MAX) code = 1;
    if (!code)
      code = launch(part_sum_kernel<std::remove_reference_t<decltype(*out)>>, dim3(static_cast<unsigned>(all)),
                    dim3(kThreads), 0, stream, d, parts, out, size, of_adapter);
  };
  sum(d.down_parts, static_cast<T*>(d.dw_down), int64_t{d.bottleneck} * d.channels);
  sum(d.bias_parts, d.db_down, d.bottleneck);
  const int64_t up = int64_t{(d.channels + kWarps - 1) / kWarps} * d.adapters;
  if (code || (!d.up_parts && !d.dl_parts)) return code;
  return up > INT_MAX ? 1 : launch(up_sum_kernel<T>, dim3(static_cast<unsigned>(up)), dim3(kThreads), 0, stream, d);
}

}  // namespace

int64_t shared_bytes(Dtype dtype, int channels, int bottleneck, int tile, bool resident, bool backward) {
  return bytes_of(dtype == Dtype::fp32 ? kChunk<float> : kChunk<bf16>, channels, bottleneck, tile, resident, backward);
}

}  // namespace mmk::adapter

int mmk_adapter_backward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, int64_t tiles, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) {
    const int64_t bytes = mmk::adapter::shared_bytes(dtype, d->channels, d->bottleneck, d->tile, false, true);
    return mmk::launch(mmk::adapter::backward_kernel<decltype(zero)>, dim3(static_cast<unsigned>(tiles)),
                       dim3(mmk::adapter::kThreads), bytes, stream, *d);
  });
}

int mmk_adapter_weights(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) { return mmk::adapter::start_weights<decltype(zero)>(*d, stream); });
}

int mmk_adapter_sums(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) { return mmk::adapter::start_sums<decltype(zero)>(*d, stream); });
}

int mmk_adapter_group(const int64_t* index, int64_t count, int adapters, int* begins, int* order, void* stream) {
  return mmk::launch(mmk::adapter::group_kernel, dim3(static_cast<unsigned>(adapters + 2)),
                     dim3(mmk::adapter::kThreads), mmk::adapter::kWarps * 4, stream, index, static_cast<int>(count),
                     adapters, begins, order);
}
