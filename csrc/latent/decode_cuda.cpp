// Checks, allocations and launches of the CUDA kernels of the decoder; schemas in csrc/schemas.h.
#include "latent/decode_cuda.h"

#include <algorithm>
#include <tuple>

#include "common/waves.h"
#include "latent/latent_binding.h"

namespace mmk::latent {
namespace {

struct Arguments {
  const Tensor& queries;
  const OptionalTensor &position, &query_mask;
  const Tensor &k, &bias, &v;
  const OptionalTensor &out_bias, &key_mask;
};

// What the kernels read, and the copies that have to live as long.
struct Described {
  Decode d{};
  Tensor k, v, bias, out_bias;
};

QueryRows latent_rows(const Problem& p, const Tensor& t, int64_t content, int64_t position, Tensor& keep,
                      void* stream) {
  Problem order = p;
  order.content = static_cast<int>(content), order.position = static_cast<int>(position);
  const Tensor rows = torch::stable::view(torch::stable::contiguous(t), {t.size(0) * t.size(1), t.size(2), t.size(3)});
  keep = rows;
  Tensor packed;
  const QueryRows result = aligned_rows(order, rows, t.scalar_type(), packed, stream);
  if (result.data != rows.const_data_ptr()) keep = packed;
  return result;
}

void describe(const Arguments& t, double scale, double eps, Described& result, void* stream) {
  const Tensor& x = t.queries;
  const ScalarType type = x.scalar_type();
  Decode& d = result.d;
  Problem& p = d.x;
  p.type = type_of(type);
  p.batch = t.k.size(0), p.rows = t.k.size(2), p.keys = x.size(1);
  p.content = static_cast<int>(x.size(2)), p.position = static_cast<int>(t.position ? t.position->size(1) : 0);
  p.x = x.const_data_ptr();
  d.shared = x.size(0) == 1;
  p.x_batch = d.shared ? 0 : x.stride(0), p.x_key = x.stride(1), p.x_channel = x.stride(2);
  if (t.position) {
    p.table = t.position->const_data_ptr();
    p.table_key = t.position->stride(0), p.table_channel = t.position->stride(1);
  }
  if (t.query_mask) {
    p.mask = static_cast<const bool*>(t.query_mask->const_data_ptr());
    p.mask_batch = t.query_mask->stride(0), p.mask_key = t.query_mask->stride(1);
  }
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);
  d.heads = t.k.size(1), d.columns = static_cast<int>(t.v.size(3));
  if (t.key_mask) {
    d.latent_mask = static_cast<const bool*>(t.key_mask->const_data_ptr());
    d.latent_mask_batch = t.key_mask->stride(0), d.latent_mask_row = t.key_mask->stride(1);
  }
  result.bias = torch::stable::contiguous(t.bias);
  d.bias = static_cast<const float*>(result.bias.const_data_ptr());
  if (t.out_bias) {
    result.out_bias = torch::stable::contiguous(*t.out_bias);
    d.out_bias = result.out_bias.const_data_ptr();
  }
  if (p.batch * p.keys * p.rows == 0) return;
  d.k = latent_rows(p, t.k, p.content, p.position, result.k, stream);
  d.v = latent_rows(p, t.v, d.columns, 0, result.v, stream);
}

void check(const Arguments& t) {
  const Tensor& x = t.queries;
  const ScalarType type = x.scalar_type();
  check_first(x, "queries");
  check_like(t.k, "k", x, type, 4);
  check_like(t.v, "v", x, type, 4);
  check_like(t.bias, "bias", x, ScalarType::Float, 3);
  const int64_t batch = t.k.size(0), channels = t.k.size(3), columns = t.v.size(3);
  STD_TORCH_CHECK(x.size(0) == 1 || x.size(0) == batch, "queries has batch ", x.size(0),
                  "; it must be 1 or that of k, ", batch);
  STD_TORCH_CHECK(t.k.size(1) >= 1, "k has no heads; there must be one or more");
  STD_TORCH_CHECK(channels >= 1 && channels <= 1024, "k has ", channels, " channels; 1 to 1024 are allowed");
  STD_TORCH_CHECK(columns >= 1 && columns <= 1024, "v has ", columns, " channels; 1 to 1024 are allowed");
  for (int64_t i = 0; i < 3; ++i) {
    check_size(t.v, "v", i, t.k.size(i));
    check_size(t.bias, "bias", i, t.k.size(i));
  }
  int64_t position = 0;
  if (t.position) {
    check_like(*t.position, "position", x, type, 2);
    check_size(*t.position, "position", 0, x.size(1));
    position = t.position->size(1);
  }
  STD_TORCH_CHECK(x.size(2) + position == channels, "queries and position have ", x.size(2) + position,
                  " channels; they must be those of k, ", channels);
  if (t.out_bias) {
    check_like(*t.out_bias, "out_bias", x, type, 1);
    check_size(*t.out_bias, "out_bias", 0, columns);
  }
  for (const auto& [mask, name, size] :
       {std::tuple{&t.query_mask, "query_mask", x.size(1)}, {&t.key_mask, "key_mask", t.k.size(2)}}) {
    if (!*mask) continue;
    check_like(**mask, name, x, ScalarType::Bool, 2);
    check_size(**mask, name, 0, batch);
    check_size(**mask, name, 1, size);
  }
}

Plan plan_for(const Decode& d, int (*planner)(const Decode*, Plan*)) {
  Plan plan{};
  STD_TORCH_CHECK(planner(&d, &plan) == 0, "latent_decode: no tile for ", d.x.content + d.x.position,
                  " channels of keys and ", d.columns, " of values fits into the shared memory of this device");
  return plan;
}

void check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "latent_decode: the problem needs ", blocks,
                  " thread blocks; 2^31 - 1 are allowed");
}

