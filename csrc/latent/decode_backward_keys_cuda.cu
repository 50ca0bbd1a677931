// The gradients of the folded latents of decode_cuda.cu's forward: dv = P^T dout, and dk = dS^T xhat with dbias, the
// sums of dS. A block keeps a tile of latents of one head and walks over one split of the queries; the splits' sums are
// added in their order.
#include "latent/decode_tile.cuh"

namespace mmk::latent {
namespace {

// Values: the gradient of the values, otherwise that of the keys.
template <class T, class Tile, bool Values>
struct LatentsShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kColumns> queries;
  T *dout, *k, *v, *weights;
  float *shift, *delta, *exchange;  // exchange: per row and score group
  int v_pitch, bytes;

  // `ahead`: raw queries and dout are copied while the tiles before them are multiplied. Otherwise the queries come
  // without a copy ahead, and for the keys' gradient, which is through with dout by then, into its place.
  __host__ __device__ LatentsShared(const Decode& d, bool ahead, unsigned char* base) {
    Arena arena{base};
    const int pitch = tile_pitch<T>(d.x);
    v_pitch = column_pitch<T>(d);
    if (Values || ahead) {
      queries = take_keys<T, Tile::kColumns>(d.x, ahead, arena);
      dout = arena.take<T>(Tile::kColumns * v_pitch);
    } else {
      dout = arena.take<T>(Tile::kColumns * (v_pitch > pitch ? v_pitch : pitch));
      queries = {};
      queries.tile = dout, queries.pitch = pitch;
      queries.bias = arena.take<float>(Tile::kColumns);
      queries.rstd = arena.take<float>(Tile::kColumns);
    }
    k = arena.take<T>(Tile::kRows * pitch);
    v = arena.take<T>(Values ? 0 : Tile::kRows * v_pitch);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    shift = arena.take<float>(Tile::kColumns);
    delta = arena.take<float>(Tile::kColumns);
    exchange = arena.take<float>(Tile::kRows * Tile::kScoreGroups);
    bytes = arena.used;
  }

  __device__ void fetch_dout(const Decode& d, const DecodeBackward& b, int64_t batch, int64_t first) const {
    load_dout<T>(d, b, batch, first, dout, Tile::kColumns, v_pitch);
    ptx::cp_async_commit();
  }
};

template <class T, class Tile>
using ValuesShared = LatentsShared<T, Tile, true>;
template <class T, class Tile>
using KeysShared = LatentsShared<T, Tile, false>;

template <class T, class Tile, bool Values>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    decode_latents_kernel(Decode d, Plan plan, DecodeBackward b, bool ahead) {
  using Shared = LatentsShared<T, Tile, Values>;
  const Shared shared(d, ahead, shared_memory());
  const Thread<Tile> at;
  const Problem& p = d.x;
  const Share share(p, plan, Tile::kRows, Tile::kColumns);
  const int64_t head = share.batch, batch = batch_of(d, head);
  const int pitch = shared.queries.pitch, pairs = (Values ? padded_columns(d) : padded(p)) / 16;
  const bool active = share.first_row + at.first_row < p.rows;
  const float scale = p.scale * kLog2e;

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float bias[Tile::kFragments][2], dbias[Tile::kFragments][2];
  clear(sum);
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bias[m][half] = score_bias(d, head, share.first_row + at.row(m, half));
      dbias[m][half] = 0.0f;
    }
  }

  load_latents<T>(d, d.k, channels(p), head, share.first_row, shared.k, Tile::kRows, pitch);
  if (!Values) load_latents<T>(d, d.v, d.columns, head, share.first_row, shared.v, Tile::kRows, shared.v_pitch);
  ptx::cp_async_commit();
  if (Values) {
    shared.queries.fetch(p, batch, share.first_key);
    shared.fetch_dout(d, b, batch, share.first_key);
  } else if (ahead) {
    shared.fetch_dout(d, b, batch, share.first_key);
    shared.queries.fetch(p, batch, share.first_key);
  }
  for (int64_t first = share.first_key; first < share.last_key; first += Tile::kColumns) {
    const int64_t next = first + Tile::kColumns;
    const bool more = next < share.last_key;
    for (int i = threadIdx.x; i < Tile::kColumns; i += kThreads) {
      const bool counts = shown(d, batch, first + i);
      shared.shift[i] = counts ? shift_of(d.lse[head * p.keys + first + i]) : INFINITY;
      shared.delta[i] = counts && !Values ? b.delta[head * p.keys + first + i] : 0.0f;
    }
    float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
    if constexpr (Values) {
      ptx::cp_async_wait<1>();
      __syncthreads();
    } else {
      if (!ahead) shared.fetch_dout(d, b, batch, first);
      if (ahead) {
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();
      if (active && at.scores) {
        multiply_rows<T, true>(dp, shared.v + at.first_row * shared.v_pitch,
                               shared.dout + at.first_score * shared.v_pitch, shared.v_pitch, padded_columns(d));
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (ahead && more) shared.fetch_dout(d, b, batch, next);
    }
    shared.queries.make(p, batch, first);
    if (Values && !more) ptx::cp_async_commit();  // so that the count of groups holds
    if (more && (Values || ahead)) shared.queries.fetch(p, batch, next);
    if (active && at.scores) {
      multiply_rows<T, true>(s, shared.k + at.first_row * pitch, shared.queries.tile + at.first_score * pitch, pitch,
                             padded(p));
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            float w[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int column = at.score(n) + i;
              w[i] = weight_of(s[m][n][2 * half + i], scale, bias[m][half], shared.shift[column]);
              if constexpr (!Values) {
                w[i] = p.scale * score_gradient(w[i], dp[m][n][2 * half + i], shared.delta[column]);
                dbias[m][half] += w[i];
              }
            }
            store_two(shared.weights + at.row(m, half) * Shared::kWeightPitch + at.score(n), w[0], w[1]);
          }
        }
      }
    }
    if (Values) ptx::cp_async_wait<1>();
    __syncthreads();
    if (active) {
      accumulate<T, Tile, true>(sum, shared.weights + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch,
                                Values ? shared.dout : shared.queries.tile, Values ? shared.v_pitch : pitch, pairs, at);
    }
    __syncthreads();
    if (Values && more) shared.fetch_dout(d, b, batch, next);
  }

  if (!Values && at.scores) publish_sums(dbias, shared.exchange, at);
  __syncthreads();
  const int count = Values ? d.columns : channels(p);
  const int rows = rows_left(p.rows, share.first_row, Tile::kRows);
  const int64_t place = (share.split * p.batch * d.heads + head) * p.rows + share.first_row;
  float* const partial = b.partial + place * count;
  for (int r = threadIdx.x; !Values && r < rows; r += kThreads) {
    float total = 0.0f;
    for (int i = 0; i < Tile::kScoreGroups; ++i) total += shared.exchange[r * Tile::kScoreGroups + i];
    b.partial_bias[place + r] = total;
  }
  drain(sum, at, [&](int m, int half, int c, float value) {
    const int r = at.row(m, half);
    if (r < rows && c < count) partial[r * count + (Values ? c : output_channel(p, c))] = value;
  });
}

