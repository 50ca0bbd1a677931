// What the gradients of decode_cuda.cu's forward want to know of the queries, and the gradient of the queries itself.
// A block keeps xhat and dout of its queries and walks over the latents like the forward; scores are made again from
// the saved log-sum-exp.
#include "latent/decode_tile.cuh"

namespace mmk::latent {
namespace {

template <class T, class Tile>
struct RowsShared {
  static constexpr int kScorePitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kRows> queries;
  T *dout, *k, *v, *dscores;
  float* bias;
  float2* exchange;  // per row and column group
  int v_pitch, bytes;

  // `apart`: k and v have a tile each, and the copy of one runs beside the product of the other.
  __host__ __device__ RowsShared(const Decode& d, bool apart, unsigned char* base) {
    Arena arena{base};
    queries = take_keys<T, Tile::kRows>(d.x, false, arena);
    v_pitch = column_pitch<T>(d);
    dout = arena.take<T>(Tile::kRows * v_pitch);
    v = arena.take<T>(Tile::kColumns * (apart || v_pitch > queries.pitch ? v_pitch : queries.pitch));
    k = apart ? arena.take<T>(Tile::kColumns * queries.pitch) : v;
    dscores = arena.take<T>(Tile::kRows * kScorePitch);
    bias = arena.take<float>(Tile::kColumns);
    exchange = arena.take<float2>(Tile::kRows * Tile::kColumnGroups);
    bytes = arena.used;
  }

  __device__ void fetch_keys(const Decode& d, int64_t pair, int64_t first) const {
    load_latents<T>(d, d.k, channels(d.x), pair, first, k, Tile::kColumns, queries.pitch);
    for (int i = threadIdx.x; i < Tile::kColumns; i += kThreads) bias[i] = score_bias(d, pair, first + i);
    ptx::cp_async_commit();
  }
  __device__ void fetch_values(const Decode& d, int64_t pair, int64_t first) const {
    load_latents<T>(d, d.v, d.columns, pair, first, v, Tile::kColumns, v_pitch);
    ptx::cp_async_commit();
  }
};

// delta = rowsum(dout * (out - out_bias)) is sum_m P dP of one head. The result of one of several heads is nowhere, and
// in fp32 delta has to be rounded as dP is, from which it is subtracted: a pass of its own makes that sum.
template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    decode_rows_kernel(Decode d, Plan plan, DecodeBackward b, bool apart) {
  using Shared = RowsShared<T, Tile>;
  const Shared shared(d, apart, shared_memory());
  const Thread<Tile> at;
  const Problem p = queries_of_tile(d);
  const int pitch = shared.queries.pitch, pairs = padded(p) / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % small(plan.row_tiles)) * Tile::kRows;
  const int64_t first_batch = blockIdx.x / small(plan.row_tiles) * d.examples, last_batch = first_batch + d.examples;
  const bool active = first_row + at.first_row < p.keys, wanted = b.of_rows.dx || b.of_rows.dtable;
  const float scale = p.scale * kLog2e;
  float* const sums = reinterpret_cast<float*>(shared.exchange);

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  for (int64_t batch = first_batch; batch < last_batch; ++batch) {
    if (!d.shared || batch == first_batch) {
      shared.queries.make(p, batch, first_row);
      clear(sum);
    }
    // What no example shows may be anything; its gradient is zero.
    for (int r = threadIdx.x; d.shared && batch == first_batch && r < Tile::kRows; r += kThreads) {
      bool seen = false;
      for (int64_t other = 0; other < p.batch; ++other) seen |= shown(d, other, first_row + r);
      if (!seen) shared.queries.rstd[r] = 0.0f;
    }
    load_dout<T>(d, b, batch, first_row, shared.dout, Tile::kRows, shared.v_pitch);
    ptx::cp_async_commit();
    for (int64_t head = batch * d.heads; head < (batch + 1) * d.heads; ++head) {
      float shift[Tile::kFragments][2], delta[Tile::kFragments][2];
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_row + at.row(m, half);
          const bool counts = shown(d, batch, row);
          shift[m][half] = counts ? shift_of(d.lse[head * p.keys + row]) : INFINITY;
          delta[m][half] = counts && !b.sums_first ? b.delta[head * p.keys + row] : 0.0f;
        }
      }
      for (bool sums_first = b.sums_first; sums_first || wanted; sums_first = false) {
        if (apart) {
          shared.fetch_values(d, head, 0);
          shared.fetch_keys(d, head, 0);
        }
        for (int64_t first = 0; first < p.rows; first += Tile::kColumns) {
          const int64_t next = first + Tile::kColumns;
          if (!apart) shared.fetch_values(d, head, first);
          if (apart) {
            ptx::cp_async_wait<1>();
          } else {
            ptx::cp_async_wait<0>();
          }
          __syncthreads();
          float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
          if (active && at.scores) {
            multiply_rows<T, true>(dp, shared.dout + at.first_row * shared.v_pitch,
                                   shared.v + at.first_score * shared.v_pitch, shared.v_pitch, padded_columns(d));
          }
          if (!apart) {
            __syncthreads();
            shared.fetch_keys(d, head, first);
          }
          ptx::cp_async_wait<0>();
          __syncthreads();
          if (apart && next < p.rows) shared.fetch_values(d, head, next);
          if (active && at.scores) {
            multiply_rows<T, true>(s, shared.queries.tile + at.first_row * pitch, shared.k + at.first_score * pitch,
                                   pitch, padded(p));
#pragma unroll
            for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < Tile::kScores; ++n) {
                  float ds[2];
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    const float weight =
                        weight_of(s[m][n][2 * half + i], scale, shared.bias[at.score(n) + i], shift[m][half]);
                    const float dweight = dp[m][n][2 * half + i];
                    if (sums_first) delta[m][half] += score_gradient(weight, dweight, 0.0f);
                    ds[i] = p.scale * score_gradient(weight, dweight, delta[m][half]);
                  }
                  if (!sums_first) {
                    store_two(shared.dscores + at.row(m, half) * Shared::kScorePitch + at.score(n), ds[0], ds[1]);
                  }
                }
              }
            }
          }
          __syncthreads();
          if (!sums_first) {
            if (active) {
              accumulate<T, Tile, true>(sum, shared.dscores + at.first_row * Shared::kScorePitch, Shared::kScorePitch,
                                        shared.k, pitch, pairs, at);
            }
            __syncthreads();
          }
          if (apart && next < p.rows) shared.fetch_keys(d, head, next);
        }
        if (!sums_first) break;
        if (at.scores) publish_sums(delta, sums, at);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t row = first_row + at.row(m, half);
            delta[m][half] = 0.0f;
            for (int i = 0; i < Tile::kScoreGroups; ++i) {
              delta[m][half] += sums[at.row(m, half) * Tile::kScoreGroups + i];
            }
            if (row < p.keys && at.column_group == 0 && at.t == 0) b.delta[head * p.keys + row] = delta[m][half];
          }
        }
        __syncthreads();
      }
    }
    const bool last = d.shared || batch + 1 == last_batch;
    if (!wanted || (d.shared && batch + 1 < last_batch)) continue;
    normalise_backward(p, sum, shared.queries, shared.exchange, at);
    __syncthreads();
    store_gradient(p, b.of_rows, shared.queries, d.shared ? 0 : batch, first_row, last);
    __syncthreads();
  }
}

