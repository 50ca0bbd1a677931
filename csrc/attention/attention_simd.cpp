// The parts of attention that compute, compiled once per instruction set. attention.h explains the layout.
#include <algorithm>

#include "attention/attention.h"
#include "common/dots.h"
#include "common/dropout.h"
#include "common/gemm.h"
#include "common/rows.h"
#include "common/tiles.h"

namespace mmk::MMK_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
// Keys whose weighted values are summed in one go. Sums of a whole block are off by half as much again, as is then the
// backward's delta, where values have much in common.
constexpr int64_t kWeightedKeys = kBlockKeys / 2;
constexpr int64_t kFewFloats = 32768;           // of keys and values that they meet at a time: they stay in cache
constexpr int64_t kChunkRow = kChunkRows + 16;  // row length of tiles over a chunk: see padded_row

int64_t panels(int64_t rows) { return ceil_div(rows, kPanel); }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
void clear(float* p, int64_t floats) { std::memset(p, 0, floats * sizeof(float)); }

// Hands out pieces of one scratch array, each on a cache line.
struct Carver {
  float* at;
  float* take(int64_t floats) {
    float* piece = at;
    at += round_up(floats, 16);
    return piece;
  }
};

// Can rows be read and written by vectors where they are?
bool in_place(const Joined& joined, int64_t row, int64_t rows, int64_t columns) {
  const Strided& s = joined.array_of(row);
  return s.data != nullptr && s.dtype == DType::kFloat32 && s.stride[3] == 1 && columns % kWidth == 0 &&
         !joined.in_two(row, rows);
}

// Rows from the column `column` on as (rows, ld), with zeros up to the next vector.
void load_rows(const Joined& from, const Part& part, int64_t row, int64_t rows, int64_t columns, float* tile,
               int64_t ld, float scale = 1.0f, int64_t column = 0) {
  for_arrays(from, row, rows, [&](const Strided& s, int64_t first, int64_t done, int64_t count) {
    load_tile(tile + done * ld, ld, s.at(part.batch, part.head, first, column), s.dtype, s.stride[2], s.stride[3],
              count, columns, scale);
  });
}

void store_rows(const Joined& to, const Part& part, int64_t row, int64_t rows, int64_t columns, const float* tile,
                int64_t ld, int64_t column = 0) {
  for_arrays(to, row, rows, [&](const Strided& s, int64_t first, int64_t done, int64_t count) {
    if (s.data == nullptr) return;
    store_tile(s.at(part.batch, part.head, first, column), s.dtype, s.stride[2], s.stride[3], tile + done * ld, ld,
               count, columns);
  });
}

// Up to a panel of rows as lanes, (columns, kPanel), with zeros up to the next vector. Rows of two arrays would not
// start at whole vectors there: they are put together first, a square at a time.
void load_panel(const Joined& from, const Part& part, int64_t row, int64_t rows, int64_t columns, float* tile,
                float scale = 1.0f) {
  if (!from.in_two(row, rows)) {
    const Strided& s = from.array_of(row);
    return load_tile(tile, kPanel, from.at(part.batch, part.head, row), s.dtype, s.stride[3], s.stride[2], columns,
                     rows, scale);
  }
  float square[kPanel * kPanel];
  for (int64_t c = 0; c < columns; c += kPanel) {
    const int64_t width = smaller(kPanel, columns - c);
    load_rows(from, part, row, rows, width, square, kPanel, scale, c);
    load_tile(tile + c * kPanel, kPanel, square, 1, kPanel, width, rows, 1.0f);
  }
}

void store_panel(const Joined& to, const Part& part, int64_t row, int64_t rows, int64_t columns, const float* tile) {
  if (!to.in_two(row, rows)) {
    const Strided& s = to.array_of(row);
    if (s.data == nullptr) return;
    return store_tile(to.at(part.batch, part.head, row), s.dtype, s.stride[3], s.stride[2], tile, kPanel, columns,
                      rows);
  }
  float square[kPanel * kPanel];
  for (int64_t c = 0; c < columns; c += kPanel) {
    const int64_t width = smaller(kPanel, columns - c);
    store_tile(square, 1, kPanel, tile + c * kPanel, kPanel, width, rows);
    store_rows(to, part, row, rows, width, square, kPanel, c);
  }
}

struct Rows {
  float* data;
  int64_t stride;
};

// Rows of a tensor as float32 with zeros up to the next vector: in place, or copied to `space`, padded_row(columns)
// each.
Rows rows_at(const Joined& from, const Part& part, int64_t row, int64_t rows, int64_t columns, float* space) {
  if (in_place(from, row, rows, columns))
    return {reinterpret_cast<float*>(from.at(part.batch, part.head, row)), from.array_of(row).stride[2]};
  load_rows(from, part, row, rows, columns, space, padded_row(columns));
  return {space, padded_row(columns)};
}

// The scores' bias of a block of keys and a panel of queries, as (count, kPanel).
void load_bias(const Attention& a, const Part& part, const KeyBlock& block, int64_t row, int64_t lanes, float* tile) {
  for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
    load_tile(tile + i * kPanel, kPanel, a.bias.at(part.batch, part.head, row, block.begin + offset), a.bias.dtype,
              a.bias.stride[3], a.bias.stride[2], length, lanes);
  });
}

// Calls use(i, l, place) for the scores of a block of keys and `lanes` queries from `row` on that the bias's diagonal
// blocks meet: key i of the block, query l and the place in (N, C).
template <class F>
MMK_INLINE void for_block_entries(const Attention& a, const KeyBlock& block, int64_t row, int64_t lanes, const F& use) {
  for (int64_t begin = 0, end; begin < lanes; begin = end) {
    const int64_t first = (row + begin) / a.bias_width * a.bias_width;  // queries and keys of this diagonal block
    end = smaller(lanes, first + a.bias_width - row);
    const int32_t *keys = block.offset, *keys_end = keys + block.count;
    const auto key_end = static_cast<int32_t>(smaller(first + a.bias_width, block.end) - block.begin);
    for (const int32_t* key = std::lower_bound(keys, keys_end, first - block.begin); key != keys_end && *key < key_end;
         ++key)
      for (int64_t l = begin; l < end; ++l) use(key - keys, l, (row + l) * a.bias_width + block.begin + *key - first);
  }
}

// Adds the diagonal blocks to scores whose keys are `key_step` apart and queries `query_step`.
void add_block_bias(const Attention& a, const Part& part, const KeyBlock& block, int64_t row, int64_t lanes,
                    float* scores, int64_t key_step, int64_t query_step) {
  const int64_t group = a.bias_index == nullptr ? part.batch : a.bias_index[part.batch];
  const float* from = a.bias_blocks + group * a.queries * a.bias_width;
  for_block_entries(a, block, row, lanes,
                    [&](int64_t i, int64_t l, int64_t place) { scores[i * key_step + l * query_step] += from[place]; });
}

// `weight` where the element of these rows and keys survives dropout, else 0.
MMK_INLINE Vec drop(const Attention& a, UintVec low, UintVec high, UintVec key, Vec weight) {
  return dropout_bits(low, high, key) < a.drop_below ? Vec{} : weight * a.keep_scale;
}

