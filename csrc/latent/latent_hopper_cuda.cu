// The forward and the gradient of q for compute capability 9.0, 16-bit inputs: wgmma on operands in shared memory, with
// the warps specialised. README.md in mmkernels/ops/latent has the schedule and the time model.
//
// A block has 64 query rows. Its third warpgroup produces: it brings tiles of keys into shared memory, takes the
// moments of every key, and (fp16) normalises the tile. The other two consume, each for half of the channels: sums of
// 64 rows by half of the channels fill their registers. They make scores in turn, the even tiles one, the odd tiles the
// other, and put the weights into shared memory, from where both multiply them with their half of the tile. So while
// one makes weights the other keeps the tensor cores busy, and no score is made twice.
//
// In bf16 the norm is folded into the small side: s = r (q . x - mean sum(q)), out = sum_m w x - sum_m w mean with w
// the weight p r rounded to bf16, which both sums share.
#include <climits>
#include <cstring>
#include <type_traits>

#include "common/hopper.cuh"
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

constexpr int kRows = 64, kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup;
constexpr int kConsumerWarps = kConsumers / 32, kGroupWarps = kGroup / 32;
enum NamedBarrier { kProducing = 1, kConsuming = 2 };

// A tile of Keys keys; a warpgroup accumulates Parts instructions of Width channels. With two buffers of weights those
// of a tile are made beside the sums of the tile before, with one after them.
template <int Keys, int Width, int Parts, int Weights>
struct HopperTile {
  static constexpr int kKeys = Keys, kWidth = Width, kParts = Parts, kHalf = Width * Parts, kWeights = Weights;
  // The three shares of 64 K registers; all but the widest sums leave the producer enough to keep loads in flight.
  static constexpr int kConsumerRegisters = kHalf > 256 ? 232 : 216, kProducerRegisters = kHalf > 256 ? 40 : 72;
};

// How shared memory is used, decided by the launcher.
struct Stages {
  int tiles;  // 2 or 3
  int raws;   // copies of keys that are not yet in a tile; 0: rows are copied straight into the tile
};

constexpr int kMaxTiles = 3;

// What has the same place in every launch comes first, so that its addresses cost no registers.
template <class T, class Tile, bool Backward>
struct HopperShared {
  uint64_t *full, *empty;         // tiles
  uint64_t *weighed, *unweighed;  // weights are there, are done with
  float *mean, *rstd, *bias;      // of each key of each tile
  float *q_sum, *dout_sum;        // of each row
  T* weights;
  float2* change;  // highest score and decay of each row that go with a buffer of weights
  float2* totals;  // per consumer group and row, where the weights were
  T *q, *dout, *tiles;
  unsigned char *raw_table, *raw_content;
  int tile_elements, raw_table_bytes, raw_content_bytes, bytes;

  __host__ __device__ HopperShared(const Problem& p, const Stages& stages, unsigned char* base) {
    Arena arena{base};
    full = arena.take<uint64_t>(kMaxTiles);
    empty = arena.take<uint64_t>(kMaxTiles);
    weighed = arena.take<uint64_t>(Tile::kWeights);
    unweighed = arena.take<uint64_t>(Tile::kWeights);
    mean = arena.take<float>(kMaxTiles * Tile::kKeys);
    rstd = arena.take<float>(kMaxTiles * Tile::kKeys);
    bias = arena.take<float>(kMaxTiles * Tile::kKeys);
    q_sum = arena.take<float>(kRows);
    dout_sum = arena.take<float>(Backward ? kRows : 0);
    change = arena.take<float2>(Backward ? 0 : Tile::kWeights * kRows);
    weights = arena.take<T>(Tile::kWeights * kRows * Tile::kKeys);
    totals = reinterpret_cast<float2*>(weights);
    static_assert(2 * kRows * sizeof(float2) <= Tile::kWeights * kRows * Tile::kKeys * sizeof(T));
    q = arena.take<T>(kRows * padded(p));
    dout = arena.take<T>(Backward ? kRows * padded(p) : 0);
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

// A buffer of a ring: its number and the parity of its round.
struct Turn {
  int buffer, parity;
  __device__ Turn(int step, int buffers) : buffer(step % buffers), parity(step / buffers & 1) {}
};

// --- The producer ---

__device__ __forceinline__ bool is_visible(const Problem& p, int64_t batch, int64_t key) {
  return key < p.keys && (!p.mask || p.mask[batch * p.mask_batch + key * p.mask_key]);
}

// Rows that are aligned to 16 bytes, straight into the tile. Eight neighbouring lanes take eight keys of one column of
// 16 bytes, which are neighbours in the tile. Keys that nobody may see and the padding of the channels become zeros.
template <class T, class Tile>
__device__ void copy_keys(const Problem& p, int64_t batch, int64_t first, T* tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps;
  const int split = p.position / 8, filled = channels(p) / 8, chunks = padded(p) / 8;
  unsigned visible = 0;  // of the keys that this lane copies
#pragma unroll
  for (int i = 0; i < Tile::kKeys / 8; ++i) visible |= unsigned{is_visible(p, batch, first + i * 8 + lane % 8)} << i;
  const Part<T> table = table_part<T>(p, first), content = content_part<T>(p, batch, first);
  for (int c = warp * 4 + lane / 8; c < chunks; c += 4 * kGroupWarps) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 8; ++i) {
      const int r = i * 8 + lane % 8;
      const bool inside = c < filled && (visible >> i & 1);
      const T* source = !inside     ? static_cast<const T*>(p.q.data)
                        : c < split ? table.row(r) + c * 8
                                    : content.row(r) + (c - split) * 8;
      ptx::cp_async<16>(tile + (c * Tile::kKeys + r) * 8, source, inside ? 16 : 0);
    }
  }
}

