// What the binding tells the kernels. Plain data: the binding is compiled without CUDA headers, the kernels without
// torch's.
//
// Every pass of attention, forward and backward, is the same walk: a block keeps some rows and goes over tiles of
// columns,
//     S = a_rows a_columns^T            then weights W from S, and in backward from dP = b_rows b_columns^T as well
//     out = W values                    over one tile of the values' columns
//
//   pass      rows     columns   a    b       W    values
//   forward   queries  keys      q k          P    v
//   dq        queries  keys      q k  dout v  dS   k
//   dv        keys     queries   k q          P    dout
//   dk        keys     queries   k q  v dout  dS   q
//   dbias     queries  keys      q k  dout v  dS   none: dS itself is summed
//
// A launch runs one pass of several problems, each in blocks of its own; they share all but lengths and addresses. A
// matrix of a problem lies in one or two segments, whose rows follow each other without being joined. The plain ops are
// one problem of one segment, which alone may have a bias.
#pragma once
#include <climits>
#include <cstdint>

namespace mmk::attention {

enum class Dtype : int { fp32, bf16, fp16 };
enum class Mode : int { forward, backward, bias };

enum Side : int { kQueries, kKeys };
// Of a matrix: q is the a of the queries and dout their b, k is the a of the keys and v their b.
enum Role : int { kA, kB };

constexpr int kMaxProblems = 8;
constexpr int kOneSegment = INT_MAX;

struct Segment {  // (B, H, rows, columns), columns with stride 1; strides in elements
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct KeyMask {  // of a segment of keys
  const uint8_t* data = nullptr;
  int64_t batch = 0, key = 0;
};

struct Problem {
  Segment matrix[2][2][2];  // of a side, in a role: its segments
  Segment out[2];           // the result of this pass, for the delta kernel that of the forward; null where not wanted
  KeyMask key_mask[2];      // null: every key counts
  int length[2];            // of both sides
  int boundary[2];          // of both sides: the rows of the first segment, or kOneSegment

  uint64_t seed_offset;
  float* lse;         // (B, H, N): written by forward, read by backward
  const float* dlse;  // (B, H, N), or null
  float* delta;       // (B, H, N): rowsum(dout out) - dlse
  uint8_t* answered;  // (B, H, N): the query has a key; null where every one has

  // Geometry, from `plan`.
  int row_tiles, column_tiles, splits;
  int64_t items, items_per_split;  // column tiles a piece of work walks (dbias: tiles that add up in one entry)
  float* partial;                  // with splits (splits, B, H, rows, width); for dbias always, (splits, *bias's shape)
  float* partial_lse;              // (splits, B, H, rows); null in backward
};

struct Pass {
  int count;                      // of problems
  int first_block[kMaxProblems];  // set at the launch
  Problem problem[kMaxProblems];

  int64_t batch, heads;
  int copy_bytes[2][2];  // of a side, in a role: the least of all segments; see Rows in common/tile.cuh
  Side row_side;
  Role values;              // of the columns
  int a_dim, b_dim, width;  // b_dim is 0 when W is P
  float scale;              // of the scores
  float out_scale;          // of the result

  const void* bias;
  bool bias_is_fp32;
  int64_t bias_sizes[4], bias_strides[4];  // strides are 0 where it is broadcast
  const float* bias_blocks;                // of diagonal blocks (G, N, C), contiguous, or null
  const int64_t* bias_index;               // of every example its row of them; null: its own number
  float* dbias_blocks;  // (B, H, N, C): dS in the blocks, which the pass of dq writes; null: not wanted
  int bias_width;       // C
  const int64_t* seed;  // null: no dropout
  uint32_t drop_below;
  float keep_scale;

  // Geometry, from `plan`.
  int warps, value_tiles, tile_width;
  int blocks_of_8;  // of the accumulator: which instantiation runs
  int shared_bytes;
  bool resident;  // the rows stay in shared memory; otherwise they are read again with every column tile
};
static_assert(sizeof(Pass) <= 4096);  // what a launch may pass to a kernel on every driver

constexpr int kStages = 4;

constexpr int max_warps(Mode mode) { return mode == Mode::bias ? 4 : 8; }
template <Mode mode>
constexpr int kThreads = 32 * max_warps(mode);

// Keys (or queries) of a column tile. Narrow where the accumulators leave no registers for a wide one.
constexpr int column_tile(Mode mode, int blocks_of_8, int element_bytes) {
  const int most = mode == Mode::backward && element_bytes == 4 ? 8 : 16;
  return mode != Mode::bias && blocks_of_8 > most ? 32 : 64;
}
template <Mode mode, int BlocksOf8, int ElementBytes>
constexpr int kColumnTile = column_tile(mode, BlocksOf8, ElementBytes);

}  // namespace mmk::attention

extern "C" {
int mmk_attention_pass(mmk::attention::Dtype dtype, mmk::attention::Mode mode, const mmk::attention::Pass* pass,
                       void* stream);
// Puts the splits of every problem that has some together: forward weighted by their log-sum-exps, backward added.
int mmk_attention_merge(mmk::attention::Dtype dtype, const mmk::attention::Pass* pass, void* stream);
// out[i] = sum over splits of partial[split][i], in their order.
int mmk_attention_sum(mmk::attention::Dtype dtype, const float* partial, int64_t splits, int64_t count, void* out,
                      void* stream);
// delta and `answered` of every problem. `width` is that of dout and out.
int mmk_attention_delta(mmk::attention::Dtype dtype, const mmk::attention::Pass* pass, void* stream);
}
