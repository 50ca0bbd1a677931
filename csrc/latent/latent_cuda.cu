// softmax(scale q xhat^T) xhat with xhat = LayerNorm([x ; position]) made on the tile; README.md in
// mmkernels/ops/latent has the derivation, the tiles and the time model.
//
// A block keeps an accumulator of rows x channels in its registers and walks over blocks of keys: scores into
// registers, weights into shared memory, weights times the very tile that the scores came from. Keys and values are one
// array.
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

template <class T, class Tile>
struct ForwardShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kColumns> keys;
  T *q, *weights;
  float* exchange;     // per row and score group
  float* row_weights;  // with dropout, as many: sums of what is left of the weights
  int bytes;

  __host__ __device__ ForwardShared(const Problem& p, bool staged, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kColumns>(p, staged, arena);
    q = arena.take<T>(Tile::kRows * keys.pitch);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    exchange = arena.take<float>(Tile::kRows * Tile::kScoreGroups);
    row_weights = arena.take<float>(p.seed ? Tile::kRows * Tile::kScoreGroups : 0);
    bytes = arena.used;
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    forward_kernel(Problem p, Plan plan, Forward f, bool staged) {
  using Shared = ForwardShared<T, Tile>;
  const Shared shared(p, staged, shared_memory());
  const Thread<Tile> at;
  const Share share(p, plan, Tile::kRows, Tile::kColumns);
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const bool active = share.first_row + at.first_row < p.rows;
  const float scale = p.scale * kLog2e;

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float top[Tile::kFragments][2], total[Tile::kFragments][2];  // of a row; the total over this warp's columns
  clear(sum);
#pragma unroll
  for (int i = 0; i < 2 * Tile::kFragments; ++i) top[i / 2][i % 2] = -INFINITY, total[i / 2][i % 2] = 0.0f;

  for (int i = threadIdx.x; p.seed && i < Tile::kRows * Tile::kScoreGroups; i += kThreads) shared.row_weights[i] = 0.0f;
  load_rows<T>(p, p.q, share.batch, share.first_row, shared.q, Tile::kRows, pitch);
  shared.keys.fetch(p, share.batch, share.first_key);
  for (int64_t first = share.first_key; first < share.last_key; first += Tile::kColumns) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    shared.keys.make(p, share.batch, first);
    const int64_t next = first + Tile::kColumns;
    if (next < share.last_key) shared.keys.fetch(p, share.batch, next);

    float s[Tile::kFragments][Tile::kScores][4];
    if (active && at.scores) {
      multiply_rows<T>(s, shared.q + at.first_row * pitch, shared.keys.tile + at.first_score * pitch, pitch, padded(p));
      scale_scores(s, scale, shared.keys.bias, shared.exchange, at);
    }
    __syncthreads();
    if (active) {
      bool changed = false;
      float decay[Tile::kFragments][2];
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float best = highest(top[m][half], shared.exchange, at.row(m, half), at);
          const float zero = best == -INFINITY ? 0.0f : best;  // no key yet: -inf - -inf would be NaN
          decay[m][half] = ptx::exp2(top[m][half] - zero);
          changed |= best != top[m][half];
          top[m][half] = best;
          if (!at.scores) continue;
          total[m][half] *= decay[m][half];
          DropoutRow dropped{};
          if (p.seed) dropped = dropout_row(*p.seed, share.batch * p.rows + share.first_row + at.row(m, half));
          float left = 0.0f;
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            float w0 = ptx::exp2(s[m][n][2 * half] - zero), w1 = ptx::exp2(s[m][n][2 * half + 1] - zero);
            total[m][half] += w0 + w1;
            if (p.seed) {
              w0 *= keep_factor(p, dropped, first + at.score(n));
              w1 *= keep_factor(p, dropped, first + at.score(n) + 1);
              left += w0 + w1;
            }
            store_two(shared.weights + at.row(m, half) * Shared::kWeightPitch + at.score(n), w0, w1);
          }
          if (p.seed) {
            left = quad_sum(left);
            float& sum_of_row = shared.row_weights[at.row(m, half) * Tile::kScoreGroups + at.column_group];
            if (at.t == 0) sum_of_row = sum_of_row * decay[m][half] + left;
          }
        }
      }
      if (__any_sync(0xffffffffu, changed)) shrink(sum, decay);
    }
    __syncthreads();
    if (active) {
      accumulate<T, Tile>(sum, shared.weights + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch,
                          shared.keys.tile, pitch, pairs, at);
    }
  }

  // The row totals of the score groups, added in their order.
  __syncthreads();
  if (at.scores) publish_sums(total, shared.exchange, at);
  __syncthreads();
  const int count = channels(p), pitch_out = p.out_channels();
  const bool final = plan.splits == 1;
  float factor[Tile::kFragments][2];
  float* to[Tile::kFragments][2];  // null: no row
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      to[m][half] = nullptr;
      if (row >= p.rows) continue;
      float row_total = 0.0f, left = 0.0f;
      for (int i = 0; i < Tile::kScoreGroups; ++i) {
        row_total += shared.exchange[at.row(m, half) * Tile::kScoreGroups + i];
        if (p.seed) left += shared.row_weights[at.row(m, half) * Tile::kScoreGroups + i];
      }
      const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
      to[m][half] = final ? f.out + place * pitch_out : f.sums + partial * pitch_out;
      factor[m][half] = !final ? 1.0f : row_total > 0.0f ? 1.0f / row_total : 0.0f;
      if (at.column_group == 0 && at.t == 0) {
        if (final) {
          f.lse[place] = (top[m][half] + log2f(row_total)) * kLn2;
        } else {
          f.tops[partial] = top[m][half];
          f.tops[plan.splits * p.batch * p.rows + partial] = row_total;
        }
        if (p.seed) to[m][half][count] = left * factor[m][half];
      }
    }
  }
  drain(sum, at, [&](int m, int half, int c, float value) {
    if (to[m][half] && c < count) to[m][half][output_channel(p, c)] = value * factor[m][half];
  });
}

