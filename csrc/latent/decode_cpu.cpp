// The decoder's core on the CPU: checks, the cut into tiles, the registered ops. Attention's own parts do the work.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "latent/decode.h"

namespace mmk {

MMK_KERNELS_IN_USE(AttentionKernels, attention_kernels, attention_kernels)
MMK_KERNELS_IN_USE(DecodeKernels, decode_kernels, decode_kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  Tensor queries;
  OptionalTensor position, query_mask;
  Tensor k, bias, v;
  OptionalTensor out_bias, key_mask;
};

Decode describe(const Arguments& t, double scale, double eps) {
  const ScalarType dtype = check_first(t.queries, "queries", 3);
  check_dtype(t.k, "k", dtype);
  check_dtype(t.v, "v", dtype);
  check_rank(t.k, "k", 4);
  check_rank(t.v, "v", 4);
  Decode d{};
  d.batch = t.k.size(0), d.heads = t.k.size(1), d.keys = t.k.size(2), d.channels = t.k.size(3);
  d.query_batch = t.queries.size(0), d.queries = t.queries.size(1), d.x_channels = t.queries.size(2);
  d.v_dim = t.v.size(3);
  d.scale = static_cast<float>(scale), d.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(d.query_batch == 1 || d.query_batch == d.batch, "queries has shape ", text_of_shape(t.queries),
                  "; its batch must be 1 or that of k, ", d.batch);
  check_shape(t.v, "v", {d.batch, d.heads, d.keys, d.v_dim});
  STD_TORCH_CHECK(d.heads >= 1 && d.channels >= 1, "k has shape ", text_of_shape(t.k),
                  "; there must be at least one head and one channel");
  STD_TORCH_CHECK(d.v_dim >= 1, "v has shape ", text_of_shape(t.v), "; there must be at least one channel");
  int64_t position_channels = 0;
  if (t.position.has_value()) {
    check_dtype(*t.position, "position", dtype);
    check_rank(*t.position, "position", 2);
    position_channels = t.position->size(1);
    check_shape(*t.position, "position", {d.queries, position_channels});
  }
  STD_TORCH_CHECK(d.x_channels + position_channels == d.channels, "queries has shape ", text_of_shape(t.queries),
                  "; its channels and those of position must be k's, ", d.channels);
  check_dtype(t.bias, "bias", ScalarType::Float);
  check_shape(t.bias, "bias", {d.batch, d.heads, d.keys});
  if (t.out_bias.has_value()) {
    check_dtype(*t.out_bias, "out_bias", dtype);
    check_shape(*t.out_bias, "out_bias", {d.v_dim});
  }
  for (const auto& [mask, name, length] :
       {std::tuple{&t.query_mask, "query_mask", d.queries}, {&t.key_mask, "key_mask", d.keys}})
    if (mask->has_value()) {
      check_dtype(**mask, name, ScalarType::Bool);
      check_shape(**mask, name, {d.batch, length});
    }
  d.x = strided(t.queries), d.position = strided(t.position), d.query_mask = strided(t.query_mask);
  d.k = strided(t.k), d.v = strided(t.v), d.bias = strided(t.bias), d.out_bias = strided(t.out_bias);
  return d;
}

double operations(const Decode& d) { return 2.0 * d.batch * d.heads * d.queries * d.keys * (d.channels + d.v_dim); }

// The visible keys of every example and head, packed as float32 rows.
class Keys {
 public:
  Keys(const Decode& d, const OptionalTensor& key_mask, int64_t threads)
      : d_(d), example_(d.heads * d.keys), keys_(d.batch * d.keys), counts_(d.batch, 0) {
    const Strided mask = strided(key_mask);
    for (int64_t b = 0; b < d.batch; ++b)
      for (int64_t i = 0; i < d.keys; ++i)
        if (mask.data == nullptr || mask.data[b * mask.stride[2] + i * mask.stride[3]] != 0)
          keys_[b * d.keys + counts_[b]++] = static_cast<int32_t>(i);
    k_ = Space(d.batch * example_ * d.k_row()), v_ = Space(d.batch * example_ * d.v_row());
    for_blocks(threads, [&](int64_t b, int64_t h, int64_t first, int64_t count) {
      decode_kernels().pack_keys(d, b, h, keys(b), first, count, k_.at(offset(b, h) * d.k_row()),
                                 v_.at(offset(b, h) * d.v_row()));
    });
  }

