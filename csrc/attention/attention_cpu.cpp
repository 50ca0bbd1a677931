// Attention on the CPU: checks, the plan of parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_list.h"
#include "attention/dropout.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/sums.h"
#include "common/waves.h"

namespace mmk {

MMK_KERNELS_IN_USE(AttentionKernels, attention_kernels, attention_kernels)

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

double operations(const Attention& a) { return 2.0 * a.batch * a.heads * a.queries * a.keys * (a.qk_dim + a.v_dim); }

// Row parts of at most `most_rows`, and as many as threads need, but none below kChunkRows for that. Where there are
// more keys than rows, threads share the keys instead: every part of the rows would load all of them.
int64_t plan_row_parts(const Attention& a, int64_t problems, int64_t threads, int64_t most_rows) {
  const int64_t for_threads = a.keys > a.queries ? 1 : std::min(ceil_div(threads, problems), a.queries / kChunkRows);
  return at_least_one(std::max(ceil_div(a.queries, most_rows), for_threads));
}

// One problem of a pass. Its targets are groups of (batch, head) x row parts, its parts targets x key parts. Members of
// a group add to the same gradient: they go one after another, groups side by side.
struct Plan {
  const Attention* a;
  int64_t heads, groups, members;  // heads that have groups of their own, groups, members of each
  Cut cut;
  int64_t state_size, space_size;
  bool keep_states;  // those of all parts until a later phase; else a thread has one at a time
  Space states, key_states, bias;
  int64_t key_state_size = 0, bias_copies = 0;
  Strided dbias;  // where the sum of the copies goes

  int64_t targets() const { return groups * cut.row_parts; }
  int64_t parts() const { return targets() * cut.key_parts; }
  int64_t part_scores() const { return std::min(cut.rows, a->queries) * std::min(cut.keys, a->keys); }

  Part part_at(int64_t member, int64_t target, int64_t key_part) const {
    const int64_t group = target / cut.row_parts, row_part = target % cut.row_parts, member_heads = a->heads / heads;
    Part part{group / heads + member / member_heads, group % heads + member % member_heads};
    cut.set(part, *a, row_part, key_part);
    part.dbias_copy = bias_copies > 1 ? row_part : 0;
    return part;
  }
};

// The problems of a pass over the same threads. Long parts come first, so that threads end together.
class Pool {
 public:
  explicit Pool(std::vector<Plan> plans) : plans_(std::move(plans)) {
    std::stable_sort(plans_.begin(), plans_.end(),
                     [](const Plan& a, const Plan& b) { return a.part_scores() > b.part_scores(); });
    double all_operations = 0.0;
    int64_t parts = 0, space_size = 0;
    for (const Plan& plan : plans_) {
      all_operations += operations(*plan.a);
      parts += plan.parts();
      space_size = std::max(space_size, plan.space_size);
      if (!plan.keep_states) state_size_ = std::max(state_size_, plan.state_size);
    }
    workers_ = std::min(threads_for(all_operations), parts);
    worker_size_ = state_size_ + space_size;
    memory_ = Space(workers_ * worker_size_);
  }

  const std::vector<Plan>& plans() const { return plans_; }
  float* state(int64_t worker) const { return memory_.at(worker * worker_size_); }
  float* space(int64_t worker) const { return state(worker) + state_size_; }

  // Calls f(plan, i, worker) for i below count(plan), of all plans.
  template <class Count, class F>
  void run(Count count, F f) const {
    int64_t total = 0;
    for (const Plan& plan : plans_) total += count(plan);
    for_parts(total, workers_, [&](int64_t i, int64_t worker) {
      const Plan* plan = plans_.data();
      for (int64_t n; i >= (n = count(*plan)); ++plan) i -= n;
      f(*plan, i, worker);
    });
  }

 private:
  std::vector<Plan> plans_;
  int64_t workers_, worker_size_, state_size_ = 0;
  Space memory_;
};

}  // namespace