struct __attribute__((may_alias, aligned(16))) Eight {
  uint32_t r[4];
};

// Elements of a row from any 2-byte aligned address, two to a register. May read the element before or after them.
template <class T>
__device__ __forceinline__ Eight load_eight(const T* from) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto* words = reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
  Eight v;
  if (address % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.r[i] = words[i];
  } else {
    uint32_t low = words[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = words[i + 1];
      v.r[i] = low >> 16 | high << 16;
      low = high;
    }
  }
  return v;
}

template <class T>
__device__ __forceinline__ float element(const Eight& v, int i) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __uint_as_float(i % 2 ? v.r[i / 2] & 0xffff0000u : v.r[i / 2] << 16);
  } else {
    const auto bits = static_cast<uint16_t>(v.r[i / 2] >> i % 2 * 16);
    T x;
    memcpy(&x, &bits, sizeof(T));
    return to_float(x);
  }
}

// Channels 8 c to 8 c + 7 of a raw row; zeros past the last channel.
template <class T>
__device__ __forceinline__ Eight gather(const Problem& p, const T* table, const T* content, int c) {
  const int begin = c * 8, count = channels(p);
  if (begin + 8 <= p.position) return load_eight(table + begin);
  if (begin >= p.position && begin + 8 <= count) return load_eight(content + (begin - p.position));
  Eight v{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int channel = begin + i;
    if (channel >= count) continue;
    const T* from = channel < p.position ? table + channel : content + (channel - p.position);
    v.r[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(from)} << i % 2 * 16;
  }
  return v;
}

