// The gradient of x for compute capability 9.0, 16-bit inputs: wgmma on operands in shared memory, with the warps
// specialised. A block has 64 keys, whose xhat stays in shared memory, and walks over tiles of query rows, everything
// transposed. One warpgroup brings rows of q and dout; the other two make the weights P^T and dS^T in turn, a tile
// each, and share them, because each accumulates half of the channels of the gradient of xhat = P^T dout + dS^T q.
#include "latent/latent_hopper.cuh"

namespace mmk::latent {
namespace {

// A tile of Tile::kKeys query rows: those of q and of dout.
template <class T, class Tile>
struct HopperXShared {
  uint64_t *full, *empty;            // q of each tile
  uint64_t *full_dout, *empty_dout;  // dout, which is first to come and to go
  uint64_t *weighed, *unweighed;
  float *bias, *rstd;        // of each key
  float *shift, *delta;      // of each row of each tile
  float2* exchange;          // per group and key
  T *weights, *keys;         // a buffer: P^T, then dS^T
  T* tiles;                  // and, before a batch's first, the raw copies of the keys
  int tile_elements, bytes;  // elements of q, and of dout

  __host__ __device__ HopperXShared(const Problem& p, const Stages& stages, unsigned char* base) {
    Arena arena{base};
    full = arena.take<uint64_t>(2 * kMaxTiles);
    empty = arena.take<uint64_t>(2 * kMaxTiles);
    full_dout = full + kMaxTiles;
    empty_dout = empty + kMaxTiles;
    weighed = arena.take<uint64_t>(Tile::kWeights);
    unweighed = arena.take<uint64_t>(Tile::kWeights);
    bias = arena.take<float>(kGroupRows);
    rstd = arena.take<float>(kGroupRows);
    shift = arena.take<float>(kMaxTiles * Tile::kKeys);
    delta = arena.take<float>(kMaxTiles * Tile::kKeys);
    exchange = arena.take<float2>(2 * kGroupRows);
    weights = arena.take<T>(Tile::kWeights * 2 * kGroupRows * Tile::kKeys);
    keys = arena.take<T>(kGroupRows * padded(p));
    tile_elements = (padded(p) > Tile::kHalf ? padded(p) : Tile::kHalf) * Tile::kKeys;
    const int all = stages.tiles * 2 * tile_elements * static_cast<int>(sizeof(T)), raw = raw_table(p) + raw_content(p);
    tiles = reinterpret_cast<T*>(arena.take<unsigned char>(stages.raws && raw > all ? raw : all));
    bytes = arena.used;
  }

  static __host__ __device__ int raw_table(const Problem& p) {
    return p.position ? kGroupRows * raw_pitch<T>(p.position) : 0;
  }
  static __host__ __device__ int raw_content(const Problem& p) {
    return p.content ? kGroupRows * raw_pitch<T>(p.content) : 0;
  }
};

#ifdef MMK_HOPPER

// The examples that a block takes: the position's gradient is a sum over all of them, one after another.
struct Examples {
  int64_t first_key, first, last;