DropoutRow dropout_row_of(const Attention& a, const Part& part, int64_t row) {
  return dropout_row(a.seed, static_cast<uint64_t>((part.batch * a.heads + part.head) * a.queries + row));
}

// The random bits of a panel of queries.
struct PanelDropout {
  UintVec low[2], high[2];

  PanelDropout(const Attention& a, const Part& part, int64_t row) {
    for (int lane = 0; lane < kPanel; ++lane) {
      const DropoutRow r = dropout_row_of(a, part, row + lane);
      low[lane / kWidth][lane % kWidth] = r.low;
      high[lane / kWidth][lane % kWidth] = r.high;
    }
  }

  Vec operator()(const Attention& a, int v, int64_t key, Vec weight) const {
    return drop(a, low[v], high[v], UintVec{} + (a.first_key + static_cast<uint32_t>(key)), weight);
  }
};

// The same for few queries, added to scores (rows, kFewRow).
void add_few_bias(const Attention& a, const Part& part, const KeyBlock& block, float* scores, float* space) {
  const int64_t rows = part.row_end - part.row_begin;
  for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
    load_tile(space + i, kFewRow, a.bias.at(part.batch, part.head, part.row_begin, block.begin + offset), a.bias.dtype,
              a.bias.stride[2], a.bias.stride[3], rows, length);
  });
  for (int64_t i = 0; i < rows * kFewRow; i += kWidth) store(scores + i, load(scores + i) + load(space + i));
}

// The keys of kWidth rows of a block, as dropout counts them.
UintVec keys_of(const Attention& a, const KeyBlock& block, int64_t i) {
  UintVec offset;
  std::memcpy(&offset, block.offset + i, sizeof(offset));
  return offset + (a.first_key + static_cast<uint32_t>(block.begin));
}

// --- Forward -------------------------------------------------------------------------------------------------------

int64_t panel_state(const Attention& a) { return (a.v_dim + 2) * kPanel; }

// Turns scores (count, kPanel) into weights relative to the running maximum, and rescales what was summed before
// (nothing before the first block).
template <int kVecs>
void online_softmax(const Attention& a, const KeyBlock& block, float* scores, float* state, bool first,
                    const PanelDropout* drop) {
  float* maximum = state + a.v_dim * kPanel;
  float* total = maximum + kPanel;
  bool moved = false;
  Vec factor[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec before = load(maximum + v * kWidth);
    Vec top = before;
    for (int64_t i = 0; i < block.count; ++i) {
      const Vec s = load(scores + i * kPanel + v * kWidth);
      top = s > top ? s : top;
    }
    const Vec base = top == -kInfinity ? Vec{} : top;  // all scores so far are -inf: avoid inf - inf
    Vec added[4]{};  // in one chain it would be off by twice as much, and all the row with it
    const auto weigh = [&](int64_t i, Vec& sum) __attribute__((always_inline)) {
      float* s = scores + i * kPanel + v * kWidth;
      const Vec weight = exp(load(s) - base);
      sum += weight;
      store(s, weight);
    };
    int64_t key = 0;
    for (; key + 4 <= block.count; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) weigh(key + i, added[i]);
    for (; key < block.count; ++key) weigh(key, added[0]);
    factor[v] = exp(before - base);
    store(maximum + v * kWidth, top);
    store(total + v * kWidth, load(total + v * kWidth) * factor[v] + ((added[0] + added[1]) + (added[2] + added[3])));
    const IntVec changed = top != before;
    for (int lane = 0; lane < kWidth; ++lane) moved |= changed[lane] != 0;
    if (drop != nullptr)
      for (int64_t i = 0; i < block.count; ++i) {
        float* s = scores + i * kPanel + v * kWidth;
        store(s, (*drop)(a, v, block.begin + block.offset[i], load(s)));
      }
  }
  if (first || !moved) return;
  for (int64_t e = 0; e < a.v_dim; ++e)
    for (int v = 0; v < kVecs; ++v) {
      float* o = state + e * kPanel + v * kWidth;
      store(o, load(o) * factor[v]);
    }
}

// --- Forward against few queries: keys in lanes ---------------------------------------------------------------------

bool few_queries(const Attention& a) { return a.queries <= kFew; }

// Keys of a block: few enough that a wide one is still in cache when its weighted sum is taken. What may be left as it
// lies comes from memory, which should not rest while they are added up.
int64_t few_block_keys(const Attention& a) {
  const int64_t row = padded_row(a.qk_dim) + (a.one_key_gradient ? 0 : padded_row(a.v_dim));
  return smaller(kBlockKeys, std::max<int64_t>((a.raw_keys ? kFewFloats / 4 : kFewFloats) / row / 8 * 8, 8));
}

// Keys that were left as they lie are read once to multiply them with the queries and once to add them up. What is
// taken off the products is at most as large as what remains: load_keys normalises rows whose mean is more than a
// standard deviation.

// Products of raw keys become those of the keys; `totals` are the sums of what they were multiplied by.
void normalise_products(const KeyBlock& block, const float* totals) {
  const RawKeys& raw = *block.raw;
  for (int64_t n = 0; n < raw.count; ++n)
    for (int64_t i = 0; i < block.count; i += kWidth) {
      float* s = raw.products + n * kFewRow + i;
      store(s, (load(s) - load(raw.mean + i) * totals[n]) * load(raw.factor + i));
    }
}

// to (rows, to_row) += weights (rows, kFewRow) times raw keys, which change the weights.
void add_raw_keys(const KeyBlock& block, float* weights, int64_t rows, int64_t columns, float* to, int64_t to_row,
                  float* space) {
  constexpr int64_t kKeys = 4;
  for (int64_t n = 0; n < rows; ++n) {
    float* const weight = weights + n * kFewRow;
    for (int64_t i = block.count; i % kKeys != 0; ++i) weight[i] = 0.0f;
    float shift = 0.0f;
    for (int64_t i = 0; i < block.count; ++i) shift -= (weight[i] *= block.raw->factor[i]) * block.raw->mean[i];
    for (int64_t c = 0; c < columns; c += kWidth) store(space + c, splat(shift));
    for (int64_t i = 0; i < block.count; i += kKeys) {
      const float* keys[kKeys];
      for (int64_t k = 0; k < kKeys; ++k) keys[k] = block.v + smaller(i + k, block.count - 1) * block.v_row;
      for (int64_t c = 0; c < columns; c += kWidth) {
        Vec sum = load(space + c);
#pragma GCC unroll 4
        for (int64_t k = 0; k < kKeys; ++k) sum += load(keys[k] + c) * weight[i + k];
        store(space + c, sum);
      }
    }
    for (int64_t c = 0; c < columns; c += kWidth)
      store(to + n * to_row + c, load(to + n * to_row + c) + load(space + c));
  }
}

// The sums of rows.
void add_up(const float* rows, int64_t ld, int64_t count, int64_t columns, float* totals) {
  for (int64_t n = 0; n < count; ++n) {
    Vec total[4]{};
    for (int64_t c = 0; c < columns; c += kWidth) total[c / kWidth % 4] += load(rows + n * ld + c);
    totals[n] = sum((total[0] + total[1]) + (total[2] + total[3]));
  }
}

// The state of a part: O (rows, padded_row(E)), maxima, sums.
struct FewState {
  float *out, *maximum, *total;
  int64_t ld;

