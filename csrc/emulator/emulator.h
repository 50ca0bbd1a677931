// Stands in for cuda_runtime.h, cuda_bf16.h, cuda_fp16.h and the PTX of common/ptx.cuh when a kernel is compiled with
// g++.
//
// A block is run by one fiber a thread. Warp collectives (shuffles, votes, ldmatrix, mma) are meeting points: the lane
// that arrives last computes the result of all 32 from the register layout that the PTX manual documents. Warps advance
// in random bursts, lanes in random order. Shared memory starts as NaN; a cp.async lands at once, as late as its wait
// allows, or at random, and what it will overwrite is NaN until then. A wgmma reads its operands through descriptors,
// as the manual lays core matrices out, at once, as late as its wait allows, or at random; its accumulators are NaN
// until waited for; operands in registers are read when the product is made. A TMA copy or a st.async lands at once, or
// as late as the wait for its mbarrier; the blocks of a cluster run side by side, other blocks one after another. Found
// and explained: a collective that part of a warp never reaches, barriers that not every thread reaches, misaligned or
// out-of-bounds operands of cp.async, ldmatrix and wgmma, an mbarrier with too many arrivals or none of its own, a
// wgmma without its fence, operands of a wgmma that were written without a proxy fence (by cp.async or store_shared),
// writes past the end of shared memory (plain reads past it: AddressSanitizer). Not modelled: timing, other memory
// ordering, bank conflicts, occupancy, swizzles but that of 128 bytes; masks other than all 32 lanes are refused.
//
// MMKERNELS_EMULATOR_SEED             the random order (default 0)
// MMKERNELS_EMULATOR_COPIES           early, late or random (default late)
// MMKERNELS_EMULATOR_MULTIPROCESSORS  what the launchers are told about the device (default 4)
// MMKERNELS_EMULATOR_SHARED           its bytes of shared memory a block (default 232448, as sm_90; sm_80 has 166912)
// MMKERNELS_EMULATOR_CAPABILITY       its compute capability's major number (default 9)
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

