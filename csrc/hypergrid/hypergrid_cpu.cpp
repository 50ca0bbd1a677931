// HyperGrid on the CPU: checks, parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"
#include "hypergrid/hypergrid.h"

namespace mmk {

MMK_KERNELS_IN_USE(HyperGridKernels, hypergrid_kernels, kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

Strided from(const Strided& s, int64_t row, int64_t column) {
  Strided part = s;
  if (s.data != nullptr) part.data = s.at(0, 0, row, column);
  return part;
}

// Up to so many rows take the weight as it lies: turning it in a copy costs as much as 32 rows of products do, and with
// a gate for every row the sums of pieces cost more than they do for many rows.
constexpr int64_t kFewRows = 128;

// The arguments that forward and backward share, checked.
struct Call {
  int64_t rows, in, out, gates, grid_rows, grid_columns, run;
  Tensor x, weight, gate;
  std::vector<int64_t> numbers;  // of the runs
  bool residual;
  Activation activation;

  Call(const Tensor& x_, const Tensor& weight_, const Tensor& gate_, const OptionalTensor& index, int64_t rows_per_gate,
       bool residual_, int64_t kind, double dropout_p, const OptionalTensor& seed)
      : run(rows_per_gate), x(x_), weight(weight_), gate(gate_), residual(residual_) {
    const ScalarType dtype = check_first(x, "x", 2);
    rows = x.size(0), in = x.size(1);
    check_dtype(weight, "weight", dtype);
    check_rank(weight, "weight", 2);
    out = weight.size(0);
    check_shape(weight, "weight", {out, in});
    check_rank(gate, "gate", 3);
    check_dtype(gate, "gate", gate.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype);
    gates = gate.size(0), grid_rows = gate.size(1), grid_columns = gate.size(2);
    STD_TORCH_CHECK(in >= 1 && out >= 1, "weight has shape ", text_of_shape(weight), "; it must not be empty");
    for (const auto& [count, size] : {std::pair{grid_rows, in}, std::pair{grid_columns, out}})
      STD_TORCH_CHECK(count >= 1 && size % count == 0 && (count == 1 || size / count >= 8), "gate has shape ",
                      text_of_shape(gate), "; it must divide the weight ", text_of_shape(weight),
                      " into blocks of 8 or more");
    if (rows > 0) {
      STD_TORCH_CHECK(run >= 1 && rows % run == 0, "x has ", rows, " rows; they must be a multiple of rows_per_gate, ",
                      run);
      STD_TORCH_CHECK(index || gates == 1 || gates * run == rows, "gate has shape ", text_of_shape(gate),
                      "; without index it must have 1 or ", rows / run, " gates");
      if (index) check_dtype(*index, "index", ScalarType::Long), check_shape(*index, "index", {rows / run});
      if (gates == 1 && !index) run = rows;
      for (int64_t i = 0; i < rows / run; ++i)
        numbers.push_back(index ? static_cast<const int64_t*>(index->const_data_ptr())[i * index->stride(0)] : i);
      for (int64_t number : numbers)
        STD_TORCH_CHECK(number >= 0 && number < gates, "index has the number ", number, "; numbers must be in [0, ",
                        gates, ")");
    }
    STD_TORCH_CHECK(kind >= 0 && kind <= 3, "activation is ", kind, "; it must be 0 to 3");
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    activation.kind = kind;
    if (dropout_p == 0.0 || !seed) return;
    check_dtype(*seed, "seed", ScalarType::Long), check_shape(*seed, "seed", {1});
    activation.dropout = true;
    activation.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    activation.threshold =
        static_cast<uint32_t>(std::min<uint64_t>(std::nearbyint(dropout_p * 4294967296.0), 0xFFFFFFFF));
    activation.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
};

// The gates in float32, for rows of the weight's first or second side.
class GateTable {
 public:
  GateTable(const Call& call, bool first_is_in)
      : rows_(first_is_in ? call.grid_rows : call.grid_columns),
        columns_(first_is_in ? call.grid_columns : call.grid_rows),
        piece_((first_is_in ? call.in : call.out) / rows_),
        block_((first_is_in ? call.out : call.in) / columns_),
        space_(call.gates * rows_ * columns_ + kernels().width) {
    const Strided gate = first_is_in ? strided(call.gate) : transposed(strided(call.gate));
    for (int64_t g = 0; g < call.gates; ++g) {
      Strided one = gate;
      one.data = gate.at(0, g);
      kernels().factors(one, rows_, columns_, call.residual ? 1.0f : 0.0f, space_.at(g * rows_ * columns_));
    }
    std::fill_n(space_.at(call.gates * rows_ * columns_), kernels().width, 0.0f);
  }
  Factors factors() const { return {space_.at(0), rows_ * columns_, columns_, piece_, block_}; }

 private:
  int64_t rows_, columns_, piece_, block_;
  Space space_;
};

// Runs a product whose operands are set, in parts.
void run(const Call& call, GridProduct whole, bool weight_by_rows) {
  std::vector<int64_t> gates(call.rows);
  for (int64_t i = 0; i < call.rows; ++i) gates[i] = call.numbers[i / call.run];
  whole.run = call.run;
  const int64_t threads = threads_for(2.0 * whole.rows * whole.columns * whole.depth);
  std::vector<GridProduct> parts;
  const auto add = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    GridProduct part = whole;
    part.rows = rows, part.columns = columns;
    part.first_row = row, part.first_column = column, part.gates = gates.data() + row;
    part.a = from(whole.a, row, 0), part.b = from(whole.b, 0, column), part.c = from(whole.c, row, column);
    part.bias = from(whole.bias, 0, column), part.x = from(whole.x, row, column);
    parts.push_back(part);
  };
  const bool few = whole.rows <= kFewRows && !weight_by_rows;
  if (few) {
    const int64_t columns = std::max<int64_t>(ceil_div(whole.columns, 4 * threads), 32);
    for (int64_t j = 0; j < whole.columns; j += columns) add(0, whole.rows, j, std::min(columns, whole.columns - j));
  } else {
    // Clocks for 12 rows and a panel of columns: what adding the sums of pieces costs, against copying a panel of B
    // for every gate instead of once. A weight that has to be turned is copied more slowly.
    const double pieces = static_cast<double>(whole.depth) / whole.factors.piece;
    const double adding = 50.0 * ceil_div(call.run, 12) * (pieces - std::min(pieces, whole.depth / 192.0));
    whole.scale_b = call.rows == call.run || adding > whole.depth * (weight_by_rows ? 5.0 : 25.0);
    const int64_t group = whole.scale_b ? call.run : call.rows, groups = call.rows / group;
    const ProductCut cut(group, whole.columns, 384, ceil_div(threads, groups));
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < whole.columns; j += cut.columns)
        for (int64_t i = 0; i < group; i += cut.rows)
          add(g * group + i, std::min(cut.rows, group - i), j, std::min(cut.columns, whole.columns - j));
  }
  int64_t size = 0;
  const auto space_of = few ? kernels().few_rows_space : kernels().product_space;
  for (const GridProduct& part : parts) size = std::max(size, space_of(part));
  const int64_t count = static_cast<int64_t>(parts.size()), workers = std::min(threads, count);
  const Space space(workers * size);
  for_parts(count, workers, [&](int64_t part, int64_t worker) {
    (few ? kernels().few_rows : kernels().product)(parts[part], space.at(worker * size));
  });
}

Tensor forward(Tensor x, Tensor weight, Tensor gate, OptionalTensor bias, OptionalTensor index, int64_t rows_per_gate,
               bool residual, int64_t activation, double dropout_p, OptionalTensor seed) {
  const Call call(x, weight, gate, index, rows_per_gate, residual, activation, dropout_p, seed);
  if (bias) check_dtype(*bias, "bias", x.scalar_type()), check_shape(*bias, "bias", {call.out});
  Tensor out = allocate(x, {call.rows, call.out});
  if (call.rows == 0) return out;
  const GateTable table(call, true);
  GridProduct m{};
  m.rows = call.rows, m.columns = call.out, m.depth = call.in;
  m.a = strided(x), m.b = transposed(strided(weight)), m.c = strided(out), m.bias = strided(bias);
  m.activation = call.activation, m.factors = table.factors();
  run(call, m, false);
  return out;
}

// The runs of rows by gate.
struct Groups {
  std::vector<int64_t> begins, order;

