// The gradients of the weight and of the gate for compute capability 9.0, 16-bit inputs: wgmma on tiles that TMA
// brings, both operands read across their rows. README.md in mmkernels/ops/hypergrid has the schedule and the time
// model.
//
// A block makes 128 x 128 of the result, and four of them, two by two, are a cluster: of the four boxes of 64 rows by
// 64 columns that a stage is, a block brings two, one of dy for the block beside it too and one of a(x) for the one
// below. One thread of the third warpgroup does that; the first two own 64 rows of the result each.
#include <climits>

#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "hypergrid/hypergrid_device.cuh"

namespace mmk::hypergrid {
namespace {

constexpr int kTile = 128, kDepth = 64, kBoxBytes = kDepth * 128, kStageBytes = 4 * kBoxBytes, kStages = 6;
constexpr int kCluster = 4, kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup, kConsumerWarps = 8;
constexpr int kUnits = kTile / kUnit, kUnitBlocks = kUnit / 8 + 1;  // blocks of the grid that a unit may meet
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kUnits * kTile * kUnitBlocks * 4 + 2 * kStages * 8;
enum NamedBarrier { kConsuming = 1 };

#ifdef MMK_HOPPER

struct Work {
  unsigned char* stages;
  float* products;  // (units, rows, blocks of a unit)
  uint64_t *full, *empty;
  int rows, columns, row_tiles, column_tiles;  // of the result: n and k
  int rank, row_tile, column_tile, split, first_row, first_column;

