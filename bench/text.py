"""Problems of whole text-to-text models: a training step of HyperGrid-T5, and generation from it.

Weights are random and given with every call, so that a model is verified and timed like an op. Hugging Face's T5, which has no
grids, is a peer of the plain T5 and a floor of the one with grids.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from mmkernels import testing
from mmkernels.models import hypergrid_t5

from .problem import problem_dtype, problem_id

GRIDS = ".hypergrid."  # in the names of the weights that a plain T5 has not
# What a sequence of beams may lose of its log-probability to choices between equals, which rounding makes; tokens at random
# lose two fifths.
TIES = 0.05
KINKS = 4.0  # of the root of eps, up to which gradients through many ReLUs agree


class Text(NamedTuple):
    """A model by its config's `size`. `beams`: 0 is a forward pass with its loss (and the backward pass of training, dropping
    nothing), 1 greedy generation of `targets` tokens, more are a beam search."""

    op: str
    name: str
    batch: int
    size: str
    sources: int  # tokens of an input
    targets: int
    grid: tuple = ()
    beams: int = 0
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    @property
    def config(self):
        return hypergrid_t5.CONFIGS[f"hypergrid-t5-{self.size}"]

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=2, size="tiny", sources=5, targets=4, grid=self.grid and (4, 2))

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        tensors = {name: _weight(name, p, normal) for name, p in _network(self, "eager").model.named_parameters()}
        # Its logit is 0, far below the largest of the others: no target ends early, so all have the same number of steps.
        tensors["shared.weight"][self.config.eos_token_id] = 0
        device = tensors["shared.weight"].device
        tensors["input_ids"] = _ids(self, self.sources, device)
        if self.beams:
            return tensors, {}, []
        tensors["labels"] = _ids(self, self.targets, device)
        return tensors, {}, [()]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        return tuple(name for name, _ in _network(self, "eager").model.named_parameters())

    def exact(self, inputs, names: tuple) -> testing.Run:
        """The loss and its gradients, or the tokens of every example, by the plain twin in float64."""
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
        with torch.set_grad_enabled(bool(names)):
            return testing.run(function(self, "eager"), wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of all products with a weight and of the attentions; of the weights, read once a step."""
        c = self.config
        inner, feed_forward, b = c.num_heads * c.d_kv, 2 * c.d_model * c.d_ff, self.batch
        encoder = c.num_layers * (4 * c.d_model * inner + feed_forward)
        decoder = c.num_decoder_layers * (6 * c.d_model * inner + feed_forward) + c.d_model * c.vocab_size
        memory = c.num_decoder_layers * 2 * c.d_model * inner
        s, t, rows = self.sources, self.targets, max(1, self.beams)
        products = b * (s * (encoder + memory) + rows * t * decoder)
        scores = b * inner * (c.num_layers * s * s + c.num_decoder_layers * rows * t * (t + s))
        forward = 2 * products + 4 * scores
        weights = self.torch_dtype.itemsize * (encoder + memory + decoder * (t if self.beams else 1))
        return (forward, weights) if pass_ == "forward" else (6 * products + 14 * scores, 3 * weights)


def _text(name, size, batch, sources, targets, **options):
    return Text("hypergrid_t5", name, batch, size, sources, targets, **options)


def _generation(problem):
    """Greedy and by four beams, with grids and without."""
    return [
        p._replace(name=f"{p.name}-{what}", targets=32, beams=beams)
        for p in (problem, _plain(problem))
        for what, beams in (("greedy", 1), ("4-beams", 4))
    ]


def _plain(problem):
    return problem._replace(name=f"{problem.size}-plain", grid=())


SMALL = _text("small-32x32", "small", 4, 256, 32, grid=(32, 32))
BASE = _text("base-32x32", "base", 32, 512, 62, grid=(32, 32))
SMALL_PLAIN, BASE_PLAIN = _plain(SMALL), _plain(BASE)
GENERATE, GENERATE_BASE = _generation(SMALL), _generation(BASE)


# --- Inputs -----------------------------------------------------------------------------------------------------------------


