// The gradient of q of latent_cuda.cu's forward. Scores are made again from the saved log-sum-exp; the kernel walks
// over keys like the forward. Sums that several blocks share go through partial results that are added in a fixed
// order.
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

template <class T, class Tile>
struct BackwardQShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kColumns> keys;
  T *q, *dout, *dscores;
  int bytes;

  __host__ __device__ BackwardQShared(const Problem& p, bool staged, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kColumns>(p, staged, arena);
    q = arena.take<T>(Tile::kRows * keys.pitch);
    dout = arena.take<T>(Tile::kRows * keys.pitch);
    dscores = arena.take<T>(Tile::kRows * kWeightPitch);
    bytes = arena.used;
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    backward_q_kernel(Problem p, Plan plan, Backward b, bool staged) {
  using Shared = BackwardQShared<T, Tile>;
  const Shared shared(p, staged, shared_memory());
  const Thread<Tile> at;
  const Share share(p, plan, Tile::kRows, Tile::kColumns);
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const bool active = share.first_row + at.first_row < p.rows;
  const float scale = p.scale * kLog2e;

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float shift[Tile::kFragments][2], delta[Tile::kFragments][2];
  clear(sum);
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      const bool inside = row < p.rows;
      shift[m][half] = inside ? shift_of(b.lse[share.batch * p.rows + row]) : INFINITY;
      delta[m][half] = inside ? b.delta[share.batch * p.rows + row] : 0.0f;
    }
  }

  load_rows<T>(p, p.q, share.batch, share.first_row, shared.q, Tile::kRows, pitch);
  load_rows<T>(p, b.dout, share.batch, share.first_row, shared.dout, Tile::kRows, pitch);
  shared.keys.fetch(p, share.batch, share.first_key);
  for (int64_t first = share.first_key; first < share.last_key; first += Tile::kColumns) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    shared.keys.make(p, share.batch, first);
    const int64_t next = first + Tile::kColumns;
    if (next < share.last_key) shared.keys.fetch(p, share.batch, next);
    if (active && at.scores) {
      float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
      const T* keys = shared.keys.tile + at.first_score * pitch;
      multiply_rows<T>(s, shared.q + at.first_row * pitch, keys, pitch, padded(p));
      multiply_rows<T>(dp, shared.dout + at.first_row * pitch, keys, pitch, padded(p));
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          DropoutRow dropped{};
          float dsum = 0.0f;
          if (p.seed) {
            const int64_t row = share.batch * p.rows + share.first_row + at.row(m, half);
            dropped = dropout_row(*p.seed, row);
            if (share.first_row + at.row(m, half) < p.rows) dsum = b.dsum[row];
          }
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            float ds[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float weight =
                  ptx::exp2(fmaf(s[m][n][2 * half + i], scale, shared.keys.bias[at.score(n) + i] - shift[m][half]));
              float dweight = dp[m][n][2 * half + i];
              if (p.seed) dweight = (dweight + dsum) * keep_factor(p, dropped, first + at.score(n) + i);
              ds[i] = score_gradient(weight, dweight, delta[m][half]);
            }
            store_two(shared.dscores + at.row(m, half) * Shared::kWeightPitch + at.score(n), ds[0], ds[1]);
          }
        }
      }
    }
    __syncthreads();
    if (active) {
      accumulate<T, Tile>(sum, shared.dscores + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch,
                          shared.keys.tile, pitch, pairs, at);
    }
  }

  const int count = channels(p);
  const int rows = rows_left(p.rows, share.first_row, Tile::kRows);
  const int64_t first_place = (share.batch * p.rows + share.first_row) * count;
  T* const dq = static_cast<T*>(b.dq) + first_place;
  float* const partial = b.partial_dq ? b.partial_dq + share.split * p.batch * p.rows * count + first_place : nullptr;
  drain(sum, at, [&](int m, int half, int c, float value) {
    if (at.row(m, half) >= rows || c >= count) return;
    const int place = at.row(m, half) * count + output_channel(p, c);
    value *= p.scale;
    if (partial) {
      partial[place] = value;
    } else {
      dq[place] = from_float<T>(value);
    }
  });
}

template <class T>
__global__ void delta_kernel(Problem p, Strided dout, Strided out, const float* dlse, int64_t dlse_batch,
                             int64_t dlse_row, float* delta, float* dsum) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= p.batch * p.rows) return;
  const int64_t b = row / p.rows, r = row % p.rows;
  const float* g = static_cast<const float*>(dout.data) + b * dout.batch + r * dout.row;
  const float* o = static_cast<const float*>(out.data) + b * out.batch + r * out.row;
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < channels(p); c += 32)
    sum += to_float(from_float<T>(g[c * dout.channel])) * o[c * out.channel];
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  if (threadIdx.x % 32 != 0) return;
  if (p.seed) {
    dsum[row] = g[channels(p) * dout.channel];
    sum += dsum[row] * o[channels(p) * out.channel];
  }
  delta[row] = sum - (dlse ? dlse[b * dlse_batch + r * dlse_row] : 0.0f);
}

using BackwardChoice = Choice<Problem, Plan, Backward, bool>;

template <class T>
BackwardChoice choose_backward_q(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_q_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardQShared, Tile<2, 2, 5, 64>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 32>, Tile<1, 1, 8, 16>>(
        p, padded(p), device, p.rows, staging(p), kernels, choice);
  } else {
    first_fit<T, BackwardQShared, Tile<2, 1, 5, 32>, Tile<1, 1, 8, 16>, Tile<1, 1, 8, 8>>(p, padded(p), device, p.rows,
                                                                                          staging(p), kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_plan_bwd_q(const Problem* p, Plan* plan) {
  if (!p->seed && mmk_latent_hopper_plan_bwd_q(p, plan) == 0) return 0;
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    const auto choice = choose_backward_q<decltype(zero)>(*p, device);
    return describe(choice, device, ceil_div(p->rows, choice.rows), ceil_div(p->keys, choice.columns), plan);
  });
}

extern "C" int mmk_latent_bwd_q(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_backward_q<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    const int error = plan->hopper ? mmk_latent_hopper_bwd_q(p, plan, b, stream)
                                   : mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan,
                                                 *b, choice.flag);
    if (error || !b->partial_dq) return error;
    const int64_t elements = b->dq_batch * p->rows * channels(*p), parts = plan->splits * (p->batch / b->dq_batch);
    const dim3 blocks(static_cast<unsigned>(ceil_div(elements, kThreads)));
    return mmk::launch(reduce_kernel<T>, blocks, dim3(kThreads), 0, stream, b->partial_dq, parts, elements,
                       static_cast<T*>(b->dq));
  });
}

extern "C" int mmk_latent_delta(const Problem* p, const Strided* dout, const Strided* out, const float* dlse,
                                int64_t dlse_batch, int64_t dlse_row, float* delta, float* dsum, void* stream) {
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 blocks(static_cast<unsigned>(ceil_div(p->batch * p->rows, kWarps)));
    return mmk::launch(delta_kernel<T>, blocks, dim3(kThreads), 0, stream, *p, *dout, *out, dlse, dlse_batch, dlse_row,
                       delta, dsum);
  });
}
