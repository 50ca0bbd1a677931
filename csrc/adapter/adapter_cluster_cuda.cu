// The backward of adapters with a narrow bottleneck in one pass over the rows, for 16-bit rows and compute capability
// 9.0 and newer. Four blocks are a cluster and share a tile of rows by its channels: each brings its quarter once, and
// the rows, both weights' quarters and, in registers over all tiles of a part, the quarter of both weights' gradients
// stay on its multiprocessor. What a row's bottleneck needs of all channels, partial products, goes to the block that
// adds them up, a quarter of the tile's rows each, and it tells the others the bottleneck and its gradient: st.async
// brings numbers and counts them at an mbarrier, so nobody waits for stores to memory, as a barrier of the cluster
// would. mmkernels/ops/adapter/README.md has the algebra that leaves two such exchanges.
#include <climits>

#include "adapter/adapter_cluster.cuh"

namespace mmk::adapter {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kTile = 32;

// Rows of a stage. `kOther` is input_residual or residual, then what y is added.
enum Slot { kX, kGradient, kOther };
enum Statistic { kMean, kRstd, kOutMean, kOutRstd, kStatistics };
// Of a norm's gradient in a row: what the element is multiplied by, and what is added.
enum Norm { kOfResult, kOfInput };

// What a kernel serves, known as it is compiled. kPlain: no norms, the rows of x; kPfeiffer: two norms and a second
// input, whose sum with x is added to the result.
enum class Place { kAny, kPlain, kPfeiffer };

// While a block finishes a tile it has begun the next one, whose partial products travel meanwhile.
constexpr int kTurns = 2;
// Shared memory, in bytes. Two mbarriers; numbers, offsets and statistics of the rows of these tiles and two more; what
// was told of rows and gathered of them; vectors.
constexpr int kNumbered = 4, kNumbers = 16, kStatisticsAt = kNumbers + kNumbered * 3 * kTile * 8;
constexpr int kAveragesAt = kStatisticsAt + kNumbered * kStatistics * kTile * 4;
constexpr int kRowSums = kAveragesAt + kTurns * 2 * kTile * 8, kHiddenSums = kRowSums + kTile * 8;
constexpr int kHiddenVectors = kHiddenSums + 2 * kMostHidden * 4;
constexpr int kChannelVectors = kHiddenVectors + 4 * kMostHidden * 4;
constexpr int kOwnSums = kChannelVectors + 2 * kMostChunks * kChannels * 4;
constexpr int kPartial = kOwnSums + kTile / kCluster * 32 * 16;

// Partial products, the bottleneck and its gradient, both weights and what is beside W_up, stages of rows. A third
// stage receives a tile while two are computed; where it finds no room a tile comes when the one before the last has
// left.
template <int Most, int Wide, Place kPlace>  // chunks of a block at most, the bottleneck in whole sixteens
struct Layout {
  static constexpr int kSlots = kPlace == Place::kPlain ? 2 : 3, kStages = Most * kSlots > 9 ? 2 : 3;
  // Bytes between rows: odd multiples of 16, for the banks.
  static constexpr int kPitch = Most * kChannels * 2 + 16, kHiddenPitch = Wide * 2 + 16, kPartialPitch = Wide + 8;
  static constexpr int kBesides = 8;  // rows: ones, and b_up times factor in two parts
  static constexpr int kHiddenBytes = kTile * kHiddenPitch, kSlotBytes = kTile * kPitch;
  static constexpr int kHidden = kPartial + 2 * kTile * kPartialPitch * 4;
  static constexpr int kDown = kHidden + kTurns * 2 * kHiddenBytes, kUp = kDown + Wide * kPitch;
  static constexpr int kBesidesAt = kUp + Most * kChannels * kHiddenPitch;
  static constexpr int kRows = kBesidesAt + (kSlots == 3 ? kBesides * kPitch : 0);
  static constexpr int kBytes = kRows + kStages * kSlots * kSlotBytes;
};

#ifdef MMK_CLUSTERS

template <class T, int Most, int Wide, Place kPlace>
struct Pass : Layout<Most, Wide, kPlace> {
  using Own = Layout<Most, Wide, kPlace>;
  using Own::kBesides, Own::kHiddenPitch, Own::kPitch, Own::kSlotBytes, Own::kSlots, Own::kStages;
  static constexpr bool kPlain = kPlace == Place::kPlain, kPfeiffer = kPlace == Place::kPfeiffer;
  static constexpr int V = kWide<T>, kSteps = Wide / 16, kFragments = kTile / 16;
  static constexpr int kOwnRows = kTile / kCluster;             // whose bottleneck this block adds up
  static constexpr int kGroups = kThreads / (kTile * kPieces);  // of threads that have the same rows
  const Adapter& d;
  const int chunks;
  const Part part;
  int rank, first_channel;
  int numbered = 0, turn = 0, here = 0;  // of the tile at hand: its numbers, what was told of it, where its rows begin
  int parity = 0;                        // of the next exchange
  int lane, warp;

  __device__ __forceinline__ Pass(const Adapter& d)
      : d(d), chunks(Most == kMostChunks ? kMostChunks : chunks_of(d)), part(d) {
    rank = ptx::cluster_rank();
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first_channel = rank * chunks * kChannels;
  }