  __device__ Examples(const Problem& p, const Plan& plan, const Backward& b)
      : first_key(blockIdx.x % plan.key_tiles * kGroupRows),
        first(b.dtable ? 0 : blockIdx.x / plan.key_tiles),
        last(b.dtable ? p.batch : first + 1) {}
};

template <class T, class Tile>
__device__ void produce_rows(const Problem& p, const Plan& plan, const Backward& b, const Stages& stages) {
  const HopperXShared<T, Tile> shared(p, stages, shared_memory());
  const Examples examples(p, plan, b);
  const int steps = static_cast<int>(ceil_div(p.rows, Tile::kKeys)), thread = threadIdx.x % kGroup;
  const int all = static_cast<int>(examples.last - examples.first) * steps;
  Turn fetched, told;
  int64_t batch = examples.first, first = 0;  // to be fetched
  auto fetch = [&] {
    T* tile = shared.tiles + fetched.buffer * 2 * shared.tile_elements;
    ptx::mbarrier_wait(shared.empty_dout + fetched.buffer, fetched.parity);
    load_query_rows<T, Tile::kKeys, kGroup>(p, b.dout, batch, first, tile + shared.tile_elements);
    ptx::cp_async_commit();
    ptx::mbarrier_wait(shared.empty + fetched.buffer, fetched.parity);
    load_query_rows<T, Tile::kKeys, kGroup>(p, p.q, batch, first, tile);
    if (thread < Tile::kKeys) {
      const bool inside = first + thread < p.rows;
      const int64_t row = batch * p.rows + first + thread;
      shared.shift[fetched.buffer * Tile::kKeys + thread] = inside ? shift_of(b.lse[row]) : INFINITY;
      shared.delta[fetched.buffer * Tile::kKeys + thread] = inside ? b.delta[row] : 0.0f;
    }
    ptx::cp_async_commit();
    fetched.advance(stages.tiles);
    first += Tile::kKeys;
    if (first >= p.rows) first = 0, ++batch;
  };
  auto tell = [&](uint64_t* barrier) {
    ptx::fence_proxy_async();
    arrive(barrier + told.buffer);
  };
  bool ready = false;  // the tile in hand has been fetched
#pragma unroll 1
  for (int count = 0; count < all; ++count) {
    // A copy runs ahead where it waits for no tile that the one in hand is needed for: with a third one, but not into
    // the next example.
    const bool ahead = stages.tiles > 2 && (count + 1) % steps;
    if (!ready) fetch();
    if (ahead) {
      fetch();
      ptx::cp_async_wait<3>();
    } else {
      ptx::cp_async_wait<1>();
    }
    tell(shared.full_dout);
    if (ahead) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<0>();
    }
    tell(shared.full);
    told.advance(stages.tiles);
    ready = ahead;
  }
}

// The keys' xhat, by all consumers; nobody uses the tiles.
template <class T, class Tile>
__device__ void make_xhat(const Problem& p, const Stages& stages, const HopperXShared<T, Tile>& shared, int64_t batch,
                          int64_t first) {
  auto* raw = reinterpret_cast<unsigned char*>(shared.tiles);
  const int table = static_cast<int>(raw - shared_memory()), left = rows_left(p.keys, first, kGroupRows);
  const int warp = threadIdx.x / 32;
  if (stages.raws) {
    if (p.position) stage_keys<T, kConsumerWarps>(table_part<T>(p, first), left, raw);
    if (p.content) stage_keys<T, kConsumerWarps>(content_part<T>(p, batch, first), left, raw + shared.raw_table(p));
  } else {
    copy_keys<T, kGroupRows, kConsumerWarps>(p, batch, first, shared.keys, warp);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::named_barrier(kConsuming, kConsumers);
  if (stages.raws) {
    const Raws raws{table, table + shared.raw_table(p)};
    move_keys<T, kGroupRows, kConsumerWarps, Room::much>(p, batch, first, shared.keys, raws, warp);
    __syncwarp();
  }
  measure_keys<T, kGroupRows, kConsumerWarps, true, Room::much>(p, batch, first, shared.keys, warp,
                                                                [&](int r, bool visible, float, float rstd) {
                                                                  shared.bias[r] = visible ? 0.0f : -INFINITY;
                                                                  shared.rstd[r] = visible ? rstd : 0.0f;
                                                                });
  ptx::fence_proxy_async();
  ptx::named_barrier(kConsuming, kConsumers);
}

// The gradient of xhat in the sums becomes the gradient of x where xhat stands now: dx = rstd (g - mean(g) - xhat
// mean(g xhat)).
template <class T, class Tile>
__device__ __forceinline__ void normalise_backward(const Problem& p, const HopperXShared<T, Tile>& shared,
                                                   const float (&sum)[Tile::kParts][Tile::kWidth / 2],
                                                   const Consumer& at) {
  const int count = channels(p), begin = first_channel<Tile>(p, at.group), stored = first_stored<Tile>(at.group);
  auto each = [&](int half, auto act) {
#pragma unroll
    for (int n = 0; n < Tile::kHalf / 8; ++n) {
      const int c = begin + n * 8 + 2 * at.t;
      if (c < stored || c >= count) continue;
      const float* two = &sum[n / (Tile::kWidth / 8)][n % (Tile::kWidth / 8) * 4 + 2 * half];
      act(shared.keys + ((begin / 8 + n) * kGroupRows + at.row(half)) * 8 + 2 * at.t, two[0], two[1]);
    }
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0.0f, product = 0.0f;
    each(half, [&](const T* xhat, float x, float y) {
      total += x + y;
      product = fmaf(x, to_float(xhat[0]), fmaf(y, to_float(xhat[1]), product));
    });
    total = quad_sum(total);
    product = quad_sum(product);
    if (at.t == 0) shared.exchange[at.group * kGroupRows + at.row(half)] = make_float2(total, product);
  }
  ptx::named_barrier(kConsuming, kConsumers);
  const float share = p.eps >= 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 low = shared.exchange[at.row(half)], high = shared.exchange[kGroupRows + at.row(half)];
    const float mean = (low.x + high.x) * share, slope = (low.y + high.y) * share, rstd = shared.rstd[at.row(half)];
    each(half, [&](T* place, float x, float y) {
      auto change = [&](float g, float xhat) { return rstd > 0.0f ? rstd * (g - mean - xhat * slope) : 0.0f; };
      store_two(place, change(x, to_float(place[0])), change(y, to_float(place[1])));
    });
  }
  ptx::named_barrier(kConsuming, kConsumers);
}

// The gradient of x goes to where it belongs; that of the position is added up over the examples.
template <class T, class Tile>
__device__ void store_gradient(const Problem& p, const Backward& b, const HopperXShared<T, Tile>& shared,
                               const Examples& examples, int64_t batch) {
  const int lane = threadIdx.x % 32, last = rows_left(p.keys, examples.first_key, kGroupRows);
  for (int r = threadIdx.x / 32; r < last; r += kConsumerWarps) {
    const int64_t key = examples.first_key + r;
    auto value = [&](int c) { return shared.keys[(c / 8 * kGroupRows + r) * 8 + c % 8]; };
    if (b.dtable) {
      for (int c = lane; c < p.position; c += 32) {
        const int64_t i = key * p.position + c;
        const float sum = to_float(value(c)) + (batch > 0 ? b.table_sums[i] : 0.0f);
        if (batch + 1 < examples.last) b.table_sums[i] = sum;
        if (batch + 1 == examples.last) static_cast<T*>(b.dtable)[i] = from_float<T>(sum);
      }
    }
    if (b.dx) {
      T* dx = static_cast<T*>(b.dx) + (batch * p.keys + key) * p.content;
      for (int c = lane; c < p.content; c += 32) dx[c] = value(p.position + c);
    }
  }
  ptx::named_barrier(kConsuming, kConsumers);
}

template <class T, class Tile>
__device__ __forceinline__ void consume_rows(const Problem& p, const Plan& plan, const Backward& b,
                                             const Stages& stages) {
  const HopperXShared<T, Tile> shared(p, stages, shared_memory());
  const Examples examples(p, plan, b);
  const Consumer at;
  const int channel = first_channel<Tile>(p, at.group), steps = static_cast<int>(ceil_div(p.rows, Tile::kKeys));
  const float scale = p.scale * kLog2e;
  float sum[Tile::kParts][Tile::kWidth / 2], s[Tile::kKeys / 2], dp[Tile::kKeys / 2], bias[2];
  uint32_t weights[Tile::kKeys / 16][4], gradients[Tile::kKeys / 16][4];

  // Tiles and buffers are counted through all examples.
  auto tile_of = [&](const Turn& turn) { return shared.tiles + turn.buffer * 2 * shared.tile_elements; };
  auto make_scores = [&](const Turn& turn) {
    ptx::mbarrier_wait(shared.full_dout + turn.buffer, turn.parity);
    multiply_tile<T, kGroupRows, Tile::kKeys>(dp, shared.keys, tile_of(turn) + shared.tile_elements, padded(p));
    ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
    multiply_tile<T, kGroupRows, Tile::kKeys>(s, shared.keys, tile_of(turn), padded(p));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  };
  auto make_weights = [&](const Turn& turn) {
    const int row = turn.buffer * Tile::kKeys + 2 * at.t;
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
      const float2 shift = *reinterpret_cast<const float2*>(shared.shift + row + j * 8);
      const float2 delta = *reinterpret_cast<const float2*>(shared.delta + row + j * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = j * 4 + 2 * half;
        const float x = ptx::exp2(fmaf(s[i], scale, bias[half] - shift.x));
        const float y = ptx::exp2(fmaf(s[i + 1], scale, bias[half] - shift.y));
        weights[j / 2][j % 2 * 2 + half] = pack<T>(x, y);
        gradients[j / 2][j % 2 * 2 + half] =
            pack<T>(p.scale * score_gradient(x, dp[i], delta.x), p.scale * score_gradient(y, dp[i + 1], delta.y));
      }
    }
  };
  auto buffer_of = [&](int buffer) { return shared.weights + buffer * 2 * kGroupRows * Tile::kKeys; };
  auto publish = [&](int count) {
    const Turn turn(count, Tile::kWeights);
    ptx::mbarrier_wait(shared.unweighed + turn.buffer, turn.parity ^ 1);
    store_weights<T, Tile::kKeys>(buffer_of(turn.buffer), at, weights);
    store_weights<T, Tile::kKeys>(buffer_of(turn.buffer) + kGroupRows * Tile::kKeys, at, gradients);
    ptx::fence_proxy_async();
    arrive(shared.weighed + turn.buffer);
  };
  auto start_sums = [&](const Turn& tile_turn, int count) {
    const Turn turn(count, Tile::kWeights);
    ptx::mbarrier_wait(shared.weighed + turn.buffer, turn.parity);
    const T *own = buffer_of(turn.buffer), *tile = tile_of(tile_turn);
    ptx::wgmma_fence();
    multiply_weights<T, Tile>(sum, own, tile + shared.tile_elements, channel);
    ptx::wgmma_commit();
    multiply_weights<T, Tile>(sum, own + kGroupRows * Tile::kKeys, tile, channel);
    ptx::wgmma_commit();
  };

