// The registered ops of the hypergrid family on CUDA tensors: checks, allocation, launches. Schemas: csrc/schemas.h.
#include "hypergrid/hypergrid_cuda.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "common/rows_binding.h"
#include "common/waves.h"

namespace mmk::hypergrid {
namespace {

using OptionalTensor = std::optional<Tensor>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const int64_t* integers(const OptionalTensor& t) {
  return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

uint32_t threshold(double p) { return static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0)); }

Tensor floats_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// The arguments that both directions have, checked.
struct Call {
  Dtype dtype;
  ScalarType type;
  int64_t rows, in, out, gates, r, c, rows_per_gate;
  Tensor x, weight, gate;  // rows of consecutive elements; gate in float32
  OptionalTensor index, seed;
  double residual, dropout_p;
  int activation;

  Call(const Tensor& x_, const Tensor& weight_, const Tensor& gate_, const OptionalTensor& index_,
       int64_t rows_per_gate, bool residual, int64_t activation, double dropout_p, const OptionalTensor& seed_)
      : dtype(row_dtype(x_, "x")),
        type(x_.scalar_type()),
        rows_per_gate(rows_per_gate),
        x(x_),
        weight(weight_),
        gate(gate_),
        index(index_),
        seed(seed_),
        residual(residual),
        dropout_p(dropout_p),
        activation(static_cast<int>(activation)) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, "x has shape ", shape_text(x.sizes()), "; it must be (M, in)");
    rows = x.size(0), in = x.size(1);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1, "weight has shape ", shape_text(weight.sizes()),
                    "; it must be (out, ", in, ")");
    out = weight.size(0);
    check_rows(weight, "weight", x, type, {out, in});
    STD_TORCH_CHECK(gate.dim() == 3, "gate has shape ", shape_text(gate.sizes()), "; it must be (G, R, C)");
    gates = gate.size(0), r = gate.size(1), c = gate.size(2);
    check_rows(gate, "gate", x, gate.scalar_type() == ScalarType::Float ? ScalarType::Float : type, {gates, r, c});
    for (const auto& [count, size] : {std::pair{r, in}, std::pair{c, out}})
      STD_TORCH_CHECK(count >= 1 && size % count == 0 && (count == 1 || size / count >= 8), "gate has shape ",
                      shape_text(gate.sizes()), "; it must divide the weight ", shape_text(weight.sizes()),
                      " into blocks of 8 or more");
    STD_TORCH_CHECK(in < INT32_MAX / 8 && out < INT32_MAX / 8, "weight has shape ", shape_text(weight.sizes()),
                    "; its sizes must be below 2^28");
    if (rows > 0) {
      STD_TORCH_CHECK(rows_per_gate >= 1 && rows % rows_per_gate == 0, "x has ", rows,
                      " rows; they must be a multiple of rows_per_gate, ", rows_per_gate);
      if (index) check_rows(*index, "index", x, ScalarType::Long, {rows / rows_per_gate});
      STD_TORCH_CHECK(index || gates == 1 || gates * rows_per_gate == rows, "gate has shape ", shape_text(gate.sizes()),
                      "; without index it must have 1 or ", rows / rows_per_gate, " gates");
    }
    if (index) index = torch::stable::contiguous(*index);
    STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation is ", activation, "; it must be 0 to 3");
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    if (seed) check_rows(*seed, "seed", x, ScalarType::Long, {1});
    x = unit_last_stride(x), weight = unit_last_stride(weight), gate = floats_of(gate);
  }

  Gates of_rows(bool turned) const {
    Gates g;
    g.data = static_cast<const float*>(gate.const_data_ptr());
    g.stride[0] = gate.stride(0), g.stride[1] = gate.stride(turned ? 2 : 1), g.stride[2] = gate.stride(turned ? 1 : 2);
    g.count = gates, g.residual = static_cast<float>(residual);
    g.index = integers(index);
    g.group_rows = gates == 1 && !index ? rows : rows_per_gate;
    return g;
  }

  Epilogue of_x() const {
    Epilogue e;
    e.x = x.const_data_ptr(), e.x_row = x.stride(0), e.activation = activation;
    e.seed = integers(seed), e.threshold = threshold(dropout_p), e.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
    return e;
  }

  // a(x), or x where the kernels take the ReLU themselves.
  Tensor left(bool& relu, void* stream) const {
    relu = activation == 1 && !seed;
    if (relu || (activation == 0 && !seed)) return x;
    Tensor a = empty(x, {rows, in}, type);
    const Epilogue e = of_x();
    check_blocks(ceil_div(rows * in, 1024), "hypergrid");
    check_launch(mmk_hypergrid_activate(dtype, &e, rows, in, a.mutable_data_ptr(), stream), "hypergrid");
    return a;
  }
};

