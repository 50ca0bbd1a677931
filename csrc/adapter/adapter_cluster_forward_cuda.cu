// The forward of adapters with a narrow bottleneck, for 16-bit rows and compute capability 9.0 and newer. Four blocks
// are a cluster and have a quarter of the channels each; both weights' quarters stay in shared memory for all rows of a
// part. A block's warps are teams of four, each with its own tiles of 32 rows: while one waits for memory or for the
// cluster, the others work. Three times a tile numbers of rows pass through the cluster, by st.async: partial products
// with the rows' moments to the block that adds a row up, the bottleneck from it to all, and the moments of the result.
// mmkernels/ops/adapter/README.md has the algebra and the time model.
#include <climits>

#include "adapter/adapter_cluster.cuh"

namespace mmk::adapter {
namespace {

constexpr int kTile = kClusterTile, kTeam = 128, kMostTeams = 4, kOwnRows = kTile / kCluster;

// Shared memory, in bytes: vectors of the block, the order of few items, both weights, then of each team the mbarriers,
// numbers of the rows of two tiles, moments of own rows, of the result and what they give, partial products, the
// bottleneck, two tiles.
constexpr int kFewAt = (3 * kMostChunks * kChannels + 4 * kMostHidden) * 4;
constexpr int kFewBytes = (3 * kFewItems + 4) * 4, kWeightsAt = kFewAt + kFewBytes;
constexpr int kNumbersAt = 32, kMomentsAt = kNumbersAt + 2 * kTile * 4;
constexpr int kOutMomentsAt = kMomentsAt + kCluster * kOwnRows * 8,
              kAveragesAt = kOutMomentsAt + kCluster * 2 * kTile * 8;
constexpr int kPartialAt = kAveragesAt + kTile * 8;

struct Layout {
  int wide, up_pitch, pitch, weights, hidden_at, rows_at, team;

  __host__ __device__ __forceinline__ Layout(int chunks, int wide)
      : wide(wide),
        up_pitch(wide * 2 + 16),
        pitch(chunks * kChannels * 2 + 16),
        weights(wide * pitch + chunks * kChannels * up_pitch),
        hidden_at(kPartialAt + kTile * (wide + 8) * 4),
        rows_at(hidden_at + kTile * up_pitch),
        team(rows_at + 2 * kTile * pitch) {}
  int64_t bytes(int teams) const { return kWeightsAt + weights + int64_t{teams} * team; }
};

#ifdef MMK_CLUSTERS

// A mean and a sum of squared deviations from it are a row's moments.

template <class T, int Wide>
struct Team {
  static constexpr int V = kWide<T>, kSteps = Wide / 16, kPitch = Wide + 8, kUpPitch = Wide * 2 + 16;
  const Adapter& d;
  const Part& part;
  const int chunks, first_channel, rank, team, thread, lane, warp;
  const Layout layout;
  const float of_columns, of_block;  // one over channels
  unsigned char *down_weight, *up_weight, *own;

  __device__ __forceinline__ Team(const Adapter& d, const Part& part, int rank)
      : d(d),
        part(part),
        chunks(chunks_of(d)),
        first_channel(rank * chunks * kChannels),
        rank(rank),
        team(threadIdx.x / kTeam),
        thread(threadIdx.x % kTeam),
        lane(threadIdx.x % 32),
        warp(threadIdx.x % kTeam / 32),
        layout(chunks, Wide),
        of_columns(share(0, d.channels)),
        of_block(share(first_channel, chunks * kChannels)) {
    down_weight = shared_memory() + kWeightsAt;
    up_weight = down_weight + Wide * layout.pitch;
    own = shared_memory() + kWeightsAt + layout.weights + team * layout.team;
  }

  __device__ __forceinline__ bool normed() const { return d.norm_weight.data; }
  __device__ __forceinline__ bool out_normed() const { return d.out_weight.data; }
  __device__ __forceinline__ bool two_inputs() const { return d.input_residual.data || d.residual.data; }
  __device__ __forceinline__ void sync() const { ptx::named_barrier(1 + team, kTeam); }

