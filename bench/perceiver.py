"""Problems of whole models: Perceiver IO by its published configurations, beside Hugging Face's classes of the same weights.

Weights are random and given with every call, under our names, so that a model is verified and timed like an op.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from mmkernels import testing
from mmkernels.models import perceiver_io
from mmkernels.ops.latent import plan

from .problem import problem_dtype, problem_id

POINTS = 512  # of the pixels and of the sound's patches, in a training step of the autoencoder
# What the library does differently from the released models, and a comparison therefore does as well.
LIBRARY = {
    "imagenet-learned": {"decoder": {"residual": True}},
    "imagenet-conv": {"input": {"padding": "huggingface", "positions": {"max_resolution": [56, 56]}}},
}


def _merged(part, changes):
    return part | {name: _merged(part.get(name, {}), own) if isinstance(own, dict) else own for name, own in changes.items()}


def _picture(*shape):
    return {"input": {"shape": shape}, "queries": {"channels": 32}}


_VIDEO, _SOUND = {"shape": [2, 16, 16], "max_resolution": [2, 4, 4]}, {"shape": [12], "max_resolution": [48]}
# Small models that the library's classes can be as well.
TINY = {
    "imagenet-fourier": _merged(_picture(7, 5), {"input": {"positions": {"max_resolution": [224, 224]}}}),
    "imagenet-learned": _picture(6, 6),
    "imagenet-conv": _picture(31, 26),
    "flow": {
        "input": {"shape": [6, 8], "positions": {"max_resolution": [6, 8]}},
        "decoder": {"qk_channels": 32, "v_channels": 32},
        "output": {"shape": [6, 8]},
    },
    "language-bytes": {
        "input": {"vocab_size": 20, "max_length": 9, "channels": 64},
        "encoder": {"cross_qk_channels": 16, "self_qk_channels": 16, "cross_v_channels": 32, "self_v_channels": 32},
        "queries": {"count": 9, "channels": 64},
        "decoder": {"v_channels": 64},
        "output": {"vocab_size": 20},
    },
    "kinetics": {
        "input": {
            "modalities": {
                "image": {"shape": [2, 16, 16], "positions": {"max_resolution": [2, 4, 4]}},
                "audio": {"shape": [48], "patch": [4], "positions": {"max_resolution": [48]}},
                "label": {"channels": 5},
            }
        },
        "queries": {"modalities": {"image": _VIDEO, "audio": _SOUND, "label": {"channels": 10}}},
        "output": {
            "channels": 12,
            "modalities": {"audio": {"samples": 4}, "image": {"shape": [2, 16, 16]}, "label": {"num_classes": 5}},
        },
    },
}


class PerceiverIO(NamedTuple):
    """A model by its config's name without "perceiver-io-"."""

    op: str
    name: str
    batch: int
    config: str
    tiny: bool = False
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(tiny=True)

    @property
    def sizes(self) -> perceiver_io.PerceiverIOConfig:
        config = perceiver_io.CONFIGS[f"perceiver-io-{self.config}"]
        changes = [LIBRARY.get(self.config, {})]
        if self.tiny:
            sizes = {"num_latents": 8, "latent_channels": 32, "num_blocks": 2, "layers_per_block": 1}
            changes += [{"encoder": sizes}, TINY[self.config]]
        for change in changes:
            parts = {part: _merged(getattr(config, part), own) for part, own in change.items()}
            config = dataclasses.replace(config, **parts)
        return config

    @property
    def kind(self) -> str:
        """Of its output: "classes", "tokens", "flow" or "multimodal"."""
        return self.sizes.output["kind"]

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        tensors = {name: _weight(name, p, normal) for name, p in network(self, "eager", "meta").named_parameters()}
        device = normal(1).device
        input, b = self.sizes.input, self.batch
        if self.kind == "tokens":
            numbers = torch.arange(1, b * input["max_length"] + 1, device=device).view(b, -1)
            tensors["x"] = 6 + numbers * 7919 % (input["vocab_size"] - 6)
            return tensors, {}, [(*tensors["x"].shape, input["vocab_size"])]
        if self.kind == "flow":
            tensors["x"] = normal(b, 2, *input["shape"], 27)
            return tensors, {}, [(b, *input["shape"], 2)]
        if self.kind == "classes":
            tensors["x"] = normal(b, *input["shape"], 3)
            return tensors, {}, [(b, self.sizes.output["num_classes"])]
        parts, outputs = input["modalities"], self.sizes.output["modalities"]
        tensors["audio"] = normal(b, *parts["audio"]["shape"], 1)
        tensors["image"] = normal(b, *parts["image"]["shape"], 3)
        tensors["label"] = normal(b, parts["label"]["channels"])
        samples, classes = outputs["audio"]["samples"], outputs["label"]["num_classes"]
        points = _points(self, device)
        return tensors, {}, [(b, len(points["audio"]) * samples), (b, len(points["image"]), 3), (b, classes)]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        # The bias of keys has no gradient, since it adds to all scores alike.
        return tuple(n for n, _ in network(self, "eager", "meta").named_parameters() if not n.endswith("attention.key.bias"))

    def exact(self, inputs, names: tuple) -> testing.Run:
        """Outputs and gradients in float64, by the plain twin."""
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
        with torch.set_grad_enabled(bool(names)):
            run = function(self._replace(dtype="float64"), "eager")
            return testing.run(run, wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes) of products: attentions by the cheapest plan, the backward twice the forward; weights once."""
        model, b = network(self, "eager", "meta"), self.batch
        encoder, decoder = model.encoder, model.decoder.cross
        n, d = encoder.latents.shape
        m, outputs = self._elements()
        forward = _cross(encoder.cross[0], n, m) + _cross(decoder, outputs, n)
        layers = [layer for block in encoder.blocks for layer in block] * (encoder.num_blocks // len(encoder.blocks))
        for layer in layers:
            linear = sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight") and p.dim() == 2)
            scores = n * n * (layer.attention.query.out_features + layer.attention.value.out_features)
            forward += 2 * (n * linear + scores)
        moved = self.torch_dtype.itemsize * sum(p.numel() for p in model.parameters())
        return (b * forward, moved) if pass_ == "forward" else (3 * b * forward, 3 * moved)

    def _elements(self):
        """(elements of the input, outputs) of one example."""
        if self.kind == "tokens":
            return (self.sizes.input["max_length"],) * 2
        if self.kind == "multimodal":
            parts = self.sizes.input["modalities"]
            patches = [zip(parts[name]["shape"], parts[name]["patch"], strict=True) for name in ("audio", "image")]
            inputs = 1 + sum(math.prod(s // p for s, p in sizes) for sizes in patches)
            return inputs, sum(1 if p is None else len(p) for p in _points(self, "cpu").values())
        elements = math.prod(self.sizes.input["shape"])
        if self.sizes.input["kind"] == "conv_stem":
            elements //= 16
        return elements, elements if self.kind == "flow" else 1


def _cross(block, queries, keys):
    """Operations of a cross-attention and its MLP."""
    a = block.attention
    sizes = a.query.in_features, a.key.in_features, a.query.out_features, a.value.out_features, a.output.out_features
    mlp = sum(layer.weight.numel() for layer in block.mlp if isinstance(layer, nn.Linear))
    return plan.choose_plan(queries, keys, *sizes, a.num_heads).flops + 2 * queries * mlp


def _points(problem, device):
    """The outputs of the autoencoder that are wanted, spread over each modality."""
    queries = problem.sizes.queries["modalities"]
    counts = {name: math.prod(queries[name]["shape"]) for name in ("audio", "image")}
    points = {name: torch.arange(0, n, max(1, n // POINTS), device=device)[:POINTS] for name, n in counts.items()}
    return points | {"label": None}


def _weight(name, parameter, normal):
    """Such that every layer's output has the size of its input, and scores have unit variance."""
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if parameter.dim() == 4:
        return normal(*parameter.shape, scale=math.prod(parameter.shape[1:]) ** -0.5)
    return normal(*parameter.shape, scale=parameter.shape[-1] ** -0.5 if name.endswith("weight") else 0.5)


