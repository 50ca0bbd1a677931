// Linear layers on the CPU, one or a list of them in one pass over the threads: checks, parts, the registered ops.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "linear/linear.h"

namespace mmk {

MMK_KERNELS_IN_USE(LinearKernels, linear_kernels, kernels)

namespace {

// Products, cut into parts that threads take when they are free.
class Products {
 public:
  void add(const Product& m) {
    if (m.rows > 0 && m.columns > 0) whole_.push_back(m);
  }

  void run() {
    double operations = 0.0;
    for (const Product& m : whole_) operations += 2.0 * m.rows * m.columns * m.depth;
    const int64_t threads = threads_for(operations);
    const Space packed = share(threads);
    std::vector<Product> parts;
    int64_t size = 0;
    for (const Product& m : whole_) cut(m, threads, parts);
    for (const Product& m : parts) size = std::max(size, kernels().space(m));
    const int64_t count = static_cast<int64_t>(parts.size()), workers = std::min(threads, count);
    const Space space(workers * size);
    for_parts(count, workers,
              [&](int64_t part, int64_t worker) { kernels().multiply(parts[part], space.at(worker * size)); });
  }

 private:
  // Packs the right operands, where they are not large, of products that have rows enough for all threads: then every
  // operand is copied once. Others are cut by their columns too, and each part packs what it needs.
  Space share(int64_t threads) {
    constexpr int64_t kColumns = 96, kMost = 4 << 20;
    const auto is_shared = [&](const Product& m) {
      return m.rows >= 2 * threads * kSharedRows && kernels().packed_space(m) <= kMost;
    };
    std::vector<std::pair<Product*, int64_t>> pieces;
    int64_t size = 0;
    for (Product& m : whole_) {
      if (!is_shared(m)) continue;
      for (int64_t j = 0; j < m.columns; j += kColumns) pieces.push_back({&m, j});
      size += kernels().packed_space(m);
    }
    Space packed(size);
    float* to = packed.at(0);
    for (Product& m : whole_)
      if (is_shared(m)) m.packed = to, to += kernels().packed_space(m);
    for_parts(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i, int64_t) {
      const auto [m, j] = pieces[i];
      kernels().pack(*m, j, std::min(j + kColumns, m->columns), const_cast<float*>(m->packed));
    });
    return packed;
  }

  static void cut(const Product& m, int64_t threads, std::vector<Product>& parts) {
    auto [rows, columns] = ProductCut(m.rows, m.columns, 768, threads);
    if (m.packed != nullptr) {
      columns = m.columns;
      rows = round_up(ceil_div(m.rows, std::max<int64_t>(m.rows / (2 * kSharedRows), 2 * threads)), 12);
    }
    for (int64_t j = 0; j < m.columns; j += columns)
      for (int64_t i = 0; i < m.rows; i += rows) {
        Product part = m;
        part.rows = std::min(rows, m.rows - i), part.columns = std::min(columns, m.columns - j);
        part.a.data = m.a.at(0, 0, i, 0), part.b.data = m.b.at(0, 0, 0, j), part.c.data = m.c.at(0, 0, i, j);
        if (m.bias.data != nullptr) part.bias.data = m.bias.at(0, 0, 0, j);
        part.a_sums = m.a_sums == nullptr || j > 0 ? nullptr : m.a_sums + i;
        parts.push_back(part);
      }
  }

  static constexpr int64_t kSharedRows = 96;  // of a part, at least
  std::vector<Product> whole_;
};

void check_problem(const Tensor& x, const Tensor& weight) {
  const ScalarType dtype = check_first(x, "x", 2);
  check_dtype(weight, "weight", dtype);
  check_rank(weight, "weight", 2);
  check_shape(weight, "weight", {weight.size(0), x.size(1)});
}

void check_counts(size_t count, size_t expected, const char* name) {
  STD_TORCH_CHECK(count == expected, name, " has ", count, " elements; it must have one for each x, ", expected);
}

std::vector<Tensor> forward(std::vector<Tensor> x, std::vector<Tensor> weight, std::vector<Tensor> bias) {
  check_counts(weight.size(), x.size(), "weight");
  check_counts(bias.size(), x.size(), "bias");
  std::vector<Tensor> out;
  Products products;
  for (size_t i = 0; i < x.size(); ++i) {
    check_problem(x[i], weight[i]);
    const int64_t rows = x[i].size(0), depth = x[i].size(1), columns = weight[i].size(0);
    out.push_back(allocate(x[i], {rows, columns}));
    Product m{rows, columns, depth, strided(x[i]), transposed(strided(weight[i])), strided(out[i]), {}, nullptr};
    if (bias[i].numel() > 0) {
      check_dtype(bias[i], "bias", bias[i].scalar_type() == ScalarType::Float ? ScalarType::Float : x[i].scalar_type());
      check_shape(bias[i], "bias", {columns});
      m.bias = strided(bias[i]);
    }
    products.add(m);
  }
  products.run();
  return out;
}

std::vector<Tensor> backward(std::vector<Tensor> dout, std::vector<Tensor> x, std::vector<Tensor> weight,
                             std::vector<int64_t> wanted) {
  check_counts(dout.size(), x.size(), "dout");
  check_counts(weight.size(), x.size(), "weight");
  check_counts(wanted.size(), x.size(), "wanted");
  std::vector<Tensor> gradients;
  Products products;
  for (size_t i = 0; i < x.size(); ++i) {
    check_problem(x[i], weight[i]);
    const int64_t rows = x[i].size(0), in = x[i].size(1), out = weight[i].size(0);
    check_dtype(dout[i], "dout", x[i].scalar_type());
    check_shape(dout[i], "dout", {rows, out});
    const bool of_x = wanted[i] & 1, of_weight = wanted[i] & 2, of_bias = wanted[i] & 4;
    const auto gradient = [&](bool is_wanted, std::initializer_list<int64_t> sizes) {
      return is_wanted ? allocate(x[i], sizes) : allocate(x[i], {0});
    };
    Tensor dx = gradient(of_x, {rows, in}), dweight = gradient(of_weight, {out, in});
    Tensor dbias = allocate(x[i], {of_bias ? out : 0}, ScalarType::Float);
    float* const sums = of_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
    const Strided of_out = strided(dout[i]);
    if (of_x) products.add({rows, in, out, of_out, strided(weight[i]), strided(dx), {}, nullptr});
    STD_TORCH_CHECK(of_weight || !of_bias, "wanted is ", wanted[i], "; dbias is summed on the way to dweight");
    if (of_weight) products.add({out, in, rows, transposed(of_out), strided(x[i]), strided(dweight), {}, sums});
    gradients.insert(gradients.end(), {dx, dweight, dbias});
  }
  products.run();
  return gradients;
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&mmk::forward));
  m.impl("linear_bwd", TORCH_BOX(&mmk::backward));
}