void attention_forward(const std::vector<const Attention*>& problems) {
  const AttentionKernels& kernels = attention_kernels();
  std::vector<Plan> plans;
  for (const Attention* a : problems) {
    const int64_t groups = a->batch * a->heads, threads = threads_for(operations(*a));
    if (groups * a->queries == 0) continue;
    // Against few keys a row's own traffic is the cost: parts that stay in the first cache levels.
    const int64_t row_parts = plan_row_parts(*a, groups, threads, a->keys <= 32 ? kChunkRows : 512);
    const int64_t key_parts = split_keys(groups * row_parts, ceil_div(a->keys, kBlockKeys), threads);
    Plan plan{a, a->heads, groups, 1, Cut(*a, kernels.lanes, row_parts, key_parts)};
    plan.state_size = round_up(kernels.forward_state(*a, plan.cut.rows), 16);
    plan.space_size = round_up(kernels.forward_space(*a, plan.cut.rows), 16);
    plan.keep_states = plan.cut.key_parts > 1;
    if (plan.keep_states) plan.states = Space(plan.parts() * plan.state_size);
    plans.push_back(plan);
  }
  const Pool pool(std::move(plans));
  pool.run([](const Plan& plan) { return plan.parts(); },
           [&](const Plan& plan, int64_t i, int64_t worker) {
             const Part part = plan.part_at(0, i / plan.cut.key_parts, i % plan.cut.key_parts);
             float* state = plan.keep_states ? plan.states.at(i * plan.state_size) : pool.state(worker);
             kernels.forward(*plan.a, part, state, pool.space(worker));
             if (!plan.keep_states) kernels.finish_forward(*plan.a, part, state, 1, 0);
           });
  pool.run([](const Plan& plan) { return plan.keep_states ? plan.targets() : 0; },
           [&](const Plan& plan, int64_t target, int64_t) {
             float* states = plan.states.at(target * plan.cut.key_parts * plan.state_size);
             kernels.finish_forward(*plan.a, plan.part_at(0, target, 0), states, plan.cut.key_parts, plan.state_size);
           });
}

