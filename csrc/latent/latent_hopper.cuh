// What the kernels of the latent family for compute capability 9.0 share: the way of keys into tiles that wgmma reads,
// with the moments of every key; the weights' way from the warpgroup that makes them to both; and the choice of a tile.
#pragma once
#include <climits>
#include <cstring>
#include <type_traits>

#include "common/hopper.cuh"
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

constexpr int kGroupRows = 64, kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup;
constexpr int kConsumerWarps = kConsumers / 32, kGroupWarps = kGroup / 32;
// Registers of whoever takes moments: `much` for several loads in flight, `little` for one sum at a time.
enum class Room { little, some, much };
enum NamedBarrier { kProducing = 1, kConsuming = 2, kAllButProducer = 3 };

// A tile of Keys keys; a warpgroup accumulates Parts instructions of Width channels. With buffers of weights both
// groups have the same 64 rows, and half of the channels each: with two buffers the weights of a tile are made beside
// the sums of the tile before, with one after them. Of these rows the block may have fewer of its own; what the tensor
// cores make of the others is dropped. Without (a tall tile), each has 64 rows of its own and all channels.
template <int Keys, int Width, int Parts, int Weights, int Rows = Weights ? kGroupRows : 2 * kGroupRows>
struct HopperTile {
  static constexpr int kKeys = Keys, kWidth = Width, kParts = Parts, kHalf = Width * Parts, kWeights = Weights;
  static constexpr bool kScorer = false;
  static constexpr int kThreads = kAllThreads;
  static constexpr int kRows = Rows, kChannels = Weights ? 2 * kHalf : kHalf;
  // Its halves are given back one after the other, each to the two warps that fill it.
  static constexpr bool kHalves = Weights && Keys == 32;
  // The three shares of 63 K registers.
  static constexpr int kConsumerRegisters = Weights && kHalf > 256 ? 232 : kHalf > 272 ? 224 : 216;
  static constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters;
  static constexpr Room kRoom = kProducerRegisters > 40 ? Room::much : Room::some;
};

// The same with a fourth warpgroup that makes all the weights, where the scores have no room beside the sums. The
// producer has few registers left: rows must be such as are copied straight into their tile.
template <int Keys, int Width, int Parts, int Rows>
struct ScoredTile : HopperTile<Keys, Width, Parts, 1, Rows> {
  static constexpr bool kScorer = true;
  static constexpr Room kRoom = Room::little;
  static constexpr int kThreads = kAllThreads + kGroup;
  static constexpr int kConsumerRegisters = 208, kScorerRegisters = 64, kProducerRegisters = 32;
};

// How shared memory is used, decided by the launcher.
struct Stages {
  unsigned tiles;  // 2 or 3
  unsigned raws;   // copies of keys that are not yet in a tile; 0: rows are copied straight into the tile
};

constexpr int kMaxTiles = 3;

#ifdef MMK_HOPPER

// A buffer of a ring: its number and the parity of its round. One that moves on spares a division by how many there
// are.
struct Turn {
  int buffer = 0, parity = 0;
  Turn() = default;
  __device__ __forceinline__ Turn(unsigned step, unsigned buffers)
      : buffer(static_cast<int>(step % buffers)), parity(static_cast<int>(step / buffers & 1)) {}
  __device__ __forceinline__ void advance(unsigned buffers) {
    if (++buffer == static_cast<int>(buffers)) buffer = 0, parity ^= 1;
  }
};

