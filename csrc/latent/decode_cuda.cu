// sum_h softmax(scale (xhat k_h^T + bias_h)) v_h + out_bias with xhat = LayerNorm([x ; position]) made on the tile: the
// mirror image of latent_cuda.cu, few latents for many queries. README.md in mmkernels/ops/latent has the derivation.
//
// A block keeps xhat of its queries in shared memory and an accumulator of queries x columns in its registers, and
// walks over the latents of every head, of every example that shares the queries.
#include "latent/decode_tile.cuh"

namespace mmk::latent {
namespace {

template <class T, class Tile>
struct DecodeShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kRows> queries;
  T *k, *v, *weights;
  float *bias, *exchange;  // exchange: per row and score group
  int v_pitch, bytes;

  __host__ __device__ DecodeShared(const Decode& d, bool, unsigned char* base) {
    Arena arena{base};
    queries = take_keys<T, Tile::kRows>(d.x, false, arena);
    v_pitch = column_pitch<T>(d);
    k = arena.take<T>(Tile::kColumns * queries.pitch);
    v = arena.take<T>(Tile::kColumns * v_pitch);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    bias = arena.take<float>(Tile::kColumns);
    exchange = arena.take<float>(Tile::kRows * Tile::kScoreGroups);
    bytes = arena.used;
  }

  // The keys of a block of latents, and its values: copies of their own, so that each runs beside the other's product.
  __device__ void fetch_keys(const Decode& d, int64_t pair, int64_t first) const {
    load_latents<T>(d, d.k, channels(d.x), pair, first, k, Tile::kColumns, queries.pitch);
    for (int i = threadIdx.x; i < Tile::kColumns; i += kThreads) bias[i] = score_bias(d, pair, first + i);
  }
  __device__ void fetch_values(const Decode& d, int64_t pair, int64_t first) const {
    load_latents<T>(d, d.v, d.columns, pair, first, v, Tile::kColumns, v_pitch);
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) decode_forward_kernel(Decode d, Plan plan) {
  using Shared = DecodeShared<T, Tile>;
  const Shared shared(d, false, shared_memory());
  const Thread<Tile> at;
  const Problem p = queries_of_tile(d);
  const int pitch = shared.queries.pitch, pairs = padded_columns(d) / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % small(plan.row_tiles)) * Tile::kRows;
  const int64_t first_batch = blockIdx.x / small(plan.row_tiles) * d.examples;
  const int64_t first_head = first_batch * d.heads;
  const unsigned key_tiles = small(plan.key_tiles), steps = small(d.examples * d.heads) * key_tiles;
  const bool active = first_row + at.first_row < p.keys;
  const float scale = p.scale * kLog2e;
  auto head_of = [&](unsigned step) { return first_head + step / key_tiles; };
  auto latent_of = [&](unsigned step) { return static_cast<int64_t>(step % key_tiles) * Tile::kColumns; };

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float top[Tile::kFragments][2], total[Tile::kFragments][2];  // of a row; the total over this warp's columns

  shared.fetch_keys(d, first_head, 0);
  ptx::cp_async_commit();
  shared.fetch_values(d, first_head, 0);
  ptx::cp_async_commit();
  shared.queries.make(p, first_batch, first_row);
  for (unsigned step = 0; step < steps; ++step) {
    if (step % key_tiles == 0) {
      clear(sum);
#pragma unroll
      for (int i = 0; i < 2 * Tile::kFragments; ++i) top[i / 2][i % 2] = -INFINITY, total[i / 2][i % 2] = 0.0f;
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
    float s[Tile::kFragments][Tile::kScores][4];
    if (active && at.scores) {
      multiply_rows<T>(s, shared.queries.tile + at.first_row * pitch, shared.k + at.first_score * pitch, pitch,
                       padded(p));
      scale_scores(s, scale, shared.bias, shared.exchange, at);
    }
    __syncthreads();
    if (step + 1 < steps) shared.fetch_keys(d, head_of(step + 1), latent_of(step + 1));
    ptx::cp_async_commit();
    if (active) {
      bool changed = false;
      float decay[Tile::kFragments][2];
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float best = highest(top[m][half], shared.exchange, at.row(m, half), at);
          const float zero = best == -INFINITY ? 0.0f : best;  // no latent yet: -inf - -inf would be NaN
          decay[m][half] = ptx::exp2(top[m][half] - zero);
          changed |= best != top[m][half];
          top[m][half] = best;
          if (!at.scores) continue;
          total[m][half] *= decay[m][half];
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            const float w0 = ptx::exp2(s[m][n][2 * half] - zero), w1 = ptx::exp2(s[m][n][2 * half + 1] - zero);
            total[m][half] += w0 + w1;
            store_two(shared.weights + at.row(m, half) * Shared::kWeightPitch + at.score(n), w0, w1);
          }
        }
      }
      if (__any_sync(0xffffffffu, changed)) shrink(sum, decay);
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (active) {
      accumulate<T, Tile>(sum, shared.weights + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch, shared.v,
                          shared.v_pitch, pairs, at);
    }
    __syncthreads();
    if (step + 1 < steps) shared.fetch_values(d, head_of(step + 1), latent_of(step + 1));
    ptx::cp_async_commit();
    if ((step + 1) % key_tiles != 0) continue;

