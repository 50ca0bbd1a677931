// Adapters on the CPU: checks, rows by their adapters, parts over threads, the registered ops.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "adapter/adapter.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sums.h"

namespace mmk {

MMK_KERNELS_IN_USE(AdapterKernels, adapter_kernels, kernels)

namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGradients = 13;

// The arguments that forward and backward share, checked.
struct Call {
  AdapterProblem p{};
  const Tensor &x, &w_down, &w_up;
  const OptionalTensor &b_down, &b_up, &scale;
  float factor;
  int64_t adapters;
  ScalarType dtype;
  // Rows by their adapters: those of adapter a are order[begins[a]] to order[begins[a + 1]]; the last group has none.
  std::vector<int64_t> order, begins;

  Call(const Tensor& x, const OptionalTensor& input_residual, const OptionalTensor& residual, const Tensor& w_down,
       const OptionalTensor& b_down, const Tensor& w_up, const OptionalTensor& b_up, const OptionalTensor& norm_weight,
       const OptionalTensor& norm_bias, const OptionalTensor& out_weight, const OptionalTensor& out_bias,
       const OptionalTensor& scale, const OptionalTensor& gate, const OptionalTensor& index, const OptionalTensor& seed,
       int64_t skip, int64_t activation, double eps, double out_eps, double factor, double dropout_p)
      : x(x), w_down(w_down), w_up(w_up), b_down(b_down), b_up(b_up), scale(scale), factor(factor) {
    dtype = check_first(x, "x", 3);
    const int64_t batch = x.size(0);
    p.length = x.size(1), p.channels = x.size(2), p.rows = batch * p.length;
    STD_TORCH_CHECK(p.channels >= 1, "x has shape ", text_of_shape(x), "; its last size must be at least 1");
    p.x = strided(x);
    p.input_residual = rows_of(input_residual, "input_residual"), p.residual = rows_of(residual, "residual");
    check_dtype(w_down, "w_down", dtype), check_dtype(w_up, "w_up", dtype);
    const bool bank = w_down.dim() == 3;
    STD_TORCH_CHECK(bank || w_down.dim() == 2, "w_down has shape ", text_of_shape(w_down),
                    "; it must have 2 or 3 dimensions");
    adapters = bank ? w_down.size(0) : 1, p.bottleneck = w_down.size(w_down.dim() - 2);
    STD_TORCH_CHECK(p.bottleneck >= 1, "w_down has shape ", text_of_shape(w_down), "; r must be at least 1");
    if (bank) {
      check_shape(w_down, "w_down", {adapters, p.bottleneck, p.channels});
      check_shape(w_up, "w_up", {adapters, p.channels, p.bottleneck});
    } else {
      check_shape(w_down, "w_down", {p.bottleneck, p.channels}), check_shape(w_up, "w_up", {p.channels, p.bottleneck});
    }
    for (const auto& [bias, name, size] :
         {std::tuple{&b_down, "b_down", p.bottleneck}, std::tuple{&b_up, "b_up", p.channels}}) {
      if (!bias->has_value()) continue;
      check_parameter(**bias, name);
      bank ? check_shape(**bias, name, {adapters, size}) : check_shape(**bias, name, {size});
    }
    p.norm_weight = vector_of(norm_weight, "norm_weight"), p.norm_bias = vector_of(norm_bias, "norm_bias");
    p.out_weight = vector_of(out_weight, "out_weight"), p.out_bias = vector_of(out_bias, "out_bias");
    if (scale.has_value()) {
      check_parameter(*scale, "scale"), check_rank(*scale, "scale", 2);
      STD_TORCH_CHECK(
          (scale->size(0) == 1 || scale->size(0) == adapters) && (scale->size(1) == 1 || scale->size(1) == p.channels),
          "scale has shape ", text_of_shape(*scale), "; it must be (1 or ", adapters, ", 1 or ", p.channels, ")");
    }
    if (gate.has_value()) {
      check_parameter(*gate, "gate");
      p.gate = strided(*gate);
      if (check_of_rows(*gate, "gate")) p.gate.stride[2] = p.gate.stride[3], p.gate.stride[3] = 0;
    }
    STD_TORCH_CHECK(index.has_value() == bank,
                    bank ? "index is absent; a bank of adapters needs one" : "index is given; one adapter has none");
    if (bank) sort_rows(*index);
    STD_TORCH_CHECK(skip >= 0 && skip <= 7 && (input_residual.has_value() || !(skip & 2)) &&
                        (norm_weight.has_value() || !(skip & 4)),
                    "skip is ", skip, "; it must be a sum of 1, 2 with input_residual and 4 with norm_weight");
    STD_TORCH_CHECK(activation >= 0 && activation <= 6, "activation is ", activation, "; it must be 0 to 6");
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
    p.skip = skip, p.activation = activation;
    p.eps = static_cast<float>(eps), p.out_eps = static_cast<float>(out_eps);
    if (dropout_p == 0.0 || !seed) return;
    check_dtype(*seed, "seed", ScalarType::Long), check_shape(*seed, "seed", {1});
    p.dropout = true;
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    p.threshold = static_cast<uint32_t>(std::min<uint64_t>(std::nearbyint(dropout_p * 4294967296.0), 0xFFFFFFFF));
    p.gain = static_cast<float>(1.0 / (1.0 - dropout_p));
  }