  int64_t count(int64_t example) const { return counts_[example]; }
  const int32_t* keys(int64_t example) const { return keys_.data() + example * d_.keys; }

  void set(DecodeAttention& a, int64_t example, int64_t head) const {
    a.keys = count(example);
    a.packed_k = k_.at(offset(example, head) * d_.k_row()), a.packed_v = v_.at(offset(example, head) * d_.v_row());
  }

  // Calls f(example, head, first, count) for blocks of visible keys.
  template <class F>
  void for_blocks(int64_t threads, const F& f) const {
    const int64_t blocks = ceil_div(d_.keys, kBlockKeys);
    for_parts(d_.batch * d_.heads * blocks, threads, [&](int64_t i, int64_t) {
      const int64_t example = i / blocks / d_.heads, first = i % blocks * kBlockKeys;
      const int64_t length = std::min(kBlockKeys, count(example) - first);
      if (length > 0) f(example, i / blocks % d_.heads, first, length);
    });
  }

 private:
  int64_t offset(int64_t example, int64_t head) const { return example * example_ + head * d_.keys; }

  const Decode& d_;
  int64_t example_;
  std::vector<int32_t> keys_;
  std::vector<int64_t> counts_;
  Space k_, v_;
};

Strided rows_of(float* data, int64_t ld) { return {reinterpret_cast<char*>(data), DType::kFloat32, {0, 0, ld, 1}}; }

// What `rows` rows take part in, against the keys of an example.
DecodeAttention attention_of(const Decode& d, int64_t rows, int64_t keys) {
  DecodeAttention a;
  a.batch = a.heads = 1, a.queries = rows, a.keys = keys, a.qk_dim = d.wide(), a.v_dim = d.v_dim;
  a.scale = d.scale, a.key_space = 0;
  a.load_keys = decode_kernels().load_keys;
  if (d.dk.data != nullptr) a.store_key_gradients = decode_kernels().store_key_gradients;
  return a;
}

Part part_of(const Attention& a) { return {0, 0, 0, a.queries, 0, a.keys}; }

// Tiles of rows: as many as there is work for threads, of at most kDecodeRows.
struct Tiles {
  int64_t rows, count;

  Tiles(const Decode& d, int64_t examples, int64_t threads) {
    const int64_t lanes = attention_kernels().lanes, wanted = ceil_div(d.queries, ceil_div(threads, examples));
    rows = std::min(kDecodeRows, round_up(std::max<int64_t>(wanted, 1), lanes));
    count = ceil_div(d.queries, rows);
  }

  int64_t size(const Decode& d, int64_t tile) const { return std::min(rows, d.queries - tile * rows); }