  // Takes a tile at hand.
  __device__ __forceinline__ void take(int tile) {
    numbered = tile % kNumbered, turn = tile % kTurns, here = stage_at(tile % kStages);
  }

  __device__ __forceinline__ bool normed() const { return kPfeiffer || (!kPlain && d.norm_weight.data); }
  __device__ __forceinline__ bool out_normed() const { return kPfeiffer || (!kPlain && d.out_weight.data); }
  __device__ __forceinline__ bool input() const { return kPfeiffer || (!kPlain && d.input_residual.data); }
  __device__ __forceinline__ bool skips() const { return kPfeiffer || (d.skip & 1); }
  __device__ __forceinline__ bool added() const { return !kPlain && !input() && d.residual.data; }

  // Where things lie, always from the beginning of shared memory: pointers in registers would be too many.
  template <class Type>
  static __device__ __forceinline__ Type* shared_at(int at) {
    return reinterpret_cast<Type*>(shared_memory() + at);
  }
  static __device__ __forceinline__ uint64_t* gathered() { return shared_at<uint64_t>(0); }
  static __device__ __forceinline__ uint64_t* told() { return shared_at<uint64_t>(8); }
  __device__ __forceinline__ float2* coefficients(Norm norm) const {
    return shared_at<float2>(kAveragesAt) + (turn * 2 + norm) * kTile;
  }
  // Sums of g dout and of its product with y, (rank, own row).
  static __device__ __forceinline__ float2* row_sums() { return shared_at<float2>(kRowSums); }
  static __device__ __forceinline__ float* hidden_sums() { return shared_at<float>(kHiddenSums); }
  // Partial products for this block's own rows, (matrix, rank, own row, bottleneck).
  static __device__ __forceinline__ float* partial(int matrix, int rank, int own_row) {
    return shared_at<float>(kPartial) + ((matrix * kCluster + rank) * kOwnRows + own_row) * Own::kPartialPitch;
  }
  __device__ __forceinline__ unsigned char* hidden() const {
    return shared_memory() + Own::kHidden + turn * 2 * Own::kHiddenBytes;
  }
  __device__ __forceinline__ unsigned char* dhidden() const { return hidden() + Own::kHiddenBytes; }
  static __device__ __forceinline__ unsigned char* down_weight() { return shared_memory() + Own::kDown; }
  static __device__ __forceinline__ unsigned char* up_weight() { return shared_memory() + Own::kUp; }
  static __device__ __forceinline__ unsigned char* besides() { return shared_memory() + Own::kBesidesAt; }
  static __device__ __forceinline__ int stage_at(int stage) { return Own::kRows + stage * kSlots * kSlotBytes; }
  __device__ __forceinline__ unsigned char* rows(Slot slot) const { return shared_memory() + here + slot * kSlotBytes; }
  __device__ __forceinline__ int64_t number(int row) const {
    return shared_at<int64_t>(kNumbers)[numbered * 3 * kTile + row];
  }
  __device__ __forceinline__ float statistic(Statistic which, int row) const {
    return shared_at<float>(kStatisticsAt)[(numbered * kStatistics + which) * kTile + row];
  }

  // body(row, c, at) for the pieces of a tile that this thread has, with their place in a slot; c may lie behind the
  // last channel.
  template <class Body>
  __device__ __forceinline__ void each_piece(Body body) const {
    const int row = threadIdx.x / kPieces % kTile, first = threadIdx.x / kPieces / kTile;
    const int channel = first * kChannels + threadIdx.x % kPieces * V, at = row * kPitch + channel * 2;
#pragma unroll(Wide < 64 ? kMostChunks / kGroups : 1)  // registers
    for (int i = 0; i < kMostChunks / kGroups; ++i) {
      const int further = i * kGroups * kChannels;
      if (first + i * kGroups < chunks) body(row, first_channel + channel + further, at + further * 2);
    }
  }

  // --- Weights and vectors, once a part ---

