// c (M,N) fp32 = a (M,K) b (N,K)^T in bf16, by a two-stage cp.async pipeline: the smallest kernel with everything that
// the emulator models. Its argument, a number of Fault, breaks one thing, and the
// emulator has to notice.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/ptx.cuh"

enum Fault {
  NONE,
  NO_WAIT,
  NO_BARRIER,
  WRONG_FRAGMENT,
  DIVERGENT_SHUFFLE,
  PARTIAL_BARRIER,
  MISALIGNED_COPY,
  MISALIGNED_LDMATRIX,
  PAST_THE_END,
  UNINITIALISED
};

constexpr int kRows = 64, kColumns = 64, kDepth = 32, kThreads = 128;
constexpr int kShared = 2 * (kRows + kColumns) * kDepth * 2;

__global__ void __launch_bounds__(kThreads)
    matmul(const mmk::bf16* a, const mmk::bf16* b, float* c, int n, int depth, int fault) {
  using mmk::bf16;
  auto* tiles = reinterpret_cast<bf16*>(mmk::shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto element = [](int row, int column) { return row * kDepth + (column ^ (row / 2 % 4 * 8)); };
  auto load = [&](int stage, int k) {
    for (int i = threadIdx.x; i < (kRows + kColumns) * (kDepth / 8); i += kThreads) {
      const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
      const bf16* source =
          row < kRows ? a + (blockIdx.x * kRows + row) * depth : b + (blockIdx.y * kColumns + row - kRows) * depth;
      bf16* target = tiles + stage * (kRows + kColumns) * kDepth + element(row, column);
      mmk::ptx::cp_async<16>(target + (fault == MISALIGNED_COPY), source + k + column);
    }
    mmk::ptx::cp_async_commit();
  };
  float sum[8][4] = {};
  if (fault != UNINITIALISED) load(0, 0);
  for (int k = 0, stage = 0; k < depth; k += kDepth, stage ^= 1) {
    if (k + kDepth < depth)
      load(stage ^ 1, k + kDepth);
    else
      mmk::ptx::cp_async_commit();
    if (fault != NO_WAIT) mmk::ptx::cp_async_wait<1>();
    if (fault != PARTIAL_BARRIER || warp < 3 || k == 0) __syncthreads();
    const bf16* left = tiles + stage * (kRows + kColumns) * kDepth;
    const bf16* right = left + kRows * kDepth;
    for (int kk = 0; kk < kDepth; kk += 16) {
      uint32_t x[4], y[4];
      mmk::ptx::ldmatrix_x4(x,
                            left + element(warp * 16 + lane % 16, kk + lane / 16 * 8) + (fault == MISALIGNED_LDMATRIX));
      for (int j = 0; j < 8; j += 2) {
        mmk::ptx::ldmatrix_x4(y, right + element(j * 8 + lane / 16 * 8 + lane % 8, kk + lane / 8 % 2 * 8));
        mmk::ptx::mma_16x8x16<bf16>(sum[j], x, y[0], y[1]);
        mmk::ptx::mma_16x8x16<bf16>(sum[j + 1], x, y[fault == WRONG_FRAGMENT ? 3 : 2],
                                    y[fault == WRONG_FRAGMENT ? 2 : 3]);
      }
    }
    if (fault != NO_BARRIER) __syncthreads();
  }
  if (fault == PAST_THE_END) mmk::shared_memory()[kShared] = 0;
  if (fault == DIVERGENT_SHUFFLE && lane < 16) sum[0][0] = __shfl_xor_sync(0xffffffffu, sum[0][0], 1);
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.x * kRows + warp * 16 + lane / 4 + i / 2 * 8;
      c[static_cast<size_t>(row) * n + blockIdx.y * kColumns + j * 8 + lane % 4 * 2 + i % 2] = sum[j][i];
    }
  }
}

int main(int count, char** arguments) {
  const int fault = count > 1 ? std::atoi(arguments[1]) : NONE;
  constexpr int m = 128, n = 128, depth = 512;
  std::vector<mmk::bf16> a(m * depth), b(n * depth);
  std::vector<float> c(m * n);
  for (auto& x : a) x = mmk::from_float<mmk::bf16>(static_cast<float>(std::rand() % 17 - 8));
  for (auto& x : b) x = mmk::from_float<mmk::bf16>(static_cast<float>(std::rand() % 17 - 8));
  if (mmk::launch(matmul, dim3(m / kRows, n / kColumns), dim3(kThreads), kShared, nullptr, a.data(), b.data(), c.data(),
                  n, depth, fault)) {
    std::printf("%s\n", mmk::emulator::last_error().c_str());
    return 2;
  }
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float exact = 0;
      for (int k = 0; k < depth; ++k) exact += mmk::to_float(a[i * depth + k]) * mmk::to_float(b[j * depth + k]);
      if (c[i * n + j] != exact) {
        std::printf("c[%d][%d] is %g, it must be %g\n", i, j, c[i * n + j], exact);
        return 1;
      }
    }
  }
  std::puts("right");
}
