// The scheduler of the emulator: fibers, meeting points, copies in flight. See emulator.h for what it promises.
#include "emulator/emulator.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulator switches fibers with x86-64 assembly"
#endif

// Saves the callee-saved registers on this stack, stores the stack pointer, and resumes the other stack. (ucontext
// would do the same with two system calls a switch.)
asm(R"(
.text
.hidden mmk_emulator_switch
.globl mmk_emulator_switch
.type mmk_emulator_switch, @function
mmk_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mmk_emulator_switch, .-mmk_emulator_switch
)");
extern "C" void mmk_emulator_switch(void** save, void* resume);

namespace mmk::emulator {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr int kMaxCluster = 8;
constexpr size_t kMaxShared = 227 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kFence = 0;  // AddressSanitizer watches the end of shared memory itself
#else
constexpr size_t kFence = 1024;
#endif

struct Random {
  uint64_t state;
  uint32_t next() {
    state += 0x9E3779B97F4A7C15ull;
    uint64_t z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<uint32_t>(z >> 32);
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  void land() const {
    std::memcpy(to, from, valid);
    std::memset(static_cast<char*>(to) + valid, 0, bytes - valid);
  }
};

enum class State { ready, at_collective, at_barrier, at_named_barrier, at_mbarrier, done };

struct Lane {
  char* stack = nullptr;
  void* pointer = nullptr;  // the saved stack pointer
  State state = State::ready;
  const char* what = "";
  Where where;
  dim3 index;
  std::vector<Copy> open;  // copies since the last commit
  std::deque<std::vector<Copy>> groups;
  std::vector<size_t> unfenced;  // words of shared memory, see Worker::writers
  ptrdiff_t waits_for = 0;       // the named barrier's number, or the mbarrier's offset in shared memory
  void* fake_stack = nullptr;    // AddressSanitizer's
};

// Accumulators of one warp that the tensor cores work on: the lanes' registers, NaN meanwhile, and their true values.
struct Accumulators {
  std::array<float*, 32> registers;
  std::vector<float> values;
  int count, users = 0;
};

// A warp's quarter of a wgmma.
struct Product {
  GroupMultiply what;
  std::shared_ptr<Accumulators> sum;
  std::array<const uint32_t*, 32> left{};  // of the lanes, where a is in registers
  bool done = false;
};

struct Warp {
  std::array<void*, 32> brought;
  int arrived = 0, ready = 32;
  std::vector<Product> open;  // since the last commit
  std::deque<std::vector<Product>> groups;
  bool fenced = false;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
};

struct BoxCopy {
  TensorMap map;
  int at[3];
  ptrdiff_t to;  // in shared memory
};

struct AsyncStore {
  ptrdiff_t to;
  uint64_t value;
  int bytes;
};

struct MBarrier {
  int expected, pending, phase = 0;
  int64_t bytes = 0;           // that copies have not brought yet
  std::vector<BoxCopy> boxes;  // under way
  std::vector<AsyncStore> stores;
};

struct Failure {};  // ends the fiber that found a fault

// One OS thread's share: runs blocks one after another and keeps their stacks. The blocks of a cluster run side by
// side, their lanes and their shared memory one behind the other.
struct Worker {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  size_t shared_bytes = 0;
  bool burst = false;                                // the warp that runs may go on
  std::array<NamedBarrier, 16 * kMaxCluster> named;  // 0 of the first block: all threads of the cluster
  std::map<ptrdiff_t, MBarrier> mbarriers;
  std::vector<uint16_t> writers;  // of each word of shared memory that wgmma must not read yet: lane + 1, or 0
  int current = -1, threads = 0, block_threads = 0, finished = 0;
  size_t block_shared = 0;  // bytes from one block's shared memory to the next's
  dim3 first_block;         // of the cluster
  std::array<int, kMaxCluster> at_barrier;
  void* scheduler = nullptr;
  Random random{0};
  int late_of_256 = 256;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  ~Worker() {
    for (Lane& lane : lanes) {
      if (lane.stack) munmap(lane.stack - kGuard, kStack + kGuard);
    }
  }
  void prepare(int count, size_t bytes, int cluster);
  int rank() const { return current / block_threads; }
  unsigned char* own_shared() const { return shared.get() + rank() * block_shared; }
  void run_block();
  void resume(int lane);
  void suspend(State state, const char* what, const Where& where);
  void diagnose();
  void wake(State state, ptrdiff_t what);
  void pause(const char* what, const Where& where);
};

thread_local Worker* worker = nullptr;
std::string launch_error;

std::string place(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

// The first function of every fiber.
void fiber() {
  Worker& w = *worker;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_stack, &w.scheduler_stack_bytes);
#endif
  try {
    (*w.kernel)();
  } catch (const Failure&) {
  }
  Lane& me = w.lanes[w.current];
  me.state = State::done;
  --w.warps[w.current / 32].ready;
  ++w.finished;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, w.scheduler_stack, w.scheduler_stack_bytes);
#endif
  mmk_emulator_switch(&me.pointer, w.scheduler);
}

void Worker::prepare(int count, size_t bytes, int cluster) {
  block_threads = count;
  block_shared = cluster > 1 ? (bytes + 1023) / 1024 * 1024 : bytes;
  if (cluster > 1) bytes = block_shared * cluster;
  threads = count *= cluster;
  if (static_cast<int>(lanes.size()) < count) lanes.resize(count);
  warps.assign(count / 32, Warp{});
  named.fill({});
  mbarriers.clear();
  writers.assign(bytes / 4, 0);
  at_barrier.fill(0);
  finished = 0;
  shared_bytes = bytes;
  shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, (bytes + kFence + 1023) / 1024 * 1024)));