// Barriers, for all roles. What else a role knows it finds out itself, or some of it would wait on the stack.
template <class Tile, class Shared>
__device__ void begin(const Shared& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kMaxTiles; ++i) {
      ptx::mbarrier_init(shared.full + i, kGroupWarps);
      ptx::mbarrier_init(shared.empty + i, kConsumerWarps);
    }
    for (int i = 0; i < Tile::kWeights; ++i) {
      ptx::mbarrier_init(shared.weighed + i, kGroupWarps);
      ptx::mbarrier_init(shared.unweighed + i, kConsumerWarps);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ bool is_visible(const Problem& p, int64_t batch, int64_t key) {
  return key < p.keys && (!p.mask || p.mask[batch * p.mask_batch + key * p.mask_key]);
}

// act(first of eight keys), for the eights of a tile that are this warp's as number `warp` of Warps.
template <int Keys, int Warps, class Act>
__device__ __forceinline__ void each_eight(int warp, Act act) {
  constexpr int kTurns = (Keys / 8 + Warps - 1) / Warps;
  if constexpr (kTurns == 1) {
    if (Keys / 8 == Warps || warp < Keys / 8) act(warp * 8);
  } else {
#pragma unroll 1
    for (int keys = warp * 8; keys < Keys; keys += 8 * Warps) act(keys);
  }
}

// Rows that are aligned to 16 bytes, straight into the tile, those of each_eight. Eight neighbouring lanes take eight
// keys of one column of 16 bytes, which are neighbours in the tile. Keys that nobody may see and the padding of the
// channels become zeros.
template <class T, int Keys, int Warps>
__device__ __forceinline__ void copy_keys(const Problem& p, int64_t batch, int64_t first, T* tile, int warp) {
  const int lane = ptx::hide(threadIdx.x) % 32;
  const int split = ptx::hide(p.position) / 8, filled = ptx::hide(channels(p)) / 8, chunks = round_up(filled, 2);
  each_eight<Keys, Warps>(warp, [&](int keys) {
    const int r = keys + lane % 8;
    const int last = is_visible(p, batch, first + r) ? filled : 0;
    int c = lane / 8;
    T* to = tile + (c * Keys + r) * 8;
    auto copy = [&](const T* from, int end) {
#pragma unroll 1
      for (; c + 28 < end; c += 32, from += 32 * 8, to += 32 * Keys * 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) ptx::cp_async<16>(to + i * 4 * Keys * 8, from + i * 4 * 8);
      }
      if (c + 12 < end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::cp_async<16>(to + i * 4 * Keys * 8, from + i * 4 * 8);
        c += 16, from += 16 * 8, to += 16 * Keys * 8;
      }
#pragma unroll 1
      for (; c < end; c += 4, from += 4 * 8, to += 4 * Keys * 8) ptx::cp_async<16>(to, from);
    };
    if (split) copy(table_part<T>(p, first).row(r) + c * 8, min(split, last));
    copy(content_part<T>(p, batch, first).row(r) + (c - split) * 8, last);
#pragma unroll 1
    for (; c < chunks; c += 4, to += 4 * Keys * 8) ptx::store_shared(to, make_uint4(0, 0, 0, 0));
  });
}

struct __attribute__((may_alias, aligned(16))) Eight {
  uint32_t r[4];
};

// Elements from `shift` bits on, a multiple of 16, two to a register. May read the elements around them.
__device__ __forceinline__ Eight load_eight(const uint32_t* words, int shift) {
  Eight v;
  uint32_t low = words[0];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t high = words[i + 1];
    v.r[i] = static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
    low = high;
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

// Raw copies of rows as `stage` in latent_tile.cuh makes them, in few instructions for rows without gaps between them;
// by Warps warps.
template <class T, int Warps>
__device__ __forceinline__ void stage_keys(const Part<T>& part, int rows, unsigned char* raw) {
  const int width = ptx::hide(part.width), all = threadIdx.x % (32 * Warps);
  const bool dense = part.key == width;
  const int thread = dense ? all : all % 32, threads = dense ? 32 * Warps : 32;
  const int bytes = (dense ? rows : 1) * width * static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int r = dense ? 0 : all / 32; r < (dense ? 1 : rows); r += Warps) {
    const char* source = reinterpret_cast<const char*>(part.row(r));
    unsigned char* to = raw + r * raw_pitch<T>(width);
    const int from = lead(source), end = from + bytes, last = end & ~15, element = thread * static_cast<int>(sizeof(T));
    source -= from;
    const int begin = round_up(from, 16) + thread * 16;
    int left = last - begin;
    unsigned char* put = to + begin;
    const char* get = source + begin;
    if (dense) {  // many pieces a lane, at distances that the instructions know
      constexpr int kNext = 32 * Warps * 16;
#pragma unroll 1
      for (; left > 7 * kNext; left -= 8 * kNext, put += 8 * kNext, get += 8 * kNext) {
#pragma unroll
        for (int i = 0; i < 8; ++i) ptx::cp_async<16>(put + i * kNext, get + i * kNext);
      }
    }
#pragma unroll 1
    for (; left > 0; left -= threads * 16, put += threads * 16, get += threads * 16) ptx::cp_async<16>(put, get);
    if (element >= 16) continue;
    auto copy = [&](int at) { *reinterpret_cast<T*>(to + at) = *reinterpret_cast<const T*>(source + at); };
    if (from && from + element < min(16, end)) copy(from + element);
    if (last + element < end && (last || !from)) copy(last + element);
  }
}