// Raw keys become a tile, with the moments of each key; fp16 is normalised on the way.
template <class T, class Tile, class Shared>
__device__ void make_tile(const Problem& p, const Shared& shared, const Stages& stages, int64_t batch, int64_t first,
                          int step) {
  constexpr bool kNormalise = std::is_same_v<T, fp16>;  // p r underflows in fp16, which bars the fold
  // Eight keys of a column of 16 bytes are a whole core matrix; four where eight would leave warps without work.
  constexpr int kAtOnce = Tile::kKeys % (8 * kGroupWarps) == 0 ? 8 : 4, kShares = 32 / kAtOnce;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps, part = lane / kAtOnce;
  const int stage = step % stages.tiles, count = channels(p), chunks = padded(p) / 8;
  const Part<T> table_keys = table_part<T>(p, first), content_keys = content_part<T>(p, batch, first);
  T* tile = shared.tiles + stage * shared.tile_elements;
  for (int r = warp * kAtOnce + lane % kAtOnce; r < Tile::kKeys; r += kAtOnce * kGroupWarps) {
    const bool visible = is_visible(p, batch, first + r);
    const T *table = nullptr, *content = nullptr;
    if (stages.raws) {
      const int raw = step % stages.raws;
      table = staged_row(table_keys, shared.raw_table + raw * shared.raw_table_bytes, r);
      content = staged_row(content_keys, shared.raw_content + raw * shared.raw_content_bytes, r);
    }
    auto place = [&](int c) { return tile + (c * Tile::kKeys + r) * 8; };
    auto load = [&](int c) {
      if (stages.raws) return gather(p, table, content, c);
      return *reinterpret_cast<const Eight*>(place(c));
    };
    auto store = [&](int c, const Eight& v) {
      ptx::store_shared(place(c), make_uint4(v.r[0], v.r[1], v.r[2], v.r[3]));
    };

    // Moments about the first element; see `normalise` in latent_tile.cuh.
    float shift = 0.0f, sum = 0.0f, squares = 0.0f;
    if (visible) {
      shift = to_float(!stages.raws ? *place(0) : p.position ? table[0] : content[0]);
#pragma unroll 2
      for (int c = part; c < chunks; c += kShares) {
        const Eight v = load(c);
        if (stages.raws && !kNormalise) store(c, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (c * 8 + i >= count) continue;
          const float x = element<T>(v, i) - shift;
          sum += x;
          squares = fmaf(x, x, squares);
        }
      }
    }
#pragma unroll
    for (int bit = kAtOnce; bit < 32; bit *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, bit);
      squares += __shfl_xor_sync(0xffffffffu, squares, bit);
    }
    const float offset = sum / count;
    const bool norm = p.eps >= 0.0f;
    const float mean = norm ? shift + offset : 0.0f;
    const float rstd = norm ? 1.0f / sqrtf(fmaxf(squares / count - offset * offset, 0.0f) + p.eps) : 1.0f;
    if (!visible && stages.raws) {
      for (int c = part; c < chunks; c += kShares) store(c, Eight{});
    } else if (visible && kNormalise) {
      for (int c = part; c < chunks; c += kShares) {
        const Eight v = load(c);
        Eight normal{};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          const float low = (element<T>(v, i) - mean) * rstd, high = (element<T>(v, i + 1) - mean) * rstd;
          if (c * 8 + i < count) normal.r[i / 2] = pack<T>(low, c * 8 + i + 1 < count ? high : 0.0f);
        }
        store(c, normal);
      }
    }
    if (part == 0) {
      const int key = stage * Tile::kKeys + r;
      shared.bias[key] = visible ? 0.0f : -INFINITY;
      shared.mean[key] = visible && !kNormalise ? mean : 0.0f;
      shared.rstd[key] = !visible ? 0.0f : kNormalise ? 1.0f : rstd;
    }
  }
}

template <class T, class Tile, class Shared>
__device__ void produce(const Problem& p, const Stages& stages, const Shared& shared, const Share& share, int steps) {
  const int thread = threadIdx.x % kGroup;
  auto first_key = [&](int step) { return share.first_key + int64_t{step} * Tile::kKeys; };
  auto await_empty = [&](int step) {
    const Turn turn(step, stages.tiles);
    ptx::mbarrier_wait(shared.empty + turn.buffer, turn.parity ^ 1);
  };
  auto fetch = [&](int step) {
    const int64_t first = first_key(step);
    if (step >= steps) {
    } else if (stages.raws) {
      const int raw = step % stages.raws, count = rows_left(p.keys, first, Tile::kKeys);
      const Part<T> table = table_part<T>(p, first), content = content_part<T>(p, share.batch, first);
      if (p.position) stage(table, count, shared.raw_table + raw * shared.raw_table_bytes, thread, kGroup);
      if (p.content) stage(content, count, shared.raw_content + raw * shared.raw_content_bytes, thread, kGroup);
    } else {
      await_empty(step);
      copy_keys<T, Tile>(p, share.batch, first, shared.tiles + step % stages.tiles * shared.tile_elements);
    }
    ptx::cp_async_commit();
  };
  // A copy may run ahead where it waits for no tile that the one in hand is needed for: with a second raw copy, or a
  // third tile.
  const bool ahead = stages.raws ? stages.raws == 2 : stages.tiles == 3;
  if (ahead) fetch(0);
  for (int step = 0; step < steps; ++step) {
    ptx::named_barrier(kProducing, kGroup);  // nobody reads what the next copy overwrites
    if (ahead) {
      fetch(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      fetch(step);
      ptx::cp_async_wait<0>();
    }
    ptx::named_barrier(kProducing, kGroup);
    if (stages.raws) await_empty(step);
    make_tile<T, Tile>(p, shared, stages, share.batch, first_key(step), step);
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.full + step % stages.tiles);
  }
}

