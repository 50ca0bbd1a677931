// Softmax attention on the CPU without the N x M matrix. No torch here.
//
// Queries lie in vector lanes: a panel is a few vectors of queries, and S^T = K Q^T, O^T = V^T P^T, dQ^T = K^T dS^T
// have the panel's lanes as columns. So the softmax needs no sums across a vector, P^T is the next product's operand
// where it lies, and a block of keys is read as it stands, one number at a time, by every panel.
//
// A family says how a block of its keys comes into cache (`load_keys`) and where its gradient goes
// (`store_key_gradients`); attention reads k and v, latent normalises x and uses it as both.
#pragma once
#include <cmath>
#include <vector>

#include "common/cpu.h"
#include "common/isa.h"

namespace mmk {

constexpr int64_t kBlockKeys = 144;           // keys in cache at a time: a multiple of every tile height
constexpr int64_t kChunkRows = 128;           // queries in cache at a time in the backward: a multiple of every panel
constexpr int64_t kFew = 8;                   // up to this many queries, or keys, have forms of their own
constexpr int64_t kFewRow = kBlockKeys + 16;  // row length of tiles over a block of keys; a stretch may end beyond it
constexpr int64_t kKeptRows = 1024;           // up to this many queries the backward packs them once and keeps them

// Rows of one array, or of two: those of the second come behind the first `boundary`. An array without data is absent:
// a gradient that nobody wants, a mask that hides nothing.
struct Joined {
  Strided part[2];
  int64_t boundary = INT64_MAX;

  Joined(Strided all = {}) { part[0] = all; }

  bool given() const { return part[0].data != nullptr || part[1].data != nullptr; }
  bool in_two(int64_t row, int64_t rows) const { return row < boundary && boundary < row + rows; }
  const Strided& array_of(int64_t row) const { return part[row < boundary ? 0 : 1]; }
  char* at(int64_t i, int64_t j, int64_t row) const {
    return array_of(row).at(i, j, row < boundary ? row : row - boundary);
  }
};

// Calls f(array, its row, done, count) for each array that holds some of the rows [row, row + rows): those from
// row + done on, `count` of them.
template <class F>
void for_arrays(const Joined& joined, int64_t row, int64_t rows, F f) {
  const int64_t first = joined.boundary - row < 0 ? 0 : joined.boundary - row < rows ? joined.boundary - row : rows;
  if (first > 0) f(joined.part[0], row, int64_t{0}, first);
  if (first < rows) f(joined.part[1], row + first - joined.boundary, first, rows - first);
}

// Of keys that are values too and are wanted by one or two queries, reading them is the cost. They may be left as they
// lie, before their normalisation: then load_keys multiplies them, and a key is (k - mean) factor.
constexpr int64_t kRawQueries = 2;

struct RawKeys {
  const float* rows;  // (count, row): queries, and in the backward behind them the gradients of what they get
  int64_t row, count;
  float* products;                       // (count, kFewRow), with k; at last the rows' weights in the keys' gradients
  const float *mean, *factor = nullptr;  // null: k is the key
  float level[kFewRow], slope[kFewRow];  // averages of a key's gradient, and of the gradient times the key
};

struct KeyBlock {
  int64_t begin, end;          // keys [begin, end) of the problem
  int64_t count;               // how many of them are visible: the rows of k and v
  int32_t offset[kBlockKeys];  // of row i from `begin`; rising
  const float *k, *v;          // float32, row-major
  int64_t k_row, v_row;
  RawKeys* raw = nullptr;  // where keys may be raw
  bool is_raw() const { return raw != nullptr && raw->factor != nullptr; }
  float *dk, *dv;  // where their gradients may be written as they are; null where store_key_gradients has to do it
  int64_t dk_row, dv_row;
};

struct Attention;
// `space` holds key_space floats and stays untouched until the block's gradient is stored.
using LoadKeys = void(const Attention&, int64_t batch, int64_t head, KeyBlock&, float* space);
// dk and dv: (count, padded_row(D or E)); the same array when k and v are one, null where the block is_raw().
using StoreKeyGradients = void(const Attention&, int64_t batch, int64_t head, const KeyBlock&, const float* space,
                               float* dk, float* dv);

struct Attention {
  int64_t batch, heads, queries, keys, qk_dim, v_dim;
  float scale;
  Joined q;         // (B,H,N,D)
  Joined key_mask;  // bool (B,M) in the last two dimensions
  LoadKeys* load_keys;
  int64_t key_space;
  bool raw_keys = false;  // may load_keys leave whole blocks as they lie? See RawKeys