// Raw copies of rows, in bytes from the beginning of shared memory.
struct Raws {
  int table, content;
};

template <class T>
__device__ __forceinline__ int staged_at(const Part<T>& part, int raw, int r) {
  const int width = ptx::hide(part.width);
  if (part.key == width) return raw + lead(part.data) + r * width * static_cast<int>(sizeof(T));
  return raw + r * raw_pitch<T>(width) + lead(part.row(r));
}

// What the tensor cores make of the rows of 8 keys in a tile, rows that begin at `rows` and have `chunks` (an even
// number) of 8 channels: of key k, lane 4 k + k / 2 gets the sum and the sum of the squares. An operand of 16 rows is
// the keys and eight rows of ones, the other one the keys as columns; squares are the diagonal of their product.
struct Sums {
  float sum, squares;
};

template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;

template <class T>
__device__ __forceinline__ void add_squares(float (&d)[4], uint32_t x, uint32_t y) {
  ptx::mma_16x8x16<T>(d, {x, kOnes<T>, y, kOnes<T>}, x, y);
}

__device__ __forceinline__ Sums own_sums(const float (&d)[4], int lane) {
  return lane / 4 % 2 ? Sums{d[3], d[1]} : Sums{d[2], d[0]};
}

template <class T, int Keys, Room kRoom>
__device__ __forceinline__ Sums sum_keys(const T* rows, int chunks, int lane) {
  rows += (lane / 8 * Keys + lane % 8) * 8;
  Sums plain = {};
  if constexpr (kRoom != Room::much) {
    // The tensor cores are what these tiles wait for most: three eighths of the channels go without them.
    int left = chunks * 3 / 64 * 8;
    chunks -= left;
#pragma unroll 1
    for (; left > 0; left -= 8, rows += 8 * Keys * 8) {
      const Eight two[2] = {*reinterpret_cast<const Eight*>(rows),
                            *reinterpret_cast<const Eight*>(rows + 4 * Keys * 8)};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float x = element<T>(two[i / 8], i % 8);
        plain.sum += x;
        plain.squares = fmaf(x, x, plain.squares);
      }
    }
#pragma unroll
    for (int bit = 8; bit < 32; bit *= 2) {
      plain.sum += __shfl_xor_sync(0xffffffffu, plain.sum, bit);
      plain.squares += __shfl_xor_sync(0xffffffffu, plain.squares, bit);
    }
    plain = {__shfl_sync(0xffffffffu, plain.sum, lane / 4), __shfl_sync(0xffffffffu, plain.squares, lane / 4)};
  }
  float d[4] = {}, other[4] = {};
  auto add = [&](const uint32_t (&x)[4]) {
    add_squares<T>(d, x[0], x[1]);
    add_squares<T>(kRoom == Room::little ? d : other, x[2], x[3]);
  };
  if constexpr (kRoom == Room::much) {
#pragma unroll 1
    for (; chunks >= 8; chunks -= 8, rows += 8 * Keys * 8) {
      uint32_t x[4], y[4];
      ptx::ldmatrix_x4(x, rows);
      ptx::ldmatrix_x4(y, rows + 4 * Keys * 8);
      add(x);
      add(y);
    }
  }