#ifdef __SANITIZE_ADDRESS__
  void* exact = nullptr;  // aligned_alloc rounds up; the end must be the kernel's own
  if (posix_memalign(&exact, 1024, std::max<size_t>(bytes, 1)) != 0) std::abort();
  shared.reset(static_cast<unsigned char*>(exact));
#endif
  std::memset(shared.get(), kPoison, bytes + kFence);
  for (int i = 0; i < count; ++i) {
    Lane& lane = lanes[i];
    if (!lane.stack) {
      char* memory = static_cast<char*>(
          mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (memory == MAP_FAILED) std::abort();
      mprotect(memory, kGuard, PROT_NONE);
      lane.stack = memory + kGuard;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(lane.stack, kStack);
#endif
    lane.state = State::ready;
    lane.open.clear();
    lane.groups.clear();
    lane.unfenced.clear();
    const unsigned u = i % block_threads;
    lane.index = dim3(u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y);
    // What a switch pops: six registers, then the address of `fiber`, entered with the stack that the ABI wants.
    void** top = reinterpret_cast<void**>(lane.stack + kStack - 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    lane.pointer = top;
  }
}

void Worker::resume(int i) {
  current = i;
  threadIdx = lanes[i].index;
  blockIdx = first_block;
  blockIdx.x += rank();
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, lanes[i].stack, kStack);
#endif
  mmk_emulator_switch(&scheduler, lanes[i].pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Worker::suspend(State state, const char* what, const Where& where) {
  Lane& me = lanes[current];
  me.state = state;
  me.what = what;
  me.where = where;
  --warps[current / 32].ready;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&me.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  mmk_emulator_switch(&me.pointer, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// Lets the lanes go on that wait in this state for this barrier.
void Worker::wake(State state, ptrdiff_t what) {
  for (int i = 0; i < threads; ++i) {
    if (lanes[i].state == state && lanes[i].waits_for == what) lanes[i].state = State::ready, ++warps[i / 32].ready;
  }
}

// Gives other warps a turn.
void Worker::pause(const char* what, const Where& where) {
  burst = false;
  ++warps[current / 32].ready;
  suspend(State::ready, what, where);
}

// Nobody can go on: says who waits where.
void Worker::diagnose() {
  error = "deadlock in block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
          std::to_string(blockIdx.z) + "): a barrier or warp collective is not reached by all its threads.";
  std::string previous;
  int first = 0;
  for (int i = 0; i <= threads; ++i) {
    std::string now;
    if (i < threads) {
      now = lanes[i].state == State::done
                ? "have returned"
                : std::string("wait at ") + lanes[i].what + " (" + place(lanes[i].where) + ")";
    }
    if (i && now != previous) {
      error += " Threads " + std::to_string(first) + " to " + std::to_string(i - 1) + " " + previous + ".";
      first = i;
    }
    previous = now;
  }
}

void Worker::run_block() {
  while (finished < threads && error.empty()) {
    const int count = static_cast<int>(warps.size());
    int w = static_cast<int>(random.next() % count), tried = 0;
    while (tried < count && warps[w].ready == 0) w = (w + 1) % count, ++tried;
    if (tried == count) return diagnose();
    burst = true;
    for (int turns = 1 + static_cast<int>(random.next() % 64); turns && burst && warps[w].ready && error.empty();
         --turns) {
      const uint32_t order = random.next();
      for (int i = 0; i < 32 && error.empty(); ++i) {
        const int lane = w * 32 + (i * ((order | 1) % 32) + (order >> 8)) % 32;  // an odd step visits every lane
        if (lanes[lane].state == State::ready) resume(lane);
      }
    }
  }
  if (!error.empty()) return;
  for (size_t i = shared_bytes; i < shared_bytes + kFence; ++i) {
    if (shared.get()[i] != kPoison) {
      error = "block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
              std::to_string(blockIdx.z) + ") wrote past the end of its " + std::to_string(shared_bytes) +
              " bytes of shared memory, at offset " + std::to_string(i);
      return;
    }
  }
}

uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace

const std::string& last_error() { return launch_error; }

int multiprocessors() { return static_cast<int>(environment("MMKERNELS_EMULATOR_MULTIPROCESSORS", 4)); }

int shared_memory_limit() { return static_cast<int>(environment("MMKERNELS_EMULATOR_SHARED", kMaxShared)); }

int capability() { return static_cast<int>(environment("MMKERNELS_EMULATOR_CAPABILITY", 9)); }

int run(int cluster, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_launch;
  static std::array<Worker, 2> workers;
  std::lock_guard<std::mutex> lock(one_launch);
  launch_error.clear();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % 32 != 0) {
    launch_error = "a block of " + std::to_string(threads) + " threads; it must be a multiple of 32, 32 to 1024";
  } else if (shared_bytes > static_cast<size_t>(shared_memory_limit())) {
    launch_error =
        std::to_string(shared_bytes) + " bytes of shared memory; a block has " + std::to_string(shared_memory_limit());
  } else if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    launch_error = "a grid of more than 2147483647 x 65535 x 65535 blocks";
  } else if (cluster < 1 || cluster > kMaxCluster || grid.x % cluster != 0) {
    launch_error = "clusters of " + std::to_string(cluster) + " blocks in a grid of " + std::to_string(grid.x);
  }
  if (!launch_error.empty()) return 1;

  const uint64_t seed = environment("MMKERNELS_EMULATOR_SEED", 0);
  const std::string copies =
      std::getenv("MMKERNELS_EMULATOR_COPIES") ? std::getenv("MMKERNELS_EMULATOR_COPIES") : "late";
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  auto work = [&](Worker& mine) {
    worker = &mine;
    mine.kernel = &kernel;
    mine.error.clear();
    mine.late_of_256 = copies == "early" ? 0 : copies == "random" ? 128 : 256;
    gridDim = grid;
    blockDim = block;
    for (uint64_t i; !failed && (i = next.fetch_add(cluster)) < blocks;) {
      blockIdx = mine.first_block = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                                         static_cast<unsigned>(i / grid.x / grid.y));
      mine.random.state = seed * 0x632BE59BD9B4E019ull + i;
      mine.prepare(static_cast<int>(threads), shared_bytes, cluster);
      mine.run_block();
      mine.shared.reset();
      if (!mine.error.empty()) failed = true;
    }
  };
  std::thread second;
  if (blocks > 1) second = std::thread([&] { work(workers[1]); });
  work(workers[0]);
  if (second.joinable()) second.join();
  for (Worker& w : workers) {
    if (!w.error.empty()) launch_error = w.error;
    w.error.clear();
  }
  return launch_error.empty() ? 0 : 1;
}

void fail(const std::string& what, const Where& where) {
  worker->error = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
                  std::to_string(blockIdx.z) + ", thread " + std::to_string(worker->current) + ", " + place(where) +
                  ")";
  throw Failure{};
}

unsigned char* shared() { return worker->own_shared(); }

int cluster_rank() { return worker->rank(); }

const void* of_rank(const void* p, int rank) {
  return static_cast<const unsigned char*>(p) + (rank - worker->rank()) * static_cast<ptrdiff_t>(worker->block_shared);
}

void check_shared(const void* p, int bytes, const char* what, const Where& where) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - worker->own_shared();
  if (offset < 0 || offset + bytes > static_cast<ptrdiff_t>(worker->block_shared)) {
    fail(std::string(what) + " at offset " + std::to_string(offset) + " outside the " +
             std::to_string(worker->block_shared) + " bytes of shared memory",
         where);
  }
  if (offset % bytes != 0) {
    fail(std::string(what) + " at shared offset " + std::to_string(offset) + ", not a multiple of " +
             std::to_string(bytes),
         where);
  }
}

void barrier(const Where& where) {
  Worker& w = *worker;
  const int rank = w.rank();
  if (++w.at_barrier[rank] < w.block_threads) return w.suspend(State::at_barrier, "__syncthreads", where);
  w.at_barrier[rank] = 0;
  for (int i = rank * w.block_threads; i < (rank + 1) * w.block_threads; ++i) {
    if (w.lanes[i].state == State::at_barrier) w.lanes[i].state = State::ready, ++w.warps[i / 32].ready;
  }
}

void meet(const char* what, const Where& where, void* mine, void (*act)(void* const*)) {
  Worker& w = *worker;
  const int first = w.current / 32 * 32;
  Warp& warp = w.warps[w.current / 32];
  for (int i = first; warp.arrived && i < first + 32; ++i) {
    const Lane& other = w.lanes[i];
    if (other.state != State::at_collective) continue;
    if (std::strcmp(other.what, what) != 0 || other.where.line() != where.line()) {
      fail(std::string("divergence: lane ") + std::to_string(w.current % 32) + " is at " + what + ", lane " +
               std::to_string(i % 32) + " of its warp at " + other.what + " (" + place(other.where) + ")",
           where);
    }
    break;
  }
  warp.brought[w.current % 32] = mine;
  if (++warp.arrived < 32) return w.suspend(State::at_collective, what, where);
  warp.arrived = 0;
  act(warp.brought.data());
  for (int i = first; i < first + 32; ++i) {
    if (w.lanes[i].state == State::at_collective) w.lanes[i].state = State::ready, ++warp.ready;
  }
}

static bool late() { return static_cast<int>(worker->random.next() % 256) < worker->late_of_256; }

static void land(const Copy& copy) {
  copy.land();
  written(copy.to, copy.bytes);
}

void copy(void* shared, const void* global, int bytes, int valid, const Where& where) {
  check_shared(shared, bytes, "cp.async", where);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("cp.async of " + std::to_string(bytes) + " bytes from a global address that is not a multiple of them", where);
  }
  if (valid < 0 || valid > bytes) fail("cp.async with " + std::to_string(valid) + " valid bytes", where);
  const Copy copy{shared, global, bytes, valid};
  if (!late()) return land(copy);
  std::memset(shared, kPoison, bytes);
  worker->lanes[worker->current].open.push_back(copy);
}