  // The most that size_of(attention) is for any tile and example.
  template <class F>
  int64_t most(const Decode& d, const Keys& keys, const F& size_of) const {
    int64_t most = 0;
    for (int64_t tile : {int64_t{0}, count - 1})
      for (int64_t b = 0; b < d.batch; ++b)
        most = std::max(most, size_of(attention_of(d, size(d, tile), keys.count(b))));
    return round_up(most, 16);
  }
};

// The pieces of a worker's scratch memory.
class Pieces {
 public:
  int64_t add(int64_t floats) { return std::exchange(size_, size_ + round_up(floats, 16)); }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

std::tuple<Tensor, Tensor> forward(Tensor queries, OptionalTensor position, OptionalTensor query_mask, Tensor k,
                                   Tensor bias, Tensor v, OptionalTensor out_bias, OptionalTensor key_mask,
                                   double scale, double eps) {
  Decode d = describe({queries, position, query_mask, k, bias, v, out_bias, key_mask}, scale, eps);
  Tensor out = allocate(queries, {d.batch, d.queries, d.v_dim});
  Tensor lse = allocate(queries, {d.batch, d.heads, d.queries}, ScalarType::Float);
  d.out = strided(out), d.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (d.batch * d.queries == 0) return {out, lse};

  const AttentionKernels& attention = attention_kernels();
  const DecodeKernels& kernels = decode_kernels();
  const int64_t all_threads = threads_for(operations(d));
  const Keys keys(d, key_mask, all_threads);
  const Tiles tiles(d, d.batch, all_threads);
  // Shared queries are read once per tile, for as many examples as leave every thread something to do.
  const int64_t groups = d.shared() ? std::min(d.batch, ceil_div(all_threads, tiles.count)) : d.batch;
  const int64_t parts = tiles.count * groups, threads = std::min(all_threads, parts);
  Pieces pieces;
  const int64_t xhat_at = pieces.add(tiles.rows * d.k_row()), factors_at = pieces.add(tiles.rows);
  const int64_t sums_at = pieces.add((tiles.rows + 1) * d.v_row());
  const int64_t head_at = pieces.add(d.heads > 1 ? tiles.rows * d.v_row() : 0);
  const int64_t state_at =
      pieces.add(tiles.most(d, keys, [&](const DecodeAttention& a) { return attention.forward_state(a, a.queries); }));
  const int64_t space_at =
      pieces.add(tiles.most(d, keys, [&](const DecodeAttention& a) { return attention.forward_space(a, a.queries); }));
  const Space memory(threads * pieces.size());

  for_parts(parts, threads, [&](int64_t part, int64_t worker) {
    float* const own = memory.at(worker * pieces.size());
    float *const xhat = own + xhat_at, *const sums = own + sums_at, *const of_head = own + head_at;
    const int64_t tile = part / groups, group = part % groups, row = tile * tiles.rows, rows = tiles.size(d, tile);
    const int64_t begin = group * d.batch / groups, end = (group + 1) * d.batch / groups;
    for (int64_t b = begin; b < end; ++b) {
      // Rows are lanes of their own: what one example alone hides is computed and not looked at.
      if (!d.shared() || b == begin) kernels.load_queries(d, d.shared() ? -1 : b, row, rows, xhat, own + factors_at);
      DecodeAttention a = attention_of(d, rows, keys.count(b));
      a.q = rows_of(xhat, d.k_row());
      for (int64_t h = 0; h < d.heads; ++h) {
        keys.set(a, b, h);
        a.out = rows_of(h == 0 ? sums : of_head, d.v_row());
        a.lse = d.lse + (b * d.heads + h) * d.queries + row;
        attention.forward(a, part_of(a), own + state_at, own + space_at);
        attention.finish_forward(a, part_of(a), own + state_at, 1, 0);
        if (h > 0)
          for (int64_t r = 0; r < rows; ++r) kernels.add(sums + r * d.v_row(), of_head + r * d.v_row(), d.v_dim);
      }
      kernels.store_out(d, b, row, rows, sums);
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor queries, OptionalTensor position,
                                                            OptionalTensor query_mask, Tensor k, Tensor bias, Tensor v,
                                                            OptionalTensor out_bias, OptionalTensor key_mask,
                                                            Tensor out, Tensor lse, double scale, double eps,
                                                            int64_t wanted) {
  Decode d = describe({queries, position, query_mask, k, bias, v, out_bias, key_mask}, scale, eps);
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_dtype(*tensor, name, queries.scalar_type());
    check_shape(*tensor, name, {d.batch, d.queries, d.v_dim});
  }
  check_dtype(lse, "lse", ScalarType::Float);
  check_shape(lse, "lse", {d.batch, d.heads, d.queries});
  lse = as_contiguous(lse);
  d.lse = const_cast<float*>(floats(lse));
  d.out = strided(out), d.dout = strided(dout);

  const bool wants_queries = (wanted & 1) != 0, wants_keys = (wanted & 4) != 0;
  const bool wants_position = (wanted & 2) != 0 && position.has_value();
  auto gradient = [&](const Tensor& t, bool want) { return want ? allocate(t, t.sizes()) : allocate(t, {0}); };
  Tensor dqueries = gradient(queries, wants_queries), dk = gradient(k, wants_keys), dv = gradient(v, wants_keys);
  Tensor dposition = position.has_value() ? gradient(*position, wants_position) : allocate(queries, {0});
  Tensor dbias = gradient(bias, wants_keys);
  const std::tuple gradients{dqueries, dposition, dk, dbias, dv};
  if (wants_queries) d.dx = strided(dqueries);
  if (wants_position) d.dposition = strided(dposition);
  if (wants_keys) {
    d.dk = strided(dk), d.dv = strided(dv), d.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    if (d.batch * d.queries == 0 || key_mask.has_value())
      for (Tensor* t : {&dk, &dbias, &dv}) torch::stable::zero_(*t);
  }
  if (d.batch * d.queries == 0) {
    if (wants_queries) torch::stable::zero_(dqueries);
    if (wants_position) torch::stable::zero_(dposition);
    return gradients;
  }

  const AttentionKernels& attention = attention_kernels();
  const DecodeKernels& kernels = decode_kernels();
  const bool wants_rows = wants_queries || wants_position;
  // A gradient that examples share is summed where one thread has them all, one after another.
  const bool in_turn = (wants_queries && d.shared()) || wants_position;
  const int64_t all_threads = threads_for(operations(d)), examples = in_turn ? 1 : d.batch;
  const Keys keys(d, key_mask, all_threads);
  const Tiles tiles(d, examples, all_threads);
  // Every group of tiles has sums of its own for the keys, which are added in order: so bits repeat.
  const int64_t groups = wants_keys ? std::min(tiles.count, ceil_div(all_threads, examples)) : tiles.count;
  const int64_t parts = groups * examples, threads = std::min(all_threads, parts);
  const int64_t k_size = d.keys * d.k_row(), v_size = d.keys * d.v_row(), head_size = k_size + v_size;
  const int64_t copy_size = wants_keys ? d.batch * d.heads * head_size : 0;
  const Space sums(groups * copy_size);
  const int64_t position_row = padded_row(d.channels - d.x_channels);

  Pieces pieces;
  const int64_t xhat_at = pieces.add(tiles.rows * d.k_row()), factors_at = pieces.add(tiles.rows);
  const int64_t dout_at = pieces.add((tiles.rows + 1) * d.v_row());
  const int64_t out_at = pieces.add(tiles.rows * d.v_row()), lse_at = pieces.add(tiles.rows);
  const int64_t dxhat_at = pieces.add(wants_rows ? tiles.rows * d.k_row() : 0);
  const int64_t head_at = pieces.add(wants_rows ? tiles.rows * d.k_row() : 0);
  const int64_t position_at = pieces.add(wants_position ? tiles.rows * position_row : 0);
  auto with_gradients = [&](DecodeAttention a) {
    if (wants_rows) a.dq = rows_of(reinterpret_cast<float*>(&a), 0);  // its size alone is asked for
    return a;
  };
  const int64_t state_size = tiles.most(d, keys, [&](const DecodeAttention& a) {
    return std::max(attention.forward_state(a, a.queries), attention.backward_state(with_gradients(a), a.queries));
  });
  const int64_t state_at = pieces.add(state_size);
  const int64_t space_at = pieces.add(tiles.most(d, keys, [&](const DecodeAttention& a) {
    return std::max(attention.forward_space(a, a.queries), attention.backward_space(with_gradients(a), a.queries));
  }));
  const Space memory(threads * pieces.size());

  for_parts(parts, threads, [&](int64_t part, int64_t worker) {
    float* const own = memory.at(worker * pieces.size());
    float *const xhat = own + xhat_at, *const factors = own + factors_at, *const dout_rows = own + dout_at;
    float *const dxhat = own + dxhat_at, *const of_head = own + head_at;
    float* const position_sums = wants_position ? own + position_at : nullptr;
    const int64_t group = part / examples;
    const int64_t first_example = in_turn ? 0 : part % examples, end_example = in_turn ? d.batch : first_example + 1;
    float* const copy = sums.at(group * copy_size);
    if (wants_keys)
      std::fill(copy + first_example * d.heads * head_size, copy + end_example * d.heads * head_size, 0.0f);
    for (int64_t tile = group * tiles.count / groups; tile < (group + 1) * tiles.count / groups; ++tile) {
      const int64_t row = tile * tiles.rows, rows = tiles.size(d, tile);
      for (int64_t b = first_example; b < end_example; ++b) {
        const bool first = b == first_example, last = b == end_example - 1;
        if (!d.shared() || first || d.query_mask.data != nullptr) kernels.load_queries(d, b, row, rows, xhat, factors);
        kernels.load_results(d, b, row, rows, dout_rows, d.heads == 1 ? own + out_at : nullptr);
        DecodeAttention a = attention_of(d, rows, keys.count(b));
        a.q = rows_of(xhat, d.k_row());
        a.out = rows_of(own + out_at, d.v_row()), a.dout = rows_of(dout_rows, d.v_row());
        for (int64_t h = 0; h < d.heads; ++h) {
          keys.set(a, b, h);
          if (d.heads == 1) {
            a.lse = d.lse + b * d.queries + row;
          } else {  // the result of one head is nowhere: once more
            a.lse = own + lse_at;
            attention.forward(a, part_of(a), own + state_at, own + space_at);
            attention.finish_forward(a, part_of(a), own + state_at, 1, 0);
          }
          if (wants_keys) a.dk = copy + (b * d.heads + h) * head_size, a.dv = a.dk + k_size;
          const bool first_head = h == 0 && (first || !d.shared());
          float* const to = first_head ? dxhat : of_head;
          if (wants_rows) {
            a.dq = rows_of(to, d.k_row());
            std::fill_n(own + state_at, state_size, 0.0f);
          }
          attention.backward(a, part_of(a), own + state_at, nullptr, own + space_at);
          if (!wants_rows) continue;
          attention.finish_queries(a, part_of(a), own + state_at, 1, 0);
          if (!first_head)
            for (int64_t r = 0; r < rows; ++r) kernels.add(dxhat + r * d.k_row(), to + r * d.k_row(), d.channels);
        }
        if (!wants_rows || (d.shared() && !last)) continue;
        if (d.shared() && d.query_mask.data != nullptr) kernels.load_queries(d, -1, row, rows, xhat, factors);
        kernels.store_dqueries(d, b, row, rows, xhat, factors, dxhat, position_sums, first || d.shared());
      }
      if (wants_position) kernels.store_dposition(d, row, rows, position_sums);
    }
  });
  if (wants_keys)
    keys.for_blocks(all_threads, [&](int64_t b, int64_t h, int64_t first, int64_t count) {
      float* const of_head = sums.at((b * d.heads + h) * head_size);
      kernels.unpack_gradients(d, b, h, keys.keys(b), first, count, of_head, of_head + k_size, groups, copy_size);
    });
  return gradients;
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("latent_decode_fwd", TORCH_BOX(&mmk::forward));
  m.impl("latent_decode_bwd", TORCH_BOX(&mmk::backward));
}