#pragma unroll 1
  for (; chunks >= 4; chunks -= 4, rows += 4 * Keys * 8) {
    uint32_t x[4];
    ptx::ldmatrix_x4(x, rows);
    add(x);
  }
  if (chunks) {
    uint32_t x[2];
    ptx::ldmatrix_x2(x, rows);  // from half of the lanes' addresses
    add_squares<T>(d, x[0], x[1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += other[i];
  const Sums own = own_sums(d, lane);
  return {own.sum + plain.sum, own.squares + plain.squares};
}

// The same of what the first `count` elements are more than `about`, key lane / 4's, which T can hold.
template <class T, int Keys>
__device__ __forceinline__ Sums sum_differences(const T* rows, int count, float about, int lane) {
  rows += (lane / 8 % 2 * Keys + lane % 8) * 8;
  count -= lane % 4 * 2;
  const uint32_t minus = pack<T>(-about, -about);
  float d[4] = {};
#pragma unroll 1
  for (; count + lane % 4 * 2 > 0; count -= 16, rows += 2 * Keys * 8) {
    uint32_t x[2];
    ptx::ldmatrix_x2(x, rows);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int left = count - i * 8;  // channels from the first of the two on
      x[i] = ptx::fma_pair<T>(x[i], kOnes<T>, minus) & (left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u);
    }
    add_squares<T>(d, x[0], x[1]);
  }
  return own_sums(d, lane);
}

// Raw copies of the keys from `first` on become a tile, those of each_eight.
template <class T, int Keys, int Warps, Room kRoom>
__device__ __forceinline__ void move_keys(const Problem& p, int64_t batch, int64_t first, T* tile, const Raws& raws,
                                          int warp) {
  [[maybe_unused]] constexpr int kUnroll = kRoom == Room::much ? 2 : 1;
  const int lane = ptx::hide(threadIdx.x) % 32, part = lane / 8;
  const int count = ptx::hide(channels(p)), chunks = round_up(count, 16) / 8;
  each_eight<Keys, Warps>(warp, [&](int keys) {
    const int r = keys + lane % 8;
    auto place = [&](int c) { return tile + (c * Keys + r) * 8; };
    if (!is_visible(p, batch, first + r)) {
      for (int c = part; c < chunks; c += 4) ptx::store_shared(place(c), make_uint4(0, 0, 0, 0));
      return;
    }
    const Raws row{staged_at(table_part<T>(p, first), raws.table, r),
                   staged_at(content_part<T>(p, batch, first), raws.content, r)};
    // Of at most three chunks not all is in one of the parts: those a lane each, two channels at a time.
    const int position = ptx::hide(p.position), split = position / 8, filled = count / 8, odd = position % 8;
    int c = part;
    // (From pointers that were numbers in between nvcc makes generic loads, on addresses of 64 bits.)
    auto move = [&](int from, int end) {
      const auto* words = reinterpret_cast<const uint32_t*>(shared_memory() + ((from + c * 16) & ~3));
      const int shift = (from & 3) * 8;
      T* to = place(c);
#pragma unroll kUnroll
      for (; c < end; c += 4, words += 4 * 4, to += 4 * Keys * 8) {
        const Eight v = load_eight(words, shift);
        ptx::store_shared(to, make_uint4(v.r[0], v.r[1], v.r[2], v.r[3]));
      }
    };
    move(row.table, split);
    if (odd && c == split) c += 4;
    move(row.content - 2 * position, filled);
    c = part ? filled + part - 1 : split;
    if (part ? c < chunks : odd && c < filled) {
      auto channel = [&](int i) {
        const int at = i < position ? row.table + 2 * i : row.content + 2 * (i - position);
        return i < count ? uint32_t{*reinterpret_cast<const uint16_t*>(shared_memory() + at)} : 0u;
      };
#pragma unroll(kUnroll > 1 ? 4 : 1)
      for (int i = 0; i < 8; i += 2) ptx::store_shared(place(c) + i, channel(c * 8 + i) | channel(c * 8 + i + 1) << 16);
    }
  });
}

// The moments of the keys of a tile, those of each_eight, which this warp has written. With Normalise the tile holds
// xhat then. `report(r, visible, mean, rstd)` tells of each key, once.
template <class T, int Keys, int Warps, bool Normalise, Room kRoom, class Report>
__device__ __forceinline__ void measure_keys(const Problem& p, int64_t batch, int64_t first, T* tile, int warp,
                                             Report report) {
  constexpr unsigned kAll = 0xffffffffu;
  const int count = ptx::hide(channels(p)), chunks = round_up(count, 16) / 8;
  const bool norm = p.eps >= 0.0f;
  auto lane_now = [] { return static_cast<int>(ptx::hide(threadIdx.x) % 32); };
  auto owns = [](int lane) { return lane % 4 == lane / 8; };  // the sums of key lane / 4: it is lane 4 g + g / 2
  each_eight<Keys, Warps>(warp, [&](int keys) {
    float mean = 0.0f, rstd = 1.0f;
    if (norm) {
      Sums sums = sum_keys<T, Keys, kRoom>(tile + keys * 8, chunks, lane_now());
      const float share = 1.0f / count;
      mean = sums.sum * share;
      float variance = sums.squares * share - mean * mean;
      // Where the mean is large the difference cancels. Then elements are near it, and what they differ by is exact.
      const int lane = lane_now();
      const bool again = owns(lane) && 64.0f * variance < mean * mean;
      if (__any_sync(kAll, again)) {
        const float about = to_float(from_float<T>(__shfl_sync(kAll, mean, lane - lane % 4 + lane / 8)));
        sums = sum_differences<T, Keys>(tile + ptx::hide(keys) * 8, count, about, lane);
        if (again) {
          mean = about + sums.sum * share;
          variance = (sums.squares - sums.sum * sums.sum * share) * share;
        }
      }
      rstd = rsqrtf(fmaxf(variance, 0.0f) + p.eps);
    }
    const int lane = lane_now(), g = lane / 4;
    if (owns(lane)) report(keys + g, is_visible(p, batch, first + keys + g), mean, rstd);
    if constexpr (Normalise) {
      const int of = lane % 8 * 4 + lane % 8 / 2, r = keys + lane % 8;
      mean = __shfl_sync(kAll, mean, of);
      rstd = __shfl_sync(kAll, rstd, of);
      if (!norm || !is_visible(p, batch, first + r)) return;
      for (int c = lane / 8; c < chunks; c += 4) {
        T* place = tile + (c * Keys + r) * 8;
        const Eight v = *reinterpret_cast<const Eight*>(place);
        Eight normal{};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          const float low = (element<T>(v, i) - mean) * rstd, high = (element<T>(v, i + 1) - mean) * rstd;
          if (c * 8 + i < count) normal.r[i / 2] = pack<T>(low, c * 8 + i + 1 < count ? high : 0.0f);
        }
        ptx::store_shared(place, make_uint4(normal.r[0], normal.r[1], normal.r[2], normal.r[3]));
      }
    }
  });
}

