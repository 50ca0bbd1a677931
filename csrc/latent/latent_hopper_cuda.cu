// The forward and the gradient of q for compute capability 9.0, 16-bit inputs: wgmma on operands in shared memory, with
// the warps specialised. README.md in mmkernels/ops/latent has the schedule and the time model.
//
// The third warpgroup of a block produces: it brings tiles of keys into shared memory, takes the moments of every key,
// and (fp16) normalises the tile. The other two consume. Where the sums of 64 rows fit the registers of a warpgroup,
// the block has 128 rows, a group 64 of them, and the weights stay in registers. Otherwise the block has 64 rows, and
// each group half of the channels. Then they make scores in turn, the even tiles one, the odd tiles the other, and put
// the weights into shared memory, from where both multiply them with their half of the tile. So while one makes weights
// the other keeps the tensor cores busy, and no score is made twice. Where scores and sums do not fit the same
// registers (the gradient of q of wide rows), a fourth warpgroup makes all the weights.
//
// In bf16 the norm is folded into the small side: s = r (q . x - mean sum(q)), out = sum_m w x - sum_m w mean with w
// the weight p r rounded to bf16, which both sums share.
#include "latent/latent_hopper.cuh"

namespace mmk::latent {
namespace {

// What has the same place in every launch comes first, so that its addresses cost no registers.
template <class T, class Tile, bool Backward>
struct HopperShared {
  uint64_t *full, *measured, *empty;  // tiles: x (fp16: xhat) is there, moments are there, are done with
  uint64_t *weighed, *unweighed;      // weights are there, are done with
  float *mean, *rstd, *bias;          // of each key of each tile
  float4* row;                        // gradient of q, of each row: sums of q and dout, shift of the scores, delta
  float *q_sum, *dout_sum;            // of each row
  T* weights;
  float2* change;  // highest score and decay of each row that go with a buffer of weights
  float2* totals;  // per consumer group and row, where the weights were
  T *q, *dout, *tiles;
  unsigned char *raw_table, *raw_content;
  int tile_elements, raw_table_bytes, raw_content_bytes, bytes;

