// The registered ops of the attention family on CUDA tensors: checks, allocation, geometry of every pass, launches.
#include "attention/attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cuda_binding.h"
#include "common/waves.h"

namespace mmk::attention {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    default:
      STD_TORCH_CHECK(false, "q has dtype ", dtype_name(q.scalar_type()), "; it must be Float, BFloat16 or Half");
  }
}

int element_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

void check_like(const Tensor& t, const char* name, const Tensor& q, ScalarType type) {
  STD_TORCH_CHECK(t.get_device_index() == q.get_device_index() && t.is_cuda() == q.is_cuda(), name,
                  " is on another device than q; it must be on the same");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", dtype_name(t.scalar_type()), "; it must be ",
                  dtype_name(type));
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, bool broadcast = false) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has ", t.dim(), " dimensions; it must have ",
                  shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(i) == size || (broadcast && t.size(i) == 1), name, " has size ", t.size(i), " in dimension ",
                    i, "; it must be ", size, broadcast ? " or 1" : "");
    ++i;
  }
}

// The widest copy that every row's address allows.
Matrix matrix_of(const Tensor& t, int size, bool is_keys) {
  Matrix m;
  m.data = t.const_data_ptr();
  m.batch = t.size(0) > 1 ? t.stride(0) : 0;
  m.head = t.size(1) > 1 ? t.stride(1) : 0;
  m.row = t.size(2) > 1 ? t.stride(2) : 0;
  m.is_keys = is_keys;
  const uint64_t address =
      reinterpret_cast<uint64_t>(m.data) | static_cast<uint64_t>((m.batch | m.head | m.row) * size);
  m.copy_bytes = 16;
  while (m.copy_bytes > size && address % m.copy_bytes != 0) m.copy_bytes /= 2;
  return m;
}