// Rows of q or dout as an operand of Rows rows, by Threads threads; rows past the end and the padding become zeros. To
// be committed.
template <class T, int Rows, int Threads>
__device__ void load_query_rows(const Problem& p, const QueryRows& rows, int64_t batch, int64_t first, T* tile) {
  const int filled = static_cast<int>(ceil_div(channels(p), 8)), chunks = padded(p) / 8;
  const T* source = static_cast<const T*>(rows.data) + batch * rows.batch;
  for (int i = threadIdx.x % Threads; i < Rows * chunks; i += Threads) {
    const int r = i % Rows, c = i / Rows;
    const bool inside = first + r < p.rows && c < filled;
    ptx::cp_async<16>(tile + i * 8, inside ? source + (first + r) * rows.row + c * 8 : source, inside ? 16 : 0);
  }
}

// Where a consumer stands: elements i of fragment j of an accumulator are row(i / 2), column 8 j + 2 t + i % 2.
// (That a group's warps agree on its number only the shuffle tells: then the descriptors that follow from it are
// uniform.)
struct Consumer {
  int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kGroup), 0), lane = threadIdx.x % 32,
      t = lane % 4;
  int first = threadIdx.x / 32 % kGroupWarps * 16 + lane / 4;

  __device__ int row(int half) const { return first + 8 * half; }
};

// s = rows tile^T, not committed; the group's 64 rows are of Rows that lie side by side.
template <class T, int Rows, int Keys>
__device__ __forceinline__ void multiply_tile(float (&s)[Keys / 2], const T* rows, const T* tile, int depth) {
  uint64_t a = ptx::descriptor(rows, Rows * 16, 128), b = ptx::descriptor(tile, Keys * 16, 128);
  constexpr int kNextA = 2 * Rows, kNextB = 2 * Keys;  // two columns of 16 bytes, in units of them
  ptx::wgmma_fence();
  ptx::wgmma<T, false>(s, a, b, 0);
  auto multiply = [&](auto steps) {  // as many instructions, with distances that they know
    ptx::wgmma_fence();              // ptxas wants one wherever control flow joins
#pragma unroll
    for (int i = 1; i <= steps.value; ++i) ptx::wgmma<T, false>(s, a + i * kNextA, b + i * kNextB, 1);
    a += steps.value * kNextA;
    b += steps.value * kNextB;
  };
  int left = depth / 16 - 1;
#pragma unroll 1
  for (; left >= 4; left -= 4) multiply(std::integral_constant<int, 4>{});
  if (left & 2) multiply(std::integral_constant<int, 2>{});
  if (left & 1) multiply(std::integral_constant<int, 1>{});
  ptx::wgmma_fence();
}

