// The registered ops of the adapter family on CUDA tensors: checks, allocation, launches. Schemas: csrc/schemas.h.
#include "adapter/adapter_cuda.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/rows_binding.h"

namespace mmk::adapter {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostBottleneck = 1024;  // what fits shared memory, also on sm_80 in float32
// Rows of an example from which on its own parts cost less than finding an order of all rows.
constexpr int64_t kLongExample = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* p) { return reinterpret_cast<uint64_t>(p) % 16 == 0; }

// The arguments that both directions have, checked and made dense where the kernels want that. Holds what it has
// copied.
struct Call {
  Dtype dtype;
  ScalarType type;
  Adapter d{};
  int64_t batch, items = 0;
  std::vector<int64_t> bank;  // (A) or ()
  std::vector<Tensor> held;
  OptionalTensor scale, gate;

  Call(const Tensor& x, const OptionalTensor& input_residual, const OptionalTensor& residual, const Tensor& w_down,
       const OptionalTensor& b_down, const Tensor& w_up, const OptionalTensor& b_up, const OptionalTensor& norm_weight,
       const OptionalTensor& norm_bias, const OptionalTensor& out_weight, const OptionalTensor& out_bias,
       const OptionalTensor& scale_, const OptionalTensor& gate_, const OptionalTensor& index,
       const OptionalTensor& seed, int64_t skip, int64_t activation, double eps, double out_eps, double factor,
       double dropout_p)
      : dtype(row_dtype(x, "x")), type(x.scalar_type()), scale(scale_), gate(gate_) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) >= 1 && x.size(2) < INT32_MAX / 8, "x has shape ", shape_text(x.sizes()),
                    "; it must be (B, T, C) with C of 1 to 2^28");
    batch = x.size(0), d.length = x.size(1), d.channels = static_cast<int>(x.size(2)), d.rows = batch * d.length;
    STD_TORCH_CHECK(w_down.dim() == 2 || w_down.dim() == 3, "w_down has shape ", shape_text(w_down.sizes()),
                    "; it must have 2 or 3 dimensions");
    const int64_t c = d.channels, r = w_down.size(-2);
    STD_TORCH_CHECK(r >= 1 && r <= kMostBottleneck, "w_down has shape ", shape_text(w_down.sizes()),
                    "; its bottleneck must be 1 to ", kMostBottleneck);
    d.bottleneck = static_cast<int>(r), d.adapters = 1;
    if (w_down.dim() == 3) {
      bank = {w_down.size(0)};
      STD_TORCH_CHECK(bank[0] >= 1 && bank[0] < (1 << 24), "w_down has ", bank[0], " adapters; 1 to 2^24 are allowed");
      d.adapters = static_cast<int>(bank[0]);
    }
    const auto of_bank = [&](std::vector<int64_t> sizes) {
      sizes.insert(sizes.begin(), bank.begin(), bank.end());
      return sizes;
    };
    check_rows(w_down, "w_down", x, type, of_bank({r, c}));
    check_rows(w_up, "w_up", x, type, of_bank({c, r}));
    d.w_down = dense(w_down).const_data_ptr(), d.w_up = dense(w_up).const_data_ptr();
    d.by_vector = c % (16 / static_cast<int64_t>(type == ScalarType::Float ? 4 : 2)) == 0;
    d.x = rows_of(x, "x", x);
    if (input_residual) d.input_residual = rows_of(*input_residual, "input_residual", x);
    if (residual) d.residual = rows_of(*residual, "residual", x);
    d.b_down = parameter(b_down, "b_down", x, of_bank({r}), false), d.b_up = parameter(b_up, "b_up", x, of_bank({c}));
    d.norm_weight = parameter(norm_weight, "norm_weight", x, {c});
    d.norm_bias = parameter(norm_bias, "norm_bias", x, {c});
    d.out_weight = parameter(out_weight, "out_weight", x, {c});
    d.out_bias = parameter(out_bias, "out_bias", x, {c});
    if (scale) {
      const auto size = [&](int i, int64_t most) {
        return scale->dim() == 2 && (scale->size(i) == 1 || scale->size(i) == most) ? scale->size(i) : most;
      };
      const std::vector<int64_t> shape{size(0, d.adapters), size(1, c)};
      d.scale = parameter(scale, "scale", x, shape);
      d.scale_channel = shape[1] > 1 ? 1 : 0, d.scale_adapter = shape[0] > 1 ? shape[1] : 0;
    }
    if (gate) {
      std::vector<int64_t> shape{batch};
      if (gate->dim() == 2) shape.push_back(d.length);
      d.gate = parameter(gate, "gate", x, shape, false);
    }
    d.gate_rows = gate && gate->dim() == 2 ? 1 : std::max<int64_t>(1, d.length);
    STD_TORCH_CHECK(index.has_value() == !bank.empty(), bank.empty() ? "index is given; one adapter has none"
                                                                     : "index is absent; a bank of adapters needs one");
    d.group_rows = 1, d.mode = Mode::alone;
    if (index) {
      std::vector<int64_t> shape{batch};
      if (index->dim() == 2) shape.push_back(d.length);
      check_rows(*index, "index", x, ScalarType::Long, shape);
      d.index = static_cast<const int64_t*>(dense(*index).const_data_ptr());
      d.group_rows = index->dim() == 2 ? 1 : std::max<int64_t>(1, d.length);
      items = index->dim() == 2 ? d.rows : batch;
      STD_TORCH_CHECK(items < INT32_MAX, "index has ", items, " numbers; below 2^31 - 1 are allowed");
    }
    if (seed) {
      check_rows(*seed, "seed", x, ScalarType::Long, {1});
      d.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    STD_TORCH_CHECK(activation >= 0 && activation <= 6, "activation is ", activation, "; it must be 0 to 6");
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    STD_TORCH_CHECK(skip >= 0 && skip <= 7 && !(skip & 2 && !input_residual) && !(skip & 4 && !norm_weight), "skip is ",
                    skip, "; it must be 0 to 7, with 2 only with input_residual and 4 only with norm_weight");
    d.skip = static_cast<int>(skip), d.activation = static_cast<int>(activation);
    d.eps = static_cast<float>(eps), d.out_eps = static_cast<float>(out_eps), d.factor = static_cast<float>(factor);
    d.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
    d.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
  }

  const Tensor& dense(const Tensor& t) {
    held.push_back(torch::stable::contiguous(t));
    return held.back();
  }

  RowTensor rows_of(const Tensor& t, const char* name, const Tensor& x) {
    check_rows(t, name, x, type, {batch, d.length, d.channels});
    held.push_back(unit_last_stride(t));
    const Tensor& u = held.back();
    const int64_t wide = type == ScalarType::Float ? 4 : 8;
    d.by_vector = d.by_vector && aligned(u.const_data_ptr()) && (batch == 1 || u.stride(0) % wide == 0) &&
                  (d.length == 1 || u.stride(1) % wide == 0);
    return {u.const_data_ptr(), u.stride(0), u.stride(1)};
  }

  // `of_channels`: pieces of it are read at channels.
  Parameter parameter(const OptionalTensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& shape,
                      bool of_channels = true) {
    if (!t) return {};
    const bool is_fp32 = t->scalar_type() == ScalarType::Float;
    check_rows(*t, name, x, is_fp32 ? ScalarType::Float : type, shape);
    const void* data = dense(*t).const_data_ptr();
    if (of_channels) d.by_vector = d.by_vector && aligned(data);
    return {data, is_fp32};
  }

  // Rows of a tile: as many as leave room for two blocks on a multiprocessor and work for all of them.
  void choose_tile(bool backward, const char* op) {
    const int64_t limit = mmk_shared_memory(), half = (limit + 1024) / 2 - 1024;
    const auto fits = [&](int tile, bool resident, int64_t bytes) {
      return shared_bytes(dtype, d.channels, d.bottleneck, tile, resident, backward) <= bytes;
    };
    d.resident = !backward && d.norm_weight.data && fits(32, true, half);
    d.tile = kMostTile;
    while (d.tile > 32 && !fits(d.tile, d.resident, half)) d.tile /= 2;
    while (d.tile > 16 && (!fits(d.tile, d.resident, limit) || d.rows < d.tile * int64_t{mmk_multiprocessors()}))
      d.tile /= 2;
    STD_TORCH_CHECK(fits(d.tile, d.resident, limit), op, ": a bottleneck of ", d.bottleneck,
                    " does not fit the device's ", limit, " bytes of shared memory");
  }

  // As many pieces of `size` rows as there may be.
  int64_t pieces(int64_t size, int64_t groups) const {
    if (d.mode == Mode::by_example) return batch * ceil_div(d.length, size);
    return ceil_div(d.rows, size) + (d.mode == Mode::alone ? 0 : std::min(groups, items));
  }

  // Parts of the rows for so many clusters; twice as many where adapters differ, since their parts do.
  void choose_parts(int64_t tile, int64_t clusters, int64_t groups) {
    const int64_t wish = clusters * (d.mode == Mode::alone ? 1 : 2);
    const bool by_example = d.mode == Mode::by_example;
    const int64_t rows = by_example ? d.group_rows : d.rows;
    d.part = tile * ceil_div(rows, tile * (by_example ? ceil_div(wish, batch) : wish));
    d.parts = pieces(d.part, groups);
  }

  // Finds the order of rows by adapters.
  void group(const Tensor& x, void* stream, const char* op) {
    const Tensor begins = empty(x, {d.adapters + 3}, ScalarType::Int), order = empty(x, {items}, ScalarType::Int);
    held.push_back(begins), held.push_back(order);
    auto* first = static_cast<int*>(begins.mutable_data_ptr());
    auto* places = static_cast<int*>(order.mutable_data_ptr());
    check_launch(mmk_adapter_group(d.index, items, d.adapters, first, places, stream), op);
    d.begins = first, d.order = places, d.mode = Mode::grouped;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, OptionalTensor input_residual, OptionalTensor residual,
                                           Tensor w_down, OptionalTensor b_down, Tensor w_up, OptionalTensor b_up,
                                           OptionalTensor norm_weight, OptionalTensor norm_bias,
                                           OptionalTensor out_weight, OptionalTensor out_bias, OptionalTensor scale,
                                           OptionalTensor gate, OptionalTensor index, OptionalTensor seed, int64_t skip,
                                           int64_t activation, double eps, double out_eps, double factor,
                                           double dropout_p, bool save) {
  STD_TORCH_CHECK(!save, "save is true; on a GPU the bottleneck is made again, and it must be false");
  const OnDevice device(x);
  Call call(x, input_residual, residual, w_down, b_down, w_up, b_up, norm_weight, norm_bias, out_weight, out_bias,
            scale, gate, index, seed, skip, activation, eps, out_eps, factor, dropout_p);
  Adapter& d = call.d;
  Tensor out = empty(x, {call.batch, d.length, d.channels}, call.type);
  const int64_t numbers = 2 * (norm_weight ? 1 : 0) + 2 * (out_weight ? 1 : 0);
  Tensor statistics = empty(x, {numbers, call.batch, d.length}, ScalarType::Float);
  const Tensor nothing = empty(x, {0}, ScalarType::Float);
  if (d.rows == 0) return {out, statistics, nothing};
  d.out = out.mutable_data_ptr(), d.statistics = floats(statistics);
  if (const int clusters = mmk_adapter_cluster_forward_slots(call.dtype, &d)) {
    if (index && d.group_rows >= kLongExample) {
      d.mode = Mode::by_example;
    } else if (index && call.items <= kFewItems) {
      d.mode = Mode::few;
    } else if (index) {
      call.group(x, device.stream, "adapter_fwd");
    }
    call.choose_parts(kClusterTile, clusters, d.adapters + 2);
    check_launch(mmk_adapter_cluster_forward(call.dtype, &d, device.stream), "adapter_fwd");
    return {out, statistics, nothing};
  }
  call.choose_tile(false, "adapter_fwd");
  if (index) {
    // Tiles that end with their example, where that leaves few rows empty.
    if (d.group_rows >= 4 * d.tile || d.group_rows % d.tile == 0) {
      d.mode = Mode::by_example;
    } else {
      call.group(x, device.stream, "adapter_fwd");
    }
  }
  const int64_t tiles = call.pieces(d.tile, d.adapters + 2);
  check_blocks(tiles, "adapter_fwd");
  check_launch(mmk_adapter_forward(call.dtype, &d, tiles, device.stream), "adapter_fwd");
  return {out, statistics, nothing};
}

