// c (64, 128) = a (64, depth) b (128, depth)^T by a cluster of two blocks, each of which makes 64 columns: TMA brings the
// tiles, half of a's by each block for both. The smallest kernel with what the emulator models of TMA and clusters. Its
// argument, a number of Fault, breaks one thing, and the emulator has to notice.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/hopper.cuh"

enum Fault {
  NONE,
  NO_SWIZZLE,
  TOO_MANY_BYTES,
  TOO_FEW_BYTES,
  NO_FULL_WAIT,
  EARLY_RELEASE,
  RELEASE_TO_ITSELF,
  RELEASE_TO_NOBODY,
  MISALIGNED_BOX,
  NO_CLUSTER_SYNC
};

constexpr int kRows = 64, kColumns = 64, kDepth = 64, kStages = 2, kThreads = 160, kCluster = 2;
constexpr int kTile = 64 * 128, kStage = 2 * kTile, kShared = kStages * kStage + 1024 + 4 * 8;

using namespace mmk;

__global__ void __launch_bounds__(kThreads) matmul(const __grid_constant__ ptx::TensorMap a,
                                                   const __grid_constant__ ptx::TensorMap b, float* c, int tiles,
                                                   int fault) {
  unsigned char* stages = ptx::align_to_1024(shared_memory());
  auto* full = reinterpret_cast<uint64_t*>(stages + kStages * kStage);
  uint64_t* empty = full + kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, fault == RELEASE_TO_ITSELF ? 4 : 4 * kCluster);
    }
    ptx::mbarrier_fence();
  }
  if (fault == NO_CLUSTER_SYNC) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (threadIdx.x == 128) {
    for (int t = 0; t < tiles; ++t) {
      unsigned char* stage = stages + t % kStages * kStage + (fault == MISALIGNED_BOX ? 128 : 0);
      uint64_t* barrier = full + t % kStages;
      ptx::mbarrier_wait(empty + t % kStages, t / kStages % 2 ^ 1);
      ptx::mbarrier_expect(barrier, fault == TOO_MANY_BYTES ? kStage + 16 : fault == TOO_FEW_BYTES ? kTile : kStage);
      ptx::copy_box_to_cluster(stage + rank * (kTile / 2), a, t * kDepth, 0, rank * (kRows / 2), barrier, 3);
      ptx::copy_box(stage + kTile, b, t * kDepth, 0, rank * kColumns, barrier);
    }
  }
  float sum[kColumns / 2] = {};
  for (int t = 0; t < tiles && warp < 4; ++t) {
    const unsigned char* stage = stages + t % kStages * kStage;
    if (fault != NO_FULL_WAIT) ptx::mbarrier_wait(full + t % kStages, t / kStages % 2);
    auto release = [&] {
      __syncwarp();
      if (fault == RELEASE_TO_ITSELF || fault == RELEASE_TO_NOBODY) {
        if (lane == 0) ptx::mbarrier_arrive(empty + t % kStages);
      } else if (lane < kCluster) {
        ptx::mbarrier_arrive_at(empty + t % kStages, lane);
      }
    };
    if (fault == EARLY_RELEASE) release();
    ptx::wgmma_fence();
    for (int k = 0; k < kDepth * 2; k += 32) {
      const unsigned char *x = stage + k, *y = stage + kTile + k;
      if (fault == NO_SWIZZLE) {
        ptx::wgmma<bf16, false>(sum, ptx::descriptor(x, 16, 1024), ptx::descriptor(y, 16, 1024), 1);
      } else {
        ptx::wgmma<bf16, false>(sum, ptx::swizzled_descriptor(x), ptx::swizzled_descriptor(y), 1);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (fault != EARLY_RELEASE) release();
  }
  for (int i = 0; i < kColumns / 2 && warp < 4; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = rank * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2;
    c[row * kColumns * kCluster + column] = sum[i];
  }
  __syncwarp();
  ptx::cluster_sync();
}

int main(int count, char** arguments) {
  const int fault = count > 1 ? std::atoi(arguments[1]) : NONE;
  constexpr int depth = 6 * kDepth - 8, columns = kColumns * kCluster;  // the last tile lies in part outside
  alignas(16) static bf16 a[kRows * depth], b[columns * depth];
  std::vector<float> c(kRows * columns);
  for (auto& x : a) x = from_float<bf16>(static_cast<float>(std::rand() % 3 - 1));
  for (auto& x : b) x = from_float<bf16>(static_cast<float>(std::rand() % 5 - 2));
  ptx::TensorMap of_a, of_b;
  if (ptx::make_tensor_map<bf16>(of_a, a, {depth, 1, kRows}, {depth * 2, depth * 2}, {kDepth, 1, kRows / 2}) ||
      ptx::make_tensor_map<bf16>(of_b, b, {depth, 1, columns}, {depth * 2, depth * 2}, {kDepth, 1, kColumns})) {
    std::puts("no tensor map");
    return 3;
  }
  if (launch_clusters(kCluster, matmul, dim3(kCluster), dim3(kThreads), kShared, nullptr, of_a, of_b, c.data(), 6,
                      fault)) {
    std::printf("%s\n", emulator::last_error().c_str());
    return 2;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < columns; ++j) {
      float exact = 0;
      for (int k = 0; k < depth; ++k) exact += to_float(a[i * depth + k]) * to_float(b[j * depth + k]);
      if (c[i * columns + j] != exact) {
        std::printf("c[%d][%d] is %g, it must be %g\n", i, j, c[i * columns + j], exact);
        return 1;
      }
    }
  }
  std::puts("right");
}