constexpr int64_t kTurnFrom = 512;  // rows of x from which on the weight is turned for wgmma

// Starts a product whose operands are set, with as many splits as fill the device.
void start(Product& d, Dtype dtype, const Tensor& like, int64_t columns, void* stream) {
  const int64_t tiles = ceil_div(d.rows, tile_rows(dtype)) * ceil_div(columns, kColumns);
  const int64_t depth = dtype == Dtype::fp32 ? 32 : 64, steps = ceil_div(d.kp, depth);
  // Only where a fraction of the device would be busy: the sums of splits are written and read.
  const int64_t processors = std::max(1, mmk_multiprocessors());
  int64_t splits = 2 * tiles <= processors ? split_keys(tiles, d.p * steps, processors) : 1;
  d.split_blocks = static_cast<int>(ceil_div(d.p, std::min<int64_t>(splits, d.p)));
  d.splits = static_cast<int>(ceil_div(d.p, d.split_blocks));
  Tensor partial = empty(like, {d.splits > 1 ? d.splits : 0, d.rows, columns}, ScalarType::Float);
  d.partial = floats(partial);
  check_blocks(tiles * d.splits + (d.rows / d.gates.group_rows + 1) * ceil_div(columns, kColumns), "hypergrid");
  check_blocks(ceil_div(d.rows * columns, 256), "hypergrid");
  check_launch(mmk_hypergrid_product(dtype, &d, stream), "hypergrid");
}

Tensor forward(Tensor x, Tensor weight, Tensor gate, OptionalTensor bias, OptionalTensor index, int64_t rows_per_gate,
               bool residual, int64_t activation, double dropout_p, OptionalTensor seed) {
  const OnDevice device(x);
  const Call call(x, weight, gate, index, rows_per_gate, residual, activation, dropout_p, seed);
  if (bias) {
    check_rows(*bias, "bias", x, call.type, {call.out});
    bias = torch::stable::contiguous(*bias);
  }
  Tensor out = empty(x, {call.rows, call.out}, call.type);
  if (call.rows == 0) return out;
  Product d{};
  const Tensor left = call.left(d.relu, device.stream);
  d.left = left.const_data_ptr(), d.left_row = left.stride(0);
  d.right = call.weight.const_data_ptr(), d.right_row = call.weight.stride(0);
  d.rows = call.rows;
  d.p = static_cast<int>(call.r), d.kp = static_cast<int>(call.in / call.r);
  d.q = static_cast<int>(call.c), d.kq = static_cast<int>(call.out / call.c);
  d.gates = call.of_rows(false);
  if (bias) d.epilogue.bias = bias->const_data_ptr();
  d.out = out.mutable_data_ptr();
  start(d, call.dtype, x, call.out, device.stream);
  return out;
}

