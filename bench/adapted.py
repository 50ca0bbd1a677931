"""Problems of a user's BERT with adapters: one layer of it, its base frozen, beside the libraries `adapters` and PEFT.

What an adapter costs is the difference to the same layer without it, which is a candidate: the floor. Weights are random and
given with every call, under the names that both libraries use, so that a model is verified and timed like an op.
"""

from typing import NamedTuple

import torch

from mmkernels import testing

from .problem import lacking, problem_dtype, problem_id

# Parts of the names of the weights that the plain model has not.
OWN = (".adapters.", ".adapter_fusion_layer.", ".lora_", "invertible_adapters.", "shared_parameters.")


class Adapted(NamedTuple):
    """`preset`: of AdapterHub, or "lora" (rank 8 at queries and values). `setup`: "one" adapter, "split", whose examples have
    `adapters` adapters in equal parts, or "fuse", AdapterFusion of as many, which trains alone. "" and 0: the plain model."""

    op: str
    name: str
    batch: int
    length: int
    channels: int
    preset: str
    setup: str = "one"
    adapters: int = 1
    dtype: str = "float32"
    activation: str = "gelu"  # of the model, by transformers' name

    id = problem_id
    torch_dtype = problem_dtype

    @property
    def plain(self):
        return self._replace(preset="", setup="one", adapters=0)

    @property
    def names(self) -> list:
        return [f"a{number}" for number in range(self.adapters)]

    @property
    def missing(self) -> str:
        """What is not installed that the model itself is of; empty when nothing is."""
        return lacking("peft" if self.preset == "lora" else "transformers")

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=max(2, self.adapters), length=3, channels=64)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        rows = self.batch, self.length, self.channels
        weights = {name: _weight(name, p, normal) for name, p in self._parameters().items()}
        return {"x": normal(*rows)} | weights, {}, [rows]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        trained = OWN[1:2] if self.setup == "fuse" else OWN
        named = (n for n in self._parameters() if any(part in n for part in trained))
        return ("x", *(n for n in named if not n.endswith("key.bias")))  # whose gradient is zero: it adds to all scores alike

    def exact(self, inputs, names: tuple) -> testing.Run:
        """Output and gradients in float64, by the plain twin; of LoRA by PEFT."""
        from . import baselines

        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
        with torch.set_grad_enabled(bool(names)):
            run = baselines.adapted_function(self._replace(dtype="float64"), self._exact_by)
            return testing.run(run, wide, names, [c.double() for c in inputs.cotangent])

    @property
    def _exact_by(self):
        return {"lora": "peft", "": "transformers"}.get(self.preset, "eager")

    def _parameters(self) -> dict:
        from . import baselines

        return dict(baselines.adapted_network(self, self._exact_by, torch.device("cpu")).named_parameters())

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of the layer's and the adapters' products; of all weights, and of rows in and out.

        The backward has one product of each frozen weight, and two of each that trains.
        """
        rows, c = self.batch * self.length, self.channels
        reduction = {"seq_bn": 16, "double_seq_bn": 8, "par_bn": 2, "seq_bn_inv": 16, "compacter": 16}.get(self.preset)
        own = 2 * c * c // reduction if reduction else 4 * 8 * c if self.preset == "lora" else 0
        own += c * c // 2 if self.preset.endswith("_inv") else 0  # two networks of halves and quarters of the channels
        own = 3 * c * c + self.adapters * own if self.setup == "fuse" else own
        frozen, scores = 12 * c * c, rows * self.length * c
        forward, backward = 2 * rows * (frozen + own) + 4 * scores, 2 * rows * (frozen + 2 * own) + 10 * scores
        moved = self.torch_dtype.itemsize * (frozen + own * max(1, self.adapters) + 2 * rows * c)
        if pass_ == "forward":
            return forward, moved
        return (backward, moved) if pass_ == "backward" else (forward + backward, 2 * moved)


def _weight(name, parameter, normal):
    """Such that every sub-layer's output has the size of its input, adapters matter, and scores have unit variance."""
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0 if name.endswith("LayerNorm.weight") else 0.0)
    inputs = parameter.shape[-1]
    return normal(*parameter.shape, scale=1 / inputs if "fusion_layer" in name and "key" in name else 0.5 * inputs**-0.5)


def _adapted(name, batch, preset, **options):
    return Adapted("adapted_layer", f"{name}-{batch}x128", batch, 128, 768, preset, **options)


ONE = [_adapted(preset, n, preset) for n in (1, 8) for preset in ("seq_bn", "double_seq_bn", "par_bn")]
# The GELU of ALBERT, GPT-2 and their like.
GELU_NEW = _adapted("gelu_new-seq_bn", 8, "seq_bn", activation="gelu_new")
# MAD-X's language adapter, whose embeddings pass through NICE, and Compacter's, whose matrices are made of Kronecker products.
OTHER = [_adapted(preset, n, preset) for n in (1, 8) for preset in ("seq_bn_inv", "compacter")]
SPLIT = [_adapted(f"8-{preset}", 8, preset, setup="split", adapters=8) for preset in ("seq_bn", "double_seq_bn")]
SPLIT_64 = _adapted("64-seq_bn", 64, "seq_bn", setup="split", adapters=64)
FUSE = [_adapted(f"fuse-{n}", 8, "seq_bn", setup="fuse", adapters=n) for n in (3, 8)]
LORA = _adapted("lora", 8, "lora")
LORA_8 = _adapted("8-lora", 8, "lora", setup="split", adapters=8)
