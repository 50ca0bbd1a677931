"""What stands before a Perceiver's encoder: arrays of every kind become tokens (B, M, Cx), and positions (M, Cp) beside them.

A preprocessor has `channels`, Cx + Cp, and `size`, M; called, it returns (tokens, position). What all examples share, the
positions, has no batch dimension and is never copied per example. `position` is None where the tokens have it in them.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from ..ops._shared.arguments import autocast_dtype, check_integer, check_number
from .backend import Linear
from .kinds import build
from .positions import (
    FourierPositions,
    LearnedPositions,
    ReleasedFourierPositions,
    check_grid,
    fourier_features,
    position_channels,
    reset_linear_,
    reset_table_,
)


class _Input(nn.Module):
    """What preprocessors of arrays share: a content of some shape, and positions of its grid that are appended or added."""

    def __init__(self, content_channels, grid, positions, add_positions=False, **factory):
        super().__init__()
        self.size, self.channels, self.add_positions = math.prod(grid), content_channels, add_positions
        self.positions = None
        if positions is not None:
            self.positions = build("positions", _POSITIONS, positions, grid, **factory)
            if add_positions and self.positions.channels != content_channels:
                raise ValueError(
                    f"positions have {self.positions.channels} channels; to be added they must have those of the content, "
                    f"{content_channels}"
                )
            self.channels += 0 if add_positions else self.positions.channels

    def reset_parameters(self):
        """Positions alone."""
        self._reset_positions()

    def _reset_positions(self):
        if self.positions is not None:
            self.positions.reset_parameters()

    def _with_positions(self, content):
        if self.positions is None:
            return content, None
        if self.add_positions:
            return content + self.positions(), None
        return content, self.positions()

    def _checked(self, inputs, *shapes):
        """`inputs`; raises unless it is a tensor (B, *shape) of one of `shapes`, of the parameters' dtype or autocast's."""
        if not isinstance(inputs, torch.Tensor):
            raise TypeError(f"inputs is a {type(inputs).__name__}; it must be a tensor")
        if not any(inputs.shape[1:] == shape for shape in shapes):
            allowed = " or ".join("(B, " + ", ".join(map(str, shape)) + ")" for shape in shapes)
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it must be {allowed}")
        if not inputs.is_floating_point():
            raise TypeError(f"inputs has dtype {inputs.dtype}; it must be a floating-point tensor")
        own = next(iter((*self.parameters(), *self.buffers())), inputs)
        if own.is_floating_point() and inputs.dtype != own.dtype and autocast_dtype(inputs.device) is None:
            raise TypeError(f"inputs has dtype {inputs.dtype}; it must be the module's, {own.dtype}")
        return inputs


class GridInput(_Input):
    """An array over a grid of one or more axes: pixels, patches of them, a video, samples of audio, a spectrogram.

    The content of a token is a patch in the order (.., row, column, channel), through a linear layer if `projection` says so
    (without patches that is a 1 x 1 convolution). Channels come last, and tokens row-major.

    Args:
        shape: of the array, e.g. (224, 224) or (frames, height, width) or (samples,).
        channels: of the array.
        patch: sizes along the axes, which must divide `shape`; default one element.
        projection: channels of the linear layer; default none.
        positions: None, {"kind": "fourier", "num_bands": K, "max_resolution": mu} (see `FourierPositions`; with
            "released_rounding": true, `ReleasedFourierPositions`) or {"kind": "learned", "channels": c, "projection": p} (see
            `LearnedPositions`), over the grid of tokens.
        add_positions: they are added to the content instead of appended.
        scale: what the array is multiplied by, so that its values are about as large as the positions.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        shape,
        channels=3,
        *,
        patch=None,
        projection=None,
        positions=None,
        add_positions=False,
        scale=1.0,
        device=None,
        dtype=None,
    ):
        check_grid(shape, 0, None, "shape")
        check_integer("channels", channels)
        shape = tuple(shape)
        patch = (1,) * len(shape) if patch is None else patch
        check_grid(patch, 0, None, "patch")
        if len(patch) != len(shape) or any(n % p for n, p in zip(shape, patch, strict=True)):
            raise ValueError(f"patch is {patch!r}; it must have one size per axis of shape {shape}, which it must divide")
        factory = {"device": device, "dtype": dtype}
        width = channels * math.prod(patch)
        if projection is not None:
            check_integer("projection", projection)
        grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
        super().__init__(width if projection is None else projection, grid, positions, add_positions, **factory)
        check_number("scale", scale, "a positive number", lambda s: s > 0.0)
        self.shape, self.input_channels, self.patch, self.grid = shape, channels, tuple(patch), grid
        self.scale = scale
        self.linear = None if projection is None else Linear(width, projection, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """The linear layer truncated normal of variance 1 / fan_in."""
        self._reset_positions()
        if self.linear is not None:
            reset_linear_(self.linear.weight, self.linear.bias)

    def forward(self, inputs):
        """(B, *shape, channels), flat (B, prod(shape), channels), or without the last axis where there is one channel."""
        shapes = [(*self.shape, self.input_channels), (math.prod(self.shape), self.input_channels)]
        shapes += [self.shape] * (self.input_channels == 1)
        inputs = self._checked(inputs, *dict.fromkeys(shapes))
        content = inputs.reshape(inputs.shape[0], *self.shape, self.input_channels)
        content = space_to_depth(content, self.patch).flatten(1, -2)
        if self.scale != 1.0:
            content = self.scale * content
        return self._with_positions(content if self.linear is None else self.linear(content))


class ConvStemInput(_Input):
    """A picture through the stem of a ResNet: 7 x 7 convolution of stride 2, batch norm, ReLU, 3 x 3 maximum of stride 2.

    Args:
        shape: (height, width) of the picture.
        channels: of the picture.
        out_channels: of the tokens' content.
        positions: see `GridInput`; over the grid after the stem.
        padding: "same", as in the released code: ceil(n / 2) after each step, 224 -> 56; or "huggingface": the convolution
            pads one row and column more in front and the maximum none, 224 -> 55.
        batch_norm: whether there is one.
    """

    def __init__(
        self,
        shape,
        channels=3,
        *,
        out_channels=64,
        positions=None,
        padding="same",
        batch_norm=True,
        device=None,
        dtype=None,
    ):
        check_grid(shape, 0, None, "shape")
        if len(shape) != 2:
            raise ValueError(f"shape is {shape!r}; it must be (height, width)")
        if padding not in ("same", "huggingface"):
            raise ValueError(f"padding is {padding!r}; allowed are 'same' and 'huggingface'")
        for name, value in (("channels", channels), ("out_channels", out_channels)):
            check_integer(name, value)
        shape = tuple(shape)
        halves = tuple(-(-n // 2) for n in shape)
        grid = tuple(-(-n // 2) if padding == "same" else (n - 1) // 2 for n in halves)
        if min(grid) < 1:
            raise ValueError(f"shape is {shape!r}; nothing is left of it after the stem")
        factory = {"device": device, "dtype": dtype}
        super().__init__(out_channels, grid, positions, **factory)
        self.shape, self.input_channels, self.grid, self.padding = shape, channels, grid, padding
        self.conv = nn.Conv2d(channels, out_channels, 7, stride=2, bias=False, **factory)
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.1, **factory) if batch_norm else None
        self.reset_parameters()

    def reset_parameters(self):
        """The convolution truncated normal of variance 1 / fan_in."""
        self._reset_positions()
        reset_linear_(self.conv.weight)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, inputs):
        """(B, height, width, channels)."""
        x = self._checked(inputs, (*self.shape, self.input_channels)).movedim(-1, 1)
        same = self.padding == "same"
        x = self.conv(F.pad(x, _same(self.shape, 7) if same else (3, 3, 3, 3)))
        x = F.relu(x if self.norm is None else self.norm(x))
        if same:
            x = F.pad(x, _same(x.shape[2:], 3))  # behind ReLU zeros are as good as -inf
        return self._with_positions(F.max_pool2d(x, 3, 2).flatten(2).transpose(1, 2))


class FlowInput(_Input):
    """Two pictures of which the motion is wanted: a token is the 3 x 3 neighbourhood of a pixel, through a linear layer.

    Frames are padded with zeros by one pixel; the 27 channels of a neighbourhood are in the order (row, column, rgb).
    "concatenate" puts those of both frames into one token (54 channels, the first frame first), with positions of two axes;
    "separate" makes a token of each, with positions of three axes, time first.

    Args:
        shape: (height, width).
        channels: of a frame.
        projection: channels of the linear layer.
        frames: "concatenate" or "separate".
        neighbourhood: its side, 3; 1 takes the pixels alone.
        positions: see `GridInput`.
    """

    def __init__(
        self,
        shape,
        channels=3,
        *,
        projection=64,
        frames="concatenate",
        neighbourhood=3,
        positions=None,
        device=None,
        dtype=None,
    ):
        check_grid(shape, 0, None, "shape")
        if len(shape) != 2:
            raise ValueError(f"shape is {shape!r}; it must be (height, width)")
        if frames not in ("concatenate", "separate"):
            raise ValueError(f"frames is {frames!r}; allowed are 'concatenate' and 'separate'")
        for name, value in (("channels", channels), ("projection", projection), ("neighbourhood", neighbourhood)):
            check_integer(name, value)
        if neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {neighbourhood}; it must be odd")
        factory = {"device": device, "dtype": dtype}
        together = frames == "concatenate"
        shape = tuple(shape)
        super().__init__(projection, shape if together else (2, *shape), positions, **factory)
        self.shape, self.input_channels, self.together, self.neighbourhood = shape, channels, together, neighbourhood
        self.linear = Linear(channels * neighbourhood**2 * (2 if together else 1), projection, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """The linear layer truncated normal of variance 1 / fan_in."""
        self._reset_positions()
        reset_linear_(self.linear.weight, self.linear.bias)

    def forward(self, inputs):
        """Frames (B, 2, height, width, channels), or their neighbourhoods (B, 2, height, width, channels * side^2)."""
        side, channels = self.neighbourhood, self.input_channels
        shapes = [(2, *self.shape, channels), (2, *self.shape, channels * side**2)]
        inputs = self._checked(inputs, *dict.fromkeys(shapes))
        if inputs.shape[-1] == channels:
            inputs = neighbourhoods(inputs, side)
        if self.together:
            inputs = torch.cat([inputs[:, 0], inputs[:, 1]], -1)
        return self._with_positions(self.linear(inputs.flatten(1, -2)))


class TokenInput(nn.Module):
    """Token ids: a learned vector of the token and one of its place, added.

    Args:
        vocab_size: ids are in [0, vocab_size).
        max_length: of a text; shorter ones use the first places.
        channels: C.
    """

    def __init__(self, vocab_size, max_length, channels, *, device=None, dtype=None):
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("max_length", max_length), ("channels", channels)):
            check_integer(name, value)
        self.size, self.channels = max_length, channels
        self.tokens = nn.Embedding(vocab_size, channels, device=device, dtype=dtype)
        self.positions = LearnedPositions(max_length, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        """Both tables truncated normal of deviation 0.02."""
        reset_table_(self.tokens.weight)
        self.positions.reset_parameters()

    def forward(self, inputs):
        """int (B, T), T up to `max_length`."""
        if not isinstance(inputs, torch.Tensor) or inputs.dtype not in (torch.int64, torch.int32):
            was = inputs.dtype if isinstance(inputs, torch.Tensor) else type(inputs).__name__
            raise TypeError(f"inputs is a {was}; it must be an int64 or int32 tensor of token ids")
        if inputs.dim() != 2 or not 1 <= inputs.shape[1] <= self.size:
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it must be (B, T) with T from 1 to {self.size}")
        if inputs.device.type == "cpu" and inputs.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(inputs))
            if low < 0 or high >= self.tokens.num_embeddings:
                raise IndexError(f"inputs has ids from {low} to {high}; they must be in [0, {self.tokens.num_embeddings})")
        return self.tokens(inputs) + self.positions()[: inputs.shape[1]], None


class VectorInput(_Input):
    """One token, e.g. a label: (B, channels) -> (B, 1, channels), without a position."""

    def __init__(self, channels, *, device=None, dtype=None):
        check_integer("channels", channels)
        super().__init__(channels, (1,), None)

    def forward(self, inputs):
        """(B, channels)."""
        return self._checked(inputs, (self.channels,))[:, None], None


class ArrayInput(_Input):
    """Tokens that are ready: (B, M, channels) with any M, without positions, e.g. entities of a game."""

    def __init__(self, channels, *, device=None, dtype=None):
        check_integer("channels", channels)
        super().__init__(channels, (), None)
        self.size = None

    def forward(self, inputs):
        """(B, M, channels)."""
        if isinstance(inputs, torch.Tensor) and inputs.dim() == 3:
            return self._checked(inputs, (inputs.shape[1], self.channels)), None
        return self._checked(inputs, ("M", self.channels)), None


class PointInput(_Input):
    """Points in space: the Fourier features of their own coordinates, which are in [-1, 1].

    Args:
        axes: d.
        num_bands, max_resolution: see `FourierPositions`; the highest frequency of an axis is half its resolution.
    """

    def __init__(self, axes=3, *, num_bands=64, max_resolution=(2240, 2240, 2240), device=None, dtype=None):
        check_integer("axes", axes)
        check_grid((1,) * axes, num_bands, max_resolution, "axes")
        super().__init__(position_channels((1,) * axes, num_bands), (), None)
        self.axes, self.num_bands, self.max_resolution, self.size = axes, num_bands, tuple(max_resolution), None

    def forward(self, inputs):
        """(B, M, axes)."""
        count = inputs.shape[1] if isinstance(inputs, torch.Tensor) and inputs.dim() == 3 else "M"
        inputs = self._checked(inputs, (count, self.axes))
        return fourier_features(inputs, self.num_bands, self.max_resolution), None


class MultimodalInput(nn.Module):
    """Several modalities behind each other, in alphabetical order: all tokens get as many channels, with a learned vector.

    C is the largest number of channels of a modality, and `padding` more. Some tokens are replaced by a learned mask token.

    Args:
        modalities: {name: {"kind": .., ..}}, see `PREPROCESSORS`.
        padding: channels that the widest modality is padded by.
        mask_probs: {name: probability that a token is masked}, or None: no modality has a mask token. It holds in training
            and in evaluation, as in the released code: 1 for what a model shall predict.
    """

    def __init__(self, modalities, *, padding=4, mask_probs=None, device=None, dtype=None):
        super().__init__()
        check_integer("padding", padding, 0)
        if not isinstance(modalities, dict) or not modalities:
            raise ValueError(f"modalities is {modalities!r}; it must be a dict of one or more")
        names = sorted(modalities)
        if mask_probs is not None:
            if not isinstance(mask_probs, dict) or not set(mask_probs) <= set(names):
                raise ValueError(f"mask_probs is {mask_probs!r}; it must be a dict with some of {names}")
            for name, p in mask_probs.items():
                check_number(f"mask_probs[{name!r}]", p, "a number in [0, 1]", lambda p: 0.0 <= p <= 1.0)
        factory = {"device": device, "dtype": dtype}
        self.modalities = nn.ModuleDict(
            {name: build(f"modalities[{name!r}]", PREPROCESSORS, modalities[name], **factory) for name in names}
        )
        if any(part.size is None for part in self.modalities.values()):
            raise ValueError("modalities has one without a size; a multimodal input needs all sizes")
        self.sizes = {name: part.size for name, part in self.modalities.items()}
        self.size = sum(self.sizes.values())
        self.channels = max(part.channels for part in self.modalities.values()) + padding
        self.padding = nn.ParameterDict(
            {name: torch.empty(1, self.channels - part.channels, **factory) for name, part in self.modalities.items()}
        )
        self.mask_probs = dict(mask_probs or {})
        self.mask_tokens = nn.ParameterDict(
            {name: torch.empty(1, self.channels, **factory) for name in names if name in self.mask_probs}
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Padding vectors and mask tokens truncated normal of deviation 0.02; each modality its own way."""
        for part in self.modalities.values():
            part.reset_parameters()
        for table in (*self.padding.values(), *self.mask_tokens.values()):
            reset_table_(table)

    def forward(self, inputs, *, masks=None):
        """Tokens of all modalities.

        Args:
            inputs: {name: input of that modality}.
            masks: {name: bool (B, M_m)}, True for tokens to replace; default drawn with `mask_probs`.

        Returns:
            (B, M, C), None.
        """
        if not isinstance(inputs, dict) or set(inputs) != set(self.modalities):
            was = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(f"inputs is {was}; it must be a dict with {sorted(self.modalities)}")
        masks = {} if masks is None else masks
        if not isinstance(masks, dict) or not set(masks) <= set(self.mask_tokens):
            raise ValueError(f"masks is {masks!r}; it must be a dict with some of {sorted(self.mask_tokens)}")
        parts = []
        for name, part in self.modalities.items():
            tokens, position = part(inputs[name])
            mask = masks.get(name)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
                raise ValueError(
                    f"masks[{name!r}] has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be bool "
                    f"{tuple(tokens.shape[:2])}"
                )
            p = self.mask_probs.get(name, 0.0)
            if mask is None and name in self.mask_tokens:
                mask = torch.rand(tokens.shape[:2], device=tokens.device) < p
            parts.append((tokens, position, self.padding[name], self.mask_tokens[name] if mask is not None else None, mask))
        batches = {name: part[0].shape[0] for name, part in zip(self.modalities, parts, strict=True)}
        if len(set(batches.values())) != 1:
            raise ValueError(f"inputs has batches {batches}; they must be the same")
        return join(parts), None


def join(parts):
    """Parts of other numbers of channels as one array (B, M, C), which is written once.

    Args:
        parts: of (tokens (B, m, Cx), position (m, Cp) or None, padding (1, C - Cx - Cp), mask token (1, C) or None, mask of
            the tokens it replaces, bool (B, m) or None).
    """
    return _Join.apply(len(parts), *(tensor for part in parts for tensor in part))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *tensors):
        parts = [tensors[i : i + 5] for i in range(0, 5 * count, 5)]
        ctx.parts = [tuple(None if t is None else (t.shape, t.dtype) for t in part[:4]) for part in parts]
        ctx.save_for_backward(*(part[4] for part in parts))
        first = parts[0][0]
        widths = [sum(t.shape[-1] for t in part[:3] if t is not None) for part in parts]
        dtype = functools.reduce(torch.promote_types, (part[0].dtype for part in parts))  # autocast makes some shorter
        out = first.new_empty(first.shape[0], sum(part[0].shape[1] for part in parts), widths[0], dtype=dtype)
        start = 0
        for tokens, position, padding, token, mask in parts:
            rows = out[:, start : start + tokens.shape[1]]
            start += tokens.shape[1]
            at = 0
            for piece in (tokens, position, padding):
                if piece is not None:
                    rows[..., at : at + piece.shape[-1]] = piece
                    at += piece.shape[-1]
            if mask is not None:
                rows.copy_(torch.where(mask[..., None], token.to(rows.dtype), rows))
        return out

    @staticmethod
    def backward(ctx, grad):
        results, start = [None], 0
        for k, (part, mask) in enumerate(zip(ctx.parts, ctx.saved_tensors, strict=True)):
            needed = ctx.needs_input_grad[1 + 5 * k : 5 + 5 * k]
            rows = grad[:, start : start + part[0][0][1]]
            start += part[0][0][1]
            own = rows if mask is None else torch.where(mask[..., None], 0.0, rows)
            grads, at = [], 0
            for what, wanted in zip(part[:3], needed, strict=False):
                if what is None:
                    grads.append(None)
                    continue
                shape, dtype = what
                piece = own[..., at : at + shape[-1]]
                at += shape[-1]
                grads.append(piece.sum_to_size(shape).to(dtype) if wanted else None)
            if part[3] is not None and needed[3]:
                masked = torch.where(mask[..., None], rows, 0.0)
                grads.append(masked.sum((0, 1))[None].to(part[3][1]))
            else:
                grads.append(None)
            results += [*grads, None]
        return tuple(results)


def space_to_depth(array, patch):
    """(B, n_1, .., n_d, C) -> (B, n_1 / p_1, .., n_d / p_d, p_1 .. p_d C): the channels of a patch in row-major order."""
    if all(p == 1 for p in patch):
        return array
    axes = len(patch)
    for axis, size in reversed(list(enumerate(patch, 1))):
        array = torch.unflatten(array, axis, (-1, size))
    return array.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1).flatten(axes + 1)


def depth_to_space(array, patch):
    """The inverse of `space_to_depth`."""
    axes = len(patch)
    array = torch.unflatten(array, -1, (*patch, -1))
    order = [i for axis in range(1, axes + 1) for i in (axis, axes + axis)]
    array = array.permute(0, *order, 2 * axes + 1)
    for axis in range(1, axes + 1):
        array = array.flatten(axis, axis + 1)
    return array


def neighbourhoods(frames, side):
    """(.., H, W, C) -> (.., H, W, side^2 C): what surrounds every pixel in the order (row, column, channel), zeros outside."""
    if side == 1:
        return frames
    height, width = frames.shape[-3:-1]
    edge = side // 2
    padded = F.pad(frames, (0, 0, edge, edge, edge, edge))
    return torch.cat([padded[..., i : i + height, j : j + width, :] for i in range(side) for j in range(side)], -1)


def _same(shape, kernel):
    """`F.pad`'s numbers (left, right, top, bottom) so that stride 2 gives ceil(n / 2): the odd one at the end."""
    sides = []
    for n in reversed(shape):
        total = max((-(-n // 2) - 1) * 2 + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    return tuple(sides)


def _fourier(grid, num_bands, max_resolution=None, released_rounding=False, **factory):
    kind = ReleasedFourierPositions if released_rounding else FourierPositions
    return kind(grid, num_bands, max_resolution, **factory)


def _learned(grid, channels, projection=None, **factory):
    return LearnedPositions(math.prod(grid), channels, projection, **factory)


_POSITIONS = {"fourier": _fourier, "learned": _learned}
PREPROCESSORS = {
    "array": ArrayInput,
    "conv_stem": ConvStemInput,
    "flow": FlowInput,
    "grid": GridInput,
    "multimodal": MultimodalInput,
    "points": PointInput,
    "tokens": TokenInput,
    "vector": VectorInput,
}