  Strided bias;                 // (B,H,N,M) with stride 0 where broadcast, or no data
  bool bias_per_query = false;  // N is not broadcast
  // Or diagonal blocks (G,N,C), contiguous: the scores of n and m with n / C == m / C have [bias_row of the
  // example][n][m % C].
  const float* bias_blocks = nullptr;
  int64_t bias_width = 0;               // C
  const int64_t* bias_index = nullptr;  // of every example its row; null: its own number
  bool dropout = false;
  uint64_t seed = 0;
  uint32_t drop_below = 0;
  uint32_t first_key = 0;  // what dropout counts from: keys that are a part of more have others before them
  float keep_scale = 1.0f;

  Joined out;  // (B,H,N,E)
  float* lse;  // (B,H,N)

  // Backward only.
  Joined dout;                                                // (B,H,N,E)
  const float* dlse = nullptr;                                // (B,H,N)
  Joined dq;                                                  // (B,H,N,D)
  bool all_keys = false;                                      // that lse is of; else these may be some of them
  bool dq_shared = false;                                     // summed over the batch
  StoreKeyGradients* store_key_gradients = nullptr;           // null: not wanted
  bool one_key_gradient = false;                              // k and v are one array, dk and dv too
  bool summed_over_batch = false, summed_over_heads = false;  // by some gradient: they then go one after another
  Strided dbias;  // contiguous, of bias's shape, zero at first; stride 0 where broadcast
  int64_t dbias_size = 0;
  bool dbias_direct = false;      // nothing is summed: every element is written once. Else it is float32
  float* dbias_blocks = nullptr;  // (B,H,N,C), zero at first: what every (batch, head) has to say

  bool wants_queries() const { return dq.given(); }
};

// A piece of work for one thread.
struct Part {
  int64_t batch, head;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;  // begin is a multiple of kBlockKeys
  int64_t dbias_copy = 0;      // which private copy of dbias it adds to
};

struct AttentionKernels {
  int64_t lanes;  // queries in a panel
  // Accumulated rows of one part: per panel O^T (E, lanes), maximum, sum; in the backward dQ^T (D, lanes), and what
  // centres it.
  int64_t (*forward_state)(const Attention&, int64_t rows);
  int64_t (*forward_space)(const Attention&, int64_t rows);
  void (*forward)(const Attention&, const Part&, float* state, float* space);
  // Merges the states of the same rows over several key ranges, in order, and writes out and lse.
  void (*finish_forward)(const Attention&, const Part&, float* states, int64_t count, int64_t stride);

  int64_t (*backward_state)(const Attention&, int64_t rows);
  int64_t (*backward_space)(const Attention&, int64_t rows);
  // dq is added to `state`. Key gradients go to store_key_gradients, or are added to `key_state` when that is not null.
  void (*backward)(const Attention&, const Part&, float* state, float* key_state, float* space);
  void (*finish_queries)(const Attention&, const Part&, float* states, int64_t count, int64_t stride);
  void (*finish_keys)(const Attention&, const Part&, float* key_states, int64_t count, int64_t stride, float* space);
  // Sums `count` copies of `size` floats and writes them to `to`.
  void (*finish_bias)(char* to, DType dtype, float* copies, int64_t count, int64_t size);

  LoadKeys* load_keys;  // of the attention family itself
  StoreKeyGradients* store_key_gradients;
};

inline int64_t key_state_floats(const Attention& a) {
  return round_up(a.keys, kBlockKeys) * (padded_row(a.qk_dim) + padded_row(a.v_dim));
}

// The attention family's own problem: k and v in memory.
struct PlainAttention : Attention {
  Joined k, v, dk, dv;  // (B,H,M,D), (B,H,M,E)
};

// Sets the visible keys of a block; returns false when there are none.
inline bool find_visible(const Attention& a, int64_t batch, KeyBlock& block) {
  block.count = 0;
  block.dk = block.dv = nullptr;
  if (block.raw != nullptr) block.raw->factor = nullptr;
  for_arrays(a.key_mask, block.begin, block.end - block.begin,
             [&](const Strided& mask, int64_t row, int64_t done, int64_t count) {
               for (int64_t i = 0; i < count; ++i)
                 if (mask.data == nullptr || mask.data[batch * mask.stride[2] + (row + i) * mask.stride[3]] != 0)
                   block.offset[block.count++] = static_cast<int32_t>(done + i);
             });
  return block.count > 0;
}

// Calls f(row, offset, length) for every stretch of neighbouring visible keys.
template <class F>
void for_stretches(const KeyBlock& block, F f) {
  for (int64_t i = 0, next; i < block.count; i = next) {
    next = i + 1;
    while (next < block.count && block.offset[next] == block.offset[next - 1] + 1) ++next;
    f(i, static_cast<int64_t>(block.offset[i]), next - i);
  }
}

// Plans the parts of several problems for torch's threads and runs them together (attention_cpu.cpp).
void attention_forward(const std::vector<const Attention*>&);
void attention_backward(const std::vector<Attention*>&);

}  // namespace mmk