std::tuple<Tensor, Tensor> decode_fwd(const Tensor& queries, const OptionalTensor& position,
                                      const OptionalTensor& query_mask, const Tensor& k, const Tensor& bias,
                                      const Tensor& v, const OptionalTensor& out_bias, const OptionalTensor& key_mask,
                                      double scale, double eps) {
  const Arguments arguments{queries, position, query_mask, k, bias, v, out_bias, key_mask};
  check(arguments);
  const OnDevice device(queries);
  Described described;
  describe(arguments, scale, eps, described, device.stream);
  Decode& d = described.d;
  const Problem& p = d.x;
  Tensor out = empty(queries, {p.batch, p.keys, d.columns}, queries.scalar_type());
  Tensor lse = empty(queries, {p.batch, d.heads, p.keys}, ScalarType::Float);
  if (p.batch == 0 || p.keys == 0) return {out, lse};
  Tensor sums;
  if (d.heads > 1) {
    sums = empty(queries, out.sizes(), ScalarType::Float);
    d.sums = floats(sums);
  }
  d.out = out.mutable_data_ptr();
  d.lse = floats(lse);
  const Plan plan = plan_for(d, mmk_latent_decode_plan_fwd);
  // Shared queries are read once for all examples, unless that leaves multiprocessors without work.
  d.examples = d.shared && plan.row_tiles >= 2 * plan.slots ? p.batch : 1;
  check_blocks(plan.row_tiles * (p.batch / d.examples));
  check_launch(mmk_latent_decode_fwd(&d, &plan, device.stream), "latent_decode_fwd");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decode_bwd(
    const Tensor& dout, const Tensor& queries, const OptionalTensor& position, const OptionalTensor& query_mask,
    const Tensor& k, const Tensor& bias, const Tensor& v, const OptionalTensor& out_bias,
    const OptionalTensor& key_mask, const Tensor& out, const Tensor& lse, double scale, double eps, int64_t wanted) {
  enum { kQueries = 1, kPosition = 2, kLatents = 4 };
  const Arguments arguments{queries, position, query_mask, k, bias, v, out_bias, key_mask};
  check(arguments);
  const ScalarType type = queries.scalar_type();
  for (const auto& [t, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_like(*t, name, queries, type, 3);
    check_size(*t, name, 0, k.size(0));
    check_size(*t, name, 1, queries.size(1));
    check_size(*t, name, 2, v.size(3));
  }
  check_like(lse, "lse", queries, ScalarType::Float, 3);
  check_size(lse, "lse", 0, k.size(0));
  check_size(lse, "lse", 1, k.size(1));
  check_size(lse, "lse", 2, queries.size(1));
  STD_TORCH_CHECK(wanted >= 0 && wanted < 8, "wanted is ", wanted, "; it must be 0 to 7");
  const OnDevice device(queries);
  const bool want_queries = wanted & kQueries, want_position = (wanted & kPosition) && position;
  const bool want_latents = wanted & kLatents;
  const auto gradient = [&](bool is_wanted, const Tensor& like) {
    return is_wanted ? empty(like, like.sizes(), like.scalar_type()) : empty(like, {0}, like.scalar_type());
  };
  Tensor dqueries = gradient(want_queries, queries),
         dposition = gradient(want_position, position ? *position : queries);
  Tensor dk = gradient(want_latents, k), dbias = gradient(want_latents, bias), dv = gradient(want_latents, v);
  const std::tuple gradients{dqueries, dposition, dk, dbias, dv};
  if (k.size(0) == 0 || queries.size(1) == 0 || k.size(2) == 0) {
    for (Tensor* t : {&dqueries, &dposition, &dk, &dbias, &dv}) torch::stable::zero_(*t);
    return gradients;
  }
  if (!want_queries && !want_position && !want_latents) return gradients;

  Described described;
  describe(arguments, scale, eps, described, device.stream);
  Decode& d = described.d;
  const Problem& p = d.x;
  Tensor dense_out = torch::stable::contiguous(out), dense_lse = torch::stable::contiguous(lse);
  const Tensor dense_dout = torch::stable::contiguous(dout);
  Tensor delta = empty(queries, {p.batch, d.heads, p.keys}, ScalarType::Float), table_sums;
  d.out = dense_out.mutable_data_ptr();
  d.lse = floats(dense_lse);
  DecodeBackward b{};
  b.of_rows.dout.data = dense_dout.const_data_ptr();
  const int64_t size = type == ScalarType::Float ? 4 : 2;
  const auto aligned = [&](int64_t bytes) {
    return d.columns * size % bytes == 0 && reinterpret_cast<uintptr_t>(b.of_rows.dout.data) % bytes == 0;
  };
  b.dout_bytes = static_cast<int>(aligned(16) ? 16 : aligned(4) ? 4 : size);
  b.delta = floats(delta);
  if (want_queries) b.of_rows.dx = dqueries.mutable_data_ptr();
  if (want_position) {
    b.of_rows.dtable = dposition.mutable_data_ptr();
    if (p.batch > 1 && !d.shared) {
      table_sums = empty(queries, {p.keys, p.position}, ScalarType::Float);
      b.of_rows.table_sums = floats(table_sums);
    }
  }
  b.sums_first = d.heads > 1 || type == ScalarType::Float;
  if (!b.sums_first) check_launch(mmk_latent_decode_delta(&d, &b, device.stream), "latent_decode_bwd");
  if (b.sums_first || want_queries || want_position) {
    const Plan plan = plan_for(d, mmk_latent_decode_plan_bwd_rows);
    // A gradient that examples share is summed where one block has them all, one after another.
    d.examples = want_position || (want_queries && d.shared) ? p.batch : 1;
    check_blocks(plan.row_tiles * (p.batch / d.examples));
    check_launch(mmk_latent_decode_bwd_rows(&d, &plan, &b, device.stream), "latent_decode_bwd");
  }
  if (!want_latents) return gradients;
  // Partial sums of the splits; those of dv are through before those of dk come into the same place.
  const int64_t heads = p.batch * d.heads;
  Plan of_values = plan_for(d, mmk_latent_decode_plan_bwd_values),
       of_keys = plan_for(d, mmk_latent_decode_plan_bwd_keys);
  for (Plan* plan : {&of_values, &of_keys}) {
    plan->splits = split_keys(plan->row_tiles * heads, plan->key_tiles, plan->slots);
    check_blocks(plan->row_tiles * plan->splits * heads);
  }
  Tensor partial = empty(queries, {heads * p.rows, std::max(of_values.splits * d.columns, of_keys.splits * k.size(3))},
                         ScalarType::Float);
  Tensor partial_bias = empty(queries, {of_keys.splits, heads * p.rows}, ScalarType::Float);
  b.partial = floats(partial);
  b.partial_bias = floats(partial_bias);
  check_launch(mmk_latent_decode_bwd_values(&d, &of_values, &b, dv.mutable_data_ptr(), device.stream),
               "latent_decode_bwd");
  check_launch(mmk_latent_decode_bwd_keys(&d, &of_keys, &b, dk.mutable_data_ptr(), floats(dbias), device.stream),
               "latent_decode_bwd");
  return gradients;
}

}  // namespace
}  // namespace mmk::latent

MMK_REGISTER_CUDA(m) {
  m.impl("latent_decode_fwd", TORCH_BOX(&mmk::latent::decode_fwd));
  m.impl("latent_decode_bwd", TORCH_BOX(&mmk::latent::decode_bwd));
}
