// The gradients of the weight and of the gate for compute capability 9.0, 16-bit inputs: wgmma on tiles that TMA
// brings, both operands read across their rows. README.md in mmkernels/ops/hypergrid has the schedule and the time
// model.
//
// A block makes 128 x 192 of the result, and four of them, two by two, are a cluster: of a stage's 64 rows a block
// brings one box of 64 columns of dy for the block beside it too, and 32 rows of a(x)'s three boxes for the one below.
// One thread of the third warpgroup does that, its other warps take the ReLU. The first two warpgroups own 64 rows of
// the result each and do not wait for each other: while one makes the sums of a gate, the other has the tensor cores.
#include <climits>

#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "hypergrid/hypergrid_device.cuh"

namespace mmk::hypergrid {
namespace {

constexpr int kTileRows = 128, kTileColumns = kHopperUnit, kDepth = 64, kBoxBytes = kDepth * 128;
constexpr int kLeftBoxes = kTileColumns / 64, kStageBytes = (2 + kLeftBoxes) * kBoxBytes, kStages = 4;
constexpr int kCluster = 4, kGroup = 128, kConsumers = 2 * kGroup, kAllThreads = 3 * kGroup, kConsumerWarps = 8;
constexpr int kReluThreads = 96;                // three warps
constexpr int kBlocks = kTileColumns / 8 + 1;   // of the grid that a row of a tile may meet; odd: different banks
constexpr int kWeightPitch = kTileColumns + 8;  // rows fall into different banks
constexpr int kSharedBytes =
    1024 + kStages * kStageBytes + kTileRows * (kWeightPitch * 2 + kBlocks * 4) + 3 * kStages * 8;

#ifdef MMK_HOPPER

template <class T>
struct Work {
  unsigned char* stages;
  uint64_t *full, *ready, *empty;              // ready: full, and past the ReLU
  T* weight;                                   // (rows, columns) of the tile
  float* products;                             // (rows, blocks)
  int rows, columns, row_tiles, column_tiles;  // of the result: n and k
  int rank, row_tile, column_tile, split, first_row, first_column;

