// Latent attention on the CPU: checks and the registered ops. Attention's own parts do the work.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention/dropout.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "latent/latent.h"

namespace mmk {

MMK_KERNELS_IN_USE(LatentKernels, latent_kernels, latent_kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

// (B,R,C) as attention's (B,1,R,C).
Strided with_one_head(Strided s) {
  s.stride[0] = s.stride[1];
  s.stride[1] = 0;
  return s;
}

// Everything but the queries.
LatentAttention describe_input(ScalarType dtype, const Tensor& x, const OptionalTensor& position,
                               const OptionalTensor& key_mask, int64_t queries, double scale, double eps) {
  check_dtype(x, "x", dtype);
  check_rank(x, "x", 3);
  LatentAttention a;
  a.batch = x.size(0), a.heads = 1, a.queries = queries, a.keys = x.size(1), a.x_channels = x.size(2);
  int64_t channels = a.x_channels;
  a.x = strided(x);
  if (position.has_value()) {
    check_dtype(*position, "position", dtype);
    check_rank(*position, "position", 2);
    channels += position->size(1);
    check_shape(*position, "position", {a.keys, position->size(1)});
    a.position = strided(*position);
  }
  STD_TORCH_CHECK(channels >= 1, "x has shape ", text_of_shape(x), "; there must be at least one channel");
  if (key_mask.has_value()) {
    check_dtype(*key_mask, "key_mask", ScalarType::Bool);
    check_shape(*key_mask, "key_mask", {a.batch, a.keys});
    a.key_mask = strided(*key_mask);
  }
  a.channels = a.qk_dim = a.v_dim = channels;
  a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
  a.load_keys = latent_kernels().load_keys;
  a.key_space = latent_key_space(channels);
  a.one_key_gradient = true;
  return a;
}

// Can rows be read by vectors where they are, and is there nothing to do with them but a LayerNorm?
bool may_be_raw(const LatentAttention& a) {
  return 1 <= a.queries && a.queries <= kRawQueries && a.eps >= 0.0f && a.position.data == nullptr && !a.dropout &&
         a.x.dtype == DType::kFloat32 && a.x.stride[3] == 1 && a.channels % 16 == 0;
}

// `q` is replaced where the kernels need a copy: the problem points into it.
LatentAttention describe(Tensor& q, const Tensor& x, const OptionalTensor& position, const OptionalTensor& key_mask,
                         double scale, double eps, const OptionalTensor& seed, double dropout_p, int64_t first_key) {
  const ScalarType dtype = check_first(q, "q", 3);
  LatentAttention a = describe_input(dtype, x, position, key_mask, q.size(1), scale, eps);
  STD_TORCH_CHECK((q.size(0) == 1 || q.size(0) == a.batch) && q.size(2) == a.qk_dim, "q has shape ", text_of_shape(q),
                  "; it must be ", text({a.batch, a.queries, a.qk_dim}), " or the same with a batch of 1");
  set_dropout(a, seed, dropout_p);
  a.first_key = static_cast<uint32_t>(first_key);
  if (a.dropout) {
    q = torch::stable::pad(q, {0, 1});
    a.key_space = latent_key_space(a.qk_dim = a.v_dim = a.channels + 1);
  }
  Strided rows = with_one_head(strided(q));
  if (q.size(0) == 1) rows.stride[0] = 0;
  a.q = rows;
  a.raw_keys = may_be_raw(a);
  return a;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor x, OptionalTensor position, OptionalTensor key_mask, double scale,
                                   double eps, OptionalTensor seed, double dropout_p, int64_t first_key) {
  LatentAttention a = describe(q, x, position, key_mask, scale, eps, seed, dropout_p, first_key);
  Tensor out = allocate(q, {a.batch, a.queries, a.v_dim}, ScalarType::Float);
  Tensor lse = allocate(q, {a.batch, a.queries}, ScalarType::Float);
  a.out = with_one_head(strided(out));
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_forward({&a});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor x,
                                            OptionalTensor position, OptionalTensor key_mask, Tensor out, Tensor lse,
                                            double scale, double eps, int64_t wanted, OptionalTensor seed,
                                            double dropout_p, int64_t first_key) {
  LatentAttention a = describe(q, x, position, key_mask, scale, eps, seed, dropout_p, first_key);
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_dtype(*tensor, name, ScalarType::Float);
    check_shape(*tensor, name, {a.batch, a.queries, a.v_dim});
  }
  check_dtype(lse, "lse", ScalarType::Float);
  check_shape(lse, "lse", {a.batch, a.queries});
  if (dlse.has_value()) {
    check_dtype(*dlse, "dlse", ScalarType::Float);
    check_shape(*dlse, "dlse", {a.batch, a.queries});
    dlse = as_contiguous(*dlse);
    a.dlse = floats(*dlse);
  }
  lse = as_contiguous(lse);
  a.lse = const_cast<float*>(floats(lse));
  a.out = with_one_head(strided(out)), a.dout = with_one_head(strided(dout));

  const bool wants_position = (wanted & 4) != 0 && position.has_value(), sum_position = wants_position && a.batch != 1;
  auto gradient = [&](const Tensor& t, bool want) { return want ? allocate(t, t.sizes()) : allocate(t, {0}); };
  Tensor dq = gradient(q, wanted & 1), dx = gradient(x, wanted & 2);
  Tensor dposition = position.has_value() ? gradient(*position, wants_position) : allocate(q, {0});
  if (wanted & 1) {
    Strided rows = with_one_head(strided(dq));
    a.dq_shared = q.size(0) == 1 && a.batch != 1;
    if (a.dq_shared) rows.stride[0] = 0;
    a.dq = rows;
  }
  if (wanted & 2) a.dx = strided(dx);
  Tensor position_sums = dposition;
  if (wants_position) {
    if (sum_position) {
      position_sums = allocate(dposition, dposition.sizes(), ScalarType::Float);
      torch::stable::zero_(position_sums);
    }
    a.dposition = strided(position_sums);
    a.add_dposition = a.summed_over_batch = sum_position;
  }
  if ((wanted & 2) || wants_position) a.store_key_gradients = latent_kernels().store_key_gradients;
  attention_backward({&a});
  if (sum_position) torch::stable::copy_(dposition, position_sums);
  if (a.dq_shared && a.batch == 0) torch::stable::zero_(dq);
  if (a.dropout && (wanted & 1)) dq = torch::stable::contiguous(torch::stable::narrow(dq, 2, 0, a.channels));
  return {dq, dx, dposition};
}

// The whole absorbed forward in one call. Without w_k the queries are absorbed already: (B|1,H*N,C).
Tensor inference(Tensor q, Tensor x, OptionalTensor w_k, Tensor w_v, OptionalTensor norm_weight,
                 OptionalTensor norm_bias, OptionalTensor b_v, OptionalTensor position, OptionalTensor key_mask,
                 int64_t num_heads, double scale, double eps) {
  const ScalarType dtype = check_first(q, "q", 3);
  STD_TORCH_CHECK(num_heads >= 1, "num_heads is ", num_heads, "; it must be positive");
  auto check_weight = [&](const Tensor& weight, const char* name) {
    check_rank(weight, name, 2);
    check_dtype(weight, name, dtype);
    STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(0) % num_heads == 0, name, " has shape ", text_of_shape(weight),
                    "; its rows must be a positive multiple of num_heads, ", num_heads);
  };
  const bool absorbs = w_k.has_value();
  if (absorbs) check_weight(*w_k, "w_k");
  check_weight(w_v, "w_v");
  Projections p;
  p.heads = num_heads, p.queries = absorbs ? q.size(1) : q.size(1) / num_heads;
  p.qk_dim = absorbs ? w_k->size(0) / num_heads : 0, p.v_dim = w_v.size(0) / num_heads;
  LatentAttention a = describe_input(dtype, x, position, key_mask, num_heads * p.queries, scale, eps);
  p.batch = a.batch, p.channels = a.qk_dim;
  if (absorbs) check_shape(*w_k, "w_k", {w_k->size(0), p.channels});
  check_shape(w_v, "w_v", {w_v.size(0), p.channels});
  const int64_t q_batch = q.size(0), q_rows = absorbs ? p.queries : a.queries;
  const int64_t q_channels = absorbs ? w_k->size(0) : p.channels;
  STD_TORCH_CHECK((q_batch == 1 || q_batch == p.batch) && q.size(1) == q_rows && q.size(2) == q_channels,
                  "q has shape ", text_of_shape(q), "; it must be ", text({p.batch, q_rows, q_channels}),
                  " or the same with a batch of 1");
  auto line = [&](const OptionalTensor& t, const char* name, int64_t size, bool or_float) {
    if (!t.has_value()) return Strided{};
    check_dtype(*t, name, or_float && t->scalar_type() == ScalarType::Float ? ScalarType::Float : dtype);
    check_shape(*t, name, {size});
    return strided(*t);
  };
  p.gain = line(norm_weight, "norm_weight", p.channels, true);
  p.shift = line(norm_bias, "norm_bias", p.channels, true);
  p.b_v = line(b_v, "b_v", w_v.size(0), false);
  p.q = strided(q), p.w_k = strided(w_k), p.w_v = strided(w_v);
  Tensor out = allocate(q, {p.batch, p.queries, w_v.size(0)});
  p.out = strided(out);
  if (out.numel() == 0) return out;

