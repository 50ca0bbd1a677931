// The gradient of x of latent_cuda.cu's forward. The kernel keeps a tile of keys and walks over query rows, everything
// transposed.
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

// The accumulator holds the gradient of a tile of xhat; its columns are blocks of query rows.
template <class T, class Tile>
struct BackwardXShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kRows> keys;
  T *q, *dout, *weights, *dscores;  // q, dout, shift and delta twice where the buffers are doubled
  float *shift, *delta;
  float* dsum;          // with dropout, as delta
  DropoutRow* dropped;  // with dropout, as delta
  float2* exchange;     // per key and column group
  int bytes;

  __host__ __device__ BackwardXShared(const Problem& p, bool doubled, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kRows>(p, false, arena);
    const int columns = Tile::kColumns * (doubled ? 2 : 1);
    q = arena.take<T>(columns * keys.pitch);
    dout = arena.take<T>(columns * keys.pitch);
    shift = arena.take<float>(columns);
    delta = arena.take<float>(columns);
    dsum = arena.take<float>(p.seed ? columns : 0);
    dropped = arena.take<DropoutRow>(p.seed ? columns : 0);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    dscores = arena.take<T>(Tile::kRows * kWeightPitch);
    exchange = arena.take<float2>(Tile::kRows * Tile::kColumnGroups);
    bytes = arena.used;
  }

  __device__ void fetch(const Problem& p, const Backward& b, int64_t batch, int64_t first, int buffer) const {
    const int start = buffer * Tile::kColumns;
    load_rows<T>(p, p.q, batch, first, q + start * keys.pitch, Tile::kColumns, keys.pitch);
    load_rows<T>(p, b.dout, batch, first, dout + start * keys.pitch, Tile::kColumns, keys.pitch);
    for (int i = threadIdx.x; i < Tile::kColumns; i += kThreads) {
      const bool inside = first + i < p.rows;
      shift[start + i] = inside ? shift_of(b.lse[batch * p.rows + first + i]) : INFINITY;
      delta[start + i] = inside ? b.delta[batch * p.rows + first + i] : 0.0f;
      if (p.seed) {
        dsum[start + i] = inside ? b.dsum[batch * p.rows + first + i] : 0.0f;
        dropped[start + i] = dropout_row(*p.seed, batch * p.rows + first + i);
      }
    }
    ptx::cp_async_commit();
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    backward_x_kernel(Problem p, Plan plan, Backward b, bool doubled) {
  using Shared = BackwardXShared<T, Tile>;
  const Shared shared(p, doubled, shared_memory());
  const Thread<Tile> at;
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const int64_t first_key = static_cast<int64_t>(blockIdx.x % small(plan.key_tiles)) * Tile::kRows;
  // The position's gradient is a sum over the examples: its block takes them one after another.
  const int64_t first_batch = b.dtable ? 0 : blockIdx.x / small(plan.key_tiles);
  const int64_t last_batch = b.dtable ? p.batch : first_batch + 1;
  const float scale = p.scale * kLog2e;

  for (int64_t batch = first_batch; batch < last_batch; ++batch) {
    float sum[Tile::kFragments][2 * Tile::kPairs][4];
    clear(sum);
    shared.fetch(p, b, batch, 0, 0);
    shared.keys.make(p, batch, first_key);
    int buffer = 0;
    for (int64_t first = 0; first < p.rows; first += Tile::kColumns) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const bool more = first + Tile::kColumns < p.rows;
      const int start = buffer * Tile::kColumns;
      if (doubled && more) shared.fetch(p, b, batch, first + Tile::kColumns, buffer ^ 1);
      if (at.scores) {
        float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
        const T* keys = shared.keys.tile + at.first_row * pitch;
        multiply_rows<T>(s, keys, shared.q + (start + at.first_score) * pitch, pitch, padded(p));
        multiply_rows<T>(dp, keys, shared.dout + (start + at.first_score) * pitch, pitch, padded(p));
#pragma unroll
        for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = at.row(m, half);
            const float bias = shared.keys.bias[row];
#pragma unroll
            for (int n = 0; n < Tile::kScores; ++n) {
              float w[2], ds[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int column = at.score(n) + i;
                w[i] = ptx::exp2(fmaf(s[m][n][2 * half + i], scale, bias - shared.shift[start + column]));
                float dweight = dp[m][n][2 * half + i], keep = 1.0f;
                if (p.seed) {
                  keep = keep_factor(p, shared.dropped[start + column], first_key + row);
                  dweight = (dweight + shared.dsum[start + column]) * keep;
                }
                ds[i] = p.scale * score_gradient(w[i], dweight, shared.delta[start + column]);
                w[i] *= keep;
              }
              store_two(shared.weights + row * Shared::kWeightPitch + at.score(n), w[0], w[1]);
              store_two(shared.dscores + row * Shared::kWeightPitch + at.score(n), ds[0], ds[1]);
            }
          }
        }
      }
      __syncthreads();
      const int rows = at.first_row * Shared::kWeightPitch;
      accumulate<T, Tile>(sum, shared.weights + rows, Shared::kWeightPitch, shared.dout + start * pitch, pitch, pairs,
                          at);
      accumulate<T, Tile>(sum, shared.dscores + rows, Shared::kWeightPitch, shared.q + start * pitch, pitch, pairs, at);
      if (doubled) {
        buffer ^= 1;
      } else if (more) {
        __syncthreads();
        shared.fetch(p, b, batch, first + Tile::kColumns, 0);
      }
    }
    normalise_backward(p, sum, shared.keys, shared.exchange, at);
    __syncthreads();

    store_gradient(p, b, shared.keys, batch, first_key, batch + 1 == last_batch);
    __syncthreads();
  }
}

using BackwardChoice = Choice<Problem, Plan, Backward, bool>;

template <class T>
BackwardChoice choose_backward_x(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_x_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardXShared, Tile<4, 2, 9, 32>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 16>>(p, padded(p), device, p.keys,
                                                                                           Flag::each, kernels, choice);
  } else {
    first_fit<T, BackwardXShared, Tile<4, 1, 9, 16>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 8>>(p, padded(p), device, p.keys,
                                                                                          Flag::each, kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_plan_bwd_x(const Problem* p, Plan* plan) {
  if (!p->seed && mmk_latent_hopper_plan_bwd_x(p, plan) == 0) return 0;
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    const auto choice = choose_backward_x<decltype(zero)>(*p, device);
    return describe(choice, device, ceil_div(p->rows, choice.columns), ceil_div(p->keys, choice.rows), plan);
  });
}

extern "C" int mmk_latent_bwd_x(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  if (plan->hopper) return mmk_latent_hopper_bwd_x(p, plan, b, stream);
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_backward_x<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->key_tiles * (b->dtable ? 1 : p->batch)));
    return mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan, *b, choice.flag);
  });
}
