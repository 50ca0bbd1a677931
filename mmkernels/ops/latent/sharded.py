"""An input held by several processes: the absorbed core over shards, merged over a group (README, "Inputs in parts")."""

import torch
import torch.distributed as dist

from ... import _backends
from .._shared import dropout
from . import api, autograd
from .stream import ABSORBED, choose, finish, refusals, where_visible


def latent_attention_sharded(
    q,
    x,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    position=None,
    key_mask=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    group=None,
    backend="auto",
):
    """`latent_attention` of an input whose M rows are spread over the processes of a group.

    Every rank gives its own rows and gets the attention over all of them, the same on every rank. What crosses the group is
    N-sized: forward the maxima of the rows, (B, H*N), and one all-reduce of (B, H*N, C + 1) float32; backward one all-reduce
    of the gradient of the absorbed queries, (B or 1, H*N, C) float32. Before, the ranks exchange what they were given: where
    they disagree, or one of them was given something wrong, all of them raise, and none waits.

    Args:
        q, w_k, w_v, norm_weight, norm_bias, b_k, b_v: as in `latent_attention`, and the same values on every rank.
        x, position, key_mask: this rank's rows: (B, m, Cx), (m, Cp), (B, m). m may differ and may be 0.
        num_heads, eps, scale, dropout_p, backend: as in `latent_attention`, always by the absorbed plan. Dropout drops what
            it drops of all rows, those of the ranks behind each other.
        dropout_seed: as in `latent_attention`, and the same value on every rank; when None the first rank's draw is taken.
        group: a process group of torch.distributed, gloo or NCCL; None is the default one. All its ranks call, in the same
            order, and where one goes backward, all do.

    Gradients: the result is replicated, so every rank is to compute the same from it, and the gradient that arrives must be
    the same everywhere. Then the gradients of q, weights and norms are on every rank those of one process with all of x:
    complete, not a share, so that DDP's average over the group leaves them as they are. The gradient of x and of position
    stays on its rank and is that of its rows; for parameters that x is computed from, the sum over the group (not DDP's
    average) is the whole gradient.

    Returns:
        (B, N, H * E) of x's dtype.

    Raises:
        TypeError, ValueError: on every rank, where an argument is wrong on any of them or differs between them.
        BackendError: the named backend cannot run this rank's problem; the other ranks get a ValueError with its reasons.
        RuntimeError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("latent_attention_sharded needs a process group: call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("group does not have this rank; only the ranks of a group may call latent_attention_sharded with it")
    facts, name, own, failure = {}, "", None, None
    try:
        q, x, w_k, w_v, b_k, b_v, position, scale, eps = api._check(
            q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale
        )
        dropout_p, seed = api._check_dropout(dropout_p, dropout_seed, x.device)
        order = api._preference(q, x, position, num_heads, ABSORBED, dropout_p)
        name = choose("latent_attention_sharded", x, w_k.shape[1], backend, order)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, w_k, norm_weight))
        facts = {
            "x.dtype": str(x.dtype),
            "x's batch and channels": (x.shape[0], x.shape[2]),
            "position's channels": 0 if position is None else position.shape[1],
            "q.shape": tuple(q.shape),
            "w_v.shape": tuple(w_v.shape),
            "num_heads": num_heads,
            "eps": eps,
            "scale": scale,
            "norm_weight is None": norm_weight is None,
            "norm_bias is None": norm_bias is None,
            "b_v is None": b_v is None,
            "dropout_p": dropout_p,
            "dropout_seed": None if seed is None else int(seed),
            "q, w_k or norm_weight wants a gradient": training,
        }
        drawn = dropout.draw_seed(x.device) if dropout_p > 0.0 and seed is None else seed
        own = x.shape[1], 0 if drawn is None else int(drawn)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    lengths, seeds = zip(*_agree(group, facts, own, failure), strict=True)
    seed = torch.tensor(seeds[:1], device=x.device) if dropout_p > 0.0 else None
    counter = seed, dropout_p, sum(lengths[: dist.get_rank(group)])
    with torch.no_grad():
        forward, backward = autograd.core_pair(name)
        absorbed = api.absorb_queries(q, w_k, num_heads, norm_weight)
        out, lse = _merge(group, *forward(absorbed, x, position, key_mask, scale, eps, *counter))
    if q.shape[0] == x.shape[0]:
        q = where_visible(q, lse)  # else NaN of an example without keys would reach w_k's gradient
    absorbed = api.absorb_queries(q, w_k, num_heads, norm_weight)

    def gradients(dout, out, lse, absorbed, inputs, wanted):
        bits = sum(want << i for i, want in enumerate(wanted))
        found = backward(dout, None, absorbed, *inputs, key_mask, out, lse, scale, eps, bits, *counter)
        if wanted[0]:
            total = found[0].to(out.dtype)
            dist.all_reduce(total, group=group)
            found = (total.to(absorbed.dtype), *found[1:])
        return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))

    out = autograd.merged(gradients, out, lse, absorbed, x, position)
    out = finish(out, lse, w_v, num_heads, norm_weight, norm_bias, b_v, dropout_p)
    return out if b_k is None or not b_k.requires_grad else out + b_k.sum() * 0.0


def explain_latent_attention_sharded(
    q,
    x,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    position=None,
    key_mask=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    group=None,
    backend="auto",
):
    """The `explain` of `latent_attention_sharded`: what this rank computes and sends. It asks no other rank."""
    q, x, w_k, w_v, *_ = api._check(
        q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale
    )
    dropout_p, _ = api._check_dropout(dropout_p, dropout_seed, x.device)
    order = api._preference(q, x, position, num_heads, ABSORBED, dropout_p)
    name = choose("latent_attention_sharded", x, w_k.shape[1], backend, order)
    rows, channels, batch, length = num_heads * q.shape[1], w_k.shape[1], x.shape[0], x.shape[1]
    number = torch.promote_types(x.dtype, torch.float32).itemsize
    forward, backward = batch * rows * (channels + 2 + (dropout_p > 0.0)) * number, q.shape[0] * rows * channels * number
    detail = (
        f"absorbed, {4 * batch * rows * length * channels:.3g} operations for this rank's {length} rows; all-reduces of "
        f"{forward:.3g} bytes forward and {backward:.3g} bytes backward"
    )
    reasons = {n: refusals(n, x, channels) for n in _backends.NAMES}
    return _backends.Explanation("latent_attention_sharded", name, detail, reasons)


def _agree(group, facts, own, failure):
    """What every rank has as its `own`. Raises on all of them unless all have the same `facts` and none has a `failure`."""
    every = [None] * dist.get_world_size(group)
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    dist.all_gather_object(every, (facts, own, message), group)
    if failure is not None:
        raise failure
    for rank, (*_, message) in enumerate(every):
        if message is not None:
            raise ValueError(f"rank {rank} of the group was given what it cannot take: {message}")
    for fact in facts:
        values = [of_rank[fact] for of_rank, *_ in every]
        if any(value != values[0] for value in values):
            raise ValueError(f"{fact} differs between the ranks of the group: {values}; it must be the same")
    return [own for _, own, _ in every]


def _merge(group, out, lse):
    """(out, lse) of all ranks' rows. With the highest lse known, sums of exp(lse - top) [out, 1] are of moderate size."""
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    share = torch.where(top == float("-inf"), 0.0, (lse - top).exp())[..., None]
    sums = torch.cat([out * share, share], -1)
    dist.all_reduce(sums, group=group)
    out, total = sums[..., :-1], sums[..., -1]
    return out / torch.where(total == 0.0, 1.0, total)[..., None], top + total.log()