  static __device__ __forceinline__ ClusterVectors vectors() {
    auto* v = reinterpret_cast<float*>(shared_memory());
    constexpr int kOfChannels = kMostChunks * kChannels;
    float* hidden = v + 3 * kOfChannels;
    return {hidden, hidden + 2 * kMostHidden, hidden + 3 * kMostHidden, v, v + kOfChannels};
  }
  static __device__ __forceinline__ Few& few() { return *reinterpret_cast<Few*>(shared_memory() + kFewAt); }
  static __device__ __forceinline__ float* out_bias() {
    return reinterpret_cast<float*>(shared_memory()) + 2 * kMostChunks * kChannels;
  }
  __device__ __forceinline__ uint64_t* gathered() const { return reinterpret_cast<uint64_t*>(own); }
  __device__ __forceinline__ uint64_t* told() const { return gathered() + 1; }
  __device__ __forceinline__ uint64_t* measured() const { return gathered() + 2; }
  __device__ __forceinline__ int* numbers(int slot) const {
    return reinterpret_cast<int*>(own + kNumbersAt) + slot * kTile;
  }
  __device__ __forceinline__ float2* moments(int rank) const {
    return reinterpret_cast<float2*>(own + kMomentsAt) + rank * kOwnRows;
  }
  // Of the result, of half of a block's channels.
  __device__ __forceinline__ float2* out_moments(int rank, int half) const {
    return reinterpret_cast<float2*>(own + kOutMomentsAt) + (rank * 2 + half) * kTile;
  }
  __device__ __forceinline__ float2* averages() const { return reinterpret_cast<float2*>(own + kAveragesAt); }
  __device__ __forceinline__ float* partial(int rank, int own_row) const {
    return reinterpret_cast<float*>(own + kPartialAt) + (rank * kOwnRows + own_row) * kPitch;
  }
  __device__ __forceinline__ unsigned char* hidden() const { return own + layout.hidden_at; }
  __device__ __forceinline__ unsigned char* rows(int buffer) const {
    return own + layout.rows_at + buffer * kTile * layout.pitch;
  }
  // Channels from c on, of `size`, and one over that.
  __device__ __forceinline__ float count(int c, int size) const {
    return static_cast<float>(max(min(d.channels - c, size), 0));
  }
  __device__ __forceinline__ float share(int c, int size) const {
    return 1.0f / static_cast<float>(max(min(d.channels - c, size), 1));
  }

  // --- Rows ---

  __device__ __forceinline__ void note(int tile, int slot) const {
    if (warp != 3) return;
    const int place = tile * kTile + lane;
    int row = -1;
    if (place < part.rows && d.mode == Mode::few) {
      const auto p = static_cast<unsigned>(part.begin) + place, of_item = static_cast<unsigned>(d.group_rows);
      row = static_cast<int>(few().order[p / of_item] * of_item + p % of_item);
    } else if (place < part.rows) {
      row = static_cast<int>(row_of(d, part.begin + place));
    }
    numbers(slot)[lane] = row;
  }
  __device__ __forceinline__ int64_t row_offset(const RowTensor& t, int m) const {
    if (t.example == t.row * d.length) return m * t.row;
    const auto length = static_cast<unsigned>(d.length);
    return m / length * t.example + m % length * t.row;
  }
  // body(row) for the rows of which this thread has pieces.
  template <class Body>
  __device__ __forceinline__ void each_row(Body body) const {
    constexpr int kAtOnce = kTeam / kPieces;
#pragma unroll
    for (int i = 0; i < kTile / kAtOnce; ++i) body(i * kAtOnce + thread / kPieces);
  }
  // Starts the copies of a tile's rows; zeros where there is nothing.
  __device__ __forceinline__ void copy_rows(const RowTensor& t, int slot, int buffer) const {
    const int c = first_channel + thread % kPieces * V;
    each_row([&](int row) {
      const int m = numbers(slot)[row], left = m < 0 ? 0 : d.channels - c;
      const T* from = static_cast<const T*>(t.data) + (m < 0 ? 0 : row_offset(t, m)) + c;
      unsigned char* to = rows(buffer) + row * layout.pitch + thread % kPieces * 16;
#pragma unroll
      for (int k = 0; k < kMostChunks; ++k)
        if (k < chunks) ptx::cp_async<16>(to + k * 128, from + k * kChannels, k * kChannels < left ? 16 : 0);
    });
  }
  __device__ __forceinline__ const RowTensor& other() const {
    return d.input_residual.data ? d.input_residual : d.residual;
  }

