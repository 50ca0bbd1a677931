// LayerNorm with its residual addition on the CPU: checks, parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"
#include "norm/norm.h"

namespace mmk {

MMK_KERNELS_IN_USE(NormKernels, norm_kernels, kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

// One or two tensors (B, T_i, C) of one dtype, the rows of one behind those of the other.
Norm describe_rows(const std::vector<Tensor>& x, const char* name) {
  STD_TORCH_CHECK(x.size() == 1 || x.size() == 2, name, " has ", x.size(), " tensors; it must have 1 or 2");
  const ScalarType dtype = check_first(x[0], name, 3);
  Norm n{};
  n.batch = x[0].size(0), n.first = x[0].size(1), n.columns = x[0].size(2), n.length = n.first;
  STD_TORCH_CHECK(n.columns >= 1, name, " has shape ", text_of_shape(x[0]), "; its last size must be at least 1");
  n.x[0] = n.x[1] = strided(x[0]);
  if (x.size() == 2) {
    check_dtype(x[1], name, dtype);
    check_rank(x[1], name, 3);
    check_shape(x[1], name, {n.batch, x[1].size(1), n.columns});
    n.x[1] = strided(x[1]);
    n.length += x[1].size(1);
  }
  return n;
}

// (C) or, where `groups` is not negative, (groups, C); of x's dtype or float32.
Strided parameter(const OptionalTensor& t, const char* name, const Norm& n, ScalarType dtype, int64_t groups) {
  if (!t.has_value()) return {};
  check_dtype(*t, name, t->scalar_type() == ScalarType::Float ? ScalarType::Float : dtype);
  if (groups >= 0 && t->dim() == 2)
    check_shape(*t, name, {groups, n.columns});
  else
    check_shape(*t, name, {n.columns});
  return strided(*t);
}

int64_t threads_for(const Norm& n) { return mmk::threads_for(10.0 * n.batch * n.length * n.columns); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(std::vector<Tensor> x, OptionalTensor residual,
                                                   OptionalTensor residual_bias, OptionalTensor gain,
                                                   OptionalTensor bias, OptionalTensor index, double eps) {
  Norm n = describe_rows(x, "x");
  const ScalarType dtype = x[0].scalar_type();
  const std::vector<int64_t> shape{n.batch, n.length, n.columns};
  if (residual.has_value()) {
    check_dtype(*residual, "residual", dtype);
    check_shape(*residual, "residual", {n.batch, n.length, n.columns});
    n.residual = strided(*residual);
  }
  STD_TORCH_CHECK(residual.has_value() || !residual_bias.has_value(),
                  "residual_bias is given; without a residual it must be None");
  int64_t groups = n.batch;
  if (index.has_value()) {
    groups = gain.has_value() && gain->dim() == 2   ? gain->size(0)
             : bias.has_value() && bias->dim() == 2 ? bias->size(0)
                                                    : 0;
    n.index = group_index(*index, "index", n.batch, groups);
  }
  n.residual_bias = parameter(residual_bias, "residual_bias", n, dtype, -1);
  n.gain = parameter(gain, "gain", n, dtype, groups);
  n.bias = parameter(bias, "bias", n, dtype, groups);
  n.eps = static_cast<float>(eps);
  Tensor out = allocate(x[0], shape);
  Tensor sum = residual.has_value() ? allocate(x[0], shape) : allocate(x[0], {0});
  Tensor mean = allocate(x[0], {n.batch, n.length}, ScalarType::Float);
  Tensor rstd = allocate(x[0], {n.batch, n.length}, ScalarType::Float);
  n.out = static_cast<char*>(out.mutable_data_ptr());
  n.sum = static_cast<char*>(sum.mutable_data_ptr());
  n.mean = static_cast<float*>(mean.mutable_data_ptr());
  n.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const RowParts parts(n.batch * n.length, 1);
  const int64_t workers = std::min(threads_for(n), parts.count()), size = kernels().space(n.columns);
  const Space space(workers * size);
  for_parts(parts.count(), workers, [&](int64_t part, int64_t worker) {
    kernels().forward(n, parts.begin(part), parts.end(part), space.at(worker * size));
  });
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dsum, std::vector<Tensor> rows,
                                                    Tensor mean, Tensor rstd, OptionalTensor gain, OptionalTensor index,
                                                    int64_t rows_of_parameters, int64_t wanted) {
  Norm n = describe_rows(rows, "rows");
  const ScalarType dtype = rows[0].scalar_type();
  check_dtype(dout, "dout", dtype);
  check_shape(dout, "dout", {n.batch, n.length, n.columns});
  n.dout = strided(dout);
  if (dsum.has_value()) {
    check_dtype(*dsum, "dsum", dtype);
    check_shape(*dsum, "dsum", {n.batch, n.length, n.columns});
    n.dsum = strided(*dsum);
  }
  for (auto [statistic, name] : {std::pair{&mean, "mean"}, {&rstd, "rstd"}}) {
    check_dtype(*statistic, name, ScalarType::Float);
    check_shape(*statistic, name, {n.batch, n.length});
    *statistic = as_contiguous(*statistic);
  }
  n.mean = const_cast<float*>(floats(mean));
  n.rstd = const_cast<float*>(floats(rstd));
  const int64_t own_rows = index.has_value() ? rows_of_parameters : n.batch;
  if (index.has_value()) n.index = group_index(*index, "index", n.batch, own_rows);
  n.gain = parameter(gain, "gain", n, dtype, own_rows);

  // Gradients of gain, of bias, of the residual's bias: which are wanted, and whether examples have rows of their own.
  const bool gain_per_example = gain.has_value() && gain->dim() == 2;
  const bool wants[3] = {(wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0};
  const bool per_example[3] = {gain_per_example, (wanted & 16) != 0, false};
  const bool sums_wanted = wants[0] || wants[1] || wants[2];
  const int64_t groups = (wants[0] && per_example[0]) || (wants[1] && per_example[1]) ? n.batch : 1;
  auto gradient = [&](int i) {
    if (!wants[i]) return allocate(rows[0], {0}, ScalarType::Float);
    if (per_example[i]) return allocate(rows[0], {own_rows, n.columns}, ScalarType::Float);
    return allocate(rows[0], {n.columns}, ScalarType::Float);
  };
  Tensor gradients[3] = {gradient(0), gradient(1), gradient(2)};
  Tensor dx = wanted & 1 ? allocate(rows[0], {n.batch, n.length, n.columns}) : allocate(rows[0], {0});
  n.dx = wanted & 1 ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  n.wants_rows = (wanted & 1) != 0 || wants[2];

  const RowParts parts(n.batch * n.length, groups);
  const int64_t workers = std::min(threads_for(n), parts.count()), size = kernels().space(n.columns);
  const int64_t sums_size = sums_wanted ? 3 * n.columns : 0;
  const Space space(workers * size), sums(parts.count() * sums_size);
  for_parts(parts.count(), workers, [&](int64_t part, int64_t worker) {
    float* own = sums_wanted ? sums.at(part * sums_size) : nullptr;
    std::fill_n(own, sums_size, 0.0f);
    kernels().backward(n, parts.begin(part), parts.end(part), own, space.at(worker * size));
  });
  for (int i = 0; i < 3; ++i) {
    if (!wants[i]) continue;
    const int64_t examples = per_example[i] ? groups : 1;
    add_parts(static_cast<float*>(gradients[i].mutable_data_ptr()), sums.at(i * n.columns),
              per_example[i] ? own_rows : 1, examples == 0 ? 0 : parts.count() / examples, sums_size, n.columns,
              workers, per_example[i] ? n.index : nullptr, examples);
  }
  return {dx, gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("norm_fwd", TORCH_BOX(&mmk::forward));
  m.impl("norm_bwd", TORCH_BOX(&mmk::backward));
}