  AdapterWeights weights(int64_t adapter) const {
    AdapterWeights w{};
    w.down = strided(w_down), w.up = strided(w_up), w.factor = factor;
    w.down.data = w.down.at(0, adapter), w.up.data = w.up.at(0, adapter);
    if (b_down.has_value()) w.b_down = strided(*b_down), w.b_down.data = w.b_down.at(0, 0, adapter);
    if (b_up.has_value()) w.b_up = strided(*b_up), w.b_up.data = w.b_up.at(0, 0, adapter);
    if (scale.has_value()) w.scale = strided(*scale, true), w.scale.data = w.scale.at(0, 0, adapter);
    return w;
  }

  int64_t groups() const { return static_cast<int64_t>(begins.size()) - 1; }

  Strided rows_of(const OptionalTensor& t, const char* name) const {
    if (!t.has_value()) return {};
    check_dtype(*t, name, dtype), check_shape(*t, name, {x.size(0), p.length, p.channels});
    return strided(*t);
  }

 private:
  void check_parameter(const Tensor& t, const char* name) const {
    check_dtype(t, name, t.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype);
  }

  Strided vector_of(const OptionalTensor& t, const char* name) const {
    if (!t.has_value()) return {};
    check_parameter(*t, name), check_shape(*t, name, {p.channels});
    return strided(*t);
  }

  // Is it (B)? Or else (B,T).
  bool check_of_rows(const Tensor& t, const char* name) const {
    if (t.dim() == 1)
      check_shape(t, name, {x.size(0)});
    else
      check_shape(t, name, {x.size(0), p.length});
    return t.dim() == 1;
  }

  void sort_rows(const Tensor& index) {
    check_dtype(index, "index", ScalarType::Long);
    const bool of_examples = check_of_rows(index, "index");
    const int64_t* const numbers = static_cast<const int64_t*>(index.const_data_ptr());
    const int64_t b_stride = index.stride(0), t_stride = of_examples ? 0 : index.stride(1);
    const auto group = [&](int64_t row) {
      const int64_t number = numbers[row / p.length * b_stride + row % p.length * t_stride];
      return number < 0 ? adapters : number;
    };
    begins.assign(adapters + 2, 0);
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t number = numbers[row / p.length * b_stride + row % p.length * t_stride];
      STD_TORCH_CHECK(number >= -1 && number < adapters, "index has the number ", number, "; numbers must be in [0, ",
                      adapters, "), or -1 for no adapter");
      ++begins[group(row) + 1];
    }
    for (int64_t g = 0; g <= adapters; ++g) begins[g + 1] += begins[g];
    order.resize(p.rows);
    std::vector<int64_t> next(begins.begin(), begins.end());
    for (int64_t row = 0; row < p.rows; ++row) order[next[group(row)]++] = row;
    p.order = order.data();
  }