  __host__ __device__ HopperShared(const Problem& p, const Stages& stages, unsigned char* base) {
    Arena arena{base};
    full = arena.take<uint64_t>(2 * kMaxTiles);
    measured = full + kMaxTiles;
    empty = arena.take<uint64_t>(2 * kMaxTiles);
    weighed = arena.take<uint64_t>(Tile::kWeights);
    unweighed = arena.take<uint64_t>(Tile::kWeights);
    constexpr int kKeys = (Tile::kScorer ? 2 : kMaxTiles) * Tile::kKeys;
    mean = arena.take<float>(kKeys);
    rstd = arena.take<float>(kKeys);
    bias = arena.take<float>(kKeys);
    constexpr int kRows = Tile::kRows > kGroupRows ? Tile::kRows : kGroupRows;
    row = arena.take<float4>(Backward ? kRows : 0);
    q_sum = arena.take<float>(kRows);
    dout_sum = arena.take<float>(Backward ? kRows : 0);
    change = arena.take<float2>(Backward ? 0 : Tile::kWeights * kRows);
    weights = arena.take<T>(Tile::kWeights * kRows * Tile::kKeys);
    totals = reinterpret_cast<float2*>(weights);
    static_assert(!Tile::kWeights || 2 * sizeof(float2) <= Tile::kWeights * Tile::kKeys * sizeof(T));
    q = arena.take<T>(Tile::kRows * padded(p));
    dout = arena.take<T>(Backward ? Tile::kRows * padded(p) : 0);
    arena.take<T>(8 * (kRows - Tile::kRows));  // what is read as rows that the block has not
    tile_elements = (padded(p) > Tile::kHalf ? padded(p) : Tile::kHalf) * Tile::kKeys;
    tiles = arena.take<T>(stages.tiles * tile_elements);
    raw_table_bytes = p.position ? Tile::kKeys * raw_pitch<T>(p.position) : 0;
    raw_content_bytes = p.content ? Tile::kKeys * raw_pitch<T>(p.content) : 0;
    raw_table = arena.take<unsigned char>(stages.raws * raw_table_bytes);
    raw_content = arena.take<unsigned char>(stages.raws * raw_content_bytes);
    bytes = arena.used;
  }
};

#ifdef MMK_HOPPER

// That the block walks over.
template <class Tile>
__device__ int count_tiles(const Share& share) {
  return static_cast<int>(ceil_div(share.last_key - share.first_key, Tile::kKeys));
}

// --- The producer ---

template <class T, class Tile, class Shared>
__device__ void produce(const Problem& p, const Plan& plan, const Stages& stages) {
  const Shared shared(p, stages, shared_memory());
  const Share share(p, plan, Tile::kRows, Tile::kKeys);
  const int steps = count_tiles<Tile>(share);
  const unsigned raws = Tile::kScorer ? 0 : stages.raws, tiles = Tile::kScorer ? 2 : stages.tiles;
  constexpr bool kNormalise = std::is_same_v<T, fp16>;  // p r underflows in fp16, which bars the fold
  auto first_key = [&](int step) { return share.first_key + int64_t{step} * Tile::kKeys; };
  auto tile_of = [&](const Turn& turn) { return shared.tiles + turn.buffer * shared.tile_elements; };
  // Warps that have fewer keys of one tile have more of the next.
  auto turned = [&](int step) {
    const int warp = ptx::hide(threadIdx.x) / 32 % kGroupWarps;
    return Tile::kKeys / 8 % kGroupWarps ? (warp + 2 * step) % kGroupWarps : warp;
  };
  auto await_empty = [&](const Turn& turn) {
    const int half = Tile::kHalves && turned(0) >= kGroupWarps / 2 ? kMaxTiles : 0;
    ptx::mbarrier_wait(shared.empty + half + turn.buffer, turn.parity ^ 1);
  };
  Turn made;
  auto fetch = [&](int step, Turn fetched) {
    const int64_t first = first_key(step);
    if (step >= steps) {
    } else if (raws) {
      const int raw = step & (raws - 1), count = rows_left(p.keys, first, Tile::kKeys);
      unsigned char *table = shared.raw_table + raw * shared.raw_table_bytes,
                    *content = shared.raw_content + raw * shared.raw_content_bytes;
      if (p.position) stage_keys<T, kGroupWarps>(table_part<T>(p, first), count, table);
      if (p.content) stage_keys<T, kGroupWarps>(content_part<T>(p, share.batch, first), count, content);
    } else {
      await_empty(fetched);
      copy_keys<T, Tile::kKeys, kGroupWarps>(p, share.batch, first, tile_of(fetched), turned(step));
    }
    ptx::cp_async_commit();
  };
  // A copy may run ahead where it waits for no tile that the one in hand is needed for: with a second raw copy, or a
  // third tile.
  const int ahead = raws ? raws == 2 : tiles == 3;
#pragma unroll 1
  for (int step = -ahead; step < steps; ++step) {
    if (raws) ptx::named_barrier(kProducing, kGroup);       // nobody reads what the next copy overwrites
    if constexpr (Tile::kScorer) made = Turn(step, tiles);  // and nothing that outlives a tile
    Turn next = made;
    if (ahead && step >= 0) next.advance(tiles);
    fetch(step + ahead, next);
    if (step < 0) continue;
    if (ahead) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    T* tile = tile_of(made);
    if (raws) {
      ptx::named_barrier(kProducing, kGroup);
      await_empty(made);
      const int raw = step & (raws - 1);
      const Raws rows{static_cast<int>(shared.raw_table - shared_memory()) + raw * shared.raw_table_bytes,
                      static_cast<int>(shared.raw_content - shared_memory()) + raw * shared.raw_content_bytes};
      move_keys<T, Tile::kKeys, kGroupWarps, Tile::kRoom>(p, share.batch, first_key(step), tile, rows, turned(step));
    }
    auto tell = [&](uint64_t* barrier) {
      ptx::fence_proxy_async();
      arrive(barrier + made.buffer);
    };
    if constexpr (!kNormalise) tell(shared.full);  // scores need no moments yet
    __syncwarp();
    const int stage = made.buffer * Tile::kKeys;
    measure_keys<T, Tile::kKeys, kGroupWarps, kNormalise, Tile::kRoom>(
        p, share.batch, first_key(step), tile, turned(step), [&](int r, bool visible, float mean, float rstd) {
          shared.bias[stage + r] = visible ? 0.0f : -INFINITY;
          shared.mean[stage + r] = visible && !kNormalise ? mean : 0.0f;
          shared.rstd[stage + r] = !visible ? 0.0f : kNormalise ? 1.0f : rstd;
        });
    if constexpr (kNormalise) tell(shared.full);
    arrive(shared.measured + made.buffer);
    made.advance(tiles);
  }
}

// --- The consumers ---

// The sums of rows of q or dout, by all consumers.
template <class T, int Rows>
__device__ void sum_query_rows(const Problem& p, const T* tile, float* sums) {
  constexpr int kShares = Rows > kGroupRows ? 2 : 4;
  const int r = threadIdx.x / kShares, chunks = r < Rows ? padded(p) / 8 : 0;
  float sum = 0.0f;
  for (int c = threadIdx.x % kShares; c < chunks; c += kShares) {
    const Eight v = *reinterpret_cast<const Eight*>(tile + (c * Rows + r) * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += element<T>(v, i);
  }
#pragma unroll
  for (int bit = 1; bit < kShares; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  if (threadIdx.x % kShares == 0 && r < Rows) sums[r] = sum;
}

// Writes (sum - moment) * factor of this group's channels to a row.
template <class Tile, class Out>
__device__ __forceinline__ void store_row(const Problem& p, const float (&sum)[Tile::kParts][Tile::kWidth / 2],
                                          const Consumer& at, int half, float moment, float factor, Out* row) {
  const int count = channels(p), begin = first_channel<Tile>(p, at.group), stored = first_stored<Tile>(at.group);
#pragma unroll
  for (int n = 0; n < Tile::kHalf / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int c = begin + n * 8 + 2 * at.t + i;
      if (c < stored || c >= count) continue;
      c = c < p.position ? c + p.content : c - p.position;
      const float value = sum[n / (Tile::kWidth / 8)][n % (Tile::kWidth / 8) * 4 + 2 * half + i] - moment;
      row[c] = from_float<Out>(value * factor);
    }
  }
}

// q, or q and dout, in shared memory with the sums of their rows.
template <class T, class Tile, class Shared>
__device__ void begin_consuming(const Problem& p, const Shared& shared, const Share& share, const QueryRows* dout) {
  load_query_rows<T, Tile::kRows, kConsumers>(p, p.q, share.batch, share.first_row, shared.q);
  if (dout) load_query_rows<T, Tile::kRows, kConsumers>(p, *dout, share.batch, share.first_row, shared.dout);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::named_barrier(kConsuming, kConsumers);
  sum_query_rows<T, Tile::kRows>(p, shared.q, shared.q_sum);
  if (dout) sum_query_rows<T, Tile::kRows>(p, shared.dout, shared.dout_sum);
  ptx::named_barrier(kConsuming, kConsumers);
}

// Packed weights of a tile, two to a register, for everyone's use; `also` writes what goes with them.
template <class T, class Tile, class Shared, class Also>
__device__ __forceinline__ void publish_weights(const Shared& shared, const Consumer& at,
                                                const uint32_t (&packed)[Tile::kKeys / 16][4], int step, Also also) {
  const Turn turn(step, Tile::kWeights);
  ptx::mbarrier_wait(shared.unweighed + turn.buffer, turn.parity ^ 1);
  store_weights<T, Tile::kKeys>(shared.weights + turn.buffer * kGroupRows * Tile::kKeys, at, packed);
  also(turn.buffer);
  ptx::fence_proxy_async();
  arrive(shared.weighed + turn.buffer);
}

// sum += the weights of tile `step`, which is at `turn`, times the tile; committed.
template <class T, class Tile, class Shared>
__device__ __forceinline__ void start_sums(float (&sum)[Tile::kParts][Tile::kWidth / 2], const Shared& shared,
                                           const Turn& turn, int step, int channel) {
  const T* weights = shared.weights + step % Tile::kWeights * kGroupRows * Tile::kKeys;
  const T* tile = shared.tiles + turn.buffer * shared.tile_elements;
  constexpr int kFirst = Tile::kHalves ? Tile::kKeys / 2 : Tile::kKeys;
  ptx::wgmma_fence();
  multiply_weights<T, Tile, 0, kFirst>(sum, weights, tile, channel);
  ptx::wgmma_commit();
  if constexpr (Tile::kHalves) {
    multiply_weights<T, Tile, kFirst, Tile::kKeys>(sum, weights, tile, channel);
    ptx::wgmma_commit();
  }
}

// Waits for these sums, and gives back what they have read.
template <class Tile, class Shared>
__device__ __forceinline__ void finish_sums(const Shared& shared, const Turn& turn, int step) {
  if constexpr (Tile::kHalves) {
    ptx::wgmma_wait<1>();
    arrive(shared.empty + turn.buffer);
  }
  ptx::wgmma_wait<0>();
  arrive(shared.empty + (Tile::kHalves ? kMaxTiles : 0) + turn.buffer);
  arrive(shared.unweighed + step % Tile::kWeights);
}

// Sums of weights relative to a lower highest score; mostly there is none.
template <class Tile>
__device__ __forceinline__ void shrink(float (&sum)[Tile::kParts][Tile::kWidth / 2], const float (&decay)[2]) {
  if (__any_sync(0xffffffffu, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < Tile::kHalf / 2; ++i) {
      sum[i / (Tile::kWidth / 2)][i % (Tile::kWidth / 2)] *= decay[i / 2 % 2];
    }
  }
}

// The running softmax of a consumer: of the tiles whose weights it makes.
struct Softmax {
  float total[2] = {}, moment[2] = {};  // of the weights; of the rounded weights times the means
};

// Scores become weights relative to the highest score so far, times rstd. Returns the new highest scores and what
// earlier results are multiplied by.
template <class Tile, class Shared>
__device__ __forceinline__ void weigh(float (&s)[Tile::kKeys / 2], Softmax& mine, float (&top)[2], float (&decay)[2],
                                      float scale, const Shared& shared, int stage, const float* q_sums,
                                      const Consumer& at) {
  const float q_sum[2] = {q_sums[at.row(0)], q_sums[at.row(1)]};
  const int key = stage * Tile::kKeys + 2 * at.t;
  float best[2] = {top[0], top[1]};
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
    const float2 mean = *reinterpret_cast<const float2*>(shared.mean + key + j * 8);
    const float2 rstd = *reinterpret_cast<const float2*>(shared.rstd + key + j * 8);
    const float2 bias = *reinterpret_cast<const float2*>(shared.bias + key + j * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &x = s[j * 4 + 2 * half], &y = s[j * 4 + 2 * half + 1];
      x = fmaf(fmaf(-mean.x, q_sum[half], x), rstd.x * scale, bias.x);
      y = fmaf(fmaf(-mean.y, q_sum[half], y), rstd.y * scale, bias.y);
      best[half] = fmaxf(best[half], fmaxf(x, y));
    }
  }
  float zero[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    best[half] = quad_max(best[half]);
    zero[half] = best[half] == -INFINITY ? 0.0f : best[half];  // no key yet: -inf - -inf would be NaN
    decay[half] = ptx::exp2(top[half] - zero[half]);
    top[half] = best[half];
    mine.total[half] *= decay[half];
    mine.moment[half] *= decay[half];
  }
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
    const float2 rstd = *reinterpret_cast<const float2*>(shared.rstd + key + j * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &x = s[j * 4 + 2 * half], &y = s[j * 4 + 2 * half + 1];
      x = ptx::exp2(x - zero[half]);
      y = ptx::exp2(y - zero[half]);
      mine.total[half] += x + y;
      x *= rstd.x;
      y *= rstd.y;
    }
  }
}

// The weights rounded and packed, and their sum with the means.
template <class T, class Tile, class Shared>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[Tile::kKeys / 16][4], const float (&s)[Tile::kKeys / 2],
                                             Softmax& mine, const Shared& shared, int stage, const Consumer& at) {
#pragma unroll
  for (int j = 0; j < Tile::kKeys / 8; ++j) {
    const float2 mean = *reinterpret_cast<const float2*>(shared.mean + stage * Tile::kKeys + 2 * at.t + j * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float low, high;
      unpack<T>(packed[j / 2][j % 2 * 2 + half] = pack<T>(s[j * 4 + 2 * half], s[j * 4 + 2 * half + 1]), low, high);
      mine.moment[half] = fmaf(low, mean.x, fmaf(high, mean.y, mine.moment[half]));
    }
  }
}

