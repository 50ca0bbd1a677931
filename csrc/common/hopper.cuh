// Instructions of sm_90a: mbarrier, TMA, named barriers, wgmma on operands in shared memory, setmaxnreg. Only kernels
// for compute capability 9.0 may call them; their bodies stand inside `#ifdef MMK_HOPPER`.
//
// Operands of a wgmma lie in shared memory as TMA brings them (`swizzled_descriptor`) or, without swizzle, as "core
// matrices" of 8 x 16 bytes = 128 bytes in a row. A tile of n rows by c 16-bit channels is then stored at
//
//     address(row, channel) = channel / 8 * n * 16 + row * 16 + channel % 8 * 2
//
// and serves both products of attention: with channels as the depth (K-major; q xhat^T) and with rows as the depth
// (MN-major; P xhat). The descriptor says how far core matrices are apart in the two directions, and which direction is
// which depends on the major (PTX ISA, "Shared memory matrix layout", no swizzle):
//
//                 leading                        stride
//     K-major     next 8 of the depth: n * 16    next 8 rows: 128
//     MN-major    next 8 of the depth: 128       next 8 channels: n * 16
#pragma once
#include "common/ptx.cuh"

#if defined(MMK_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MMK_HOPPER
#endif

#ifndef MMK_EMULATOR
#include <cuda.h>

#include <map>
#include <tuple>
#include <type_traits>

namespace mmk {

// Clusters that the device runs at a time, which is less than its multiprocessors have room for: a cluster lies within
// one of their groups. 0 where it runs none. A thread asks the driver once.
template <class... Parameters>
int most_clusters(int cluster, void (*kernel)(Parameters...), dim3 block, size_t shared_bytes) {
  int device = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  static thread_local std::map<std::tuple<int, const void*, int, unsigned, size_t>, int> known;
  const std::tuple key(device, reinterpret_cast<const void*>(kernel), cluster, block.x, shared_bytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (allow_shared(kernel, shared_bytes) != cudaSuccess) return 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) return 0;
  return known[key] = clusters;
}

namespace ptx {

// --- Barriers ---

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the phase of this parity is over; the first phase has parity 0, and the one before it counts as over.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrives, and keeps the phase open until copies have brought `bytes` more.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// --- Matrix fragments ---

// ldmatrix_x4 the other way round: lane l gives the address of row l % 8 of matrix l / 8 and, of each matrix, elements
// 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// --- TMA ---

using TensorMap = CUtensorMap;

// The first address from p on that is a multiple of 1024, as swizzled tiles want it.
__device__ __forceinline__ unsigned char* align_to_1024(unsigned char* p) { return p + (-shared_address(p) & 1023); }

// On the host: a tensor of 16-bit elements that is copied in boxes whose rows are 128 bytes; sizes from the innermost
// dimension outwards, strides in bytes of the two outer ones. Elements outside of it are copied as zeros. Returns a
// CUDA error code.
template <class T>
int make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[3], const int64_t (&stride)[2],
                    const int (&box)[3]) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return static_cast<int>(error);
  if (found != cudaDriverEntryPointSuccess || !entry) return static_cast<int>(cudaErrorSymbolNotFound);
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(size[0]), static_cast<cuuint64_t>(size[1]),
                               static_cast<cuuint64_t>(size[2])};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride[0]), static_cast<cuuint64_t>(stride[1])};
  const cuuint32_t boxes[3] = {static_cast<cuuint32_t>(box[0]), static_cast<cuuint32_t>(box[1]),
                               static_cast<cuuint32_t>(box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

// One thread starts the copy of the box whose first element has these numbers; `barrier` must expect its bytes. The
// address is a multiple of 1024; within it, bits 4 to 6 of an address are xored with bits 7 to 9.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int i0, int i1, int i2,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(i0), "r"(i1), "r"(i2)
      : "memory");
}

// The same into every block of the cluster whose bit is set in `ranks`: to the same place, and for the barrier at the
// same place, in each of them.
__device__ __forceinline__ void copy_box_to_cluster(void* shared, const TensorMap& map, int i0, int i1, int i2,
                                                    uint64_t* barrier, unsigned ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(i0), "r"(i1), "r"(i2), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

// --- Clusters ---

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster, or of this one.
template <class Type>
__device__ __forceinline__ Type* of_rank(Type* p, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<Type*>(there);
}

// Stores to the same place of another block of the cluster, or of this one, and counts the bytes at its barrier in the
// same place. Nothing else that this thread has written is known there then.
__device__ __forceinline__ void store_async(uint32_t* to, uint32_t value, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counter];\n}" ::"r"(
          shared_address(to)),
      "r"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void store_async(float2* to, float2 value, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 counter, %3, %4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [counter];\n}" ::"r"(
          shared_address(to)),
      "f"(value.x), "f"(value.y), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// What mbarrier_init has written may be used by the cluster and by copies once others know of it.
