// The registered ops of AdapterFusion's attention on CUDA tensors: checks, allocation, launches.
#include "adapter/fusion_cuda.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/rows_binding.h"

namespace mmk::adapter {
namespace {

struct FusionCall {
  Fusion f{};
  Dtype dtype;
  std::vector<int64_t> shape;  // (B, T, C)
  std::vector<Tensor> held;    // copies

  FusionCall(const Tensor& query, const Tensor& outputs, const std::optional<Tensor>& seed, double scale,
             double dropout_p)
      : dtype(row_dtype(query, "query")) {
    STD_TORCH_CHECK(query.dim() == 3 && query.size(2) >= 1 && query.size(2) < INT32_MAX / 8, "query has shape ",
                    shape_text(query.sizes()), "; it must be (B, T, C) with C of 1 to 2^28");
    STD_TORCH_CHECK(outputs.dim() == 4 && outputs.size(2) >= 1 && outputs.size(2) <= kMostFused, "outputs has shape ",
                    shape_text(outputs.sizes()), "; it must be (B, T, A, C) with A of 1 to ", kMostFused);
    shape = {query.size(0), query.size(1), query.size(2)};
    f.length = shape[1], f.rows = shape[0] * shape[1];
    f.channels = static_cast<int>(shape[2]), f.adapters = static_cast<int>(outputs.size(2));
    f.query = rows_of(query, "query", query, shape);
    f.outputs = rows_of(outputs, "outputs", query, {shape[0], shape[1], f.adapters, shape[2]});
    f.scale = static_cast<float>(scale);
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    if (!seed) return;
    check_rows(*seed, "seed", query, ScalarType::Long, {1});
    f.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    f.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
    f.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
  }

  FusedRows rows_of(const Tensor& t, const char* name, const Tensor& like, const std::vector<int64_t>& sizes) {
    check_rows(t, name, like, like.scalar_type(), sizes);
    Tensor rows = t;
    const int64_t vector = dtype == Dtype::fp32 ? 4 : 8;
    if (t.dim() > 2 && !by_elements(t, f.channels % vector == 0 ? vector : 1)) {
      rows = empty(t, sizes, t.scalar_type());
      torch::stable::copy_(rows, t);
      held.push_back(rows);
    }
    return {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.dim() == 4 ? rows.stride(2) : 0};
  }
};

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor outputs, std::optional<Tensor> offset,
                                   std::optional<Tensor> seed, double scale, double dropout_p) {
  FusionCall call(query, outputs, seed, scale, dropout_p);
  const OnDevice device(query);
  Fusion& f = call.f;
  if (offset) f.offset = call.rows_of(*offset, "offset", query, {call.shape[0], call.shape[1]});
  Tensor out = empty(query, call.shape, query.scalar_type());
  Tensor weights = empty(query, {call.shape[0], call.shape[1], f.adapters}, ScalarType::Float);
  f.out = out.mutable_data_ptr(), f.weights = floats(weights);
  check_blocks(f.rows, "adapter_fusion_fwd");
  check_launch(mmk_adapter_fusion_forward(call.dtype, &f, device.stream), "adapter_fusion_fwd");
  return {out, weights};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Tensor query, Tensor outputs, Tensor weights,
                                            std::optional<Tensor> seed, double scale, double dropout_p,
                                            int64_t wanted) {
  FusionCall call(query, outputs, seed, scale, dropout_p);
  const OnDevice device(query);
  Fusion& f = call.f;
  f.dout = call.rows_of(dout, "dout", query, call.shape);
  check_rows(weights, "weights", query, ScalarType::Float, {call.shape[0], call.shape[1], f.adapters});
  weights = torch::stable::contiguous(weights);
  f.weights = floats(weights);
  const auto result = [&](int bit, const std::vector<int64_t>& shape, void*& data) {
    Tensor t = empty(query, wanted & bit ? shape : std::vector<int64_t>{0}, query.scalar_type());
    data = wanted & bit ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  Tensor dquery = result(1, call.shape, f.dquery);
  Tensor doutputs = result(2, {call.shape[0], call.shape[1], f.adapters, call.shape[2]}, f.doutputs);
  Tensor doffset = result(4, {call.shape[0], call.shape[1]}, f.doffset);
  check_blocks(f.rows, "adapter_fusion_bwd");
  if (wanted) check_launch(mmk_adapter_fusion_backward(call.dtype, &f, device.stream), "adapter_fusion_bwd");
  return {dquery, doutputs, doffset};
}

MMK_REGISTER_CUDA(m) {
  m.impl("adapter_fusion_fwd", TORCH_BOX(&forward));
  m.impl("adapter_fusion_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::adapter
