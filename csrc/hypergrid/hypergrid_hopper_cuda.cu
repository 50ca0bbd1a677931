// The forward for compute capability 9.0, 16-bit inputs: wgmma on tiles that TMA brings, with the
// warps specialised. README.md in mmkernels/ops/hypergrid has the schedule and the time model.
//
// A block makes 256 rows by 128 columns, and two blocks with the same rows are a cluster: each brings half of the rows'
// tile for both, since the L2 would not keep up otherwise. One thread of the third warpgroup brings the tiles; the
// three other warps of it write the factors of every block p of the grid, one for each column and each 64 rows. The
// first two warpgroups own 128 rows each. They multiply 64 rows at a time into a partial sum and add that with its
// factors, and while one of them does so the other keeps the tensor cores busy.
#include <climits>

#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "hypergrid/hypergrid_device.cuh"

namespace mmk::hypergrid {
namespace {

constexpr int kRows = 256, kGroupRows = 64, kDepth = 64, kRowBytes = 128, kStages = 4, kTables = 4;
constexpr int kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup, kConsumerWarps = kConsumers / 32;
constexpr int kFactorThreads = 96;  // three warps
constexpr int kLeftBytes = kRows * kRowBytes, kRightBytes = kColumns * kRowBytes,
              kStageBytes = kLeftBytes + kRightBytes;
constexpr int kTableFloats = kRows / kGroupRows * kColumns;

struct Shared {
  unsigned char* stages;
  float* tables;
  uint64_t *full, *empty, *factors_full, *factors_empty;
  int64_t* numbers;  // of each 64 rows: where their gate begins, or -1

  __device__ explicit Shared(unsigned char* base) {
    stages = ptx::align_to_1024(base);
    tables = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    full = reinterpret_cast<uint64_t*>(tables + kTables * kTableFloats);
    empty = full + kStages;
    factors_full = empty + kStages;
    factors_empty = factors_full + kTables;
    numbers = reinterpret_cast<int64_t*>(factors_empty + kTables);
  }
};

constexpr int kSharedBytes =
    1024 + kStages * kStageBytes + kTables * kTableFloats * 4 + (2 * kStages + 2 * kTables + kRows / kGroupRows) * 8;

// Of 128 columns, whole clusters of them.
__host__ __device__ __forceinline__ int column_tiles(int64_t columns, int cluster) {
  return static_cast<int>((columns + kColumns * cluster - 1) / (kColumns * cluster)) * cluster;
}

#ifdef MMK_HOPPER

struct Work {
  int first_column, columns, chunks, steps, cluster;
  int64_t first_row;