  __device__ explicit Work(const WeightGradient& d) {
    stages = ptx::align_to_1024(shared_memory());
    full = reinterpret_cast<uint64_t*>(stages + kStages * kStageBytes);
    ready = full + kStages, empty = ready + kStages;
    weight = reinterpret_cast<T*>(empty + kStages);
    products = reinterpret_cast<float*>(weight + kTileRows * kWeightPitch);
    rows = d.c * d.kc, columns = d.r * d.kr;
    row_tiles = (rows + kTileRows - 1) / kTileRows, column_tiles = (columns + kTileColumns - 1) / kTileColumns;
    rank = ptx::cluster_rank();
    const int wide = (column_tiles + 1) / 2, clusters = (row_tiles + 1) / 2 * wide;
    const int cluster = static_cast<int>(blockIdx.x) / kCluster, tile = cluster % clusters;
    split = cluster / clusters;
    row_tile = tile / wide * 2 + rank / 2, column_tile = tile % wide * 2 + rank % 2;
    first_row = row_tile * kTileRows, first_column = column_tile * kTileColumns;
  }
};

template <class T>
__device__ void bring_tiles(const WeightGradient& d, const Work<T>& work, const ptx::TensorMap& dy,
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
    for (int box = 0; box < kLeftBoxes; ++box)
      ptx::copy_box_to_cluster(to + (2 + box) * kBoxBytes + below * (kBoxBytes / 2), left, work.first_column + box * 64,
                               0, row + below * (kDepth / 2), work.full + stage, 5u << beside);
  }
}

template <class T>
__device__ void relu_tiles(const WeightGradient& d, const Work<T>& work) {
  int step = 0;
  for (Walk walk(d, work.split, kDepth); !walk.done(); walk.advance(d), ++step) {
    const int stage = step % kStages;
    unsigned char* boxes = work.stages + stage * kStageBytes + 2 * kBoxBytes;
    ptx::mbarrier_wait(work.full + stage, step / kStages & 1);
#pragma unroll 4
    for (int i = (threadIdx.x - kConsumers - 32) * 16; i < kLeftBoxes * kBoxBytes; i += kReluThreads * 16) {
      uint4 v = *reinterpret_cast<const uint4*>(boxes + i);
      v = make_uint4(ptx::relu_pair<T>(v.x), ptx::relu_pair<T>(v.y), ptx::relu_pair<T>(v.z), ptx::relu_pair<T>(v.w));
      ptx::store_shared(boxes + i, v);
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(work.ready + stage);
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The sums of one gate: acc += factors o part, and products of part and the weight, summed over the columns of a block
// of the grid. `factor` has the first block's; blocks begin at multiples of 8.
template <class T>
__device__ __forceinline__ void add_segment(const WeightGradient& d, const Work<T>& work,
                                            float (&acc)[kTileColumns / 2], const float (&part)[kTileColumns / 2],
                                            const float* const (&factors)[2], float (&factor)[2], int local_row) {
  const int lane = threadIdx.x % 32;
  const T* weight = work.weight + local_row * kWeightPitch + lane % 4 * 2;
  float* products = work.products + local_row * kBlocks;
  int r = work.first_column / d.kr, end = (r + 1) * d.kr - work.first_column, block = 0;
  float sum[2] = {}, next[2];
  auto look_ahead = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      next[half] = d.out && r + 1 < d.r ? factors[half][(r + 1) * d.gates.stride[1]] : 0.0f;
  };
  auto put = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float whole = quad_sum(sum[half]);
      if (lane % 4 == 0) products[half * 8 * kBlocks + block] = whole;
      sum[half] = 0.0f;
    }
  };
  look_ahead();
#pragma unroll
  for (int j = 0; j < kTileColumns / 8; ++j) {
    if (j * 8 >= end) {
      if (d.parts) put();
      ++r, ++block, end += d.kr;
      factor[0] = next[0] + d.gates.residual, factor[1] = next[1] + d.gates.residual;
      look_ahead();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = part[4 * j + 2 * half], high = part[4 * j + 2 * half + 1];
      if (d.out) acc[4 * j + 2 * half] += low * factor[half], acc[4 * j + 2 * half + 1] += high * factor[half];
      if (d.parts) {
        const T* pair = weight + half * 8 * kWeightPitch + j * 8;
        sum[half] += low * to_float(pair[0]) + high * to_float(pair[1]);
      }
    }
  }
  if (d.parts) put();
}

// What this warpgroup has of the gradient of one gate: its products, summed over the rows of a block.
template <class T>
__device__ __forceinline__ void sum_gate(const WeightGradient& d, const Work<T>& work, int segment, bool empty) {
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_row = work.first_row + group * 64, last_row = min(first_row + 64, work.rows) - 1;
  ptx::named_barrier(1 + group, kGroup);
  const int first_c = first_row / d.kc, met = first_row < work.rows ? last_row / d.kc - first_c + 1 : 0;
  const int r0 = work.first_column / d.kr;
  const int blocks =
      work.first_column < work.columns ? (min(work.first_column + kTileColumns, work.columns) - 1) / d.kr - r0 + 1 : 0;
  for (int task = warp; task < blocks * met; task += kGroup / 32) {
    const int c = first_c + task / blocks, block = task % blocks;
    const int begin = max(c * d.kc, first_row), end = min((c + 1) * d.kc - 1, last_row);
    float sum = 0.0f;
    for (int n = begin + lane; n <= end; n += 32) sum += work.products[(n - work.first_row) * kBlocks + block];
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (lane == 0)
      d.parts[(int64_t{segment} * (2 * work.row_tiles + d.c) + 2 * work.row_tile + group + c) *
                  (work.column_tiles + d.r) +
              work.column_tile + r0 + block] = empty ? 0.0f : sum;  // nothing there is this gate's
  }
  ptx::named_barrier(1 + group, kGroup);
}

template <class T>
__device__ void consume(const WeightGradient& d, const Work<T>& work) {
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int local_row = group * 64 + warp * 16 + lane / 4;
  if (d.parts) {  // this warpgroup's rows of the weight
    for (int i = threadIdx.x % kGroup; i < 64 * kTileColumns; i += kGroup) {
      const int row = group * 64 + i / kTileColumns, column = i % kTileColumns;
      const int n = work.first_row + row, k = work.first_column + column;
      work.weight[row * kWeightPitch + column] = n < work.rows && k < work.columns
                                                     ? static_cast<const T*>(d.weight)[n * d.weight_row + k]
                                                     : from_float<T>(0.0f);
    }
    ptx::named_barrier(1 + group, kGroup);
  }
  float acc[kTileColumns / 2] = {}, part[kTileColumns / 2];
  const uint64_t* arrived = d.relu ? work.ready : work.full;
  auto release = [&](int step, int blocks) {  // to whoever copies into this block's stages: itself, beside and below
    __syncwarp();
    if (lane < blocks) ptx::mbarrier_arrive_at(work.empty + step % kStages, work.rank ^ lane);
  };
  int step = 0;
  for (Walk walk(d, work.split, kDepth); !walk.done();) {
    const bool empty = walk.rows() <= 0;
    const int segment = walk.segment, gate = segment / d.chunks;
    const int stages = empty ? 1 : (walk.end_row - walk.begin_row + kDepth - 1) / kDepth;
    const float* factors[2];
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = min(work.first_row + local_row + half * 8, work.rows - 1) / d.kc;
      factors[half] = d.gates.data + gate * d.gates.stride[0] + c * d.gates.stride[2];
      const int r = min(work.first_column, work.columns - 1) / d.kr;
      factor[half] = d.out ? d.gates.residual + factors[half][r * d.gates.stride[1]] : 0.0f;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < stages; ++chunk, ++step) {
      const unsigned char* boxes = work.stages + step % kStages * kStageBytes;
      ptx::mbarrier_wait(const_cast<uint64_t*>(arrived) + step % kStages, step / kStages & 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        ptx::wgmma<T, true, true>(
            part, ptx::swizzled_descriptor_by_columns(boxes + group * kBoxBytes + k * 2048, kBoxBytes),
            ptx::swizzled_descriptor_by_columns(boxes + 2 * kBoxBytes + k * 2048, kBoxBytes), chunk > 0 || k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      release(step + kStages - 1, chunk > 0 ? 3 : 0);
    }
    ptx::wgmma_wait<0>();
    release(step - 1, 3);
    walk.next_segment(d);
    if (!empty) add_segment<T>(d, work, acc, part, factors, factor, local_row);
    if (d.parts) sum_gate<T>(d, work, segment, empty);
  }

  if (!d.out) return;
  auto* out = static_cast<T*>(d.out);
  const int first_n = work.first_row + local_row, first_k = work.first_column + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = first_n + half * 8;
    if (n >= work.rows) continue;
#pragma unroll
    for (int j = 0; j < kTileColumns / 8; ++j) {
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
  const Work<T> work(d);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(work.full + i, 1);
      ptx::mbarrier_init(work.ready + i, kReluThreads);
      ptx::mbarrier_init(work.empty + i, kConsumerWarps * 3);
    }
    ptx::mbarrier_fence();
  }
  ptx::cluster_sync();
  if (threadIdx.x < kConsumers) {
    ptx::claim_registers<232>();
    consume<T>(d, work);
  } else {
    ptx::release_registers<40>();
    if (threadIdx.x == kConsumers) bring_tiles<T>(d, work, dy, left);
    if (d.relu && threadIdx.x >= kConsumers + 32) relu_tiles<T>(d, work);
    __syncwarp();
  }
  ptx::cluster_sync();  // nobody leaves before its barriers and its memory are done with
#endif
}

template <class T>
int start(const WeightGradient& d, void* stream) {
  const int64_t rows = int64_t{d.c} * d.kc, columns = int64_t{d.r} * d.kr;
  const int64_t clusters = mmk_hypergrid_hopper_weight_clusters(&d);
  if (clusters * kCluster * d.splits > INT_MAX) return 1;
  ptx::TensorMap dy, left;
  int code = ptx::make_tensor_map<T>(dy, d.dy, {rows, 1, d.rows}, {d.dy_row * 2, d.dy_row * 2}, {64, 1, kDepth});
  if (code == 0)
    code = ptx::make_tensor_map<T>(left, d.left, {columns, 1, d.rows}, {d.left_row * 2, d.left_row * 2},
                                   {64, 1, kDepth / 2});
  if (code) return code;
  return launch_clusters(kCluster, hopper_weight_kernel<T>, dim3(static_cast<unsigned>(clusters * kCluster * d.splits)),
                         dim3(kAllThreads), kSharedBytes, stream, d, dy, left);
}

}  // namespace
}  // namespace mmk::hypergrid