  // Of two tensors the sum, s or what y is added, in the second one's place; moments of s go to the rows' owners.
  __device__ __forceinline__ void prepare(int buffer) const {
    const bool input = d.input_residual.data, sum = input || (d.skip & 1);
    if (!normed() && !(two_inputs() && sum)) return;
    const int c = first_channel + thread % kPieces * V;
    each_row([&](int row) {
      uint4 s[kMostChunks];
      float total = 0.0f;
#pragma unroll
      for (int k = 0; k < kMostChunks; ++k) {
        s[k] = make_uint4(0, 0, 0, 0);
        if (k >= chunks) continue;
        const int at = row * layout.pitch + k * 128 + thread % kPieces * 16;
        s[k] = *reinterpret_cast<const uint4*>(rows(0) + at);
        if (!two_inputs()) {
          if (buffer) s[k] = *reinterpret_cast<const uint4*>(rows(1) + at);
        } else if (sum) {
          auto* to = reinterpret_cast<uint4*>(rows(1) + at);
          const uint4 more = *to;
          const uint4 both = make_uint4(add_pair<T>(s[k].x, more.x), add_pair<T>(s[k].y, more.y),
                                        add_pair<T>(s[k].z, more.z), add_pair<T>(s[k].w, more.w));
          *to = both;
          if (input) s[k] = both;
        }
        if (normed()) {
          const uint32_t pairs[4] = {s[k].x, s[k].y, s[k].z, s[k].w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 both = unpack<T>(pairs[e]);
            total += both.x + both.y;  // zeros behind the last channel
          }
        }
      }
      if (!normed()) return;
      const float mean = sum_of_row(total) * of_block;
      float squares = 0.0f;
#pragma unroll
      for (int k = 0; k < kMostChunks; ++k) {
        if (c + k * kChannels >= d.channels || k >= chunks) continue;
        const uint32_t pairs[4] = {s[k].x, s[k].y, s[k].z, s[k].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 both = unpack<T>(pairs[e]);
          squares += (both.x - mean) * (both.x - mean);
          squares += (both.y - mean) * (both.y - mean);
        }
      }
      squares = sum_of_row(squares);
      if (thread % kPieces == 0)
        ptx::store_async(moments(rank) + row % kOwnRows, make_float2(mean, squares), gathered(), row / kOwnRows);
    });
  }

  // --- Products ---

  // This quarter's part of the bottleneck, to the blocks that add it up. A warp has sixteen columns.
  __device__ __forceinline__ void multiply_down(const unsigned char* from) const {
    if (warp >= kSteps) return;
    float acc[2][2][4] = {};
    const unsigned char* weight = down_weight;
#pragma unroll 1
    for (int k = 0; k < chunks; ++k) {
#pragma unroll
      for (int s = 0; s < kChannels / 16; ++s) {
        uint32_t b[4];
        load_right<T, true>(b, weight, layout.pitch, warp * 16, s);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const Operand<T> a = load_left<T>(from + f * 16 * layout.pitch + s * 32, layout.pitch);
          multiply<T>(acc[f][0], a, b[0], b[1]);
          multiply<T>(acc[f][1], a, b[2], b[3]);
        }
      }
      from += kChannels * 2, weight += kChannels * 2;
    }
    float* to = partial(rank, lane / 4) + warp * 16 + lane % 4 * 2;
#pragma unroll
    for (int owner = 0; owner < kCluster; ++owner) {  // eight rows are a block's
      const int f = owner / 2, i = owner % 2 * 2;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ptx::store_async(reinterpret_cast<float2*>(to + n * 8), make_float2(acc[f][n][i], acc[f][n][i + 1]), gathered(),
                         owner);
    }
  }