  FewState(const Attention& a, float* state) : ld(padded_row(a.v_dim)) {
    out = state;
    maximum = out + kFew * ld;
    total = maximum + kFew;
  }
};

int64_t few_state(const Attention& a) { return kFew * (padded_row(a.v_dim) + 2); }

void few_forward(const Attention& a, const Part& part, float* state, float* space) {
  const int64_t rows = part.row_end - part.row_begin, q_ld = padded_row(a.qk_dim);
  Carver carver{space};
  float* q = carver.take(kFew * q_ld);
  float* scores = carver.take(kFew * kFewRow);
  float* bias = carver.take(kFew * kFewRow);
  float* sums = carver.take(q_ld);
  float* key_space = carver.take(a.key_space);
  float totals[kRawQueries];
  FewState s(a, state);
  load_rows(a.q, part, part.row_begin, rows, a.qk_dim, q, q_ld, a.scale);
  if (a.raw_keys) add_up(q, q_ld, rows, a.qk_dim, totals);
  clear(state, few_state(a));
  for (int64_t n = 0; n < rows; ++n) s.maximum[n] = -kInfinity;
  KeyBlock block;
  RawKeys raw{q, q_ld, rows, scores};
  if (a.raw_keys) block.raw = &raw;
  for (block.begin = part.key_begin; block.begin < part.key_end; block.begin = block.end) {
    block.end = smaller(block.begin + few_block_keys(a), part.key_end);
    if (!find_visible(a, part.batch, block)) continue;
    a.load_keys(a, part.batch, part.head, block, key_space);
    if (block.is_raw())
      normalise_products(block, totals);
    else
      dots(q, q_ld, rows, block.k, block.k_row, block.count, scores, kFewRow, a.qk_dim);
    if (a.bias.data != nullptr) add_few_bias(a, part, block, scores, bias);
    if (a.bias_blocks != nullptr) add_block_bias(a, part, block, part.row_begin, rows, scores, 1, kFewRow);
    for (int64_t n = 0; n < rows; ++n) {
      float* row = scores + n * kFewRow;
      for (int64_t i = block.count; i % kWidth != 0; ++i) row[i] = -kInfinity;
      const float before = s.maximum[n];
      Vec top = splat(before);
      for (int64_t i = 0; i < block.count; i += kWidth) top = larger(load(row + i), top);
      s.maximum[n] = largest(top);
      const float base = s.maximum[n] == -kInfinity ? 0.0f : s.maximum[n];  // as in online_softmax
      Vec added{};
      for (int64_t i = 0; i < block.count; i += kWidth) {
        const Vec weight = exp(load(row + i) - base);
        added += weight;
        store(row + i, weight);
      }
      const float factor = exp(splat(before - base))[0];
      s.total[n] = s.total[n] * factor + sum(added);
      if (a.dropout) {
        const DropoutRow r = dropout_row_of(a, part, part.row_begin + n);
        for (int64_t i = 0; i < block.count; i += kWidth)
          store(row + i, drop(a, UintVec{} + r.low, UintVec{} + r.high, keys_of(a, block, i), load(row + i)));
      }
      if (factor != 1.0f)
        for (int64_t e = 0; e < a.v_dim; e += kWidth) store(s.out + n * s.ld + e, load(s.out + n * s.ld + e) * factor);
    }
    if (block.is_raw())
      add_raw_keys(block, scores, rows, a.v_dim, s.out, s.ld, sums);
    else
      gemm<false>({scores, kFewRow, block.v, block.v_row, kPanel, s.out, s.ld, kPanel}, rows, a.v_dim, block.count,
                  true, kWeightedKeys);
  }
}

