// gelu(x + bias) on the CPU: checks, parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "activation/gelu.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"

namespace mmk {

MMK_KERNELS_IN_USE(GeluKernels, gelu_kernels, kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; expected *= t.size(i--))
    if (t.size(i) != 1 && t.stride(i) != expected) return false;
  return true;
}

// What a kernel sees of x and of a gradient like it: rows numbered over three dimensions. Where nothing depends on the
// column, rows are cut anew out of contiguous tensors, so that short ones cost nothing.
class Rows {
 public:
  Rows(const Tensor& x, const OptionalTensor& bias, const Tensor* dout, bool by_column) {
    g_.bias = strided(bias);
    const bool whole = !by_column && is_contiguous(x) && (dout == nullptr || is_contiguous(*dout));
    const int64_t count = x.numel();
    if (whole && count > 0) {
      g_.columns = std::min<int64_t>(count, 4096);
      g_.rows = count / g_.columns;
      rest_ = count % g_.columns;
      g_.sizes[0] = g_.sizes[1] = 1, g_.sizes[2] = g_.rows;
      g_.x = flat(x);
      if (dout != nullptr) g_.dout = flat(*dout);
      return;
    }
    g_.columns = x.size(-1);
    g_.rows = count / g_.columns;
    tensors_[0] = view(x), g_.x = strided(*tensors_[0]);
    for (int i = 0; i < 3; ++i) g_.sizes[i] = tensors_[0]->size(i);
    if (dout != nullptr) tensors_[1] = view(*dout), g_.dout = strided(*tensors_[1]);
  }

  // run(Gelu) for all rows, and for what is left of contiguous ones.
  template <class F>
  void operator()(bool tanh, const Tensor* out, const F& run) {
    g_.tanh = tanh;
    g_.out = out == nullptr ? nullptr : static_cast<char*>(out->mutable_data_ptr());
    run(g_);
    if (rest_ == 0) return;
    const int64_t bytes = g_.rows * g_.columns * g_.x.item_bytes();
    Gelu rest = g_;
    rest.rows = rest.sizes[2] = 1, rest.columns = rest_;
    rest.x.data += bytes;
    if (rest.dout.data != nullptr) rest.dout.data += bytes;
    if (rest.out != nullptr) rest.out += bytes;
    run(rest);
  }

 private:
  Strided flat(const Tensor& t) const {
    Strided s;
    s.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    s.dtype = dtype_of(t);
    s.stride[2] = g_.columns, s.stride[3] = 1;
    return s;
  }

  // With three dimensions of rows: a copy where there are more of them.
  static Tensor view(const Tensor& t) {
    const int64_t columns = t.size(-1), rows = t.numel() / columns;
    if (t.dim() > 4) return torch::stable::view(as_contiguous(t), {1, 1, rows, columns});
    Tensor four = t;
    while (four.dim() < 4) four = torch::stable::unsqueeze(four, 0);
    return four;
  }

  Gelu g_{};
  int64_t rest_ = 0;
  std::optional<Tensor> tensors_[2];
};

void check(const Tensor& x, const OptionalTensor& bias) {
  check_first(x, "x", x.dim());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x has shape ", text_of_shape(x),
                  "; its last size must be at least 1");
  if (!bias.has_value()) return;
  check_dtype(*bias, "bias", bias->scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type());
  check_shape(*bias, "bias", {x.size(-1)});
}

int64_t threads_for(const Gelu& g) { return mmk::threads_for(30.0 * g.rows * g.columns); }

Tensor forward(Tensor x, OptionalTensor bias, bool tanh) {
  check(x, bias);
  Tensor out = allocate(x, x.sizes());
  Rows(x, bias, nullptr, bias.has_value())(tanh, &out, [](const Gelu& g) {
    const RowParts parts(g.rows, 1);
    const int64_t workers = std::min(threads_for(g), parts.count()), size = kernels().space(g.columns);
    const Space space(workers * size);
    for_parts(parts.count(), workers, [&](int64_t part, int64_t worker) {
      kernels().forward(g, parts.begin(part), parts.end(part), space.at(worker * size));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor x, OptionalTensor bias, bool tanh, int64_t wanted) {
  check(x, bias);
  check_dtype(dout, "dout", x.scalar_type());
  bool equal = dout.dim() == x.dim();
  for (int64_t i = 0; equal && i < x.dim(); ++i) equal = dout.size(i) == x.size(i);
  STD_TORCH_CHECK(equal, "dout has shape ", text_of_shape(dout), "; it must be that of x, ", text_of_shape(x));
  const bool wants_bias = (wanted & 2) != 0 && bias.has_value(), wants_rows = (wanted & 1) != 0;
  Tensor dx = wants_rows ? allocate(x, x.sizes()) : allocate(x, {0});
  Tensor dbias = allocate(x, {wants_bias ? x.size(-1) : 0}, ScalarType::Float);
  Rows(x, bias, &dout, bias.has_value())(tanh, wants_rows ? &dx : nullptr, [&](const Gelu& g) {
    const RowParts parts(g.rows, 1);
    const int64_t workers = std::min(threads_for(g), parts.count()), size = kernels().space(g.columns);
    const int64_t sums_size = wants_bias ? g.columns : 0;
    const Space space(workers * size), sums(parts.count() * sums_size);
    for_parts(parts.count(), workers, [&](int64_t part, int64_t worker) {
      float* own = wants_bias ? sums.at(part * sums_size) : nullptr;
      std::fill_n(own, sums_size, 0.0f);
      kernels().backward(g, parts.begin(part), parts.end(part), own, space.at(worker * size));
    });
    if (wants_bias)
      add_parts(static_cast<float*>(dbias.mutable_data_ptr()), sums.at(0), 1, parts.count(), sums_size, g.columns,
                workers);
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&mmk::forward));
  m.impl("bias_gelu_bwd", TORCH_BOX(&mmk::backward));
}