void commit() {
  Lane& me = worker->lanes[worker->current];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void wait(int pending) {
  Lane& me = worker->lanes[worker->current];
  for (; static_cast<int>(me.groups.size()) > pending; me.groups.pop_front()) {
    for (const Copy& copy : me.groups.front()) land(copy);
  }
}

void shuffle(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    auto* mine = static_cast<Shuffle*>(lanes[i]);
    mine->result = static_cast<Shuffle*>(lanes[mine->source])->value;
  }
}

void vote(void* const* lanes) {
  uint64_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<Shuffle*>(lanes[i])->value << i;
  for (int i = 0; i < 32; ++i) static_cast<Shuffle*>(lanes[i])->result = votes;
}

void load_matrices(void* const* lanes) {
  const int count = static_cast<Load*>(lanes[0])->count;
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<Load*>(lanes[m * 8 + r])->row, 16);
    for (int i = 0; i < 32; ++i) {
      auto* mine = static_cast<Load*>(lanes[i]);
      const int row = i / 4, column = i % 4 * 2;
      const uint32_t low = mine->transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = mine->transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      mine->result[m] = low | high << 16;
    }
  }
}

void store_matrices(void* const* lanes) {
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 32; ++i) {
      auto* row = static_cast<unsigned char*>(static_cast<Store*>(lanes[m * 8 + i / 4])->row);
      std::memcpy(row + i % 4 * 4, static_cast<Store*>(lanes[i])->values + m, 4);
    }
  }
}