void finish_few_forward(const Attention& a, const Part& part, float* states, int64_t count, int64_t stride) {
  const int64_t rows = part.row_end - part.row_begin;
  FewState s(a, states);
  float* lse = a.lse + (part.batch * a.heads + part.head) * a.queries + part.row_begin;
  for (int64_t n = 0; n < rows; ++n) {
    float top = -kInfinity, total = 0.0f;
    for (int64_t c = 0; c < count; ++c) top = s.maximum[n + c * stride] > top ? s.maximum[n + c * stride] : top;
    float* out = s.out + n * s.ld;
    for (int64_t c = 0; c < count; ++c) {
      const float factor = exp(splat(s.maximum[n + c * stride] - (top == -kInfinity ? 0.0f : top)))[0];
      total += factor * s.total[n + c * stride];
      for (int64_t e = 0; count > 1 && e < a.v_dim; e += kWidth) {
        const Vec part_sum = factor * load(out + c * stride + e);
        store(out + e, c == 0 ? part_sum : load(out + e) + part_sum);
      }
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // a row without keys
    for (int64_t e = 0; e < a.v_dim; e += kWidth) store(out + e, load(out + e) * inverse);
    lse[n] = total == 0.0f ? -kInfinity : top + std::log(total);
  }
  store_rows(a.out, part, part.row_begin, rows, a.v_dim, s.out, s.ld);
}

// --- Forward against few keys: queries in lanes ---------------------------------------------------------------------

bool few_keys(const Attention& a) {
  return a.keys <= kFew && !few_queries(a) && a.bias.data == nullptr && a.bias_blocks == nullptr && !a.dropout &&
         !a.one_key_gradient;
}

// k times the scale, (count, padded_row(D)).
void scale_keys(const Attention& a, const KeyBlock& block, float* to) {
  load_tile(to, padded_row(a.qk_dim), block.k, block.k_row, 1, block.count, a.qk_dim, a.scale);
}

// Rows (rows, columns) = A^T B, where A is (depth, kChunkRow), into a tensor.
void store_product(const Joined& to, const Part& part, int64_t row, int64_t rows, int64_t columns, const float* a,
                   const float* b, int64_t b_row, int64_t depth, float* space) {
  const bool direct = depth > 0 && in_place(to, row, rows, columns);
  float* c = direct ? reinterpret_cast<float*>(to.at(part.batch, part.head, row)) : space;
  const int64_t c_row = direct ? to.array_of(row).stride[2] : padded_row(columns);
  gemm<true>({a, kChunkRow, b, b_row, kPanel, c, c_row, kPanel}, rows, columns, depth, false);
  if (direct) return;
  if (depth == 0) clear(space, rows * c_row);
  store_rows(to, part, row, rows, columns, space, c_row);
}

void forward_few_keys(const Attention& a, const Part& part, float* space) {
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  Carver carver{space};
  float* k = carver.take(kFew * k_ld);
  float* scores = carver.take(kFew * kChunkRow);
  float* q_space = carver.take(kChunkRows * k_ld);
  float* out_space = carver.take(kChunkRows * v_ld);
  float* key_space = carver.take(a.key_space);
  KeyBlock block{part.key_begin, part.key_end};
  if (find_visible(a, part.batch, block)) a.load_keys(a, part.batch, part.head, block, key_space);
  scale_keys(a, block, k);
  for (int64_t row = part.row_begin; row < part.row_end; row += kChunkRows) {
    const int64_t rows = smaller(kChunkRows, part.row_end - row);
    const Rows q = rows_at(a.q, part, row, block.count > 0 ? rows : 0, a.qk_dim, q_space);
    dots(k, k_ld, block.count, q.data, q.stride, rows, scores, kChunkRow, a.qk_dim);
    float* lse = a.lse + (part.batch * a.heads + part.head) * a.queries + row;
    for (int64_t r = 0; r < rows; r += kWidth) {
      Vec top = splat(-kInfinity), total{};
      for (int64_t i = 0; i < block.count; ++i) top = larger(load(scores + i * kChunkRow + r), top);
      const Vec base = top == -kInfinity ? Vec{} : top;
      for (int64_t i = 0; i < block.count; ++i) {
        const Vec weight = exp(load(scores + i * kChunkRow + r) - base);
        total += weight;
        store(scores + i * kChunkRow + r, weight);
      }
      const Vec inverse = total == 0.0f ? Vec{} : 1.0f / total;
      for (int64_t i = 0; i < block.count; ++i)
        store(scores + i * kChunkRow + r, load(scores + i * kChunkRow + r) * inverse);
      for (int64_t l = 0; l < smaller(kWidth, rows - r); ++l)
        lse[r + l] = total[l] == 0.0f ? -kInfinity : top[l] + std::log(static_cast<float>(total[l]));
    }
    store_product(a.out, part, row, rows, a.v_dim, scores, block.v, block.v_row, block.count, out_space);
  }
}

// --- Forward, the general form --------------------------------------------------------------------------------------

int64_t forward_state(const Attention& a, int64_t rows) {
  return few_queries(a) ? few_state(a) : few_keys(a) ? 0 : panels(rows) * panel_state(a);
}

int64_t forward_space(const Attention& a, int64_t rows) {
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  const int64_t own = few_queries(a) ? kFew * (k_ld + 2 * kFewRow) + k_ld
                      : few_keys(a)  ? kFew * (k_ld + kChunkRow) + kChunkRows * (k_ld + v_ld)
                                     : panels(rows) * a.qk_dim * kPanel + 2 * kBlockKeys * kPanel;
  return own + a.key_space + 80;
}

void forward(const Attention& a, const Part& part, float* state, float* space) {
  if (few_queries(a)) return few_forward(a, part, state, space);
  if (few_keys(a)) return forward_few_keys(a, part, space);
  const int64_t rows = part.row_end - part.row_begin;
  Carver carver{space};
  float* q = carver.take(panels(rows) * a.qk_dim * kPanel);
  float* scores = carver.take(kBlockKeys * kPanel);
  float* bias = carver.take(kBlockKeys * kPanel);
  float* key_space = carver.take(a.key_space);
  for (int64_t row = 0; row < rows; row += kPanel) {
    load_panel(a.q, part, part.row_begin + row, smaller(kPanel, rows - row), a.qk_dim, q + row * a.qk_dim, a.scale);
    float* s = state + row / kPanel * panel_state(a) + a.v_dim * kPanel;
    for (int lane = 0; lane < kPanel; ++lane) s[lane] = -kInfinity, s[kPanel + lane] = 0.0f;
  }
  bool first = true;
  KeyBlock block;
  for (block.begin = part.key_begin; block.begin < part.key_end; block.begin += kBlockKeys) {
    block.end = smaller(block.begin + kBlockKeys, part.key_end);
    if (!find_visible(a, part.batch, block)) continue;
    a.load_keys(a, part.batch, part.head, block, key_space);
    for (int64_t row = 0; row < rows; row += kPanel) {
      const int64_t lanes = smaller(kPanel, rows - row);
      float* s = state + row / kPanel * panel_state(a);
      gemm<false>({block.k, block.k_row, q + row * a.qk_dim, kPanel, 0, scores, kPanel, 0}, block.count, lanes,
                  a.qk_dim, false);
      if (a.bias.data != nullptr) {
        load_bias(a, part, block, part.row_begin + row, lanes, bias);
        for (int64_t i = 0; i < block.count * kPanel; i += kPanel)
          for (int64_t l = 0; l < lanes; l += kWidth) store(scores + i + l, load(scores + i + l) + load(bias + i + l));
      }
      if (a.bias_blocks != nullptr) add_block_bias(a, part, block, part.row_begin + row, lanes, scores, kPanel, 1);
      if (a.dropout) {
        const PanelDropout drop(a, part, part.row_begin + row);
        online_softmax<2>(a, block, scores, s, first, &drop);
      } else if (lanes > kWidth) {
        online_softmax<2>(a, block, scores, s, first, nullptr);
      } else {
        online_softmax<1>(a, block, scores, s, first, nullptr);
      }
      gemm<true>({block.v, block.v_row, scores, kPanel, 0, s, kPanel, 0}, a.v_dim, lanes, block.count, !first,
                 kWeightedKeys);
    }
    first = false;
  }
  for (int64_t row = 0; first && row < rows; row += kPanel)
    clear(state + row / kPanel * panel_state(a), a.v_dim * kPanel);
}

void finish_forward(const Attention& a, const Part& part, float* states, int64_t count, int64_t stride) {
  if (few_queries(a)) return finish_few_forward(a, part, states, count, stride);
  if (few_keys(a)) return;
  const int64_t rows = part.row_end - part.row_begin;
  for (int64_t row = 0; row < rows; row += kPanel) {
    const int64_t lanes = smaller(kPanel, rows - row);
    float* s = states + row / kPanel * panel_state(a);
    float* maximum = s + a.v_dim * kPanel;
    float* total = maximum + kPanel;
    for (int64_t l = 0; l < lanes; l += kWidth) {
      Vec top = load(maximum + l);
      for (int64_t c = 1; c < count; ++c) {
        const Vec other = load(maximum + c * stride + l);
        top = other > top ? other : top;
      }
      const Vec base = top == -kInfinity ? Vec{} : top;
      Vec sum{};
      for (int64_t c = 0; c < count; ++c) {
        const Vec factor = exp(load(maximum + c * stride + l) - base);
        sum += factor * load(total + c * stride + l);
        for (int64_t e = 0; count > 1 && e < a.v_dim; ++e) {
          const Vec part_sum = factor * load(s + c * stride + e * kPanel + l);
          store(s + e * kPanel + l, c == 0 ? part_sum : load(s + e * kPanel + l) + part_sum);
        }
      }
      const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;  // a row without keys
      for (int64_t e = 0; e < a.v_dim; ++e) store(s + e * kPanel + l, load(s + e * kPanel + l) * inverse);
      float* lse = a.lse + (part.batch * a.heads + part.head) * a.queries + part.row_begin + row + l;
      for (int64_t i = 0; i < smaller(kWidth, lanes - l); ++i)
        lse[i] = sum[i] == 0.0f ? -kInfinity : top[i] + std::log(static_cast<float>(sum[i]));
    }
    store_panel(a.out, part, part.row_begin + row, lanes, a.v_dim, s);
  }
}

// --- Backward ------------------------------------------------------------------------------------------------------

// Queries and gradients of a chunk of rows in the two layouts that the products want.
struct Chunk {
  float *q, *dout;            // panels of (D, kPanel) and (E, kPanel); q times the scale
  float *q_rows, *dout_rows;  // (rows, padded_row): only where the keys want a gradient
};

int64_t chunk_floats(const Attention& a) {
  const int64_t rows = a.store_key_gradients ? padded_row(a.qk_dim) + padded_row(a.v_dim) : 0;
  return kChunkRows * (a.qk_dim + a.v_dim + rows);
}

Chunk chunk_at(const Attention& a, float* memory) {
  Chunk c;
  c.q = memory;
  c.dout = c.q + kChunkRows * a.qk_dim;
  c.q_rows = c.dout + kChunkRows * a.v_dim;
  c.dout_rows = c.q_rows + kChunkRows * padded_row(a.qk_dim);
  return c;
}

// The gradient of a bias is summed in the general form only.
bool few_queries_backward(const Attention& a) {
  return few_queries(a) && a.dbias.data == nullptr && a.dbias_blocks == nullptr;
}

// What centres dQ. A row's dS adds up to its dlse, but for the error of delta, and that reaches dQ times whatever all
// keys have in common: the mean key is taken off as often as the sum is too large.
bool is_centred(const Attention& a) { return a.wants_queries() && a.all_keys; }

struct Centre {
  float *row_sums, *key_sums, *key_count;  // (rows), (padded_row(D)), one number

  Centre(const Attention& a, float* at, int64_t rows) : row_sums(at), key_sums(at + rows) {
    key_count = key_sums + padded_row(a.qk_dim);
  }
  static int64_t floats(const Attention& a, int64_t rows) { return rows + padded_row(a.qk_dim) + 1; }

  void add_keys(const Attention& a, const KeyBlock& block) {
    for_vectors(a.qk_dim, [&](int64_t d, int, auto) MMK_INLINE_LAMBDA {
      Vec even = load(key_sums + d), odd{};
      int64_t i = 0;
      for (; i + 2 <= block.count; i += 2) {
        even += load(block.k + i * block.k_row + d);
        odd += load(block.k + (i + 1) * block.k_row + d);
      }
      if (i < block.count) even += load(block.k + i * block.k_row + d);
      store(key_sums + d, even + odd);
    });
    *key_count += static_cast<float>(block.count);
  }

  // From sums over all keys: the mean key, and how often it is to be taken off.
  void finish(const Attention& a, const Part& part) {
    const int64_t first = (part.batch * a.heads + part.head) * a.queries + part.row_begin;
    for (int64_t r = 0; a.dlse != nullptr && r < part.row_end - part.row_begin; ++r)
      if (a.lse[first + r] != -kInfinity) row_sums[r] -= a.dlse[first + r];
    for (int64_t d = 0; d < a.qk_dim; ++d) key_sums[d] = *key_count == 0.0f ? 0.0f : key_sums[d] / *key_count;
  }
};

// The state of a part: dQ, by rows of few or by panels of (D, kPanel), and its Centre.
int64_t dq_floats(const Attention& a, int64_t rows) {
  return few_queries_backward(a) ? kFew * padded_row(a.qk_dim) : panels(rows) * kPanel * a.qk_dim;
}
int64_t state_rows(const Attention& a, int64_t rows) { return few_queries_backward(a) ? kFew : panels(rows) * kPanel; }
Centre centre_of(const Attention& a, float* state, int64_t rows) {
  return {a, state + dq_floats(a, rows), state_rows(a, rows)};
}

int64_t backward_state(const Attention& a, int64_t rows) {
  return few_keys(a) ? 0 : dq_floats(a, rows) + Centre::floats(a, state_rows(a, rows));
}

int64_t backward_space(const Attention& a, int64_t rows) {
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  if (few_queries_backward(a))
    return kFew * (k_ld + v_ld + 3 * kFewRow) + 2 * kPanel + 2 * kFew * v_ld + kBlockKeys * (k_ld + v_ld) +
           a.key_space + 256;
  if (few_keys(a))
    return kFew * (k_ld + 2 * kChunkRow) + 2 * panels(rows) * kPanel + 2 * kFew * v_ld + kChunkRows * (k_ld + v_ld) +
           kBlockKeys * (k_ld + v_ld) + a.key_space + 256;
  const int64_t kept = rows <= kKeptRows ? ceil_div(rows, kChunkRows) : 1;
  return kept * chunk_floats(a) + 2 * panels(rows) * kPanel + 2 * kBlockKeys * kChunkRow + 2 * kBlockKeys * kPanel +
         2 * kFew * padded_row(a.v_dim) + kBlockKeys * (padded_row(a.qk_dim) + padded_row(a.v_dim)) + a.key_space + 256;
}

void pack_chunk(const Attention& a, const Part& part, int64_t row, int64_t rows, const Chunk& chunk) {
  for (int64_t r = 0; r < rows; r += kPanel) {
    const int64_t lanes = smaller(kPanel, rows - r);
    load_panel(a.q, part, row + r, lanes, a.qk_dim, chunk.q + r * a.qk_dim, a.scale);
    load_panel(a.dout, part, row + r, lanes, a.v_dim, chunk.dout + r * a.v_dim);
  }
  if (a.store_key_gradients == nullptr) return;
  load_rows(a.q, part, row, rows, a.qk_dim, chunk.q_rows, padded_row(a.qk_dim), a.scale);
  load_rows(a.dout, part, row, rows, a.v_dim, chunk.dout_rows, padded_row(a.v_dim));
}

// lse of every row (+inf where it has no key, so that its weights are 0) and delta = dout . out - dlse.
void row_statistics(const Attention& a, const Part& part, float* lse, float* delta, float* space) {
  const int64_t rows = part.row_end - part.row_begin, ld = padded_row(a.v_dim);
  const int64_t first = (part.batch * a.heads + part.head) * a.queries + part.row_begin;
  for (int64_t r = 0; r < panels(rows) * kPanel; ++r) lse[r] = kInfinity, delta[r] = 0.0f;
  for (int64_t begin = 0; begin < rows; begin += kFew) {
    const int64_t count = smaller(kFew, rows - begin);
    const Rows dout = rows_at(a.dout, part, part.row_begin + begin, count, a.v_dim, space);
    const Rows out = rows_at(a.out, part, part.row_begin + begin, count, a.v_dim, space + kFew * ld);
    for (int64_t i = 0, r = begin; i < count; ++i, ++r) {
      if (a.lse[first + r] == -kInfinity) continue;
      lse[r] = a.lse[first + r];
      Vec product{};
      for (int64_t e = 0; e < a.v_dim; e += kWidth)
        product += load(dout.data + i * dout.stride + e) * load(out.data + i * out.stride + e);
      delta[r] = sum(product) - (a.dlse == nullptr ? 0.0f : a.dlse[first + r]);
    }
  }
}

// scores -> (dropped) weights, dweights -> dS, both (count, ld); dS is added to `row_sums` where that is wanted.
template <int kVecs>
void softmax_gradient(const Attention& a, const KeyBlock& block, float* scores, float* dweights, int64_t ld,
                      const float* lse, const float* delta, const PanelDropout* drop, float* row_sums) {
  for (int v = 0; v < kVecs; ++v) {
    const Vec row_lse = load(lse + v * kWidth), row_delta = load(delta + v * kWidth);
    Vec total{};
    for (int64_t i = 0; i < block.count; ++i) {
      float* s = scores + i * ld + v * kWidth;
      float* d = dweights + i * ld + v * kWidth;
      const Vec weight = exp(load(s) - row_lse);
      Vec kept = weight, dkept = load(d);
      if (drop != nullptr) {
        const Vec keep = (*drop)(a, v, block.begin + block.offset[i], splat(1.0f));
        kept *= keep;
        dkept *= keep;
      }
      const Vec ds = weight * (dkept - row_delta);
      total += ds;
      store(s, kept);
      store(d, ds);
    }
    if (row_sums != nullptr) store(row_sums + v * kWidth, load(row_sums + v * kWidth) + total);
  }
}

// Adds dS (count, ld) of one panel to the bias's gradient, summed over what the bias broadcasts.
void add_bias_gradient(const Attention& a, const Part& part, const KeyBlock& block, int64_t row, int64_t lanes,
                       const float* ds, int64_t ld, float* space) {
  char* base = a.dbias.at(part.batch, part.head, row);
  if (a.dbias_direct) {
    for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
      store_tile(base + (block.begin + offset) * a.dbias.stride[3] * a.dbias.item_bytes(), a.dbias.dtype,
                 a.dbias.stride[3], a.dbias.stride[2], ds + i * ld, ld, length, lanes);
    });
    return;
  }
  float* to = reinterpret_cast<float*>(base) + part.dbias_copy * a.dbias_size;
  if (a.bias_per_query) {
    store_tile(space, 1, kBlockKeys, ds, ld, block.count, lanes);  // (lanes, kBlockKeys)
    for (int64_t l = 0; l < lanes; ++l) {
      float* line = to + l * a.dbias.stride[2] + block.begin * a.dbias.stride[3];
      for (int64_t i = 0; i < block.count; ++i) line[block.offset[i] * a.dbias.stride[3]] += space[l * kBlockKeys + i];
    }
  } else {
    for (int64_t i = 0; i < block.count; ++i) {
      Vec line{};
      for (int64_t l = 0; l < lanes; l += kWidth) line += load(ds + i * ld + l);
      to[(block.begin + block.offset[i]) * a.dbias.stride[3]] += sum(line);
    }
  }
}

