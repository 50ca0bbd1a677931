// The registered ops of the activation family on CUDA tensors: checks, allocation, launches.
#include "activation/gelu_cuda.h"

#include <tuple>

#include "common/rows_binding.h"

namespace mmk::activation {
namespace {

bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; expected *= t.size(i--))
    if (t.size(i) != 1 && t.stride(i) != expected) return false;
  return true;
}

// x, and a gradient like it, as matrices. Without a bias a contiguous tensor is one row.
struct Call {
  Gelu g{};
  Dtype dtype;
  std::optional<Tensor> kept[2];  // copies where dimensions do not fall together, and views

  Call(const Tensor& x, const std::optional<Tensor>& bias, const Tensor* dout, bool tanh) {
    dtype = row_dtype(x, "x");
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x has shape ", shape_text(x.sizes()),
                    "; its last size must be at least 1");
    g.bias = row_parameter(bias, "bias", x, x.size(-1), -1);
    if (dout != nullptr) check_rows(*dout, "dout", x, x.scalar_type(), x.sizes());
    const bool whole = !bias && is_contiguous(x) && (dout == nullptr || is_contiguous(*dout));
    g.columns = whole ? x.numel() : x.size(-1);
    g.rows = g.columns == 0 ? 0 : x.numel() / g.columns;
    g.tanh = tanh;
    g.x = matrix(x, kept[0]);
    if (dout != nullptr) g.dout = matrix(*dout, kept[1]);
  }

  Matrix matrix(const Tensor& t, std::optional<Tensor>& keep) {
    if (g.rows == 0) return {};
    keep = t;
    if (t.dim() != 2 || t.size(0) != g.rows)
      keep = torch::stable::view(is_contiguous(t) ? t : torch::stable::contiguous(t), {g.rows, g.columns});
    return {keep->const_data_ptr(), keep->stride(0), keep->stride(1), by_four(*keep)};
  }
};

int64_t blocks_of(const Gelu& g, int64_t parts) { return parts * ((g.columns + 127) / 128); }

Tensor forward(Tensor x, std::optional<Tensor> bias, bool tanh) {
  const OnDevice device(x);
  Call call(x, bias, nullptr, tanh);
  Tensor out = empty(x, x.sizes(), x.scalar_type());
  call.g.out = out.mutable_data_ptr();
  check_blocks(blocks_of(call.g, call.g.rows), "bias_gelu_fwd");
  if (call.g.rows > 0) check_launch(mmk_gelu_forward(call.dtype, &call.g, device.stream), "bias_gelu_fwd");
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor x, std::optional<Tensor> bias, bool tanh, int64_t wanted) {
  const OnDevice device(x);
  Call call(x, bias, &dout, tanh);
  Gelu& g = call.g;
  const bool wants_bias = (wanted & 2) != 0 && bias.has_value();
  Tensor dx = wanted & 1 ? empty(x, x.sizes(), x.scalar_type()) : empty(x, {0}, x.scalar_type());
  Tensor dbias = empty(x, {wants_bias ? x.size(-1) : 0}, ScalarType::Float);
  if (g.rows == 0) return {dx, torch::stable::zero_(dbias)};
  const DeviceRowParts parts(g.rows, 1);
  const Tensor sums = empty(x, {wants_bias ? parts.count : 0, g.columns}, ScalarType::Float);
  g.out = wanted & 1 ? dx.mutable_data_ptr() : nullptr;
  g.sums = wants_bias ? floats(sums) : nullptr;
  g.size = parts.size;
  check_blocks(blocks_of(g, parts.count), "bias_gelu_bwd");
  check_launch(mmk_gelu_backward(call.dtype, &g, parts.count, device.stream), "bias_gelu_bwd");
  if (wants_bias)
    check_launch(mmk_sum_rows(g.sums, floats(dbias), 1, parts.count, g.columns, nullptr, 1, device.stream),
                 "bias_gelu_bwd");
  return {dx, dbias};
}

MMK_REGISTER_CUDA(m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&forward));
  m.impl("bias_gelu_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::activation