    // The end of a head.
    if (at.scores) publish_sums(total, shared.exchange, at);
    __syncthreads();
    const int64_t head = head_of(step), batch = batch_of(d, head), of_batch = head - batch * d.heads;
    const bool first = of_batch == 0, last = of_batch + 1 == d.heads;
    const int rows = rows_left(p.keys, first_row, Tile::kRows);
    float factor[Tile::kFragments][2];
    bool counts[Tile::kFragments][2];
#pragma unroll
    for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + at.row(m, half);
        float row_total = 0.0f;
        for (int i = 0; i < Tile::kScoreGroups; ++i) {
          row_total += shared.exchange[at.row(m, half) * Tile::kScoreGroups + i];
        }
        if (row < p.keys && at.column_group == 0 && at.t == 0) {
          d.lse[head * p.keys + row] = (top[m][half] + log2f(row_total)) * kLn2;
        }
        factor[m][half] = row_total > 0.0f ? 1.0f / row_total : 0.0f;
        counts[m][half] = shown(d, batch, row);
      }
    }
    const int64_t first_place = (batch * p.keys + first_row) * d.columns;
    float* const sums = d.sums + first_place;
    T* const out = static_cast<T*>(d.out) + first_place;
    drain(sum, at, [&](int m, int half, int c, float value) {
      if (at.row(m, half) >= rows || c >= d.columns) return;
      const int place = at.row(m, half) * d.columns + c;
      value *= factor[m][half];
      if (!first) value += sums[place];  // which this thread wrote
      if (!last) {
        sums[place] = value;
        return;
      }
      value = counts[m][half] ? value : 0.0f;
      if (d.out_bias) value += to_float(static_cast<const T*>(d.out_bias)[c]);
      out[place] = from_float<T>(value);
    });
  }
}

using DecodeChoice = Choice<Decode, Plan>;

template <class T>
DecodeChoice choose_decode_forward(const Decode& d, const Device& device) {
  DecodeChoice choice;
  auto kernels = [](auto tile) { return &decode_forward_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, DecodeShared, Tile<4, 2, 2, 32>, Tile<4, 2, 9, 64>, Tile<4, 2, 11, 32>, Tile<2, 2, 9, 64>,
              Tile<2, 2, 9, 32>, Tile<2, 2, 11, 32>, Tile<1, 2, 8, 32>, Tile<1, 1, 8, 16>>(
        d, padded_columns(d), device, d.x.keys, Flag::never, kernels, choice);
  } else {
    first_fit<T, DecodeShared, Tile<4, 1, 9, 32>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 8>>(
        d, padded_columns(d), device, d.x.keys, Flag::never, kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_decode_plan_fwd(const Decode* d, Plan* plan) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    const auto choice = choose_decode_forward<decltype(zero)>(*d, device);
    return describe(choice, device, ceil_div(d->x.keys, choice.rows), latent_tiles(*d, choice.columns), plan);
  });
}

extern "C" int mmk_latent_decode_fwd(const Decode* d, const Plan* plan, void* stream) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    const auto choice = choose_decode_forward<decltype(zero)>(*d, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * (d->x.batch / d->examples)));
    return mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *d, *plan);
  });
}
