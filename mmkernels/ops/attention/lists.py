"""Lists of problems: unequal lengths in one launch, queries and keys in one or two segments that nobody joins.

The registered ops `attention_list_{fwd,bwd}` (contract: csrc/attention/attention_list.h) and the gradient around them. Where
rows lie is said in integers, so that one op serves tensors of queries, keys and values as well as packed projections of all
three, whose gradients come packed too.
"""

from typing import NamedTuple

import torch

from .._shared import dropout
from .._shared.registration import fake, forward_backward, once_differentiable
from . import reference

MAX_PROBLEMS = 8
_INTS = 15  # of one problem
_SEED_STEP = 0x632BE59BD9B4E019  # kSeedStep


class ListedProblem(NamedTuple):
    """Where a problem has its rows: for each of one or two segments (tensor, slot), of tensors (B, T, slots, H, width)."""

    q: tuple
    k: tuple
    v: tuple
    masks: tuple = (-1, -1)  # which of the key masks belongs to a segment of keys; -1: none
    rows: int = -1  # how many of the first segment's queries count; -1: all


def encode(problems) -> list:
    """The integers that the registered ops take."""
    ints = []
    for problem in problems:
        ints.append(problem.rows)
        for segments in (problem.q, problem.k, problem.v):
            for place in (*segments, (-1, -1))[:2]:
                ints.extend(place)
        ints.extend((*problem.masks, -1)[:2])
    return ints


def decode(ints) -> list:
    problems = []
    for start in range(0, len(ints), _INTS):
        one = ints[start : start + _INTS]
        places = [(one[i], one[i + 1]) for i in range(1, 13, 2)]
        sides = [tuple(place for place in places[i : i + 2] if place[0] >= 0) for i in (0, 2, 4)]
        problems.append(ListedProblem(*sides, tuple(one[13:15]), one[0]))
    return problems


def number(mask, given: list) -> int:
    """The place of a key mask in `given`, where it is put if it is new; -1 for None."""
    if mask is None:
        return -1
    for i, other in enumerate(given):
        if other is mask:
            return i
    given.append(mask)
    return len(given) - 1


def _query_rows(problem, tensors) -> list:
    """The number of rows of each segment of queries."""
    rows = [tensors[tensor].shape[1] for tensor, _ in problem.q]
    return rows if problem.rows < 0 else [problem.rows, *rows[1:]]


@fake("attention_list_fwd")
def _forward_fake(tensors, problems, key_masks, seed, scale, dropout_p):
    batch, _, _, heads, _ = tensors[0].shape
    out, lse = [], []
    for problem in decode(problems):
        width = tensors[problem.v[0][0]].shape[4]
        rows = _query_rows(problem, tensors)
        out += [tensors[0].new_empty(batch, count, heads, width) for count in rows]
        lse.append(tensors[0].new_empty(batch, heads, sum(rows), dtype=torch.float32))
    return out, lse


@fake("attention_list_bwd")
def _backward_fake(dout, dlse, tensors, problems, key_masks, out, lse, seed, scale, dropout_p, wanted):
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip(tensors, wanted, strict=True)]


