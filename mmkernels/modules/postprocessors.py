"""What stands behind a Perceiver's decoder: outputs (B, O, F) become logits, flow, samples, pixels.

A postprocessor has `channels`, F: what the decoder's last linear layer shall have, or None for none. `pooled` ones read the
latents instead: such a model has no decoder.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..ops._shared.arguments import check_integer, check_number
from .backend import Linear, WithBackend, linear
from .kinds import build
from .positions import check_grid, reset_linear_


class _Output(nn.Module):
    channels, pooled = None, False

    def reset_parameters(self):
        """There are none."""


class ArrayOutput(_Output):
    """Outputs as they come: (B, O, channels); without `channels`, as wide as the query.

    Args:
        channels: F, or None.
        shape: of the outputs, where all of them are there: then (B, *shape, channels).
    """

    def __init__(self, channels=None, *, shape=None, device=None, dtype=None):
        super().__init__()
        if channels is not None:
            check_integer("channels", channels)
        if shape is not None:
            check_grid(shape, 0, None, "shape")
        self.channels, self.shape = channels, None if shape is None else tuple(shape)

    def forward(self, outputs):
        """(B, O, F) -> (B, O, F) or (B, *shape, F)."""
        if self.shape is None or outputs.shape[1] != math.prod(self.shape):
            return outputs
        return outputs.unflatten(1, self.shape)


class ClassOutput(_Output):
    """The logits (B, num_classes) of one query."""

    def __init__(self, num_classes, *, device=None, dtype=None):
        super().__init__()
        check_integer("num_classes", num_classes)
        self.channels = num_classes

    def forward(self, outputs):
        """(B, 1, num_classes) -> (B, num_classes)."""
        return outputs[:, 0]


class SampleOutput(_Output):
    """A signal (B, O samples): every output is a patch of `samples`.

    Args:
        samples: of a patch.
        scale: what they are divided by; that of the input, see `GridInput`.
    """

    def __init__(self, samples, *, scale=1.0, device=None, dtype=None):
        super().__init__()
        check_integer("samples", samples)
        check_number("scale", scale, "a positive number", lambda s: s > 0.0)
        self.channels, self.scale = samples, scale

    def forward(self, outputs):
        """(B, O, samples) -> (B, O samples)."""
        signal = outputs.flatten(1)
        return signal if self.scale == 1.0 else signal / self.scale


class PooledOutput(_Output):
    """The first paper's head: the logits (B, num_classes) of the latents' mean, zero at first.

    Args:
        num_classes: of the linear layer.
        latent_channels: D.
    """

    pooled = True

    def __init__(self, num_classes, latent_channels, *, device=None, dtype=None):
        super().__init__()
        check_integer("num_classes", num_classes)
        self.linear = nn.Linear(latent_channels, num_classes, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        """Zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, latents):
        """(B, N, D) -> (B, num_classes)."""
        return self.linear(latents.mean(1))


class LatentOutput(_Output):
    """The latents themselves, (B, N, D): an embedding of the input."""

    pooled = True

    def __init__(self, *, device=None, dtype=None):
        super().__init__()

    def forward(self, latents):
        """(B, N, D)."""
        return latents


class TokenOutput(_Output, WithBackend):
    """Logits (B, T, vocab_size) of tokens: y E^T + bias with the table E of the input."""

    def __init__(self, vocab_size, *, device=None, dtype=None):
        super().__init__()
        check_integer("vocab_size", vocab_size)
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Zero."""
        nn.init.zeros_(self.bias)

    def forward(self, outputs, table):
        """(B, T, C) and the table (vocab_size, C) -> (B, T, vocab_size)."""
        return linear(outputs, table, self.bias, self.backend)


class TaskOutput(_Output):
    """Several tasks, each with a query of its own and a head of two linear layers with tanh between.

    Args:
        tasks: {name: number of its outputs}, in the order of the queries.
        query_channels: E.
    """

    def __init__(self, tasks, query_channels, *, device=None, dtype=None):
        super().__init__()
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError(f"tasks is {tasks!r}; it must be a dict of one or more")
        for name, count in tasks.items():
            check_integer(f"tasks[{name!r}]", count)
        factory = {"device": device, "dtype": dtype}
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(query_channels, query_channels, **factory),
                    nn.Tanh(),
                    nn.Linear(query_channels, count, **factory),
                )
                for name, count in tasks.items()
            }
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Linear layers truncated normal of variance 1 / fan_in."""
        for head in self.heads.values():
            for layer in (head[0], head[2]):
                reset_linear_(layer.weight, layer.bias)

    def numbers(self, tasks):
        """The places of some tasks, a list of names, among the queries."""
        names = list(self.heads)
        if isinstance(tasks, str) or not isinstance(tasks, (list, tuple)) or not tasks or not set(tasks) <= set(names):
            raise ValueError(f"tasks is {tasks!r}; it must be a list of one or more of {names}")
        return [names.index(task) for task in tasks]

    def forward(self, outputs, tasks=None):
        """(B, number of tasks, E) -> {task: (B, its outputs)}."""
        names = list(self.heads) if tasks is None else tasks
        return {name: self.heads[name](outputs[:, i]) for i, name in enumerate(names)}


