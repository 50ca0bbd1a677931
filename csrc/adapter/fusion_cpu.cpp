// AdapterFusion's attention on the CPU: checks, rows over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "adapter/fusion.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"

namespace mmk {

MMK_KERNELS_IN_USE(AdapterFusionKernels, fusion_kernels, kernels)

namespace {

AdapterFusion describe(const Tensor& query, const Tensor& outputs, double scale) {
  const ScalarType dtype = check_first(query, "query", 3);
  check_dtype(outputs, "outputs", dtype), check_rank(outputs, "outputs", 4);
  AdapterFusion f{};
  f.length = query.size(1), f.channels = query.size(2), f.adapters = outputs.size(2);
  check_shape(outputs, "outputs", {query.size(0), f.length, f.adapters, f.channels});
  STD_TORCH_CHECK(f.channels >= 1 && f.adapters >= 1, "outputs has shape ", text_of_shape(outputs),
                  "; it must have one adapter and one channel or more");
  f.scale = static_cast<float>(scale);
  f.query = strided(query), f.outputs = strided(outputs);
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

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor outputs, double scale) {
  AdapterFusion f = describe(query, outputs, scale);
  const int64_t batch = query.size(0);
  Tensor out = allocate(query, {batch, f.length, f.channels});
  Tensor weights = allocate(query, {batch, f.length, f.adapters}, ScalarType::Float);
  f.out = static_cast<char*>(out.mutable_data_ptr());
  f.weights = static_cast<float*>(weights.mutable_data_ptr());
  for_rows(f, batch * f.length, kernels().forward);
  return {out, weights};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor query, Tensor outputs, Tensor weights, double scale,
                                    bool want_query, bool want_outputs) {
  AdapterFusion f = describe(query, outputs, scale);
  const int64_t batch = query.size(0);
  check_dtype(dout, "dout", query.scalar_type()), check_shape(dout, "dout", {batch, f.length, f.channels});
  check_dtype(weights, "weights", ScalarType::Float), check_shape(weights, "weights", {batch, f.length, f.adapters});
  weights = as_contiguous(weights);
  f.dout = strided(dout), f.weights = const_cast<float*>(floats(weights));
  Tensor dquery = want_query ? allocate(query, {batch, f.length, f.channels}) : allocate(query, {0});
  Tensor doutputs = want_outputs ? allocate(query, {batch, f.length, f.adapters, f.channels}) : allocate(query, {0});
  f.dquery = want_query ? static_cast<char*>(dquery.mutable_data_ptr()) : nullptr;
  f.doutputs = want_outputs ? static_cast<char*>(doutputs.mutable_data_ptr()) : nullptr;
  for_rows(f, batch * f.length, kernels().backward);
  return {dquery, doutputs};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("adapter_fusion_fwd", TORCH_BOX(&mmk::forward));
  m.impl("adapter_fusion_bwd", TORCH_BOX(&mmk::backward));
}
