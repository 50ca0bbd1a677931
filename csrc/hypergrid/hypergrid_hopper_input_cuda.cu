// The gradient of x for compute capability 9.0, 16-bit inputs: wgmma with dy in registers, where it meets the factors
// of its columns. README.md in mmkernels/ops/hypergrid has the schedule and the time model.
//
// A tile is 256 rows by Parts times Width columns, the columns of a part in one block of the grid: there each column of
// dy has one factor for 64 rows, so that the sum over the weight's rows is a single one and knows no blocks. Two blocks
// with the same rows are a cluster, each brings half of dy's tile for both. One thread of the third warpgroup brings
// tiles, three warps of it write factors; the first two own 128 rows each. Blocks stay and take one tile after another.
#include <algorithm>
#include <climits>

#include "common/cuda_device.h"
#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "hypergrid/hypergrid_device.cuh"

namespace mmk::hypergrid {
namespace {

constexpr int kRows = 256, kGroupRows = 64, kDepth = 64, kRowBytes = 128, kStages = 3;
constexpr int kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup, kConsumerWarps = kConsumers / 32;
constexpr int kFactorThreads = 96;  // three warps
constexpr int kTileColumns = 192, kLeftBytes = kRows * kRowBytes, kRightBytes = kTileColumns * kRowBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kStored = 16, kStoredPitch = 24;    // columns that a warp stores at a time; floats, free of conflicts
constexpr int kStoredFloats = 16 * kStoredPitch;  // of a warp

template <int Parts>
constexpr int kFactors = kRows / kGroupRows * Parts * kDepth;
template <int Width, int Parts>
constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + kFactors<Parts> * 2) +
                             kConsumerWarps * (kStoredFloats * 4 + 16 * Width * 2) + 2 * kStages * 8;

// How columns are cut: blocks of the grid in pieces of Width, parts of a tile, tiles.
struct Cut {
  int pieces, tiles;

  __host__ __device__ Cut(const Product& d, int width, int parts)
      : pieces((d.kq + width - 1) / width), tiles((d.q * pieces + parts - 1) / parts) {}
};

#ifdef MMK_HOPPER

template <class T, int Width, int Parts>
struct Work {
  unsigned char* stages;  // and whatever follows them at a constant distance, which takes no registers
  int cluster, rank, pieces, pairs, chunks;
  int tiles;  // of a cluster

  __device__ Work(const Product& d, int cluster) : cluster(cluster) {
    stages = ptx::align_to_1024(shared_memory());
    const Cut cut(d, Width, Parts);
    rank = ptx::cluster_rank();
    pieces = cut.pieces, pairs = (cut.tiles + cluster - 1) / cluster;
    tiles = static_cast<int>((d.rows + kRows - 1) / kRows) * pairs;
    chunks = (d.p * d.kp + kDepth - 1) / kDepth;
  }

  __device__ __forceinline__ uint64_t* full() const {
    return reinterpret_cast<uint64_t*>(stages + kStages * kStageBytes);
  }
  __device__ __forceinline__ uint64_t* empty() const { return full() + kStages; }
  // (stages, 64 rows, parts, depth); of 16 in the order that a quad's threads take them
  __device__ __forceinline__ T* factors() const { return reinterpret_cast<T*>(empty() + kStages); }
  // (consumer warps, rows, columns)
  __device__ __forceinline__ float* stored() const {
    return reinterpret_cast<float*>(factors() + kStages * kFactors<Parts>);
  }
  // (consumer warps, columns / 16, lanes, 8)
  __device__ __forceinline__ T* x() const { return reinterpret_cast<T*>(stored() + kConsumerWarps * kStoredFloats); }

  __device__ __forceinline__ int first_tile() const { return static_cast<int>(blockIdx.x) / cluster; }
  __device__ __forceinline__ int next_tile(int tile) const { return tile + static_cast<int>(gridDim.x) / cluster; }
  __device__ __forceinline__ int first_row(int tile) const { return tile / pairs * kRows; }
  // A part's block of the grid, which may be none, and its first column there.
  __device__ __forceinline__ int block(int tile, int part) const { return unit(tile, part) / pieces; }
  __device__ __forceinline__ int column(int tile, int part) const { return unit(tile, part) % pieces * Width; }