// What a group knows of a row of the forward at the end of a split.
template <class Tile>
__device__ __forceinline__ void finish_row(const Problem& p, const Plan& plan, const Forward& f, const Share& share,
                                           int64_t row, const float (&sum)[Tile::kParts][Tile::kWidth / 2],
                                           const Consumer& at, int half, float top, float total, float moment) {
  const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
  const bool final = plan.splits == 1;
  const float factor = !final ? 1.0f : total > 0.0f ? 1.0f / total : 0.0f;
  if (first_stored<Tile>(at.group) == 0 && at.t == 0) {
    if (final) {
      f.lse[place] = (top + log2f(total)) * kLn2;
    } else {
      f.tops[partial] = top;
      f.tops[plan.splits * p.batch * p.rows + partial] = total;
    }
  }
  store_row<Tile>(p, sum, at, half, moment, factor,
                  final ? f.out + place * channels(p) : f.sums + partial * channels(p));
}

#endif  // MMK_HOPPER

// 128 rows: the scores of a tile are made beside the sums of the tile before, of both groups at any time.
template <class T, class Tile>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_tall_forward_kernel(Problem p, Plan plan, Forward f, Stages stages) {
#ifdef MMK_HOPPER
  using Shared = HopperShared<T, Tile, false>;
  begin<Tile>(Shared(p, stages, shared_memory()));
  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce<T, Tile, Shared>(p, plan, stages);
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    const Shared shared(p, stages, shared_memory());
    const Share share(p, plan, Tile::kRows, Tile::kKeys);
    const int steps = count_tiles<Tile>(share);
    const Consumer at;
    const float scale = p.scale * kLog2e;
    begin_consuming<T, Tile>(p, shared, share, nullptr);
    const int group_row = at.group * kGroupRows;
    float sum[Tile::kParts][Tile::kWidth / 2], s[Tile::kKeys / 2], top[2] = {-INFINITY, -INFINITY}, decay[2];
    uint32_t weights[Tile::kKeys / 16][4];
    clear<Tile>(sum);
    Softmax mine;

    auto tile_of = [&](const Turn& turn) { return shared.tiles + turn.buffer * shared.tile_elements; };
    auto start_scores = [&](const Turn& turn) {
      ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
      multiply_tile<T, Tile::kRows, Tile::kKeys>(s, shared.q + group_row * 8, tile_of(turn), padded(p));
      ptx::wgmma_commit();
    };
    auto make_weights = [&](const Turn& turn) {
      ptx::mbarrier_wait(shared.measured + turn.buffer, turn.parity);
      weigh<Tile>(s, mine, top, decay, scale, shared, turn.buffer, shared.q_sum + group_row, at);
    };
    auto start_sums = [&](const Turn& turn) {
      const uint64_t b = ptx::descriptor(tile_of(turn), 128, Tile::kKeys * 16);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          ptx::wgmma_of_registers<T, true>(sum[part], weights[k], b + k * 16 + part * (Tile::kWidth / 8) * Tile::kKeys,
                                           1);
        }
      }
      ptx::wgmma_commit();
    };
    // The tensor cores have read the weights before. (Packed beside their reading, ptxas would wait for every product.)
    auto round_weights = [&](const Turn& turn) {
      pack_weights<T, Tile>(weights, s, mine, shared, turn.buffer, at);
#pragma unroll
      for (int k = 0; k < Tile::kKeys / 16; ++k) ptx::hold(weights[k]);
    };
    Turn now;
    if (steps > 0) {
      start_scores(now);
      ptx::wgmma_wait<0>();
      make_weights(now);
      round_weights(now);
    }
    for (int step = 1; step < steps; ++step) {
      const Turn before = now;
      now.advance(stages.tiles);
      start_scores(now);
      start_sums(before);
      ptx::wgmma_wait<1>();
      make_weights(now);  // beside the sums of the step before
      ptx::wgmma_wait<0>();
      arrive(shared.empty + before.buffer);
      shrink<Tile>(sum, decay);
      round_weights(now);
    }
    if (steps > 0) {
      start_sums(now);
      ptx::wgmma_wait<0>();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + group_row + at.row(half);
      const float total = quad_sum(mine.total[half]), moment = quad_sum(mine.moment[half]);
      if (row < p.rows) finish_row<Tile>(p, plan, f, share, row, sum, at, half, top[half], total, moment);
    }
  }