  __device__ __forceinline__ void load_weights() const {
    const ClusterVectors vectors{hidden_sums(), &down_bias(0), &down_sum(0), &up_bias(0), &out_gain(0)};
    load_quarter<T, Wide>(
        d, part, first_channel, chunks, vectors,
        [&](int j, int i) { return reinterpret_cast<T*>(down_weight() + j * kPitch) + i; },
        [&](int i, int j) { return reinterpret_cast<T*>(up_weight() + i * kHiddenPitch) + j; });
    if (!out_normed()) return;
    // The second norm's gain in two parts, so that pairs of elements are multiplied by it and rounded once.
    const int channel = threadIdx.x;
    const float gain = channel < chunks * kChannels ? out_gain(channel) : 0.0f;
    __syncthreads();
    if (channel < chunks * kChannels) {
      out_gain(0, channel) = from_float<T>(gain);
      out_gain(1, channel) = from_float<T>(gain - to_float(out_gain(0, channel)));
    }
    for (int i = threadIdx.x; i < chunks * kChannels * kBesides; i += kThreads) {
      const int row = i / (chunks * kChannels), channel = i % (chunks * kChannels);
      const T large = from_float<T>(up_bias(channel));
      T* to = reinterpret_cast<T*>(besides() + row * kPitch) + channel;
      *to = row == 1 ? large : from_float<T>(row == 0 ? 1.0f : row == 2 ? up_bias(channel) - to_float(large) : 0.0f);
    }
  }
  __device__ __forceinline__ float& up_bias(int channel) const {
    return shared_at<float>(kChannelVectors)[channel];
  }  // times factor
  __device__ __forceinline__ float& out_gain(int channel) const {
    return shared_at<float>(kChannelVectors)[kMostChunks * kChannels + channel];
  }
  __device__ __forceinline__ T& out_gain(int part, int channel) const {
    return shared_at<T>(kChannelVectors + kMostChunks * kChannels * 4)[part * kMostChunks * kChannels + channel];
  }
  __device__ __forceinline__ float& down_bias(int j) const { return shared_at<float>(kHiddenVectors)[j]; }
  __device__ __forceinline__ float& down_sum(int j) const { return shared_at<float>(kHiddenVectors)[kMostHidden + j]; }
  __device__ __forceinline__ float& dz_total(int j) const {
    return shared_at<float>(kHiddenVectors)[2 * kMostHidden + j];
  }
  __device__ __forceinline__ float& mean_total(int j) const {
    return shared_at<float>(kHiddenVectors)[3 * kMostHidden + j];
  }

  // --- Rows ---

  __device__ __forceinline__ const RowTensor& other() const {
    return d.input_residual.data ? d.input_residual : d.residual;
  }

  // A row of a tile to come, looked up early and noted late: memory is far.
  struct Row {
    int64_t m = -1;
    float found[kStatistics] = {};
  };
  __device__ __forceinline__ Row look_up(int first) const {
    Row row;
    const int place = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= kTile || place >= part.rows) return row;
    row.m = row_of(d, part.begin + place);
    const float* from = d.statistics + row.m;
    if (normed()) {
      row.found[kMean] = from[0], row.found[kRstd] = from[d.rows];
      from += 2 * d.rows;
    }
    if (out_normed()) row.found[kOutMean] = from[0], row.found[kOutRstd] = from[d.rows];
    return row;
  }
  __device__ __forceinline__ void note(const Row& row, int numbered) const {
    if (threadIdx.x >= kTile) return;
    int64_t* to = shared_at<int64_t>(kNumbers) + numbered * 3 * kTile + threadIdx.x;
    to[0] = row.m;
    to[kTile] = row.m < 0 ? 0 : offset(d, d.x, row.m);
    to[2 * kTile] = row.m < 0 || !other().data ? 0 : offset(d, other(), row.m);
#pragma unroll
    for (int i = 0; i < kStatistics; ++i)
      shared_at<float>(kStatisticsAt)[(numbered * kStatistics + i) * kTile + threadIdx.x] = row.found[i];
  }

  // Starts the copies of a tile's rows; zeros where there is nothing.
  __device__ __forceinline__ void copy_rows(int tile) const {
    int thread = threadIdx.x;
    // Where registers are short, what follows from it is computed here, not held in them over the loop.
    if constexpr (!kPlain && Wide == kMostHidden) thread = ptx::hide(thread);
    const int row = thread / kPieces % kTile;
    const int64_t* rows = shared_at<int64_t>(kNumbers) + tile % kNumbered * 3 * kTile + row;
    const bool inside = rows[0] >= 0;
    const int c = first_channel + thread / kPieces / kTile * kChannels + thread % kPieces * V;
    const T* x = static_cast<const T*>(d.x.data) + rows[kTile] + c;
    const T* dout = static_cast<const T*>(d.dout) + (inside ? rows[0] * d.channels : 0) + c;
    const T* beside = kSlots == 3 && other().data ? static_cast<const T*>(other().data) + rows[2 * kTile] + c : nullptr;
    unsigned char* to = shared_memory() + stage_at(tile % kStages) + row * kPitch + (c - first_channel) * 2;
    const int left = inside ? d.channels - c : 0;
#pragma unroll
    for (int i = 0; i < kMostChunks / kGroups; ++i) {
      if ((c - first_channel) / kChannels + i * kGroups >= chunks) continue;
      constexpr int kFurther = kGroups * kChannels;
      const int bytes = i * kFurther < left ? 16 : 0;  // nothing is read where this is 0
      unsigned char* at = to + i * kFurther * 2;
      ptx::cp_async<16>(at, x + i * kFurther, bytes);
      ptx::cp_async<16>(at + kSlotBytes, dout + i * kFurther, bytes);
      if (beside) ptx::cp_async<16>(at + 2 * kSlotBytes, beside + i * kFurther, bytes);
    }
    ptx::cp_async_commit();
  }