 private:
  __device__ __forceinline__ int unit(int tile, int part) const {
    return (tile % pairs * cluster + rank) * Parts + part;
  }
};

template <class Work, int Width, int Parts>
__device__ void bring_tiles(const Work& work, const ptx::TensorMap& left, const ptx::TensorMap& right) {
  int step = 0;
  for (int tile = work.first_tile(); tile < work.tiles; tile = work.next_tile(tile)) {
    const int row = work.first_row(tile);
    for (int chunk = 0; chunk < work.chunks; ++chunk, ++step) {
      const int stage = step % kStages, k = chunk * kDepth;
      unsigned char* to = work.stages + stage * kStageBytes;
      ptx::mbarrier_wait(work.empty() + stage, (step / kStages & 1) ^ 1);
      ptx::mbarrier_expect(work.full() + stage, kLeftBytes + Parts * Width * kRowBytes);
      if (work.cluster == 2) {
        ptx::copy_box_to_cluster(to + work.rank * (kLeftBytes / 2), left, k, 0, row + work.rank * (kRows / 2),
                                 work.full() + stage, 3);
      } else {
        ptx::copy_box(to, left, k, 0, row, work.full() + stage);
        ptx::copy_box(to + kLeftBytes / 2, left, k, 0, row + kRows / 2, work.full() + stage);
      }
#pragma unroll 1
      for (int part = 0; part < Parts; ++part)
        ptx::copy_box(to + kLeftBytes + part * (Width * kRowBytes), right, k, work.column(tile, part),
                      work.block(tile, part), work.full() + stage);
    }
  }
}

template <class T, class Work, int Width, int Parts>
__device__ void write_factors(const Product& d, const Work& work) {
  const int thread = threadIdx.x - kConsumers - 32, depth = d.p * d.kp;
  int step = 0;
  for (int tile = work.first_tile(); tile < work.tiles; tile = work.next_tile(tile)) {
    int numbers[kRows / kGroupRows];  // of each 64 rows: their gate, or -1
#pragma unroll
    for (int i = 0; i < kRows / kGroupRows; ++i) {
      const int row = work.first_row(tile) + i * kGroupRows;
      int64_t g = 0;
      if (row < d.rows) {
        g = d.gates.count == 1 && !d.gates.index ? 0 : row / d.gates.group_rows;
        if (d.gates.index) g = d.gates.index[g];
      }
      numbers[i] = g >= 0 && g < d.gates.count ? static_cast<int>(g) : -1;
    }
    // What the derivative of the activation will read at the tile's end.
#pragma unroll 1
    for (int i = thread; d.epilogue.activation && i < kRows * Parts; i += kFactorThreads) {
      const int row = work.first_row(tile) + i % kRows;
      const int q = work.block(tile, i / kRows), column = work.column(tile, i / kRows);
      if (row >= d.rows || q >= d.q) continue;
      const T* x = static_cast<const T*>(d.epilogue.x) + int64_t{row} * d.epilogue.x_row + q * d.kq + column;
      ptx::prefetch(x);
      ptx::prefetch(x + min(Width, d.kq - column) - 1);
    }
    for (int chunk = 0; chunk < work.chunks; ++chunk, ++step) {
      const int stage = step % kStages;
      ptx::mbarrier_wait(work.empty() + stage, (step / kStages & 1) ^ 1);
      T* table = work.factors() + stage * kFactors<Parts>;
#pragma unroll 1
      for (int i = thread; i < Parts * kDepth; i += kFactorThreads) {
        const int k = chunk * kDepth + i % kDepth, q = work.block(tile, i / kDepth), at = i % 16;
        const int place = i - at + at % 8 / 2 * 4 + at / 8 * 2 + at % 2;
        const bool inside = k < depth && q < d.q;  // elsewhere both operands are zeros
        const float* gates = d.gates.data + (inside ? k / d.kp * d.gates.stride[1] + q * d.gates.stride[2] : 0);
#pragma unroll
        for (int j = 0; j < kRows / kGroupRows; ++j)
          table[j * (Parts * kDepth) + place] = from_float<T>(!inside          ? 0.0f
                                                              : numbers[j] < 0 ? NAN
                                                                               : gates[numbers[j] * d.gates.stride[0]]);
      }
      ptx::mbarrier_arrive(work.full() + stage);
    }
  }
}

// Where a lane has 8 of the 16 columns of the result that a warp stores at a time. They begin with column n, `count`
// are the block's; rows are those of the warp from m on.
struct Own {
  int m, n;
  bool inside;

  __device__ __forceinline__ Own(const Product& d, int m, int n, int count)
      : m(m + static_cast<int>(threadIdx.x % 32 / 2)),
        n(n + at()),
        inside(this->m < d.rows && at() < count) {}  // blocks: multiples of 8
  __device__ static __forceinline__ int at() { return threadIdx.x % 2 * 8; }
};

template <class T>
__device__ __forceinline__ void store(const Product& d, float* stored, const T* x, const Own& own) {
  float* sums = stored + threadIdx.x % 32 / 2 * kStoredPitch + Own::at();
  if (!own.inside) return;
  const bool relu = d.epilogue.activation == 1 && !d.epilogue.seed;
  if (!relu && (d.epilogue.activation || d.epilogue.seed)) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i)  // once in the code
      sums[i] =
          through_activation(d.epilogue, sums[i], d.epilogue.activation ? to_float(x[i]) : 0.0f, own.m, own.n + i);
  }
  float out[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(sums + i);
    out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
  }
  if (relu) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= activation_slope(to_float(x[i]), 1);
  }
  *reinterpret_cast<uint4*>(static_cast<T*>(d.out) + int64_t{own.m} * (d.q * d.kq) + own.n) =
      make_uint4(pack<T>(out[0], out[1]), pack<T>(out[2], out[3]), pack<T>(out[4], out[5]), pack<T>(out[6], out[7]));
}

