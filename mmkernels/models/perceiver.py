"""Perceiver (Jaegle et al., ICML 2021): latents that read a long input again and again.

    z <- latents
    for every block b:  z <- Cross(z, x) in front of the blocks that have one;  z <- Self_1 .. Self_L (z)
    logits = Linear(mean over latents of z)

Pre-norm everywhere, GELU in its tanh form, no norm before the head, as in DeepMind's released code.
"""

import dataclasses
import math

import torch
from torch import nn

from ..modules import FourierPositions, PerceiverEncoder
from ..modules.backend import check_backend
from ..modules.positions import check_grid, position_channels
from ..ops._shared.arguments import check_integer, check_number
from . import official
from .registry import load_weights, save_pretrained


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of a Perceiver. Channels None: the defaults of the attention modules."""

    input_shape: tuple = (224, 224)  # the index grid of the input: (time,), (height, width), (time, height, width)...
    input_channels: int = 3  # of the content; the positions add d (2 num_bands + 1)
    num_classes: int = 1000
    num_latents: int = 512
    latent_channels: int = 1024
    num_cross_attends: int = 8
    num_blocks: int | None = None  # towers of latent layers in a row, default one after every cross-attend
    layers_per_block: int = 6
    cross_heads: int = 1
    self_heads: int = 8
    cross_qk_channels: int | None = None
    cross_v_channels: int | None = None
    self_qk_channels: int | None = None
    self_v_channels: int | None = None
    cross_widening: int = 1  # of the MLP after a cross-attention
    self_widening: int = 1
    num_bands: int = 64
    max_resolution: tuple | None = None  # default input_shape
    share_cross: str = "after_first"  # "after_first", "all" or "none"
    share_blocks: bool = True  # all blocks use the same latent layers
    eps: float = 1e-5
    backend: str = "auto"  # of attentions and linear layers; "eager" is plain PyTorch

    def __post_init__(self):
        for name in ("input_shape", "max_resolution"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))  # JSON has lists only
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            check_integer(name, value, least)
        check_grid(self.input_shape, self.num_bands, self.max_resolution, "input_shape")
        for heads, *channels in (
            ("cross_heads", "cross_qk_channels", "cross_v_channels"),
            ("self_heads", "self_qk_channels", "self_v_channels"),
        ):
            for name in channels:
                value = getattr(self, name)
                if value is not None and value % getattr(self, heads):
                    raise ValueError(f"{name} is {value}; it must be a multiple of {heads}, {getattr(self, heads)}")
        if self.self_qk_channels is None and self.latent_channels % self.self_heads:
            raise ValueError(
                f"latent_channels is {self.latent_channels}; it must be a multiple of self_heads, {self.self_heads}"
            )
        channels = self.input_channels + position_channels(self.input_shape, self.num_bands)
        if self.cross_qk_channels is None and channels % self.cross_heads:
            raise ValueError(
                f"cross_heads is {self.cross_heads}; it must divide the {channels} channels of input and positions, unless "
                "cross_qk_channels says otherwise"
            )
        check_number("eps", self.eps, "a positive number", lambda eps: eps > 0.0)
        if not isinstance(self.share_blocks, bool):
            raise ValueError(f"share_blocks is {self.share_blocks!r}; it must be true or false")
        check_backend(self.backend)
        if self.block_count % self.num_cross_attends:
            raise ValueError(
                f"num_blocks is {self.num_blocks}; it must be a multiple of num_cross_attends, {self.num_cross_attends}"
            )
        if self.share_cross not in ("after_first", "all", "none"):
            raise ValueError(f"share_cross is {self.share_cross!r}; allowed are 'after_first', 'all' and 'none'")

    @property
    def block_count(self) -> int:
        return self.num_cross_attends if self.num_blocks is None else self.num_blocks


_LEAST = {
    "input_channels": 1,
    "num_classes": 1,
    "num_latents": 1,
    "latent_channels": 1,
    "num_cross_attends": 1,
    "num_blocks": 1,
    "layers_per_block": 0,
    "cross_heads": 1,
    "self_heads": 1,
    "cross_qk_channels": 1,
    "cross_v_channels": 1,
    "self_qk_channels": 1,
    "self_v_channels": 1,
    "cross_widening": 1,
    "self_widening": 1,
    "num_bands": 0,
}
_OPTIONAL = ("num_blocks", "cross_qk_channels", "cross_v_channels", "self_qk_channels", "self_v_channels")

CONFIGS = {
    "perceiver-imagenet": PerceiverConfig(),
    "perceiver-imagenet-1": PerceiverConfig(num_cross_attends=1, num_blocks=8),
    "perceiver-imagenet-unshared": PerceiverConfig(share_cross="none", share_blocks=False),
    # The smaller model of the paper's ablations.
    "perceiver-imagenet-ablation": PerceiverConfig(
        latent_channels=512, num_cross_attends=2, layers_per_block=4, share_cross="none", share_blocks=False
    ),
    "perceiver-small": PerceiverConfig(
        input_shape=(64, 64),
        num_latents=64,
        latent_channels=128,
        num_cross_attends=3,
        layers_per_block=4,
        num_bands=16,
    ),
    "perceiver-digits": PerceiverConfig(
        input_shape=(48, 48),
        input_channels=1,
        num_classes=10,
        num_latents=32,
        latent_channels=64,
        num_cross_attends=3,
        layers_per_block=2,
        self_heads=4,
        num_bands=8,
        max_resolution=(16, 16),  # the digits were recorded at 8 x 8: faster waves carry nothing
    ),
}


class Perceiver(PerceiverEncoder):
    """Classifier over arrays of any shape.

    Input (B, *input_shape, input_channels), or (B, M, input_channels) with M the product; output (B, num_classes).
    Raises ValueError for an input of another shape.
    """

    def __init__(self, config: PerceiverConfig, *, device=None, dtype=None):
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            config.input_channels + position_channels(config.input_shape, config.num_bands),
            num_latents=config.num_latents,
            latent_channels=config.latent_channels,
            num_cross_attends=config.num_cross_attends,
            num_blocks=config.block_count,
            layers_per_block=config.layers_per_block,
            share_cross=config.share_cross,
            share_blocks=config.share_blocks,
            cross_heads=config.cross_heads,
            self_heads=config.self_heads,
            cross_qk_channels=config.cross_qk_channels,
            cross_v_channels=config.cross_v_channels,
            self_qk_channels=config.self_qk_channels,
            self_v_channels=config.self_v_channels,
            cross_widening=config.cross_widening,
            self_widening=config.self_widening,
            eps=config.eps,
            backend=config.backend,
            **factory,
        )
        self.config = config
        self.positions = FourierPositions(config.input_shape, config.num_bands, config.max_resolution, **factory)
        self.head = nn.Linear(config.latent_channels, config.num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """As an encoder's, and the head zero."""
        super().reset_parameters()
        self.positions.reset_parameters()
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs, *, key_mask=None):
        """(B, *input_shape, input_channels) -> (B, num_classes); `key_mask` bool (B, M), True for elements that count."""
        config = self.config
        size, channels = math.prod(config.input_shape), config.input_channels
        if not isinstance(inputs, torch.Tensor):
            raise TypeError(f"inputs is a {type(inputs).__name__}; it must be a tensor")
        if inputs.shape[1:] not in ((*config.input_shape, channels), (size, channels)):
            grid = ", ".join(map(str, config.input_shape))
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; it must be (B, {grid}, {channels}) or (B, {size}, {channels})"
            )
        inputs = inputs.reshape(inputs.shape[0], size, channels)
        z = super().forward(inputs, position=self.positions(), key_mask=key_mask)
        return self.head(z.mean(1))

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors into the folder `path`; `mmkernels.models.load(path)` reads them."""
        save_pretrained(self, path)


CONFIG, MODEL = PerceiverConfig, Perceiver


def from_official(config: dict, state_dict: dict, *, backend="auto") -> Perceiver:
    """A Perceiver with the parameters of DeepMind's Haiku modules, in the dtype of `state_dict`; see `read_official`."""
    sizes, weights = read_official(config, state_dict)
    model = Perceiver(dataclasses.replace(sizes, backend=backend), dtype=official.common_dtype(weights))
    load_weights(model, weights, "state_dict")
    return model