void few_backward(const Attention& a, const Part& part, float* state, float* space) {
  const int64_t rows = part.row_end - part.row_begin;
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  Carver carver{space};
  // Where keys and values are one array, q and dout are as well, and one product does for both.
  const bool one = a.one_key_gradient;
  float* q = carver.take(kFew * (k_ld + v_ld));
  float* dout = q + (one ? rows : kFew) * k_ld;
  float* by_q = carver.take(2 * kFew * kFewRow);          // the scores, then their gradients
  float* by_dout = by_q + (one ? rows : kFew) * kFewRow;  // the weights' gradients, then the weights
  float* bias = carver.take(kFew * kFewRow);
  float* lse = carver.take(kPanel);
  float* delta = carver.take(kPanel);
  float* row_pairs = carver.take(2 * kFew * v_ld);
  float* dk = carver.take(kBlockKeys * (k_ld + v_ld));
  float* dv = one ? dk : dk + kBlockKeys * k_ld;
  float* key_space = carver.take(a.key_space);
  float totals[2 * kRawQueries];
  load_rows(a.q, part, part.row_begin, rows, a.qk_dim, q, k_ld, a.scale);
  load_rows(a.dout, part, part.row_begin, rows, a.v_dim, dout, v_ld);
  if (a.raw_keys) add_up(q, k_ld, 2 * rows, a.qk_dim, totals);
  row_statistics(a, part, lse, delta, row_pairs);
  KeyBlock block;
  RawKeys raw{q, k_ld, 2 * rows, by_q};
  const float average = 1.0f / static_cast<float>(a.qk_dim);
  Centre centre = centre_of(a, state, rows);
  const bool centred = is_centred(a);
  if (a.raw_keys) block.raw = &raw;
  for (block.begin = part.key_begin; block.begin < part.key_end; block.begin = block.end) {
    block.end = smaller(block.begin + few_block_keys(a), part.key_end);
    if (find_visible(a, part.batch, block)) {
      a.load_keys(a, part.batch, part.head, block, key_space);
      if (block.is_raw())
        normalise_products(block, totals);
      else
        dots(q, k_ld, one ? 2 * rows : rows, block.k, block.k_row, block.count, by_q, kFewRow, a.qk_dim);
      if (!one) dots(dout, v_ld, rows, block.v, block.v_row, block.count, by_dout, kFewRow, a.v_dim);
      if (a.bias.data != nullptr) add_few_bias(a, part, block, by_q, bias);
      if (a.bias_blocks != nullptr) add_block_bias(a, part, block, part.row_begin, rows, by_q, 1, kFewRow);
      if (block.is_raw()) clear(raw.level, 2 * kFewRow);
      if (centred) centre.add_keys(a, block);
      for (int64_t n = 0; n < rows; ++n) {
        const DropoutRow r = dropout_row_of(a, part, part.row_begin + n);
        Vec total{};
        for (int64_t i = n * kFewRow, key = 0; key < block.count; i += kWidth, key += kWidth) {
          const Vec weight = exp(load(by_q + i) - lse[n]);
          Vec keep = splat(1.0f);
          if (a.dropout) keep = drop(a, UintVec{} + r.low, UintVec{} + r.high, keys_of(a, block, key), keep);
          const Vec ds = weight * (load(by_dout + i) * keep - delta[n]);
          if (block.is_raw()) {
            const Vec level = ds * totals[n] + weight * totals[rows + n];
            const Vec slope = ds * load(by_q + i) + weight * load(by_dout + i);
            store(raw.level + key, load(raw.level + key) + level * average);
            store(raw.slope + key, load(raw.slope + key) + slope * average);
          }
          total += key + kWidth <= block.count ? ds : only(ds, Rest{block.count - key});
          store(by_q + i, ds);
          store(by_dout + i, weight * keep);
        }
        if (centred) centre.row_sums[n] += sum(total);
      }
      if (a.store_key_gradients && rows == 0) block.dk = nullptr, clear(dk, kBlockKeys * (k_ld + v_ld));
      const bool direct = block.dk != nullptr;
      if (a.store_key_gradients && block.is_raw()) {
        a.store_key_gradients(a, part.batch, part.head, block, key_space, nullptr, nullptr);
      } else if (a.store_key_gradients) {
        gemm<true>({by_q, kFewRow, q, k_ld, kPanel, direct ? block.dk : dk, direct ? block.dk_row : k_ld, kPanel},
                   block.count, a.qk_dim, one ? 2 * rows : rows, false);
        if (!one)
          gemm<true>(
              {by_dout, kFewRow, dout, v_ld, kPanel, direct ? block.dv : dv, direct ? block.dv_row : v_ld, kPanel},
              block.count, a.v_dim, rows, false);
      }
      if (a.wants_queries() && block.is_raw())
        add_raw_keys(block, by_q, rows, a.qk_dim, state, k_ld, row_pairs);
      else if (a.wants_queries())
        gemm<false>({by_q, kFewRow, block.k, block.k_row, kPanel, state, k_ld, kPanel}, rows, a.qk_dim, block.count,
                    true);
    }
    if (a.store_key_gradients && block.dk == nullptr && !block.is_raw())
      a.store_key_gradients(a, part.batch, part.head, block, key_space, dk, dv);
  }
}