__device__ __forceinline__ void mbarrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// At the barrier in the same place of another block of the cluster, or of this one. What this thread has read counts as
// read there; what it has written is not meant for the other block (that would be .release.cluster, a fence of the
// GPU).
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// All `threads` of the block that name this barrier (1 to 15).
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has written to shared memory may be read by wgmma once others know of it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Stores that wgmma will read.
__device__ __forceinline__ void store_shared(void* to, uint32_t value) { *static_cast<uint32_t*>(to) = value; }
__device__ __forceinline__ void store_shared(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

template <int Registers>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// x, of which the compiler does not know that it is the same in every turn of a loop: what follows from it is computed
// where it is used, not held in registers that a warpgroup has given away.
template <class Int>
__device__ __forceinline__ Int hide(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- wgmma ---

// Distances in bytes, multiples of 16.
__device__ __forceinline__ uint64_t descriptor(const void* operand, int leading, int stride) {
  return uint64_t{(shared_address(operand) & 0x3ffff) >> 4} | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32;
}

// Of a K-major operand in rows of 128 bytes as `copy_box` brings them: 8 rows are 1024 bytes. A step of 16 along the
// depth is 32 bytes further.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* operand) {
  return descriptor(operand, 16, 1024) | uint64_t{1} << 62;
}

// Of an MN-major operand in such rows, of 64 of its rows or columns each; rows are the depth, and a step of 16 is 2048
// bytes further. The next 64 rows or columns are `next` bytes away.
__device__ __forceinline__ uint64_t swizzled_descriptor_by_columns(const void* operand, int next) {
  return descriptor(operand, next, 1024) | uint64_t{1} << 62;
}

// Before the first wgmma, and wherever registers that it uses have been written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Registers that a left operand is made from, and itself: what is written before this stays before it, and what is made
// from them after it. Without it the compiler moves the making across a wait or a fence, and the products one by one.
__device__ __forceinline__ void hold(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The registers of m64nNk16, four for each 8 columns: their names in the text, and the operands.
#define MMK_R16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MMK_R32 MMK_R16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MMK_R48 MMK_R32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define MMK_R64 MMK_R48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define MMK_R80 MMK_R64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define MMK_R96 MMK_R80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define MMK_R112 MMK_R96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define MMK_R128 MMK_R112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define MMK_R136 MMK_R128 ",%64,%65,%66,%67"
#define MMK_R144 MMK_R128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define MMK_R160 MMK_R144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define MMK_R176 MMK_R160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define MMK_R192 MMK_R176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define MMK_R208 MMK_R192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define MMK_R224 MMK_R208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define MMK_R240 MMK_R224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define MMK_R256 MMK_R240 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define MMK_D(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MMK_D16 MMK_D(0)
#define MMK_D32 MMK_D16, MMK_D(8)
#define MMK_D48 MMK_D32, MMK_D(16)
#define MMK_D64 MMK_D48, MMK_D(24)
#define MMK_D80 MMK_D64, MMK_D(32)
#define MMK_D96 MMK_D80, MMK_D(40)
#define MMK_D112 MMK_D96, MMK_D(48)
#define MMK_D128 MMK_D112, MMK_D(56)
#define MMK_D136 MMK_D128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define MMK_D144 MMK_D128, MMK_D(64)
#define MMK_D160 MMK_D144, MMK_D(72)
#define MMK_D176 MMK_D160, MMK_D(80)
#define MMK_D192 MMK_D176, MMK_D(88)
#define MMK_D208 MMK_D192, MMK_D(96)
#define MMK_D224 MMK_D208, MMK_D(104)
#define MMK_D240 MMK_D224, MMK_D(112)
#define MMK_D256 MMK_D240, MMK_D(120)
// A, B, Keep, Left, Right: the numbers of the operands after the registers.
#define MMK_WGMMA(N, TYPE, A, B, KEEP, RIGHT, LEFT)                                                                  \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
               "k16.f32." TYPE "." TYPE " {" MMK_R##N "}, %" #A ", %" #B ", keep, 1, 1, %" #LEFT ", %" #RIGHT ";\n}" \
               : MMK_D##N                                                                                            \
               : "l"(a), "l"(b), "r"(keep), "n"(ByColumns), "n"(LeftByColumns))
#define MMK_WGMMA_OF(TYPE)                                           \
  if constexpr (N == 16) MMK_WGMMA(16, TYPE, 8, 9, 10, 11, 12);      \
  if constexpr (N == 32) MMK_WGMMA(32, TYPE, 16, 17, 18, 19, 20);    \
  if constexpr (N == 48) MMK_WGMMA(48, TYPE, 24, 25, 26, 27, 28);    \
  if constexpr (N == 64) MMK_WGMMA(64, TYPE, 32, 33, 34, 35, 36);    \
  if constexpr (N == 96) MMK_WGMMA(96, TYPE, 48, 49, 50, 51, 52);    \
  if constexpr (N == 128) MMK_WGMMA(128, TYPE, 64, 65, 66, 67, 68);  \
  if constexpr (N == 144) MMK_WGMMA(144, TYPE, 72, 73, 74, 75, 76);  \
  if constexpr (N == 176) MMK_WGMMA(176, TYPE, 88, 89, 90, 91, 92);  \
  if constexpr (N == 192) MMK_WGMMA(192, TYPE, 96, 97, 98, 99, 100); \
  if constexpr (N == 256) MMK_WGMMA(256, TYPE, 128, 129, 130, 131, 132)

// d (64 x N) = keep ? d + a b : a b over a depth of 16, T in, fp32 out, for the 128 threads of a warpgroup. a is
// K-major, or MN-major with LeftByColumns; b K-major, or MN-major with ByColumns. Asynchronous: d, a and b are the
// tensor cores' until a wgmma_wait. With g = lane / 4, t = lane % 4, element i of d is row 16 (warp % 4) + g + 8 (i / 2
// % 2), column 8 (i / 4) + 2 t + i % 2.
template <class T, bool ByColumns, bool LeftByColumns = false, int Registers>
__device__ __forceinline__ void wgmma(float (&d)[Registers], uint64_t a, uint64_t b, int keep) {
  constexpr int N = 2 * Registers;
  static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 96 || N == 128 || N == 144 || N == 176 || N == 192 ||
                N == 256);
  if constexpr (std::is_same_v<T, bf16>) {
    MMK_WGMMA_OF("bf16");
  } else {
    MMK_WGMMA_OF("f16");
  }
}