// sum += weights tile over this group's channels, which begin at `channel`, and keys First to Last; not committed.
template <class T, class Tile, int First = 0, int Last = Tile::kKeys>
__device__ __forceinline__ void multiply_weights(float (&sum)[Tile::kParts][Tile::kWidth / 2], const T* weights,
                                                 const T* tile, int channel) {
  const uint64_t a = ptx::descriptor(weights, kGroupRows * 16, 128);
  const uint64_t b = ptx::descriptor(tile + channel * Tile::kKeys, 128, Tile::kKeys * 16);
#pragma unroll
  for (int k = First / 16; k < Last / 16; ++k) {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      ptx::wgmma<T, true>(sum[part], a + k * 2 * kGroupRows, b + k * 16 + part * (Tile::kWidth / 8) * Tile::kKeys, 1);
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
  if (ptx::hide(threadIdx.x) % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// The first channel of this group, and the first that it stores: the second group's may overlap the first's.
template <class Tile>
__device__ int first_channel(const Problem& p, int group) {
  return Tile::kWeights && group ? max(padded(p) - Tile::kHalf, 0) : 0;
}
template <class Tile>
__device__ int first_stored(int group) {
  return Tile::kWeights && group ? Tile::kHalf : 0;
}

// Packed weights of a tile, two to a register, into `weights`.
template <class T, int Keys>
__device__ __forceinline__ void store_weights(T* weights, const Consumer& at, const uint32_t (&packed)[Keys / 16][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
      ptx::store_shared(weights + (j * kGroupRows + at.row(half)) * 8 + 2 * at.t, packed[j / 2][j % 2 * 2 + half]);
    }
  }
}

template <class Tile>
__device__ __forceinline__ void clear(float (&sum)[Tile::kParts][Tile::kWidth / 2]) {
#pragma unroll
  for (int i = 0; i < Tile::kHalf / 2; ++i) sum[i / (Tile::kWidth / 2)][i % (Tile::kWidth / 2)] = 0.0f;
}

#endif  // MMK_HOPPER

// --- Which tile ---

template <class... Parameters>
struct HopperChoice {
  void (*kernel)(Parameters...) = nullptr;
  int rows = 1, columns = 1, threads = kAllThreads, bytes = 0;
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
// the first tile in the order given; rows that are not, a second raw copy. `rows` is what a tile's rows cover: where
// half of them or more would be empty, fewer are better.
template <class T, template <class, class> class Shared, class... Tiles, class Kernels, class Choice>
void first_hopper_fit(const Problem& p, const Device& device, int64_t rows, Kernels kernels, Choice& choice) {
  static constexpr Stages kDirect[] = {{3, 0}, {2, 0}}, kStaged[] = {{3, 2}, {2, 2}, {3, 1}, {2, 1}};
  if (mmk_capability() != 9 || 2 * p.rows <= kGroupRows || !dense_channels(p)) return;
  int width = INT_MAX;
  ((padded(p) <= Tiles::kChannels ? width = min(width, Tiles::kChannels) : 0), ...);
  auto attempt = [&](auto tile, const Stages& stages) {
    using Tile = decltype(tile);
    const int bytes = Shared<T, Tile>(p, stages, nullptr).bytes;
    if (choice.kernel || (Tile::kScorer && (stages.raws || stages.tiles != 2)) || Tile::kChannels != width ||
        2 * rows <= Tile::kRows || bytes > device.shared)
      return;
    choice = {kernels(tile), Tile::kRows, Tile::kKeys, Tile::kThreads, bytes, stages};
  };
  if (aligned_keys(p)) {
    ((attempt(Tiles{}, kDirect[0]), attempt(Tiles{}, kDirect[1])), ...);
  } else {
    for (const Stages& stages : kStaged) (attempt(Tiles{}, stages), ...);
  }
}

template <class F>
int with_short_type(Type type, F&& f) {
  if (type == Type::float32) return -1;
  return type == Type::bfloat16 ? f(bf16{}) : f(fp16{});
}

}  // namespace
}  // namespace mmk::latent