#else
  __trap();
#endif
}

template <class T, class Tile>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_forward_kernel(Problem p, Plan plan, Forward f, Stages stages) {
#ifdef MMK_HOPPER
  using Shared = HopperShared<T, Tile, false>;
  begin<Tile>(Shared(p, stages, shared_memory()));
  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce<T, Tile, Shared>(p, plan, stages);
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    const Shared shared(p, stages, shared_memory());
    const Share share(p, plan, Tile::kRows, Tile::kKeys);
    const int steps = count_tiles<Tile>(share);
    const Consumer at;
    const int channel = first_channel<Tile>(p, at.group);
    const float scale = p.scale * kLog2e;
    begin_consuming<T, Tile>(p, shared, share, nullptr);
    float sum[Tile::kParts][Tile::kWidth / 2];
    clear<Tile>(sum);
    Softmax mine;
    float s[Tile::kKeys / 2], top[2] = {-INFINITY, -INFINITY}, decay[2];
    uint32_t packed[Tile::kKeys / 16][4];

    auto start_scores = [&](const Turn& turn) {
      ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
      multiply_tile<T, kGroupRows, Tile::kKeys>(s, shared.q, shared.tiles + turn.buffer * shared.tile_elements,
                                                padded(p));
      ptx::wgmma_commit();
    };
    auto make_weights = [&](const Turn& turn) {
      ptx::mbarrier_wait(shared.measured + turn.buffer, turn.parity);
      weigh<Tile>(s, mine, top, decay, scale, shared, turn.buffer, shared.q_sum, at);
      pack_weights<T, Tile>(packed, s, mine, shared, turn.buffer, at);
    };
    auto publish = [&](int step) {
      publish_weights<T, Tile>(shared, at, packed, step, [&](int buffer) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (at.t == 0) shared.change[buffer * kGroupRows + at.row(half)] = make_float2(top[half], decay[half]);
        }
      });
    };
    // Results so far are brought to the weights' highest scores.
    auto await_weights = [&](int step, bool others) {
      const Turn turn(step, Tile::kWeights);
      ptx::mbarrier_wait(shared.weighed + turn.buffer, turn.parity);
      float decays[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 change = shared.change[turn.buffer * kGroupRows + at.row(half)];
        top[half] = change.x;
        decays[half] = change.y;
        if (others) mine.total[half] *= change.y, mine.moment[half] *= change.y;
      }
      shrink<Tile>(sum, decays);
    };
    Turn now;
    if (at.group == 0 && steps > 0) {
      start_scores(now);
      ptx::wgmma_wait<0>();
      make_weights(now);
      publish(0);
    }
    for (int step = 1; step <= steps; ++step) {
      const Turn before = now;
      now.advance(stages.tiles);
      if (step % 2 == at.group && step < steps) {
        start_scores(now);
        ptx::wgmma_wait<0>();
        await_weights(step - 1, true);
        start_sums<T, Tile>(sum, shared, before, step - 1, channel);
        make_weights(now);  // beside the sums of the step before
        if constexpr (Tile::kWeights == 2) publish(step);
        finish_sums<Tile>(shared, before, step - 1);
        if constexpr (Tile::kWeights == 1) publish(step);
      } else {
        await_weights(step - 1, step % 2 == at.group);
        start_sums<T, Tile>(sum, shared, before, step - 1, channel);
        finish_sums<Tile>(shared, before, step - 1);
      }
    }

    // The two groups' totals, added in their order.
    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(mine.total[half]), moment = quad_sum(mine.moment[half]);
      if (at.t == 0) shared.totals[at.group * kGroupRows + at.row(half)] = make_float2(total, moment);
    }
    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(half);
      if (row >= p.rows) continue;
      const float2 even = shared.totals[at.row(half)], odd = shared.totals[kGroupRows + at.row(half)];
      finish_row<Tile>(p, plan, f, share, row, sum, at, half, top[half], even.x + odd.x, even.y + odd.y);
    }
  }