 public:
  void complete() {
    if (begins.empty()) begins = {0, p.rows};
  }
};

double operations(const Call& call) {
  return 4.0 * call.p.rows * call.p.channels * call.p.bottleneck + 20.0 * call.p.rows * call.p.channels;
}

// The rows in parts of at most `size`, and their adapters' packed weights: of few adapters made before, for all
// threads; of many made by the thread that takes a part, in memory that it has in cache.
class Parts {
 public:
  std::vector<AdapterPart> parts;
  std::vector<int64_t> first;  // part of every group

  Parts(const Call& call, int64_t size, int64_t threads) : call_(call), stride_(kernels().panels_space(call.p)) {
    std::vector<int64_t> used;
    for (int64_t g = 0; g < call.groups(); ++g) {
      const int64_t begin = call.begins[g], rows = call.begins[g + 1] - begin;
      first.push_back(static_cast<int64_t>(parts.size()));
      if (rows == 0) continue;
      const int64_t step = ceil_div(rows, ceil_div(rows, size)), adapter = g < call.adapters ? g : -1;
      for (int64_t i = 0; i < rows; i += step)
        parts.push_back({begin + i, begin + std::min(i + step, rows), adapter, nullptr, nullptr});
      if (adapter >= 0) used.push_back(g);
    }
    first.push_back(static_cast<int64_t>(parts.size()));
    if (are_many(static_cast<int64_t>(used.size()), threads)) return;
    shared_ = Space(static_cast<int64_t>(used.size()) * stride_);
    const int64_t count = static_cast<int64_t>(used.size());
    for_parts(count, count * stride_ < 100000 ? 1 : threads, [&](int64_t i, int64_t) {
      float* const panels = shared_.at(i * stride_);
      kernels().pack(call.p, call.weights(used[i]), panels);
      for (int64_t part = first[used[i]]; part < first[used[i] + 1]; ++part) parts[part].panels = panels;
    });
  }

  static bool are_many(int64_t adapters, int64_t threads) { return adapters >= 2 * threads && adapters > 2; }

  int64_t count() const { return static_cast<int64_t>(parts.size()); }

  // run(part, scratch memory) for every part from `begin` to `end`.
  template <class F>
  void run(int64_t threads, int64_t begin, int64_t end, const F& run) {
    const int64_t size = round_up(kernels().space(call_.p), 16) + stride_;
    if (packed_.empty()) {
      packed_.assign(std::min(threads, count()), -1);
      scratch_ = Space(static_cast<int64_t>(packed_.size()) * size);
    }
    for_parts(end - begin, static_cast<int64_t>(packed_.size()), [&](int64_t i, int64_t worker) {
      AdapterPart part = parts[begin + i];
      float *const panels = scratch_.at(worker * size), *const scratch = panels + stride_;
      if (part.adapter >= 0 && part.panels == nullptr) {
        if (packed_[worker] != part.adapter) kernels().pack(call_.p, call_.weights(part.adapter), panels);
        packed_[worker] = part.adapter, part.panels = panels;
      }
      run(part, scratch);
    });
  }

 private:
  const Call& call_;
  int64_t stride_;
  Space shared_, scratch_;
  std::vector<int64_t> packed_;  // the adapter whose weights a worker has
};

// Where the products of an adapter are summed: in the gradient itself, where that is given.
class Products {
 public:
  Products(const Parts& parts, int64_t adapters, int64_t size, float* gradient)
      : size_(size), gradient_(gradient), slots_(adapters, 0) {
    int64_t used = 0;
    for (int64_t a = 0; a < adapters; ++a) slots_[a] = used, used += parts.first[a + 1] > parts.first[a];
    if (gradient == nullptr) space_ = Space(used * size);
  }

  float* of(int64_t adapter) const {
    if (size_ == 0) return nullptr;
    return gradient_ == nullptr ? space_.at(slots_[adapter] * size_) : gradient_ + adapter * size_;
  }