void attention_backward(const std::vector<Attention*>& problems) {
  const AttentionKernels& kernels = attention_kernels();
  std::vector<Plan> plans;
  int64_t most_members = 0;
  for (Attention* a : problems) {
    const bool wants_keys = a->store_key_gradients != nullptr;
    const bool batch_in_turn = a->summed_over_batch || a->dq_shared;
    const int64_t batches = batch_in_turn ? 1 : a->batch, heads = a->summed_over_heads ? 1 : a->heads;
    const int64_t groups = batches * heads, members = groups == 0 ? 0 : a->batch * a->heads / groups;
    if (members == 0) continue;
    const int64_t threads = threads_for(operations(*a)), blocks = ceil_div(a->keys, kBlockKeys);
    int64_t row_parts = 1, key_parts = 1;
    if (!wants_keys) {
      row_parts = plan_row_parts(*a, groups, threads, kKeptRows);
      key_parts = split_keys(groups * row_parts, blocks, threads);
    } else if (a->queries > a->keys && !a->one_key_gradient) {
      row_parts = split_keys(groups, ceil_div(a->queries, kChunkRows), threads);
    } else {
      key_parts = split_keys(groups, blocks, threads);
    }
    Plan plan{a, heads, groups, members, Cut(*a, kernels.lanes, row_parts, key_parts)};
    plan.state_size = a->wants_queries() ? round_up(kernels.backward_state(*a, plan.cut.rows), 16) : 0;
    plan.space_size = round_up(kernels.backward_space(*a, plan.cut.rows), 16);
    plan.keep_states = plan.cut.key_parts > 1 || a->dq_shared;
    if (plan.keep_states) plan.states = Space(plan.parts() * plan.state_size);
    if (wants_keys && plan.cut.row_parts > 1) {
      plan.key_state_size = key_state_floats(*a);
      plan.key_states = Space(plan.targets() * plan.key_state_size);
    }
    if (a->dbias.data != nullptr && !a->dbias_direct) {
      plan.bias_copies = a->bias_per_query ? 1 : plan.cut.row_parts;
      plan.bias = Space(plan.bias_copies * a->dbias_size);
      std::fill_n(plan.bias.at(0), plan.bias_copies * a->dbias_size, 0.0f);
      plan.dbias = a->dbias;
      a->dbias.data = reinterpret_cast<char*>(plan.bias.at(0));
      a->dbias.dtype = DType::kFloat32;
    }
    most_members = std::max(most_members, members);
    plans.push_back(plan);
  }
  const Pool pool(std::move(plans));
  for (int64_t member = 0; member < most_members; ++member) {
    // A gradient of the queries that examples share is finished after the last one.
    auto finishes_queries = [&](const Plan& plan) {
      return member < plan.members && plan.a->wants_queries() && (!plan.a->dq_shared || member == plan.members - 1);
    };
    pool.run([&](const Plan& plan) { return member < plan.members ? plan.parts() : 0; },
             [&](const Plan& plan, int64_t i, int64_t worker) {
               const Part part = plan.part_at(member, i / plan.cut.key_parts, i % plan.cut.key_parts);
               float* state = plan.keep_states ? plan.states.at(i * plan.state_size) : pool.state(worker);
               float* key_state = plan.key_state_size > 0 ? plan.key_states.at(i * plan.key_state_size) : nullptr;
               if (member == 0 || !plan.a->dq_shared) std::fill_n(state, plan.state_size, 0.0f);
               std::fill_n(key_state, plan.key_state_size, 0.0f);
               kernels.backward(*plan.a, part, state, key_state, pool.space(worker));
               if (plan.a->wants_queries() && !plan.keep_states) kernels.finish_queries(*plan.a, part, state, 1, 0);
             });
    pool.run([&](const Plan& plan) { return plan.keep_states && finishes_queries(plan) ? plan.targets() : 0; },
             [&](const Plan& plan, int64_t target, int64_t) {
               float* states = plan.states.at(target * plan.cut.key_parts * plan.state_size);
               const Part part = plan.part_at(member, target, 0);
               kernels.finish_queries(*plan.a, part, states, plan.cut.key_parts, plan.state_size);
             });
    auto key_blocks = [&](const Plan& plan) {
      return member < plan.members && plan.key_state_size > 0 ? ceil_div(plan.a->keys, kBlockKeys) : 0;
    };
    pool.run([&](const Plan& plan) { return plan.groups * key_blocks(plan); },
             [&](const Plan& plan, int64_t i, int64_t worker) {
               const int64_t blocks = key_blocks(plan), target = i / blocks * plan.cut.row_parts;
               Part part = plan.part_at(member, target, 0);
               part.key_begin = i % blocks * kBlockKeys;
               part.key_end = std::min(part.key_begin + kBlockKeys, plan.a->keys);
               float* states = plan.key_states.at(target * plan.key_state_size);
               kernels.finish_keys(*plan.a, part, states, plan.cut.row_parts, plan.key_state_size, pool.space(worker));
             });
  }
  for (const Plan& plan : pool.plans())
    if (plan.bias_copies > 0)
      kernels.finish_bias(plan.dbias.data, plan.dbias.dtype, plan.bias.at(0), plan.bias_copies, plan.a->dbias_size);
}

