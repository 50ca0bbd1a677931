// The registered ops of the attention family on CUDA tensors: checks, allocation, geometry of every pass, launches.
#include "attention/attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention_list.h"
#include "common/cuda_binding.h"
#include "common/rows_cuda.h"
#include "common/waves.h"

namespace mmk::attention {
namespace {

static_assert(kMaxProblems == mmk::kMaxProblems);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", dtype_name(t.scalar_type()), "; it must be Float, BFloat16 or Half");
  }
}

int element_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

void check_like(const Tensor& t, const std::string& name, const Tensor& first, ScalarType type) {
  STD_TORCH_CHECK(t.get_device_index() == first.get_device_index() && t.is_cuda() == first.is_cuda(), name,
                  " is on another device than the first tensor; it must be on the same");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", dtype_name(t.scalar_type()), "; it must be ",
                  dtype_name(type));
}

void check_shape(const Tensor& t, const std::string& name, std::initializer_list<int64_t> shape,
                 bool broadcast = false) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has ", t.dim(), " dimensions; it must have ",
                  shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(i) == size || (broadcast && t.size(i) == 1), name, " has size ", t.size(i), " in dimension ",
                    i, "; it must be ", size, broadcast ? " or 1" : "");
    ++i;
  }
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Where the heads and rows of a tensor are, apart from the batch, which is first, and the columns, which are last.
struct Layout {
  int64_t head_dim, row_dim;
};
constexpr Layout kHeadsFirst{1, 2};  // (B, H, rows, W)
constexpr Layout kRowsFirst{2, 1};   // (B, rows, H, W)
constexpr Layout kPacked{3, 1};      // (B, rows, slots, H, W)

Segment segment_of(const Tensor& t, Layout layout, int64_t slot = 0) {
  auto stride = [&](int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; };
  const int64_t first = slot ? slot * t.stride(2) * static_cast<int64_t>(t.element_size()) : 0;
  return {static_cast<const char*>(t.const_data_ptr()) + first, stride(0), stride(layout.head_dim),
          stride(layout.row_dim)};
}

// What all passes of one call share: `pass` has everything but the sides' order, the result and the geometry.
struct Call {
  Dtype dtype;
  Pass pass{};
  int qk_dim, v_dim;
  std::vector<Tensor> keep;  // copies that `pass` points into

  Call(const Tensor& first, const char* name, double scale, double dropout_p, const std::optional<Tensor>& seed)
      : dtype(dtype_of(first, name)) {
    for (auto& side : pass.copy_bytes) side[kA] = side[kB] = 16;
    pass.scale = static_cast<float>(scale);
    pass.keep_scale = 1.0f;
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    if (dropout_p > 0.0) {
      STD_TORCH_CHECK(seed.has_value(), "seed is None; with dropout_p ", dropout_p, " it must be a tensor");
      check_like(*seed, "seed", first, ScalarType::Long);
      check_shape(*seed, "seed", {1});
      pass.seed = static_cast<const int64_t*>(seed->const_data_ptr());
      pass.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
      pass.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  void set_sizes(int64_t batch, int64_t heads, int64_t qk_dim_in, int64_t v_dim_in) {
    pass.batch = batch;
    pass.heads = heads;
    for (int64_t dim : {qk_dim_in, v_dim_in}) {
      STD_TORCH_CHECK(dim >= 1 && dim <= 1024, "the head dim is ", dim, "; it must be 1 to 1024");
    }
    qk_dim = static_cast<int>(qk_dim_in);
    v_dim = static_cast<int>(v_dim_in);
  }

  Problem& add_problem() {
    Problem& p = pass.problem[pass.count++];
    p.boundary[kQueries] = p.boundary[kKeys] = kOneSegment;
    return p;
  }

  // Opens the next segment of a side and returns its index.
  int add_rows(Problem& p, Side side, int64_t rows) {
    const int i = p.length[side] > 0;
    if (i) p.boundary[side] = p.length[side];
    STD_TORCH_CHECK(p.length[side] + rows < (1 << 30), "a problem has ", p.length[side] + rows,
                    side == kQueries ? " queries" : " keys", "; it must be less than 2**30");
    p.length[side] += static_cast<int>(rows);
    return i;
  }

  void set(Problem& p, Side side, Role role, int i, const Segment& s) {
    p.matrix[side][role][i] = s;
    const int size = element_size(dtype);
    const uint64_t address =
        reinterpret_cast<uint64_t>(s.data) | static_cast<uint64_t>((s.batch | s.head | s.row) * size);
    int& bytes = pass.copy_bytes[side][role];
    while (bytes > size && address % bytes != 0) bytes /= 2;
  }

  const Tensor& kept(Tensor t) { return keep.emplace_back(std::move(t)); }

  Pass rows_from(Side side) const {
    Pass p = pass;
    p.row_side = side;
    p.a_dim = qk_dim;
    return p;
  }
};

KeyMask mask_of(const Tensor& t) { return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0), t.stride(1)}; }

