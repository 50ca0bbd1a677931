"""One of three processes that share one input: `sharded.py RANK PORT BACKEND`."""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from mmkernels.modules import LatentCrossAttention, PerceiverEncoder, set_backend
from mmkernels.ops import latent_attention, latent_attention_sharded
from mmkernels.testing import assert_within_budget, farthest_of_nearby, usual_error

RANK, PORT, BACKEND = int(sys.argv[1]), sys.argv[2], sys.argv[3]
SIZES = (40, 0, 57)  # rows of the ranks: one has none
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=RANK, world_size=3, timeout=timedelta(seconds=60))
torch.manual_seed(0)
weights = dict(
    q=torch.randn(2, 7, 16),
    w_k=torch.randn(16, 21) * 0.2,
    w_v=torch.randn(24, 21) * 0.2,
    norm_weight=1 + 0.3 * torch.randn(21),
    norm_bias=0.3 * torch.randn(21),
    b_v=torch.randn(24),
    b_k=torch.randn(16),
)
x, position, mask = torch.randn(2, 97, 13), torch.randn(97, 8), torch.rand(2, 97) < 0.7
loss = torch.randn(2, 7, 24)


def gradients(function, inputs):
    inputs = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    out = function(**inputs)
    return out.detach(), dict(
        zip(inputs, torch.autograd.grad((out * loss.to(out.dtype)).sum(), list(inputs.values())), strict=True)
    )


def mine(tensor, dim):
    return tensor.split(SIZES, dim)[RANK]


def check(weights, x, position, mask, backend, bound=1e-4, **options):
    """Output and the gradients of weights are those of one process, the gradients of x and position their rows of them."""
    inputs = {**weights, "x": x} if position is None else {**weights, "x": x, "position": position}
    whole = gradients(lambda **t: latent_attention(**t, key_mask=mask, num_heads=2, backend="reference", **options), inputs)
    local = {n: mine(t, {"x": 1, "position": 0}[n]) if n in ("x", "position") else t for n, t in inputs.items()}
    visible = None if mask is None else mine(mask, 1)
    ours = gradients(
        lambda **t: latent_attention_sharded(**t, key_mask=visible, num_heads=2, backend=backend, **options), local
    )
    torch.testing.assert_close(ours[0], whole[0], rtol=bound, atol=bound)
    for name in inputs:
        expected = whole[1][name]
        if name in ("x", "position"):
            expected = mine(expected, {"x": 1, "position": 0}[name])
        torch.testing.assert_close(ours[1][name], expected, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        again = latent_attention_sharded(**local, key_mask=visible, num_heads=2, backend=backend, **options)
    assert torch.equal(again, ours[0])
    every = [torch.empty_like(again) for _ in SIZES]
    dist.all_gather(every, again)
    assert torch.equal(every[0], every[1]) and torch.equal(every[0], every[2])


check(weights, x, position, mask, BACKEND)
check({**weights, "q": weights["q"][:1]}, x, position, None, BACKEND, scale=2.0)
double = {n: t.double() for n, t in weights.items()}
hidden = mask.clone()
hidden[1] = False
hidden[0, :40] = False  # nothing on the first rank; nothing of the second example anywhere
poisoned = torch.where(hidden[..., None], x, float("nan")).double()
check(double, poisoned, position.double(), hidden, "reference", 1e-9)
check({**weights, "q": weights["q"] * 300}, x, position, mask, BACKEND, 1e-3)


# --- Dropout: what it drops of all rows ------------------------------------------------------------------------------------

seed = torch.tensor([5])
check(weights, x, position, mask, BACKEND, dropout_p=0.3, dropout_seed=seed)
check(double, x.double(), position.double(), None, "reference", 1e-9, dropout_p=0.3, dropout_seed=seed)
part = dict(x=mine(x, 1), position=mine(position, 0), num_heads=2, backend=BACKEND)
torch.manual_seed(RANK)  # the first rank draws for all
drawn = latent_attention_sharded(**weights, **part, dropout_p=0.3)
torch.manual_seed(0)
expected = latent_attention(**weights, x=x, position=position, num_heads=2, backend=BACKEND, dropout_p=0.3)
torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)


# --- DDP averages complete gradients, and leaves them as they are ---------------------------------------------------------


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({n: nn.Parameter(t.clone()) for n, t in weights.items()})

    def forward(self, x, position, sharded):
        op = latent_attention_sharded if sharded else latent_attention
        return op(**self.weights, x=x, position=position, num_heads=2, backend=BACKEND)


