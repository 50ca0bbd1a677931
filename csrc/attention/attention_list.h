// Lists of attention problems, as the ops attention_list_{fwd,bwd} are told of them. Both native backends read them
// here.
//
// `tensors` are (B, T, S, H, W): T rows, each with S slots of H heads of width W. A projection to queries, keys and
// values together is one tensor of three slots; a tensor of queries alone has one. The queries of a problem are one or
// two segments, its keys and values as well: the rows of one segment and then those of the other, as if they had been
// joined. A problem is kProblemInts integers:
//
//   0        rows that count of the first segment of queries, its first ones; -1: all
//   1 .. 12  tensor and slot of: first and second segment of queries, of keys, of values; -1, -1: there is no second
//   one 13, 14   the key_masks, bool (B, T), of the first and the second segment of keys; -1: none
//
// No slot is read twice, so that every element of a gradient is written by one problem. Gradients are contiguous and of
// their tensor's shape, zero where no problem reads; those not wanted are empty. Problem p drops the elements that a
// problem by itself would drop with the seed + p * kSeedStep.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace mmk {

constexpr int64_t kProblemInts = 15;
constexpr int64_t kMaxProblems = 8;
constexpr uint64_t kSeedStep = 0x632BE59BD9B4E019u;

// Where rows are: a slot of one of the tensors.
struct Segment {
  int64_t tensor = -1, slot = -1;
  int64_t rows = 0;

  bool present() const { return tensor >= 0; }
};

struct ListedProblem {
  Segment q[2], k[2], v[2];
  int64_t mask[2];  // which of key_masks, or -1

  int64_t queries() const { return q[0].rows + q[1].rows; }
  int64_t keys() const { return k[0].rows + k[1].rows; }
};

struct AttentionList {
  int64_t batch, heads, qk_dim, v_dim;
  std::vector<ListedProblem> problems;
  std::vector<bool> covered;  // of every tensor: each element is read by some problem, so its gradient needs no zeros
};

// Checks everything that is indexed later, but not devices.
inline AttentionList read_list(const std::vector<torch::stable::Tensor>& tensors, const std::vector<int64_t>& problems,
                               const std::vector<torch::stable::Tensor>& masks) {
  const int64_t count = static_cast<int64_t>(problems.size()) / kProblemInts;
  STD_TORCH_CHECK(count >= 1 && count <= kMaxProblems && count * kProblemInts == static_cast<int64_t>(problems.size()),
                  "problems has ", problems.size(), " integers; it must have ", kProblemInts, " for each of 1 to ",
                  kMaxProblems, " problems");
  const int64_t number = static_cast<int64_t>(tensors.size()), masks_given = static_cast<int64_t>(masks.size());
  STD_TORCH_CHECK(number > 0, "tensors is empty; it must have the tensors of the problems");
  for (int64_t i = 0; i < number; ++i) {
    STD_TORCH_CHECK(tensors[i].dim() == 5, "tensors[", i, "] has ", tensors[i].dim(),
                    " dimensions; it must have 5: (B, T, S, H, W)");
    STD_TORCH_CHECK(tensors[i].size(0) == tensors[0].size(0) && tensors[i].size(3) == tensors[0].size(3), "tensors[", i,
                    "] has batch ", tensors[i].size(0), " and ", tensors[i].size(3), " heads; tensors[0] has ",
                    tensors[0].size(0), " and ", tensors[0].size(3));
    STD_TORCH_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), "tensors[", i, "] has dtype ",
                    torch::headeronly::toString(tensors[i].scalar_type()), "; tensors[0] has ",
                    torch::headeronly::toString(tensors[0].scalar_type()));
  }
  AttentionList list;
  list.batch = tensors[0].size(0), list.heads = tensors[0].size(3);
  list.qk_dim = list.v_dim = -1;
  std::vector<std::vector<bool>> read(number);
  list.covered.assign(number, true);
  for (int64_t i = 0; i < number; ++i) read[i].assign(tensors[i].size(2), false);

  auto segment = [&](const int64_t* at, bool optional, int64_t& width) {
    Segment s{at[0], at[1], 0};
    if (optional && s.tensor == -1) return Segment{};
    STD_TORCH_CHECK(s.tensor >= 0 && s.tensor < number, "problems names tensor ", s.tensor, "; there are ", number);
    const torch::stable::Tensor& t = tensors[s.tensor];
    STD_TORCH_CHECK(s.slot >= 0 && s.slot < t.size(2), "problems names slot ", s.slot, " of tensors[", s.tensor,
                    "]; it has ", t.size(2));
    STD_TORCH_CHECK(!read[s.tensor][s.slot], "problems names slot ", s.slot, " of tensors[", s.tensor,
                    "] twice; a slot belongs to one segment");
    read[s.tensor][s.slot] = true;
    if (width < 0) width = t.size(4);
    STD_TORCH_CHECK(t.size(4) == width && width >= 1 && width <= 1024, "tensors[", s.tensor, "] has head dim ",
                    t.size(4), "; it must be ", width < 1 || width > 1024 ? 1024 : width,
                    ", the same in all problems and 1 to 1024");
    s.rows = t.size(1);
    return s;
  };
  for (int64_t p = 0; p < count; ++p) {
    const int64_t* ints = problems.data() + p * kProblemInts;
    ListedProblem problem;
    for (int64_t i = 0; i < 2; ++i) {
      problem.q[i] = segment(ints + 1 + 2 * i, i == 1, list.qk_dim);
      problem.k[i] = segment(ints + 5 + 2 * i, i == 1, list.qk_dim);
      problem.v[i] = segment(ints + 9 + 2 * i, i == 1, list.v_dim);
      STD_TORCH_CHECK(problem.k[i].present() == problem.v[i].present() && problem.k[i].rows == problem.v[i].rows,
                      "problem ", p, " has ", problem.k[i].rows, " keys and ", problem.v[i].rows,
                      " values in a segment; it must have as many");
      problem.mask[i] = ints[13 + i];
      STD_TORCH_CHECK(problem.mask[i] >= -1 && problem.mask[i] < masks_given, "problems names mask ", problem.mask[i],
                      "; there are ", masks_given);
      if (problem.mask[i] < 0) continue;
      const torch::stable::Tensor& mask = masks[problem.mask[i]];
      STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool && mask.dim() == 2 &&
                          mask.size(0) == list.batch && mask.size(1) == problem.k[i].rows,
                      "key_masks[", problem.mask[i], "] must be a bool tensor (", list.batch, ", ", problem.k[i].rows,
                      ")");
    }
    if (ints[0] >= 0) {
      STD_TORCH_CHECK(ints[0] <= problem.q[0].rows, "problem ", p, " wants ", ints[0], " rows of queries; there are ",
                      problem.q[0].rows);
      if (ints[0] < problem.q[0].rows) list.covered[problem.q[0].tensor] = false;
      problem.q[0].rows = ints[0];
    }
    list.problems.push_back(problem);
  }
  for (int64_t i = 0; i < number; ++i)
    for (bool slot : read[i])
      if (!slot) list.covered[i] = false;
  return list;
}

}  // namespace mmk