namespace {

using OptionalTensor = std::optional<Tensor>;

// What depends on the lengths, once those are known.
void set_keys_in_memory(Attention& a) {
  a.all_keys = true;
  a.load_keys = attention_kernels().load_keys;
  a.key_space = kBlockKeys * (padded_row(a.qk_dim) + padded_row(a.v_dim));
}

PlainAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                        const OptionalTensor& bias, const OptionalTensor& bias_index, const OptionalTensor& seed,
                        double scale, double dropout_p) {
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
  if (bias.has_value() && bias->dim() == 3) {
    const int64_t groups = bias_index.has_value() ? bias->size(0) : a.batch;
    a.bias_width = bias->size(2);
    check_dtype(*bias, "bias", ScalarType::Float);
    check_shape(*bias, "bias", {groups, a.queries, a.bias_width});
    STD_TORCH_CHECK(a.bias_width >= 1 && bias->is_contiguous(), "bias has shape ", text_of_shape(*bias),
                    "; diagonal blocks must be contiguous and at least 1 wide");
    a.bias_blocks = floats(*bias);
    if (bias_index.has_value()) a.bias_index = group_index(*bias_index, "bias_index", a.batch, groups);
  } else if (bias.has_value()) {
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
  set_dropout(a, seed, dropout_p);
  set_keys_in_memory(a);
  return a;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor bias,
                                   OptionalTensor bias_index, OptionalTensor seed, double scale, double dropout_p) {
  PlainAttention a = describe(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p);
  Tensor out = allocate(q, {a.batch, a.heads, a.queries, a.v_dim});
  Tensor lse = allocate(q, {a.batch, a.heads, a.queries}, ScalarType::Float);
  a.out = strided(out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_forward({&a});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v,
                                                    Tensor out, Tensor lse, OptionalTensor key_mask,
                                                    OptionalTensor bias, OptionalTensor bias_index, OptionalTensor seed,
                                                    double scale, double dropout_p, int64_t wanted) {
  PlainAttention a = describe(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p);
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_dtype(*tensor, name, q.scalar_type());
    check_shape(*tensor, name, {a.batch, a.heads, a.queries, a.v_dim});
  }
  check_dtype(lse, "lse", ScalarType::Float);
  check_shape(lse, "lse", {a.batch, a.heads, a.queries});
  if (dlse.has_value()) {
    check_dtype(*dlse, "dlse", ScalarType::Float);
    check_shape(*dlse, "dlse", {a.batch, a.heads, a.queries});
    dlse = as_contiguous(*dlse);
    a.dlse = floats(*dlse);
  }
  lse = as_contiguous(lse);
  a.lse = const_cast<float*>(floats(lse));
  a.out = strided(out), a.dout = strided(dout);

  const bool wants_bias = (wanted & 4) != 0 && bias.has_value();
  auto gradient = [&](const Tensor& t, bool want) { return want ? allocate(t, t.sizes()) : allocate(t, {0}); };
  Tensor dq = gradient(q, wanted & 1), dk = gradient(k, wanted & 2), dv = gradient(v, wanted & 2);
  Tensor dbias = bias.has_value() ? gradient(*bias, wants_bias) : allocate(q, {0});
  if (wanted & 1) a.dq = strided(dq);
  if (wanted & 2) {
    a.store_key_gradients = attention_kernels().store_key_gradients;
    a.dk = strided(dk), a.dv = strided(dv);
  }
  Space blocks;
  if (wants_bias && a.bias_blocks != nullptr) {
    const int64_t size = a.batch * a.heads * a.queries * a.bias_width;
    blocks = Space(size);
    a.dbias_blocks = blocks.at(0);
    std::fill_n(a.dbias_blocks, size, 0.0f);
  } else if (wants_bias) {
    STD_TORCH_CHECK(bias->size(3) == a.keys, "bias has shape ", text_of_shape(*bias),
                    "; dbias may be wanted where its last size is ", a.keys);
    torch::stable::zero_(dbias);
    a.dbias = strided(dbias, true);
    a.dbias_size = dbias.numel();
    a.summed_over_batch = bias->size(0) < a.batch;
    a.summed_over_heads = bias->size(1) < a.heads;
    a.dbias_direct = dbias.numel() == a.batch * a.heads * a.queries * a.keys;
  }
  attention_backward({&a});
  if (wants_bias && a.bias_blocks != nullptr) {
    const int64_t size = a.queries * a.bias_width, parts = a.batch == 0 ? 0 : a.heads;
    add_parts(static_cast<float*>(dbias.mutable_data_ptr()), a.dbias_blocks, bias->size(0), parts, size, size,
              threads_for(2.0 * a.batch * a.heads * size), a.bias_index, a.batch);
  }
  return {dq, dk, dv, dbias};
}

// --- Lists of problems ---------------------------------------------------------------------------------------------

using Tensors = std::vector<Tensor>;

// A slot of (B,T,S,H,W) as (B,H,T,W).
Strided slot_of(const Tensor& t, int64_t slot) {
  Strided s{static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype_of(t)};
  if (s.data != nullptr) s.data += slot * t.stride(2) * s.item_bytes();
  s.stride[0] = t.stride(0), s.stride[1] = t.stride(3), s.stride[2] = t.stride(1), s.stride[3] = t.stride(4);
  return s;
}

// The rows of one or two segments; of gradients, `wanted` says which.
Joined join(const Segment (&segments)[2], const Tensors& tensors, const std::vector<int64_t>* wanted = nullptr) {
  Joined joined;
  for (int64_t i = 0; i < 2; ++i)
    if (segments[i].present() && (wanted == nullptr || (*wanted)[segments[i].tensor] != 0))
      joined.part[i] = slot_of(tensors[segments[i].tensor], segments[i].slot);
  joined.boundary = segments[0].rows;
  return joined;
}

// The next tensors (B,T,H,E) of a list, for each segment of queries.
Joined join_rows(const Segment (&queries)[2], const Tensors& tensors, int64_t& next) {
  Joined joined;
  for (int64_t i = 0; i < 2; ++i) {
    if (!queries[i].present()) continue;
    const Strided s = strided(tensors[next++]);
    joined.part[i] = {s.data, s.dtype, {s.stride[0], s.stride[2], s.stride[1], s.stride[3]}};
  }
  joined.boundary = queries[0].rows;
  return joined;
}

std::vector<PlainAttention> describe(const AttentionList& list, const Tensors& tensors, const Tensors& key_masks,
                                     const OptionalTensor& seed, double scale, double dropout_p) {
  const ScalarType dtype = check_first(tensors[0], "tensors[0]", 5);
  for (const Tensor& t : tensors) check_dtype(t, "one of tensors", dtype);
  for (const Tensor& mask : key_masks) check_dtype(mask, "one of key_masks", ScalarType::Bool);
  std::vector<PlainAttention> problems;
  for (const ListedProblem& listed : list.problems) {
    PlainAttention& a = problems.emplace_back();
    a.batch = list.batch, a.heads = list.heads, a.qk_dim = list.qk_dim, a.v_dim = list.v_dim;
    a.queries = listed.queries(), a.keys = listed.keys();
    a.scale = static_cast<float>(scale);
    a.q = join(listed.q, tensors), a.k = join(listed.k, tensors), a.v = join(listed.v, tensors);
    for (int64_t i = 0; i < 2; ++i)
      if (listed.mask[i] >= 0) a.key_mask.part[i] = strided(key_masks[listed.mask[i]]);
    a.key_mask.boundary = listed.k[0].rows;
    set_dropout(a, seed, dropout_p);
    a.seed += static_cast<uint64_t>(problems.size() - 1) * kSeedStep;
    set_keys_in_memory(a);
  }
  return problems;
}

std::tuple<Tensors, Tensors> list_forward(Tensors tensors, std::vector<int64_t> problems, Tensors key_masks,
                                          OptionalTensor seed, double scale, double dropout_p) {
  const AttentionList list = read_list(tensors, problems, key_masks);
  std::vector<PlainAttention> described = describe(list, tensors, key_masks, seed, scale, dropout_p);
  Tensors outs, lses;
  std::vector<const Attention*> attentions;
  for (size_t p = 0; p < described.size(); ++p) {
    PlainAttention& a = described[p];
    int64_t next = static_cast<int64_t>(outs.size());
    for (const Segment& segment : list.problems[p].q)
      if (segment.present()) outs.push_back(allocate(tensors[0], {a.batch, segment.rows, a.heads, a.v_dim}));
    a.out = join_rows(list.problems[p].q, outs, next);
    lses.push_back(allocate(tensors[0], {a.batch, a.heads, a.queries}, ScalarType::Float));
    a.lse = static_cast<float*>(lses.back().mutable_data_ptr());
    attentions.push_back(&a);
  }
  attention_forward(attentions);
  return {outs, lses};
}

Tensors list_backward(Tensors dout, Tensors dlse, Tensors tensors, std::vector<int64_t> problems, Tensors key_masks,
                      Tensors out, Tensors lse, OptionalTensor seed, double scale, double dropout_p,
                      std::vector<int64_t> wanted) {
  const AttentionList list = read_list(tensors, problems, key_masks);
  std::vector<PlainAttention> described = describe(list, tensors, key_masks, seed, scale, dropout_p);
  int64_t segments = 0;
  for (const ListedProblem& listed : list.problems) segments += listed.q[1].present() ? 2 : 1;
  auto check_count = [](size_t given, const char* name, size_t right) {
    STD_TORCH_CHECK(given == right, name, " has ", given, " elements; it must have ", right);
  };
  check_count(dout.size(), "dout", segments);
  check_count(out.size(), "out", segments);
  check_count(lse.size(), "lse", described.size());
  if (!dlse.empty()) check_count(dlse.size(), "dlse", described.size());
  check_count(wanted.size(), "wanted", tensors.size());

  Tensors gradients;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    gradients.push_back(wanted[i] != 0 ? allocate(t, t.sizes()) : allocate(t, {0}));
    if (wanted[i] != 0 && !list.covered[i]) torch::stable::zero_(gradients[i]);
  }
  std::vector<Attention*> attentions;
  int64_t next = 0;
  for (size_t p = 0; p < described.size(); ++p) {
    const ListedProblem& listed = list.problems[p];
    PlainAttention& a = described[p];
    int64_t at = next;
    for (const Segment& segment : listed.q) {
      if (!segment.present()) continue;
      for (const auto& [list_of, name] : {std::pair{&dout, "one of dout"}, {&out, "one of out"}}) {
        check_dtype((*list_of)[at], name, tensors[0].scalar_type());
        check_shape((*list_of)[at], name, {a.batch, segment.rows, a.heads, a.v_dim});
      }
      ++at;
    }
    at = next;
    a.dout = join_rows(listed.q, dout, at);
    a.out = join_rows(listed.q, out, next);
    for (const auto& [list_of, name] : {std::pair{&lse, "one of lse"}, {&dlse, "one of dlse"}}) {
      if (list_of->empty()) continue;
      check_dtype((*list_of)[p], name, ScalarType::Float);
      check_shape((*list_of)[p], name, {a.batch, a.heads, a.queries});
      (*list_of)[p] = as_contiguous((*list_of)[p]);
    }
    a.lse = const_cast<float*>(floats(lse[p]));
    if (!dlse.empty()) a.dlse = floats(dlse[p]);
    a.dq = join(listed.q, gradients, &wanted);
    a.dk = join(listed.k, gradients, &wanted), a.dv = join(listed.v, gradients, &wanted);
    if (a.dk.given() || a.dv.given()) a.store_key_gradients = attention_kernels().store_key_gradients;
    if (a.dq.given() || a.store_key_gradients != nullptr) attentions.push_back(&a);
  }
  attention_backward(attentions);
  return gradients;
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&mmk::forward));
  m.impl("attention_bwd", TORCH_BOX(&mmk::backward));
  m.impl("attention_list_fwd", TORCH_BOX(&mmk::list_forward));
  m.impl("attention_list_bwd", TORCH_BOX(&mmk::list_backward));
}