def read_official(config: dict, state_dict: dict) -> tuple:
    """(PerceiverConfig, state dict of `Perceiver`) from DeepMind's Haiku modules; the tensors are views of the given ones.

    Args:
        config: `num_cross_attends`, `layers_per_block`, `self_heads`; `max_resolution` and `num_bands` of the positions;
            optional `cross_heads` (1), `layer_norm_eps` (1e-5) and `index_shape` (`max_resolution`).
        state_dict: `module path/parameter` -> tensor or array, linear weights (in, out), or nested, {module path: {parameter:
            array}}. Every other size is read off the tensors, and so is the sharing: how many cross-attends and latent layers
            there are.

    Raises ValueError for another kind of Perceiver, for missing, unknown or misshapen entries.
    """
    state_dict = official.haiku_state(config, state_dict)
    official.check_perceiver("models.perceiver.from_official", state_dict)
    for name in ("num_cross_attends", "layers_per_block", "self_heads", "num_bands", "max_resolution"):
        if name not in config:
            raise ValueError(f"config has no {name!r}; it has {', '.join(config)}")
    for name in ("num_cross_attends", "num_blocks", "layers_per_block", "num_bands"):
        if name in config and (not isinstance(config[name], int) or isinstance(config[name], bool)):
            raise ValueError(f"config has {name} {config[name]!r}; it must be an integer")
    if not isinstance(config["max_resolution"], (list, tuple)):
        raise ValueError(f"config has max_resolution {config['max_resolution']!r}; it must be a list, one number per axis")
    crosses, layers = _numbered(state_dict, "cross_"), _numbered(state_dict, "latent_")
    attends, per_block = config["num_cross_attends"], config["layers_per_block"]
    num_blocks = config.get("num_blocks", attends)
    sharing = {attends: "none", 2: "after_first", 1: "all"}
    if len(crosses) not in sharing:
        raise ValueError(f"state_dict has {len(crosses)} cross-attends {crosses}; {attends} of them share 1, 2 or {attends}")
    if len(layers) not in (per_block, num_blocks * per_block):
        raise ValueError(
            f"state_dict has {len(layers)} latent layers; {num_blocks} blocks of {per_block} share {per_block} or have "
            f"{num_blocks * per_block}"
        )

    def size(name, axis):
        if name not in state_dict:
            raise ValueError(f"state_dict has no {name!r}")
        shape = state_dict[name].shape
        if len(shape) <= axis:
            raise ValueError(f"state_dict has {name!r} of shape {tuple(shape)}; it must have {axis + 1} dimensions or more")
        return shape[axis]

    cross, resolution = crosses[0], tuple(config["max_resolution"])
    channels = size("latents/pos_embs", 1)
    options = {}
    if layers:
        options = {
            "self_qk_channels": size(f"{layers[0]}/attention/linear/w", 1),
            "self_v_channels": size(f"{layers[0]}/attention/linear_2/w", 1),
            "self_widening": size(f"{layers[0]}/mlp/linear/w", 1) // channels,
        }
    sizes = PerceiverConfig(
        input_shape=config.get("index_shape", resolution),
        input_channels=size(f"{cross}/layer_norm_1/scale", 0) - len(resolution) * (2 * config["num_bands"] + 1),
        num_classes=size("projection/~/logits/b", 0),
        num_latents=size("latents/pos_embs", 0),
        latent_channels=channels,
        num_cross_attends=attends,
        num_blocks=num_blocks,
        layers_per_block=per_block,
        cross_heads=config.get("cross_heads", 1),
        self_heads=config["self_heads"],
        cross_qk_channels=size(f"{cross}/attention/linear/w", 1),
        cross_v_channels=size(f"{cross}/attention/linear_2/w", 1),
        cross_widening=size(f"{cross}/mlp/linear/w", 1) // channels,
        num_bands=config["num_bands"],
        max_resolution=resolution,
        share_cross=sharing[len(crosses)],
        share_blocks=len(layers) == per_block,
        eps=config.get("layer_norm_eps", 1e-5),
        **options,
    )
    weights = {
        "latents": official.array(state_dict, "latents/pos_embs"),
        **official.haiku_linear(state_dict, "projection/~/logits", "head"),
    }
    for i, name in enumerate(crosses):
        weights |= _block(
            state_dict, name, f"cross.{i}", {"": "attention.query_norm", "_1": "attention.input_norm", "_2": "norm"}
        )
    for i, name in enumerate(layers):
        target = f"blocks.{i // per_block}.{i % per_block}"
        weights |= _block(state_dict, name, target, {"": "attention.norm", "_1": "norm"})
    used = {*crosses, *layers, "latents", "projection"}
    unknown = [name for name in state_dict if name.partition("/")[0] not in used]
    if unknown:
        raise ValueError(f"state_dict has {unknown[0]!r}, which a Perceiver does not have; its modules are {sorted(used)}")
    return sizes, weights


def _block(state_dict, source, target, norms):
    weights = {}
    for suffix, name in norms.items():
        weights |= official.haiku_norm(state_dict, f"{source}/layer_norm{suffix}", f"{target}.{name}")
    for suffix, name in {"": "query", "_1": "key", "_2": "value", "_3": "output"}.items():
        weights |= official.haiku_linear(state_dict, f"{source}/attention/linear{suffix}", f"{target}.attention.{name}")
    for suffix, index in {"": 0, "_1": 2}.items():
        weights |= official.haiku_linear(state_dict, f"{source}/mlp/linear{suffix}", f"{target}.mlp.{index}")
    return weights


def _numbered(state_dict, prefix):
    """Top-level modules `prefix`*, numbers in numeric order; `first` stands before them, other words (`shared`) behind."""

    def order(name):
        words = name.removeprefix(prefix).split("_")
        return [-1 if w == "first" else int(w) if w.isdigit() else math.inf for w in words]

    return sorted({n.partition("/")[0] for n in state_dict if n.startswith(prefix)}, key=order)
