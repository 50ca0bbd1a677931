// Attention on the CPU: checks, the plan of parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "attention/attention.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/waves.h"

namespace mmk {

namespace base {
extern const AttentionKernels attention_kernels;
}
#if defined(__x86_64__)
namespace v3 {
extern const AttentionKernels attention_kernels;
}
namespace v4 {
extern const AttentionKernels attention_kernels;
}
#endif

namespace {

int64_t at_least_one(int64_t n) { return std::max<int64_t>(n, 1); }

// How a problem's rows and keys are cut.
struct Cut {
  int64_t rows, row_parts, keys, key_parts;  // rows and keys of a part, number of parts

  Cut(const Attention& a, int64_t lanes, int64_t want_row_parts, int64_t want_key_parts) {
    rows = at_least_one(round_up(ceil_div(a.queries, want_row_parts), lanes));
    row_parts = at_least_one(ceil_div(a.queries, rows));
    keys = at_least_one(ceil_div(ceil_div(a.keys, kBlockKeys), want_key_parts)) * kBlockKeys;
    key_parts = at_least_one(ceil_div(a.keys, keys));
  }

  void set(Part& part, const Attention& a, int64_t row_part, int64_t key_part) const {
    part.row_begin = std::min(row_part * rows, a.queries);
    part.row_end = std::min(part.row_begin + rows, a.queries);
    part.key_begin = std::min(key_part * keys, a.keys);
    part.key_end = std::min(part.key_begin + keys, a.keys);
  }
};

int64_t threads_for(const Attention& a) {
  return mmk::threads_for(2.0 * a.batch * a.heads * a.queries * a.keys * (a.qk_dim + a.v_dim));
}

// Row parts of at most `most_rows`, and as many as threads need, but none below kChunkRows for that. Where there are
// more keys than rows, threads share the keys instead: every part of the rows would load all of them.
int64_t plan_row_parts(const Attention& a, int64_t problems, int64_t threads, int64_t most_rows) {
  const int64_t for_threads = a.keys > a.queries ? 1 : std::min(ceil_div(threads, problems), a.queries / kChunkRows);
  return at_least_one(std::max(ceil_div(a.queries, most_rows), for_threads));
}

}  // namespace

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  const Isa isa = chosen_isa();
  if (isa == Isa::kV4) return v4::attention_kernels;
  if (isa == Isa::kV3) return v3::attention_kernels;
#endif
  return base::attention_kernels;
}