// Chooses tiles, splits and shared memory of a pass whose matrices and sizes are set.
void plan(Pass& pass, Dtype dtype, Mode mode) {
  constexpr int kRowBytes = 144, kChunkBytes = 128;  // as in common/tile.cuh
  constexpr int kRoom = 160 * 1024;                  // shared memory of a block, on the smallest of the devices
  const int size = element_size(dtype), widest = dtype == Dtype::fp32 ? 16 : 33;

  pass.value_tiles = 1;
  pass.blocks_of_8 = 8;
  if (mode != Mode::bias) {
    pass.value_tiles = static_cast<int>(ceil_div(pass.width, widest * 8));
    pass.tile_width = static_cast<int>(ceil_div(ceil_div(pass.width, pass.value_tiles), 8) * 8);
    while (pass.blocks_of_8 * 8 < pass.tile_width) pass.blocks_of_8 = pass.blocks_of_8 == 8 ? 16 : 33;
  }
  const int columns = column_tile(mode, pass.blocks_of_8, size);
  const int chunks =
      static_cast<int>(ceil_div(pass.a_dim * size, kChunkBytes) + ceil_div(pass.b_dim * size, kChunkBytes));
  auto resident_bytes = [&] { return (chunks * 16 * pass.warps + kStages * columns) * kRowBytes; };

  // All problems have the warps that the tallest can use.
  int rows = 0;
  for (int i = 0; i < pass.count; ++i) rows = std::max(rows, pass.problem[i].length[pass.row_side]);
  pass.warps = 1;
  const int most = max_warps(mode);
  while (pass.warps < most && 16 * pass.warps < rows) pass.warps *= 2;
  if (pass.warps == 8 && resident_bytes() > kRoom) pass.warps = 4;
  pass.resident = mode != Mode::bias && resident_bytes() <= kRoom;
  if (!pass.resident) pass.warps = std::min(most, 16 * 4 < rows ? 8 : pass.warps);
  pass.shared_bytes = pass.resident ? resident_bytes() : kStages * (columns + 16 * pass.warps) * kRowBytes;
  if (mode == Mode::bias) pass.shared_bytes = std::max(pass.shared_bytes, 16 * pass.warps * (columns + 1) * 4);

  std::vector<int64_t> tiles(pass.count);  // walks of every problem before they are split
  int64_t longest = 1, steps = 0;
  for (int i = 0; i < pass.count; ++i) {
    Problem& p = pass.problem[i];
    p.row_tiles = static_cast<int>(ceil_div(p.length[pass.row_side], 16 * pass.warps));
    p.column_tiles = static_cast<int>(ceil_div(p.length[!pass.row_side], columns));
    tiles[i] = pass.batch * pass.heads * p.row_tiles * pass.value_tiles;
    p.items = p.column_tiles;
    if (mode == Mode::bias) {
      tiles[i] = p.items = 1;
      const int64_t full[4] = {pass.batch, pass.heads, p.row_tiles, p.column_tiles};
      for (int d = 0; d < 4; ++d) (d < 3 && pass.bias_sizes[d] == 1 ? p.items : tiles[i]) *= full[d];
    }
    longest = std::max(longest, p.items);
    steps += tiles[i] * p.items;
  }
  // The registers of a multiprocessor hold 8 warps of these kernels.
  const int fit = std::max(1, std::min(8 / pass.warps, kRoom / pass.shared_bytes));
  const int64_t slots = std::max(1, mmk_multiprocessors()) * static_cast<int64_t>(fit);
  // The model of waves knows one length of walks. It is told of as many of the longest one's length as make the work of
  // all, and no problem's pieces are then longer than those that it chooses.
  const int64_t piece = ceil_div(longest, split_keys(std::max<int64_t>(1, ceil_div(steps, longest)), longest, slots));
  int64_t pieces = 0;
  for (int i = 0; i < pass.count; ++i) {
    Problem& p = pass.problem[i];
    p.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(p.items, piece)));
    p.items_per_split = ceil_div(p.items, p.splits);
    pieces += tiles[i] * p.splits;
  }
  STD_TORCH_CHECK(pieces < (int64_t{1} << 31), "attention: the problems need ", pieces,
                  " thread blocks; a launch has at most 2**31 - 1");
  // Long walks first: short ones then fill what the last wave leaves free.
  std::stable_sort(pass.problem, pass.problem + pass.count,
                   [](const Problem& a, const Problem& b) { return a.items_per_split > b.items_per_split; });
}

