"""MBT (Nagrani et al., NeurIPS 2021): a vision transformer for every modality, which meet in a few bottleneck tokens.

    x_m <- [cls_m ; Patches(input_m)] + positions_m
    layers l < L_f:   x_m <- Block_ml(x_m)
    layers l >= L_f:  [x_m ; z_m] <- Block_ml([x_m ; z]) for every m,  z <- mean_m z_m      (or another fusion)
    logits_m = Linear(LN(x_m)[cls]);  their mean over the modalities in evaluation, the dict of them in training

One head, one last layer norm, and everything as in Google's released code (scenic, projects/mbt), but for what this file calls
released: quirks of that code which its checkpoints need and nobody else should get. `from_official` turns them on.
"""

import dataclasses
import fractions
import math

import torch
from torch import nn
from torch.nn import functional as F

from ..modules import MultimodalEncoder
from ..modules.bottleneck import EncoderBlock, check_mask, check_modalities, shape_or_type
from ..ops._shared.arguments import check_integer
from . import official
from .registry import load_weights, save_pretrained

AXES = {"1d_conv": 1, "2d_conv": 2, "3d_conv": 3, "temporal_sampling": 3}
CLASSIFIERS = ("token", "gap", "gmp", "gsp")


@dataclasses.dataclass(frozen=True)
class ModalityConfig:
    """One modality: its name, the size of its input, and how patches of it become tokens.

    Tokenisers: "1d_conv", "2d_conv" and "3d_conv" are convolutions whose kernel is their stride, `patch`, over the grid
    `shape`: (steps,), (time, mel) or (height, width), (frames, height, width); what is left at an end is dropped.
    "temporal_sampling" keeps `sampled_frames` of T frames (all of them where there are no more), number round(T i / (n + 1))
    for i = 1..n with halves to even, stacks them along the height and takes two-dimensional patches of (height, width).
    """

    name: str
    shape: tuple
    patch: tuple
    tokeniser: str
    channels: int = 3
    sampled_frames: int | None = None
    # The released code steps through the frames in floating point and so keeps a frame more than asked for some (T, n),
    # such as (8, 2), (32, 5) and (32, 6).
    released_sampling: bool = False

    def __post_init__(self):
        where = f"modality {self.name!r}: "
        if self.tokeniser not in AXES:
            raise ValueError(f"{where}tokeniser is {self.tokeniser!r}; allowed are {', '.join(map(repr, AXES))}")
        sampling = self.tokeniser == "temporal_sampling"
        axes = AXES[self.tokeniser]
        for name, count in {"shape": axes, "patch": axes - sampling}.items():
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, (list, tuple)) else value  # JSON has lists only
            object.__setattr__(self, name, value)
            if not isinstance(value, tuple) or len(value) != count or not all(isinstance(n, int) and n > 0 for n in value):
                raise ValueError(f"{where}{name} is {value!r}; {self.tokeniser!r} needs {count} positive integers")
        if any(size < patch for size, patch in zip(self.shape[sampling:], self.patch, strict=True)):
            raise ValueError(f"{where}shape is {self.shape}; it must be at least the patch {self.patch}")
        check_integer(f"{where}channels", self.channels)
        frames = self.sampled_frames
        if sampling:
            check_integer(f"{where}sampled_frames", frames)
        if not sampling and frames is not None:
            raise ValueError(f"{where}sampled_frames is {frames!r}; only 'temporal_sampling' takes it")

    @property
    def frames(self) -> list:
        """The numbers of the frames that temporal_sampling keeps."""
        total, kept = self.shape[0], self.sampled_frames
        if kept >= total:
            return list(range(total))
        if not self.released_sampling:
            return [round(fractions.Fraction(total * i, kept + 1)) for i in range(1, kept + 1)]
        step = total / (kept + 1)
        count = math.ceil((total - step) / step)  # as numpy's arange counts
        first, second = torch.tensor([step, step + step], dtype=torch.float64).float()
        return [min(int(t), total - 1) for t in (first + torch.arange(count) * (second - first)).round()]

    @property
    def grid(self) -> tuple:
        """The tokens along each axis, in the order in which they are flattened."""
        if self.tokeniser == "temporal_sampling":
            return len(self.frames) * self.shape[1] // self.patch[0], self.shape[2] // self.patch[1]
        return tuple(size // patch for size, patch in zip(self.shape, self.patch, strict=True))

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)