#define MMK_WGMMA_OF_REGISTERS(N, TYPE, A0, A1, A2, A3, B, KEEP, RIGHT)                                      \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." TYPE "." TYPE " {" MMK_R##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B    \
                                                      ", keep, 1, 1, %" #RIGHT ";\n}"                        \
               : MMK_D##N                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(ByColumns))
#define MMK_WGMMA_OF_REGISTERS_OF(TYPE)                                                  \
  if constexpr (N == 48) MMK_WGMMA_OF_REGISTERS(48, TYPE, 24, 25, 26, 27, 28, 29, 30);   \
  if constexpr (N == 64) MMK_WGMMA_OF_REGISTERS(64, TYPE, 32, 33, 34, 35, 36, 37, 38);   \
  if constexpr (N == 96) MMK_WGMMA_OF_REGISTERS(96, TYPE, 48, 49, 50, 51, 52, 53, 54);   \
  if constexpr (N == 112) MMK_WGMMA_OF_REGISTERS(112, TYPE, 56, 57, 58, 59, 60, 61, 62); \
  if constexpr (N == 128) MMK_WGMMA_OF_REGISTERS(128, TYPE, 64, 65, 66, 67, 68, 69, 70); \
  if constexpr (N == 136) MMK_WGMMA_OF_REGISTERS(136, TYPE, 68, 69, 70, 71, 72, 73, 74)

// The same with a in registers, a warp's 16 rows of it as `ldmatrix_x4` and mma_16x8x16 have them. They are the tensor
// cores' as well until a wgmma_wait, and want a wgmma_fence after they are written.
template <class T, bool ByColumns, int Registers>
__device__ __forceinline__ void wgmma_of_registers(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b,
                                                   int keep) {
  constexpr int N = 2 * Registers;
  static_assert(N == 48 || N == 64 || N == 96 || N == 112 || N == 128 || N == 136);
  if constexpr (std::is_same_v<T, bf16>) {
    MMK_WGMMA_OF_REGISTERS_OF("bf16");
  } else {
    MMK_WGMMA_OF_REGISTERS_OF("f16");
  }
}

}  // namespace ptx
}  // namespace mmk
#endif