// Drops the problems that have nothing to write.
template <class F>
void keep_problems(Pass& pass, F wanted) {
  Problem* end = std::remove_if(pass.problem, pass.problem + pass.count, [&](const Problem& p) { return !wanted(p); });
  pass.count = static_cast<int>(end - pass.problem);
}

// Runs a pass whose results are set, by way of partial ones where walks are split.
void run(Pass pass, Dtype dtype, Mode mode, const Tensor& like, const OnDevice& device) {
  const char* op = mode == Mode::forward ? "attention_fwd" : "attention_bwd";
  keep_problems(pass, [&](const Problem& p) {
    return pass.batch * pass.heads * p.length[pass.row_side] > 0 && (p.out[0].data || p.out[1].data);
  });
  if (pass.count == 0) return;
  plan(pass, dtype, mode);
  const int64_t lse_columns = mode == Mode::forward;
  int64_t space = 0;
  auto rows_of = [&](const Problem& p) {
    return p.splits == 1 ? 0 : p.splits * pass.batch * pass.heads * p.length[pass.row_side];
  };
  for (int i = 0; i < pass.count; ++i) space += rows_of(pass.problem[i]) * (pass.width + lse_columns);
  std::optional<Tensor> workspace;
  if (space) {
    workspace = empty(like, {space}, ScalarType::Float);
    float* at = floats(*workspace);
    for (int i = 0; i < pass.count; ++i) {
      Problem& p = pass.problem[i];
      p.partial = at;
      p.partial_lse = lse_columns ? at + rows_of(p) * pass.width : nullptr;
      at += rows_of(p) * (pass.width + lse_columns);
    }
  }
  check_launch(mmk_attention_pass(dtype, mode, &pass, device.stream), op);
  if (space) check_launch(mmk_attention_merge(dtype, &pass, device.stream), op);
}

// The gradient of the bias, which is always summed from partial ones.
void run_bias(Pass pass, Dtype dtype, const Tensor& dbias, const OnDevice& device) {
  if (dbias.numel() == 0) return;
  plan(pass, dtype, Mode::bias);
  Problem& p = pass.problem[0];
  const Tensor workspace = empty(dbias, {p.splits * dbias.numel()}, ScalarType::Float);
  p.partial = floats(workspace);
  check_launch(mmk_attention_pass(dtype, Mode::bias, &pass, device.stream), "attention_bwd");
  const Dtype out_dtype = dbias.scalar_type() == ScalarType::Float ? Dtype::fp32 : dtype;
  check_launch(
      mmk_attention_sum(out_dtype, p.partial, p.splits, dbias.numel(), dbias.mutable_data_ptr(), device.stream),
      "attention_bwd");
}