int64_t mmk_hypergrid_hopper_weight_clusters(const mmk::hypergrid::WeightGradient* d) {
  constexpr int rows = 2 * mmk::hypergrid::kTileRows, columns = 2 * mmk::hypergrid::kTileColumns;
  return (int64_t{d->c} * d->kc + rows - 1) / rows * ((int64_t{d->r} * d->kr + columns - 1) / columns);
}

// Stages of 64 rows must share a gate, TMA asks for rows that are multiples of 16 bytes, and boundaries of blocks
// between columns that different lanes have would cost more than they are worth.
bool mmk_hypergrid_takes_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight) {
  const mmk::hypergrid::WeightGradient& d = *weight;
  const int rows = d.c * d.kc, columns = d.r * d.kr;
  auto aligned = [](const void* data, int64_t row) {
    return reinterpret_cast<uint64_t>(data) % 16 == 0 && row % 8 == 0;
  };
  return mmk_capability() == 9 && dtype != mmk::Dtype::fp32 && rows > 128 && columns > 128 && rows % 8 == 0 &&
         d.kr % 8 == 0 && aligned(d.dy, d.dy_row) && aligned(d.left, d.left_row) &&
         (d.gates.group_rows == d.rows || d.gates.group_rows % mmk::hypergrid::kSegmentRows == 0);
}

int mmk_hypergrid_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight, void* stream) {
  if (dtype == mmk::Dtype::bf16) return mmk::hypergrid::start<mmk::bf16>(*weight, stream);
  return mmk::hypergrid::start<mmk::fp16>(*weight, stream);
}