template <class T, class Work, int Width, int Parts>
__device__ void consume(const Product& d, const Work& work) {
  constexpr int kParts = 2, kSteps = kDepth / 16;  // of this warpgroup's rows, of a stage
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t keep_left = d.gates.residual != 0.0f ? 0xffffffffu : 0;
  // A lane's row of a fragment of dy, and where its 16 bytes lie in the swizzled 128 of a row: step xor this.
  const int left_row = group * (kRows / 2) + warp * 16 + lane % 16;
  float acc[kParts][Parts][Width / 2];
  uint32_t left[2][4];  // dy times its factors: what the tensor cores read, what comes next
  int step = 0;
  auto release = [&](int step, int blocks) {  // of the cluster: copies go into all
    __syncwarp();
    if (lane < blocks) ptx::mbarrier_arrive_at(work.empty() + step % kStages, lane);
  };
  for (int tile = work.first_tile(); tile < work.tiles; tile = work.next_tile(tile)) {
#pragma unroll 1
    for (int chunk = 0; chunk < work.chunks; ++chunk, ++step) {
      const int stage = step % kStages;
      const unsigned char *rows = work.stages + stage * kStageBytes, *columns = rows + kLeftBytes;
      const T* factors = work.factors() + stage * kFactors<Parts> + group * (kParts * Parts * kDepth) + lane % 4 * 4;
      ptx::mbarrier_wait(work.full() + stage, step / kStages & 1);
      uint32_t dy[4];
      uint2 pairs;
      auto load = [&](int count) {
        const int part = count % Parts, k = count / Parts % kSteps, h = count / Parts / kSteps;
        if (part == 0)
          ptx::ldmatrix_x4(dy,
                           rows + (left_row + h * kGroupRows) * kRowBytes + ((k * 2 + lane / 16) ^ (lane & 7)) * 16);
        pairs = *reinterpret_cast<const uint2*>(factors + (h * Parts + part) * kDepth + k * 16);
      };
      load(0);
#pragma unroll
      for (int count = 0; count < kParts * kSteps * Parts; ++count) {
        const int part = count % Parts, k = count / Parts % kSteps, h = count / Parts / kSteps, slot = count % 2;
        ptx::hold(dy);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          left[slot][i] = ptx::fma_pair<T>(dy[i], i < 2 ? pairs.x : pairs.y, dy[i] & keep_left);
        ptx::hold(left[slot]);
        ptx::wgmma_fence();
        ptx::wgmma_of_registers<T, false>(acc[h][part], left[slot],
                                          ptx::swizzled_descriptor(columns + part * (Width * kRowBytes) + k * 32),
                                          chunk > 0 || k > 0);
        ptx::wgmma_commit();
        if (count + 1 < kParts * kSteps * Parts) load(count + 1);
        ptx::wgmma_wait<1>();  // the other operand is free
        // The products of the stage before are done. (A branch here would make ptxas wait for every product.)
        if (count == 0) release(step + kStages - 1, chunk > 0 ? work.cluster : 0);
      }
    }
    ptx::wgmma_wait<0>();
    release(step - 1, work.cluster);
    float* stored = work.stored() + (threadIdx.x / 32) * kStoredFloats;
    T* x = work.x() + (threadIdx.x / 32) * (16 * Width) + lane * 8;  // of a part: what this lane will want
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      const int q = work.block(tile, part), column = work.column(tile, part);
      if (q >= d.q) continue;
#pragma unroll
      for (int h = 0; h < kParts; ++h) {
        const int m = work.first_row(tile) + (group * kParts + h) * kGroupRows + warp * 16;
        auto own = [&](int j) { return Own(d, m, q * d.kq + column + j * kStored, d.kq - column - j * kStored); };
        if (d.epilogue.activation) {
#pragma unroll 1
          for (int j = 0; j < Width / kStored; ++j) {
            const Own o = own(j);
            if (o.inside)
              ptx::cp_async<16>(x + j * 256, static_cast<const T*>(d.epilogue.x) + o.m * d.epilogue.x_row + o.n);
          }
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
        }
#pragma unroll
        for (int j = 0; j < Width / kStored; ++j) {
          __syncwarp();
#pragma unroll
          for (int i = 0; i < 4; ++i)
            *reinterpret_cast<float2*>(stored + (lane / 4 + i % 2 * 8) * kStoredPitch + i / 2 * 8 + lane % 4 * 2) =
                make_float2(acc[h][part][j * 8 + i * 2], acc[h][part][j * 8 + i * 2 + 1]);
          __syncwarp();
          store<T>(d, stored, x + j * 256, own(j));
        }
      }
    }
  }
}