  __device__ explicit Work(const WeightGradient& d) {
    stages = ptx::align_to_1024(shared_memory());
    products = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    full = reinterpret_cast<uint64_t*>(products + kUnits * kTile * kUnitBlocks);
    empty = full + kStages;
    rows = d.c * d.kc, columns = d.r * d.kr;
    row_tiles = (rows + kTile - 1) / kTile, column_tiles = (columns + kTile - 1) / kTile;
    rank = ptx::cluster_rank();
    const int wide = (column_tiles + 1) / 2, clusters = (row_tiles + 1) / 2 * wide;
    const int cluster = static_cast<int>(blockIdx.x) / kCluster, tile = cluster % clusters;
    split = cluster / clusters;
    row_tile = tile / wide * 2 + rank / 2, column_tile = tile % wide * 2 + rank % 2;
    first_row = row_tile * kTile, first_column = column_tile * kTile;
  }
};

__device__ void bring_tiles(const WeightGradient& d, const Work& work, const ptx::TensorMap& dy,
                            const ptx::TensorMap& left) {
  const int beside = work.rank % 2, below = work.rank / 2, group_rows = static_cast<int>(d.gates.group_rows);
  int step = 0;
  for (Walk walk(d, work.split, kDepth); !walk.done(); walk.advance(d), ++step) {
    const int stage = step % kStages;
    unsigned char* to = work.stages + stage * kStageBytes;
    int row = walk.begin_row + walk.chunk * kDepth;
    if (d.order && walk.rows() > 0) row = static_cast<int>(d.order[row / group_rows]) * group_rows + row % group_rows;
    ptx::mbarrier_wait(work.empty + stage, (step / kStages & 1) ^ 1);
    ptx::mbarrier_expect(work.full + stage, kStageBytes);
    ptx::copy_box_to_cluster(to + beside * kBoxBytes, dy, work.first_row + beside * 64, 0, row, work.full + stage,
                             3u << (below * 2));
    ptx::copy_box_to_cluster(to + (2 + below) * kBoxBytes, left, work.first_column + below * 64, 0, row,
                             work.full + stage, 5u << beside);
  }
}

// Half of the ReLU of a(x)'s boxes; the other warpgroup makes the other.
template <class T>
__device__ __forceinline__ void relu_boxes(unsigned char* boxes) {
#pragma unroll
  for (int i = threadIdx.x * 16; i < 2 * kBoxBytes; i += kConsumers * 16) {
    uint4 v = *reinterpret_cast<const uint4*>(boxes + i);
    v = make_uint4(ptx::relu_pair<T>(v.x), ptx::relu_pair<T>(v.y), ptx::relu_pair<T>(v.z), ptx::relu_pair<T>(v.w));
    ptx::store_shared(boxes + i, v);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier(kConsuming, kConsumers);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What this block has of the gradient of one gate: part o weight, summed over the columns of a block of the grid in
// every 32 columns, then over its rows.
template <class T>
__device__ __forceinline__ void sum_gate(const WeightGradient& d, const Work& work, const float (&part)[kTile / 2],
                                         int segment, bool empty) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int local_row = threadIdx.x / kGroup * 64 + warp % 4 * 16 + lane / 4;
  const auto* weight = static_cast<const T*>(d.weight);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = local_row + half * 8, n = work.first_row + row;
#pragma unroll
    for (int w = 0; w < kUnits; ++w) {
      const int first = work.first_column + w * kUnit, last = min(first + kUnit, work.columns) - 1;
      const int r0 = first / d.kr;
      __syncwarp();  // or the compiler would load the weights of all units first
      float z[8];
      int of[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int k = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        const bool inside = !empty && n < work.rows && k < work.columns;  // nothing there is this gate's
        z[i] = inside ? part[w * 16 + i / 2 * 4 + half * 2 + i % 2] * to_float(weight[n * d.weight_row + k]) : 0.0f;
        of[i] = k / d.kr - r0;
      }
#pragma unroll 1
      for (int u = 0; u <= last / d.kr - r0; ++u) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += of[i] == u ? z[i] : 0.0f;
        sum = quad_sum(sum);
        if (lane % 4 == 0) work.products[(w * kTile + row) * kUnitBlocks + u] = sum;
      }
    }
  }
  ptx::named_barrier(kConsuming, kConsumers);
  const int first_c = work.first_row / d.kc, last_row = min(work.first_row + kTile, work.rows) - 1;
  const int met = work.first_row < work.rows ? last_row / d.kc - first_c + 1 : 0;
  for (int task = warp; task < kUnits * met; task += kConsumerWarps) {
    const int w = task / met, c = first_c + task % met, first = work.first_column + w * kUnit;
    if (first >= work.columns) continue;
    const int begin = max(c * d.kc - work.first_row, 0), end = min((c + 1) * d.kc - 1, last_row) - work.first_row;
    const int r0 = first / d.kr, r1 = (min(first + kUnit, work.columns) - 1) / d.kr;
    for (int r = r0; r <= r1; ++r) {
      float sum = 0.0f;
      for (int row = begin + lane; row <= end; row += 32)
        sum += work.products[(w * kTile + row) * kUnitBlocks + r - r0];
      for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
      if (lane == 0)
        d.parts[(int64_t{segment} * (work.row_tiles + d.c) + work.row_tile + c) * (work.column_tiles * kUnits + d.r) +
                work.column_tile * kUnits + w + r] = sum;
    }
  }
  ptx::named_barrier(kConsuming, kConsumers);
}

template <class T>
__device__ void consume(const WeightGradient& d, const Work& work) {
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_n = work.first_row + group * 64 + warp * 16 + lane / 4, first_k = work.first_column + lane % 4 * 2;
  float acc[kTile / 2] = {}, part[kTile / 2];
  int step = 0;
  for (Walk walk(d, work.split, kDepth); !walk.done(); ++step) {
    const int stage = step % kStages;
    unsigned char* boxes = work.stages + stage * kStageBytes;
    ptx::mbarrier_wait(work.full + stage, step / kStages & 1);
    if (d.relu) relu_boxes<T>(boxes + 2 * kBoxBytes);
    const bool last = walk.last_of_segment(), empty = walk.rows() <= 0;
    const int segment = walk.segment, gate = segment / d.chunks;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      ptx::wgmma<T, true, true>(
          part, ptx::swizzled_descriptor_by_columns(boxes + group * kBoxBytes + k * 2048, kBoxBytes),
          ptx::swizzled_descriptor_by_columns(boxes + 2 * kBoxBytes + k * 2048, kBoxBytes), walk.chunk > 0 || k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncwarp();
    // Whoever copies into this block's stages: itself, the block beside and the one below.
    if (lane < 3) ptx::mbarrier_arrive_at(work.empty + stage, work.rank ^ lane);
    walk.advance(d);
    if (!last) continue;
    if (d.out && !empty) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = min(first_n + half * 8, work.rows - 1) / d.kc;
        const float* factors = d.gates.data + gate * d.gates.stride[0] + c * d.gates.stride[2];
        int r = min(first_k, work.columns - 1) / d.kr, end = (r + 1) * d.kr;
        float factor = d.gates.residual + factors[r * d.gates.stride[1]];
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (first_k + j * 8 + i >= end && end < work.columns) {
              ++r, end += d.kr;
              factor = d.gates.residual + factors[r * d.gates.stride[1]];
            }
            acc[4 * j + 2 * half + i] += part[4 * j + 2 * half + i] * factor;
          }
        }
      }
    }
    if (d.parts) sum_gate<T>(d, work, part, segment, empty);
  }

  if (!d.out) return;
  auto* out = static_cast<T*>(d.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = first_n + half * 8;
    if (n >= work.rows) continue;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
      const int k = first_k + j * 8;
      if (k >= work.columns) continue;  // columns are in pairs
      const float low = acc[4 * j + 2 * half], high = acc[4 * j + 2 * half + 1];
      if (d.splits > 1) {
        *reinterpret_cast<float2*>(d.partial + (int64_t{work.split} * work.rows + n) * work.columns + k) =
            make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(out + int64_t{n} * work.columns + k) = pack<T>(low, high);
      }
    }
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(kAllThreads, 1)
    hopper_weight_kernel(const WeightGradient d, const __grid_constant__ ptx::TensorMap dy,
                         const __grid_constant__ ptx::TensorMap left) {
#ifdef MMK_HOPPER
  const Work work(d);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(work.full + i, 1);
      ptx::mbarrier_init(work.empty + i, kConsumerWarps * 3);
    }
    ptx::mbarrier_fence();
  }
  ptx::cluster_sync();
  if (threadIdx.x < kConsumers) {
    ptx::claim_registers<224>();
    consume<T>(d, work);
  } else {
    ptx::release_registers<56>();
    if (threadIdx.x == kConsumers) bring_tiles(d, work, dy, left);
    __syncwarp();
  }
  ptx::cluster_sync();  // nobody leaves before its barriers and its memory are done with