RGB = ModalityConfig("rgb", (32, 224, 224), (2, 16, 16), "3d_conv")
SPECTROGRAM = ModalityConfig("spectrogram", (800, 128), (16, 16), "2d_conv")


@dataclasses.dataclass(frozen=True)
class MBTConfig:
    """Sizes of an MBT; see `MultimodalEncoder` for the fusion."""

    modalities: tuple = (RGB, SPECTROGRAM)  # of ModalityConfig, or dicts of its fields
    num_classes: int = 527
    channels: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_channels: int = 3072
    fusion: str = "bottleneck"  # "bottleneck", "cross", "shared" or "none"
    update: str = "mean"  # of the bottleneck: "mean" or "sequential"
    fusion_layer: int = 8
    num_bottlenecks: int = 4  # rows; the released code has one more than its n_bottlenecks where it has CLS tokens
    test_with_bottlenecks: bool = True
    share_weights: bool = False  # the blocks of all layers; tokenisers, positions and CLS tokens stay their own
    # Or the mean (gap), maximum (gmp) or sum (gsp) over all tokens of all modalities. The released code cannot run those with
    # a bottleneck, though its published config asks for it; its checkpoints have CLS tokens.
    classifier: str = "token"
    pre_logits: int | None = None  # channels of a tanh layer in front of the head
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    eps: float = 1e-6
    backend: str = "auto"  # of every layer; "eager" is plain PyTorch

    def __post_init__(self):
        given = self.modalities
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(m, (dict, ModalityConfig)) for m in given):
            raise ValueError(
                f"modalities is {given!r}; it must be a list of one or more ModalityConfig, or dicts of its fields"
            )
        modalities = tuple(ModalityConfig(**m) if isinstance(m, dict) else m for m in given)
        object.__setattr__(self, "modalities", modalities)
        for name in ("num_classes", "channels", "num_layers", "num_heads", "mlp_channels", "num_bottlenecks", "pre_logits"):
            value = getattr(self, name)
            if value is not None or name != "pre_logits":
                check_integer(name, value)
        if not isinstance(self.fusion_layer, int):
            raise ValueError(f"fusion_layer is {self.fusion_layer!r}; it must be an integer")
        if self.classifier not in CLASSIFIERS:
            raise ValueError(f"classifier is {self.classifier!r}; allowed are {', '.join(map(repr, CLASSIFIERS))}")


# The released checkpoints have 5 bottleneck rows: their n_bottlenecks is 4.
RELEASED = MBTConfig(num_bottlenecks=5)
CONFIGS = {
    "mbt-base": RELEASED,
    "mbt-base-8-frames": dataclasses.replace(
        RELEASED,
        modalities=(ModalityConfig("rgb", (32, 224, 224), (16, 16), "temporal_sampling", sampled_frames=8), SPECTROGRAM),
    ),
    "mbt-base-shared": dataclasses.replace(RELEASED, share_weights=True),
    "mbt-base-rgb": dataclasses.replace(RELEASED, modalities=(RGB,)),
    "mbt-base-spectrogram": dataclasses.replace(RELEASED, modalities=(SPECTROGRAM,)),
    "mbt-base-vggsound": dataclasses.replace(RELEASED, num_classes=309),
    "mbt-base-epic": dataclasses.replace(RELEASED, num_classes=97 + 300),
    "mbt-base-kinetics": dataclasses.replace(RELEASED, num_classes=400),
    "mbt-small": MBTConfig(
        modalities=(
            ModalityConfig("rgb", (16, 96, 96), (2, 16, 16), "3d_conv"),
            ModalityConfig("spectrogram", (128, 128), (16, 16), "2d_conv"),
        ),
        channels=192,
        num_layers=6,
        num_heads=3,
        mlp_channels=768,
        fusion_layer=4,
    ),
    "mbt-digits": MBTConfig(
        modalities=(
            ModalityConfig("rgb", (8, 24, 24), (2, 8, 8), "3d_conv"),
            ModalityConfig("spectrogram", (64, 32), (4, 32), "2d_conv"),
        ),
        num_classes=10,
        channels=64,
        num_layers=4,
        num_heads=4,
        mlp_channels=128,
        fusion_layer=2,
    ),
}