  // x becomes s; other rows what y is added, where that is not s alone; dout is multiplied by the second norm's gain:
  // g.
  __device__ __forceinline__ void prepare() const {
    each_piece([&](int, int c, int at) {
      auto *x = reinterpret_cast<uint4*>(rows(kX) + at), *beside = reinterpret_cast<uint4*>(rows(kOther) + at);
      if (input() || (added() && skips())) {
        const uint4 s = *x, more = *beside;
        *(input() ? x : beside) = make_uint4(add_pair<T>(s.x, more.x), add_pair<T>(s.y, more.y),
                                             add_pair<T>(s.z, more.z), add_pair<T>(s.w, more.w));
      }
      if (!out_normed()) return;
      auto* gradient = reinterpret_cast<uint4*>(rows(kGradient) + at);
      const uint4 g = *gradient, large = *reinterpret_cast<const uint4*>(&out_gain(0, c - first_channel)),
                  small = *reinterpret_cast<const uint4*>(&out_gain(1, c - first_channel));
      const auto product = [](uint32_t pair, uint32_t by, uint32_t rest) {
        return ptx::fma_pair<T>(pair, by, ptx::fma_pair<T>(pair, rest, 0));
      };
      *gradient = make_uint4(product(g.x, large.x, small.x), product(g.y, large.y, small.y),
                             product(g.z, large.z, small.z), product(g.w, large.w, small.w));
    });
  }

  // What y is added: rows of a slot.
  __device__ __forceinline__ bool has_rest() const { return skips() || added(); }
  __device__ __forceinline__ Slot rest() const { return added() ? kOther : kX; }

  // --- Products ---