enum { kX, kInput, kResidual, kDown, kDownBias, kUp, kUpBias, kNorm, kNormBias, kOut, kOutBias, kScale, kGate, kAll };

Gradients backward(Tensor dout, Tensor x, OptionalTensor input_residual, OptionalTensor residual, Tensor w_down,
                   OptionalTensor b_down, Tensor w_up, OptionalTensor b_up, OptionalTensor norm_weight,
                   OptionalTensor norm_bias, OptionalTensor out_weight, OptionalTensor out_bias, OptionalTensor scale,
                   OptionalTensor gate, OptionalTensor index, OptionalTensor seed, Tensor statistics, OptionalTensor,
                   int64_t skip, int64_t activation, double eps, double out_eps, double factor, double dropout_p,
                   int64_t wanted) {
  const OnDevice device(x);
  Call call(x, input_residual, residual, w_down, b_down, w_up, b_up, norm_weight, norm_bias, out_weight, out_bias,
            scale, gate, index, seed, skip, activation, eps, out_eps, factor, dropout_p);
  Adapter& d = call.d;
  const int64_t c = d.channels, r = d.bottleneck;
  check_rows(dout, "dout", x, call.type, {call.batch, d.length, c});
  check_rows(statistics, "statistics", x, ScalarType::Float,
             {2 * (norm_weight ? 1 : 0) + 2 * (out_weight ? 1 : 0), call.batch, d.length});
  const auto want = [&](int i) { return (wanted >> i & 1) != 0; };
  const auto of_bank = [&](std::vector<int64_t> sizes) {
    sizes.insert(sizes.begin(), call.bank.begin(), call.bank.end());
    return sizes;
  };
  const bool present[kAll] = {true,
                              input_residual.has_value(),
                              residual.has_value(),
                              true,
                              b_down.has_value(),
                              true,
                              b_up.has_value(),
                              norm_weight.has_value(),
                              norm_bias.has_value(),
                              out_weight.has_value(),
                              out_bias.has_value(),
                              scale.has_value(),
                              gate.has_value()};
  for (int i = 0; i < kAll; ++i)
    STD_TORCH_CHECK(present[i] || !want(i), "wanted is ", wanted, "; bit ", i, " is of an argument that is absent");
  const std::vector<int64_t> rows{call.batch, d.length, c};
  std::vector<std::vector<int64_t>> shapes{rows,        rows, rows, of_bank({r, c}), of_bank({r}), of_bank({c, r}),
                                           of_bank({c})};
  for (int i = kNorm; i <= kOutBias; ++i) shapes.push_back({c});
  for (const OptionalTensor* t : {&call.scale, &call.gate}) {
    shapes.emplace_back();
    for (int64_t i = 0; *t && i < (*t)->dim(); ++i) shapes.back().push_back((*t)->size(i));
  }
  std::vector<Tensor> grads;
  for (int i = 0; i < kAll; ++i) {
    const bool narrow = i <= kResidual || i == kDown || i == kUp;
    grads.push_back(empty(x, want(i) ? shapes[i] : std::vector<int64_t>{0}, narrow ? call.type : ScalarType::Float));
  }
  const auto result = [&]() -> Gradients {
    return {grads[0], grads[1], grads[2], grads[3],  grads[4],  grads[5], grads[6],
            grads[7], grads[8], grads[9], grads[10], grads[11], grads[12]};
  };
  if (d.rows == 0) {
    for (Tensor& g : grads) torch::stable::zero_(g);
    return result();
  }
  const auto pointer = [&](int i) { return want(i) ? grads[i].mutable_data_ptr() : nullptr; };
  const auto numbers = [&](bool needed, std::vector<int64_t> sizes) {
    if (!needed) sizes = {0};
    call.held.push_back(empty(x, sizes, ScalarType::Float));
    return needed ? floats(call.held.back()) : nullptr;
  };
  const auto sum_over = [](const Tensor& t, std::vector<int64_t> dims) {
    return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(dims.data(), dims.size()), true);
  };
  dout = torch::stable::contiguous(dout), statistics = torch::stable::contiguous(statistics);
  d.by_vector = d.by_vector && aligned(dout.const_data_ptr());
  d.dout = dout.const_data_ptr(), d.statistics = floats(statistics);
  if (index) call.group(x, device.stream, "adapter_bwd");
  const bool want_norm = want(kNorm) || want(kNormBias), want_out = want(kOut) || want(kOutBias);
  const bool want_weights = want(kDown) || want(kDownBias) || want(kUp) || want(kUpBias) || want(kScale);
  int clusters = 0;
  if (!want_norm && !want_out && !want(kInput) && !want(kGate))
    d.tile = mmk_adapter_cluster_tile(call.dtype, &d, &clusters);
  const bool one_pass = clusters != 0;
  if (!one_pass) call.choose_tile(true, "adapter_bwd");
  d.dx = pointer(kX), d.dinput = pointer(kInput);
  if (want(kResidual) && !out_weight) torch::stable::copy_(grads[kResidual], dout);
  if (out_weight) d.dy = pointer(kResidual);

  if (!one_pass) {
    const int64_t tiles = call.pieces(d.tile, d.adapters + 2);
    d.norm_sums = numbers(want_norm, {2, tiles, c}), d.out_sums = numbers(want_out, {2, tiles, c});
    const auto space = [&](const std::vector<int64_t>& sizes) {
      call.held.push_back(empty(x, sizes, call.type));
      return call.held.back().mutable_data_ptr();
    };
    d.hidden = space({d.rows, r}), d.dhidden = space({d.rows, r});
    if (out_weight && !d.dy) d.dy = space(rows);
    d.dgate = numbers(want(kGate), {call.batch, d.length});
    const Tensor dgate = call.held.back();
    check_blocks(tiles, "adapter_bwd");
    check_launch(mmk_adapter_backward(call.dtype, &d, tiles, device.stream), "adapter_bwd");
    const auto sum = [&](const float* sums, int i) {
      if (want(i))
        check_launch(mmk_sum_rows(sums, floats(grads[i]), 1, tiles, c, nullptr, 1, device.stream), "adapter_bwd");
    };
    sum(d.norm_sums, kNorm), sum(d.norm_sums + tiles * c, kNormBias);
    sum(d.out_sums, kOut), sum(d.out_sums + tiles * c, kOutBias);
    if (want(kGate)) grads[kGate] = gate->dim() == 2 ? dgate : torch::stable::squeeze(sum_over(dgate, {1}), 1);
    if (!want_weights) return result();
    if (!out_weight) d.dy = const_cast<void*>(d.dout);
  }

  if (one_pass) {
    call.choose_parts(d.tile, clusters, d.adapters + 2);
  } else {  // as many as occupy the device twice
    const int64_t processors = std::max(1, mmk_multiprocessors()), width = call.dtype == Dtype::fp32 ? 32 : 64;
    const int64_t wish = ceil_div(2 * processors, ceil_div(c, width) * ceil_div(r, width));
    d.part = 64 * ceil_div(d.rows, 64 * wish);
    d.parts = call.pieces(d.part, d.adapters);
  }
  d.down_parts = numbers(want(kDown), {d.parts, r, c}), d.bias_parts = numbers(want(kDownBias), {d.parts, r});
  d.up_parts = numbers(want(kUp) || want(kScale), {d.parts, c, r});
  d.dl_parts = numbers(want(kUpBias) || want(kScale), {d.parts, c});
  const auto made = [&](int i) { return want(i) ? floats(grads[i]) : nullptr; };
  d.dw_down = pointer(kDown), d.dw_up = pointer(kUp), d.db_down = made(kDownBias), d.db_up = made(kUpBias);
  d.dscale = numbers(want(kScale), {d.adapters, c});
  Tensor dscale = call.held.back();
  const auto start = one_pass ? mmk_adapter_cluster_backward : mmk_adapter_weights;
  check_launch(start(call.dtype, &d, device.stream), "adapter_bwd");
  check_launch(mmk_adapter_sums(call.dtype, &d, device.stream), "adapter_bwd");
  if (want(kScale)) {
    std::vector<int64_t> shared;
    for (int i = 0; i < 2; ++i)
      if (scale->size(i) == 1) shared.push_back(i);
    grads[kScale] = shared.empty() ? dscale : sum_over(dscale, shared);
  }
  return result();
}

MMK_REGISTER_CUDA(m) {
  m.impl("adapter_fwd", TORCH_BOX(&forward));
  m.impl("adapter_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::adapter