// (sorted numbers, their places), equal ones in order.
std::pair<Tensor, Tensor> sorted(const Tensor& index) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(index),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void weight_gradient(const Call& call, const Tensor& dy, Tensor& dweight, Tensor& dgate, bool want_weight,
                     bool want_gate, void* stream) {
  WeightGradient d{};
  const Tensor left = call.left(d.relu, stream);
  d.left = left.const_data_ptr(), d.left_row = left.stride(0);
  d.dy = dy.const_data_ptr(), d.dy_row = dy.stride(0), d.rows = call.rows;
  d.weight = call.weight.const_data_ptr(), d.weight_row = call.weight.stride(0);
  d.r = static_cast<int>(call.r), d.kr = static_cast<int>(call.in / call.r);
  d.c = static_cast<int>(call.c), d.kc = static_cast<int>(call.out / call.c);
  d.gates = call.of_rows(false);
  const int64_t groups = call.rows / call.rows_per_gate;
  OptionalTensor numbers, order;
  if (call.index) {
    auto [values, places] = sorted(*call.index);
    numbers = values, order = torch::stable::contiguous(places);
  }
  const Tensor begins = empty(dy, {call.gates + 1}, ScalarType::Long);
  const int64_t own = call.gates == 1 && !call.index ? call.rows : call.rows_per_gate;
  check_launch(mmk_hypergrid_begins(integers(numbers), groups, call.gates, own,
                                    static_cast<int64_t*>(begins.mutable_data_ptr()), stream),
               "hypergrid_bwd");
  d.begins = integers(begins), d.order = integers(order);

  const int64_t row_tiles = ceil_div(call.out, tile_rows(call.dtype)), column_tiles = ceil_div(call.in, kColumns);
  const int64_t depth = call.dtype == Dtype::fp32 ? 32 : 64;
  const int64_t processors = std::max(1, mmk_multiprocessors());
  int64_t splits = split_keys(row_tiles * column_tiles, ceil_div(call.rows, depth), processors);
  if (mmk_hypergrid_takes_hopper_weight(call.dtype, &d)) {
    // A split's sums are written and read: in stages of about 850 clocks, at 24 bytes a clock.
    const double merge = static_cast<double>(call.out * call.in) * 8 / (24.0 * 850.0 * static_cast<double>(processors));
    splits = split_keys(mmk_hypergrid_hopper_weight_clusters(&d), ceil_div(call.rows, depth),
                        std::max<int64_t>(1, processors / 4), merge);
  }
  STD_TORCH_CHECK(call.rows < INT32_MAX - 65536 && call.gates < INT32_MAX / 512, "hypergrid_bwd: x has ", call.rows,
                  " rows and gate ", call.gates, " gates; below 2^31 and 2^22 are allowed");
  d.chunks = static_cast<int>(ceil_div(splits, call.gates));
  d.segments = static_cast<int>(call.gates) * d.chunks;
  d.split_segments = static_cast<int>(ceil_div(d.segments, splits));
  d.splits = static_cast<int>(ceil_div(d.segments, d.split_segments));
  const int64_t part_rows = ceil_div(call.out, 128) * 2 + call.c, part_columns = column_tiles * 4 + call.r;
  const Tensor partial = empty(dy, {want_weight && d.splits > 1 ? d.splits : 0, call.out, call.in}, ScalarType::Float);
  const Tensor parts = empty(dy, {want_gate ? d.segments : 0, part_rows, part_columns}, ScalarType::Float);
  d.partial = floats(partial);
  d.out = want_weight ? dweight.mutable_data_ptr() : nullptr;
  d.parts = want_gate ? floats(parts) : nullptr;
  d.dgate = want_gate ? floats(dgate) : nullptr;
  check_blocks(ceil_div(call.gates * call.r * call.c, 256), "hypergrid_bwd");
  check_blocks(ceil_div(call.out * call.in, 256), "hypergrid_bwd");
  check_launch(mmk_hypergrid_weight(call.dtype, &d, stream), "hypergrid_bwd");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight, Tensor gate,
                                                    OptionalTensor index, int64_t rows_per_gate, bool residual,
                                                    int64_t activation, double dropout_p, OptionalTensor seed,
                                                    bool want_x, bool want_weight, bool want_gate, bool want_bias) {
  const OnDevice device(x);
  const Call call(x, weight, gate, index, rows_per_gate, residual, activation, dropout_p, seed);
  check_rows(dy, "dy", x, call.type, {call.rows, call.out});
  dy = unit_last_stride(dy);
  Tensor dx = want_x ? empty(x, {call.rows, call.in}, call.type) : empty(x, {0}, call.type);
  Tensor dweight = want_weight ? empty(x, {call.out, call.in}, call.type) : empty(x, {0}, call.type);
  Tensor dgate =
      want_gate ? empty(x, {call.gates, call.r, call.c}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  Tensor dbias = empty(x, {0}, ScalarType::Float);
  if (want_bias) {
    const std::array<int64_t, 1> first{0};
    dbias = torch::stable::sum(dy, torch::headeronly::IntHeaderOnlyArrayRef(first.data(), 1), false, ScalarType::Float);
  }
  if (call.rows == 0) {
    torch::stable::zero_(dweight), torch::stable::zero_(dgate);
    return {dx, dweight, dgate, dbias};
  }
  if (want_x) {
    Product d{};
    d.left = dy.const_data_ptr(), d.left_row = dy.stride(0);
    d.right = call.weight.const_data_ptr(), d.right_row = call.weight.stride(0);
    d.transposed = true;
    d.rows = call.rows;
    d.p = static_cast<int>(call.c), d.kp = static_cast<int>(call.out / call.c);
    d.q = static_cast<int>(call.r), d.kq = static_cast<int>(call.in / call.r);
    d.gates = call.of_rows(true);
    d.epilogue = call.of_x();
    d.out = dx.mutable_data_ptr();
    // wgmma's kernel takes the weight turned, which is a copy of one weight.
    Product turned = d;
    turned.right_row = call.out;
    if (call.rows >= kTurnFrom && mmk_hypergrid_takes_hopper_input(call.dtype, &turned)) {
      const Tensor turned_weight = torch::stable::contiguous(torch::stable::transpose(call.weight, 0, 1));
      turned.right = turned_weight.const_data_ptr();
      check_launch(mmk_hypergrid_hopper_input(call.dtype, &turned, device.stream), "hypergrid_bwd");
    } else {
      start(d, call.dtype, x, call.in, device.stream);
    }
  }
  if (want_weight || want_gate) weight_gradient(call, dy, dweight, dgate, want_weight, want_gate, device.stream);
  return {dx, dweight, dgate, dbias};
}

GateFactors factors(const Tensor& row, const Tensor& column, int64_t& gates) {
  row_dtype(row, "row");
  STD_TORCH_CHECK(row.dim() == 2 && row.size(1) >= 1, "row has shape ", shape_text(row.sizes()), "; it must be (G, R)");
  STD_TORCH_CHECK(column.dim() == 2 && column.size(1) >= 1 &&
                      (column.size(0) == row.size(0) || column.size(0) == 1 || row.size(0) == 1),
                  "column has shape ", shape_text(column.sizes()), "; it must be (", row.size(0), " or 1, C)");
  check_rows(column, "column", row, row.scalar_type(), {column.size(0), column.size(1)});
  STD_TORCH_CHECK(row.size(1) < INT32_MAX && column.size(1) < INT32_MAX, "row has ", row.size(1), " and column ",
                  column.size(1), " blocks; below 2^31 are allowed");
  gates = column.size(0) == 1 ? row.size(0) : column.size(0);
  GateFactors d{};
  d.row = row.const_data_ptr(), d.column = column.const_data_ptr();
  d.row_shared = row.size(0) == 1, d.column_shared = column.size(0) == 1;
  d.row_strides[0] = d.row_shared ? 0 : row.stride(0), d.row_strides[1] = row.stride(1);
  d.column_strides[0] = d.column_shared ? 0 : column.stride(0), d.column_strides[1] = column.stride(1);
  d.gates = gates;
  d.r = static_cast<int>(row.size(1)), d.c = static_cast<int>(column.size(1));
  return d;
}

Tensor gate_forward(Tensor row, Tensor column) {
  const OnDevice device(row);
  int64_t gates = 0;
  GateFactors d = factors(row, column, gates);
  Tensor out = empty(row, {gates, row.size(1), column.size(1)}, row.scalar_type());
  if (gates == 0) return out;
  d.out = out.mutable_data_ptr();
  check_blocks(ceil_div(gates * d.r * d.c, 256), "hypergrid_gate_fwd");
  check_launch(mmk_hypergrid_gate(row_dtype(row, "row"), &d, false, device.stream), "hypergrid_gate_fwd");
  return out;
}

std::tuple<Tensor, Tensor> gate_backward(Tensor dgate, Tensor row, Tensor column) {
  const OnDevice device(row);
  int64_t gates = 0;
  GateFactors d = factors(row, column, gates);
  check_rows(dgate, "dgate", row, row.scalar_type(), {gates, row.size(1), column.size(1)});
  Tensor drow = empty(row, {row.size(0), row.size(1)}, ScalarType::Float);
  Tensor dcolumn = empty(row, {column.size(0), column.size(1)}, ScalarType::Float);
  if (gates == 0) {
    torch::stable::zero_(drow), torch::stable::zero_(dcolumn);
    return {drow, dcolumn};
  }
  d.dgate = dgate.const_data_ptr();
  for (int i = 0; i < 3; ++i) d.dgate_strides[i] = dgate.stride(i);
  d.drow = floats(drow), d.dcolumn = floats(dcolumn);
  check_blocks(gates * (d.r + d.c), "hypergrid_gate_bwd");
  check_launch(mmk_hypergrid_gate(row_dtype(row, "row"), &d, true, device.stream), "hypergrid_gate_bwd");
  return {drow, dcolumn};
}

MMK_REGISTER_CUDA(m) {
  m.impl("hypergrid_fwd", TORCH_BOX(&forward));
  m.impl("hypergrid_bwd", TORCH_BOX(&backward));
  m.impl("hypergrid_gate_fwd", TORCH_BOX(&gate_forward));
  m.impl("hypergrid_gate_bwd", TORCH_BOX(&gate_backward));
}

}  // namespace
}  // namespace mmk::hypergrid