  // Of an own row, by a warp: the bottleneck, to all blocks. Lanes have two neighbouring columns, those that
  // there are.
  __device__ __forceinline__ void answer(int own_row, int m) const {
    float z[2] = {}, mean = 0.0f, rstd = 1.0f;
    const bool has_columns = lane * 2 < Wide;
    if (has_columns) {
#pragma unroll
      for (int r = 0; r < kCluster; ++r) {
        const float2 of_rank = *reinterpret_cast<const float2*>(partial(r, own_row) + lane * 2);
        z[0] += of_rank.x, z[1] += of_rank.y;
      }
    }
    if (normed()) {
      float squares = 0.0f;
#pragma unroll
      for (int r = 0; r < kCluster; ++r)
        mean += moments(r)[own_row].x * count(r * chunks * kChannels, chunks * kChannels);
      mean *= of_columns;
#pragma unroll
      for (int r = 0; r < kCluster; ++r) {
        const float2 of_rank = moments(r)[own_row];
        squares +=
            of_rank.y + count(r * chunks * kChannels, chunks * kChannels) * (of_rank.x - mean) * (of_rank.x - mean);
      }
      rstd = rsqrtf(squares * of_columns + d.eps);
      if (lane == 0 && m >= 0) d.statistics[m] = mean, d.statistics[d.rows + m] = rstd;
    }
    if (!has_columns) return;
    float a[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = lane * 2 + h;
      const ClusterVectors v = vectors();
      if (normed()) z[h] = (z[h] - mean * v.down_sum[j]) * rstd;
      // Without an adapter nothing of a row may come through: 0 times infinity is not 0.
      const bool inside = part.known && j < d.bottleneck;
      a[h] = inside ? activated(to_float(from_float<T>(z[h] + v.down_bias[j])), d.activation) : 0.0f;
    }
    const uint32_t both = pack<T>(a[0], a[1]);
    auto* to = reinterpret_cast<uint32_t*>(hidden() + (rank * kOwnRows + own_row) * kUpPitch) + lane;
#pragma unroll
    for (int r = 0; r < kCluster; ++r) ptx::store_async(to, both, told(), r);
  }

  // The result of a tile in the place of what it was added to (`rest`). A warp has 16 rows of half of the channels.
  __device__ __forceinline__ void finish(unsigned char* rest, bool has_rest, const int* numbers, int parity) const {
    constexpr int kMostBlocks = kMostChunks * kChannels / 16;
    const int first_row = warp / 2 * 16, half = warp % 2, own_channels = chunks * kChannels / 2;
    const int first = half * own_channels, left = d.channels - first_channel - first;
    Operand<T> a[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) a[s] = load_left<T>(hidden() + first_row * kUpPitch + s * 32, kUpPitch);
    float y[kMostBlocks][4];
    const unsigned char* weight = up_weight + first * kUpPitch;
    const int row[2] = {first_row + lane / 4, first_row + lane / 4 + 8};
    unsigned char* at = rest + row[0] * layout.pitch + (first + lane % 4 * 2) * 2;
    const float2* bias = reinterpret_cast<const float2*>(vectors().up_bias + first + lane % 4 * 2);
    float total[2] = {};
#pragma unroll
    for (int n = 0; n < kMostBlocks; n += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = y[n + 1][i] = 0.0f;
      if (n * 8 >= own_channels) continue;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        load_right<T, true>(b, weight, kUpPitch, n * 8, s);
        multiply<T>(y[n], a[s], b[0], b[1]);
        multiply<T>(y[n + 1], a[s], b[2], b[3]);
      }
#pragma unroll
      for (int block = n; block < n + 2; ++block) {
        const float2 of_bias = bias[block * 4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2 more = of_bias;
          if (has_rest) {
            const float2 r = unpack<T>(*reinterpret_cast<const uint32_t*>(at + h * 8 * layout.pitch + block * 16));
            more.x += r.x, more.y += r.y;
          }
          y[block][h * 2] = y[block][h * 2] * d.factor + more.x;
          y[block][h * 2 + 1] = y[block][h * 2 + 1] * d.factor + more.y;
          if (block * 8 < left) total[h] += y[block][h * 2] + y[block][h * 2 + 1];
        }
      }
    }
    if (out_normed()) {
      const float of_warp = share(first_channel + first, own_channels);
      float mean[2], squares[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) mean[h] = quad_sum(total[h]) * of_warp;
#pragma unroll
      for (int block = 0; block < kMostBlocks; ++block) {
        if (block * 8 >= own_channels || block * 8 >= left) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) squares[i / 2] += (y[block][i] - mean[i / 2]) * (y[block][i] - mean[i / 2]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        squares[h] = quad_sum(squares[h]);
        ptx::store_async(out_moments(rank, half) + row[h], make_float2(mean[h], squares[h]), measured(), lane % 4);
      }
      ptx::mbarrier_wait(measured(), parity);
      // Eight rows a warp, four lanes each; a lane has a block's two.
      const int mine = warp * 8 + lane / 4, begin = lane % 4 * chunks * kChannels;
      const float2 parts[2] = {out_moments(lane % 4, 0)[mine], out_moments(lane % 4, 1)[mine]};
      const float counts[2] = {count(begin, own_channels), count(begin + own_channels, own_channels)};
      const float all = quad_sum(parts[0].x * counts[0] + parts[1].x * counts[1]) * of_columns;
      float deviations = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) deviations += parts[h].y + counts[h] * (parts[h].x - all) * (parts[h].x - all);
      const float rstd = rsqrtf(quad_sum(deviations) * of_columns + d.out_eps);
      if (lane % 4 == 0) {
        averages()[mine] = make_float2(-all * rstd, rstd);
        const int m = numbers[mine];
        if (m >= 0 && mine / kOwnRows == rank) {
          float* to = d.statistics + (normed() ? 2 * d.rows : 0);
          to[m] = all, to[d.rows + m] = rstd;
        }
      }
      sync();
      const float2 scale[2] = {averages()[row[0]], averages()[row[1]]};
      const float2* gain = reinterpret_cast<const float2*>(vectors().out_gain + first + lane % 4 * 2);
      const float2* shift = reinterpret_cast<const float2*>(out_bias() + first + lane % 4 * 2);
#pragma unroll
      for (int block = 0; block < kMostBlocks; ++block) {
        if (block * 8 >= own_channels) continue;
        const float2 g = gain[block * 4], b = shift[block * 4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          y[block][h * 2] = (y[block][h * 2] * scale[h].y + scale[h].x) * g.x + b.x;
          y[block][h * 2 + 1] = (y[block][h * 2 + 1] * scale[h].y + scale[h].x) * g.y + b.y;
        }
      }
    }
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      if (block * 8 >= own_channels) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t*>(at + h * 8 * layout.pitch + block * 16) =
            pack<T>(y[block][h * 2], y[block][h * 2 + 1]);
    }
  }

  __device__ __forceinline__ void store_rows(int buffer, int slot) const {
    const int c = first_channel + thread % kPieces * V;
    each_row([&](int row) {
      const int m = numbers(slot)[row], left = m < 0 ? 0 : d.channels - c;
      T* to = static_cast<T*>(d.out) + int64_t{max(m, 0)} * d.channels + c;
      const unsigned char* from = rows(buffer) + row * layout.pitch + thread % kPieces * 16;
#pragma unroll
      for (int k = 0; k < kMostChunks; ++k)
        if (k < chunks && k * kChannels < left)
          *reinterpret_cast<uint4*>(to + k * kChannels) = *reinterpret_cast<const uint4*>(from + k * 128);
    });
  }
};