void attention_forward(const Attention& a) {
  const int64_t problems = a.batch * a.heads, threads = threads_for(a);
  if (problems * a.queries == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  // Against few keys a row's own traffic is the cost: parts that stay in the first cache levels.
  const int64_t row_parts = plan_row_parts(a, problems, threads, a.keys <= 32 ? kChunkRows : 512);
  const int64_t key_parts = split_keys(problems * row_parts, ceil_div(a.keys, kBlockKeys), threads);
  const Cut cut(a, kernels.lanes, row_parts, key_parts);
  const int64_t targets = problems * cut.row_parts, parts = targets * cut.key_parts;
  const int64_t workers = std::min(threads, parts);
  const bool merge = cut.key_parts > 1;
  const int64_t state_size = round_up(kernels.forward_state(a, cut.rows), 16);
  const int64_t space_size = round_up(kernels.forward_space(a, cut.rows), 16);
  const Space states((merge ? parts : workers) * state_size), space(workers * space_size);
  auto part_at = [&](int64_t target, int64_t key_part) {
    const int64_t problem = target / cut.row_parts;
    Part part{problem / a.heads, problem % a.heads};
    cut.set(part, a, target % cut.row_parts, key_part);
    return part;
  };
  for_parts(parts, workers, [&](int64_t i, int64_t worker) {
    const Part part = part_at(i / cut.key_parts, i % cut.key_parts);
    float* state = states.at((merge ? i : worker) * state_size);
    kernels.forward(a, part, state, space.at(worker * space_size));
    if (!merge) kernels.finish_forward(a, part, state, 1, 0);
  });
  if (!merge) return;
  for_parts(targets, workers, [&](int64_t target, int64_t) {
    kernels.finish_forward(a, part_at(target, 0), states.at(target * cut.key_parts * state_size), cut.key_parts,
                           state_size);
  });
}

void attention_backward(Attention& a) {
  const bool wants_keys = a.store_key_gradients != nullptr, wants_queries = a.dq.data != nullptr;
  const bool batch_in_turn = a.summed_over_batch || a.dq_shared;
  // Problems of one group add to the same gradient: they go one after another, groups side by side.
  const int64_t batches = batch_in_turn ? 1 : a.batch, heads = a.summed_over_heads ? 1 : a.heads;
  const int64_t groups = batches * heads, members = groups == 0 ? 0 : a.batch * a.heads / groups;
  if (members == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  const int64_t threads = threads_for(a), blocks = ceil_div(a.keys, kBlockKeys);
  int64_t row_parts = 1, key_parts = 1;
  if (!wants_keys) {
    row_parts = plan_row_parts(a, groups, threads, kKeptRows);
    key_parts = split_keys(groups * row_parts, blocks, threads);
  } else if (a.queries > a.keys && !a.one_key_gradient) {
    row_parts = split_keys(groups, ceil_div(a.queries, kChunkRows), threads);
  } else {
    key_parts = split_keys(groups, blocks, threads);
  }
  const Cut cut(a, kernels.lanes, row_parts, key_parts);
  const int64_t targets = groups * cut.row_parts, parts = targets * cut.key_parts;
  const int64_t workers = std::min(threads, parts);
  const bool keep_states = cut.key_parts > 1 || a.dq_shared, merge_keys = wants_keys && cut.row_parts > 1;
  const int64_t state_size = wants_queries ? round_up(kernels.backward_state(a, cut.rows), 16) : 0;
  const int64_t key_state_size = merge_keys ? key_state_floats(a) : 0;
  const int64_t space_size = round_up(kernels.backward_space(a, cut.rows), 16);
  const int64_t bias_copies = a.bias_per_query ? 1 : cut.row_parts;
  const bool sum_bias = a.dbias.data != nullptr && !a.dbias_direct;
  const int64_t bias_floats = sum_bias ? bias_copies * a.dbias_size : 0;
  const Space states((keep_states ? parts : workers) * state_size), key_states(targets * key_state_size);
  const Space space(workers * space_size), bias_space(bias_floats);
  const Strided dbias = a.dbias;
  if (sum_bias) {
    std::fill_n(bias_space.at(0), bias_floats, 0.0f);
    a.dbias.data = reinterpret_cast<char*>(bias_space.at(0));
    a.dbias.dtype = DType::kFloat32;
  }

  for (int64_t member = 0; member < members; ++member) {
    auto part_at = [&](int64_t target, int64_t key_part) {
      const int64_t group = target / cut.row_parts, row_part = target % cut.row_parts;
      const int64_t member_heads = a.heads / heads;
      Part part{group / heads + member / member_heads, group % heads + member % member_heads};
      cut.set(part, a, row_part, key_part);
      part.dbias_copy = bias_copies > 1 ? row_part : 0;
      return part;
    };
    const bool first = member == 0, last = member == members - 1;
    for_parts(parts, workers, [&](int64_t i, int64_t worker) {
      const Part part = part_at(i / cut.key_parts, i % cut.key_parts);
      float* state = states.at((keep_states ? i : worker) * state_size);
      float* key_state = merge_keys ? key_states.at(i * key_state_size) : nullptr;
      if (first || !a.dq_shared) std::fill_n(state, state_size, 0.0f);
      std::fill_n(key_state, key_state_size, 0.0f);
      kernels.backward(a, part, state, key_state, space.at(worker * space_size));
      if (wants_queries && !keep_states) kernels.finish_queries(a, part, state, 1, 0);
    });
    if (wants_queries && keep_states && (last || !a.dq_shared))
      for_parts(targets, workers, [&](int64_t target, int64_t) {
        float* first_state = states.at(target * cut.key_parts * state_size);
        kernels.finish_queries(a, part_at(target, 0), first_state, cut.key_parts, state_size);
      });
    if (merge_keys)
      for_parts(groups * blocks, workers, [&](int64_t i, int64_t worker) {
        const int64_t target = i / blocks * cut.row_parts;
        Part part = part_at(target, 0);
        part.key_begin = i % blocks * kBlockKeys;
        part.key_end = std::min(part.key_begin + kBlockKeys, a.keys);
        float* first_state = key_states.at(target * key_state_size);
        kernels.finish_keys(a, part, first_state, cut.row_parts, key_state_size, space.at(worker * space_size));
      });
  }
  if (sum_bias) kernels.finish_bias(dbias.data, dbias.dtype, bias_space.at(0), bias_copies, a.dbias_size);
}

namespace {

using OptionalTensor = std::optional<Tensor>;

PlainAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                        const OptionalTensor& bias, const OptionalTensor& seed, double scale, double dropout_p) {
  const ScalarType dtype = check_first(q, "q", 4);
  check_dtype(k, "k", dtype);
  check_dtype(v, "v", dtype);
  check_rank(k, "k", 4);
  check_rank(v, "v", 4);
  PlainAttention a;
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.qk_dim = q.size(3);
  a.keys = k.size(2), a.v_dim = v.size(3);
  check_shape(k, "k", {a.batch, a.heads, a.keys, a.qk_dim});
  check_shape(v, "v", {a.batch, a.heads, a.keys, a.v_dim});
  STD_TORCH_CHECK(a.qk_dim >= 1, "q has head dim ", a.qk_dim, "; it must be at least 1");
  STD_TORCH_CHECK(a.v_dim >= 1, "v has head dim ", a.v_dim, "; it must be at least 1");
  a.scale = static_cast<float>(scale);
  a.q = strided(q), a.k = strided(k), a.v = strided(v);
  if (key_mask.has_value()) {
    check_dtype(*key_mask, "key_mask", ScalarType::Bool);
    check_shape(*key_mask, "key_mask", {a.batch, a.keys});
    a.key_mask = strided(*key_mask);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu(), "bias is not on the CPU; every tensor of this call must be");
    STD_TORCH_CHECK(bias->scalar_type() == dtype || bias->scalar_type() == ScalarType::Float, "bias has dtype ",
                    torch::headeronly::toString(bias->scalar_type()), "; it must be q's or float32");
    check_rank(*bias, "bias", 4);
    const int64_t full[4] = {a.batch, a.heads, a.queries, a.keys};
    for (int64_t i = 0; i < 4; ++i)
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[i], "bias has shape ", text_of_shape(*bias),
                      "; it must be ", text({full[0], full[1], full[2], full[3]}), " with any of them 1");
    a.bias = strided(*bias, true);
    a.bias_per_query = bias->size(2) == a.queries;
  }
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), "seed is None; with dropout_p > 0 it must be an int64 tensor of one element");
    check_dtype(*seed, "seed", ScalarType::Long);
    check_shape(*seed, "seed", {1});
    a.dropout = true;
    a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    a.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 4294967295.0));
    a.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  const AttentionKernels& kernels = attention_kernels();
  a.load_keys = kernels.load_keys;
  a.key_space = kBlockKeys * (padded_row(a.qk_dim) + padded_row(a.v_dim));
  return a;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor bias,
                                   OptionalTensor seed, double scale, double dropout_p) {
  PlainAttention a = describe(q, k, v, key_mask, bias, seed, scale, dropout_p);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.heads, a.queries, a.v_dim});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.queries}, ScalarType::Float);
  a.out = strided(out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_forward(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v,
                                                    Tensor out, Tensor lse, OptionalTensor key_mask,
                                                    OptionalTensor bias, OptionalTensor seed, double scale,
                                                    double dropout_p, int64_t wanted) {
  PlainAttention a = describe(q, k, v, key_mask, bias, seed, scale, dropout_p);
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_dtype(*tensor, name, q.scalar_type());
    check_shape(*tensor, name, {a.batch, a.heads, a.queries, a.v_dim});
  }
  check_dtype(lse, "lse", ScalarType::Float);
  check_shape(lse, "lse", {a.batch, a.heads, a.queries});
  if (dlse.has_value()) {
    check_dtype(*dlse, "dlse", ScalarType::Float);
    check_shape(*dlse, "dlse", {a.batch, a.heads, a.queries});
    dlse = torch::stable::contiguous(*dlse);
    a.dlse = floats(*dlse);
  }
  lse = torch::stable::contiguous(lse);
  a.lse = const_cast<float*>(floats(lse));
  a.out = strided(out), a.dout = strided(dout);

  const bool wants_bias = (wanted & 4) != 0 && bias.has_value();
  auto gradient = [&](const Tensor& t, bool want) {
    return want ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_empty(t, {0});
  };
  Tensor dq = gradient(q, wanted & 1), dk = gradient(k, wanted & 2), dv = gradient(v, wanted & 2);
  Tensor dbias = bias.has_value() ? gradient(*bias, wants_bias) : torch::stable::new_empty(q, {0});
  if (wanted & 1) a.dq = strided(dq);
  if (wanted & 2) {
    a.store_key_gradients = attention_kernels().store_key_gradients;
    a.dk = strided(dk), a.dv = strided(dv);
  }
  if (wants_bias) {
    STD_TORCH_CHECK(bias->size(3) == a.keys, "bias has shape ", text_of_shape(*bias),
                    "; dbias may be wanted where its last size is ", a.keys);
    torch::stable::zero_(dbias);
    a.dbias = strided(dbias, true);
    a.dbias_size = dbias.numel();
    a.summed_over_batch = bias->size(0) < a.batch;
    a.summed_over_heads = bias->size(1) < a.heads;
    a.dbias_direct = dbias.numel() == a.batch * a.heads * a.queries * a.keys;
  }
  attention_backward(a);
  return {dq, dk, dv, dbias};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&mmk::forward));
  m.impl("attention_bwd", TORCH_BOX(&mmk::backward));
}
