// AdapterFusion's attention on the CPU: checks, rows over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "adapter/fusion.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"

namespace mmk {

MMK_KERNELS_IN_USE(AdapterFusionKernels, fusion_kernels, kernels)

namespace {

AdapterFusion describe(const Tensor& query, const Tensor& outputs, const std::optional<Tensor>& seed, double scale,
                       double dropout_p) {
  const ScalarType dtype = check_first(query, "query", 3);
  check_dtype(outputs, "outputs", dtype), check_rank(outputs, "outputs", 4);
  AdapterFusion f{};
  f.length = query.size(1), f.channels = query.size(2), f.adapters = outputs.size(2);
  check_shape(outputs, "outputs", {query.size(0), f.length, f.adapters, f.channels});
  STD_TORCH_CHECK(f.channels >= 1 && f.adapters >= 1, "outputs has shape ", text_of_shape(outputs),
                  "; it must have one adapter and one channel or more");
  f.scale = static_cast<float>(scale);
  f.query = strided(query), f.outputs = strided(outputs);
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
  if (!seed) return f;
  check_dtype(*seed, "seed", ScalarType::Long), check_shape(*seed, "seed", {1});
  f.dropout = true;
  f.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  f.threshold = static_cast<uint32_t>(std::min<uint64_t>(std::nearbyint(dropout_p * 4294967296.0), 0xFFFFFFFF));
  f.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
  return f;
}

template <class F>
void for_rows(const AdapterFusion& f, int64_t rows, const F& run) {
  const RowParts parts(rows, 1);
  const int64_t workers = std::min(threads_for(6.0 * rows * f.adapters * f.channels), parts.count());
  const int64_t size = kernels().space(f);
  const Space space(workers * size);
  for_parts(parts.count(), workers,
            [&](int64_t part, int64_t worker) { run(f, parts.begin(part), parts.end(part), space.at(worker * size)); });
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor outputs, std::optional<Tensor> offset,
                                   std::optional<Tensor> seed, double scale, double dropout_p) {
  AdapterFusion f = describe(query, outputs, seed, scale, dropout_p);
  const int64_t batch = query.size(0);
  if (offset) {
    check_dtype(*offset, "offset", query.scalar_type()), check_shape(*offset, "offset", {batch, f.length});
    f.offset = strided(*offset);
  }
  Tensor out = allocate(query, {batch, f.length, f.channels});
  Tensor weights = allocate(query, {batch, f.length, f.adapters}, ScalarType::Float);
  f.out = static_cast<char*>(out.mutable_data_ptr());
  f.weights = static_cast<float*>(weights.mutable_data_ptr());
  for_rows(f, batch * f.length, kernels().forward);
  return {out, weights};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Tensor query, Tensor outputs, Tensor weights,
                                            std::optional<Tensor> seed, double scale, double dropout_p,
                                            int64_t wanted) {
  AdapterFusion f = describe(query, outputs, seed, scale, dropout_p);
  const int64_t batch = query.size(0);
  check_dtype(dout, "dout", query.scalar_type()), check_shape(dout, "dout", {batch, f.length, f.channels});
  check_dtype(weights, "weights", ScalarType::Float), check_shape(weights, "weights", {batch, f.length, f.adapters});
  weights = as_contiguous(weights);
  f.dout = strided(dout), f.weights = const_cast<float*>(floats(weights));
  const auto result = [&](int bit, std::initializer_list<int64_t> shape, char*& data) {
    if (!(wanted & bit)) return allocate(query, {0});
    Tensor t = allocate(query, shape);
    data = static_cast<char*>(t.mutable_data_ptr());
    return t;
  };
  Tensor dquery = result(1, {batch, f.length, f.channels}, f.dquery);
  Tensor doutputs = result(2, {batch, f.length, f.adapters, f.channels}, f.doutputs);
  Tensor doffset = result(4, {batch, f.length}, f.doffset);
  for_rows(f, batch * f.length, kernels().backward);
  return {dquery, doutputs, doffset};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("adapter_fusion_fwd", TORCH_BOX(&mmk::forward));
  m.impl("adapter_fusion_bwd", TORCH_BOX(&mmk::backward));
}