template <class T, int Wide>
__device__ __forceinline__ void all_tiles(const Adapter& d) {
  static_assert(sizeof(Few) <= kFewBytes);
  const Part part = d.mode == Mode::few ? Part(d, Team<T, Wide>::few()) : Part(d);
  if (part.adapter > d.adapters + 1) return;
  const Team<T, Wide> team(d, part, ptx::cluster_rank());
  const int teams = blockDim.x / kTeam, pitch = team.layout.pitch;
  const bool two = team.two_inputs();
  if (team.thread == 0) {
    for (int i = 0; i < 3; ++i) ptx::mbarrier_init(team.gathered() + i, 1);
    ptx::mbarrier_fence();
  }
  team.note(team.team, 0);
  team.sync();
  if (team.team * kTile < part.rows) {
    team.copy_rows(d.x, 0, 0);
    if (two) team.copy_rows(team.other(), 0, 1);
  }
  ptx::cp_async_commit();
  load_quarter<T, Wide>(
      d, part, team.first_channel, team.chunks, team.vectors(),
      [&](int j, int i) { return reinterpret_cast<T*>(team.down_weight + j * pitch) + i; },
      [&](int i, int j) { return reinterpret_cast<T*>(team.up_weight + i * team.kUpPitch) + j; });
  for (int i = threadIdx.x; i < team.chunks * kChannels; i += blockDim.x) {
    const int c = team.first_channel + i;
    team.out_bias()[i] = c < d.channels && d.out_bias.data ? parameter<T>(d.out_bias, c) : 0.0f;
  }
  __syncthreads();
  // What the product reads, and what the result is added to and lies in.
  const bool summed = d.input_residual.data, has_rest = (d.skip & 1) || d.residual.data;
  int turn = 0;
#pragma unroll 1
  for (int tile = team.team; tile * kTile < part.rows; tile += teams, turn ^= 1) {
    const int next = tile + teams, buffer = two ? 1 : turn;
    ptx::cp_async_wait<0>();
    team.sync();
    if (team.thread == 0) {
      ptx::mbarrier_expect(team.gathered(), kTile * Wide * 4 + (team.normed() ? kTile * 8 : 0));
      ptx::mbarrier_expect(team.told(), kTile * Wide * 2);
      if (team.out_normed()) ptx::mbarrier_expect(team.measured(), kCluster * 2 * kTile * 8);
    }
    team.note(next, turn ^ 1);
    team.prepare(buffer);
    team.sync();
    if (!two) {
      if (next * kTile < part.rows) team.copy_rows(d.x, turn ^ 1, turn ^ 1);
      ptx::cp_async_commit();
    }
    team.multiply_down(team.rows(summed ? 1 : two ? 0 : turn));
    ptx::mbarrier_wait(team.gathered(), turn);
#pragma unroll 1
    for (int own_row = team.warp; own_row < kOwnRows; own_row += kTeam / 32)
      team.answer(own_row, team.numbers(turn)[team.rank * kOwnRows + own_row]);
    ptx::mbarrier_wait(team.told(), turn);
    // All of the team have multiplied: the cluster has their products.
    if (two) {
      if (next * kTile < part.rows) team.copy_rows(d.x, turn ^ 1, 0);
      ptx::cp_async_commit();
    }
    team.finish(team.rows(buffer), has_rest, team.numbers(turn), turn);
    team.sync();
    team.store_rows(buffer, turn);
    if (two) {
      team.sync();
      if (next * kTile < part.rows) team.copy_rows(team.other(), turn ^ 1, 1);
      ptx::cp_async_commit();
    }
  }
  ptx::cluster_sync();  // nobody leaves while others send to it
}