  // This quarter's part of x W_down^T (matrix 0) or of dl W_up (matrix 1), to the blocks that add it. A warp has the
  // sixteen columns from `column` on.
  template <int Matrix>
  __device__ __forceinline__ void multiply_partially(int column) const {
    float acc[kFragments][2][4] = {};
    const unsigned char* left = rows(Matrix == 0 ? kX : kGradient);
    const unsigned char* weight = Matrix == 0 ? down_weight() : up_weight();
#pragma unroll 1
    for (int k = 0; k < chunks; ++k) {
#pragma unroll
      for (int s = 0; s < kChunkBytes / 32; ++s) {
        uint32_t b[4];
        load_right<T, Matrix == 0>(b, weight, Matrix == 0 ? kPitch : kHiddenPitch, column, s);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const Operand<T> a = load_left<T>(left + f * 16 * kPitch + s * 32, kPitch);
          multiply<T>(acc[f][0], a, b[0], b[1]);
          multiply<T>(acc[f][1], a, b[2], b[3]);
        }
      }
      left += kChannels * 2, weight += kChannels * (Matrix == 0 ? 2 : kHiddenPitch);
    }
    float* to = partial(Matrix, rank, lane / 4 % kOwnRows) + column + lane % 4 * 2;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Eight rows belong to one block, or to two.
        const int owner = (f * 16 + half * 8 + lane / 4) / kOwnRows;
#pragma unroll
        for (int n = 0; n < 2; ++n)
          ptx::store_async(reinterpret_cast<float2*>(to + n * 8),
                           make_float2(acc[f][n][half * 2], acc[f][n][half * 2 + 1]), gathered(), owner);
      }
    }
  }

  // Sums over this quarter's channels of g and of g times what of y is known, by a warp, to the rows' owners. Of the
  // product of g and the rows that y is added the diagonal counts.
  __device__ __forceinline__ void sum_rows() const {
    float of_besides[kFragments][4] = {}, of_rest[kFragments][2][4] = {};
    const unsigned char *gradient = rows(kGradient), *added_rows = rows(rest()), *others = besides();
#pragma unroll 1
    for (int k = 0; k < chunks; ++k) {
#pragma unroll(Wide < 64 ? kChunkBytes / 32 : 1)  // registers
      for (int s = 0; s < kChunkBytes / 32; ++s) {
        uint32_t e[2];
        ptx::ldmatrix_x2(e, others + lane % 8 * kPitch + lane / 8 % 2 * 16 + s * 32);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const Operand<T> g = load_left<T>(gradient + f * 16 * kPitch + s * 32, kPitch);
          multiply<T>(of_besides[f], g, e[0], e[1]);
          if (!has_rest()) continue;
          uint32_t b[4];
          load_right<T, true>(b, added_rows, kPitch, f * 16, s);
          multiply<T>(of_rest[f][0], g, b[0], b[1]);
          multiply<T>(of_rest[f][1], g, b[2], b[3]);
        }
      }
      gradient += kChannels * 2, added_rows += kChannels * 2, others += kChannels * 2;
    }
    const int line = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = f * 16 + half * 8 + line;
        const float *e = of_besides[f] + half * 2, *r = of_rest[f][half] + half * 2;
        const float diagonal = quarter == line / 2 ? (line % 2 ? r[1] : r[0]) : 0.0f;
        const float of_gradient = quad_sum(quarter == 0 ? e[0] : 0.0f);
        const float of_product = quad_sum((quarter == 0 ? e[1] : quarter == 1 ? e[0] : 0.0f) + diagonal);
        if (quarter == 0)
          ptx::store_async(row_sums() + rank * kOwnRows + row % kOwnRows, make_float2(of_gradient, of_product),
                           gathered(), row / kOwnRows);
      }
    }
  }

  // Lanes have two neighbouring columns of the bottleneck, those that there are.
  __device__ __forceinline__ bool has_columns() const { return lane * 2 < Wide; }

  __device__ __forceinline__ float2& own_pair(int own_row, int rank) const {
    return reinterpret_cast<float2*>(partial(0, rank, own_row))[lane];
  }

  // The cluster's sum of a matrix in an own row.
  __device__ __forceinline__ void gather(float (&to)[2], int matrix, int own_row) const {
    to[0] = to[1] = 0.0f;
    if (!has_columns()) return;
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const float2 of_rank = *reinterpret_cast<const float2*>(partial(matrix, r, own_row) + lane * 2);
      to[0] += of_rank.x, to[1] += of_rank.y;
    }
  }

  // Tells the cluster a row of the bottleneck or of its gradient; `values` become what they were rounded to.
  __device__ __forceinline__ void tell(unsigned char* tile, int row, float (&values)[2]) const {
#pragma unroll
    for (float& value : values) value = to_float(from_float<T>(value));
    if (!has_columns()) return;
    const uint32_t both = pack<T>(values[0], values[1]);
#pragma unroll
    for (int r = 0; r < kCluster; ++r)
      ptx::store_async(reinterpret_cast<uint32_t*>(tile + row * kHiddenPitch) + lane, both, told(), r);
  }
  __device__ __forceinline__ void tell(Norm norm, int row, float factor, float more) const {
    if (lane < kCluster) ptx::store_async(coefficients(norm) + row, make_float2(factor, more), told(), lane);
  }

  // Bytes that come in an exchange: of two matrices or one, and of what of a bottleneck is told.
  __device__ __forceinline__ void expect(bool first) const {
    if (threadIdx.x != 0) return;
    const int of_row = (first ? 2 : 1) * Wide * 4 + (first && out_normed() ? 8 : 0);
    const int answers = first && !out_normed() ? 2 : 1, averages = (first && out_normed()) || normed() ? 8 : 0;
    ptx::mbarrier_expect(gathered(), kCluster * kOwnRows * of_row);
    ptx::mbarrier_expect(told(), kTile * (answers * Wide * 2 + averages));
  }

  // Of an own row, over all tiles: sums of dz, two columns a lane, and of dz times the row's mean and rstd.
  __device__ __forceinline__ static float4* own_sums() { return shared_at<float4>(kOwnSums); }

  // dz, from da' and the slope, times the row's rstd where it is normalised, and what that norm's gradient subtracts.
  __device__ __forceinline__ void tell_gradient(int own_row, const float (&da)[2], const float (&slopes)[2],
                                                const float (&z)[2]) const {
    const int row = rank * kOwnRows + own_row;
    const float mean = normed() ? statistic(kMean, row) : 0.0f, rstd = normed() ? statistic(kRstd, row) : 1.0f;
    float dz[2], scaled[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      dz[h] = part.known ? da[h] * d.factor * slopes[h] : 0.0f;
      scaled[h] = dz[h] * rstd;
    }
    tell(dhidden(), row, scaled);
    float plain = 0.0f, with_normed = 0.0f;
    if (has_columns()) {
      float4& sums = own_sums()[own_row * 32 + lane];
      sums = make_float4(sums.x + dz[0], sums.y + dz[1], sums.z + scaled[0] * mean, sums.w + scaled[1] * mean);
#pragma unroll
      for (int h = 0; h < 2; ++h) plain += scaled[h] * down_sum(lane * 2 + h), with_normed += scaled[h] * z[h];
    }
    if (!normed()) return;
    const float share = -1.0f / static_cast<float>(d.channels);
    const float factor = sum_of_warp(with_normed) * share * rstd;
    tell(kOfInput, row, factor, sum_of_warp(plain) * share - factor * mean);
  }

  // Of an own row, by a warp: the bottleneck, and its gradient or, with a norm of the result, what that norm subtracts.
  __device__ __forceinline__ void answer(int own_row) const {
    const int row = rank * kOwnRows + own_row;
    ptx::mbarrier_wait(gathered(), parity);
    float z[2], slopes[2], a[2], da[2];
    gather(z, 0, own_row);
    gather(da, 1, own_row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = lane * 2 + h;
      if (normed() && has_columns()) z[h] = (z[h] - statistic(kMean, row) * down_sum(j)) * statistic(kRstd, row);
      const bool inside = part.known && j < d.bottleneck && number(row) >= 0;
      const float rounded = inside ? to_float(from_float<T>(z[h] + down_bias(j))) : 0.0f;
      a[h] = slopes[h] = 0.0f;
      if (inside) activate(rounded, d.activation, a[h], slopes[h]);
    }
    tell(hidden(), row, a);
    if (!out_normed()) {
      tell_gradient(own_row, da, slopes, z);
      return;
    }
    // The lane's own part of z has been read and keeps what the second exchange needs.
    if (has_columns())
      own_pair(own_row, 0) = make_float2(z[0], z[1]), own_pair(own_row, 1) = make_float2(slopes[0], slopes[1]);
    // g dout y summed: of what was known before the bottleneck was, and of the bottleneck.
    float of_gradient = 0.0f, of_product = a[0] * da[0] * d.factor + a[1] * da[1] * d.factor;
    if (lane < kCluster) {
      const float2 sums = row_sums()[lane * kOwnRows + own_row];
      of_gradient = sums.x, of_product += sums.y;
    }
    of_gradient = sum_of_warp(of_gradient), of_product = sum_of_warp(of_product);
    const float mean = statistic(kOutMean, row), rstd = statistic(kOutRstd, row);
    const float share = -rstd / static_cast<float>(d.channels);
    const float factor = (of_product - mean * of_gradient) * rstd * rstd * share;
    const float more = of_gradient * share - mean * factor;
    const bool inside = number(row) >= 0;
    tell(kOfResult, row, inside ? factor : 0.0f, inside ? more : 0.0f);
  }
  __device__ __forceinline__ void answer_again(int own_row) const {
    ptx::mbarrier_wait(gathered(), parity);
    float da[2], z[2] = {}, slopes[2] = {};
    gather(da, 1, own_row);
    if (has_columns()) {
      z[0] = own_pair(own_row, 0).x, z[1] = own_pair(own_row, 0).y;
      slopes[0] = own_pair(own_row, 1).x, slopes[1] = own_pair(own_row, 1).y;
    }
    tell_gradient(own_row, da, slopes, z);
  }

  static constexpr int kAcross = kWarps / kFragments;
  // Of the two rows that a lane has of products.
  __device__ __forceinline__ int product_row(int half) const { return warp / kAcross * 16 + lane / 4 + half * 8; }

  // body(channel of the quarter, place of a lane's row of the block in a slot, sums) for one block of 16 x 16 elements
  // after another of left (rows, bottleneck) times a weight; sums [n][2 half + i] are of columns 8 n, rows 8 half and
  // begin with start[half].
  template <bool Up, class Body>
  __device__ __forceinline__ void expand(const unsigned char* left, const float (&start)[2], Body body) const {
    const int row = warp / kAcross * 16;
    const int at = (row + lane % 16) * kPitch + lane / 16 * 16;
#pragma unroll 1
    for (int block = warp % kAcross; block < chunks * 4; block += kAcross) {
      const int column = block * 16;
      float acc[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[0][i] = acc[1][i] = start[i / 2];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        // Loaded for every block, of which a warp has two at most: registers.
        const Operand<T> a = load_left<T>(left + row * kHiddenPitch + s * 32, kHiddenPitch);
        uint32_t b[4];
        if constexpr (Up) {
          load_right<T, true>(b, up_weight(), kHiddenPitch, column, s);
        } else {
          load_right<T, false>(b, down_weight(), kPitch, column, s);
        }
        multiply<T>(acc[0], a, b[0], b[1]);
        multiply<T>(acc[1], a, b[2], b[3]);
      }
      body(column, at + column * 2, acc);
    }
  }

  // Elements of a block as sums have them: those of acc[n][2 half], acc[n][2 half + 1] are pair 2 n + half.
  __device__ __forceinline__ void load_block(uint32_t (&pairs)[4], Slot slot, int at) const {
    ptx::ldmatrix_x4(pairs, rows(slot) + at);
  }
  __device__ __forceinline__ void store_block(Slot slot, int at, const float (&acc)[2][4]) const {
    const uint32_t pairs[4] = {pack<T>(acc[0][0], acc[0][1]), pack<T>(acc[0][2], acc[0][3]),
                               pack<T>(acc[1][0], acc[1][1]), pack<T>(acc[1][2], acc[1][3])};
    ptx::stmatrix_x4(rows(slot) + at, pairs);
  }

  // The result again, and through its norm: dl = (g - average - (y - mean) rstd average_normed) rstd. Zeros in rows
  // that there are not.
  __device__ __forceinline__ void through_norm() const {
    float rstd[2];
    float2 of_row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rstd[half] = statistic(kOutRstd, product_row(half)), of_row[half] = coefficients(kOfResult)[product_row(half)];
    const float nothing[2] = {};
    expand<true>(hidden(), nothing, [&](int column, int at, float (&acc)[2][4]) {
      uint32_t g[4], more[4];
      load_block(g, kGradient, at);
      if (has_rest()) load_block(more, rest(), at);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 bias = *reinterpret_cast<const float2*>(&up_bias(column + n * 8 + lane % 4 * 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 y = bias;
          if (has_rest()) {
            const float2 rest = unpack<T>(more[n * 2 + half]);
            y.x += rest.x, y.y += rest.y;
          }
          float (&sums)[4] = acc[n];
          y.x += sums[half * 2] * d.factor, y.y += sums[half * 2 + 1] * d.factor;
          const float2 gradient = unpack<T>(g[n * 2 + half]);
          sums[half * 2] = gradient.x * rstd[half] + (y.x * of_row[half].x + of_row[half].y);
          sums[half * 2 + 1] = gradient.y * rstd[half] + (y.y * of_row[half].x + of_row[half].y);
        }
      }
      store_block(kGradient, at, acc);
    });
  }

  // dx, in the place of x.
  __device__ __forceinline__ void through_down() const {
    float factor[2] = {}, more[2] = {};
    if (normed()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 of_row = coefficients(kOfInput)[product_row(half)];
        factor[half] = of_row.x, more[half] = of_row.y;
      }
    }
    expand<false>(dhidden(), more, [&](int, int at, float (&ds)[2][4]) {
      uint32_t x[4], dl[4];
      if (normed()) load_block(x, kX, at);
      if (skips()) load_block(dl, kGradient, at);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        float &first = ds[i / 4][i % 4], &second = ds[i / 4][i % 4 + 1];
        if (normed()) {
          const float2 s = unpack<T>(x[i / 2]);
          first += s.x * factor[i / 2 % 2], second += s.y * factor[i / 2 % 2];
        }
        if (skips()) {
          const float2 beside = unpack<T>(dl[i / 2]);
          first += beside.x, second += beside.y;
        }
      }
      store_block(kX, at, ds);
    });
  }

  __device__ __forceinline__ void store_rows(void* to, Slot slot) const {
    each_piece([&](int row, int c, int at) {
      const int64_t m = number(row);
      if (m < 0 || c >= d.channels) return;
      *reinterpret_cast<uint4*>(static_cast<T*>(to) + m * d.channels + c) =
          *reinterpret_cast<const uint4*>(rows(slot) + at);
    });
  }
};