// To the 24 bits of a float, which is what tensor cores keep of a sum.
static double truncated(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= ~uint64_t{0} << 29;
  std::memcpy(&x, &bits, 8);
  return x;
}

void multiply(void* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  const Type type = static_cast<Multiply*>(lanes[0])->type;
  const int depth = type == Type::tf32 ? 8 : 16;
  auto value = [&](uint32_t bits, int half) {
    if (type == Type::tf32) return __uint_as_float(bits & ~0x1fffu);
    const uint16_t part = static_cast<uint16_t>(half ? bits >> 16 : bits);
    return type == Type::bf16 ? __uint_as_float(uint32_t{part} << 16) : half_value(part);
  };
  const int per_register = type == Type::tf32 ? 1 : 2;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Multiply*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      d[g + 8 * (i / 2)][2 * t + i % 2] = mine.d[i];
      for (int h = 0; h < per_register; ++h) {
        a[g + 8 * (i % 2)][per_register * t + h + depth / 2 * (i / 2)] = value(mine.a[i], h);
        if (i < 2) b[per_register * t + h + depth / 2 * i][g] = value(mine.b[i], h);
      }
    }
  }
  // Tensor cores add 16 bytes of exact products at a time to the accumulator and truncate the sum to fp32.
  for (int row = 0; row < 16; ++row) {
    for (int first = 0; first < depth; first += depth / 2) {
      double sum[8];
      for (int column = 0; column < 8; ++column) sum[column] = d[row][column];
      for (int k = first; k < first + depth / 2; ++k) {
        for (int column = 0; column < 8; ++column) sum[column] += double{a[row][k]} * b[k][column];
      }
      for (int column = 0; column < 8; ++column) {
        d[row][column] = static_cast<float>(truncated(sum[column]));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<Multiply*>(lanes[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
  }
}

// --- sm_90 ---

void written(const void* p, int bytes) {
  Worker& w = *worker;
  if (w.mbarriers.empty()) return;  // a kernel without mbarriers has no wgmma
  Lane& me = w.lanes[w.current];
  const size_t first = (static_cast<const unsigned char*>(p) - w.shared.get()) / 4;
  for (size_t word = first; word < first + bytes / 4; ++word) {
    w.writers[word] = static_cast<uint16_t>(w.current + 1);
    me.unfenced.push_back(word);
  }
}

void proxy_fence() {
  Worker& w = *worker;
  Lane& me = w.lanes[w.current];
  for (size_t word : me.unfenced) {
    if (w.writers[word] == w.current + 1) w.writers[word] = 0;
  }
  me.unfenced.clear();
}

// In the shared memory of the cluster.
static ptrdiff_t barrier_offset(const void* barrier, const char* what, const Where& where) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(barrier) - worker->shared.get();
  const auto rank = worker->block_shared ? offset / static_cast<ptrdiff_t>(worker->block_shared) : 0;
  // Where it would be in this block: of_rank moves by the difference of two ranks.
  const bool inside = offset >= 0 && rank * worker->block_threads < worker->threads;
  check_shared(inside ? of_rank(barrier, 2 * worker->rank() - static_cast<int>(rank)) : barrier, 8, what, where);
  return offset;
}

static MBarrier& mbarrier_at(ptrdiff_t offset, const char* what, const Where& where) {
  const auto found = worker->mbarriers.find(offset);
  if (found == worker->mbarriers.end()) fail(std::string(what) + " on an mbarrier that nobody has initialised", where);
  return found->second;
}

void mbarrier_init(const void* barrier, int arrivals, const Where& where) {
  worker->mbarriers[barrier_offset(barrier, "mbarrier.init", where)] = {arrivals, arrivals};
}

// Ends the phase when everybody has arrived and every byte is there.
static void settle(MBarrier& b, ptrdiff_t offset) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.expected;
  b.phase ^= 1;
  worker->wake(State::at_mbarrier, offset);
}

static void land(const BoxCopy& copy);
static void deliver(MBarrier& b, ptrdiff_t offset) {
  for (const BoxCopy& copy : b.boxes) {
    land(copy);
    b.bytes -= copy.map.box[0] * copy.map.box[1] * copy.map.box[2] * 2;
  }
  b.boxes.clear();
  for (const AsyncStore& store : b.stores) {
    std::memcpy(worker->shared.get() + store.to, &store.value, store.bytes);
    b.bytes -= store.bytes;
  }
  b.stores.clear();
  settle(b, offset);
}

static bool is_awaited(ptrdiff_t offset) {
  return std::any_of(worker->lanes.begin(), worker->lanes.end(),
                     [&](const Lane& lane) { return lane.state == State::at_mbarrier && lane.waits_for == offset; });
}

void mbarrier_arrive(const void* barrier, const Where& where) {
  const ptrdiff_t offset = barrier_offset(barrier, "mbarrier.arrive", where);
  MBarrier& b = mbarrier_at(offset, "mbarrier.arrive", where);
  --b.pending;
  settle(b, offset);
  worker->pause("mbarrier.arrive", where);  // who has waited for this acts first
}

void mbarrier_expect(const void* barrier, int bytes, const Where& where) {
  const ptrdiff_t offset = barrier_offset(barrier, "mbarrier.arrive.expect_tx", where);
  MBarrier& b = mbarrier_at(offset, "mbarrier.arrive.expect_tx", where);
  b.bytes += bytes;
  --b.pending;
  settle(b, offset);
}

// A box in rows of 128 bytes, swizzled: bits 4 to 6 of an address are those of its place in the box xor bits 7 to 9.
static void land(const BoxCopy& copy) {
  const TensorMap& m = copy.map;
  Worker& w = *worker;
  ptrdiff_t place = copy.to;
  for (int i2 = 0; i2 < m.box[2]; ++i2) {
    for (int i1 = 0; i1 < m.box[1]; ++i1) {
      for (int i0 = 0; i0 < m.box[0]; ++i0, place += 2) {
        const int64_t at[3] = {copy.at[0] + i0, copy.at[1] + i1, copy.at[2] + i2};
        uint16_t value = 0;  // outside of the tensor
        if (std::all_of(at, at + 3, [&](const int64_t& x) { return x >= 0 && x < m.size[&x - at]; })) {
          std::memcpy(&value, m.data + at[0] * 2 + at[1] * m.stride[0] + at[2] * m.stride[1], 2);
        }
        const ptrdiff_t swizzled = place ^ (place >> 7 & 7) << 4;
        std::memcpy(w.shared.get() + swizzled, &value, 2);
        w.writers[swizzled / 4] = 0;  // by the proxy that wgmma reads through
      }
    }
  }
}

void copy_box(void* shared, const TensorMap& map, const int (&at)[3], const void* barrier, const Where& where) {
  Worker& w = *worker;
  const ptrdiff_t offset = barrier_offset(barrier, "cp.async.bulk.tensor", where);
  MBarrier& b = mbarrier_at(offset, "cp.async.bulk.tensor", where);
  const int bytes = map.box[0] * map.box[1] * map.box[2] * 2;
  const ptrdiff_t to = static_cast<unsigned char*>(shared) - w.shared.get();
  if (to < 0 || to % 1024 != 0 || to + bytes > static_cast<ptrdiff_t>(w.shared_bytes)) {
    fail("cp.async.bulk.tensor to shared offset " + std::to_string(to) +
             ", which must be a multiple of 1024 with room for " + std::to_string(bytes) + " bytes",
         where);
  }
  std::memset(shared, kPoison, bytes);
  b.boxes.push_back({map, {at[0], at[1], at[2]}, to});
  if (is_awaited(offset) || !late()) deliver(b, offset);
}

void store_async(void* to, const void* value, int bytes, const void* barrier, const Where& where) {
  const ptrdiff_t offset = barrier_offset(barrier, "st.async", where);
  MBarrier& b = mbarrier_at(offset, "st.async", where);
  AsyncStore store{static_cast<unsigned char*>(to) - worker->shared.get(), 0, bytes};
  if (store.to < 0 || store.to % bytes != 0 || store.to + bytes > static_cast<ptrdiff_t>(worker->shared_bytes)) {
    fail("st.async of " + std::to_string(bytes) + " bytes to shared offset " + std::to_string(store.to), where);
  }
  std::memcpy(&store.value, value, bytes);
  std::memset(to, kPoison, bytes);
  b.stores.push_back(store);
  if (is_awaited(offset) || !late()) deliver(b, offset);
}

void mbarrier_wait(const void* barrier, int parity, const Where& where) {
  const ptrdiff_t offset = barrier_offset(barrier, "mbarrier.try_wait", where);
  MBarrier& b = mbarrier_at(offset, "mbarrier.try_wait", where);
  if (parity != 0 && parity != 1) fail("mbarrier.try_wait for parity " + std::to_string(parity), where);
  while (b.phase == parity) {
    if (!b.boxes.empty() || !b.stores.empty()) {  // no later than this
      deliver(b, offset);
      continue;
    }
    worker->lanes[worker->current].waits_for = offset;
    worker->suspend(State::at_mbarrier, "mbarrier.try_wait", where);
  }
}

static void arrive_at_named(int number, int threads, const char* what, const Where& where) {
  Worker& w = *worker;
  NamedBarrier& b = w.named[number];
  if (b.arrived && b.threads != threads) {
    fail("bar.sync for " + std::to_string(threads) + " threads, others wait for " + std::to_string(b.threads), where);
  }
  b.threads = threads;
  if (++b.arrived < threads) {
    w.lanes[w.current].waits_for = number;
    return w.suspend(State::at_named_barrier, what, where);
  }
  b.arrived = 0;
  w.wake(State::at_named_barrier, number);
}

void named_barrier(int barrier, int threads, const Where& where) {
  if (barrier < 1 || barrier > 15) fail("bar.sync on barrier " + std::to_string(barrier), where);
  arrive_at_named(worker->rank() * 16 + barrier, threads, "bar.sync", where);
}

void cluster_barrier(const Where& where) { arrive_at_named(0, worker->threads, "barrier.cluster", where); }

static float value_of(Type type, uint16_t bits) {
  return type == Type::bf16 ? __uint_as_float(uint32_t{bits} << 16) : half_value(bits);
}

// 8 elements of an operand, 16 bytes of a core matrix, which begins with row or depth `line`.
static void read_line(const GroupMultiply& g, const char* name, uint64_t descriptor, bool by_columns, int across,
                      int along, int line, float (&values)[8]) {
  const ptrdiff_t start = (descriptor & 0x3fff) << 4, across_bytes = (descriptor >> 32 & 0x3fff) << 4,
                  along_bytes = (descriptor >> 16 & 0x3fff) << 4;
  const int swizzle = static_cast<int>(descriptor >> 62);
  if (descriptor >> 46 & 0xffff || swizzle > 1) {
    fail("wgmma with a base offset, or swizzled but not in rows of 128 bytes, which is not modelled", g.where);
  }
  ptrdiff_t offset = start;
  if (!swizzle) {
    offset += across * across_bytes + along * along_bytes + line * 16;
  } else if (by_columns) {  // rows of 128 bytes are the depth: 64 columns, and the next 64 at the leading distance
    offset += across / 8 * along_bytes + across % 8 * 16 + along * across_bytes + line * 128;
  } else {
    offset += across * across_bytes + along * 16 + line * 128;
  }
  if (swizzle) offset ^= (offset >> 7 & 7) << 4;
  Worker& w = *worker;
  if (offset + 16 > static_cast<ptrdiff_t>(w.block_shared)) {
    fail(std::string("wgmma reads ") + name + " at offset " + std::to_string(offset) + ", outside of shared memory",
         g.where);
  }
  const ptrdiff_t first = (offset + w.rank() * static_cast<ptrdiff_t>(w.block_shared)) / 4;
  for (ptrdiff_t word = first; word < first + 4; ++word) {
    if (w.writers[word]) {
      fail(std::string("wgmma reads ") + name + " at offset " + std::to_string(offset) + ", which thread " +
               std::to_string(w.writers[word] - 1) + " has written without fence.proxy.async",
           g.where);
    }
  }
  uint16_t bits[8];
  std::memcpy(bits, w.own_shared() + offset, 16);
  for (int i = 0; i < 8; ++i) values[i] = value_of(g.type, bits[i]);
}

// One warp's 16 rows of m64nNk16.
static void compute(Product& product, int warp) {
  if (product.done) return;
  product.done = true;
  const GroupMultiply& g = product.what;
  std::vector<float> a(16 * 16), b(16 * g.columns), line(8);
  float values[8];
  const int first_block = warp % (worker->block_threads / 32) % 4 * 2;
  for (int lane = 0; g.registers && lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, depth = lane % 4 * 2 + i % 2 + i / 4 * 8;
      a[row * 16 + depth] = value_of(g.type, static_cast<uint16_t>(product.left[lane][i / 2] >> i % 2 * 16));
    }
  }
  for (int block = 0; !g.registers && block < 2; ++block) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) {
        read_line(g, "a", g.a, g.left_by_columns, first_block + block, half, i, values);
        for (int j = 0; j < 8; ++j) {
          const int row = block * 8 + (g.left_by_columns ? j : i), depth = half * 8 + (g.left_by_columns ? i : j);
          a[row * 16 + depth] = values[j];
        }
      }
    }
  }
  for (int block = 0; block < g.columns / 8; ++block) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) {
        read_line(g, "b", g.b, g.by_columns, block, half, i, values);  // a column's depths, or a depth's columns
        for (int j = 0; j < 8; ++j) {
          const int column = block * 8 + (g.by_columns ? j : i), depth = half * 8 + (g.by_columns ? i : j);
          b[depth * g.columns + column] = values[j];
        }
      }
    }
  }
  std::vector<double> sum(g.columns);
  for (int row = 0; row < 16; ++row) {
    auto place = [&](int column) -> float& {
      const int lane = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + row / 8 * 2 + column % 2;
      return product.sum->values[lane * product.sum->count + i];
    };
    for (int column = 0; column < g.columns; ++column) sum[column] = g.keep ? place(column) : 0.0f;
    for (int first = 0; first < 16; first += 8) {  // as in `multiply`
      for (int k = first; k < first + 8; ++k) {
        for (int column = 0; column < g.columns; ++column) {
          sum[column] += double{a[row * 16 + k]} * b[k * g.columns + column];
        }
      }
      for (int column = 0; column < g.columns; ++column) sum[column] = truncated(sum[column]);
    }
    for (int column = 0; column < g.columns; ++column) place(column) = static_cast<float>(sum[column]);
  }
}