// --- The consumers ---

// Rows of q or dout, and their sums, by all consumers.
template <class T>
__device__ void load_query_rows(const Problem& p, const QueryRows& rows, int64_t batch, int64_t first, T* tile) {
  const int filled = static_cast<int>(ceil_div(channels(p), 8)), chunks = padded(p) / 8;
  const T* source = static_cast<const T*>(rows.data) + batch * rows.batch;
  for (int i = threadIdx.x; i < kRows * chunks; i += kConsumers) {
    const int r = i % kRows, c = i / kRows;
    const bool inside = first + r < p.rows && c < filled;
    ptx::cp_async<16>(tile + i * 8, inside ? source + (first + r) * rows.row + c * 8 : source, inside ? 16 : 0);
  }
}

template <class T>
__device__ void sum_query_rows(const Problem& p, const T* tile, float* sums) {
  const int r = threadIdx.x / 4;
  float sum = 0.0f;
  for (int c = threadIdx.x % 4; c < padded(p) / 8; c += 4) {
    const Eight v = *reinterpret_cast<const Eight*>(tile + (c * kRows + r) * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += element<T>(v, i);
  }
  sum = quad_sum(sum);
  if (threadIdx.x % 4 == 0) sums[r] = sum;
}

// Where a consumer stands: elements i of fragment j of an accumulator are row(i / 2), column 8 j + 2 t + i % 2.
struct Consumer {
  int group = threadIdx.x / kGroup, lane = threadIdx.x % 32, t = lane % 4;
  int first = threadIdx.x / 32 % kGroupWarps * 16 + lane / 4;

  __device__ int row(int half) const { return first + 8 * half; }
};

// s = rows tile^T, not committed.
template <class T, class Tile>
__device__ __forceinline__ void multiply_tile(float (&s)[Tile::kKeys / 2], const T* rows, const T* tile, int depth) {
  uint64_t a = ptx::descriptor(rows, kRows * 16, 128), b = ptx::descriptor(tile, Tile::kKeys * 16, 128);
  ptx::wgmma_fence();
  ptx::wgmma<T, false>(s, a, b, 0);
#pragma unroll 1
  for (int k = 16; k < depth; k += 16) {
    a += 2 * kRows;  // two columns of 16 bytes, in units of them
    b += 2 * Tile::kKeys;
    ptx::wgmma_fence();  // ptxas wants one wherever control flow joins
    ptx::wgmma<T, false>(s, a, b, 1);
  }
}

// sum += weights tile over this group's channels, which begin at `channel`; not committed.
template <class T, class Tile>
__device__ __forceinline__ void multiply_weights(float (&sum)[Tile::kParts][Tile::kWidth / 2], const T* weights,
                                                 const T* tile, int channel) {
  const uint64_t a = ptx::descriptor(weights, kRows * 16, 128);
  const uint64_t b = ptx::descriptor(tile + channel * Tile::kKeys, 128, Tile::kKeys * 16);
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      ptx::wgmma<T, true>(sum[part], a + k * 2 * kRows, b + k * 16 + part * (Tile::kWidth / 8) * Tile::kKeys, 1);
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t two, float& low, float& high) {
  const Eight v{{two}};
  low = element<T>(v, 0);
  high = element<T>(v, 1);
}

// One warp speaks for its lanes, which have done what it says.
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// Barriers and roles. Returns the number of tiles that the block walks over.
template <class Tile, class Shared>
__device__ int begin(const Shared& shared, const Stages& stages, const Share& share) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages.tiles; ++i) {
      ptx::mbarrier_init(shared.full + i, kGroupWarps);
      ptx::mbarrier_init(shared.empty + i, kConsumerWarps);
    }
    for (int i = 0; i < Tile::kWeights; ++i) {
      ptx::mbarrier_init(shared.weighed + i, kGroupWarps);
      ptx::mbarrier_init(shared.unweighed + i, kConsumerWarps);
    }
  }
  __syncthreads();
  return static_cast<int>(ceil_div(share.last_key - share.first_key, Tile::kKeys));
}