class FlowOutput(_Output):
    """Optical flow (B, height, width, 2), in pixels / `per_unit`; the released demo multiplies by 20.

    Args:
        shape: (height, width) of the flow.
        scale: what the outputs are divided by.
        upsample: outputs are on a grid that is so many times coarser. The decoder then gives, beside the flow of a coarse
            pixel, the logits of weights with which each of its finer pixels mixes the flow of its 3 x 3 coarse neighbours
            (RAFT, Teed and Deng 2020, section 3.3).
    """

    def __init__(self, shape, *, scale=100.0, upsample=1, device=None, dtype=None):
        super().__init__()
        check_grid(shape, 0, None, "shape")
        check_number("scale", scale, "a positive number", lambda s: s > 0.0)
        check_integer("upsample", upsample)
        if len(shape) != 2 or any(n % upsample for n in shape):
            raise ValueError(f"shape is {shape!r}; it must be (height, width), multiples of upsample, {upsample}")
        self.shape, self.scale, self.upsample = tuple(shape), scale, upsample
        self.channels = 2 if upsample == 1 else 2 + 9 * upsample**2

    def forward(self, outputs):
        """(B, O, channels) -> (B, height, width, 2); without upsampling (B, O, 2) where not all outputs are there."""
        up = self.upsample
        grid = tuple(n // up for n in self.shape)
        flow = outputs[..., :2] / self.scale
        if up == 1 and flow.shape[1] != math.prod(grid):
            return flow
        flow = flow.unflatten(1, grid)
        if up == 1:
            return flow
        weights = outputs[..., 2:].unflatten(-1, (9, up * up)).softmax(-2)  # (B, O, 9, up^2)
        padded = F.pad(flow * up, (0, 0, 1, 1, 1, 1))
        around = [padded[:, i : i + grid[0], j : j + grid[1]].flatten(1, 2) for i in range(3) for j in range(3)]
        fine = weights.transpose(-1, -2) @ torch.stack(around, -2)  # (B, O, up^2, 2)
        fine = fine.unflatten(1, grid).unflatten(-2, (up, up))  # (B, h, w, up, up, 2)
        return fine.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class MultimodalOutput(_Output):
    """Outputs of several modalities: one linear layer each, from the channels that the decoder gives to all of them.

    Args:
        modalities: {name: {"kind": .., ..}}, see `POSTPROCESSORS`.
        channels: that the decoder gives.
    """

    def __init__(self, modalities, *, channels=512, device=None, dtype=None):
        super().__init__()
        check_integer("channels", channels)
        if not isinstance(modalities, dict) or not modalities:
            raise ValueError(f"modalities is {modalities!r}; it must be a dict of one or more")
        factory = {"device": device, "dtype": dtype}
        kinds = {name: kind for name, kind in POSTPROCESSORS.items() if name in ("array", "classes", "samples")}
        self.channels = channels
        self.modalities = nn.ModuleDict(
            {name: build(f"modalities[{name!r}]", kinds, modalities[name], **factory) for name in sorted(modalities)}
        )
        self.linear = nn.ModuleDict(
            {name: Linear(channels, part.channels, **factory) for name, part in self.modalities.items() if part.channels}
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Linear layers truncated normal of variance 1 / fan_in."""
        for layer in self.linear.values():
            reset_linear_(layer.weight, layer.bias)

    def forward(self, outputs, sizes):
        """(B, O, channels), with `sizes` {name: how many of them are its} in this order -> {name: output}."""
        results = {}
        for (name, size), part in zip(sizes.items(), outputs.split(list(sizes.values()), 1), strict=True):
            if size:
                results[name] = self.modalities[name](self.project(name, part))
        return results

    def project(self, name, outputs):
        """(B, O_m, channels) -> (B, O_m, those of the modality `name`)."""
        return self.linear[name](outputs) if name in self.linear else outputs


POSTPROCESSORS = {
    "array": ArrayOutput,
    "classes": ClassOutput,
    "flow": FlowOutput,
    "latents": LatentOutput,
    "multimodal": MultimodalOutput,
    "pooled": PooledOutput,
    "samples": SampleOutput,
    "tasks": TaskOutput,
    "tokens": TokenOutput,
}