static void compute_all(Warp& warp, int index) {
  for (auto& group : warp.groups) {
    for (Product& product : group) compute(product, index);
  }
  for (Product& product : warp.open) compute(product, index);
}

void group_multiply(void* const* lanes) {
  Worker& w = *worker;
  const int index = w.current / 32;
  Warp& warp = w.warps[index];
  const auto& first = *static_cast<GroupMultiply*>(lanes[0]);
  std::shared_ptr<Accumulators> sum;
  auto look = [&](std::vector<Product>& products) {
    for (Product& product : products) {
      if (product.sum->registers[0] == first.d) sum = product.sum;
    }
  };
  for (auto& group : warp.groups) look(group);
  look(warp.open);
  if ((!sum || first.registers) && !warp.fenced) {
    fail("wgmma.mma_async without a wgmma.fence since the last wait", first.where);
  }
  if (!sum) {
    sum = std::make_shared<Accumulators>();
    sum->count = first.columns / 2;
    sum->values.resize(32 * sum->count);
    for (int lane = 0; lane < 32; ++lane) {
      sum->registers[lane] = static_cast<GroupMultiply*>(lanes[lane])->d;
      std::copy_n(sum->registers[lane], sum->count, &sum->values[lane * sum->count]);
      std::fill_n(sum->registers[lane], sum->count, NAN);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& other = *static_cast<GroupMultiply*>(lanes[lane]);
    if (other.a != first.a || other.b != first.b || other.keep != first.keep) {
      fail("wgmma.mma_async with other operands in lane " + std::to_string(lane) + " than in lane 0", first.where);
    }
  }
  ++sum->users;
  warp.open.push_back({first, sum});
  for (int lane = 0; first.registers && lane < 32; ++lane)
    warp.open.back().left[lane] = static_cast<GroupMultiply*>(lanes[lane])->registers;
  if (!late()) compute_all(warp, index);
}

void group_fence(void* const*) { worker->warps[worker->current / 32].fenced = true; }

void group_commit(void* const*) {
  Warp& warp = worker->warps[worker->current / 32];
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

void group_wait(void* const* lanes) {
  const int index = worker->current / 32;
  Warp& warp = worker->warps[index];
  warp.fenced = false;
  for (const int pending = *static_cast<int*>(lanes[0]); static_cast<int>(warp.groups.size()) > pending;) {
    for (Product& product : warp.groups.front()) {
      compute(product, index);
      Accumulators& sum = *product.sum;
      if (--sum.users) continue;
      for (int lane = 0; lane < 32; ++lane) {
        std::copy_n(&sum.values[lane * sum.count], sum.count, sum.registers[lane]);
      }
    }
    warp.groups.pop_front();
  }
}

uint16_t half_bits(float x) {
  const uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1)) - 0x38000000u) >> 13);
}

float half_value(uint16_t bits) {
  static const auto table = [] {
    auto values = std::make_unique<std::array<float, 65536>>();
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint32_t exponent = i >> 10 & 31, fraction = i & 1023;
      float magnitude = exponent == 0
                            ? std::ldexp(static_cast<float>(fraction), -24)
                            : std::ldexp(static_cast<float>(fraction | 1024), static_cast<int>(exponent) - 25);
      if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
      (*values)[i] = i & 0x8000 ? -magnitude : magnitude;
    }
    return values;
  }();
  return (*table)[bits];
}

}  // namespace mmk::emulator