  const LatentKernels& kernels = latent_kernels();
  const int64_t wide = padded_row(p.channels);
  const int64_t threads = threads_for(2.0 * p.batch * a.queries * p.channels * (p.qk_dim + p.v_dim));
  const int64_t space_size = round_up(kernels.projection_space(p), 16);
  const int64_t absorbed_size = absorbs ? q_batch * a.queries * wide : 0, core_size = p.batch * a.queries * wide;
  const Space space(absorbed_size + core_size + threads * space_size + p.batch * a.queries);
  p.absorbed = space.at(0);
  float* core = space.at(absorbed_size);
  float* worker_space = core + core_size;
  a.lse = worker_space + threads * space_size;
  p.core = core, p.lse = a.lse;
  const int64_t example = a.queries * wide;
  a.out = Strided{reinterpret_cast<char*>(core), DType::kFloat32, {example, 0, wide, 1}};

  auto for_pieces = [&](int64_t examples, int64_t columns, auto kernel) {
    const int64_t chunks = ceil_div(examples * p.queries, kChunkRows), blocks = ceil_div(columns, kProjectionColumns);
    for_parts(p.heads * chunks * blocks, threads, [&](int64_t i, int64_t worker) {
      kernel(p, examples, i / blocks / chunks, i / blocks % chunks * kChunkRows, i % blocks * kProjectionColumns,
             worker_space + worker * space_size);
    });
  };
  if (absorbs) {
    a.q = Strided{reinterpret_cast<char*>(p.absorbed), DType::kFloat32, {q_batch == 1 ? 0 : example, 0, wide, 1}};
    for_pieces(q_batch, p.channels, kernels.absorb);
  } else {
    Strided rows = with_one_head(strided(q));
    if (q_batch == 1) rows.stride[0] = 0;
    a.q = rows;
  }
  a.raw_keys = may_be_raw(a);
  attention_forward({&a});
  for_pieces(p.batch, p.v_dim, kernels.project);
  return out;
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("latent_fwd", TORCH_BOX(&mmk::forward));
  m.impl("latent_bwd", TORCH_BOX(&mmk::backward));
  m.impl("latent_attention", TORCH_BOX(&mmk::inference));
}