#else
  __trap();
#endif
}

#ifdef MMK_HOPPER

// The weights of the sums that are dq: gradients of the scores times rstd, by one warpgroup for a tile.
template <class T, class Tile, class Shared>
struct ScoreGradients {
  const Problem& p;
  const Shared& shared;
  const Consumer& at;
  float moment[2] = {};  // of the rounded weights times the means
  float s[Tile::kKeys / 2], dp[Tile::kKeys / 2];

  __device__ __forceinline__ ScoreGradients(const Problem& p, const Shared& shared, const Consumer& at)
      : p(p), shared(shared), at(at) {}

  __device__ __forceinline__ void make_scores(const Turn& turn) {
    ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
    const T* tile = shared.tiles + turn.buffer * shared.tile_elements;
    multiply_tile<T, Tile::kRows, Tile::kKeys>(s, shared.q, tile, padded(p));
    multiply_tile<T, Tile::kRows, Tile::kKeys>(dp, shared.dout, tile, padded(p));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  // put(j, half, two): keys 8 j + 2 t and the next of row(half).
  template <class Put>
  __device__ __forceinline__ void make_weights(const Turn& turn, Put put) {
    ptx::mbarrier_wait(shared.measured + turn.buffer, turn.parity);
    const int key = turn.buffer * Tile::kKeys + 2 * at.t;
    const float scale = p.scale * kLog2e;
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
      const float2 mean = *reinterpret_cast<const float2*>(shared.mean + key + j * 8);
      const float2 rstd = *reinterpret_cast<const float2*>(shared.rstd + key + j * 8);
      const float2 bias = *reinterpret_cast<const float2*>(shared.bias + key + j * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A scorer, which has few registers, reads this again and again.
        const float4 row = shared.row[Tile::kScorer ? ptx::hide(at.row(half)) : at.row(half)];
        auto gradient = [&](int i, float mu, float r, float hidden) {
          const float score = fmaf(-mu, row.x, s[i]), dweight = fmaf(-mu, row.y, dp[i]) * r;
          const float weight = ptx::exp2(fmaf(score, r * scale, hidden - row.z));
          return score_gradient(weight, dweight, row.w) * r;
        };
        const float x = gradient(j * 4 + 2 * half, mean.x, rstd.x, bias.x);
        const float y = gradient(j * 4 + 2 * half + 1, mean.y, rstd.y, bias.y);
        float low, high;
        const uint32_t two = pack<T>(x, y);
        unpack<T>(two, low, high);
        moment[half] = fmaf(low, mean.x, fmaf(high, mean.y, moment[half]));
        put(j, half, two);
      }
    }
  }