void backward_few_keys(const Attention& a, const Part& part, float* key_state, float* space) {
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  const int64_t all_rows = panels(part.row_end - part.row_begin) * kPanel;
  Carver carver{space};
  float* k = carver.take(kFew * k_ld);
  float* scores = carver.take(kFew * kChunkRow);
  float* dscores = carver.take(kFew * kChunkRow);
  float* lse = carver.take(all_rows);
  float* delta = carver.take(all_rows);
  float* row_pairs = carver.take(2 * kFew * v_ld);
  float* row_space = carver.take(kChunkRows * (k_ld + v_ld));
  float* own_key_state = carver.take(kBlockKeys * (k_ld + v_ld));
  float* key_space = carver.take(a.key_space);
  float* dk = key_state == nullptr ? own_key_state : key_state;
  float* dv = dk + kBlockKeys * k_ld;
  KeyBlock block{part.key_begin, part.key_end};
  if (find_visible(a, part.batch, block)) a.load_keys(a, part.batch, part.head, block, key_space);
  scale_keys(a, block, k);
  clear(dk, kFew * k_ld);
  clear(dv, kFew * v_ld);
  row_statistics(a, part, lse, delta, row_pairs);
  for (int64_t row = part.row_begin; row < part.row_end; row += kChunkRows) {
    const int64_t rows = smaller(kChunkRows, part.row_end - row), first = row - part.row_begin;
    const Rows q = rows_at(a.q, part, row, rows, a.qk_dim, row_space);
    const Rows dout = rows_at(a.dout, part, row, rows, a.v_dim, row_space + kChunkRows * k_ld);
    dots(k, k_ld, block.count, q.data, q.stride, rows, scores, kChunkRow, a.qk_dim);
    dots(block.v, block.v_row, block.count, dout.data, dout.stride, rows, dscores, kChunkRow, a.v_dim);
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t r = i * kChunkRow, lane = first; lane < first + rows; r += kWidth, lane += kWidth) {
        const Vec weight = exp(load(scores + r) - load(lse + lane));
        store(scores + r, weight);
        store(dscores + r, weight * (load(dscores + r) - load(delta + lane)) * a.scale);
      }
    if (a.store_key_gradients) {
      gemm<false>({scores, kChunkRow, dout.data, dout.stride, kPanel, dv, v_ld, kPanel}, block.count, a.v_dim, rows,
                  true);
      gemm<false>({dscores, kChunkRow, q.data, q.stride, kPanel, dk, k_ld, kPanel}, block.count, a.qk_dim, rows, true);
    }
    if (is_centred(a) && a.dlse == nullptr && block.count > 0)  // all keys are here: each row's sum is taken off evenly
      for (int64_t r = 0; r < rows; r += kWidth) {
        Vec total{};
        for (int64_t i = 0; i < block.count; ++i) total += load(dscores + i * kChunkRow + r);
        total *= 1.0f / static_cast<float>(block.count);
        for (int64_t i = 0; i < block.count; ++i)
          store(dscores + i * kChunkRow + r, load(dscores + i * kChunkRow + r) - total);
      }
    if (a.wants_queries())
      store_product(a.dq, part, row, rows, a.qk_dim, dscores, block.k, block.k_row, block.count, row_space);
  }
  if (a.store_key_gradients && key_state == nullptr)
    a.store_key_gradients(a, part.batch, part.head, block, key_space, dk, dv);
}