template <class T, int Most, int Wide, Place kPlace>
__device__ __forceinline__ void one_pass(const Adapter& d) {
  using Own = Pass<T, Most, Wide, kPlace>;
  Own pass(d);
  if (pass.part.adapter > d.adapters + 1) return;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(pass.gathered(), 1);
    ptx::mbarrier_init(pass.told(), 1);
    ptx::mbarrier_fence();
  }
  for (int i = 0; i < 3; ++i) pass.note(pass.look_up(i * kTile), i);
  __syncthreads();
  pass.copy_rows(0);
  pass.load_weights();

  // A warp's sixteen channels of dz^T u and dl^T a, turned, and the sums of dl.
  constexpr int kBlocks = Wide / 8;
  float of_down[kBlocks][4] = {}, of_up[kBlocks][4] = {}, of_dl[4] = {};
  const uint32_t ones = pack<T>(1.0f, 1.0f);
  const bool want_up = d.up_parts || d.dl_parts, has_block = kWarps - 1 - pass.warp < pass.chunks * 4;
  const int lane = pass.lane, warp = pass.warp;
  // The first warps have the partial products, the last ones the weights' channels and the cluster's rows.
  const int block = kWarps - 1 - warp, own_row = block;
  const bool has_row = own_row < Own::kOwnRows;
  if (has_row) pass.own_sums()[own_row * 32 + lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  // Tile i begins while tile i - 1 ends.
#pragma unroll 1
  for (int i = 0; (i - 1) * kTile < pass.part.rows; ++i) {
    const bool begins = i * kTile < pass.part.rows, ends = i > 0, more = (i + 1) * kTile < pass.part.rows;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (begins) {
      if (Own::kStages == 3 && more) pass.copy_rows(i + 1);
      pass.take(i);
      pass.expect(true);
      if (!Own::kPlain) {
        pass.prepare();
        __syncthreads();
      }
      if (warp < Own::kSteps) {
        pass.template multiply_partially<0>(warp * 16);
      } else if (warp < 2 * Own::kSteps) {
        pass.template multiply_partially<1>((warp - Own::kSteps) * 16);
      } else if (warp == 2 * Own::kSteps && pass.out_normed()) {
        pass.sum_rows();
      }
    }
    if (ends) {
      pass.take(i - 1);
      const auto later = pass.look_up((i + 2) * kTile);
      if (has_block && (d.down_parts || want_up)) {
        const unsigned char *x = pass.rows(kX), *dl = pass.rows(kGradient);
        const auto add = [&](float (&acc)[kBlocks][4], const Operand<T>& left, const unsigned char* right, int s) {
#pragma unroll
          for (int n = 0; n < kBlocks; n += 2) {
            uint32_t b[4];
            load_right<T, false>(b, right, Own::kHiddenPitch, n * 8, s);
            multiply<T>(acc[n], left, b[0], b[1]);
            multiply<T>(acc[n + 1], left, b[2], b[3]);
          }
        };
        if (d.down_parts) {
#pragma unroll 1
          for (int s = 0; s < Own::kFragments; ++s)
            add(of_down, load_left_turned<T>(x, Own::kPitch, block * 16, s), pass.dhidden(), s);
        }
        if (want_up) {
#pragma unroll 1
          for (int s = 0; s < Own::kFragments; ++s) {
            const Operand<T> left = load_left_turned<T>(dl, Own::kPitch, block * 16, s);
            multiply<T>(of_dl, left, ones, ones);
            add(of_up, left, pass.hidden(), s);
          }
        }
      }
      pass.note(later, (i + 2) % kNumbered);
    }
    if (begins) {
      pass.take(i);
      if (has_row) pass.answer(own_row);
    }
    if (ends) {
      pass.take(i - 1);
      if (d.dy) pass.store_rows(d.dy, kGradient);
      __syncthreads();
      if (d.dx) {
        pass.through_down();
        __syncthreads();
        pass.store_rows(d.dx, kX);
      }
    }
    // A thread copies where it was the last to read.
    if (Own::kStages == 2 && more) pass.copy_rows(i + 1);
    if (begins) {
      pass.take(i);
      ptx::mbarrier_wait(pass.told(), pass.parity);
      pass.parity ^= 1;
      if (pass.out_normed()) {
        pass.expect(false);
        pass.through_norm();
        __syncthreads();
        if (warp < Own::kSteps) pass.template multiply_partially<1>(warp * 16);
        if (has_row) pass.answer_again(own_row);
        ptx::mbarrier_wait(pass.told(), pass.parity);
        pass.parity ^= 1;
      }
    }
  }

  // Sums of own rows, over rows and blocks in their order.
  ptx::cluster_sync();
  if (const int j = threadIdx.x; j < Wide) {
    float total = 0.0f, with_mean = 0.0f;
    for (int r = 0; r < kCluster; ++r) {
      const float* sums = reinterpret_cast<const float*>(ptx::of_rank(pass.own_sums(), r)) + j / 2 * 4 + j % 2;
      for (int row = 0; row < Own::kOwnRows; ++row) total += sums[row * 128], with_mean += sums[row * 128 + 2];
    }
    pass.mean_total(j) = with_mean;
    pass.dz_total(j) = total;
    if (pass.rank == 0 && pass.part.known && d.bias_parts && j < d.bottleneck)
      d.bias_parts[Part::number() * d.bottleneck + j] = total;
  }
  ptx::cluster_sync();  // nobody leaves while its memory is read
  if (!pass.part.known || !has_block) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = pass.first_channel + block * 16 + lane / 4 + half * 8;
    if (c >= d.channels) continue;
    const int64_t first = Part::number() * d.bottleneck * d.channels;
    const float gain = pass.normed() ? parameter<T>(d.norm_weight, c) : 1.0f;
    const float bias = pass.normed() && d.norm_bias.data ? parameter<T>(d.norm_bias, c) : 0.0f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = n * 8 + lane % 4 * 2 + e, i = half * 2 + e;
        if (j >= d.bottleneck) continue;
        if (d.down_parts)
          d.down_parts[first + int64_t{j} * d.channels + c] =
              gain * (of_down[n][i] - pass.mean_total(j)) + bias * pass.dz_total(j);
        if (d.up_parts) d.up_parts[first + int64_t{c} * d.bottleneck + j] = of_up[n][i] * d.factor;
      }
    }
    if (d.dl_parts && lane % 4 == 0) d.dl_parts[Part::number() * d.channels + c] = of_dl[half * 2] * d.factor;
  }
}

