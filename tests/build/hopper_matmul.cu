// c (64, 64) = s b, s = a b^T rounded to bf16 (as attention without softmax), by one warp that brings tiles of b and
// one warpgroup that multiplies each tile twice: the smallest kernel with everything of sm_90 that the emulator models.
// Its argument, a number of Fault, breaks one thing, and the emulator has to notice.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/hopper.cuh"

enum Fault {
  NONE,
  NO_FENCE_AFTER_COPY,
  NO_FENCE_AFTER_STORE,
  NO_WGMMA_FENCE,
  NO_WGMMA_WAIT,
  SWAPPED_STRIDES,
  SWAPPED_STRIDES_BY_COLUMNS,
  WRONG_MAJOR,
  EARLY_RELEASE,
  WRONG_PARITY,
  NO_FULL_WAIT,
  MISSING_ARRIVAL,
  UNINITIALISED_BARRIER,
  WRONG_THREADS,
  PAST_THE_END
};

constexpr int kRows = 64, kKeys = 32, kDepth = 64, kStages = 2, kThreads = 160;
constexpr int kTile = kKeys * kDepth, kShared = (kRows * kDepth + kStages * kTile + kRows * kKeys) * 2 + 4 * 8;

using namespace mmk;

__global__ void __launch_bounds__(kThreads) matmul(const bf16* a, const bf16* b, float* c, int tiles, int fault) {
  auto* left = reinterpret_cast<bf16*>(shared_memory());
  bf16 *stages = left + kRows * kDepth, *scores = stages + kStages * kTile;
  auto* full = reinterpret_cast<uint64_t*>(scores + kRows * kKeys);
  uint64_t* empty = full + kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      if (fault != UNINITIALISED_BARRIER) ptx::mbarrier_init(full + i, 32);
      ptx::mbarrier_init(empty + i, 4);
    }
  }
  __syncthreads();
  if (warp == 4) {
    for (int t = 0; t < tiles; ++t) {
      const int stage = t % kStages;
      ptx::mbarrier_wait(empty + stage, t / kStages % 2 ^ 1);
      for (int c = 0; c < kDepth / 8; ++c) {
        ptx::cp_async<16>(stages + stage * kTile + (c * kKeys + lane) * 8, b + (t * kKeys + lane) * kDepth + c * 8);
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      if (fault != NO_FENCE_AFTER_COPY) ptx::fence_proxy_async();
      if (fault != MISSING_ARRIVAL || lane) ptx::mbarrier_arrive(full + stage);
    }
    return;
  }
  for (int i = threadIdx.x; i < kRows * kDepth / 8; i += 128) {
    ptx::cp_async<16>(left + i * 8, a + i % kRows * kDepth + i / kRows * 8);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::named_barrier(1, fault == WRONG_THREADS ? 160 : 128);
  float sum[kDepth / 2] = {};
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % kStages, row = warp * 16 + lane / 4, column = lane % 4 * 2;
    bf16* tile = stages + stage * kTile;
    float s[kKeys / 2];
    if (fault != NO_FULL_WAIT) ptx::mbarrier_wait(full + stage, (t / kStages % 2) ^ (fault == WRONG_PARITY));
    if (fault != NO_WGMMA_FENCE) ptx::wgmma_fence();
    for (int k = 0; k < kDepth; k += 16) {
      const bf16 *x = left + k * kRows, *y = tile + k * kKeys + (fault == PAST_THE_END ? 1 << 16 : 0);
      const bool swapped = fault == SWAPPED_STRIDES;
      ptx::wgmma<bf16, false>(s, ptx::descriptor(x, kRows * 16, 128),
                              ptx::descriptor(y, swapped ? 128 : kKeys * 16, swapped ? kKeys * 16 : 128), k > 0);
    }
    ptx::wgmma_commit();
    if (fault != NO_WGMMA_WAIT) ptx::wgmma_wait<0>();
    for (int i = 0; i < kKeys / 2; i += 2) {
      ptx::store_shared(scores + (i / 4 * kRows + row + i / 2 % 2 * 8) * 8 + column, pack<bf16>(s[i], s[i + 1]));
    }
    if (fault == EARLY_RELEASE && lane == 0) ptx::mbarrier_arrive(empty + stage);
    if (fault != NO_FENCE_AFTER_STORE) ptx::fence_proxy_async();
    ptx::named_barrier(1, 128);
    ptx::wgmma_fence();
    for (int k = 0; k < kKeys; k += 16) {
      const uint64_t x = ptx::descriptor(scores + k * kRows, kRows * 16, 128);
      const bool swapped = fault == SWAPPED_STRIDES_BY_COLUMNS;
      const uint64_t y = ptx::descriptor(tile + k * 8, swapped ? kKeys * 16 : 128, swapped ? 128 : kKeys * 16);
      if (fault == WRONG_MAJOR) {
        ptx::wgmma<bf16, false>(sum, x, y, 1);
      } else {
        ptx::wgmma<bf16, true>(sum, x, y, 1);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncwarp();
    if (fault != EARLY_RELEASE && lane == 0) ptx::mbarrier_arrive(empty + stage);
    ptx::named_barrier(1, 128);
  }
  for (int i = 0; i < kDepth / 2; ++i) {
    c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * kDepth + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

int main(int count, char** arguments) {
  const int fault = count > 1 ? std::atoi(arguments[1]) : NONE;
  constexpr int tiles = 6;
  std::vector<bf16> a(kRows * kDepth), b(tiles * kKeys * kDepth);
  std::vector<float> c(kRows * kDepth);
  for (auto& x : a) x = from_float<bf16>(static_cast<float>(std::rand() % 3 - 1));
  for (auto& x : b) x = from_float<bf16>(static_cast<float>(std::rand() % 5 - 2));
  if (launch(matmul, dim3(1), dim3(kThreads), kShared, nullptr, a.data(), b.data(), c.data(), tiles, fault)) {
    std::printf("%s\n", emulator::last_error().c_str());
    return 2;
  }
  for (int i = 0; i < kRows; ++i) {
    std::vector<float> exact(kDepth);
    for (int m = 0; m < tiles * kKeys; ++m) {
      float score = 0;
      for (int k = 0; k < kDepth; ++k) score += to_float(a[i * kDepth + k]) * to_float(b[m * kDepth + k]);
      for (int k = 0; k < kDepth; ++k) exact[k] += score * to_float(b[m * kDepth + k]);
    }
    for (int k = 0; k < kDepth; ++k) {
      if (c[i * kDepth + k] != exact[k]) {
        std::printf("c[%d][%d] is %g, it must be %g\n", i, k, c[i * kDepth + k], exact[k]);
        return 1;
      }
    }
  }
  std::puts("right");
}