#endif
}

template <class T>
int start(const WeightGradient& d, void* stream) {
  const int64_t rows = int64_t{d.c} * d.kc, columns = int64_t{d.r} * d.kr;
  const int64_t clusters = (rows + 2 * kTile - 1) / (2 * kTile) * ((columns + 2 * kTile - 1) / (2 * kTile));
  if (clusters * kCluster * d.splits > INT_MAX) return 1;
  ptx::TensorMap dy, left;
  int code = ptx::make_tensor_map<T>(dy, d.dy, {rows, 1, d.rows}, {d.dy_row * 2, d.dy_row * 2}, {64, 1, kDepth});
  if (code == 0)
    code =
        ptx::make_tensor_map<T>(left, d.left, {columns, 1, d.rows}, {d.left_row * 2, d.left_row * 2}, {64, 1, kDepth});
  if (code) return code;
  return launch_clusters(kCluster, hopper_weight_kernel<T>, dim3(static_cast<unsigned>(clusters * kCluster * d.splits)),
                         dim3(kAllThreads), kSharedBytes, stream, d, dy, left);
}

}  // namespace
}  // namespace mmk::hypergrid

// Stages of 64 rows must share a gate, and TMA asks for rows that are multiples of 16 bytes.
bool mmk_hypergrid_takes_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight) {
  const mmk::hypergrid::WeightGradient& d = *weight;
  const int rows = d.c * d.kc, columns = d.r * d.kr;
  auto aligned = [](const void* data, int64_t row) {
    return reinterpret_cast<uint64_t>(data) % 16 == 0 && row % 8 == 0;
  };
  return mmk_capability() == 9 && dtype != mmk::Dtype::fp32 && rows > 128 && columns > 128 && rows % 8 == 0 &&
         columns % 8 == 0 && aligned(d.dy, d.dy_row) && aligned(d.left, d.left_row) &&
         (d.gates.group_rows == d.rows || d.gates.group_rows % mmk::hypergrid::kSegmentRows == 0);
}

int mmk_hypergrid_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight, void* stream) {
  if (dtype == mmk::Dtype::bf16) return mmk::hypergrid::start<mmk::bf16>(*weight, stream);
  return mmk::hypergrid::start<mmk::fp16>(*weight, stream);
}