// The first channel of this group, and the first that it stores: the second group's may overlap the first's.
template <class Tile>
__device__ int first_channel(const Problem& p, int group) {
  return group ? max(padded(p) - Tile::kHalf, 0) : 0;
}

// Writes (sum - moment) * factor of this group's channels to a row.
template <class Tile, class Out>
__device__ __forceinline__ void store_row(const Problem& p, const float (&sum)[Tile::kParts][Tile::kWidth / 2],
                                          const Consumer& at, int half, float moment, float factor, Out* row) {
  const int count = channels(p), begin = first_channel<Tile>(p, at.group), stored = at.group ? Tile::kHalf : 0;
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
template <class T, class Shared>
__device__ void begin_consuming(const Problem& p, const Shared& shared, const Share& share, const QueryRows* dout) {
  load_query_rows(p, p.q, share.batch, share.first_row, shared.q);
  if (dout) load_query_rows(p, *dout, share.batch, share.first_row, shared.dout);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::named_barrier(kConsuming, kConsumers);
  sum_query_rows(p, shared.q, shared.q_sum);
  if (dout) sum_query_rows(p, shared.dout, shared.dout_sum);
  ptx::named_barrier(kConsuming, kConsumers);
}

// Packed weights of a tile, two to a register, for everyone's use; `also` writes what goes with them.
template <class T, class Tile, class Shared, class Also>
__device__ __forceinline__ void publish_weights(const Shared& shared, const Consumer& at,
                                                const uint32_t (&packed)[Tile::kKeys / 4], int step, Also also) {
  const Turn turn(step, Tile::kWeights);
  ptx::mbarrier_wait(shared.unweighed + turn.buffer, turn.parity ^ 1);
  T* weights = shared.weights + turn.buffer * kRows * Tile::kKeys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; ++j) {
      ptx::store_shared(weights + (j * kRows + at.row(half)) * 8 + 2 * at.t, packed[j * 2 + half]);
    }
  }
  also(turn.buffer);
  ptx::fence_proxy_async();
  arrive(shared.weighed + turn.buffer);
}

// sum += the weights of a tile times the tile, committed.
template <class T, class Tile, class Shared>
__device__ __forceinline__ void start_sums(float (&sum)[Tile::kParts][Tile::kWidth / 2], const Shared& shared,
                                           const Stages& stages, int step, int channel) {
  ptx::wgmma_fence();
  multiply_weights<T, Tile>(sum, shared.weights + step % Tile::kWeights * kRows * Tile::kKeys,
                            shared.tiles + step % stages.tiles * shared.tile_elements, channel);
  ptx::wgmma_commit();
}

template <class Tile, class Shared>
__device__ __forceinline__ void release(const Shared& shared, const Stages& stages, int step) {
  arrive(shared.empty + step % stages.tiles);
  arrive(shared.unweighed + step % Tile::kWeights);
}

template <class Tile>
__device__ __forceinline__ void clear(float (&sum)[Tile::kParts][Tile::kWidth / 2]) {
#pragma unroll
  for (int i = 0; i < Tile::kHalf / 2; ++i) sum[i / (Tile::kWidth / 2)][i % (Tile::kWidth / 2)] = 0.0f;
}

// The running softmax of a consumer: of the tiles whose weights it makes.
struct Softmax {
  float total[2] = {}, moment[2] = {};  // of the weights; of the rounded weights times the means
};

// Scores become weights relative to the highest score so far, and (packed) weights times rstd. Returns the new highest
// scores and what earlier results are multiplied by.
template <class T, class Tile, class Shared>
__device__ __forceinline__ void weigh(float (&s)[Tile::kKeys / 2], uint32_t (&packed)[Tile::kKeys / 4], Softmax& mine,
                                      float (&top)[2], float (&decay)[2], float scale, const Shared& shared, int stage,
                                      const Consumer& at) {
  const float q_sum[2] = {shared.q_sum[at.row(0)], shared.q_sum[at.row(1)]};
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
    const float2 mean = *reinterpret_cast<const float2*>(shared.mean + key + j * 8);
    const float2 rstd = *reinterpret_cast<const float2*>(shared.rstd + key + j * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = ptx::exp2(s[j * 4 + 2 * half] - zero[half]), y = ptx::exp2(s[j * 4 + 2 * half + 1] - zero[half]);
      mine.total[half] += x + y;
      float low, high;
      unpack<T>(packed[j * 2 + half] = pack<T>(x * rstd.x, y * rstd.y), low, high);
      mine.moment[half] = fmaf(low, mean.x, fmaf(high, mean.y, mine.moment[half]));
    }
  }
}