// One warp a row: the splits in their order.
__global__ void merge_kernel(Problem p, int64_t splits, Forward f) {
  const int64_t rows = p.batch * p.rows, row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  const int count = p.out_channels();
  if (row >= rows) return;
  float top = -INFINITY, total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) top = fmaxf(top, f.tops[s * rows + row]);
  const float zero = top == -INFINITY ? 0.0f : top;
  for (int64_t s = 0; s < splits; ++s) {
    total += f.tops[(splits + s) * rows + row] * ptx::exp2(f.tops[s * rows + row] - zero);
  }
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;
  for (int c = threadIdx.x % 32; c < count; c += 32) {
    float value = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      value += f.sums[(s * rows + row) * count + c] * ptx::exp2(f.tops[s * rows + row] - zero);
    }
    f.out[row * count + c] = value * factor;
  }
  if (threadIdx.x % 32 == 0) f.lse[row] = (top + log2f(total)) * kLn2;
}

template <class T, class Source>
__global__ void pack_kernel(Problem p, Strided source, int64_t rows, T* packed, int64_t pitch) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= rows) return;
  const Source* from =
      static_cast<const Source*>(source.data) + row / p.rows * source.batch + row % p.rows * source.row;
  for (int64_t c = threadIdx.x % 32; c < pitch; c += 32) {
    const int64_t channel = c < p.position ? c + p.content : c - p.position;
    packed[row * pitch + c] = from_float<T>(c < channels(p) ? to_float(from[channel * source.channel]) : 0.0f);
  }
}

using ForwardChoice = Choice<Problem, Plan, Forward, bool>;

template <class T>
ForwardChoice choose_forward(const Problem& p, const Device& device) {
  ForwardChoice choice;
  auto kernels = [](auto tile) { return &forward_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, ForwardShared, Tile<4, 2, 2, 64>, Tile<4, 2, 9, 64>, Tile<2, 2, 9, 64>, Tile<2, 2, 11, 32>,
              Tile<1, 2, 8, 32>>(p, padded(p), device, p.rows, staging(p), kernels, choice);
  } else {
    first_fit<T, ForwardShared, Tile<4, 1, 9, 32>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 8>>(p, padded(p), device, p.rows,
                                                                                        staging(p), kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_plan_fwd(const Problem* p, Plan* plan) {
  if (!p->seed && mmk_latent_hopper_plan_fwd(p, plan) == 0) return 0;
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    const auto choice = choose_forward<decltype(zero)>(*p, device);
    return describe(choice, device, ceil_div(p->rows, choice.rows), ceil_div(p->keys, choice.columns), plan);
  });
}

extern "C" int mmk_latent_fwd(const Problem* p, const Plan* plan, const Forward* f, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_forward<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    const int error = plan->hopper ? mmk_latent_hopper_fwd(p, plan, f, stream)
                                   : mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan,
                                                 *f, choice.flag);
    if (error || plan->splits == 1) return error;
    const dim3 rows(static_cast<unsigned>(ceil_div(p->batch * p->rows, kWarps)));
    return mmk::launch(merge_kernel, rows, dim3(kThreads), 0, stream, *p, plan->splits, *f);
  });
}

extern "C" int mmk_latent_pack(const Problem* p, const Strided* source, bool from_float, int64_t batch, void* packed,
                               int64_t pitch, void* stream) {
  const int64_t rows = batch * p->rows;
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 blocks(static_cast<unsigned>(ceil_div(rows, kWarps)));
    const auto kernel = from_float ? pack_kernel<T, float> : pack_kernel<T, T>;
    return mmk::launch(kernel, blocks, dim3(kThreads), 0, stream, *p, *source, rows, static_cast<T*>(packed), pitch);
  });
}
