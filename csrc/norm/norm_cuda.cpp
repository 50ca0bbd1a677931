// The registered ops of the norm family on CUDA tensors: checks, allocation, launches.
#include "norm/norm_cuda.h"

#include <tuple>
#include <vector>

#include "common/rows_binding.h"

namespace mmk::norm {
namespace {

Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), by_four(t)}; }

// One or two tensors (B, T_i, C), the rows of one behind those of the other.
struct Call {
  Norm n{};
  Dtype dtype;
  int64_t batch;

  Call(const std::vector<Tensor>& x, const char* name) {
    STD_TORCH_CHECK(x.size() == 1 || x.size() == 2, name, " has ", x.size(), " tensors; it must have 1 or 2");
    dtype = row_dtype(x[0], name);
    STD_TORCH_CHECK(x[0].dim() == 3, name, " has shape ", shape_text(x[0].sizes()), "; it must have 3 dimensions");
    const int64_t columns = x[0].size(2);
    STD_TORCH_CHECK(columns >= 1 && columns <= kMostColumns, name, " has shape ", shape_text(x[0].sizes()),
                    "; its last size must be 1 to ", kMostColumns);
    batch = x[0].size(0), n.first = n.length = x[0].size(1), n.columns = static_cast<int>(columns);
    n.x[0] = n.x[1] = rows_of(x[0]);
    if (x.size() == 2) {
      check_rows(x[1], name, x[0], x[0].scalar_type(), {batch, x[1].dim() == 3 ? x[1].size(1) : 0, columns});
      n.x[1] = rows_of(x[1]);
      n.length += x[1].size(1);
    }
    n.rows = batch * n.length;
  }

  Rows like(const Tensor& t, const char* name, const Tensor& x) {
    check_rows(t, name, x, x.scalar_type(), {batch, n.length, n.columns});
    return rows_of(t);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(std::vector<Tensor> x, std::optional<Tensor> residual,
                                                   std::optional<Tensor> residual_bias, std::optional<Tensor> gain,
                                                   std::optional<Tensor> bias, std::optional<Tensor> index,
                                                   double eps) {
  Call call(x, "x");
  const OnDevice device(x[0]);
  Norm& n = call.n;
  STD_TORCH_CHECK(residual.has_value() || !residual_bias.has_value(),
                  "residual_bias is given; without a residual it must be None");
  if (residual) n.residual = call.like(*residual, "residual", x[0]);
  n.residual_bias = row_parameter(residual_bias, "residual_bias", x[0], n.columns, -1);
  int64_t groups = call.batch;
  if (index) {
    groups = gain && gain->dim() == 2 ? gain->size(0) : bias && bias->dim() == 2 ? bias->size(0) : 0;
    n.index = row_index(*index, "index", x[0], call.batch);
  }
  n.gain = row_parameter(gain, "gain", x[0], n.columns, groups);
  n.bias = row_parameter(bias, "bias", x[0], n.columns, groups);
  n.eps = static_cast<float>(eps);
  const ScalarType type = x[0].scalar_type();
  const std::vector<int64_t> shape{call.batch, n.length, n.columns};
  Tensor out = empty(x[0], shape, type);
  Tensor sum = residual ? empty(x[0], shape, type) : empty(x[0], {0}, type);
  Tensor mean = empty(x[0], {call.batch, n.length}, ScalarType::Float);
  Tensor rstd = empty(x[0], {call.batch, n.length}, ScalarType::Float);
  n.out = out.mutable_data_ptr(), n.sum = sum.mutable_data_ptr(), n.mean = floats(mean), n.rstd = floats(rstd);
  check_blocks(n.rows, "norm_fwd");
  if (n.rows > 0) check_launch(mmk_norm_forward(call.dtype, &n, device.stream), "norm_fwd");
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dsum, std::vector<Tensor> rows,
                                                    Tensor mean, Tensor rstd, std::optional<Tensor> gain,
                                                    std::optional<Tensor> index, int64_t rows_of_parameters,
                                                    int64_t wanted) {
  Call call(rows, "rows");
  const OnDevice device(rows[0]);
  Norm& n = call.n;
  n.dout = call.like(dout, "dout", rows[0]);
  if (dsum) n.dsum = call.like(*dsum, "dsum", rows[0]);
  const int64_t own_rows = index ? rows_of_parameters : call.batch;
  if (index) n.index = row_index(*index, "index", rows[0], call.batch);
  n.gain = row_parameter(gain, "gain", rows[0], n.columns, own_rows);
  check_rows(mean, "mean", rows[0], ScalarType::Float, {call.batch, n.length});
  check_rows(rstd, "rstd", rows[0], ScalarType::Float, {call.batch, n.length});
  mean = torch::stable::contiguous(mean), rstd = torch::stable::contiguous(rstd);
  n.mean = floats(mean), n.rstd = floats(rstd);

  const bool wants[3] = {(wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0};
  const bool per_example[3] = {gain && gain->dim() == 2, (wanted & 16) != 0, false};
  const bool any = wants[0] || wants[1] || wants[2];
  const int64_t groups = (wants[0] && per_example[0]) || (wants[1] && per_example[1]) ? call.batch : 1;
  Tensor dx = wanted & 1 ? empty(rows[0], {call.batch, n.length, n.columns}, rows[0].scalar_type())
                         : empty(rows[0], {0}, rows[0].scalar_type());
  n.dx = wanted & 1 ? dx.mutable_data_ptr() : nullptr;
  std::vector<Tensor> gradients;
  for (int i = 0; i < 3; ++i) {
    if (!wants[i])
      gradients.push_back(empty(rows[0], {0}, ScalarType::Float));
    else if (per_example[i])
      gradients.push_back(empty(rows[0], {own_rows, n.columns}, ScalarType::Float));
    else
      gradients.push_back(empty(rows[0], {n.columns}, ScalarType::Float));
  }
  if (n.rows == 0) {
    for (Tensor& g : gradients) torch::stable::zero_(g);
    return {dx, gradients[0], gradients[1], gradients[2]};
  }
  const DeviceRowParts parts(n.rows, groups);
  const int64_t all_parts = groups * parts.count;
  n.group_rows = parts.rows, n.parts = parts.count, n.size = parts.size;
  const Tensor sums = empty(rows[0], {3, any ? all_parts : 0, n.columns}, ScalarType::Float);
  for (int i = 0; i < 3; ++i) n.sums[i] = wants[i] ? floats(sums) + i * all_parts * n.columns : nullptr;
  check_blocks(all_parts, "norm_bwd");
  check_launch(mmk_norm_backward(call.dtype, &n, all_parts, device.stream), "norm_bwd");
  for (int i = 0; i < 3; ++i) {
    if (!wants[i]) continue;
    const int64_t examples = per_example[i] ? groups : 1;
    check_launch(mmk_sum_rows(n.sums[i], floats(gradients[i]), per_example[i] ? own_rows : 1, all_parts / examples,
                              n.columns, per_example[i] ? n.index : nullptr, examples, device.stream),
                 "norm_bwd");
  }
  return {dx, gradients[0], gradients[1], gradients[2]};
}

MMK_REGISTER_CUDA(m) {
  m.impl("norm_fwd", TORCH_BOX(&forward));
  m.impl("norm_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::norm