def _problem(config, batch=1):
    return PerceiverIO("perceiver_io", config, batch, config)


# By value: flow takes minutes on a CPU.
MODELS = [
    _problem(name) for name in ("imagenet-fourier", "language-bytes", "kinetics", "imagenet-conv", "imagenet-learned", "flow")
]


# --- What is compared -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def network(problem: PerceiverIO, backend, device) -> nn.Module:
    """`backend`: ours, or a function of our model that makes another one."""
    sizes = dataclasses.replace(problem.sizes, backend="auto" if callable(backend) else backend)
    model = perceiver_io.PerceiverIO(sizes, device=device, dtype=problem.torch_dtype)
    return (backend(model) if callable(backend) else model).eval()


def function(problem: PerceiverIO, backend, *, compiler=lambda function: function):
    """The model as a function of its input and its weights by name."""

    def ours(model, weights, inputs):
        if problem.kind == "multimodal":
            out = functional_call(model, weights, (inputs,), {"points": _points(problem, inputs["image"].device)})
            return [out["audio"].flatten(1), out["image"].flatten(1, -2), out["label"].flatten(1)]
        return [functional_call(model, weights, (inputs["x"],))]

    def theirs(model, weights, inputs):
        if problem.kind == "multimodal":
            given = inputs | {"image": inputs["image"].movedim(-1, 2)}
            points = _points(problem, given["image"].device)
            out = functional_call(model, weights, (), {"inputs": given, "subsampled_output_points": points}).logits
            return [out["audio"].flatten(1), out["image"].flatten(1, -2), out["label"].flatten(1)]
        x = inputs["x"] if problem.kind == "tokens" else inputs["x"].movedim(-1, -3)
        return [functional_call(model, weights, (), {"inputs": x}).logits]

    call = compiler(theirs if callable(backend) else ours)

    def run(**tensors):
        inputs = {n: tensors.pop(n) for n in ("x", "audio", "image", "label") if n in tensors}
        model = network(problem, backend, str(next(iter(tensors.values())).device))
        if callable(backend):
            names = _library_names(problem)
            tensors = {names[n]: t[..., None, None] if "convnet_1x1.weight" in names[n] else t for n, t in tensors.items()}
        return call(model, tensors, inputs)

    return run


@functools.lru_cache(maxsize=4)
def _library_names(problem):
    own = network(problem, "eager", "meta")
    return dict(zip(own.state_dict(), perceiver_io.to_huggingface(own), strict=True))