  int first = 0;
  Turn now;
#pragma unroll 1
  for (int64_t batch = examples.first; batch < examples.last; ++batch, first += steps) {
    make_xhat(p, stages, shared, batch, examples.first_key);
    // A tile is free from here on, and again when it has been used, but for the next example's keys.
    Turn freed = now;
    for (int i = 0; i < steps && i < static_cast<int>(stages.tiles); ++i, freed.advance(stages.tiles)) {
      arrive(shared.empty_dout + freed.buffer);
      arrive(shared.empty + freed.buffer);
    }
    bias[0] = shared.bias[at.row(0)];
    bias[1] = shared.bias[at.row(1)];
    clear<Tile>(sum);
    if (first % 2 == at.group) {
      make_scores(now);
      make_weights(now);
      publish(first);
    }
#pragma unroll 1
    for (int count = first + 1; count <= first + steps; ++count) {
      const Turn before = now;
      const bool again = count - 1 + static_cast<int>(stages.tiles) < first + steps;
      now.advance(stages.tiles);
      if (count % 2 == at.group && count < first + steps) {
        make_scores(now);
        start_sums(before, count - 1);
        make_weights(now);  // beside the sums of the tile before
        ptx::wgmma_wait<1>();
        if (again) arrive(shared.empty_dout + before.buffer);
        publish(count);
      } else {
        start_sums(before, count - 1);
        ptx::wgmma_wait<1>();
        if (again) arrive(shared.empty_dout + before.buffer);
      }
      ptx::wgmma_wait<0>();
      if (again) arrive(shared.empty + before.buffer);
      arrive(shared.unweighed + (count - 1) % Tile::kWeights);
    }
    ptx::named_barrier(kConsuming, kConsumers);  // nobody's products read xhat
    normalise_backward(p, shared, sum, at);
    store_gradient(p, b, shared, examples, batch);
  }
}