#endif

template <class T, int Width, int Parts>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_input_kernel(const Product d, int cluster, const __grid_constant__ ptx::TensorMap left,
                        const __grid_constant__ ptx::TensorMap right) {
#ifdef MMK_HOPPER
  using W = Work<T, Width, Parts>;
  if (threadIdx.x == 0) {
    const W work(d, cluster);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(work.full() + i, 1 + kFactorThreads);
      ptx::mbarrier_init(work.empty() + i, kConsumerWarps * cluster);
    }
    ptx::mbarrier_fence();
  }
  ptx::cluster_sync();
  if (threadIdx.x < kConsumers) {
    ptx::claim_registers<232>();
    consume<T, W, Width, Parts>(d, W(d, cluster));  // its own, or some of it would wait on the stack
  } else {
    ptx::release_registers<40>();
    if (threadIdx.x == kConsumers) bring_tiles<W, Width, Parts>(W(d, cluster), left, right);
    if (threadIdx.x >= kConsumers + 32) write_factors<T, W, Width, Parts>(d, W(d, cluster));
    __syncwarp();
  }
  ptx::cluster_sync();  // nobody leaves before its barriers and its memory are done with
#endif
}

template <class T, int Width, int Parts>
int start(const Product& d, void* stream) {
  const Cut cut(d, Width, Parts);
  const int cluster = cut.tiles > 1 ? 2 : 1;
  const int64_t tiles = (d.rows + kRows - 1) / kRows * ((cut.tiles + cluster - 1) / cluster);
  if (tiles > INT_MAX) return 1;
  const int64_t blocks = std::min<int64_t>(tiles, std::max(1, mmk_multiprocessors() / cluster)) * cluster;
  ptx::TensorMap left, right;
  const int64_t depth = int64_t{d.p} * d.kp, row = d.right_row * 2;
  int code = ptx::make_tensor_map<T>(left, d.left, {depth, 1, d.rows}, {d.left_row * 2, d.left_row * 2},
                                     {kDepth, 1, kRows / 2});
  if (code == 0)
    code = ptx::make_tensor_map<T>(right, d.right, {depth, d.kq, d.q}, {row, row * d.kq}, {kDepth, Width, 1});
  if (code) return code;
  return launch_clusters(cluster, hopper_input_kernel<T, Width, Parts>, dim3(static_cast<unsigned>(blocks)),
                         dim3(kAllThreads), kSharedBytes<Width, Parts>, stream, d, cluster, left, right);
}

// Tiles of 192 columns, in the parts that leave the fewest.
template <class T>
int start_fewest(const Product& d, void* stream) {
  const int wide = Cut(d, 96, 2).tiles, middle = Cut(d, 64, 3).tiles, narrow = Cut(d, 48, 4).tiles;
  if (wide <= std::min(middle, narrow)) return start<T, 96, 2>(d, stream);
  return middle <= narrow ? start<T, 64, 3>(d, stream) : start<T, 48, 4>(d, stream);
}

}  // namespace
}  // namespace mmk::hypergrid

// Rows of 64 must share a gate, TMA asks for rows that are multiples of 16 bytes, and of narrow blocks too much of a
// tile would be nobody's.
bool mmk_hypergrid_takes_hopper_input(mmk::Dtype dtype, const mmk::hypergrid::Product* product) {
  const mmk::hypergrid::Product& d = *product;
  auto aligned = [](const void* data, int64_t row) {
    return reinterpret_cast<uint64_t>(data) % 16 == 0 && row % 8 == 0;
  };
  return mmk_capability() == 9 && dtype != mmk::Dtype::fp32 && d.rows < INT_MAX - mmk::hypergrid::kRows &&
         d.gates.count < INT_MAX && d.kq % 8 == 0 && d.kq >= 24 && aligned(d.left, d.left_row) &&
         aligned(d.right, d.right_row) && (!d.epilogue.activation || aligned(d.epilogue.x, d.epilogue.x_row)) &&
         ((d.gates.count == 1 && !d.gates.index) || d.gates.group_rows % mmk::hypergrid::kGroupRows == 0);
}

int mmk_hypergrid_hopper_input(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream) {
  if (dtype == mmk::Dtype::bf16) return mmk::hypergrid::start_fewest<mmk::bf16>(*product, stream);
  return mmk::hypergrid::start_fewest<mmk::fp16>(*product, stream);
}
