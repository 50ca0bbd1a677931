// Checks, allocations and splits of the CUDA kernels of the latent family; schemas in csrc/schemas.h.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/waves.h"
#include "latent/latent_binding.h"

namespace mmk::latent {
namespace {

Problem describe(const Tensor& q, const Tensor& x, const OptionalTensor& position, const OptionalTensor& key_mask,
                 double scale, double eps, const OptionalTensor& seed, double dropout_p, int64_t first_key) {
  const ScalarType type = x.scalar_type();
  check_first(x, "x");
  check_like(q, "q", x, type, 3);
  if (position) {
    check_like(*position, "position", x, type, 2);
    check_size(*position, "position", 0, x.size(1));
  }
  const int64_t content = x.size(2), shared = position ? position->size(1) : 0;
  STD_TORCH_CHECK(content + shared >= 1 && content + shared <= 1024, "x and position have ", content + shared,
                  " channels; 1 to 1024 are allowed");
  STD_TORCH_CHECK(q.size(0) == 1 || q.size(0) == x.size(0), "q has batch ", q.size(0), "; it must be 1 or ", x.size(0));
  check_size(q, "q", 2, content + shared);
  if (key_mask) {
    check_like(*key_mask, "key_mask", x, ScalarType::Bool, 2);
    check_size(*key_mask, "key_mask", 0, x.size(0));
    check_size(*key_mask, "key_mask", 1, x.size(1));
  }
  STD_TORCH_CHECK(x.size(0) * q.size(1) < int64_t{1} << 29, "x's batch times q's rows is ", x.size(0) * q.size(1),
                  "; it must be below 2^29");

  Problem p{};
  p.type = type_of(type);
  p.batch = x.size(0), p.rows = q.size(1), p.keys = x.size(1);
  p.content = static_cast<int>(content), p.position = static_cast<int>(shared);
  p.x = x.const_data_ptr();
  p.x_batch = x.stride(0), p.x_key = x.stride(1), p.x_channel = x.stride(2);
  if (position) {
    p.table = position->const_data_ptr();
    p.table_key = position->stride(0), p.table_channel = position->stride(1);
  }
  if (key_mask) {
    p.mask = static_cast<const bool*>(key_mask->const_data_ptr());
    p.mask_batch = key_mask->stride(0), p.mask_key = key_mask->stride(1);
  }
  p.scale = static_cast<float>(scale), p.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), "seed is None; with dropout_p ", dropout_p, " it must be a tensor");
    check_like(*seed, "seed", x, ScalarType::Long, 1);
    check_size(*seed, "seed", 0, 1);
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
    p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    p.first_key = static_cast<uint32_t>(first_key);
  }
  return p;
}

// The plan of a kernel whose blocks are tiles of rows times splits of the keys, or (`whole_keys`) tiles of keys.
Plan plan_for(const Problem& p, int (*planner)(const Problem*, Plan*), bool whole_keys = false) {
  Plan plan{};
  STD_TORCH_CHECK(planner(&p, &plan) == 0, "latent: no tile for ", p.content + p.position,
                  " channels fits into the shared memory of this device");
  if (!whole_keys) plan.splits = split_keys(plan.row_tiles * p.batch, plan.key_tiles, plan.slots);
  const int64_t blocks = p.batch * (whole_keys ? plan.key_tiles : plan.row_tiles * plan.splits);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "latent: the problem needs ", blocks, " thread blocks; 2^31 - 1 are allowed");
  return plan;
}