  __device__ Work(const Product& d, int cluster) : cluster(cluster) {
    columns = d.q * d.kq;
    const int tiles = column_tiles(columns, cluster);
    first_column = static_cast<int>(blockIdx.x) % tiles * kColumns;
    first_row = int64_t{static_cast<int>(blockIdx.x) / tiles} * kRows;
    chunks = (d.kp + kDepth - 1) / kDepth;
    steps = d.p * chunks;
  }
};

__device__ void bring_tiles(const Work& work, const Shared& shared, const ptx::TensorMap& left,
                            const ptx::TensorMap& right) {
  for (int step = 0; step < work.steps; ++step) {
    const int stage = step % kStages, p = step / work.chunks, k = step % work.chunks * kDepth;
    unsigned char* to = shared.stages + stage * kStageBytes;
    ptx::mbarrier_wait(shared.empty + stage, (step / kStages & 1) ^ 1);
    ptx::mbarrier_expect(shared.full + stage, kStageBytes);
    const int row = static_cast<int>(work.first_row);
    if (work.cluster == 2) {
      const int half = ptx::cluster_rank();
      ptx::copy_box_to_cluster(to + half * (kLeftBytes / 2), left, k, p, row + half * (kRows / 2), shared.full + stage,
                               3);
    } else {
      ptx::copy_box(to, left, k, p, row, shared.full + stage);
      ptx::copy_box(to + kLeftBytes / 2, left, k, p, row + kRows / 2, shared.full + stage);
    }
    ptx::copy_box(to + kLeftBytes, right, k, p, work.first_column, shared.full + stage);
  }
}

__device__ void write_factors(const Product& d, const Work& work, const Shared& shared) {
  const int thread = threadIdx.x - kConsumers - 32;
  for (int p = 0; p < d.p; ++p) {
    const int table = p % kTables;
    ptx::mbarrier_wait(shared.factors_empty + table, (p / kTables & 1) ^ 1);
    for (int i = thread; i < kTableFloats; i += kFactorThreads) {
      const int64_t number = shared.numbers[i / kColumns];
      const int q = min(work.first_column + i % kColumns, work.columns - 1) / d.kq;
      const float* gate = d.gates.data + number + p * d.gates.stride[1] + q * d.gates.stride[2];
      shared.tables[table * kTableFloats + i] = number < 0 ? NAN : d.gates.residual + *gate;
    }
    ptx::mbarrier_arrive(shared.factors_full + table);
  }
}

// The ReLU of this warpgroup's rows of a tile, in place.
template <class T>
__device__ __forceinline__ void relu_rows(unsigned char* rows, int group) {
#pragma unroll
  for (int i = threadIdx.x % kGroup * 16; i < kLeftBytes / 2; i += kGroup * 16) {
    uint4 v = *reinterpret_cast<const uint4*>(rows + i);
    v = make_uint4(ptx::relu_pair<T>(v.x), ptx::relu_pair<T>(v.y), ptx::relu_pair<T>(v.z), ptx::relu_pair<T>(v.w));
    ptx::store_shared(rows + i, v);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier(1 + group, kGroup);
}

// part = 64 rows times 128 columns over Steps times 16 of the depth; beyond a block's end both are zeros.
template <class T, int Steps>
__device__ __forceinline__ void multiply(float (&part)[kColumns / 2], const unsigned char* rows,
                                         const unsigned char* columns) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Steps; ++k)
    ptx::wgmma<T, false>(part, ptx::swizzled_descriptor(rows + k * 32), ptx::swizzled_descriptor(columns + k * 32),
                         k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

template <class T>
__device__ void consume(const Product& d, const Work& work, const Shared& shared) {
  constexpr int kParts = 2, kSums = kColumns / 2;
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float acc[kParts][kSums] = {}, part[kSums];
  for (int step = 0; step < work.steps; ++step) {
    const int stage = step % kStages, p = step / work.chunks, chunk = step % work.chunks, table = p % kTables;
    unsigned char *left = shared.stages + stage * kStageBytes + group * (kLeftBytes / 2),
                  *right = shared.stages + stage * kStageBytes + kLeftBytes;
    ptx::mbarrier_wait(shared.full + stage, step / kStages & 1);
    if (chunk == 0) ptx::mbarrier_wait(shared.factors_full + table, p / kTables & 1);
    if (d.relu) relu_rows<T>(left, group);
    const int depth = min(d.kp - chunk * kDepth, kDepth);
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      const unsigned char* rows = left + h * (kGroupRows * kRowBytes);
      if (depth > 48) {
        multiply<T, 4>(part, rows, right);
      } else if (depth > 32) {
        multiply<T, 3>(part, rows, right);
      } else if (depth > 16) {
        multiply<T, 2>(part, rows, right);
      } else {
        multiply<T, 1>(part, rows, right);
      }
      if (h == kParts - 1) {
        __syncwarp();
        if (lane < work.cluster) ptx::mbarrier_arrive_at(shared.empty + stage, lane);  // copies go into both blocks
      }
      const float* factors = shared.tables + table * kTableFloats + (group * kParts + h) * kColumns + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float2 factor = *reinterpret_cast<const float2*>(factors + j * 8);
        acc[h][4 * j] += part[4 * j] * factor.x;
        acc[h][4 * j + 1] += part[4 * j + 1] * factor.y;
        acc[h][4 * j + 2] += part[4 * j + 2] * factor.x;
        acc[h][4 * j + 3] += part[4 * j + 3] * factor.y;
      }
    }
    if (chunk == work.chunks - 1) {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(shared.factors_empty + table);
    }
  }