class Tokeniser(nn.Module):
    """(B, *shape, C) -> (B, T, D): a convolution whose kernel is its stride, so that it is one linear over patches.

    `weight` (D, C, *patch) is that of `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
    """

    def __init__(self, config: ModalityConfig, channels, **factory):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(channels, config.channels, *config.patch, **factory))
        self.bias = nn.Parameter(torch.empty(channels, **factory))

    def forward(self, x):
        config, patch = self.config, self.config.patch
        if not isinstance(x, torch.Tensor) or x.shape[1:] != (*config.shape, config.channels):
            size = ", ".join(map(str, (*config.shape, config.channels)))
            raise ValueError(f"inputs[{config.name!r}] has {shape_or_type(x)}; it must be a tensor (B, {size})")
        if not x.is_floating_point():
            raise TypeError(f"inputs[{config.name!r}] has dtype {x.dtype}; it must be a floating-point tensor")
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"inputs[{config.name!r}] has dtype {x.dtype}; it must be the model's, {self.weight.dtype}")
        if config.tokeniser == "temporal_sampling":
            x = torch.stack([x[:, frame] for frame in config.frames], 1).flatten(1, 2)
        axes = len(patch)
        for axis, size in reversed(list(enumerate(patch, 1))):
            whole = x.shape[axis] // size
            x = torch.unflatten(x.narrow(axis, 0, whole * size), axis, (whole, size))
        # (B, n_1, p_1, .., n_d, p_d, C) -> (B, n_1 .. n_d, C p_1 .. p_d)
        x = x.permute(0, *range(1, 2 * axes, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2)).flatten(axes + 1).flatten(1, axes)
        return F.linear(x, self.weight.flatten(1), self.bias)