def _weight(name, parameter, normal):
    """As T5 begins, with some spread in the gains and queries as small as its own."""
    if name == "shared.weight":
        return normal(*parameter.shape)
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0 if name.endswith("norm.weight") else 0.0)
    deviation = parameter.shape[-1] ** -0.5
    return normal(*parameter.shape, scale=deviation * (0.1 if name.endswith((".q.weight", "_bias.weight")) else 1.0))


def _ids(problem, length, device):
    """(B, length) tokens, from behind the special ones, that look like noise and are the same everywhere."""
    numbers = torch.arange(1, problem.batch * length + 1, device=device).view(problem.batch, length)
    return 2 + numbers * 7919 % (problem.config.vocab_size - 2)


# --- What is compared -------------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """A model as a function of ids, and of labels where there are any."""

    def __init__(self, model, problem):
        super().__init__()
        self.model, self.problem = model.eval(), problem

    def forward(self, input_ids, labels=None):
        if labels is not None:
            return self.model(input_ids=input_ids, labels=labels).loss
        problem = self.problem
        return self.model.generate(input_ids, num_beams=problem.beams, max_new_tokens=problem.targets)


@functools.lru_cache(maxsize=8)
def _network(problem: Text, backend):
    """The model without memory. `backend`: ours, or a function of the problem that makes another model."""
    with torch.device("meta"):
        if callable(backend):
            return _Network(backend(problem).to(problem.torch_dtype), problem)
        changes = vars(problem.config) | {"grid": problem.grid or None, "backend": backend}
        model = hypergrid_t5.HyperGridT5(hypergrid_t5.HyperGridT5Config(**changes), dtype=problem.torch_dtype)
    return _Network(model, problem)


def function(problem: Text, backend, *, compiler=lambda function: function):
    """The model as a function of its weights, `input_ids` and `labels`: [loss], or the tokens (B, 1 + targets)."""

    def call(network, weights, given):
        out = functional_call(network, weights, kwargs=given)
        return out if problem.beams else [out]

    call = compiler(call)

    def run(**tensors):
        given = {n: tensors.pop(n) for n in ("input_ids", "labels") if n in tensors}
        return call(_network(problem, backend), {f"model.{n}": t for n, t in tensors.items()}, given)

    return run


# --- Verification -------------------------------------------------------------------------------------------------


def allowed_error(problem: Text, what: str, same: float) -> float:
    """What a relative error may be, from `same`, that of a smooth function."""
    if what == "typical gradient":
        # Rounding turns ReLUs on and off: a share of units in the order of eps, so that norms move by its root.
        return max(same, KINKS * torch.finfo(problem.torch_dtype).eps ** 0.5)
    if what.startswith("gradient"):
        return max(same, one_kink(problem.torch_dtype))
    return TIES if problem.beams > 1 else same


def one_kink(dtype: torch.dtype) -> float:
    """What the relative error of a gradient may be that meets a ReLU which rounding has switched, and which matters much."""
    return 8 * KINKS * torch.finfo(dtype).eps ** 0.5


def lost_by_tokens(problem: Text, inputs, tokens: torch.Tensor, exact: torch.Tensor) -> float:
    """How far generated `tokens` are from the best, by the logits of the plain twin in float64; 0 where they are `exact`.

    Rounding may choose between equals, and what follows is then another text. Greedy: the most that a token's logit is below
    the largest one, given the tokens before it, over the largest logit. Beams: the most that an example's log-probability is
    below that of its exact tokens, relatively.
    """
    if tokens.shape != exact.shape:
        return float("inf")
    wide = {n: t.double() for n, t in inputs.tensors.items() if t.is_floating_point()}
    network = _network(problem, "eager").model

    def logits(ids):
        given = {"input_ids": inputs.tensors["input_ids"], "decoder_input_ids": ids[:, :-1]}
        return functional_call(network, wide, kwargs=given).logits

    def chosen(of_all, ids):
        return of_all.gather(2, ids[:, 1:, None])[..., 0]

    with torch.no_grad():
        ours = logits(tokens)
        if problem.beams == 1:
            largest = ours.amax(2)
            return float(((largest - chosen(ours, tokens)) / largest.abs()).max())
        own, best = (chosen(o.log_softmax(2), ids).sum(1) for o, ids in ((ours, tokens), (logits(exact), exact)))
        return float(((best - own) / best.abs()).max().clamp(min=0))