namespace mmk::emulator {

using Where = std::source_location;

// What the last failed launch of this process found; empty when there was none.
const std::string& last_error();
// Runs every block of a grid; returns 0, or 1 with the reason in `last_error()`.
int run(int cluster, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
int multiprocessors();
int shared_memory_limit();
int capability();

// Ends the launch with a message that names the block, the thread and the place.
[[noreturn]] void fail(const std::string& what, const Where& where);
unsigned char* shared();
// Fails unless [p, p + bytes) lies in shared memory and p is a multiple of bytes.
void check_shared(const void* p, int bytes, const char* what, const Where& where);
void barrier(const Where& where);
// Blocks the lane until all 32 are here, then `act` runs once on what each brought along.
void meet(const char* what, const Where& where, void* mine, void (*act)(void* const* lanes));
void copy(void* shared, const void* global, int bytes, int valid, const Where& where);
void commit();
void wait(int pending);

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};
void shuffle(void* const* lanes);
void vote(void* const* lanes);

template <class T>
T exchange(const char* what, const Where& where, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) fail(std::string(what) + " with a mask of less than 32 lanes", where);
  Shuffle mine{0, source & 31, 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  meet(what, where, &mine, shuffle);
  std::memcpy(&value, &mine.result, sizeof(T));
  return value;
}

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

struct Load {
  const void* row;
  int count;
  bool transposed;
  uint32_t* result;
};
void load_matrices(void* const* lanes);

// Lane l has the address of row l % 8 of matrix l / 8, and two elements of row l / 4 of each matrix.
struct Store {
  void* row;
  const uint32_t* values;
};
void store_matrices(void* const* lanes);

enum class Type { bf16, fp16, tf32 };
struct Multiply {
  Type type;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
void multiply(void* const* lanes);

// sm_90. Shared memory that `written` names counts as out of wgmma's sight until the writing lane's proxy fence.
void written(const void* p, int bytes);
void proxy_fence();
void mbarrier_init(const void* barrier, int arrivals, const Where& where);
void mbarrier_arrive(const void* barrier, const Where& where);
void mbarrier_wait(const void* barrier, int parity, const Where& where);
void named_barrier(int barrier, int threads, const Where& where);
void cluster_barrier(const Where& where);
int cluster_rank();
const void* of_rank(const void* p, int rank);  // the same place in the shared memory of another block of the cluster
struct TensorMap {                             // of 16-bit elements; strides in bytes, the innermost is 2
  const char* data;
  int64_t size[3], stride[2];
  int box[3];
};
void mbarrier_expect(const void* barrier, int bytes, const Where& where);
void copy_box(void* shared, const TensorMap& map, const int (&at)[3], const void* barrier, const Where& where);
void store_async(void* to, const void* value, int bytes, const void* barrier, const Where& where);
struct GroupMultiply {
  Type type;
  float* d;
  int columns;
  uint64_t a, b;
  bool by_columns, left_by_columns, keep;
  Where where;
  const uint32_t* registers = nullptr;  // a's, instead of a descriptor
};
void group_multiply(void* const* lanes);
void group_fence(void* const*);
void group_commit(void* const*);
void group_wait(void* const* lanes);  // each brings an int: how many groups may stay

uint16_t half_bits(float x);
float half_value(uint16_t bits);

}  // namespace mmk::emulator

#define MMK_WHERE mmk::emulator::Where where = mmk::emulator::Where::current()

inline void __syncthreads(MMK_WHERE) { mmk::emulator::barrier(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, MMK_WHERE) {
  mmk::emulator::exchange("__syncwarp", where, mask, 0, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, MMK_WHERE) {
  return mmk::emulator::exchange("__shfl_sync", where, mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, MMK_WHERE) {
  return mmk::emulator::exchange("__shfl_xor_sync", where, mask, value, mmk::emulator::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, MMK_WHERE) {
  const int source = mmk::emulator::lane() + delta;
  return mmk::emulator::exchange("__shfl_down_sync", where, mask, value, source < 32 ? source : mmk::emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MMK_WHERE) {
  if (mask != 0xffffffffu) mmk::emulator::fail("__ballot_sync with a mask of less than 32 lanes", where);
  mmk::emulator::Shuffle mine{predicate != 0, 0, 0};
  mmk::emulator::meet("__ballot_sync", where, &mine, mmk::emulator::vote);
  return static_cast<unsigned>(mine.result);
}
inline int __any_sync(unsigned mask, int predicate, MMK_WHERE) { return __ballot_sync(mask, predicate, where) != 0; }
inline int __all_sync(unsigned mask, int predicate, MMK_WHERE) {
  return __ballot_sync(mask, predicate, where) == 0xffffffffu;
}

namespace mmk {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) { return emulator::half_value(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = __float_as_uint(x);
  return {static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {emulator::half_bits(x)};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline unsigned char* shared_memory() { return emulator::shared(); }

template <class... Parameters, class... Arguments>
int launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                    Arguments... arguments) {
  return emulator::run(cluster, grid, block, shared_bytes, [&] { kernel(arguments...); });
}
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  return launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <class... Parameters>
int most_clusters(int cluster, void (*)(Parameters...), dim3, size_t) {
  return std::max(1, emulator::multiprocessors() / cluster);
}

namespace ptx {

template <int Bytes>
void cp_async(void* shared, const void* global, int valid = Bytes, MMK_WHERE) {
  static_assert(Bytes == 16 || Bytes == 8 || Bytes == 4, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy(shared, global, Bytes, valid, where);
}
inline void cp_async_commit() { emulator::commit(); }
template <int Pending>
void cp_async_wait() {
  emulator::wait(Pending);
}

inline void prefetch(const void*) {}

inline void load_matrices(const char* what, const emulator::Where& where, uint32_t* r, int count, bool transposed,
                          const void* row) {
  if (emulator::lane() < count * 8) emulator::check_shared(row, 16, what, where);
  emulator::Load mine{row, count, transposed, r};
  emulator::meet(what, where, &mine, emulator::load_matrices);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, MMK_WHERE) {
  load_matrices("ldmatrix.x4", where, r, 4, false, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, MMK_WHERE) {
  load_matrices("ldmatrix.x4.trans", where, r, 4, true, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, MMK_WHERE) {
  load_matrices("ldmatrix.x2", where, r, 2, false, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, MMK_WHERE) {
  load_matrices("ldmatrix.x2.trans", where, r, 2, true, row);
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, MMK_WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  emulator::Multiply mine{std::is_same_v<T, bf16> ? emulator::Type::bf16 : emulator::Type::fp16, d, a, {b0, b1}};
  emulator::meet("mma.m16n8k16", where, &mine, emulator::multiply);
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, MMK_WHERE) {
  emulator::Multiply mine{emulator::Type::tf32, d, a, {b0, b1}};
  emulator::meet("mma.m16n8k8.tf32", where, &mine, emulator::multiply);
}

// As in common/hopper.cuh.
inline void stmatrix_x4(void* row, const uint32_t (&r)[4], MMK_WHERE) {
  emulator::check_shared(row, 16, "stmatrix.x4", where);
  emulator::Store mine{row, r};
  emulator::meet("stmatrix.x4", where, &mine, emulator::store_matrices);
}
inline void mbarrier_init(uint64_t* barrier, int arrivals, MMK_WHERE) {
  emulator::mbarrier_init(barrier, arrivals, where);
}
inline void mbarrier_arrive(uint64_t* barrier, MMK_WHERE) { emulator::mbarrier_arrive(barrier, where); }
inline void mbarrier_wait(uint64_t* barrier, int parity, MMK_WHERE) { emulator::mbarrier_wait(barrier, parity, where); }
inline void named_barrier(int barrier, int threads, MMK_WHERE) { emulator::named_barrier(barrier, threads, where); }
inline void fence_proxy_async() { emulator::proxy_fence(); }
template <class T>
void store_shared(void* to, T value, MMK_WHERE) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint4>);
  emulator::check_shared(to, sizeof(T), "store_shared", where);
  std::memcpy(to, &value, sizeof(T));
  emulator::written(to, sizeof(T));
}
template <int>
void claim_registers() {}
template <int>
void release_registers() {}
inline uint64_t descriptor(const void* operand, int leading, int stride) {
  const auto offset = static_cast<const unsigned char*>(operand) - emulator::shared();
  return static_cast<uint64_t>((offset & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32;
}
inline uint64_t swizzled_descriptor(const void* operand) { return descriptor(operand, 16, 1024) | uint64_t{1} << 62; }
inline uint64_t swizzled_descriptor_by_columns(const void* operand, int next) {
  return descriptor(operand, next, 1024) | uint64_t{1} << 62;
}
inline unsigned char* align_to_1024(unsigned char* p) { return p; }  // addresses here are offsets
using emulator::TensorMap;
template <class T>
int make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[3], const int64_t (&stride)[2],
                    const int (&box)[3]) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || stride[0] % 16 || stride[1] % 16 || box[0] * sizeof(T) != 128) return 1;
  map = {static_cast<const char*>(data), {size[0], size[1], size[2]}, {stride[0], stride[1]}, {box[0], box[1], box[2]}};
  return 0;
}
inline void mbarrier_expect(uint64_t* barrier, int bytes, MMK_WHERE) {
  emulator::mbarrier_expect(barrier, bytes, where);
}
inline void copy_box(void* shared, const TensorMap& map, int i0, int i1, int i2, uint64_t* barrier, MMK_WHERE) {
  emulator::copy_box(shared, map, {i0, i1, i2}, barrier, where);
}
inline void copy_box_to_cluster(void* shared, const TensorMap& map, int i0, int i1, int i2, uint64_t* barrier,
                                unsigned ranks, MMK_WHERE) {
  for (int rank = 0; ranks >> rank; ++rank) {
    if (ranks >> rank & 1)
      emulator::copy_box(const_cast<void*>(emulator::of_rank(shared, rank)), map, {i0, i1, i2},
                         emulator::of_rank(barrier, rank), where);
  }
}
inline int cluster_rank() { return emulator::cluster_rank(); }
template <class Type>
Type* of_rank(Type* p, int rank) {
  return static_cast<Type*>(const_cast<void*>(emulator::of_rank(p, rank)));
}
template <class Value>
void store_async(Value* to, Value value, uint64_t* barrier, int rank, MMK_WHERE) {
  emulator::store_async(of_rank(to, rank), &value, sizeof(Value), of_rank(barrier, rank), where);
}
inline void cluster_sync(MMK_WHERE) { emulator::cluster_barrier(where); }
inline void mbarrier_fence() {}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank, MMK_WHERE) {
  emulator::mbarrier_arrive(emulator::of_rank(barrier, rank), where);
}
inline void wgmma_fence(MMK_WHERE) { emulator::meet("wgmma.fence", where, nullptr, emulator::group_fence); }
inline void hold(uint32_t (&)[4]) {}
template <class Int>
Int hide(Int x) {
  return x;
}
inline void wgmma_commit(MMK_WHERE) { emulator::meet("wgmma.commit_group", where, nullptr, emulator::group_commit); }
template <int Pending>
void wgmma_wait(MMK_WHERE) {
  int pending = Pending;
  emulator::meet("wgmma.wait_group", where, &pending, emulator::group_wait);
}
template <class T, bool ByColumns, bool LeftByColumns = false, int Registers>
void wgmma(float (&d)[Registers], uint64_t a, uint64_t b, int keep, MMK_WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const auto type = std::is_same_v<T, bf16> ? emulator::Type::bf16 : emulator::Type::fp16;
  emulator::GroupMultiply mine{type, d, 2 * Registers, a, b, ByColumns, LeftByColumns, keep != 0, where};
  emulator::meet("wgmma.mma_async", where, &mine, emulator::group_multiply);
}

template <class T, bool ByColumns, int Registers>
void wgmma_of_registers(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, int keep, MMK_WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const auto type = std::is_same_v<T, bf16> ? emulator::Type::bf16 : emulator::Type::fp16;
  emulator::GroupMultiply mine{type, d, 2 * Registers, 0, b, ByColumns, false, keep != 0, where, a};
  emulator::meet("wgmma.mma_async", where, &mine, emulator::group_multiply);
}

inline uint32_t to_tf32(float x) {
  const uint32_t u = __float_as_uint(x);
  return std::isfinite(x) ? (u + 0x1000) & ~0x1fffu : u;
}
inline float exp2(float x) { return std::exp2(x); }
template <class T>
uint32_t relu_pair(uint32_t x) {
  auto half = [](uint16_t bits) -> uint32_t { return to_float(T{bits}) < 0.0f || bits == 0x8000 ? 0 : bits; };
  return half(static_cast<uint16_t>(x)) | half(static_cast<uint16_t>(x >> 16)) << 16;
}
template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  auto half = [&](int bits) -> uint32_t {  // in float64 the product is exact
    auto value = [&](uint32_t x) { return double{to_float(T{static_cast<uint16_t>(x >> bits)})}; };
    return from_float<T>(static_cast<float>(value(a) * value(b) + value(c))).bits;
  };
  return half(0) | half(16) << 16;
}

}  // namespace ptx
}  // namespace mmk