class _AttentionList(torch.autograd.Function):
    @staticmethod
    def forward(backend, problems, masks, seed, scale, dropout_p, *tensors):
        """`tensors`: first the `masks` key masks, then what the problems read. Returns all out, then all lse."""
        op = forward_backward("attention", backend, "attention_list")[0]
        out, lse = op(list(tensors[masks:]), problems, list(tensors[:masks]), seed, scale, dropout_p)
        return (*out, *lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.problems, ctx.masks, seed, ctx.scale, ctx.dropout_p, *tensors = inputs
        ctx.save_for_backward(seed, *tensors, *output)
        ctx.inputs = len(tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        seed, *saved = ctx.saved_tensors
        masks, tensors, results = saved[: ctx.masks], saved[ctx.masks : ctx.inputs], saved[ctx.inputs :]
        none = (None,) * (6 + ctx.masks)
        if all(g is None for g in gradients):
            return (*none, *(None for _ in tensors))
        count = len(results) - len(ctx.problems) // _INTS  # of out; as many lse as problems follow
        out, lse, dout, dlse = results[:count], results[count:], gradients[:count], gradients[count:]
        dout = [torch.zeros_like(o) if g is None else g for o, g in zip(out, dout, strict=True)]
        if all(g is None for g in dlse):
            dlse = []
        else:
            dlse = [torch.zeros_like(o) if g is None else g for o, g in zip(lse, dlse, strict=True)]
        wanted = [int(need) for need in ctx.needs_input_grad[6 + ctx.masks :]]
        op = forward_backward("attention", ctx.backend, "attention_list")[1]
        with torch.no_grad():
            found = op(dout, dlse, tensors, ctx.problems, list(masks), out, lse, seed, ctx.scale, ctx.dropout_p, wanted)
        found = tuple(g if want else None for g, want in zip(found, wanted, strict=True))
        given = [g for g in gradients if g is not None]
        return once_differentiable("mmkernels.ops.attention", (*none, *found), (*given, *tensors))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.attention has a batch dimension of its own and no vmap rule: fold the mapped "
            "dimension into B, or use backend='reference'"
        )


def attention_list(backend, tensors, problems, key_masks, seed, scale, dropout_p):
    """Runs `problems` on a backend with kernels, or on "reference"; differentiable when a gradient is wanted.

    Args:
        tensors: (B, T, slots, H, width) each, any strides.
        problems: list of 1 to 8 `ListedProblem`; no slot stands in two of them.
        key_masks: list of bool (B, T).
        seed: int64 (1), or None without dropout.

    Returns:
        (out, lse): for each segment of queries of each problem, in order, (B, T, H, E); for each problem float32 (B, H, N).
    """
    if backend == "reference":
        return _reference(tensors, problems, key_masks, seed, scale, dropout_p)
    ints = encode(problems)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        results = _AttentionList.apply(backend, ints, len(key_masks), seed, scale, dropout_p, *key_masks, *tensors)
        return list(results[: -len(problems)]), list(results[-len(problems) :])
    op = forward_backward("attention", backend, "attention_list")[0]
    return op(tensors, ints, key_masks, seed, scale, dropout_p)


def _reference(tensors, problems, key_masks, seed, scale, dropout_p):
    results, statistics = [], []
    for index, problem in enumerate(problems):
        rows = _query_rows(problem, tensors)
        q, k, v = (
            torch.cat([tensors[tensor][:, :, slot] for tensor, slot in segments], 1).transpose(1, 2)
            for segments in (problem.q, problem.k, problem.v)
        )
        if problem.rows >= 0:
            q = torch.cat([q[:, :, : problem.rows], q[:, :, tensors[problem.q[0][0]].shape[1] :]], 2)
        mask = joined_mask(problem, tensors, key_masks)
        keep = None
        if dropout_p > 0.0:
            own_seed = seed + (index * _SEED_STEP + (1 << 63)) % (1 << 64) - (1 << 63)  # as the signed number that it wraps to
            keep = dropout.keep_mask(own_seed, (*q.shape[:3], k.shape[2]), dropout_p)
        out, lse = reference.attention(q, k, v, mask, None, scale, keep, dropout_p)
        results += out.transpose(1, 2).split(rows, 1)
        statistics.append(lse)
    return results, statistics


def joined_mask(problem, tensors, key_masks):
    """One key mask (B, M) over all segments of a problem's keys; None where none is masked."""
    if all(mask < 0 for mask in problem.masks):
        return None
    given = key_masks[max(problem.masks)]
    segments = zip(problem.k, problem.masks, strict=False)
    return torch.cat([given.new_ones(tensors[t].shape[:2]) if mask < 0 else key_masks[mask] for (t, _), mask in segments], 1)