 private:
  int64_t size_;
  float* gradient_;
  std::vector<int64_t> slots_;
  Space space_;
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, OptionalTensor input_residual, OptionalTensor residual,
                                           Tensor w_down, OptionalTensor b_down, Tensor w_up, OptionalTensor b_up,
                                           OptionalTensor norm_weight, OptionalTensor norm_bias,
                                           OptionalTensor out_weight, OptionalTensor out_bias, OptionalTensor scale,
                                           OptionalTensor gate, OptionalTensor index, OptionalTensor seed, int64_t skip,
                                           int64_t activation, double eps, double out_eps, double factor,
                                           double dropout_p, bool save) {
  Call call(x, input_residual, residual, w_down, b_down, w_up, b_up, norm_weight, norm_bias, out_weight, out_bias,
            scale, gate, index, seed, skip, activation, eps, out_eps, factor, dropout_p);
  call.complete();
  AdapterProblem& p = call.p;
  const int64_t norms = norm_weight.has_value() + out_weight.has_value();
  Tensor out = allocate(x, {x.size(0), p.length, p.channels});
  Tensor statistics = allocate(x, {2 * norms, x.size(0), p.length}, ScalarType::Float);
  Tensor saved =
      save ? allocate(x, {x.size(0), p.length, p.saved_row()}, ScalarType::Float) : allocate(x, {0}, ScalarType::Float);
  if (p.rows == 0) return {out, statistics, saved};
  if (save) p.saved = static_cast<float*>(saved.mutable_data_ptr());
  float* const numbers = static_cast<float*>(statistics.mutable_data_ptr());
  p.mean = numbers, p.rstd = numbers + p.rows;
  p.out_mean = numbers + 2 * (norms - 1) * p.rows, p.out_rstd = p.out_mean + p.rows;
  p.out = static_cast<char*>(out.mutable_data_ptr());
  const int64_t threads = threads_for(operations(call));
  int64_t groups = 0;
  for (int64_t a = 0; a < call.adapters; ++a) groups += call.begins[a + 1] > call.begins[a];
  const int64_t most = Parts::are_many(groups, threads) ? 512 : 96;
  Parts parts(call, std::min(round_up(ceil_div(p.rows, 4 * threads), 12), most), threads);
  parts.run(threads, 0, parts.count(),
            [&](const AdapterPart& part, float* space) { kernels().forward(p, part, space); });
  return {out, statistics, saved};
}