#endif  // MMK_HOPPER

template <class T, class Tile>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_forward_kernel(Problem p, Plan plan, Forward f, Stages stages) {
#ifdef MMK_HOPPER
  using Shared = HopperShared<T, Tile, false>;
  const Shared shared(p, stages, shared_memory());
  const Share share(p, plan, kRows, Tile::kKeys);
  const int steps = begin<Tile>(shared, stages, share);
  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce<T, Tile>(p, stages, shared, share, steps);
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    const Consumer at;
    const int channel = first_channel<Tile>(p, at.group);
    const float scale = p.scale * kLog2e;
    begin_consuming<T>(p, shared, share, nullptr);
    float sum[Tile::kParts][Tile::kWidth / 2];
    clear<Tile>(sum);
    Softmax mine;
    float s[Tile::kKeys / 2], top[2] = {-INFINITY, -INFINITY}, decay[2];
    uint32_t packed[Tile::kKeys / 4];

    auto start_scores = [&](int step) {
      const Turn turn(step, stages.tiles);
      ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
      multiply_tile<T, Tile>(s, shared.q, shared.tiles + turn.buffer * shared.tile_elements, padded(p));
      ptx::wgmma_commit();
    };
    auto make_weights = [&](int step) {
      weigh<T, Tile>(s, packed, mine, top, decay, scale, shared, step % stages.tiles, at);
    };
    auto publish = [&](int step) {
      publish_weights<T, Tile>(shared, at, packed, step, [&](int buffer) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (at.t == 0) shared.change[buffer * kRows + at.row(half)] = make_float2(top[half], decay[half]);
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
        const float2 change = shared.change[turn.buffer * kRows + at.row(half)];
        top[half] = change.x;
        decays[half] = change.y;
        if (others) mine.total[half] *= change.y, mine.moment[half] *= change.y;
      }
      if (__any_sync(0xffffffffu, decays[0] != 1.0f || decays[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < Tile::kHalf / 2; ++i) {
          sum[i / (Tile::kWidth / 2)][i % (Tile::kWidth / 2)] *= decays[i / 2 % 2];
        }
      }
    };
    if (at.group == 0 && steps > 0) {
      start_scores(0);
      ptx::wgmma_wait<0>();
      make_weights(0);
      publish(0);
    }
    for (int step = 1; step <= steps; ++step) {
      if (step % 2 == at.group && step < steps) {
        start_scores(step);
        ptx::wgmma_wait<0>();
        await_weights(step - 1, true);
        start_sums<T, Tile>(sum, shared, stages, step - 1, channel);
        make_weights(step);  // beside the sums of the step before
        if constexpr (Tile::kWeights == 2) publish(step);
        ptx::wgmma_wait<0>();
        release<Tile>(shared, stages, step - 1);
        if constexpr (Tile::kWeights == 1) publish(step);
      } else {
        await_weights(step - 1, step % 2 == at.group);
        start_sums<T, Tile>(sum, shared, stages, step - 1, channel);
        ptx::wgmma_wait<0>();
        release<Tile>(shared, stages, step - 1);
      }
    }

    // The two groups' totals, added in their order.
    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(mine.total[half]), moment = quad_sum(mine.moment[half]);
      if (at.t == 0) shared.totals[at.group * kRows + at.row(half)] = make_float2(total, moment);
    }
    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(half);
      if (row >= p.rows) continue;
      const float2 even = shared.totals[at.row(half)], odd = shared.totals[kRows + at.row(half)];
      const float total = even.x + odd.x, moment = even.y + odd.y;
      const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
      const bool final = plan.splits == 1;
      const float factor = !final ? 1.0f : total > 0.0f ? 1.0f / total : 0.0f;
      if (at.group == 0 && at.t == 0) {
        if (final) {
          f.lse[place] = (top[half] + log2f(total)) * kLn2;
        } else {
          f.tops[partial] = top[half];
          f.tops[plan.splits * p.batch * p.rows + partial] = total;
        }
      }
      store_row<Tile>(p, sum, at, half, moment, factor,
                      final ? f.out + place * channels(p) : f.sums + partial * channels(p));
    }
  }
#else
  __trap();
#endif
}