single, replicated = Read(), nn.parallel.DistributedDataParallel(Read())
(single(x, position, False) * loss).sum().backward()
(replicated(mine(x, 1), mine(position, 0), True) * loss).sum().backward()
for (name, expected), ours in zip(single.named_parameters(), replicated.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"DDP, {n}: {m}")

module = LatentCrossAttention(12, 21, num_heads=3, backend=BACKEND)
latents = torch.randn(1, 5, 12)
whole = module(latents, x, position=position, key_mask=mask)
local = dict(position=mine(position, 0), key_mask=mine(mask, 1), group=dist.group.WORLD)
shard = module(latents, mine(x, 1), **local)
torch.testing.assert_close(shard, whole, rtol=1e-4, atol=1e-4)

sizes = dict(num_latents=5, latent_channels=16, num_cross_attends=2, num_blocks=2, layers_per_block=1, self_heads=4)
encoder = PerceiverEncoder(21, backend=BACKEND, **sizes)


def results(model, rows, **options):
    model.zero_grad()
    out = model(rows, **options)
    out.square().sum().backward()
    return {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters()}


nn.init.normal_(encoder.latents)  # as they come they are small, and the norms behind them magnify every rounding
shard = results(encoder, mine(x, 1), **local)
double = set_backend(copy.deepcopy(encoder), "reference").double()
whole = dict(position=position.double(), key_mask=mask)
exact = results(double, x.double(), **whole)
double_shard = results(double, mine(x, 1).double(), **local | {"position": local["position"].double()})
eager = set_backend(copy.deepcopy(encoder), "eager")
plain = farthest_of_nearby(lambda m, rows: results(m, rows, position=position, key_mask=mask), eager, x, exact)
typical = usual_error(plain, exact)
for name, right in exact.items():
    torch.testing.assert_close(double_shard[name], right, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert_within_budget(shard[name], right, plain[name], name, typical=typical)


# --- Ranks that disagree: an error on all of them --------------------------------------------------------------------------

local = dict(x=mine(x, 1), position=mine(position, 0), num_heads=2)
two = dist.new_group([0, 2])
if RANK != 1:
    alone = latent_attention_sharded(**weights, **local, group=two, backend=BACKEND)
    torch.testing.assert_close(alone, latent_attention(**weights, x=x, position=position, num_heads=2), rtol=1e-4, atol=1e-4)
for what, mine_is, theirs in (
    (dict(num_heads=1), None, "num_heads differs between the ranks of the group: [2, 2, 1]; it must be the same"),
    (
        dict(x=local["x"][:1]),
        ValueError,
        "rank 2 of the group was given what it cannot take: ValueError: q has shape (2, 7, 16)",
    ),
    (dict(q=weights["q"].double()), TypeError, "rank 2 of the group was given what it cannot take: TypeError: q has dtype"),
    (dict(w_v=weights["w_v"][:12]), ValueError, "rank 2 of the group was given"),
    (dict(norm_bias=None), None, "norm_bias is None differs between the ranks of the group: [False, False, True]"),
    (dict(q=weights["q"].clone().requires_grad_()), None, "wants a gradient differs between the ranks"),
    (dict(dropout_p=0.1), None, "dropout_p differs between the ranks of the group: [0.0, 0.0, 0.1]; it must be the same"),
    (dict(dropout_seed=seed), None, "dropout_seed differs between the ranks of the group: [None, None, 5]"),
    (dict(dropout_p=1.0), ValueError, "rank 2 of the group was given what it cannot take: ValueError: dropout_p is 1.0"),
    (dict(backend="cuda"), RuntimeError, "rank 2 of the group was given what it cannot take: BackendError"),
):
    arguments = {**weights, **local, **(what if RANK == 2 else {})}
    try:
        latent_attention_sharded(**arguments)
    except Exception as error:
        kind = mine_is if RANK == 2 and mine_is is not None else ValueError
        assert isinstance(error, kind), (what, error)
        assert theirs in str(error) or kind is mine_is, (what, error)
    else:
        raise AssertionError(what)
if RANK == 1:
    try:
        latent_attention_sharded(**weights, **local, group=two)
    except ValueError as error:
        assert "group does not have this rank" in str(error)
    else:
        raise AssertionError("a rank outside of the group")
dist.destroy_process_group()
print("the whole input's result")