// What all passes of one call share, and the tensors that live behind its pointers.
struct Call {
  Dtype dtype;
  int size;
  Tensor q, k, v;
  std::optional<Tensor> bias;
  Matrix q_matrix, k_matrix, v_matrix;
  Pass common{};

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& key_mask,
       const std::optional<Tensor>& bias_in, const std::optional<Tensor>& seed, double scale, double dropout_p)
      : dtype(dtype_of(q_in)),
        size(element_size(dtype)),
        q(unit_last_stride(q_in)),
        k(unit_last_stride(k_in)),
        v(unit_last_stride(v_in)),
        bias(bias_in) {
    STD_TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dimensions; it must have 4: (B, H, N, D)");
    check_like(k, "k", q, q.scalar_type());
    check_like(v, "v", q, q.scalar_type());
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v have ", k.dim(), " and ", v.dim(),
                    " dimensions; it must be 4");
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
    check_shape(k, "k", {batch, heads, keys, q.size(3)});
    check_shape(v, "v", {batch, heads, keys, v.size(3)});
    for (const Tensor* t : {&q, &v}) {
      STD_TORCH_CHECK(t->size(3) >= 1 && t->size(3) <= 1024, t == &q ? "q" : "v", " has head dim ", t->size(3),
                      "; it must be 1 to 1024");
    }
    STD_TORCH_CHECK(queries < (1 << 30) && keys < (1 << 30), "q and k have ", queries, " and ", keys,
                    " rows; it must be less than 2**30");
    q_matrix = matrix_of(q, size, false);
    k_matrix = matrix_of(k, size, true);
    v_matrix = matrix_of(v, size, true);

    common.batch = batch;
    common.heads = heads;
    common.queries = static_cast<int>(queries);
    common.keys = static_cast<int>(keys);
    common.scale = static_cast<float>(scale);
    common.keep_scale = common.out_scale = 1.0f;
    if (key_mask) {
      check_like(*key_mask, "key_mask", q, ScalarType::Bool);
      check_shape(*key_mask, "key_mask", {batch, keys});
      common.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
      common.mask_batch = key_mask->stride(0);
      common.mask_key = key_mask->stride(1);
    }
    if (bias) {
      check_like(*bias, "bias", q, bias->scalar_type() == ScalarType::Float ? ScalarType::Float : q.scalar_type());
      check_shape(*bias, "bias", {batch, heads, queries, keys}, true);
      common.bias = bias->const_data_ptr();
      common.bias_is_fp32 = bias->scalar_type() == ScalarType::Float;
      for (int i = 0; i < 4; ++i) {
        common.bias_sizes[i] = bias->size(i);
        common.bias_strides[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
      }
    }
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    if (dropout_p > 0.0) {
      STD_TORCH_CHECK(seed.has_value(), "seed is None; with dropout_p ", dropout_p, " it must be a tensor");
      check_like(*seed, "seed", q, ScalarType::Long);
      check_shape(*seed, "seed", {1});
      common.seed = static_cast<const int64_t*>(seed->const_data_ptr());
      common.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
      common.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  int64_t matrices() const { return common.batch * common.heads; }
};

// Chooses tiles, splits and shared memory of a pass whose matrices and sizes are set.
void plan(Pass& p, Dtype dtype, Mode mode) {
  constexpr int kRowBytes = 144, kChunkBytes = 128;  // as in common/tile.cuh
  constexpr int kRoom = 160 * 1024;                  // shared memory of a block, on the smallest of the devices
  const int size = element_size(dtype), widest = dtype == Dtype::fp32 ? 16 : 33;

  p.value_tiles = 1;
  p.blocks_of_8 = 8;
  if (mode != Mode::bias) {
    p.value_tiles = static_cast<int>(ceil_div(p.width, widest * 8));
    p.tile_width = static_cast<int>(ceil_div(ceil_div(p.width, p.value_tiles), 8) * 8);
    while (p.blocks_of_8 * 8 < p.tile_width) p.blocks_of_8 = p.blocks_of_8 == 8 ? 16 : 33;
  }
  const int columns = column_tile(mode, p.blocks_of_8, size);
  const int chunks = static_cast<int>(ceil_div(p.a_dim * size, kChunkBytes) + ceil_div(p.b_dim * size, kChunkBytes));
  auto resident_bytes = [&] { return (chunks * 16 * p.warps + kStages * columns) * kRowBytes; };

  p.warps = 1;
  const int most = max_warps(mode);
  while (p.warps < most && 16 * p.warps < p.rows) p.warps *= 2;
  if (p.warps == 8 && resident_bytes() > kRoom) p.warps = 4;
  p.resident = mode != Mode::bias && resident_bytes() <= kRoom;
  if (!p.resident) p.warps = std::min(most, 16 * 4 < p.rows ? 8 : p.warps);
  p.shared_bytes = p.resident ? resident_bytes() : kStages * (columns + 16 * p.warps) * kRowBytes;

  p.row_tiles = static_cast<int>(ceil_div(p.rows, 16 * p.warps));
  p.column_tiles = static_cast<int>(ceil_div(p.columns, columns));
  int64_t pieces = p.batch * p.heads * p.row_tiles * p.value_tiles;
  p.items = p.column_tiles;
  if (mode == Mode::bias) {
    p.shared_bytes = std::max(p.shared_bytes, 16 * p.warps * (columns + 1) * 4);
    pieces = p.items = 1;
    const int64_t full[4] = {p.batch, p.heads, p.row_tiles, p.column_tiles};
    for (int i = 0; i < 4; ++i) (i < 3 && p.bias_sizes[i] == 1 ? p.items : pieces) *= full[i];
  }
  // The registers of a multiprocessor hold 8 warps of these kernels.
  const int fit = std::max(1, std::min(8 / p.warps, kRoom / p.shared_bytes));
  const int64_t slots = std::max(1, mmk_multiprocessors()) * static_cast<int64_t>(fit);
  p.splits = split_keys(std::max<int64_t>(pieces, 1), std::max<int64_t>(p.items, 1), slots);
  p.items_per_split = ceil_div(p.items, p.splits);
  STD_TORCH_CHECK(pieces * p.splits < (int64_t{1} << 31), "attention: the problem needs ", pieces * p.splits,
                  " thread blocks; a launch has at most 2**31 - 1");
}

Pass pass_over_keys(const Call& c) {
  Pass p = c.common;
  p.rows = p.queries;
  p.columns = p.keys;
  p.rows_a = c.q_matrix;
  p.columns_a = c.k_matrix;
  p.a_dim = static_cast<int>(c.q.size(3));
  return p;
}

Pass pass_over_queries(const Call& c) {
  Pass p = c.common;
  p.rows_are_keys = true;
  p.rows = p.keys;
  p.columns = p.queries;
  p.rows_a = c.k_matrix;
  p.columns_a = c.q_matrix;
  p.a_dim = static_cast<int>(c.q.size(3));
  return p;
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_mask, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& seed, double scale, double dropout_p) {
  const OnDevice device(q);
  const Call call(q, k, v, key_mask, bias, seed, scale, dropout_p);
  Pass p = pass_over_keys(call);
  p.values = call.v_matrix;
  p.width = static_cast<int>(call.v.size(3));
  p.out_scale = p.keep_scale;
  Tensor out = empty(q, {p.batch, p.heads, p.queries, p.width}, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  plan(p, call.dtype, Mode::forward);
  p.out = out.mutable_data_ptr();
  p.lse = floats(lse);
  const int64_t rows = lse.numel();
  const int64_t partial = p.splits > 1 ? p.splits * rows : 0;
  const Tensor workspace = empty(q, {partial * (p.width + 1)}, ScalarType::Float);
  p.partial = floats(workspace);
  p.partial_lse = p.partial + partial * p.width;
  check_launch(mmk_attention_pass(call.dtype, Mode::forward, &p, device.stream), "attention_fwd");
  if (p.splits > 1) {
    check_launch(
        mmk_attention_merge(call.dtype, p.partial, p.partial_lse, p.splits, rows, p.width, p.out, p.lse, device.stream),
        "attention_fwd");
  }
  return {out, lse};
}

// Runs one backward pass into `out`, by way of partial sums where the walk is split.
void run_backward(const Call& call, Mode mode, Pass& p, const Tensor& out, const OnDevice& device) {
  if (out.numel() == 0) return;
  plan(p, call.dtype, mode);
  p.out = out.mutable_data_ptr();
  const int64_t partial = p.splits > 1 || mode == Mode::bias ? p.splits * out.numel() : 0;
  const Tensor workspace = empty(out, {partial}, ScalarType::Float);
  p.partial = floats(workspace);
  check_launch(mmk_attention_pass(call.dtype, mode, &p, device.stream), "attention_bwd");
  if (partial) {
    const Dtype dtype = out.scalar_type() == ScalarType::Float ? Dtype::fp32 : call.dtype;
    check_launch(mmk_attention_sum(dtype, p.partial, p.splits, out.numel(), p.out, device.stream), "attention_bwd");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout_in, const std::optional<Tensor>& dlse_in,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& out_in, const Tensor& lse_in,
                                                    const std::optional<Tensor>& key_mask,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& seed, double scale, double dropout_p,
                                                    int64_t wanted) {
  const OnDevice device(q);
  Call call(q, k, v, key_mask, bias, seed, scale, dropout_p);
  const int64_t batch = call.common.batch, heads = call.common.heads, queries = call.common.queries;
  const int64_t width = v.size(3);
  for (const Tensor* t : {&dout_in, &out_in}) {
    const char* name = t == &out_in ? "out" : "dout";
    check_like(*t, name, q, q.scalar_type());
    check_shape(*t, name, {batch, heads, queries, width});
  }
  check_like(lse_in, "lse", q, ScalarType::Float);
  check_shape(lse_in, "lse", {batch, heads, queries});
  const Tensor dout = unit_last_stride(dout_in), out = torch::stable::contiguous(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  std::optional<Tensor> dlse;
  if (dlse_in) {
    check_like(*dlse_in, "dlse", q, ScalarType::Float);
    check_shape(*dlse_in, "dlse", {batch, heads, queries});
    dlse = torch::stable::contiguous(*dlse_in);
  }
  auto gradient = [&](bool want, const Tensor& t) {
    return want ? empty(t, t.sizes(), t.scalar_type()) : empty(t, {0}, t.scalar_type());
  };
  const bool want_bias = wanted & 4 && bias;
  STD_TORCH_CHECK(!want_bias || bias->size(3) == k.size(2), "bias has size ", bias->size(3),
                  " in dimension 3; dbias may be wanted where it is ", k.size(2));
  Tensor dq = gradient(wanted & 1, q), dk = gradient(wanted & 2, k), dv = gradient(wanted & 2, v);
  Tensor dbias = bias ? gradient(want_bias, *bias) : empty(q, {0}, q.scalar_type());

  const Matrix dout_matrix = matrix_of(dout, call.size, false);
  const Tensor delta = empty(q, {batch, heads, queries}, ScalarType::Float);
  if (delta.numel()) {
    check_launch(mmk_attention_delta(call.dtype, &dout_matrix, out.const_data_ptr(), dlse ? floats(*dlse) : nullptr,
                                     batch, heads, queries, width, floats(delta), device.stream),
                 "attention_bwd");
  }
  call.common.lse = floats(lse);
  call.common.delta = floats(delta);

  Pass over_keys = pass_over_keys(call);
  over_keys.rows_b = dout_matrix;
  over_keys.columns_b = call.v_matrix;
  over_keys.b_dim = static_cast<int>(width);
  if (wanted & 1) {
    Pass p = over_keys;
    p.values = call.k_matrix;
    p.width = p.a_dim;
    p.out_scale = p.scale;
    run_backward(call, Mode::backward, p, dq, device);
  }
  if (wanted & 2) {
    Pass p = pass_over_queries(call);
    p.values = dout_matrix;
    p.width = static_cast<int>(width);
    p.out_scale = p.keep_scale;
    run_backward(call, Mode::backward, p, dv, device);

    p = pass_over_queries(call);
    p.rows_b = call.v_matrix;
    p.columns_b = dout_matrix;
    p.b_dim = static_cast<int>(width);
    p.values = call.q_matrix;
    p.width = p.a_dim;
    p.out_scale = p.scale;
    run_backward(call, Mode::backward, p, dk, device);
  }
  if (want_bias) run_backward(call, Mode::bias, over_keys, dbias, device);
  return {dq, dk, dv, dbias};
}

MMK_REGISTER_CUDA(m) {
  m.impl("attention_fwd", TORCH_BOX(&forward));
  m.impl("attention_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::attention