// Forward, with the problems' `lse` and `out` set.
void run_forward(const Call& call, const Tensor& like, const OnDevice& device) {
  Pass pass = call.rows_from(kQueries);
  pass.values = kB;
  pass.width = call.v_dim;
  pass.out_scale = pass.keep_scale;
  run(pass, call.dtype, Mode::forward, like, device);
}

// What the gradients of a call need of every query, with the problems' `lse`, `dlse`, dout and, as `out`, the forward's
// results set.
void run_delta(Call& call, const Tensor& like, const OnDevice& device) {
  Pass& pass = call.pass;
  auto queries = [&](const Problem& p) { return pass.batch * pass.heads * p.length[kQueries]; };
  auto masked_queries = [&](const Problem& p) { return p.key_mask[0].data || p.key_mask[1].data ? queries(p) : 0; };
  int64_t all = 0, masked = 0;
  for (int i = 0; i < pass.count; ++i) all += queries(pass.problem[i]), masked += masked_queries(pass.problem[i]);
  if (all == 0) return;
  float* delta = floats(call.kept(empty(like, {all}, ScalarType::Float)));
  uint8_t* answered = nullptr;
  if (masked) {
    answered = static_cast<uint8_t*>(call.kept(empty(like, {masked}, ScalarType::Byte)).mutable_data_ptr());
  }
  for (int i = 0; i < pass.count; ++i) {
    Problem& p = pass.problem[i];
    p.delta = delta;
    delta += queries(p);
    if (masked_queries(p)) p.answered = answered;
    answered += masked_queries(p);
  }
  Pass all_queries = call.rows_from(kQueries);
  all_queries.width = call.v_dim;
  check_launch(mmk_attention_delta(call.dtype, &all_queries, device.stream), "attention_bwd");
}

// The pass that makes the gradient of what is the `role` of a side: of q, k or v. Its results are to be set.
Pass gradient_of(const Call& call, Side side, Role role) {
  Pass pass = call.rows_from(side);
  pass.values = role;
  pass.b_dim = role == kA ? call.v_dim : 0;
  pass.width = role == kA ? call.qk_dim : call.v_dim;
  pass.out_scale = role == kA ? pass.scale : pass.keep_scale;
  for (int i = 0; i < pass.count; ++i) pass.problem[i].out[0] = pass.problem[i].out[1] = {};
  return pass;
}

// --- One problem of one segment ---