#endif

template <class T, int Wide>
__global__ void __launch_bounds__(kTeam* kMostTeams, 1) cluster_forward_kernel(const __grid_constant__ Adapter d) {
#ifdef MMK_CLUSTERS
  all_tiles<T, Wide>(d);
#endif
}

int teams_of(const Layout& layout) {
  int teams = kMostTeams;
  while (teams && layout.bytes(teams) > mmk_shared_memory()) --teams;
  return teams;
}

// body(kernel, teams, bytes of shared memory)
template <class T, class Body>
int with_kernel(const Adapter& d, Body body) {
  const Layout layout(chunks_of(d), wide_of(d));
  const int teams = teams_of(layout);
  if (teams == 0) return 0;
  if (layout.wide == 32) return body(cluster_forward_kernel<T, 32>, teams, layout.bytes(teams));
  if (layout.wide == 48) return body(cluster_forward_kernel<T, 48>, teams, layout.bytes(teams));
  return body(cluster_forward_kernel<T, 64>, teams, layout.bytes(teams));
}

template <class Body>
int with_kernel(Dtype dtype, const Adapter& d, Body body) {
  return dtype == Dtype::bf16 ? with_kernel<bf16>(d, body) : with_kernel<fp16>(d, body);
}

}  // namespace
}  // namespace mmk::adapter

int mmk_adapter_cluster_forward_slots(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter) {
  using namespace mmk::adapter;
  const Adapter& d = *adapter;
  const bool input = d.input_residual.data;
  if (!served_by_clusters(dtype, d) || (input && d.residual.data) || (input ? d.skip % 3 != 0 : d.skip > 1)) return 0;
  return with_kernel(dtype, d, [](auto kernel, int teams, int64_t bytes) {
    return mmk::most_clusters(kCluster, kernel, dim3(teams * kTeam), bytes);
  });
}

int mmk_adapter_cluster_forward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  using namespace mmk::adapter;
  if (d->parts * kCluster > INT_MAX) return 1;
  return with_kernel(dtype, *d, [&](auto kernel, int teams, int64_t bytes) {
    return mmk::launch_clusters(kCluster, kernel, dim3(static_cast<unsigned>(d->parts * kCluster)), dim3(teams * kTeam),
                                bytes, stream, *d);
  });
}