  // The moments of this group's tiles, where the weights were.
  __device__ __forceinline__ void tell_moments(int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(moment[half]);
      if (at.t == 0) shared.totals[group * kGroupRows + at.row(half)] = make_float2(0.0f, total);
    }
  }
};

#endif  // MMK_HOPPER

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    hopper_backward_q_kernel(Problem p, Plan plan, Backward b, Stages stages) {
#ifdef MMK_HOPPER
  using Shared = HopperShared<T, Tile, true>;
  constexpr int kOthers = Tile::kThreads - kGroup;
  begin<Tile>(Shared(p, stages, shared_memory()));
  if (threadIdx.x >= kOthers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce<T, Tile, Shared>(p, plan, stages);
  } else if (Tile::kScorer && threadIdx.x >= kConsumers) {
    if constexpr (Tile::kScorer) {
      ptx::release_registers<Tile::kScorerRegisters>();
      const Shared shared(p, stages, shared_memory());
      const Share share(p, plan, Tile::kRows, Tile::kKeys);
      const int steps = count_tiles<Tile>(share);
      const Consumer at;
      ScoreGradients<T, Tile, Shared> own(p, shared, at);
      ptx::named_barrier(kAllButProducer, kOthers);
      Turn now;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        own.make_scores(now);
        // By now the sums of the tile before are made: weights go where they are read, without a stay in registers.
        ptx::mbarrier_wait(shared.unweighed, (step & 1) ^ 1);
        own.make_weights(now, [&](int j, int half, uint32_t two) {
          ptx::store_shared(shared.weights + (j * kGroupRows + at.row(half)) * 8 + 2 * at.t, two);
        });
        ptx::fence_proxy_async();
        arrive(shared.weighed);
        now.advance(stages.tiles);
      }
      ptx::named_barrier(kAllButProducer, kOthers);
      own.tell_moments(0);
      ptx::named_barrier(kAllButProducer, kOthers);
    }
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    const Shared shared(p, stages, shared_memory());
    const Share share(p, plan, Tile::kRows, Tile::kKeys);
    const int steps = count_tiles<Tile>(share);
    const Consumer at;
    const int channel = first_channel<Tile>(p, at.group);
    begin_consuming<T, Tile>(p, shared, share, &b.dout);
    for (int r = threadIdx.x; r < kGroupRows; r += kConsumers) {
      const int64_t row = share.first_row + r, place = share.batch * p.rows + row;
      const bool inside = r < Tile::kRows && row < p.rows;
      shared.row[r] = make_float4(inside ? shared.q_sum[r] : 0.0f, inside ? shared.dout_sum[r] : 0.0f,
                                  inside ? shift_of(b.lse[place]) : INFINITY, inside ? b.delta[place] : 0.0f);
    }
    ptx::named_barrier(kAllButProducer, kOthers);
    float sum[Tile::kParts][Tile::kWidth / 2];
    clear<Tile>(sum);
    auto await_weights = [&](int step) {
      const Turn turn(step, Tile::kWeights);
      ptx::mbarrier_wait(shared.weighed + turn.buffer, turn.parity);
    };

    Turn now;
    if constexpr (Tile::kScorer) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        await_weights(step);
        start_sums<T, Tile>(sum, shared, now, step, channel);
        finish_sums<Tile>(shared, now, step);
        now.advance(stages.tiles);
      }
      ptx::named_barrier(kAllButProducer, kOthers);
    } else {
      ScoreGradients<T, Tile, Shared> own(p, shared, at);
      uint32_t packed[Tile::kKeys / 16][4];
      auto keep = [&](int j, int half, uint32_t two) { packed[j / 2][j % 2 * 2 + half] = two; };
      auto publish = [&](int step) { publish_weights<T, Tile>(shared, at, packed, step, [](int) {}); };
      if (at.group == 0 && steps > 0) {
        own.make_scores(now);
        own.make_weights(now, keep);
        publish(0);
      }
      for (int step = 1; step <= steps; ++step) {
        const Turn before = now;
        now.advance(stages.tiles);
        if (step % 2 == at.group && step < steps) {
          own.make_scores(now);
          await_weights(step - 1);
          start_sums<T, Tile>(sum, shared, before, step - 1, channel);
          own.make_weights(now, keep);
          publish(step);
          finish_sums<Tile>(shared, before, step - 1);
        } else {
          await_weights(step - 1);
          start_sums<T, Tile>(sum, shared, before, step - 1, channel);
          finish_sums<Tile>(shared, before, step - 1);
        }
      }
      ptx::named_barrier(kAllButProducer, kOthers);
      own.tell_moments(at.group);
    }
    ptx::named_barrier(kAllButProducer, kOthers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(half);
      if (at.row(half) >= Tile::kRows || row >= p.rows) continue;
      float total = shared.totals[at.row(half)].y;
      if constexpr (!Tile::kScorer) total += shared.totals[kGroupRows + at.row(half)].y;
      const int64_t place = (share.batch * p.rows + row) * channels(p);
      if (b.partial_dq) {
        float* to = b.partial_dq + share.split * p.batch * p.rows * channels(p) + place;
        store_row<Tile>(p, sum, at, half, total, p.scale, to);
      } else {
        store_row<Tile>(p, sum, at, half, total, p.scale, static_cast<T*>(b.dq) + place);
      }
    }
  }