  explicit Groups(const Call& call) : begins(call.gates + 1), order(call.numbers.size()) {
    for (int64_t number : call.numbers) ++begins[number + 1];
    for (int64_t g = 0; g < call.gates; ++g) begins[g + 1] += begins[g];
    std::vector<int64_t> next(begins.begin(), begins.end());
    for (size_t i = 0; i < order.size(); ++i) order[next[call.numbers[i]]++] = static_cast<int64_t>(i);
  }
};

// Parts depend on the sizes alone, so that their sums for dgate do not depend on the number of threads.
void weight_gradient(const Call& call, const GateTable& table, const Tensor& dy, const Tensor* dweight, Tensor* dgate) {
  const Groups groups(call);
  GridGradient whole{};
  whole.dy = strided(dy), whole.x = strided(call.x), whole.weight = strided(call.weight);
  if (dweight != nullptr) whole.dweight = strided(*dweight);
  whole.activation = call.activation, whole.factors = table.factors();
  whole.gate_count = call.gates, whole.run = call.run;
  whole.begins = groups.begins.data(), whole.order = groups.order.data();
  const ProductCut cut(call.out, call.in, 384, 1);
  std::vector<GridGradient> parts;
  std::vector<int64_t> begins{0};
  int64_t size = 0;
  for (int64_t i = 0; i < call.out; i += cut.rows)
    for (int64_t j = 0; j < call.in; j += cut.columns) {
      GridGradient part = whole;
      part.rows = std::min(cut.rows, call.out - i), part.columns = std::min(cut.columns, call.in - j);
      part.first_row = i, part.first_column = j;
      part.dy = from(whole.dy, 0, i), part.x = from(whole.x, 0, j);
      part.weight = from(whole.weight, i, j), part.dweight = from(whole.dweight, i, j);
      parts.push_back(part);
      size = std::max(size, kernels().gradient_space(part));
      begins.push_back(begins.back() + call.gates * part.grid_rows() * part.grid_columns());
    }
  const Space sums(dgate == nullptr ? 0 : begins.back());
  const int64_t count = static_cast<int64_t>(parts.size());
  const int64_t workers = std::min(threads_for(2.0 * call.rows * call.in * call.out), count);
  const Space space(workers * size);
  for_parts(count, workers, [&](int64_t i, int64_t worker) {
    parts[i].sums = dgate == nullptr ? nullptr : sums.at(begins[i]);
    kernels().gradient(parts[i], space.at(worker * size));
  });
  if (dgate == nullptr) return;
  float* const to = static_cast<float*>(dgate->mutable_data_ptr());
  std::fill_n(to, dgate->numel(), 0.0f);
  for (const GridGradient& part : parts) {
    const float* from = part.sums;
    for (int64_t g = 0; g < call.gates; ++g)
      for (int64_t c = 0; c < part.grid_rows(); ++c)
        for (int64_t r = 0; r < part.grid_columns(); ++r)
          to[(g * call.grid_rows + part.grid_column() + r) * call.grid_columns + part.grid_row() + c] += *from++;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight, Tensor gate,
                                                    OptionalTensor index, int64_t rows_per_gate, bool residual,
                                                    int64_t activation, double dropout_p, OptionalTensor seed,
                                                    bool want_x, bool want_weight, bool want_gate, bool want_bias) {
  const Call call(x, weight, gate, index, rows_per_gate, residual, activation, dropout_p, seed);
  check_dtype(dy, "dy", x.scalar_type());
  check_shape(dy, "dy", {call.rows, call.out});
  const auto gradient = [&](bool is_wanted, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return is_wanted ? allocate(x, sizes, dtype) : allocate(x, {0}, dtype);
  };
  Tensor dx = gradient(want_x, {call.rows, call.in}, x.scalar_type());
  Tensor dweight = gradient(want_weight, {call.out, call.in}, x.scalar_type());
  Tensor dgate = gradient(want_gate, {call.gates, call.grid_rows, call.grid_columns}, ScalarType::Float);
  Tensor dbias = gradient(false, {0}, ScalarType::Float);
  if (want_bias) {
    const std::array<int64_t, 1> first{0};
    const Tensor rows = as_contiguous(dy);  // sum adds in an order that depends on strides
    dbias =
        torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(first.data(), 1), false, ScalarType::Float);
  }
  if (call.rows == 0) {
    torch::stable::zero_(dweight), torch::stable::zero_(dgate);
    return {dx, dweight, dgate, dbias};
  }
  const GateTable table(call, false);
  if (want_x) {
    GridProduct m{};
    m.rows = call.rows, m.columns = call.in, m.depth = call.out;
    m.a = strided(dy), m.b = strided(weight), m.c = strided(dx), m.x = strided(x);
    m.activation = call.activation, m.factors = table.factors();
    run(call, m, true);
  }
  if (want_weight || want_gate)
    weight_gradient(call, table, dy, want_weight ? &dweight : nullptr, want_gate ? &dgate : nullptr);
  return {dx, dweight, dgate, dbias};
}

// --- The gate ------------------------------------------------------------------------------------------------------

GateFactors factors_of(const Tensor& row, const Tensor& column, int64_t& gates) {
  const ScalarType dtype = check_first(row, "row", 2);
  check_dtype(column, "column", dtype);
  check_rank(column, "column", 2);
  STD_TORCH_CHECK(row.size(1) >= 1, "row has shape ", text_of_shape(row), "; it must be (G, R)");
  STD_TORCH_CHECK(column.size(1) >= 1 && (column.size(0) == row.size(0) || column.size(0) == 1 || row.size(0) == 1),
                  "column has shape ", text_of_shape(column), "; it must be (", row.size(0), " or 1, C)");
  gates = column.size(0) == 1 ? row.size(0) : column.size(0);
  GateFactors g{};
  g.rows = row.size(1), g.columns = column.size(1);
  // Factors are rows of one line each: their gates are the second dimension of a Strided.
  const auto lines = [](const Tensor& t) {
    Strided s = strided(t, true);
    s.stride[1] = s.stride[2], s.stride[2] = 0;
    if (t.size(1) > 1) s.stride[3] = t.stride(1);
    return s;
  };
  g.row = lines(row), g.column = lines(column);
  return g;
}

template <class F>
void for_gates(const GateFactors& g, int64_t gates, const F& run) {
  const RowParts parts(gates, 1);
  const int64_t workers = std::min(threads_for(40.0 * gates * g.rows * g.columns), parts.count());
  const int64_t size = kernels().gate_space(g);
  const Space space(std::max<int64_t>(workers, 1) * size);
  for_parts(parts.count(), workers,
            [&](int64_t i, int64_t worker) { run(g, parts.begin(i), parts.end(i), space.at(worker * size)); });
}

Tensor gate_forward(Tensor row, Tensor column) {
  int64_t gates = 0;
  GateFactors g = factors_of(row, column, gates);
  Tensor out = allocate(row, {gates, g.rows, g.columns});
  g.gate = strided(out);
  for_gates(g, gates, kernels().gate_forward);
  return out;
}

std::tuple<Tensor, Tensor> gate_backward(Tensor dgate, Tensor row, Tensor column) {
  int64_t gates = 0;
  GateFactors g = factors_of(row, column, gates);
  check_dtype(dgate, "dgate", row.scalar_type());
  check_shape(dgate, "dgate", {gates, g.rows, g.columns});
  Tensor drow = allocate(row, {gates, g.rows}, ScalarType::Float);
  Tensor dcolumn = allocate(row, {gates, g.columns}, ScalarType::Float);
  g.gate = strided(dgate);
  g.drow = static_cast<float*>(drow.mutable_data_ptr());
  g.dcolumn = static_cast<float*>(dcolumn.mutable_data_ptr());
  for_gates(g, gates, kernels().gate_backward);
  // What all gates share is summed over them.
  const auto summed = [&](const Tensor& each, const Tensor& like) {
    if (like.size(0) == gates) return each;
    Tensor sum = allocate(row, {1, like.size(1)}, ScalarType::Float);
    add_parts(static_cast<float*>(sum.mutable_data_ptr()), floats(each), 1, gates, like.size(1), like.size(1), 1);
    return sum;
  };
  return {summed(drow, row), summed(dcolumn, column)};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("hypergrid_fwd", TORCH_BOX(&mmk::forward));
  m.impl("hypergrid_bwd", TORCH_BOX(&mmk::backward));
  m.impl("hypergrid_gate_fwd", TORCH_BOX(&mmk::gate_forward));
  m.impl("hypergrid_gate_bwd", TORCH_BOX(&mmk::gate_backward));
}
