// The gradient of latent_cuda.cu's forward. Scores are made again from the saved log-sum-exp; sums that several blocks
// share go through partial results that are added in a fixed order. The kernel for q walks over keys like the forward;
// the one for x keeps a tile of keys and walks over query rows, everything transposed.
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
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            float ds[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float weight =
                  ptx::exp2(fmaf(s[m][n][2 * half + i], scale, shared.keys.bias[at.score(n) + i] - shift[m][half]));
              ds[i] = score_gradient(weight, dp[m][n][2 * half + i], delta[m][half]);
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
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      if (row >= p.rows) continue;
      const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int c = at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t + i;
          if (c >= count) continue;
          c = c < p.position ? c + p.content : c - p.position;
          const float value = sum[m][n][2 * half + i] * p.scale;
          if (b.partial_dq) {
            b.partial_dq[partial * count + c] = value;
          } else {
            static_cast<T*>(b.dq)[place * count + c] = from_float<T>(value);
          }
        }
      }
    }
  }
}

// dq = the sum of `parts` matrices of `elements` elements, in their order.
template <class T>
__global__ void reduce_kernel(const float* partial, int64_t parts, int64_t elements, T* dq) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= elements) return;
  float value = 0.0f;
  for (int64_t part = 0; part < parts; ++part) value += partial[part * elements + i];
  dq[i] = from_float<T>(value);
}

// --- Input ---

// The accumulator holds the gradient of a tile of xhat; its columns are blocks of query rows.
template <class T, class Tile>
struct BackwardXShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kRows> keys;
  T *q, *dout, *weights, *dscores;  // q, dout, shift and delta twice where the buffers are doubled
  float *shift, *delta;
  float2* exchange;  // per key and column group
  int bytes;

  __host__ __device__ BackwardXShared(const Problem& p, bool doubled, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kRows>(p, false, arena);
    const int columns = Tile::kColumns * (doubled ? 2 : 1);
    q = arena.take<T>(columns * keys.pitch);
    dout = arena.take<T>(columns * keys.pitch);
    shift = arena.take<float>(columns);
    delta = arena.take<float>(columns);
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
    }
    ptx::cp_async_commit();
  }
};