class MBT(nn.Module):
    """A classifier of clips with several modalities (the arguments are in the config).

    Parameters beside the encoder's: `tokenisers.<m>`, `positions.<m>` (1, T_m [+ 1], D), for the token classifier `cls.<m>`
    (1, 1, D), optionally `pre_logits`, and `head`.
    """

    def __init__(self, config: MBTConfig, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        channels, token = config.channels, config.classifier == "token"
        self.encoder = MultimodalEncoder(
            [m.name for m in config.modalities],
            channels,
            config.num_layers,
            fusion_layer=config.fusion_layer,
            fusion=config.fusion,
            update=config.update,
            num_bottlenecks=config.num_bottlenecks,
            test_with_bottlenecks=config.test_with_bottlenecks,
            num_heads=config.num_heads,
            mlp_channels=config.mlp_channels,
            share_weights=config.share_weights,
            dropout=config.dropout,
            stochastic_depth=config.stochastic_depth,
            eps=config.eps,
            backend=config.backend,
            **factory,
        )
        self.tokenisers = nn.ModuleDict({m.name: Tokeniser(m, channels, **factory) for m in config.modalities})
        self.positions = nn.ParameterDict(
            {m.name: torch.empty(1, m.num_tokens + token, channels, **factory) for m in config.modalities}
        )
        self.cls = nn.ParameterDict(
            {m.name: torch.empty(1, 1, channels, **factory) for m in config.modalities} if token else {}
        )
        features = channels if config.pre_logits is None else config.pre_logits
        self.pre_logits = None if config.pre_logits is None else nn.Linear(channels, features, **factory)
        self.head = nn.Linear(features, config.num_classes, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Blocks Xavier uniform, MLP biases of deviation 1e-6, positions and bottleneck of 0.02, CLS tokens and head zero."""
        for module in self.modules():
            if isinstance(module, EncoderBlock):
                for weight in (*module.qkv.weight.chunk(3), module.proj.weight, module.fc1.weight, module.fc2.weight):
                    nn.init.xavier_uniform_(weight)
                for linear in (module.qkv, module.proj):
                    nn.init.zeros_(linear.bias)
                for linear in (module.fc1, module.fc2):
                    nn.init.normal_(linear.bias, std=1e-6)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Tokeniser):
                _lecun_normal_(module.weight)
                nn.init.zeros_(module.bias)
        for table in self.positions.values():
            nn.init.normal_(table, std=0.02)
        for token in self.cls.values():
            nn.init.zeros_(token)
        if self.encoder.bottleneck is not None:
            nn.init.normal_(self.encoder.bottleneck, std=0.02)
        if self.pre_logits is not None:
            _lecun_normal_(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs, *, key_masks=None):
        """Logits of clips, from the modalities that are there.

        Args:
            inputs: {modality: (B, *shape, channels)}; known modalities may be missing, and are then left out of everything:
                the bottleneck's mean, the pooling, the mean of the logits.
            key_masks: None, or {modality: bool (B, T_m) or None}, True where a patch counts, for clips shorter than the
                window. CLS tokens always count; pooling takes the patches that count.

        Returns:
            (B, num_classes); the token classifier in training: {modality: (B, num_classes)}, because the loss of MBT is the
            mean of the modalities' losses.

        Raises ValueError or TypeError for no or unknown modalities, wrong shapes and dtypes, batches that differ.
        """
        names = [m.name for m in self.config.modalities]
        inputs = check_modalities("inputs", names, inputs)
        masks = {} if key_masks is None else check_modalities("key_masks", list(inputs), key_masks)
        token = self.config.classifier == "token"
        tokens = {}
        for name, x in inputs.items():
            x = self.tokenisers[name](x)
            batch = next(iter(tokens.values()), x).shape[0]
            if x.shape[0] != batch:
                raise ValueError(f"inputs[{name!r}] has batch {x.shape[0]}; it must be that of the other modalities, {batch}")
            check_mask(name, masks.get(name), x)
            if token:
                x = torch.cat([self.cls[name].expand(x.shape[0], -1, -1), x], 1)
            tokens[name] = x + self.positions[name]
        if token:
            masks = {name: None if mask is None else F.pad(mask, (1, 0), value=True) for name, mask in masks.items()}
        encoded = self.encoder(tokens, key_masks=masks, rows="cls" if token else "all")
        if not token:
            return self._classify(self._pool(encoded, masks))
        logits = {name: self._classify(x[:, 0]) for name, x in encoded.items()}
        return logits if self.training else torch.stack(list(logits.values())).mean(0)

    def _classify(self, x):
        return self.head(x if self.pre_logits is None else self.pre_logits(x).tanh())

    def _pool(self, encoded, masks):
        kind = self.config.classifier
        fill = float("-inf") if kind == "gmp" else 0.0
        masks = [masks.get(name) for name in encoded]
        pooled, count = [], 0
        for x, mask in zip(encoded.values(), masks, strict=True):
            if mask is not None:
                x = torch.where(mask[..., None], x, fill)
            pooled.append(x.amax(1) if kind == "gmp" else x.sum(1))
            count = count + (x.shape[1] if mask is None else mask.sum(1, keepdim=True))
        if kind == "gmp":
            return torch.stack(pooled).amax(0)
        total = torch.stack(pooled).sum(0)
        return total / (count if isinstance(count, int) else count.clamp(min=1)) if kind == "gap" else total

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors into the folder `path`; `mmkernels.models.load(path)` reads them."""
        save_pretrained(self, path)


CONFIG, MODEL = MBTConfig, MBT


def _lecun_normal_(weight):
    """A normal cut at two deviations of variance 1 / fan_in; cutting leaves 0.8796 of the deviation."""
    std = 1 / math.sqrt(weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


# --- The released checkpoints ------------------------------------------------------------------------------------------------


def from_official(config: dict, state_dict, *, backend="auto") -> MBT:
    """An MBT with the parameters of the released Flax model, in the dtype of `state_dict`; see `read_official`.

    `state_dict` may also be the path of a MessagePack checkpoint; reading it needs no JAX.
    """
    if not isinstance(state_dict, dict):
        state_dict = official.read_flax_checkpoint(state_dict)
    sizes, weights = read_official(config, state_dict)
    model = MBT(dataclasses.replace(sizes, backend=backend), dtype=official.common_dtype(weights))
    load_weights(model, weights, "state_dict")
    return model


def read_official(config: dict, state_dict: dict) -> tuple:
    """(MBTConfig, state dict of `MBT`) from the released Flax model.

    The released behaviour comes with it: frames are sampled in floating point, and the bottleneck has as many rows as its
    parameter, one more than the `n_bottlenecks` of the released config. Which fusion it is, and its sizes, are read off the
    tensors: shared weights where no block has a modality's suffix, the bottleneck where there is one.

    Args:
        config: the released names, in one dict or in its `model` and `dataset_configs`: `modality_fusion`, `fusion_layer`;
            `input_shapes` {modality: shape without batch and channels}, or `num_frames`, `crop_size`, `spec_shape` and
            `num_spec_frames`; for temporal sampling `temporal_encoding` (or `temporal_encoding_config`) with
            `n_sampled_frames`; without CLS tokens `classifier`. Optional: `use_bottleneck`, `test_with_bottlenecks`,
            `dropout_rate`, `stochastic_droplayer_rate`, `layer_norm_eps`, and `update` ("mean", or "sequential").
        state_dict: the parameters, nested or with names joined by "/".

    Raises ValueError for missing, unknown or misshapen entries.
    """
    settings = {**config, **config.get("dataset_configs", {}), **config.get("model", {})}
    for name in ("modality_fusion", "fusion_layer"):
        if name not in settings:
            raise ValueError(f"config has no {name!r}; it has {', '.join(settings)}")
    if settings.get("attention_dropout_rate"):
        raise ValueError(f"attention_dropout_rate is {settings['attention_dropout_rate']}; only 0 is supported")
    state = official.flattened(state_dict)
    unread = set(state)
    names = tuple(settings["modality_fusion"])
    suffixes = {name: "" if name == "rgb" else f"_{name}" for name in names}
    token = any(name.startswith("cls") for name in state)
    classifier = settings.get("classifier", "token" if token else None)
    if classifier not in CLASSIFIERS or (classifier == "token") != token:
        raise ValueError(
            f"classifier is {classifier!r}; the state_dict has {'a CLS token' if token else 'no CLS token'}, and allowed are "
            f"{', '.join(map(repr, CLASSIFIERS))}"
        )

    def take(function, source, target):
        unread.difference_update(name for name in state if name == source or name.startswith(f"{source}/"))
        return function(state, source, target)

    weights, modalities = {}, []
    for name, suffix in suffixes.items():
        weights |= take(official.flax_conv, f"embedding{suffix}", f"tokenisers.{name}")
        source = f"Transformer/posembed_input{suffix}"
        weights |= take(lambda s, a, b: {b: official.array(s, f"{a}/pos_embedding")}, source, f"positions.{name}")
        if token:
            cls = "cls" if name == "rgb" or len(names) == 1 else f"cls{name}"
            weights |= take(lambda s, a, b: {b: official.array(s, a)}, cls, f"cls.{name}")
        modalities.append(_official_modality(settings, name, weights[f"tokenisers.{name}.weight"]))
    first = "Transformer/encoderblock_"
    layers = {n.split("/")[1].removeprefix("encoderblock_") for n in state if n.startswith(first)}
    # A block without a suffix is rgb's, or everybody's.
    shared = bool(layers) and all(layer.isdigit() for layer in layers) and names != ("rgb",)
    if settings.get("share_encoder", shared) != shared and names != ("rgb",):
        raise ValueError(f"share_encoder is {settings['share_encoder']}; the state_dict's blocks are {sorted(layers)}")
    depth = len({layer.partition("_")[0] for layer in layers})
    if not depth:
        raise ValueError(f"state_dict has no {first + '0'!r}; its first entry is {next(iter(state), None)!r}")
    heads = {}
    for i in range(depth):
        for block, suffix in {"shared": ""}.items() if shared else suffixes.items():
            source = f"{first}{i}{suffix}"
            weights |= take(official.flax_block, source, f"encoder.layers.{i}.blocks.{block}")
            heads[source] = official.array(state, f"{source}/{official.ATTENTION}_0/query/kernel").shape[1]
    if len(set(heads.values())) != 1:
        raise ValueError(f"state_dict has {sorted(set(heads.values()))} heads; all blocks must have the same number")
    weights |= take(official.flax_norm, "Transformer/encoder_norm", "encoder.norm")
    weights |= take(official.flax_linear, "output_projection", "head")
    has_pre_logits = "pre_logits/kernel" in state
    if has_pre_logits:
        weights |= take(official.flax_linear, "pre_logits", "pre_logits")
    bottleneck = state.get("bottleneck")
    if settings.get("use_bottleneck", bottleneck is not None) != (bottleneck is not None):
        raise ValueError(
            f"use_bottleneck is {settings['use_bottleneck']}; the state_dict has {'one' if bottleneck is not None else 'none'}"
        )
    unread.discard("bottleneck")
    if unread:
        raise ValueError(f"state_dict has {min(unread)!r}, which this MBT does not have; its modalities are {names}")
    sizes = MBTConfig(
        modalities=tuple(modalities),
        num_classes=weights["head.bias"].shape[0],
        channels=weights["encoder.norm.weight"].shape[0],
        num_layers=depth,
        num_heads=heads.popitem()[1],
        mlp_channels=weights[next(n for n in weights if n.endswith("fc1.bias"))].shape[0],
        fusion="bottleneck" if bottleneck is not None else "shared" if shared else "cross",
        update=settings.get("update", "mean"),
        fusion_layer=settings["fusion_layer"],
        num_bottlenecks=1 if bottleneck is None else bottleneck.shape[1],
        test_with_bottlenecks=settings.get("test_with_bottlenecks", True),
        share_weights=shared,
        classifier=classifier,
        pre_logits=weights["pre_logits.bias"].shape[0] if has_pre_logits else None,
        dropout=settings.get("dropout_rate", 0.0),
        stochastic_depth=settings.get("stochastic_droplayer_rate", 0.0),
        eps=settings.get("layer_norm_eps", 1e-6),
    )
    # The released code makes a bottleneck for late fusion and for one modality, and then does not use it.
    if bottleneck is not None and len(names) > 1 and sizes.fusion_layer < depth:
        weights["encoder.bottleneck"] = bottleneck
    return sizes, weights


def _official_modality(settings, name, kernel):
    shape = settings.get("input_shapes", {}).get(name)
    if shape is None and name == "spectrogram" and "spec_shape" in settings:
        shape = (settings["spec_shape"][0] * settings.get("num_spec_frames", 1), settings["spec_shape"][1])
    elif shape is None and name == "rgb" and "num_frames" in settings:
        shape = (settings["num_frames"], settings.get("crop_size", 224), settings.get("crop_size", 224))
    if shape is None:
        raise ValueError(f"config has no shape of the input {name!r}: give input_shapes={{{name!r}: (..)}}")
    channels, patch = kernel.shape[1], tuple(kernel.shape[2:])
    if len(shape) == len(patch):
        return ModalityConfig(name, tuple(shape), patch, f"{len(patch)}d_conv", channels)
    encoding = settings.get("temporal_encoding", settings.get("temporal_encoding_config", {}))
    return ModalityConfig(
        name, tuple(shape), patch, "temporal_sampling", channels, encoding.get("n_sampled_frames"), released_sampling=True
    )


# --- Weights of a vision transformer for pictures ----------------------------------------------------------------------------


def from_vit(
    config: MBTConfig,
    state_dict: dict,
    *,
    inflation="central_frame",
    positions="resize_tile",
    bottleneck_from_positions=True,
    device=None,
    dtype=None,
) -> MBT:
    """An MBT that starts from a vision transformer for pictures, copied into every modality; the head starts fresh.

    Args:
        config: of the MBT; channels, layers and the MLP must be the transformer's. Heads are not in its weights.
        state_dict: of the transformer, by the names of timm, of Hugging Face's ViTModel, or of Google's Flax checkpoints
            (`dict(numpy.load(file))`), nested or not.
        inflation: of the patch kernel (D, 3, h, w) over t frames. "central_frame": it at frame t // 2, zeros elsewhere;
            "mean": it / t at every frame; "rank_pooling": weighted by approximate rank pooling (Bilen et al. 2017,
            equation 3). For a modality of one channel it is summed over its channels, as if the input came three times.
        positions: of a grid of another size. "resize_tile": interpolated linearly to the height and width of a frame (the
            whole grid of a 2-D modality), and repeated over the frames; "tile": the grid's rows repeated as they are;
            "none": fresh.
        bottleneck_from_positions: the bottleneck starts from the positions too: the row of the CLS token, if there is one,
            and the grid interpolated to the other rows. Else it starts fresh.
        device, dtype: of the parameters.

    A modality with one axis gets the blocks alone. Raises ValueError for names that are missing and shapes that do not fit.
    """
    for name, value, allowed in (
        ("inflation", inflation, ("central_frame", "mean", "rank_pooling")),
        ("positions", positions, ("resize_tile", "tile", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
    vit = official.read_vit(state_dict, config.num_layers)
    model = MBT(config, device=device, dtype=dtype)
    token = config.classifier == "token"
    weights = model.state_dict()
    weights |= {f"encoder.norm.{n}": vit[f"norm.{n}"] for n in ("weight", "bias")}
    for i in range(config.num_layers):
        blocks = model.encoder.layers[i].blocks
        names = [n.removeprefix(f"blocks.{i}.") for n in vit if n.startswith(f"blocks.{i}.")]
        weights |= {f"encoder.layers.{i}.blocks.{block}.{n}": vit[f"blocks.{i}.{n}"] for block in blocks for n in names}
    table = vit["positions"].double()
    extra = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    if extra > 1:
        raise ValueError(f"state_dict has {table.shape[1]} positions; it must be a square of them, and one of a CLS token")
    grid = table[0, extra:]
    cls_row = table[:, :1] if extra else torch.zeros_like(table[:, :1])
    for m in config.modalities:
        if token and "cls" in vit:
            weights[f"cls.{m.name}"] = vit["cls"]
        if AXES[m.tokeniser] == 1:
            continue
        weights[f"tokenisers.{m.name}.weight"] = _inflated(vit["embedding.weight"], m, inflation)
        weights[f"tokenisers.{m.name}.bias"] = vit["embedding.bias"]
        if positions == "none":
            continue
        each = grid
        if positions == "resize_tile":
            frames = len(m.frames) if m.tokeniser == "temporal_sampling" else 1
            each = _resized(grid, (m.grid[-2] // frames, m.grid[-1]))
        repeats, rest = divmod(m.num_tokens, len(each))
        if rest:
            raise ValueError(
                f"positions is {positions!r}; the {m.num_tokens} tokens of {m.name!r} are no multiple of {len(each)} positions"
            )
        own = each.repeat(repeats, 1)[None]
        weights[f"positions.{m.name}"] = torch.cat([cls_row, own], 1) if token else own
    if bottleneck_from_positions and model.encoder.bottleneck is not None:
        rows = config.num_bottlenecks - token
        height = next(n for n in range(math.isqrt(rows), 0, -1) if rows % n == 0) if rows else 0
        parts = [cls_row] * token + ([_resized(grid, (height, rows // height))[None]] if rows else [])
        weights["encoder.bottleneck"] = torch.cat(parts, 1)
    load_weights(model, weights, "state_dict")
    return model


def _inflated(kernel, modality, inflation):
    """(D, C, h, w) -> (D, C', [t,] h, w)."""
    if modality.channels == 1:
        kernel = kernel.sum(1, keepdim=True)
    if modality.tokeniser != "3d_conv":
        return kernel
    t = modality.patch[0]
    if inflation == "mean":
        weights = torch.full((t,), 1 / t)
    elif inflation == "central_frame":
        weights = torch.zeros(t)
        weights[t // 2] = 1.0
    else:
        harmonic = [sum(1 / n for n in range(1, i + 1)) for i in range(t + 1)]
        weights = torch.tensor([(2 * (t - i + 1) - (t + 1) * (harmonic[t] - harmonic[i - 1])) / t for i in range(1, t + 1)])
    return kernel[:, :, None] * weights.to(kernel)[:, None, None]


def _resized(grid, shape):
    """(n * n, D) -> (height * width, D): linear, with the corners kept."""
    side = math.isqrt(len(grid))
    square = grid.T.reshape(1, -1, side, side)
    return F.interpolate(square, tuple(shape), mode="bilinear", align_corners=True)[0].flatten(1).T