std::tuple<Tensor, Tensor> latent_fwd(const Tensor& q, const Tensor& x, const OptionalTensor& position,
                                      const OptionalTensor& key_mask, double scale, double eps,
                                      const OptionalTensor& seed, double dropout_p, int64_t first_key) {
  Problem p = describe(q, x, position, key_mask, scale, eps, seed, dropout_p, first_key);
  const OnDevice device(x);
  const int64_t channels = p.out_channels();
  Tensor out = empty(q, {p.batch, p.rows, channels}, ScalarType::Float);
  Tensor lse = empty(q, {p.batch, p.rows}, ScalarType::Float);
  if (p.batch == 0 || p.rows == 0) return {out, lse};
  if (p.keys == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  Tensor packed, sums, tops;
  p.q = aligned_rows(p, q, q.scalar_type(), packed, device.stream);
  const Plan plan = plan_for(p, mmk_latent_plan_fwd);
  Forward f{floats(out), floats(lse), nullptr, nullptr};
  if (plan.splits > 1) {
    sums = empty(q, {plan.splits, p.batch, p.rows, channels}, ScalarType::Float);
    tops = empty(q, {2, plan.splits, p.batch, p.rows}, ScalarType::Float);
    f.sums = floats(sums);
    f.tops = floats(tops);
  }
  check_launch(mmk_latent_fwd(&p, &plan, &f, device.stream), "latent_fwd");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> latent_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                              const Tensor& x, const OptionalTensor& position,
                                              const OptionalTensor& key_mask, const Tensor& out, const Tensor& lse,
                                              double scale, double eps, int64_t wanted, const OptionalTensor& seed,
                                              double dropout_p, int64_t first_key) {
  enum { kQueries = 1, kInput = 2, kPosition = 4 };
  Problem p = describe(q, x, position, key_mask, scale, eps, seed, dropout_p, first_key);
  for (const auto& [t, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    check_like(*t, name, x, ScalarType::Float, 3);
    check_size(*t, name, 0, p.batch);
    check_size(*t, name, 1, p.rows);
    check_size(*t, name, 2, p.out_channels());
  }
  for (const auto& [t, name] : {std::pair{&lse, "lse"}, {dlse ? &*dlse : &lse, "dlse"}}) {
    check_like(*t, name, x, ScalarType::Float, 2);
    check_size(*t, name, 0, p.batch);
    check_size(*t, name, 1, p.rows);
  }
  STD_TORCH_CHECK(wanted >= 0 && wanted < 8, "wanted is ", wanted, "; it must be 0 to 7");
  const OnDevice device(x);
  const bool want_q = wanted & kQueries, want_x = wanted & kInput, want_position = (wanted & kPosition) && position;
  const auto gradient = [&](bool is_wanted, const Tensor& like) {
    return is_wanted ? empty(like, like.sizes(), like.scalar_type()) : empty(q, {0}, q.scalar_type());
  };
  Tensor dq = gradient(want_q, q), dx = gradient(want_x, x);
  Tensor dposition = gradient(want_position, position ? *position : q);
  if (p.batch == 0 || p.rows == 0 || p.keys == 0) {
    for (Tensor* t : {&dq, &dx, &dposition}) torch::stable::zero_(*t);
    return {dq, dx, dposition};
  }
  if (!want_q && !want_x && !want_position) return {dq, dx, dposition};

  Tensor packed_q, packed_dout, partial, table_sums;
  const Tensor dense_lse = torch::stable::contiguous(lse);
  Tensor delta = empty(q, {p.batch, p.rows}, ScalarType::Float);
  Tensor dsum = empty(q, {p.seed ? p.batch : 0, p.rows}, ScalarType::Float);
  p.q = aligned_rows(p, q, q.scalar_type(), packed_q, device.stream);
  const Strided strided_dout = strided(dout), strided_out = strided(out);
  check_launch(mmk_latent_delta(
                   &p, &strided_dout, &strided_out, dlse ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr,
                   dlse ? dlse->stride(0) : 0, dlse ? dlse->stride(1) : 0, floats(delta), floats(dsum), device.stream),
               "latent_bwd");
  Backward b{};
  b.dout = aligned_rows(p, dout, q.scalar_type(), packed_dout, device.stream);
  b.lse = static_cast<const float*>(dense_lse.const_data_ptr());
  b.delta = floats(delta);
  b.dsum = floats(dsum);
  if (want_q) {
    const Plan plan = plan_for(p, mmk_latent_plan_bwd_q);
    b.dq = dq.mutable_data_ptr();
    b.dq_batch = q.size(0);
    if (plan.splits > 1 || b.dq_batch < p.batch) {
      partial = empty(q, {plan.splits, p.batch, p.rows, q.size(2)}, ScalarType::Float);
      b.partial_dq = floats(partial);
    }
    check_launch(mmk_latent_bwd_q(&p, &plan, &b, device.stream), "latent_bwd");
  }
  if (want_x || want_position) {
    const Plan plan = plan_for(p, mmk_latent_plan_bwd_x, true);
    if (want_x) b.dx = dx.mutable_data_ptr();
    if (want_position) {
      b.dtable = dposition.mutable_data_ptr();
      if (p.batch > 1) {
        table_sums = empty(q, {p.keys, p.position}, ScalarType::Float);
        b.table_sums = floats(table_sums);
      }
    }
    check_launch(mmk_latent_bwd_x(&p, &plan, &b, device.stream), "latent_bwd");
  }
  return {dq, dx, dposition};
}

}  // namespace
}  // namespace mmk::latent

MMK_REGISTER_CUDA(m) {
  m.impl("latent_fwd", TORCH_BOX(&mmk::latent::latent_fwd));
  m.impl("latent_bwd", TORCH_BOX(&mmk::latent::latent_bwd));
}
