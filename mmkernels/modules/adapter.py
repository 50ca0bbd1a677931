"""Bottleneck adapters, banks of them, AdapterFusion, invertible adapters; parameters are named as in the library `adapters`.

A place is where an adapter sits: h is what the sub-layer gave, r what it was given, LN the model's own LayerNorm there (None
in pre-LN models). A sequential adapter computes there (Houlsby et al. 2019, Pfeiffer et al. 2020)

    x   = LN(h + r) if original_ln_before, else h              (h + r where there is no LN)
    res = h if residual_before_ln is True, h + r if it is "post_add", x if it is False
    o   = dropout(gate * scale * (W_u act(W_d LN_b(x) + b_d) + b_u))
    y   = LN_a(o + res) if adapter_residual_before_ln, else LN_a(o) + res
    out = LN(y + r) if original_ln_after, else y

and a parallel one (He et al. 2022) x = r, y = LN_a(o) + h, out as above. LN_b and LN_a are the adapter's own, if it has them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops._shared.arguments import check_numbers
from .backend import WithBackend, check_backend

ACTIVATIONS = {  # of the configs, as transformers has them -> (of `ops.adapter`, plain PyTorch)
    None: (None, lambda x: x),
    "linear": (None, lambda x: x),
    "relu": ("relu", F.relu),
    "gelu": ("gelu", F.gelu),
    "gelu_python": ("gelu", F.gelu),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))),
    "swish": ("swish", F.silu),
    "silu": ("swish", F.silu),
    "leakyrelu": ("leakyrelu", F.leaky_relu),
    "tanh": ("tanh", torch.tanh),
}


def _check_number(option, value, what="finite", allowed=math.isfinite, kind=(int, float)):
    if not isinstance(value, kind) or isinstance(value, bool) or not allowed(value):
        raise ValueError(f"{option} is {value!r}; it must be a number, {what}")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The options of a bottleneck adapter, under the names that adapter_config.json has; see this file's head.

    mh_adapter, output_adapter, cross_adapter: after attention, after the feed-forward layer, after cross-attention.
    reduction_factor: channels over bottleneck, or a dict of it by layer number (as a string) with a "default".
    scaling: a number, "learned" (one number) or "channel" (one for each channel).
    leave_out: numbers of layers without an adapter.
    inv_adapter: "nice" or "glow" behind the embeddings, of reduction inv_adapter_reduction_factor.
    phm_*: sums of Kronecker products as weights (Compacter), see `PHMLinear`.
    stochastic_depth: probability that an example skips the adapter in training.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | dict = 16
    non_linearity: str | None = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: tuple = ()
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0

    def __post_init__(self):
        layers = self.leave_out or ()
        if not isinstance(layers, Iterable) or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
            raise ValueError(f"leave_out is {layers!r}; it must have numbers of layers, from 0 on")
        object.__setattr__(self, "leave_out", tuple(layers))
        name = self.non_linearity.lower() if isinstance(self.non_linearity, str) else self.non_linearity
        object.__setattr__(self, "non_linearity", name)
        allowed = {
            "non_linearity": tuple(ACTIVATIONS),
            "init_weights": ("bert", "mam_adapter", "houlsby"),
            "inv_adapter": (None, "nice", "glow"),
            "residual_before_ln": (True, False, "post_add"),
            "phm_c_init": ("normal", "uniform"),
        }
        if isinstance(self.scaling, str):
            allowed["scaling"] = ("learned", "channel")
        for option, values in allowed.items():
            if getattr(self, option) not in values:
                raise ValueError(f"{option} is {getattr(self, option)!r}; allowed are {', '.join(map(repr, values))}")
        if not isinstance(self.scaling, str):
            _check_number("scaling", self.scaling)
        for option in ("dropout", "stochastic_depth"):
            _check_number(option, getattr(self, option) or 0.0, "at least 0 and below 1", lambda p: 0.0 <= p < 1.0)
        for option in ("phm_dim", "phm_rank"):
            _check_number(option, getattr(self, option), "an integer of at least 1", lambda n: n >= 1, int)
        if self.inv_adapter_reduction_factor is not None:
            _check_number("inv_adapter_reduction_factor", self.inv_adapter_reduction_factor, "above 0", lambda f: f > 0)
        factors = self.reduction_factor.values() if isinstance(self.reduction_factor, Mapping) else [self.reduction_factor]
        if not factors or not all(isinstance(f, (int, float)) and f > 0 for f in factors):
            raise ValueError(f"reduction_factor is {self.reduction_factor!r}; it must be a number above 0, or a dict of them")

    @classmethod
    def of(cls, config, **changes) -> "AdapterConfig":
        """From the name of a preset, a dict of options, or itself; with `changes` to it.

        Raises ValueError for unknown presets and options.
        """
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"config is {config!r}; allowed are {', '.join(map(repr, PRESETS))}, dicts and AdapterConfig")
            config = PRESETS[config]
        if isinstance(config, Mapping):
            changes = {**config, **changes}
            architecture = changes.pop("architecture", None)
            if architecture is not None:
                raise ValueError(f"architecture is {architecture!r}; only bottleneck adapters (None) are known")
            config = cls()
        elif not isinstance(config, cls):
            raise TypeError(f"config is a {type(config).__name__}; it must be a preset's name, a dict or an AdapterConfig")
        unknown = set(changes) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"config has the unknown option {min(unknown)!r}")
        return dataclasses.replace(config, **changes)

    def to_dict(self) -> dict:
        """What adapter_config.json has."""
        return {**dataclasses.asdict(self), "leave_out": list(self.leave_out)}

    def bottleneck(self, channels: int, layer: int | None = None) -> int:
        """The size of the bottleneck in a layer: channels // reduction_factor, at least 1."""
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get(layer, factor.get("default")))
            if factor is None:
                raise ValueError(f"reduction_factor is {self.reduction_factor}: it has neither layer {layer} nor 'default'")
        return max(1, int(channels // factor))


_SEQ = {"original_ln_before": True}
_DOUBLE = {"mh_adapter": True, "non_linearity": "swish"}
_PARALLEL = {"is_parallel": True, "reduction_factor": 2, "init_weights": "mam_adapter", "scaling": 4.0}
_COMPACTER = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_NICE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
PRESETS = {
    "seq_bn": AdapterConfig(**_SEQ),
    "double_seq_bn": AdapterConfig(**_DOUBLE),
    "par_bn": AdapterConfig(**_PARALLEL),
    "scaled_par_bn": AdapterConfig(**{**_PARALLEL, "scaling": "learned"}),
    "seq_bn_inv": AdapterConfig(**_SEQ, **_NICE),
    "double_seq_bn_inv": AdapterConfig(**_DOUBLE, **_NICE),
    "compacter++": AdapterConfig(**_SEQ, **_COMPACTER),
    "compacter": AdapterConfig(**{**_DOUBLE, **_COMPACTER}),
    "adapter_plus": AdapterConfig(
        **_SEQ,
        original_ln_after=False,
        residual_before_ln=False,
        reduction_factor=96,
        non_linearity="gelu",
        init_weights="houlsby",
        scaling="channel",
        stochastic_depth=0.1,
    ),
}
PRESETS |= {
    "pfeiffer": PRESETS["seq_bn"],
    "houlsby": PRESETS["double_seq_bn"],
    "parallel": PRESETS["par_bn"],
    "scaled_parallel": PRESETS["scaled_par_bn"],
    "pfeiffer+inv": PRESETS["seq_bn_inv"],
    "houlsby+inv": PRESETS["double_seq_bn_inv"],
    "AdapterPlus": PRESETS["adapter_plus"],
}


# --- Weights -----------------------------------------------------------------------------------------------------------------


class PHMLinear(nn.Module):
    """x H + b with H = sum_i A_i ⊗ (L_i R_i), n Kronecker products (Karimi Mahabadi et al. 2021, Compacter, section 4).

    `W_left` L (n, in / n, rank) and `W_right` R (n, rank, out / n), or `W` (n, in / n, out / n) if not factorized; `b` (out,).
    A (n, n, n), `phm_rule` (or the products of `phm_rule_left` and `phm_rule_right`), is the layer's own or stands in
    `shared`, a ParameterDict that many layers use; so may W, named by `position`. Note that H is (in, out).
    """

    def __init__(self, in_features, out_features, config, *, position="down", shared=None, device=None, dtype=None):
        super().__init__()
        n = config.phm_dim
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size % n:
                raise ValueError(f"{name} is {size}; phm_dim {n} must divide it")
        self.in_features, self.out_features, self.position = in_features, out_features, position
        own = phm_parameters(config, in_features, out_features, "", not config.shared_phm_rule, not config.shared_W_phm)
        for name, (shape, init, learned) in own.items():
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=learned)
            setattr(self, name, parameter)
            init(parameter)
        self.b = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if config.phm_bias else None
        self.shared = (shared,)  # in a tuple: it is not this layer's own

    def dense(self):
        """(weight (out, in), bias), as `nn.Linear` has them."""
        return phm_dense(self, self.shared[0]), self.b

    def forward(self, x):
        return F.linear(x, *self.dense())


def phm_dense(layer, shared):
    """The weight (out, in) of a PHMLinear, or of the library's PHMLayer."""

    def get(name):
        own = getattr(layer, name, None)
        return own if own is not None or shared is None or name not in shared else shared[name]

    rule = get("phm_rule")
    if rule is None:
        rule = get("phm_rule_left") @ get("phm_rule_right")
    weight = getattr(layer, "W", None)
    if weight is None and getattr(layer, "W_left", None) is not None:
        weight = layer.W_left @ layer.W_right
    elif weight is None:
        weight = get(f"W_{layer.position}")
        if weight is None:
            weight = get(f"W_{layer.position}_left") @ get(f"W_{layer.position}_right")
    return torch.einsum("nab,nxy->byax", rule, weight).flatten(2).flatten(0, 1)


def phm_parameters(config, in_features, out_features, position, rule, weights) -> dict:
    """name -> (shape, initialisation, whether it is learned) of the Kronecker factors of a layer or of all layers."""
    n, std = config.phm_dim, config.phm_init_range
    result = {}

    def draw(parameter):
        with torch.no_grad():
            if config.phm_c_init == "uniform":
                parameter.uniform_(-0.01, 0.01)
            else:
                parameter.normal_(std=std)

    def xavier(parameter):
        for part in parameter.detach():
            nn.init.xavier_normal_(part)

    if rule and config.factorized_phm_rule:
        result["phm_rule_left"] = (n, n, 1), draw, config.learn_phm
        result["phm_rule_right"] = (n, 1, n), draw, config.learn_phm
    elif rule:
        result["phm_rule"] = (n, n, n), draw, config.learn_phm
    name = f"W_{position}" if position else "W"
    if weights and config.factorized_phm_W:
        result[f"{name}_left"] = (n, in_features // n, config.phm_rank), xavier, True
        result[f"{name}_right"] = (n, config.phm_rank, out_features // n), xavier, True
    elif weights:
        result[name] = (n, in_features // n, out_features // n), xavier, True
    return result


def shared_phm_parameters(config, channels, *, device=None, dtype=None) -> nn.ParameterDict:
    """What all layers of a Compacter share, as the config says; empty if nothing."""
    wanted = phm_parameters(config, channels, channels, "", config.shared_phm_rule, False)
    bottleneck = config.bottleneck(channels)
    for position, sizes in (("down", (channels, bottleneck)), ("up", (bottleneck, channels))):
        wanted |= phm_parameters(config, *sizes, position, False, config.shared_W_phm)
    result = nn.ParameterDict()
    for name, (shape, init, learned) in wanted.items():
        result[name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=learned)
        init(result[name])
    return result


def _dense(layer, shared=None):
    """(weight (out, in), bias) of a linear layer of any kind."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    return phm_dense(layer, shared), layer.b


# --- One adapter -------------------------------------------------------------------------------------------------------------


class Adapter(WithBackend):
    """A bottleneck adapter with everything that its config puts around it; see this file's head.

    Parameters as in the library: `adapter_down.0` and `adapter_up` (linear layers), `scaling` if it is learned, `gate`,
    `adapter_norm_after`, and `adapter_norm_before`, which is `adapter_down.0` as well and moves the linear layer to 1.

    Args:
        channels: C.
        config: an AdapterConfig, the name of a preset or a dict of options.
        bottleneck: r; default by the config's reduction_factor.
        backend: a backend of `ops.adapter`, or "eager": plain PyTorch in the library's order of operations.

    Raises ValueError or TypeError for unknown options and sizes that do not fit.
    """

    def __init__(self, channels, config="seq_bn", *, bottleneck=None, backend="auto", device=None, dtype=None):
        super().__init__(backend)
        config = AdapterConfig.of(config)
        if config.phm_layer and not isinstance(self, PHMAdapter):
            raise ValueError("config has phm_layer, sums of Kronecker products; PHMAdapter has those")
        bottleneck = config.bottleneck(channels) if bottleneck is None else bottleneck
        for name, size in (("channels", channels), ("bottleneck", bottleneck)):
            _check_number(name, size, "an integer of at least 1", lambda n: n >= 1, int)
        self.config, self.channels, self.kind = config, channels, kind_of(config)
        self.bottleneck = bottleneck
        factory = {"device": device, "dtype": dtype}
        down, up = self._linear_layers(channels, bottleneck, factory)
        if config.ln_before:
            self.adapter_norm_before = nn.LayerNorm(channels, **factory)
        self.adapter_down = nn.Sequential(*([self.adapter_norm_before] if config.ln_before else []), down)
        self.adapter_up = up
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else channels, **factory))
        else:
            self.scaling = float(config.scaling)
        if config.ln_after:
            self.adapter_norm_after = nn.LayerNorm(channels, **factory)
        if config.use_gating:
            self.gate = nn.Linear(channels, 1, **factory)
        self.shared = (None,)
        self.reset_parameters()

    def _linear_layers(self, channels, bottleneck, factory):
        return nn.Linear(channels, bottleneck, **factory), nn.Linear(bottleneck, channels, **factory)

    def reset_parameters(self):
        """The init of the config; kinds "bert" and "houlsby" begin close to the identity, "mam_adapter" as the identity."""
        kind, down, up = self.config.init_weights, self.adapter_down[-1], self.adapter_up
        if self.config.init_weights_seed:
            torch.manual_seed(self.config.init_weights_seed)
        if isinstance(down, nn.Linear):
            for layer in (down, up):
                nn.init.zeros_(layer.bias)
                if kind == "bert":
                    nn.init.normal_(layer.weight, std=0.02)
                elif kind == "houlsby":
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            if kind == "mam_adapter":
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
        if self.config.use_gating:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    def forward(self, hidden, residual=None, norm=None, *, last=True):
        """The place with this adapter alone in it.

        Args:
            hidden: h (B, T, C).
            residual: r (B, T, C). Without it the adapter stands alone: hidden + o, through its own norms.
            norm: LN, an `nn.LayerNorm` or any module; None in pre-LN models.
            last: False where another adapter of a Stack follows: then the last step, `out`, is left to that one.
        """
        return _place([self], hidden, residual, norm, None, last, self.backend)

    def before(self, hidden, residual, norm):
        """(x, res): what enters the adapter and what goes around it."""
        return _before(self.config, hidden, residual, norm)

    def inner(self, x, res):
        """y of what `before` gave; without h for a parallel adapter."""
        return _inner([self], x, res, None, self.backend)

    def up(self, x):
        """scale (W_u act(W_d LN_b(x) + b_d) + b_u): what AdapterFusion attends to."""
        drops = self.training and self.config.stochastic_depth
        return _branch([self], x, None, self.backend, _depth(self.config, x) if drops else None)

    def after(self, y, residual, norm):
        """`out` of y."""
        return _after(self.config, y, residual, norm)

    def weights(self):
        """(W_d (r, C), b_d, W_u (C, r), b_u)."""
        return *_dense(self.adapter_down[-1], self.shared[0]), *_dense(self.adapter_up, self.shared[0])

    def extra_repr(self):
        return f"channels={self.channels}, bottleneck={self.bottleneck}"


class PHMAdapter(Adapter):
    """An adapter of `PHMLinear` layers (Compacter).

    `shared` is a ParameterDict as `shared_phm_parameters` makes it; by default the adapter has its own, `shared_parameters`.
    """

    def __init__(self, channels, config="compacter", *, bottleneck=None, shared=None, backend="auto", device=None, dtype=None):
        config = AdapterConfig.of(config)
        own = shared_phm_parameters(config, channels, device=device, dtype=dtype) if shared is None else None
        self.__dict__["_made_shared"] = own if shared is None else shared
        super().__init__(channels, config, bottleneck=bottleneck, backend=backend, device=device, dtype=dtype)
        self.shared = (self.__dict__.pop("_made_shared"),)
        if own is not None and len(own):
            self.shared_parameters = own

    def _linear_layers(self, channels, bottleneck, factory):
        options = {"config": self.config, "shared": self.__dict__["_made_shared"], **factory}
        return (
            PHMLinear(channels, bottleneck, position="down", **options),
            PHMLinear(bottleneck, channels, position="up", **options),
        )


def make_adapter(channels, config, *, layer=None, shared=None, backend="auto", device=None, dtype=None) -> Adapter:
    """The Adapter or PHMAdapter that a config asks for in a layer."""
    options = {"bottleneck": config.bottleneck(channels, layer), "backend": backend, "device": device, "dtype": dtype}
    if config.phm_layer:
        return PHMAdapter(channels, config, shared=shared, **options)
    return Adapter(channels, config, **options)


class AdapterBank(nn.ModuleDict, WithBackend):
    """N adapters by name and by number, computed together: every row by its own adapter, in one call.

    Adapters of one config but for their bottlenecks run as a bank of `ops.adapter`, the smaller ones filled up with zeros.
    """

    def __init__(self, adapters=None, *, backend="auto"):
        super().__init__(adapters)
        check_backend(backend)
        self.backend = backend

    def alike(self, names) -> bool:
        """Whether these adapters can be computed in one call."""
        kinds = {(self[name].kind, self[name].channels) for name in names}
        own_norms = self[names[0]].config.ln_before or self[names[0]].config.ln_after
        return len(kinds) == 1 and not (own_norms and len(set(names)) > 1)

    def forward(self, hidden, residual=None, norm=None, *, index, names=None, last=True):
        """As `Adapter.forward`; row b, or token (b, t), with adapter number `index`, -1 for none.

        Args:
            index: int64 (B,) or (B, T), into `names`.
            names: of adapters; default all, in the order in which they were added.

        Raises ValueError for adapters that are not `alike`, TypeError, ValueError or IndexError for an index that is not that.
        """
        return _place(self._alike(names, index), hidden, residual, norm, index, last, self.backend)

    def inner(self, x, res, *, index, names=None):
        """As `Adapter.inner`, for rows of several adapters."""
        return _inner(self._alike(names, index), x, res, index, self.backend)

    def _alike(self, names, index):
        names = list(self) if names is None else list(names)
        unknown = [name for name in names if name not in self]
        if unknown:
            raise ValueError(f"adapter {unknown[0]!r} is unknown; known are {', '.join(map(repr, self)) or 'none'}")
        if not names:
            raise ValueError("names is empty; it must have adapters of the bank")
        if not self.alike(names):
            raise ValueError(f"adapters {names} differ in more than their bottlenecks; they cannot be one bank")
        adapters = [self[name] for name in names]
        if self.backend == "eager" or adapters[0].config.use_gating:  # where ops.adapter does not see the index, or late
            check_numbers("index", index, len(names), index.device, none="no adapter")
        return adapters


# --- What they compute -------------------------------------------------------------------------------------------------------
# `adapters` is a list: of one, whose weights are used as they are, or of several with an index.


def kind_of(config):
    """Equal for adapters that one call can compute."""
    computed = ("non_linearity", "original_ln_before", "original_ln_after", "is_parallel", "scaling", "use_gating", "dropout")
    computed += ("ln_before", "ln_after", "residual_before_ln", "adapter_residual_before_ln", "stochastic_depth")
    return tuple(getattr(config, option) for option in computed)


def _place(adapters, hidden, residual, norm, index, last, backend):
    config = adapters[0].config
    if residual is None:
        y = _inner(adapters, hidden, hidden, index, backend)
        return y + hidden if config.is_parallel else y
    ends = last and config.original_ln_after
    two_norms = config.ln_before and config.original_ln_before and norm is not None
    # rows without an adapter are to keep h, which is not what goes around it
    special_rows = index is not None and not config.is_parallel and config.residual_before_ln is not True
    composed = special_rows or two_norms or config.ln_after or config.use_gating or backend == "eager"
    if composed or not _is_layer_norm(norm):
        x, res = _before(config, hidden, residual, norm)
        y = _inner(adapters, x, res, index, backend)
        y = y + hidden if config.is_parallel else y
        if special_rows:
            y = torch.where(_per_row(index, y) < 0, hidden, y)
        return _after(config, y, residual, norm) if ends else y
    before = None if config.is_parallel else (norm if config.original_ln_before else None)
    options = _layer_norm(norm if ends else None, "out_norm_weight", "out_norm_bias", "out_eps")
    residuals, skip = [], False
    if config.is_parallel:
        x, added, residuals = residual, None, [hidden]
    else:
        x, added = hidden, residual if config.original_ln_before else None
        if config.residual_before_ln is True:
            residuals = [hidden]
        elif config.residual_before_ln == "post_add" or (config.ln_before and config.residual_before_ln is False):
            residuals = [hidden] if added is None else [hidden, residual]
        else:
            skip = True
    if config.ln_before:
        before = adapters[0].adapter_norm_before
    if ends:
        residuals.append(residual)
    return _op(
        adapters,
        x,
        index,
        backend,
        input_residual=added,
        residual=tuple(residuals),
        skip=skip,
        **_layer_norm(before),
        **options,
    )


def _before(config, hidden, residual, norm):
    if config.is_parallel:
        return residual, residual
    x, res = hidden, hidden
    if config.original_ln_before:
        x = hidden + residual
        if config.residual_before_ln == "post_add":
            res = x
        x = x if norm is None else norm(x)
    return x, x if config.residual_before_ln is False else res


def _inner(adapters, x, res, index, backend):
    """y: the branch with dropout and gate, the adapter's own norm and its residual."""
    config, training = adapters[0].config, adapters[0].training
    gate = _gate(adapters, x, index)
    if not config.ln_after and backend != "eager":
        residuals = () if config.is_parallel else (res,)
        before = adapters[0].adapter_norm_before if config.ln_before else None
        return _op(adapters, x, index, backend, residual=residuals, gate=gate, **_layer_norm(before))
    out = F.dropout(_branch(adapters, x, index, backend, gate), config.dropout, training)
    if config.is_parallel:
        return adapters[0].adapter_norm_after(out) if config.ln_after else out
    if config.adapter_residual_before_ln:
        out = out + res
    if config.ln_after:
        out = adapters[0].adapter_norm_after(out)
    return out if config.adapter_residual_before_ln else out + res


def _branch(adapters, x, index, backend, gate=None):
    """gate * scale (W_u act(W_d LN_b(x) + b_d) + b_u)."""
    config = adapters[0].config
    if backend != "eager":
        before = adapters[0].adapter_norm_before if config.ln_before else None
        return _op(adapters, x, index, backend, gate=gate, drops=False, **_layer_norm(before))
    activation = ACTIVATIONS[config.non_linearity][1]
    total = None
    for number, adapter in enumerate(adapters):
        w_down, b_down, w_up, b_up = adapter.weights()
        rows = adapter.adapter_norm_before(x) if config.ln_before else x
        out = F.linear(activation(F.linear(rows, w_down, b_down)), w_up, b_up) * adapter.scaling
        if index is not None:
            out = torch.where(_per_row(index, out) == number, out, 0.0)
        total = out if total is None else total + out
    return total if gate is None else total * _per_row(gate, total)


def _after(config, y, residual, norm):
    if not config.original_ln_after:
        return y
    y = y + residual
    return y if norm is None else norm(y)


def _op(adapters, x, index, backend, *, gate=None, drops=True, **options):
    config, training = adapters[0].config, adapters[0].training
    if training and config.stochastic_depth and gate is None and drops:
        gate = _depth(config, x)
    (w_down, b_down, w_up, b_up), scale = _stacked(adapters, index)
    if options.get("residual") == ():
        options.pop("residual")
    return ops.adapter(
        x,
        w_down,
        b_down,
        w_up,
        b_up,
        activation=ACTIVATIONS[config.non_linearity][0],
        scale=scale,
        gate=gate,
        index=index,
        dropout_p=config.dropout if training and drops else 0.0,
        backend=backend,
        **options,
    )


def _stacked(adapters, index):
    """((W_d, b_d, W_u, b_u), scale) of one adapter, or of a bank, filled up to its largest bottleneck."""
    if index is None:
        return adapters[0].weights(), adapters[0].scaling
    parts = [adapter.weights() for adapter in adapters]
    size = max(w_down.shape[0] for w_down, *_ in parts)

    def filled(tensor, axis):
        missing = size - tensor.shape[axis]
        return tensor if not missing else F.pad(tensor, (0, missing) if axis == -1 else (0, 0, 0, missing))

    w_down = torch.stack([filled(part[0], -2) for part in parts])
    w_up = torch.stack([filled(part[2], -1) for part in parts])
    b_down = _biases([(part[0], part[1]) for part in parts], size)
    b_up = _biases([(part[2], part[3]) for part in parts], w_up.shape[1])
    scale = adapters[0].scaling
    if isinstance(scale, torch.Tensor):
        scale = torch.stack([adapter.scaling for adapter in adapters])
    return (w_down, b_down, w_up, b_up), scale


def _biases(layers, size):
    """(A, size) of the (weight, bias) of layers, some of which have no bias; None where none has."""
    if all(bias is None for _, bias in layers):
        return None
    biases = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in layers]
    return torch.stack([F.pad(bias, (0, size - bias.shape[0])) for bias in biases])


def _gate(adapters, x, index):
    """(B,), or (B, T) with an index of tokens: the mean over an example's tokens of sigmoid(w_g x + c_g), times the choice of
    stochastic depth; None without both."""
    config = adapters[0].config
    gate = None
    if config.use_gating:
        gates = torch.stack([torch.sigmoid(adapter.gate(x)).mean(1).squeeze(-1) for adapter in adapters], -1)  # (B, A)
        if index is None:
            gate = gates[:, 0]
        else:
            gate = gates.gather(1, index.clamp(min=0).reshape(len(gates), -1)).reshape(index.shape)
    if adapters[0].training and config.stochastic_depth:
        depth = _depth(config, x)
        gate = depth if gate is None else gate * _per_row(depth, gate)
    return gate


def _depth(config, x):
    """(B,): 0 with the probability of stochastic depth, else one over that of the rest."""
    kept = 1.0 - config.stochastic_depth
    return torch.empty(x.shape[0], dtype=x.dtype, device=x.device).bernoulli_(kept).div_(kept)


def _per_row(index, rows):
    return index.reshape(index.shape + (1,) * (rows.dim() - index.dim()))


def _is_layer_norm(norm):
    return norm is None or (type(norm) is nn.LayerNorm and norm.weight is not None)


def _layer_norm(norm, weight="norm_weight", bias="norm_bias", eps="eps"):
    return {} if norm is None else {weight: norm.weight, bias: norm.bias, eps: norm.eps}


# --- AdapterFusion -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """The options of adapter_fusion_config.json; see `AdapterFusion`."""

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None

    @classmethod
    def of(cls, config) -> "FusionConfig":
        """From "dynamic", "static", a dict of options, or itself."""
        if isinstance(config, str):
            if config not in FUSIONS:
                raise ValueError(f"config is {config!r}; allowed are {', '.join(map(repr, FUSIONS))}, dicts and FusionConfig")
            return FUSIONS[config]
        if isinstance(config, Mapping):
            unknown = set(config) - {field.name for field in dataclasses.fields(cls)}
            if unknown:
                raise ValueError(f"config has the unknown option {min(unknown)!r}")
            return cls(**config)
        if not isinstance(config, cls):
            raise TypeError(f"config is a {type(config).__name__}; it must be a name, a dict or a FusionConfig")
        return config

    def to_dict(self):
        return dataclasses.asdict(self)


FUSIONS = {"dynamic": FusionConfig(), "static": FusionConfig(value=False, regularization=False, value_initialized=False)}


class AdapterFusion(WithBackend):
    """Attention of every token over what N adapters made of it (Pfeiffer et al. 2021, AdapterFusion, section 3).

        q = W_q x + b_q     k_n = W_k u_n + b_k     p = softmax_n(dropout(q . k_n) / T)     y = W_v sum_n p_n u_n + residual

    Without the 1 / sqrt(C) of other attentions; W_v has no bias. The keys and values of the u_n are never made: q . k_n is
    (W_kᵀ q) . u_n plus the same number for all n, and W_v comes after the sum, which takes 3 C² products a token instead of
    (1 + 2 N) C². Where the u_n come from plain bottlenecks, they are not made either (`of_bottlenecks`).

    Parameters as in the library: `query`, `key` (`nn.Linear`) and `value` (without bias), those that the config asks for.

    Args:
        config: a FusionConfig, "dynamic", "static" (no value) or a dict of options. residual_before adds the residual to each
            u_n instead of to y; temperature lets T fall from 50, by a 1000th of that in each training step, down to 1.
        dropout: of the scores, where the config has no dropout_prob: a score that is dropped is 0, and takes part as such.
        backend: a backend of `ops.adapter_fusion`, or "eager": keys and values of everything, as the library has them.
    """

    def __init__(self, channels, config="dynamic", *, dropout=0.0, backend="auto", device=None, dtype=None):
        super().__init__(backend)
        self.config = config = FusionConfig.of(config)
        self.channels, self.dropout = channels, config.dropout_prob or dropout
        factory = {"device": device, "dtype": dtype}
        if not (config.query or config.key or config.value):
            self.dense = nn.Linear(channels, 1, **factory)  # in the library's files, used by nothing
        for name in ("query", "key", "value"):
            if getattr(config, name):
                setattr(self, name, nn.Linear(channels, channels, bias=name != "value", **factory))
        self.T = 50.0 if config.temperature else 1.0
        self.fall = self.T / 1000.0
        self.always_falls = False  # the library lets T fall in evaluation as well
        self.attention = None  # (B, T, N) of the last call, kept with `keep_attention`
        self.keep_attention = False
        self.reset_parameters()

    def reset_parameters(self):
        """Query and key N(0, 0.02); the value is the identity plus 1e-6 beside its diagonal."""
        for name in ("query", "key", "value"):
            layer = getattr(self, name, None)
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if self.config.value and self.config.value_initialized:
            with torch.no_grad():
                self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, query, outputs, residual):
        """query, residual (B, T, C) or None, outputs u (B, T, N, C) or a list of N (B, T, C) -> (B, T, C)."""
        u = torch.stack(outputs, 2) if isinstance(outputs, (list, tuple)) else outputs
        if self.backend == "eager":
            return self._plain(query, u, residual)
        projections = (getattr(self, name, None) for name in ("query", "key", "value"))
        w = [(None, None) if layer is None else (layer.weight, layer.bias) for layer in projections]
        options = {"dropout_p": self.dropout if self.training else 0.0, "return_weights": self.keep_attention}
        options["input_residual" if self.config.residual_before else "residual"] = residual
        temperature, backend = self._temperature(), self.backend
        out = ops.adapter_fusion(query, u, *w[0], *w[1], w[2][0], **options, temperature=temperature, backend=backend)
        if self.keep_attention:
            out, self.attention = out
        return out

    def of_bottlenecks(self, query, bottlenecks, w_up, b_up, residual):
        """The same of u_n = W_n a_n + b_n: bottlenecks (B, T, N, r), w_up (N, C, r), b_up (N, C); nothing of N C is made."""
        q, absorbed = self._query(query)
        count, channels, size = w_up.shape
        flat = w_up.transpose(0, 1).reshape(channels, count * size)
        back = (absorbed @ flat).unflatten(-1, (count, size))
        p = self._probabilities((back * bottlenecks).sum(-1) + absorbed @ b_up.T, q, absorbed, residual)
        context = F.linear((p[..., None] * bottlenecks).flatten(-2), flat) + p @ b_up
        return self._result(context, residual)

    def regularization(self):
        """0.01 |W_v - I|²; zero where there is no value, no regularization, or the value is frozen."""
        if not (self.config.value and self.config.regularization and self.value.weight.requires_grad):
            return 0.0
        weight = self.value.weight
        return 0.01 * (weight - torch.eye(self.channels, device=weight.device, dtype=weight.dtype)).square().sum()

    def _query(self, query):
        q = self.query(query) if self.config.query else query
        return q, q @ self.key.weight if self.config.key else q

    def _probabilities(self, scores, q, absorbed, residual):
        if self.config.key:  # the same for all n: for a softmax without dropout only a gradient of zero
            scores = scores + (q @ self.key.bias)[..., None]
        if self.dropout and self.training:
            if self.config.residual_before and residual is not None:
                scores = scores + (absorbed * residual).sum(-1, keepdim=True)
            scores = F.dropout(scores, self.dropout)
        return self._softmax(scores)

    def _temperature(self):
        """T of this call; that of the next one is lower, where there is a temperature."""
        now = self.T
        if self.training or self.always_falls:
            self.T = max(self.T - self.fall, 1.0)
        return now

    def _softmax(self, scores):
        p = torch.softmax(scores / self._temperature(), -1)
        if self.keep_attention:
            self.attention = p.detach()
        return p

    def _result(self, context, residual):
        if self.config.residual_before and residual is not None:
            context = context + residual
        context = self.value(context) if self.config.value else context
        return context if self.config.residual_before or residual is None else context + residual

    def _plain(self, query, u, residual):
        if self.config.residual_before and residual is not None:
            u = u + residual[:, :, None, :]
        q = self.query(query) if self.config.query else query
        keys = self.key(u) if self.config.key else u
        values = self.value(u) if self.config.value and self.config.value_before_softmax else u
        scores = torch.matmul(q.unsqueeze(2), keys.transpose(-2, -1)).squeeze(2)
        p = self._softmax(F.dropout(scores, self.dropout, self.training))
        context = torch.matmul(p.unsqueeze(2), values).squeeze(2)
        if self.config.value and not self.config.value_before_softmax:
            context = self.value(context)
        return context if self.config.residual_before or residual is None else context + residual


def fuse_bottlenecks(fusion: AdapterFusion, adapters: list, query, x, residual):
    """AdapterFusion of plain adapters on the same x, all bottlenecks as one; None where they are not plain.

    (Plain: one config, no norms of their own, no bank of Kronecker products; dropout and gates do not reach u_n anyway.)
    """
    kinds = {adapter.kind for adapter in adapters}
    if fusion.backend == "eager" or len(kinds) > 1 or adapters[0].config.ln_before:
        return None
    if adapters[0].training and adapters[0].config.stochastic_depth:
        return None
    (w_down, b_down, w_up, b_up), scale = _stacked(adapters, True)
    if b_up is None:
        b_up = w_up.new_zeros(w_up.shape[:2])
    if isinstance(scale, torch.Tensor):  # (N, 1) or (N, C)
        w_up, b_up = w_up * scale[..., None], b_up * scale
    elif scale != 1.0:
        w_up, b_up = w_up * scale, b_up * scale
    count, size, _ = w_down.shape
    inner = F.linear(x, w_down.flatten(0, 1), None if b_down is None else b_down.flatten())
    inner = ACTIVATIONS[adapters[0].config.non_linearity][1](inner).unflatten(-1, (count, size))
    return fusion.of_bottlenecks(query, inner, w_up, b_up, residual)


# --- Invertible adapters -----------------------------------------------------------------------------------------------------


class InvertibleAdapter(WithBackend):
    """An invertible map of the embeddings (Pfeiffer et al. 2020, MAD-X, section 3.3), with halves x1, x2 of the channels.

        nice (Dinh et al. 2015):   y1 = x1 + F(x2),               y2 = x2 + G(y1)
        glow (Kingma et al. 2018): y1 = e(s2) x1 + t2,  (s2, t2) = N2(x2);   y2 = e(s1) x2 + t1,  (s1, t1) = N1(y1)
                                   e(s) = exp(0.636 c atan(s / c)), c = 5

    F, G, N1, N2 are Linear -> activation -> Linear with the inner size of their input over `reduction_factor`; parameters
    `F.0`, `F.2`, `G.0`, `G.2`, or `s1.*` (N1) and `s2.*` (N2). (The library's own glow cuts the tokens instead of the channels
    and cannot run; its parameters are these.)
    """

    def __init__(
        self, channels, kind="nice", *, activation="relu", reduction_factor=2, backend="auto", device=None, dtype=None
    ):
        super().__init__(backend)
        if kind not in ("nice", "glow"):
            raise ValueError(f"kind is {kind!r}; allowed are 'nice', 'glow'")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        self.kind, self.activation = kind, activation
        first = channels // 2
        self.halves = halves = (first, channels - first)

        def network(inputs, outputs):
            inner = int(inputs // reduction_factor)
            layers = (
                nn.Linear(inputs, inner, device=device, dtype=dtype),
                nn.Identity(),  # the library's activation stands here
                nn.Linear(inner, outputs, device=device, dtype=dtype),
            )
            for layer in layers[::2]:
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        if kind == "nice":
            self.F, self.G = network(halves[1], halves[0]), network(halves[0], halves[1])
        else:
            self.s1, self.s2 = network(halves[0], 2 * halves[1]), network(halves[1], 2 * halves[0])

    def forward(self, x, *, inverse=False):
        """(..., C) -> (..., C); with `inverse` back again."""
        a, b = x.split(self.halves, -1)
        if self.kind == "nice" and not inverse:
            a = self._add(a, b, self.F, 1.0)
            b = self._add(b, a, self.G, 1.0)
        elif self.kind == "nice":
            b = self._add(b, a, self.G, -1.0)
            a = self._add(a, b, self.F, -1.0)
        elif not inverse:
            s, t = self._run(self.s2, b).chunk(2, -1)
            a = self._factor(s) * a + t
            s, t = self._run(self.s1, a).chunk(2, -1)
            b = self._factor(s) * b + t
        else:
            s, t = self._run(self.s1, a).chunk(2, -1)
            b = (b - t) / self._factor(s)
            s, t = self._run(self.s2, b).chunk(2, -1)
            a = (a - t) / self._factor(s)
        return torch.cat((a, b), -1)

    def _add(self, x, y, network, sign):
        """x + sign network(y)."""
        if self.backend == "eager" or self.halves[0] != self.halves[1]:
            change = self._run(network, y)
            return x + change if sign > 0 else x - change
        down, up = network[0], network[2]
        return ops.adapter(
            y,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            residual=x,
            activation=ACTIVATIONS[self.activation][0],
            scale=sign,
            backend=self.backend,
        )

    def _run(self, network, x):
        return network[2](ACTIVATIONS[self.activation][1](network[0](x)))

    @staticmethod
    def _factor(s):
        return torch.exp(0.636 * 5.0 * torch.atan(s / 5.0))