#endif  // MMK_HOPPER

template <class T, class Tile>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_backward_x_kernel(Problem p, Plan plan, Backward b, Stages stages) {
#ifdef MMK_HOPPER
  begin<Tile>(HopperXShared<T, Tile>(p, stages, shared_memory()));
  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce_rows<T, Tile>(p, plan, b, stages);
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    consume_rows<T, Tile>(p, plan, b, stages);
  }
#else
  __trap();
#endif
}

using BackwardChoice = HopperChoice<Problem, Plan, Backward, Stages>;

template <class T>
BackwardChoice choose_hopper_backward_x(const Problem& p, const Device& device) {
  BackwardChoice choice;
  first_hopper_fit<T, HopperXShared, HopperTile<64, 64, 1, 2>, HopperTile<48, 144, 1, 2>, HopperTile<32, 192, 1, 2>,
                   HopperTile<32, 256, 1, 2>, HopperTile<16, 176, 2, 2>>(
      p, device, p.keys, [](auto tile) { return &hopper_backward_x_kernel<T, decltype(tile)>; }, choice);
  return choice;
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_hopper_plan_bwd_x(const Problem* p, Plan* plan) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    const auto choice = choose_hopper_backward_x<decltype(zero)>(*p, device);
    if (!choice.kernel) return -1;
    *plan = {ceil_div(p->rows, choice.columns), ceil_div(p->keys, choice.rows), device.multiprocessors, 1, true};
    return 0;
  });
}

extern "C" int mmk_latent_hopper_bwd_x(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_short_type(p->type, [&](auto zero) {
    const auto choice = choose_hopper_backward_x<decltype(zero)>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->key_tiles * (b->dtable ? 1 : p->batch)));
    return mmk::launch(choice.kernel, grid, dim3(choice.threads), choice.bytes, stream, *p, *plan, *b, choice.stages);
  });
}