// One warp a row.
template <class T>
__global__ void decode_delta_kernel(Decode d, DecodeBackward b) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= d.x.batch * d.x.keys) return;
  const T* dout = static_cast<const T*>(b.of_rows.dout.data) + row * d.columns;
  const T* out = static_cast<const T*>(d.out) + row * d.columns;
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < d.columns; c += 32) {
    const float bias = d.out_bias ? to_float(static_cast<const T*>(d.out_bias)[c]) : 0.0f;
    sum += to_float(dout[c]) * (to_float(out[c]) - bias);
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  if (threadIdx.x % 32 == 0) b.delta[row] = sum;
}

using RowsChoice = Choice<Decode, Plan, DecodeBackward, bool>;

template <class T>
RowsChoice choose_decode_rows(const Decode& d, const Device& device) {
  RowsChoice choice;
  auto kernels = [](auto tile) { return &decode_rows_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, RowsShared, Tile<4, 2, 8, 16>, Tile<2, 2, 6, 32>, Tile<2, 2, 8, 32>, Tile<1, 2, 8, 16>,
              Tile<1, 1, 8, 16>>(d, padded(d.x), device, d.x.keys, Flag::each, kernels, choice);
  } else {
    first_fit<T, RowsShared, Tile<4, 1, 9, 16>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 8>>(d, padded(d.x), device, d.x.keys,
                                                                                     Flag::each, kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_decode_plan_bwd_rows(const Decode* d, Plan* plan) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    const auto choice = choose_decode_rows<decltype(zero)>(*d, device);
    return describe(choice, device, ceil_div(d->x.keys, choice.rows), latent_tiles(*d, choice.columns), plan);
  });
}

extern "C" int mmk_latent_decode_bwd_rows(const Decode* d, const Plan* plan, const DecodeBackward* b, void* stream) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    const auto choice = choose_decode_rows<decltype(zero)>(*d, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * (d->x.batch / d->examples)));
    return mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *d, *plan, *b, choice.flag);
  });
}

extern "C" int mmk_latent_decode_delta(const Decode* d, const DecodeBackward* b, void* stream) {
  return with_type(d->x.type, [&](auto zero) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(d->x.batch * d->x.keys, kWarps)));
    return mmk::launch(decode_delta_kernel<decltype(zero)>, blocks, dim3(kThreads), 0, stream, *d, *b);
  });
}