using LatentsChoice = Choice<Decode, Plan, DecodeBackward, bool>;

template <class T, bool Values>
LatentsChoice choose_latents(const Decode& d, const Device& device) {
  LatentsChoice choice;
  auto kernels = [](auto tile) { return &decode_latents_kernel<T, decltype(tile), Values>; };
  const Flag when = dense_channels(d.x) ? Flag::each : Flag::never;
  const int width = Values ? padded_columns(d) : padded(d.x);
  auto choose = [&](auto... tiles) {
    if constexpr (Values) {
      first_fit<T, ValuesShared, decltype(tiles)...>(d, width, device, d.x.rows, when, kernels, choice);
    } else {
      first_fit<T, KeysShared, decltype(tiles)...>(d, width, device, d.x.rows, when, kernels, choice);
    }
  };
  if constexpr (sizeof(T) == 2) {
    choose(Tile<4, 2, 9, 32>{}, Tile<2, 2, 9, 32>{}, Tile<1, 2, 8, 16>{}, Tile<1, 1, 8, 16>{});
  } else {
    choose(Tile<4, 1, 9, 16>{}, Tile<2, 1, 9, 16>{}, Tile<1, 1, 8, 8>{});
  }
  return choice;
}

template <bool Values>
int plan_latents(const Decode* d, Plan* plan) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    const auto choice = choose_latents<decltype(zero), Values>(*d, device);
    return describe(choice, device, ceil_div(d->x.rows, choice.rows), ceil_div(d->x.keys, choice.columns), plan);
  });
}

template <class T>
int reduce(const float* partial, int64_t parts, int64_t elements, T* to, void* stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(elements, kThreads)));
  return mmk::launch(reduce_kernel<T>, blocks, dim3(kThreads), 0, stream, partial, parts, elements, to);
}

template <bool Values>
int launch_latents(const Decode* d, const Plan* plan, const DecodeBackward* b, void* to, float* dbias, void* stream) {
  const Device device = this_device();
  return with_type(d->x.type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_latents<T, Values>(*d, device);
    const int64_t heads = d->x.batch * d->heads, rows = heads * d->x.rows;
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * heads));
    int error = mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *d, *plan, *b, choice.flag);
    if (!error && dbias) error = reduce(b->partial_bias, plan->splits, rows, dbias, stream);
    const int64_t elements = rows * (Values ? d->columns : channels(d->x));
    return error ? error : reduce(b->partial, plan->splits, elements, static_cast<T*>(to), stream);
  });
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_decode_plan_bwd_values(const Decode* d, Plan* plan) { return plan_latents<true>(d, plan); }

extern "C" int mmk_latent_decode_plan_bwd_keys(const Decode* d, Plan* plan) { return plan_latents<false>(d, plan); }

extern "C" int mmk_latent_decode_bwd_values(const Decode* d, const Plan* plan, const DecodeBackward* b, void* dv,
                                            void* stream) {
  return launch_latents<true>(d, plan, b, dv, nullptr, stream);
}

extern "C" int mmk_latent_decode_bwd_keys(const Decode* d, const Plan* plan, const DecodeBackward* b, void* dk,
                                          float* dbias, void* stream) {
  return launch_latents<false>(d, plan, b, dk, dbias, stream);
}