#else
  __trap();
#endif
}

// --- Which tile ---

template <class T, class Tile>
using ForwardShared = HopperShared<T, Tile, false>;
template <class T, class Tile>
using BackwardQShared = HopperShared<T, Tile, true>;

using ForwardChoice = HopperChoice<Problem, Plan, Forward, Stages>;

template <class T>
ForwardChoice choose_hopper_forward(const Problem& p, const Device& device) {
  ForwardChoice choice;
  first_hopper_fit<T, ForwardShared, HopperTile<64, 64, 1, 0>, HopperTile<64, 64, 2, 0>, HopperTile<64, 96, 2, 0>,
                   HopperTile<64, 128, 2, 0>, HopperTile<64, 136, 2, 0>, HopperTile<32, 112, 3, 0>>(
      p, device, p.rows, [](auto tile) { return &hopper_tall_forward_kernel<T, decltype(tile)>; }, choice);
  first_hopper_fit<T, ForwardShared, HopperTile<64, 64, 1, 2>, HopperTile<64, 144, 1, 2>, HopperTile<64, 192, 1, 2>,
                   HopperTile<48, 192, 1, 2>, HopperTile<48, 256, 1, 2>, HopperTile<32, 176, 2, 1>>(
      p, device, p.rows, [](auto tile) { return &hopper_forward_kernel<T, decltype(tile)>; }, choice);
  return choice;
}