void backward(const Attention& a, const Part& part, float* state, float* key_state, float* space) {
  if (few_queries_backward(a)) return few_backward(a, part, state, space);
  if (few_keys(a)) return backward_few_keys(a, part, key_state, space);
  const int64_t rows = part.row_end - part.row_begin;
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  const bool keep_chunks = rows <= kKeptRows && part.key_end - part.key_begin > kBlockKeys;
  Carver carver{space};
  float* chunks = carver.take((keep_chunks ? ceil_div(rows, kChunkRows) : 1) * chunk_floats(a));
  float* lse = carver.take(panels(rows) * kPanel);
  float* delta = carver.take(panels(rows) * kPanel);
  float* scores = carver.take(kBlockKeys * kChunkRow);
  float* dscores = carver.take(kBlockKeys * kChunkRow);
  float* bias = carver.take(kBlockKeys * kPanel);
  float* transposed = carver.take(kBlockKeys * kPanel);
  float* row_pairs = carver.take(2 * kFew * v_ld);
  float* own_key_state = carver.take(kBlockKeys * (k_ld + v_ld));
  float* key_space = carver.take(a.key_space);
  row_statistics(a, part, lse, delta, row_pairs);
  Centre centre = centre_of(a, state, rows);
  const bool centred = is_centred(a);
  bool packed = false;
  KeyBlock block;
  for (block.begin = part.key_begin; block.begin < part.key_end; block.begin += kBlockKeys) {
    block.end = smaller(block.begin + kBlockKeys, part.key_end);
    const bool visible = find_visible(a, part.batch, block);
    if (visible) a.load_keys(a, part.batch, part.head, block, key_space);
    if (visible && centred) centre.add_keys(a, block);
    float* dk = key_state == nullptr ? own_key_state : key_state + block.begin * (k_ld + v_ld);
    float* dv = a.one_key_gradient ? dk : dk + kBlockKeys * k_ld;
    if (a.store_key_gradients && key_state == nullptr && (a.one_key_gradient || rows == 0 || !visible))
      clear(dk, kBlockKeys * (k_ld + v_ld));
    for (int64_t begin = 0; visible && begin < rows; begin += kChunkRows) {
      const int64_t chunk_rows = smaller(kChunkRows, rows - begin);
      const Chunk chunk = chunk_at(a, chunks + (keep_chunks ? begin / kChunkRows * chunk_floats(a) : 0));
      if (!keep_chunks || !packed) pack_chunk(a, part, part.row_begin + begin, chunk_rows, chunk);
      gemm<false>({block.k, block.k_row, chunk.q, kPanel, kPanel * a.qk_dim, scores, kChunkRow, kPanel}, block.count,
                  chunk_rows, a.qk_dim, false);
      gemm<false>({block.v, block.v_row, chunk.dout, kPanel, kPanel * a.v_dim, dscores, kChunkRow, kPanel}, block.count,
                  chunk_rows, a.v_dim, false);
      for (int64_t r = 0; r < chunk_rows; r += kPanel) {
        const int64_t row = begin + r, lanes = smaller(kPanel, chunk_rows - r);
        float* sums = centred ? centre.row_sums + row : nullptr;
        if (a.bias.data != nullptr) {
          load_bias(a, part, block, part.row_begin + row, lanes, bias);
          for (int64_t i = 0; i < block.count; ++i)
            for (int64_t l = 0; l < lanes; l += kWidth) {
              float* s = scores + i * kChunkRow + r + l;
              store(s, load(s) + load(bias + i * kPanel + l));
            }
        }
        if (a.bias_blocks != nullptr)
          add_block_bias(a, part, block, part.row_begin + row, lanes, scores + r, kChunkRow, 1);
        if (a.dropout) {
          const PanelDropout drop(a, part, part.row_begin + row);
          softmax_gradient<2>(a, block, scores + r, dscores + r, kChunkRow, lse + row, delta + row, &drop, sums);
        } else if (lanes > kWidth) {
          softmax_gradient<2>(a, block, scores + r, dscores + r, kChunkRow, lse + row, delta + row, nullptr, sums);
        } else {
          softmax_gradient<1>(a, block, scores + r, dscores + r, kChunkRow, lse + row, delta + row, nullptr, sums);
        }
        if (a.dbias.data != nullptr)
          add_bias_gradient(a, part, block, part.row_begin + row, lanes, dscores + r, kChunkRow, transposed);
        if (a.dbias_blocks != nullptr) {
          float* to = a.dbias_blocks + (part.batch * a.heads + part.head) * a.queries * a.bias_width;
          for_block_entries(a, block, part.row_begin + row, lanes,
                            [&](int64_t i, int64_t l, int64_t place) { to[place] = dscores[i * kChunkRow + r + l]; });
        }
      }
      if (a.wants_queries())
        gemm<true>(
            {block.k, block.k_row, dscores, kChunkRow, kPanel, state + begin * a.qk_dim, kPanel, kPanel * a.qk_dim},
            a.qk_dim, chunk_rows, block.count, true);
      if (a.store_key_gradients) {
        const bool add_to = key_state != nullptr || a.one_key_gradient || begin > 0;
        gemm<false>({scores, kChunkRow, chunk.dout_rows, v_ld, kPanel, dv, v_ld, kPanel}, block.count, a.v_dim,
                    chunk_rows, add_to);
        gemm<false>({dscores, kChunkRow, chunk.q_rows, k_ld, kPanel, dk, k_ld, kPanel}, block.count, a.qk_dim,
                    chunk_rows, add_to);
      }
    }
    packed |= visible;
    if (a.store_key_gradients && key_state == nullptr)
      a.store_key_gradients(a, part.batch, part.head, block, key_space, dk, dv);
  }
}