// The gradient of xhat in the accumulators becomes the gradient of x in the tile, where xhat stands now:
// dx = rstd (g - mean(g) - xhat mean(g xhat)).
template <class T, class Tile>
__device__ void normalise_backward(const Problem& p, const float (&g)[Tile::kFragments][2 * Tile::kPairs][4],
                                   const BackwardXShared<T, Tile>& shared, const Thread<Tile>& at) {
  const int pairs = padded(p) / 16, pitch = shared.keys.pitch;
  auto place = [&](int m, int half, int n) {
    return shared.keys.tile + at.row(m, half) * pitch + at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t;
  };
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f, product = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
        if (at.pair(n / 2) < pairs) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum += g[m][n][2 * half + i];
            product += g[m][n][2 * half + i] * to_float(place(m, half, n)[i]);
          }
        }
      }
      sum = quad_sum(sum);
      product = quad_sum(product);
      if (at.t == 0)
        shared.exchange[at.row(m, half) * Tile::kColumnGroups + at.column_group] = make_float2(sum, product);
    }
  }
  __syncthreads();
  const float share = p.eps >= 0.0f ? 1.0f / channels(p) : 0.0f;
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f, product = 0.0f;
      for (int i = 0; i < Tile::kColumnGroups; ++i) {
        const float2 part = shared.exchange[at.row(m, half) * Tile::kColumnGroups + i];
        sum += part.x;
        product += part.y;
      }
      sum *= share;
      product *= share;
      const float rstd = shared.keys.rstd[at.row(m, half)];
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
        if (at.pair(n / 2) < pairs) {
          float dx[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float change = g[m][n][2 * half + i] - sum - to_float(place(m, half, n)[i]) * product;
            dx[i] = rstd > 0.0f ? rstd * change : 0.0f;
          }
          store_two(place(m, half, n), dx[0], dx[1]);
        }
      }
    }
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    backward_x_kernel(Problem p, Plan plan, Backward b, bool doubled) {
  using Shared = BackwardXShared<T, Tile>;
  const Shared shared(p, doubled, shared_memory());
  const Thread<Tile> at;
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const int64_t first_key = blockIdx.x % plan.key_tiles * Tile::kRows;
  // The position's gradient is a sum over the examples: its block takes them one after another.
  const int64_t first_batch = b.dtable ? 0 : blockIdx.x / plan.key_tiles;
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
                ds[i] = p.scale * score_gradient(w[i], dp[m][n][2 * half + i], shared.delta[start + column]);
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
    normalise_backward<T, Tile>(p, sum, shared, at);
    __syncthreads();

    const int last = rows_left(p.keys, first_key, Tile::kRows);
    for (int r = threadIdx.x / 32; r < last; r += kWarps) {
      const int64_t key = first_key + r;
      const T* row = shared.keys.tile + r * pitch;
      if (b.dtable) {
        for (int c = at.lane; c < p.position; c += 32) {
          const int64_t i = key * p.position + c;
          const float value = to_float(row[c]) + (batch > 0 ? b.table_sums[i] : 0.0f);
          if (batch + 1 < last_batch) b.table_sums[i] = value;
          if (batch + 1 == last_batch) static_cast<T*>(b.dtable)[i] = from_float<T>(value);
        }
      }
      if (b.dx) {
        T* dx = static_cast<T*>(b.dx) + (batch * p.keys + key) * p.content;
        for (int c = at.lane; c < p.content; c += 32) dx[c] = row[p.position + c];
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void delta_kernel(Problem p, Strided dout, Strided out, const float* dlse, int64_t dlse_batch,
                             int64_t dlse_row, float* delta) {
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
  if (threadIdx.x % 32 == 0) delta[row] = sum - (dlse ? dlse[b * dlse_batch + r * dlse_row] : 0.0f);
}

using BackwardChoice = Choice<Problem, Plan, Backward, bool>;

template <class T>
BackwardChoice choose_backward_q(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_q_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardQShared, Tile<2, 2, 5, 64>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 32>, Tile<1, 1, 8, 16>>(
        p, device, p.rows, staging(p), kernels, choice);
  } else {
    first_fit<T, BackwardQShared, Tile<2, 1, 5, 32>, Tile<1, 1, 8, 16>, Tile<1, 1, 8, 8>>(p, device, p.rows, staging(p),
                                                                                          kernels, choice);
  }
  return choice;
}

template <class T>
BackwardChoice choose_backward_x(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_x_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardXShared, Tile<4, 2, 9, 32>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 16>>(p, device, p.keys,
                                                                                           Flag::each, kernels, choice);
  } else {
    first_fit<T, BackwardXShared, Tile<4, 1, 9, 16>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 8>>(p, device, p.keys, Flag::each,
                                                                                          kernels, choice);
  }
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_plan_bwd_q(const Problem* p, Plan* plan) {
  if (mmk_latent_hopper_plan_bwd_q(p, plan) == 0) return 0;
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    const auto choice = choose_backward_q<decltype(zero)>(*p, device);
    return describe(choice, device, ceil_div(p->rows, choice.rows), ceil_div(p->keys, choice.columns), plan);
  });
}

extern "C" int mmk_latent_plan_bwd_x(const Problem* p, Plan* plan) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    const auto choice = choose_backward_x<decltype(zero)>(*p, device);
    return describe(choice, device, ceil_div(p->rows, choice.columns), ceil_div(p->keys, choice.rows), plan);
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

extern "C" int mmk_latent_bwd_x(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_backward_x<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->key_tiles * (b->dtable ? 1 : p->batch)));
    return mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan, *b, choice.flag);
  });
}

extern "C" int mmk_latent_delta(const Problem* p, const Strided* dout, const Strided* out, const float* dlse,
                                int64_t dlse_batch, int64_t dlse_row, float* delta, void* stream) {
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 blocks(static_cast<unsigned>(ceil_div(p->batch * p->rows, kWarps)));
    return mmk::launch(delta_kernel<T>, blocks, dim3(kThreads), 0, stream, *p, *dout, *out, dlse, dlse_batch, dlse_row,
                       delta);
  });
}
