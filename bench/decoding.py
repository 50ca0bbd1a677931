"""Problems of `ops.latent_decode`: output queries that read projected latents, as Perceiver IO's decoders do.

`channels` of the queries, `position` of which are the same for every example; `qk` and `v` channels of the projected latents
in all heads together, `out` of the result.
"""

import functools
from typing import NamedTuple

from mmkernels import testing
from mmkernels.ops import latent_decode
from mmkernels.ops.latent import plan

from .problem import problem_dtype, problem_id


class Decoding(NamedTuple):
    op: str
    name: str
    batch: int
    queries: int
    latents: int
    channels: int
    qk: int
    v: int
    out: int
    heads: int = 1
    position: int = 0
    shared: bool = False  # one array of queries for the whole batch
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        sizes = dict(channels=6, position=min(self.position, 2), qk=2 * self.heads, v=2 * self.heads, out=3)
        return self._replace(batch=1, queries=3, latents=2, **sizes)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        c = self.channels
        tensors = {
            "queries": normal(1 if self.shared else self.batch, self.queries, c - self.position, shift=0.3),
            "k": normal(self.batch, self.latents, self.qk),
            "v": normal(self.batch, self.latents, self.v),
            "w_q": normal(self.qk, c, scale=c**-0.5),
            "w_o": normal(self.out, self.v, scale=self.v**-0.5),
            "norm_weight": normal(c, scale=0.1, shift=1.0),
            "norm_bias": normal(c, scale=0.1),
            "b_q": normal(self.qk, scale=0.1),
            "b_o": normal(self.out, scale=0.1),
        }
        if self.position:
            tensors["position"] = normal(self.queries, self.position)
        return tensors, {"num_heads": self.heads}, [(self.batch, self.queries, self.out)]

    def wanted(self, pass_: str) -> tuple:
        """The arguments whose gradients a pass computes; -dx: those of the queries too, which may be data."""
        if pass_ == "forward":
            return ()
        names = ("k", "v", "w_q", "w_o", "norm_weight", "norm_bias", "b_q", "b_o")
        return (*names, "queries") if pass_.endswith("-dx") else names

    def exact(self, inputs, names: tuple) -> testing.Run:
        wide = {n: t.double() for n, t in inputs.tensors.items()}
        run = functools.partial(function(latent_decode), backend="reference", **inputs.options)
        return testing.run(run, wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes) of the cheapest plan. The backward recomputes the scores, as every fused kernel does."""
        sizes = (self.queries, self.latents, self.channels, 0, self.qk, self.v, self.out, self.heads)
        best = plan.choose_plan(*sizes, score_plans=plan.SCORE_PLANS[::2], value_plans=plan.VALUE_PLANS[::2])
        gradient = pass_.endswith("-dx")
        rows = 2 * self.queries * self.latents
        if best.score == "project":
            score = rows * self.qk * 3 + 2 * self.queries * self.channels * self.qk * (1 + gradient)
        else:
            score = rows * self.heads * self.channels * (2 + gradient)
        if best.value == "project":
            value = rows * self.v * 2 + 4 * self.queries * self.v * self.out
        else:
            value = rows * self.heads * self.out * 2
        forward, backward = self.batch * best.flops, self.batch * (score + value)
        content = self.queries * (self.channels - self.position) * (1 if self.shared else self.batch)
        fixed = self.channels * (self.qk + 2) + self.qk + self.out * (self.v + 1)
        keys = self.batch * self.latents * (self.qk + self.v)
        inputs = content + self.queries * self.position + keys + fixed
        output = self.batch * self.queries * self.out
        moved = {"forward": inputs + output}
        moved["backward"] = inputs + 2 * output + keys + fixed + gradient * content
        part = pass_.removesuffix("-dx")
        item = self.torch_dtype.itemsize
        if part == "step":
            return forward + backward, item * (moved["forward"] + moved["backward"])
        return (forward if part == "forward" else backward), item * moved[part]


# Perceiver IO (Jaegle et al. 2022): optical flow at 368 x 496, Kinetics with all outputs, masked language, ImageNet.
FLOW = Decoding("latent_decode", "flow", 1, 182528, 2048, 322, 512, 512, 322, position=258)
KINETICS = Decoding("latent_decode", "kinetics", 1, 804737, 784, 1026, 512, 512, 512, shared=True)
MLM = Decoding("latent_decode", "language", 1, 2048, 256, 768, 256, 768, 768, heads=8, shared=True)
FLOW_SLICE = FLOW._replace(name="flow-16384", queries=16384)
KINETICS_SLICE = KINETICS._replace(name="kinetics-65536", queries=65536)


def function(op, **options):
    """An op, or a plain twin, as a function of named tensors that returns a list."""

    def run(**tensors):
        return [op(**tensors, **options)]

    return run