void add(float* to, const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) to[i] += from[i];
}

void finish_queries(const Attention& a, const Part& part, float* states, int64_t count, int64_t stride) {
  const int64_t rows = part.row_end - part.row_begin, ld = padded_row(a.qk_dim);
  if (few_keys(a)) return;
  for (int64_t c = 1; c < count; ++c) add(states, states + c * stride, backward_state(a, rows));
  Centre centre = centre_of(a, states, rows);
  const bool centred = is_centred(a);
  if (centred) centre.finish(a, part);
  if (few_queries_backward(a)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < ld; ++d) {
        float& dq = states[r * ld + d];
        dq = (centred ? dq - centre.row_sums[r] * centre.key_sums[d] : dq) * a.scale;
      }
    return store_rows(a.dq, part, part.row_begin, rows, a.qk_dim, states, ld);
  }
  for (int64_t row = 0; row < rows; row += kPanel) {
    float* s = states + row * a.qk_dim;
    for (int64_t d = 0; d < a.qk_dim; ++d)
      for (int64_t l = 0; l < kPanel; ++l) {
        float& dq = s[d * kPanel + l];
        dq = (centred ? dq - centre.row_sums[row + l] * centre.key_sums[d] : dq) * a.scale;
      }
    store_panel(a.dq, part, part.row_begin + row, smaller(kPanel, rows - row), a.qk_dim, s);
  }
}

void finish_keys(const Attention& a, const Part& part, float* states, int64_t count, int64_t stride, float* space) {
  const int64_t k_ld = padded_row(a.qk_dim), v_ld = padded_row(a.v_dim);
  KeyBlock block;
  for (block.begin = part.key_begin; block.begin < part.key_end; block.begin += kBlockKeys) {
    block.end = smaller(block.begin + kBlockKeys, part.key_end);
    find_visible(a, part.batch, block);
    float* dk = states + block.begin * (k_ld + v_ld);
    for (int64_t c = 1; c < count; ++c) add(dk, dk + c * stride, kBlockKeys * (k_ld + v_ld));
    a.store_key_gradients(a, part.batch, part.head, block, space, dk, dk + kBlockKeys * k_ld);
  }
}

void finish_bias(char* to, DType dtype, float* copies, int64_t count, int64_t size) {
  for (int64_t c = 1; c < count; ++c) add(copies, copies + c * size, size);
  store_tile(to, dtype, 0, 1, copies, 0, 1, size);
}

// --- The attention family's keys -----------------------------------------------------------------------------------

// Points at the keys where they are good to read in place, else copies the visible ones.
void load_matrix(const Attention& a, const Joined& source, int64_t columns, int64_t batch, int64_t head,
                 const KeyBlock& block, float* copy, const float** data, int64_t* row) {
  const int64_t keys = block.end - block.begin;
  if (block.count == keys && a.queries <= 2 * kPanel && in_place(source, block.begin, keys, columns)) {
    *data = reinterpret_cast<const float*>(source.at(batch, head, block.begin));
    *row = source.array_of(block.begin).stride[2];
    return;
  }
  *data = copy;
  *row = padded_row(columns);
  for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
    load_rows(source, {batch, head}, block.begin + offset, length, columns, copy + i * *row, *row);
  });
}

void load_keys(const Attention& a, int64_t batch, int64_t head, KeyBlock& block, float* space) {
  const auto& p = static_cast<const PlainAttention&>(a);
  load_matrix(a, p.k, a.qk_dim, batch, head, block, space, &block.k, &block.k_row);
  load_matrix(a, p.v, a.v_dim, batch, head, block, space + kBlockKeys * padded_row(a.qk_dim), &block.v, &block.v_row);
  const int64_t keys = block.end - block.begin;
  if (block.count < keys || !in_place(p.dk, block.begin, keys, a.qk_dim) || !in_place(p.dv, block.begin, keys, a.v_dim))
    return;
  block.dk = reinterpret_cast<float*>(p.dk.at(batch, head, block.begin));
  block.dv = reinterpret_cast<float*>(p.dv.at(batch, head, block.begin));
  block.dk_row = p.dk.array_of(block.begin).stride[2], block.dv_row = p.dv.array_of(block.begin).stride[2];
}

// Their columns lie side by side.
void clear_rows(const Joined& to, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t row = begin; row < end; ++row)
    if (to.array_of(row).data != nullptr)
      std::memset(to.at(batch, head, row), 0, columns * to.array_of(row).item_bytes());
}

void store_key_gradients(const Attention& a, int64_t batch, int64_t head, const KeyBlock& block, const float*,
                         float* dk, float* dv) {
  const auto& p = static_cast<const PlainAttention&>(a);
  for (int which = 0; which < 2; ++which) {
    const Joined& to = which == 0 ? p.dk : p.dv;
    const float* from = which == 0 ? dk : dv;
    const int64_t columns = which == 0 ? a.qk_dim : a.v_dim, ld = padded_row(columns);
    if (block.count < block.end - block.begin) clear_rows(to, batch, head, block.begin, block.end, columns);
    for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
      store_rows(to, {batch, head}, block.begin + offset, length, columns, from + i * ld, ld);
    });
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    kPanel,   forward_state,  forward_space, forward,     finish_forward, backward_state,     backward_space,
    backward, finish_queries, finish_keys,   finish_bias, load_keys,      store_key_gradients};

}  // namespace mmk::MMK_ISA