Call plain_call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_index,
                const std::optional<Tensor>& seed, double scale, double dropout_p) {
  Call call(q, "q", scale, dropout_p, seed);
  STD_TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dimensions; it must have 4: (B, H, N, D)");
  check_like(k, "k", q, q.scalar_type());
  check_like(v, "v", q, q.scalar_type());
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v have ", k.dim(), " and ", v.dim(),
                  " dimensions; it must be 4");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  check_shape(k, "k", {batch, heads, keys, q.size(3)});
  check_shape(v, "v", {batch, heads, keys, v.size(3)});
  call.set_sizes(batch, heads, q.size(3), v.size(3));
  Problem& p = call.add_problem();
  call.add_rows(p, kQueries, queries);
  call.add_rows(p, kKeys, keys);
  call.set(p, kQueries, kA, 0, segment_of(call.kept(unit_last_stride(q)), kHeadsFirst));
  call.set(p, kKeys, kA, 0, segment_of(call.kept(unit_last_stride(k)), kHeadsFirst));
  call.set(p, kKeys, kB, 0, segment_of(call.kept(unit_last_stride(v)), kHeadsFirst));
  if (key_mask) {
    check_like(*key_mask, "key_mask", q, ScalarType::Bool);
    check_shape(*key_mask, "key_mask", {batch, keys});
    p.key_mask[0] = mask_of(*key_mask);
  }
  if (bias && bias->dim() == 3) {
    const int64_t width = bias->size(2);
    check_like(*bias, "bias", q, ScalarType::Float);
    check_shape(*bias, "bias", {bias_index ? bias->size(0) : batch, queries, width});
    STD_TORCH_CHECK(width >= 1 && width < (1 << 30) && bias->is_contiguous(), "bias has blocks ", width,
                    " wide; they must be contiguous and 1 to 2**30 - 1 wide");
    call.pass.bias_blocks = static_cast<const float*>(bias->const_data_ptr());
    call.pass.bias_width = static_cast<int>(width);
    if (bias_index) {
      check_like(*bias_index, "bias_index", q, ScalarType::Long);
      check_shape(*bias_index, "bias_index", {batch});
      STD_TORCH_CHECK(bias_index->is_contiguous(), "bias_index is not contiguous; it must be");
      call.pass.bias_index = static_cast<const int64_t*>(bias_index->const_data_ptr());
    }
  } else if (bias) {
    check_like(*bias, "bias", q, bias->scalar_type() == ScalarType::Float ? ScalarType::Float : q.scalar_type());
    check_shape(*bias, "bias", {batch, heads, queries, keys}, true);
    call.pass.bias = bias->const_data_ptr();
    call.pass.bias_is_fp32 = bias->scalar_type() == ScalarType::Float;
    for (int i = 0; i < 4; ++i) {
      call.pass.bias_sizes[i] = bias->size(i);
      call.pass.bias_strides[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
  }
  return call;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& bias_index, const std::optional<Tensor>& seed,
                                   double scale, double dropout_p) {
  const OnDevice device(q);
  Call call = plain_call(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p);
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  call.pass.problem[0].out[0] = segment_of(out, kHeadsFirst);
  call.pass.problem[0].lse = floats(lse);
  run_forward(call, q, device);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bias_index, const std::optional<Tensor>& seed, double scale, double dropout_p,
    int64_t wanted) {
  const OnDevice device(q);
  Call call = plain_call(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p);
  Problem& p = call.pass.problem[0];
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  for (const Tensor* t : {&dout, &out}) {
    const char* name = t == &out ? "out" : "dout";
    check_like(*t, name, q, q.scalar_type());
    check_shape(*t, name, {batch, heads, queries, v.size(3)});
  }
  call.set(p, kQueries, kB, 0, segment_of(call.kept(unit_last_stride(dout)), kHeadsFirst));
  p.out[0] = segment_of(call.kept(unit_last_stride(out)), kHeadsFirst);
  auto statistics = [&](const Tensor& t, const char* name) {
    check_like(t, name, q, ScalarType::Float);
    check_shape(t, name, {batch, heads, queries});
    return floats(call.kept(torch::stable::contiguous(t)));
  };
  p.lse = statistics(lse, "lse");
  if (dlse) p.dlse = statistics(*dlse, "dlse");
  auto gradient = [&](bool want, const Tensor& t) {
    return want ? empty(t, t.sizes(), t.scalar_type()) : empty(t, {0}, t.scalar_type());
  };
  const bool want_bias = wanted & 4 && bias, want_blocks = want_bias && call.pass.bias_blocks;
  STD_TORCH_CHECK(!want_bias || want_blocks || bias->size(3) == k.size(2), "bias has size ", bias->size(3),
                  " in dimension 3; dbias may be wanted where it is ", k.size(2));
  Tensor dq = gradient(wanted & 1, q), dk = gradient(wanted & 2, k), dv = gradient(wanted & 2, v);
  Tensor dbias = bias ? gradient(want_bias, *bias) : empty(q, {0}, q.scalar_type());

  run_delta(call, q, device);
  auto run_gradient = [&](Side side, Role role, const Tensor& t) {
    Pass pass = gradient_of(call, side, role);
    pass.problem[0].out[0] = segment_of(t, kHeadsFirst);
    run(pass, call.dtype, Mode::backward, q, device);
  };
  std::optional<Tensor> blocks;
  if (want_blocks) {
    const int64_t width = bias->size(2), keys = k.size(2);
    const bool beyond = ceil_div(queries, width) * width > keys;  // blocks are cut off there, and nobody writes
    const std::vector<int64_t> sizes{batch, heads, queries, width};
    blocks = beyond ? torch::stable::new_zeros(q, sizes, ScalarType::Float) : empty(q, sizes, ScalarType::Float);
    call.pass.dbias_blocks = floats(*blocks);
    run_gradient(kQueries, kA, wanted & 1 ? dq : empty(q, q.sizes(), q.scalar_type()));
    call.pass.dbias_blocks = nullptr;
    if (dbias.numel() > 0)
      check_launch(mmk_sum_rows(floats(*blocks), floats(dbias), bias->size(0), batch ? heads : 0, queries * width,
                                call.pass.bias_index, batch, device.stream),
                   "attention_bwd");
  } else if (wanted & 1) {
    run_gradient(kQueries, kA, dq);
  }
  if (wanted & 2) run_gradient(kKeys, kB, dv);
  if (wanted & 2) run_gradient(kKeys, kA, dk);
  if (want_bias && !want_blocks) run_bias(gradient_of(call, kQueries, kA), call.dtype, dbias, device);
  return {dq, dk, dv, dbias};
}

// --- Lists ---

std::string name_of(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

// Segments without rows are left out: of two there is something in both.
template <class F>
void for_rows(const mmk::Segment (&segments)[2], F use) {
  for (int i = 0; i < 2; ++i) {
    if (segments[i].rows > 0) use(i);
  }
}

Call list_call(const AttentionList& list, const std::vector<Tensor>& tensors, const std::vector<Tensor>& key_masks,
               const std::optional<Tensor>& seed, double scale, double dropout_p) {
  Call call(tensors[0], "tensors[0]", scale, dropout_p, seed);
  call.set_sizes(list.batch, list.heads, list.qk_dim, list.v_dim);
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_like(tensors[i], name_of("tensors", i), tensors[0], tensors[0].scalar_type());
    call.kept(unit_last_stride(tensors[i]));
  }
  for (size_t i = 0; i < key_masks.size(); ++i) {
    check_like(key_masks[i], name_of("key_masks", i), tensors[0], ScalarType::Bool);
  }
  auto packed = [&](const mmk::Segment& s) { return segment_of(call.keep[s.tensor], kPacked, s.slot); };
  for (const ListedProblem& listed : list.problems) {
    Problem& p = call.add_problem();
    p.seed_offset = static_cast<uint64_t>(call.pass.count - 1) * kSeedStep;
    for_rows(listed.q, [&](int i) {
      call.set(p, kQueries, kA, call.add_rows(p, kQueries, listed.q[i].rows), packed(listed.q[i]));
    });
    for_rows(listed.k, [&](int i) {
      const int at = call.add_rows(p, kKeys, listed.k[i].rows);
      call.set(p, kKeys, kA, at, packed(listed.k[i]));
      call.set(p, kKeys, kB, at, packed(listed.v[i]));
      if (listed.mask[i] >= 0) p.key_mask[at] = mask_of(key_masks[listed.mask[i]]);
    });
  }
  return call;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> list_forward(const std::vector<Tensor>& tensors,
                                                                  const std::vector<int64_t>& problems,
                                                                  const std::vector<Tensor>& key_masks,
                                                                  const std::optional<Tensor>& seed, double scale,
                                                                  double dropout_p) {
  const AttentionList list = read_list(tensors, problems, key_masks);
  const OnDevice device(tensors[0]);
  Call call = list_call(list, tensors, key_masks, seed, scale, dropout_p);
  std::vector<Tensor> out, lse;
  for (size_t i = 0; i < list.problems.size(); ++i) {
    const ListedProblem& listed = list.problems[i];
    Problem& p = call.pass.problem[i];
    int at = 0;
    for (const mmk::Segment& s : listed.q) {
      if (!s.present()) continue;
      out.push_back(empty(tensors[0], {list.batch, s.rows, list.heads, list.v_dim}, tensors[0].scalar_type()));
      if (s.rows > 0) p.out[at++] = segment_of(out.back(), kRowsFirst);
    }
    lse.push_back(empty(tensors[0], {list.batch, list.heads, listed.queries()}, ScalarType::Float));
    p.lse = floats(lse.back());
  }
  run_forward(call, tensors[0], device);
  return {out, lse};
}

std::vector<Tensor> list_backward(const std::vector<Tensor>& dout, const std::vector<Tensor>& dlse,
                                  const std::vector<Tensor>& tensors, const std::vector<int64_t>& problems,
                                  const std::vector<Tensor>& key_masks, const std::vector<Tensor>& out,
                                  const std::vector<Tensor>& lse, const std::optional<Tensor>& seed, double scale,
                                  double dropout_p, const std::vector<int64_t>& wanted) {
  const AttentionList list = read_list(tensors, problems, key_masks);
  const OnDevice device(tensors[0]);
  Call call = list_call(list, tensors, key_masks, seed, scale, dropout_p);
  const size_t count = list.problems.size();
  size_t results = 0;
  for (const ListedProblem& listed : list.problems) results += listed.q[0].present() + listed.q[1].present();
  auto check_count = [](const char* name, size_t given, size_t wanted_count) {
    STD_TORCH_CHECK(given == wanted_count, name, " has ", given, " entries; it must have ", wanted_count);
  };
  check_count("dout", dout.size(), results);
  check_count("out", out.size(), results);
  check_count("lse", lse.size(), count);
  if (!dlse.empty()) check_count("dlse", dlse.size(), count);
  check_count("wanted", wanted.size(), tensors.size());

  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    const ListedProblem& listed = list.problems[i];
    Problem& p = call.pass.problem[i];
    int at = 0;
    for (const mmk::Segment& s : listed.q) {
      if (!s.present()) continue;
      auto rows_of = [&](const Tensor& t, const char* name) {
        check_like(t, name_of(name, next), tensors[0], tensors[0].scalar_type());
        check_shape(t, name_of(name, next), {list.batch, s.rows, list.heads, list.v_dim});
        return segment_of(call.kept(unit_last_stride(t)), kRowsFirst);
      };
      const Segment gradient = rows_of(dout[next], "dout"), result = rows_of(out[next], "out");
      if (s.rows > 0) {
        call.set(p, kQueries, kB, at, gradient);
        p.out[at++] = result;
      }
      ++next;
    }
    auto statistics = [&](const Tensor& t, const char* name) {
      check_like(t, name_of(name, i), tensors[0], ScalarType::Float);
      check_shape(t, name_of(name, i), {list.batch, list.heads, listed.queries()});
      return floats(call.kept(torch::stable::contiguous(t)));
    };
    p.lse = statistics(lse[i], "lse");
    if (!dlse.empty()) p.dlse = statistics(dlse[i], "dlse");
  }
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    gradients.push_back(!wanted[i]        ? empty(t, {0}, t.scalar_type())
                        : list.covered[i] ? empty(t, t.sizes(), t.scalar_type())
                                          : torch::stable::new_zeros(t, t.sizes()));
  }

  run_delta(call, tensors[0], device);
  auto run_gradient = [&](Side side, Role role, mmk::Segment(ListedProblem::* segments)[2]) {
    Pass pass = gradient_of(call, side, role);
    for (size_t i = 0; i < count; ++i) {
      const auto& listed = list.problems[i].*segments;
      int at = 0;
      for_rows(listed, [&](int s) {
        const int64_t tensor = listed[s].tensor;
        Segment& to = pass.problem[i].out[at++];
        if (wanted[tensor]) to = segment_of(gradients[tensor], kPacked, listed[s].slot);
      });
    }
    run(pass, call.dtype, Mode::backward, tensors[0], device);
  };
  run_gradient(kQueries, kA, &ListedProblem::q);
  run_gradient(kKeys, kB, &ListedProblem::v);
  run_gradient(kKeys, kA, &ListedProblem::k);
  return gradients;
}

MMK_REGISTER_CUDA(m) {
  m.impl("attention_fwd", TORCH_BOX(&forward));
  m.impl("attention_bwd", TORCH_BOX(&backward));
  m.impl("attention_list_fwd", TORCH_BOX(&list_forward));
  m.impl("attention_list_bwd", TORCH_BOX(&list_backward));
}

}  // namespace
}  // namespace mmk::attention