  auto* out = static_cast<T*>(d.out);
  const auto* bias = static_cast<const T*>(d.epilogue.bias);
  const bool in_pairs = work.columns % 2 == 0;
#pragma unroll
  for (int h = 0; h < kParts; ++h) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = work.first_row + (group * kParts + h) * kGroupRows + warp * 16 + half * 8 + lane / 4;
      if (m >= d.rows) continue;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const int n = work.first_column + j * 8 + lane % 4 * 2;
        if (n >= work.columns) continue;
        float low = acc[h][4 * j + 2 * half], high = acc[h][4 * j + 2 * half + 1];
        if (bias) low += to_float(bias[n]);
        if (bias && n + 1 < work.columns) high += to_float(bias[n + 1]);
        if (in_pairs) {
          *reinterpret_cast<uint32_t*>(out + m * work.columns + n) = pack<T>(low, high);
        } else {
          out[m * work.columns + n] = from_float<T>(low);
          if (n + 1 < work.columns) out[m * work.columns + n + 1] = from_float<T>(high);
        }
      }
    }
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_product_kernel(const Product d, int cluster, const __grid_constant__ ptx::TensorMap left,
                          const __grid_constant__ ptx::TensorMap right) {
#ifdef MMK_HOPPER
  const Shared shared(shared_memory());
  const Work work(d, cluster);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(shared.full + i, 1);
      ptx::mbarrier_init(shared.empty + i, kConsumerWarps * cluster);
    }
    for (int i = 0; i < kTables; ++i) {
      ptx::mbarrier_init(shared.factors_full + i, kFactorThreads);
      ptx::mbarrier_init(shared.factors_empty + i, kConsumerWarps);
    }
    ptx::mbarrier_fence();
    for (int i = 0; i < kRows / kGroupRows; ++i) {
      const int64_t row = work.first_row + i * kGroupRows;
      int64_t g = 0;
      if (row < d.rows) {
        g = d.gates.count == 1 && !d.gates.index ? 0 : row / d.gates.group_rows;
        if (d.gates.index) g = d.gates.index[g];
      }
      shared.numbers[i] = g >= 0 && g < d.gates.count ? g * d.gates.stride[0] : -1;
    }
  }
  ptx::cluster_sync();
  if (threadIdx.x < kConsumers) {
    ptx::claim_registers<232>();
    consume<T>(d, work, shared);
  } else {
    ptx::release_registers<40>();
    if (threadIdx.x == kConsumers) bring_tiles(work, shared, left, right);
    if (threadIdx.x >= kConsumers + 32) write_factors(d, work, shared);
    __syncwarp();
  }
  ptx::cluster_sync();  // nobody leaves before its barriers and its memory are done with
#endif
}

template <class T>
int start(const Product& d, void* stream) {
  const int64_t columns = int64_t{d.q} * d.kq;
  const int cluster = columns > kColumns ? 2 : 1;
  const int64_t blocks = (d.rows + kRows - 1) / kRows * column_tiles(columns, cluster);
  if (blocks > INT_MAX) return 1;
  ptx::TensorMap left, right;
  const int64_t block_bytes = d.kp * 2;
  int code =
      ptx::make_tensor_map<T>(left, d.left, {d.kp, d.p, d.rows}, {block_bytes, d.left_row * 2}, {kDepth, 1, kRows / 2});
  if (code == 0)
    code = ptx::make_tensor_map<T>(right, d.right, {d.kp, d.p, columns}, {block_bytes, d.right_row * 2},
                                   {kDepth, 1, kColumns});
  if (code) return code;
  return launch_clusters(cluster, hopper_product_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kAllThreads),
                         kSharedBytes, stream, d, cluster, left, right);
}

}  // namespace
}  // namespace mmk::hypergrid

// Rows of 64 must share a gate, and TMA asks for blocks and rows that are multiples of 16 bytes.
bool mmk_hypergrid_takes_hopper(mmk::Dtype dtype, const mmk::hypergrid::Product* product) {
  const mmk::hypergrid::Product& d = *product;
  auto aligned = [](const void* data, int64_t row) {
    return reinterpret_cast<uint64_t>(data) % 16 == 0 && row % 8 == 0;
  };
  return mmk_capability() == 9 && dtype != mmk::Dtype::fp32 && !d.transposed && !d.epilogue.x && d.splits == 1 &&
         d.rows >= 128 && d.rows < INT_MAX - mmk::hypergrid::kRows && d.kp % 8 == 0 && aligned(d.left, d.left_row) &&
         aligned(d.right, d.right_row) &&
         ((d.gates.count == 1 && !d.gates.index) || d.gates.group_rows % mmk::hypergrid::kGroupRows == 0);
}

int mmk_hypergrid_hopper(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream) {
  if (dtype == mmk::Dtype::bf16) return mmk::hypergrid::start<mmk::bf16>(*product, stream);
  return mmk::hypergrid::start<mmk::fp16>(*product, stream);
}