using BackwardChoice = HopperChoice<Problem, Plan, Backward, Stages>;

template <class T>
BackwardChoice choose_hopper_backward_q(const Problem& p, const Device& device) {
  BackwardChoice choice;
  first_hopper_fit<T, BackwardQShared, HopperTile<64, 64, 1, 2>, HopperTile<64, 144, 1, 2>, HopperTile<48, 192, 1, 2>,
                   HopperTile<32, 256, 1, 2>, HopperTile<16, 256, 1, 2>, ScoredTile<32, 176, 2, 48>,
                   HopperTile<16, 176, 2, 2>>(
      p, device, p.rows, [](auto tile) { return &hopper_backward_q_kernel<T, decltype(tile)>; }, choice);
  return choice;
}

template <class Choice>
int describe_hopper(const Choice& choice, const Problem& p, const Device& device, Plan* plan) {
  if (!choice.kernel) return -1;
  *plan = {ceil_div(p.rows, choice.rows), ceil_div(p.keys, choice.columns), device.multiprocessors, 1, true};
  return 0;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_hopper_plan_fwd(const Problem* p, Plan* plan) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    return describe_hopper(choose_hopper_forward<decltype(zero)>(*p, device), *p, device, plan);
  });
}

extern "C" int mmk_latent_hopper_fwd(const Problem* p, const Plan* plan, const Forward* f, void* stream) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    const auto choice = choose_hopper_forward<decltype(zero)>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    return mmk::launch(choice.kernel, grid, dim3(choice.threads), choice.bytes, stream, *p, *plan, *f, choice.stages);
  });
}

extern "C" int mmk_latent_hopper_plan_bwd_q(const Problem* p, Plan* plan) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    return describe_hopper(choose_hopper_backward_q<decltype(zero)>(*p, device), *p, device, plan);
  });
}

extern "C" int mmk_latent_hopper_bwd_q(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    const auto choice = choose_hopper_backward_q<decltype(zero)>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    return mmk::launch(choice.kernel, grid, dim3(choice.threads), choice.bytes, stream, *p, *plan, *b, choice.stages);
  });
}