template <class T, class Tile>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_backward_q_kernel(Problem p, Plan plan, Backward b, Stages stages) {
#ifdef MMK_HOPPER
  using Shared = HopperShared<T, Tile, true>;
  const Shared shared(p, stages, shared_memory());
  const Share share(p, plan, kRows, Tile::kKeys);
  const int steps = begin<Tile>(shared, stages, share);
  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<Tile::kProducerRegisters>();
    produce<T, Tile>(p, stages, shared, share, steps);
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    const Consumer at;
    const int channel = first_channel<Tile>(p, at.group);
    const float scale = p.scale * kLog2e;
    begin_consuming<T>(p, shared, share, &b.dout);
    float q_sum[2], dout_sum[2], shift[2], delta[2], moment[2] = {};  // moment: of the rounded weights times the means
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(half), place = share.batch * p.rows + row;
      q_sum[half] = shared.q_sum[at.row(half)];
      dout_sum[half] = shared.dout_sum[at.row(half)];
      shift[half] = row < p.rows ? shift_of(b.lse[place]) : INFINITY;
      delta[half] = row < p.rows ? b.delta[place] : 0.0f;
    }
    float sum[Tile::kParts][Tile::kWidth / 2], s[Tile::kKeys / 2], dp[Tile::kKeys / 2];
    uint32_t packed[Tile::kKeys / 4];
    clear<Tile>(sum);

    auto make_scores = [&](int step) {
      const Turn turn(step, stages.tiles);
      ptx::mbarrier_wait(shared.full + turn.buffer, turn.parity);
      const T* tile = shared.tiles + turn.buffer * shared.tile_elements;
      multiply_tile<T, Tile>(s, shared.q, tile, padded(p));
      multiply_tile<T, Tile>(dp, shared.dout, tile, padded(p));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    };
    // The gradients of the scores times rstd, packed.
    auto make_weights = [&](int step) {
      const int key = step % stages.tiles * Tile::kKeys + 2 * at.t;
#pragma unroll
      for (int j = 0; j < Tile::kKeys / 8; ++j) {
        const float2 mean = *reinterpret_cast<const float2*>(shared.mean + key + j * 8);
        const float2 rstd = *reinterpret_cast<const float2*>(shared.rstd + key + j * 8);
        const float2 bias = *reinterpret_cast<const float2*>(shared.bias + key + j * 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          auto gradient = [&](int i, float mu, float r, float hidden) {
            const float score = fmaf(-mu, q_sum[half], s[i]), dweight = fmaf(-mu, dout_sum[half], dp[i]) * r;
            const float weight = ptx::exp2(fmaf(score, r * scale, hidden - shift[half]));
            return score_gradient(weight, dweight, delta[half]) * r;
          };
          const float x = gradient(j * 4 + 2 * half, mean.x, rstd.x, bias.x);
          const float y = gradient(j * 4 + 2 * half + 1, mean.y, rstd.y, bias.y);
          float low, high;
          unpack<T>(packed[j * 2 + half] = pack<T>(x, y), low, high);
          moment[half] = fmaf(low, mean.x, fmaf(high, mean.y, moment[half]));
        }
      }
    };
    auto publish = [&](int step) { publish_weights<T, Tile>(shared, at, packed, step, [](int) {}); };
    auto await_weights = [&](int step) {
      const Turn turn(step, Tile::kWeights);
      ptx::mbarrier_wait(shared.weighed + turn.buffer, turn.parity);
    };

    if (at.group == 0 && steps > 0) {
      make_scores(0);
      make_weights(0);
      publish(0);
    }
    for (int step = 1; step <= steps; ++step) {
      const bool mine = step % 2 == at.group && step < steps;
      if (mine) {
        make_scores(step);
        await_weights(step - 1);
        start_sums<T, Tile>(sum, shared, stages, step - 1, channel);
        make_weights(step);
        publish(step);
        ptx::wgmma_wait<0>();
      } else {
        await_weights(step - 1);
        start_sums<T, Tile>(sum, shared, stages, step - 1, channel);
        ptx::wgmma_wait<0>();
      }
      release<Tile>(shared, stages, step - 1);
    }

    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(moment[half]);
      if (at.t == 0) shared.totals[at.group * kRows + at.row(half)] = make_float2(0.0f, total);
    }
    ptx::named_barrier(kConsuming, kConsumers);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(half);
      if (row >= p.rows) continue;
      const float total = shared.totals[at.row(half)].y + shared.totals[kRows + at.row(half)].y;
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