#endif

template <class T, int Most, int Wide, Place kPlace>
__global__ void __launch_bounds__(kThreads, 1) cluster_backward_kernel(const __grid_constant__ Adapter d) {
#ifdef MMK_CLUSTERS
  one_pass<T, Most, Wide, kPlace>(d);
#endif
}

// body(kernel, bytes of shared memory)
template <class T, int Most, Place kPlace, class Body>
int with_wide(const Adapter& d, Body body) {
  const auto with = [&](auto wide) {
    constexpr int kWide = decltype(wide)::value;
    return body(cluster_backward_kernel<T, Most, kWide, kPlace>, Layout<Most, kWide, kPlace>::kBytes);
  };
  if (wide_of(d) == 32) return with(std::integral_constant<int, 32>{});
  if (wide_of(d) == 48) return with(std::integral_constant<int, 48>{});
  return with(std::integral_constant<int, 64>{});
}

template <class Body>
int with_kernel(Dtype dtype, const Adapter& d, Body body) {
  const auto with_place = [&](auto zero, auto place) {
    using T = decltype(zero);
    constexpr Place kPlace = decltype(place)::value;
    return chunks_of(d) == kMostChunks ? with_wide<T, kMostChunks, kPlace>(d, body)
                                       : with_wide<T, kMostChunks - 1, kPlace>(d, body);
  };
  const auto with_type = [&](auto place) {
    return dtype == Dtype::bf16 ? with_place(bf16{}, place) : with_place(fp16{}, place);
  };
  const bool norm = d.norm_weight.data, out_norm = d.out_weight.data, input = d.input_residual.data;
  if (!norm && !out_norm && !input) return with_type(std::integral_constant<Place, Place::kPlain>{});
  if (norm && out_norm && input && d.skip == 3) return with_type(std::integral_constant<Place, Place::kPfeiffer>{});
  return with_type(std::integral_constant<Place, Place::kAny>{});
}

}  // namespace
}  // namespace mmk::adapter

int mmk_adapter_cluster_tile(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, int* clusters) {
  using namespace mmk::adapter;
  const Adapter& d = *adapter;
  const bool input = d.input_residual.data, added = d.residual.data && d.out_weight.data;
  if (!served_by_clusters(dtype, d) || (input && added) || (input ? d.skip % 3 != 0 : d.skip > 1)) return 0;
  *clusters = with_kernel(dtype, d, [](auto kernel, int bytes) {
    return bytes > mmk_shared_memory() ? 0 : mmk::most_clusters(kCluster, kernel, dim3(kThreads), bytes);
  });
  return *clusters ? kTile : 0;
}

int mmk_adapter_cluster_backward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  using namespace mmk::adapter;
  if (d->parts * kCluster > INT_MAX) return 1;
  return with_kernel(dtype, *d, [&](auto kernel, int bytes) {
    return mmk::launch_clusters(kCluster, kernel, dim3(static_cast<unsigned>(d->parts * kCluster)), dim3(kThreads),
                                bytes, stream, *d);
  });
}