// Rows whose sums for the gradients of biases and norms are one: by sizes alone, so that bits do not depend on threads.
int64_t backward_part(int64_t rows) { return rows <= 256 ? 64 : std::clamp<int64_t>(rows / 16, 128, 512); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
backward(Tensor dout, Tensor x, OptionalTensor input_residual, OptionalTensor residual, Tensor w_down,
         OptionalTensor b_down, Tensor w_up, OptionalTensor b_up, OptionalTensor norm_weight, OptionalTensor norm_bias,
         OptionalTensor out_weight, OptionalTensor out_bias, OptionalTensor scale, OptionalTensor gate,
         OptionalTensor index, OptionalTensor seed, Tensor statistics, OptionalTensor saved, int64_t skip,
         int64_t activation, double eps, double out_eps, double factor, double dropout_p, int64_t wanted) {
  Call call(x, input_residual, residual, w_down, b_down, w_up, b_up, norm_weight, norm_bias, out_weight, out_bias,
            scale, gate, index, seed, skip, activation, eps, out_eps, factor, dropout_p);
  call.complete();
  AdapterProblem& p = call.p;
  p.dout = call.rows_of(dout, "dout");
  const int64_t norms = norm_weight.has_value() + out_weight.has_value(), channels = p.channels, r = p.bottleneck;
  check_dtype(statistics, "statistics", ScalarType::Float);
  check_shape(statistics, "statistics", {2 * norms, x.size(0), p.length});
  statistics = as_contiguous(statistics);
  float* const numbers = const_cast<float*>(floats(statistics));
  p.mean = numbers, p.rstd = numbers + p.rows;
  p.out_mean = numbers + 2 * (norms - 1) * p.rows, p.out_rstd = p.out_mean + p.rows;
  if (saved.has_value()) {
    check_dtype(*saved, "saved", ScalarType::Float);
    check_shape(*saved, "saved", {x.size(0), p.length, p.saved_row()});
    saved = as_contiguous(*saved);
    p.saved = const_cast<float*>(floats(*saved));
  }

  const OptionalTensor* const given[kGradients] = {nullptr,   &input_residual, &residual,    nullptr,    &b_down,
                                                   nullptr,   &b_up,           &norm_weight, &norm_bias, &out_weight,
                                                   &out_bias, &scale,          &gate};
  const Tensor* const always[kGradients] = {&x, nullptr, nullptr, &w_down, nullptr, &w_up};
  std::array<Tensor, kGradients> found;
  std::array<char*, kGradients> to{};
  for (int64_t i = 0; i < kGradients; ++i) {
    const Tensor* const t = given[i] == nullptr ? always[i] : given[i]->has_value() ? &**given[i] : nullptr;
    const bool is_wanted = wanted >> i & 1;
    STD_TORCH_CHECK(!is_wanted || t != nullptr, "wanted is ", wanted, "; bit ", i, " is of an argument that is absent");
    const ScalarType dtype = i <= 3 || i == 5 ? call.dtype : ScalarType::Float;
    found[i] = is_wanted ? allocate(*t, t->sizes(), dtype) : allocate(x, {0}, dtype);
    if (is_wanted) to[i] = static_cast<char*>(found[i].mutable_data_ptr());
  }
  const auto result = [&] { return std::tuple_cat(found); };
  const auto floats_of = [&](int64_t i) { return reinterpret_cast<float*>(to[i]); };
  if (p.rows == 0) {
    for (int64_t i = 3; i < kGradients; ++i) torch::stable::zero_(found[i]);
    return result();
  }
  p.dx = to[0], p.dinput_residual = to[1], p.dresidual = to[2];
  p.wants_down = to[3] != nullptr, p.wants_b_down = to[4] != nullptr;
  p.wants_up = to[5] != nullptr || to[11] != nullptr, p.wants_b_up = to[6] != nullptr || to[11] != nullptr;
  p.wants_norm = to[7] != nullptr || to[8] != nullptr, p.wants_out_norm = to[9] != nullptr || to[10] != nullptr;
  const Space gates(to[12] == nullptr ? 0 : p.rows);
  p.dgate = gates.at(0);

  const int64_t threads = threads_for(3.0 * operations(call));
  Parts parts(call, backward_part(p.rows), threads);
  const AdapterSums at(channels, r);
  const int64_t item = call.dtype == ScalarType::Float ? 4 : 2;
  const Space rest(parts.count() * at.rest);
  const bool in_place = call.dtype == ScalarType::Float && channels == at.row;
  const Products up(parts, call.adapters, p.wants_up ? at.size : 0, nullptr);
  const Products down(parts, call.adapters, p.wants_down ? at.size : 0, in_place ? floats_of(3) : nullptr);
  for (int64_t i = 0; i < parts.count(); ++i) parts.parts[i].rest = rest.at(i * at.rest);

  // Rows and the products that sum over them in turn, a few parts at a time: while they lie in cache, or, where the
  // sums do not, so many that these are seldom read and written.
  const int64_t step = threads == 1 ? 1 : 2 * threads, most = backward_part(p.rows);
  const bool fits = 2 * at.size < 128 * 1024;
  const int64_t together = fits ? step : std::max(step, ceil_div(1024, most));
  const int64_t wide = padded_row(channels), narrow = padded_row(r);
  const int64_t space = std::min(together * most, p.rows) * (p.wants_up || p.wants_down);
  const bool may_copy = p.order != nullptr;
  const Space u(p.wants_down && (may_copy || !p.x_is_u()) ? space * wide : 0);
  const Space gradient(p.wants_up && (may_copy || !p.dout_is_dy() || p.dropout) ? space * wide : 0);
  const Space a(p.wants_up ? space * narrow : 0), dz(p.wants_down ? space * narrow : 0);
  for (int64_t begin = 0; begin < parts.count(); begin += together) {
    const int64_t end = std::min(begin + together, parts.count());
    const AdapterRows rows{parts.parts[begin].begin, {u.at(0), wide}, {gradient.at(0), wide}, a.at(0), dz.at(0)};
    parts.run(threads, begin, end,
              [&](const AdapterPart& part, float* scratch) { kernels().backward(p, part, rows, scratch); });
    if (space == 0) continue;
    std::vector<int64_t> runs;  // of parts with one adapter: where each begins
    for (int64_t i = begin; i < end; ++i)
      if (i == begin || parts.parts[i].adapter != parts.parts[i - 1].adapter) runs.push_back(i);
    runs.push_back(end);
    const int64_t tile = fits ? 96 : 192, tiles = ceil_div(channels, tile);  // every tile reads a or dz again
    for_parts((static_cast<int64_t>(runs.size()) - 1) * tiles, threads, [&](int64_t i, int64_t) {
      const int64_t first = runs[i / tiles], last = runs[i / tiles + 1], column = i % tiles * tile;
      const int64_t adapter = parts.parts[first].adapter;
      if (adapter >= 0)
        kernels().products(p, rows, &parts.parts[first], last - first, column, std::min(column + tile, channels),
                           first > parts.first[adapter], down.of(adapter), up.of(adapter));
    });
  }
  const bool of_weights = p.wants_down || p.wants_b_down || p.wants_up || p.wants_b_up;
  if (of_weights) {
    const Space scales(to[11] == nullptr ? 0 : call.adapters * channels);
    const int64_t width = 192, pieces = ceil_div(channels, width);
    for_parts(call.adapters * pieces, call.adapters * at.size < 200000 ? 1 : threads, [&](int64_t i, int64_t) {
      const int64_t a = i / pieces, column = i % pieces * width;
      AdapterGradient g{call.weights(a), parts.parts.data() + parts.first[a], parts.first[a + 1] - parts.first[a],
                        column,          std::min(column + width, channels),  down.of(a),
                        up.of(a)};
      if (to[3] != nullptr) g.ddown = to[3] + a * r * channels * item;
      if (to[4] != nullptr) g.db_down = floats_of(4) + a * r;
      if (to[5] != nullptr) g.dup = to[5] + a * r * channels * item;
      if (to[6] != nullptr) g.db_up = floats_of(6) + a * channels;
      if (to[11] != nullptr) g.dscale = scales.at(a * channels);
      kernels().finish(p, g);
    });
    if (to[11] != nullptr) {
      // (1 or A, 1 or C) from (A, C): first over the adapters, then over the channels.
      const bool each = scale->size(0) == call.adapters, wide = scale->size(1) == channels;
      const int64_t kept = each ? call.adapters : 1;
      const Space rows(kept * channels);
      add_parts(wide ? floats_of(11) : rows.at(0), scales.at(0), kept, call.adapters / std::max<int64_t>(kept, 1),
                channels, channels, 1);
      if (!wide)
        for (int64_t a = 0; a < kept; ++a) {
          double sum = 0.0;
          for (int64_t c = 0; c < channels; ++c) sum += rows.at(a * channels)[c];
          floats_of(11)[a] = static_cast<float>(sum);
        }
    }
  }
  for (int64_t i = 7; i <= 10; ++i)
    if (to[i] != nullptr) {
      const int64_t place = (i < 9 ? at.norm : at.out_norm) + (i % 2 == 1 ? 0 : at.row);
      add_parts(floats_of(i), rest.at(place), 1, parts.count(), at.rest, channels, 1);
    }
  if (to[12] != nullptr) {
    const int64_t each = gate->dim() == 1 ? p.length : 1;
    for (int64_t i = 0; i < p.rows / each; ++i) {
      double sum = 0.0;
      for (int64_t t = 0; t < each; ++t) sum += p.dgate[i * each + t];
      floats_of(12)[i] = static_cast<float>(sum);
    }
  }
  return result();
}

}  // namespace
}  // namespace mmk

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("adapter_fwd", TORCH_BOX(&mmk::forward));
  m.impl("adapter_bwd", TORCH_BOX(&mmk::backward));
}