template <class... Parameters>
struct HopperChoice {
  void (*kernel)(Parameters...) = nullptr;
  int columns = 1, bytes = 0;
  Stages stages{};
};

// Every row of both parts begins and ends at a multiple of 16 bytes.
bool aligned_keys(const Problem& p) {
  auto whole = [](int64_t elements) { return elements % 8 == 0; };
  auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool content = !p.content || (aligned(p.x) && whole(p.content) && whole(p.x_key) && whole(p.x_batch));
  return content && (!p.position || (aligned(p.table) && whole(p.position) && whole(p.table_key)));
}

// Of the narrowest tiles that are wide enough the first that fits: rows that are copied straight into their tile prefer
// the first tile in the order given; rows that are not, a second raw copy. Tiles of which half or more would be empty
// are left to the kernels with fewer rows.
template <class T, bool Backward, class... Tiles, class Kernels, class Choice>
void first_hopper_fit(const Problem& p, const Device& device, Kernels kernels, Choice& choice) {
  static constexpr Stages kDirect[] = {{3, 0}, {2, 0}}, kStaged[] = {{3, 2}, {2, 2}, {3, 1}, {2, 1}};
  if (mmk_capability() != 9 || 2 * p.rows <= kRows || !dense_channels(p)) return;
  int half = INT_MAX;
  ((padded(p) <= 2 * Tiles::kHalf ? half = min(half, Tiles::kHalf) : 0), ...);
  auto attempt = [&](auto tile, const Stages& stages) {
    using Tile = decltype(tile);
    const int bytes = HopperShared<T, Tile, Backward>(p, stages, nullptr).bytes;
    if (choice.kernel || Tile::kHalf != half || bytes > device.shared) return;
    choice = {kernels(tile), Tile::kKeys, bytes, stages};
  };
  if (aligned_keys(p)) {
    ((attempt(Tiles{}, kDirect[0]), attempt(Tiles{}, kDirect[1])), ...);
  } else {
    for (const Stages& stages : kStaged) (attempt(Tiles{}, stages), ...);
  }
}

using ForwardChoice = HopperChoice<Problem, Plan, Forward, Stages>;

template <class T>
ForwardChoice choose_hopper_forward(const Problem& p, const Device& device) {
  ForwardChoice choice;
  auto kernels = [](auto tile) { return &hopper_forward_kernel<T, decltype(tile)>; };
  first_hopper_fit<T, false, HopperTile<64, 64, 1, 2>, HopperTile<64, 144, 1, 2>, HopperTile<64, 192, 1, 2>,
                   HopperTile<48, 192, 1, 2>, HopperTile<48, 256, 1, 2>, HopperTile<32, 176, 2, 1>>(p, device, kernels,
                                                                                                    choice);
  return choice;
}

using BackwardChoice = HopperChoice<Problem, Plan, Backward, Stages>;

template <class T>
BackwardChoice choose_hopper_backward_q(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &hopper_backward_q_kernel<T, decltype(tile)>; };
  first_hopper_fit<T, true, HopperTile<64, 64, 1, 2>, HopperTile<64, 144, 1, 2>, HopperTile<48, 192, 1, 2>,
                   HopperTile<32, 256, 1, 2>, HopperTile<16, 256, 1, 2>, HopperTile<16, 176, 2, 2>>(p, device, kernels,
                                                                                                    choice);
  return choice;
}

template <class Choice>
int describe_hopper(const Choice& choice, const Problem& p, const Device& device, Plan* plan) {
  if (!choice.kernel) return -1;
  *plan = {ceil_div(p.rows, kRows), ceil_div(p.keys, choice.columns), device.multiprocessors, 1, true};
  return 0;
}

template <class F>
int with_short_type(Type type, F&& f) {
  if (type == Type::float32) return -1;
  return type == Type::bfloat16 ? f(bf16{}) : f(fp16{});
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
    return mmk::launch(choice.kernel, grid, dim3(kAllThreads), choice.bytes, stream, *p, *plan, *f, choice.stages);
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
    return mmk::launch(choice.kernel, grid, dim3(kAllThreads), choice.bytes, stream, *p, *plan, *b, choice.stages);
  });
}
