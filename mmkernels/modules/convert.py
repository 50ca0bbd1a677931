"""`mmkernels.convert`: live models of `adapters`, PEFT and transformers compute with the ops of this package, in place."""

import dataclasses
import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import _library, ops
from . import composition, resampler
from .adapter import Adapter, AdapterBank, AdapterConfig, AdapterFusion, FusionConfig, kind_of
from .backend import WithBackend, gelu, gelu_form, linear, split_heads
from .composition import Activation, Pass, Place
from .latent import LatentCrossAttention


class Report(NamedTuple):
    """What `convert` did: name of a module -> what replaces it, or why it was left as it is."""

    replaced: dict
    kept: dict

    def __str__(self):
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        lines += [f"{name}: left as it is: {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "nothing to convert"


def convert(model: nn.Module, filter_fn=None) -> Report:
    """Makes the adapters and LoRA layers of the libraries `adapters` and PEFT, and of transformers the attentions of Perceiver
    and of Idefics2's perceiver resampler, compute with fused ops. Where it was measured to be faster, linear layers and GELUs
    of the models of transformers take `ops.linear` and `ops.bias_gelu`; where this machine's library multiplies as fast, only
    Perceiver's linear layers are replaced.

    The model stays the same object with the same state dict and outputs, up to rounding; adapters can be added, trained, saved
    and deleted as before. Rows of several adapters (BatchSplit, MultiTask, Parallel; `adapter_names`) run in one call instead
    of a loop over the adapters.

    Args:
        model: of transformers, as it is or with bottleneck adapters or LoRA layers (`adapters.init(model)`,
            `peft.get_peft_model`); a Perceiver, or an `Idefics2PerceiverResampler`, by itself or in a model, whose attention
            then never joins context and latents. What a call cannot do (gating scores, fusion attentions or attention
            probabilities asked for, head masks, DoRA, merged weights, dropout of a LoRA layer in training, a Stack of several
            LoRA layers, ...) the library goes on computing; and everything of other methods, (IA)³ and prefixes. The attention
            of BERT and RoBERTa models of `adapters` is transformers' own where nothing stands in it.
        filter_fn: (name, module) -> whether to convert it; default all.

    Returns:
        a Report: what was replaced, and what was left and why. Converting again changes nothing.

    Raises TypeError for something that is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    report = Report({}, {})
    parts = dict(_parts_of_transformers(model))
    for name, module in model.named_modules():
        kind = ("forward", parts[module], "") if module in parts else _kind_of_module(module)
        if kind is None or (filter_fn is not None and not filter_fn(name, module)):
            continue
        attribute, replacement, why = kind
        if why:
            report.kept[name] = why
        elif attribute in module.__dict__:
            report.kept[name] = "it is converted already"
        else:
            setattr(module, attribute, replacement(module))
            report.replaced[name] = replacement.__doc__
    return report


def _kind_of_module(module):
    """(attribute, class of its replacement, why not) of a module that is some adapter, else None."""
    library = type(module).__module__.partition(".")[0]
    if hasattr(module, "bottleneck_layer_forward") and hasattr(module, "adapters_config"):
        hooked = getattr(module, "is_layer_hooked", False)
        return "bottleneck_layer_forward", LibraryPlace, "it is a hook on a layer" if hooked else ""
    if library == "adapters" and hasattr(module, "prefix_tuning") and _plain_attention(module) is not None:
        return "forward", LibraryAttention, ""
    if library == "adapters" and hasattr(module, "adapter_modules_name"):
        parts = [part for part in module.adapter_modules.values() if isinstance(part, nn.Module)] or [module]
        kinds = {type(part).__name__ for part in parts} if len(module.adapter_modules) else ()
        if type(module).__name__ == "LoRALinearTorch":
            if "LoRA" in kinds:
                return "forward", LibraryLora, ""
            if not kinds and _library.SLOW_MKL:
                return "forward", LibraryLinear, ""
        other = "one matrix makes queries, keys and values" if "LoRA" in kinds else "ops.adapter does not compute that"
        return ("forward", None, f"it has {' and '.join(sorted(kinds))}: {other}") if kinds else None
    if library == "peft" and hasattr(module, "lora_A"):
        if not isinstance(module.lora_A, nn.ModuleDict):  # AdaLoRA
            return "forward", None, f"a {type(module).__name__} is more than two matrices"
        linear = isinstance(getattr(module, "base_layer", None), nn.Linear)
        return "forward", LoraLinear, "" if linear else "its base is no torch.nn.Linear"
    if library == "transformers" and type(module).__name__ == "PerceiverAttention":
        return "forward", PerceiverAttention, ""
    if library == "transformers" and type(module).__name__ == "Idefics2PerceiverResampler":
        return "forward", Idefics2Resampler, ""
    return None


def _parts_of_transformers(model):
    """(module, class of its replacement) of what is converted where it is a child of a module of transformers, or of one that
    `adapters` made of that."""
    for module in model.modules():
        library = type(module).__module__.partition(".")[0]
        if library == "transformers" or (library == "adapters" and _of_transformers(module)):
            fast = _library.SLOW_MKL or type(module).__name__.startswith("Perceiver")
            for child in module.children():
                if fast and type(child) is nn.Linear:
                    yield child, PlainLinear
                elif gelu_form(child) is not None and not isinstance(child, WithBackend):  # an AdapterHub's are fast
                    yield child, LibraryGelu


class Idefics2Resampler:
    """perceiver resampler of Idefics2 on ops.attention"""

    def __init__(self, module):
        self.module, self.original = module, type(module).forward

    def __call__(self, context, attention_mask, **kwargs):
        module, config = self.module, self.module.config
        if any(value is not None and value is not False for value in kwargs.values()):  # attentions are asked for, or more
            return self.original(module, context, attention_mask, **kwargs)
        first = module.layers[0].self_attn
        options = resampler.Options(
            first.num_heads,
            first.num_key_value_heads,
            "rms",
            config.rms_norm_eps,
            module.layers[0].mlp.act_fn,
            first.attention_dropout if module.training else 0.0,
            "auto",
        )
        layers = [
            resampler.Layer(
                layer.input_context_norm,
                layer.input_latents_norm,
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.self_attn.o_proj,
                layer.post_attention_layernorm,
                layer.mlp.up_proj,
                layer.mlp.down_proj,
                layer.mlp.gate_proj,
            )
            for layer in module.layers
        ]
        mask = attention_mask.to(context.device) != 0
        return module.norm(resampler.resample(module.latents, context, mask, layers, options))


class LibraryPlace:
    """bottleneck adapters of `adapters` on ops.adapter"""

    def __init__(self, layer):
        self.layer, self.original = layer, type(layer).bottleneck_layer_forward
        names = type(layer).bottleneck_layer_forward.__globals__  # the library's, without importing it
        self.context, self.config_type = names["ForwardContext"], names["BnConfig"]
        self.views, self.setups, self.unable = {}, {}, set()

    def __call__(self, hidden_states, residual_input, layer_norm):
        layer, context = self.layer, self.context.get_context()
        setup = layer.get_active_setup()
        asked = context is not None and (context.output_adapter_gating_scores or context.output_adapter_fusion_attentions)
        same_rows = residual_input is not None and residual_input.shape == hidden_states.shape
        owner = self._owner(setup, context) if setup is not None and same_rows and not asked else None
        if owner is None:
            return self.original(layer, hidden_states, residual_input, layer_norm)
        parallel = context is not None and context.adapters_parallelized
        now = Pass(getattr(context, "task_ids", None), batch=context.original_batch_size if parallel else None)
        active = Activation(setup=self._setup(setup), compat="adapters", last=now)
        out = Place(owner, -1, active)(hidden_states, residual_input, layer_norm)
        if now.batch is not None and context is not None:
            context.adapters_parallelized, context.original_batch_size = True, now.batch
        for name, fusion in owner.adapter_fusion_layer.items():
            layer.adapter_fusion_layer[name].T = fusion.T
        return out

    def _setup(self, setup):
        if id(setup) not in self.setups or self.setups[id(setup)][0] is not setup:
            self.setups = {id(setup): (setup, _our_block(setup))}
        return self.setups[id(setup)][1]

    def _owner(self, setup, context):
        """The layer's modules of this setup as this package's; None where there is one that it has not."""
        bank, fusions = _Plain(), {}
        names = setup.flatten()
        for name, source in self.layer.adapters.items():
            if name not in names:
                continue
            shared = None
            if context is not None and name in getattr(context, "shared_parameters", {}):
                shared = context.shared_parameters[name]
            view = self.views.get(name)
            if view is None or view.source[0] is not source or view.scaling is not source.scaling:
                if id(source) in self.unable:
                    return None
                view = self._view(name, source)
                if view is None:
                    self.unable.add(id(source))
                    return None
                self.views[name] = view
            view.shared, view.training = (shared,), source.training
            bank[name] = view
        for name, source in self.layer.adapter_fusion_layer.items():
            view = self.views.get(f"fusion {name}")
            if view is None or view.source[0] is not source:
                view = self.views[f"fusion {name}"] = _fusion_view(source)
            view.T, view.training = source.T, source.training
            fusions[name] = view
        return _Owner(bank, fusions)

    def _view(self, name, source):
        layer = self.layer
        found = layer.adapters_config.match(
            name, config_type=self.config_type, layer_idx=layer.layer_idx, location_key=layer.location_key
        )
        known = {field.name for field in dataclasses.fields(AdapterConfig)}
        try:
            config = AdapterConfig.of({option: value for option, value in dict(found).items() if option in known})
        except (ValueError, TypeError):
            return None
        view = Adapter.__new__(Adapter)
        nn.Module.__init__(view)
        view.backend, view.config, view.kind, view.source = "auto", config, kind_of(config), (source,)
        view.channels, view.bottleneck = source.input_size, source.down_sample
        view.adapter_down, view.adapter_up, view.scaling = source.adapter_down[:-1], source.adapter_up, source.scaling
        for part in ("adapter_norm_before", "adapter_norm_after", "gate"):
            if hasattr(source, part):
                setattr(view, part, getattr(source, part))
        return view


class _Plain(dict):
    """A bank of views: they are modules of the library's, and are registered there alone."""

    backend = "auto"
    alike, inner, _alike, __call__ = AdapterBank.alike, AdapterBank.inner, AdapterBank._alike, AdapterBank.forward


class _Owner(NamedTuple):
    adapters: dict
    adapter_fusion_layer: dict


def _fusion_view(source):
    view = AdapterFusion.__new__(AdapterFusion)
    nn.Module.__init__(view)
    view.backend, view.config, view.source = "auto", FusionConfig.of(source.config.to_dict()), (source,)
    view.channels, view.dropout = source.dense_size, source.dropout.p
    view.T, view.fall, view.always_falls = source.T, source.reduction, True
    view.attention, view.keep_attention = None, False
    for part in ("query", "key", "value"):
        if hasattr(source, part):
            setattr(view, part, getattr(source, part))
    return view


def _our_block(node):
    if isinstance(node, str):
        return node
    kind, children = type(node).__name__, [_our_block(child) for child in node.children]
    options = {"splits": "splits", "batch_sizes": "batch_sizes", "weights": "weights"}
    options = {option: getattr(node, own) for option, own in options.items() if hasattr(node, own)}
    if kind == "Average":
        options["normalize_weights"] = False
    if kind == "Fuse":
        options["name"] = node.name
    return composition.BLOCKS[kind](*children, **options)


# Classes of transformers whose `forward` the library repeats with prefixes and repeated rows between its lines.
ATTENTIONS = {
    f"{model}{kind}" for model in ("Bert", "Roberta", "XLMRoberta") for kind in ("SelfAttention", "SdpaSelfAttention")
}


def _plain_attention(layer):
    """The class of transformers that the library's attention extends, where it is one of ATTENTIONS."""
    plain = _of_transformers(layer)
    return plain if plain is not None and plain.__name__ in ATTENTIONS else None


def _of_transformers(module):
    """The class of transformers whose `forward` a module has, or repeats; None for other modules."""
    bases = (c for c in type(module).__mro__ if c.__module__.startswith("transformers.") and "forward" in vars(c))
    return next(bases, None)


class LibraryAttention:
    """attention of `adapters`, as transformers has it where it has no prefixes and repeats no rows"""

    def __init__(self, layer):
        self.layer, self.original, self.plain = layer, type(layer).forward, _plain_attention(layer).forward
        names = type(layer.prefix_tuning).get_active_setup.__globals__  # the library's, without importing it
        self.setup = names["AdapterSetup"]

    def __call__(self, *args, **kwargs):
        layer, prefixes = self.layer, self.layer.prefix_tuning
        setup = self.setup.get_context()
        setup = prefixes.adapters_config.active_setup if setup is None else setup.adapter_setup
        # the library's copies queries, keys and values, whether there are rows to repeat or not
        alone = setup is None or (setup.parallel_channels == 1 and prefixes.get_active_setup() is None)
        return (self.plain if alone else self.original)(layer, *args, **kwargs)


class LibraryGelu:
    """GELU on ops.bias_gelu"""

    def __init__(self, module):
        self.form = gelu_form(module)

    def __call__(self, input):
        return gelu(input, self.form, "auto")


class LibraryLora:
    """LoRA layers of `adapters` on ops.adapter"""

    def __init__(self, layer):
        self.layer, self.original = layer, type(layer).forward
        self.context = type(layer).forward.__globals__["ForwardContext"]  # the library's, without importing it

    def __call__(self, x):
        layer = self.layer
        setup = None if layer.merged else layer.get_active_setup()
        wanted = ([], [], None) if setup is None else self._wanted(setup, x)
        if wanted is None or not all(self._can(name, x) for name in wanted[0]):
            return self.original(layer, x)
        names, weights, index = wanted
        loras = [layer.loras[name] for name in names]
        result = linear(x, layer.weight.T if layer.fan_in_fan_out else layer.weight, layer.bias, "auto")
        if not names:
            return result
        scales = [lora.scaling * weight for lora, weight in zip(loras, weights, strict=True)]
        return _added(x, result, [lora.lora_A for lora in loras], [lora.lora_B for lora in loras], scales, index)

    def _wanted(self, setup, x):
        """(names, factor of each, number of each row's one or None for all of them) of what is active; None if it is more."""
        names, kind = list(setup.children), type(setup).__name__
        if x.dim() != 3 or not all(isinstance(name, str) for name in names):
            return None
        if kind == "Stack":
            names = [name for name in names if name in self.layer.loras]
            return (names, [1.0], None) if len(names) == 1 else None
        if not all(name in self.layer.loras for name in names):
            return None
        if kind == "Average":  # the library's mean of what is weighted already
            return names, [float(weight) / len(names) for weight in setup.weights], None
        active = Activation(last=Pass(getattr(self.context.get_context(), "task_ids", None)))
        if kind == "MultiTask":
            return names, [1.0] * len(names), active.tasks(_our_block(setup), x.shape[0], x.device)
        if kind != "BatchSplit" or sum(setup.batch_sizes) != x.shape[0]:
            return None
        rows = tuple(number for number, size in enumerate(setup.batch_sizes) for _ in range(size))
        return names, [1.0] * len(names), composition.numbers_of(rows, x.device)

    def _can(self, name, x):
        lora = self.layer.loras[name]
        drops = lora.training and getattr(getattr(lora, "lora_dropout", None), "p", 0.0) > 0
        plain = type(lora).__name__ == "LoRA" and not (lora.use_gating or lora.use_dora or drops)
        return plain and lora.lora_A.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


class LibraryLinear(LibraryLora):  # adapters may be added later
    """linear layer of `adapters` on ops.linear where that is faster"""


class LoraLinear:
    """LoRA layers of PEFT on ops.adapter"""

    def __init__(self, layer):
        self.layer, self.original = layer, type(layer).forward

    def __call__(self, x, *args, **kwargs):
        layer, names = self.layer, kwargs.get("adapter_names")
        layer._check_forward_args(x, *args, **kwargs)
        options = {name for name, value in kwargs.items() if value is not None} - {"adapter_names"}
        wanted = layer.active_adapters if names is None else dict.fromkeys(names)
        known = [name for name in wanted if name in layer.lora_A]
        if args or options or layer.disable_adapters or layer.merged or not self._can(known, x):
            return self.original(layer, x, *args, **kwargs)
        result = self._base(x)
        if not known:
            return result
        downs = [layer.lora_A[name].weight for name in known]
        ups = [layer.lora_B[name].weight for name in known]
        scales = [layer.scaling[name] for name in known]
        if result.dtype != x.dtype:
            return self.original(layer, x, *args, **kwargs)
        index = None
        if names is not None:
            places = {name: number for number, name in enumerate(known)}
            index = composition.numbers_of(tuple(places.get(name, -1) for name in names), x.device)
        return _added(x, result, downs, ups, scales, index)

    def _base(self, x):
        base = self.layer.base_layer
        hooked = base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks
        plain = type(base) is nn.Linear and "forward" not in vars(base) and not hooked
        return linear(x, base.weight, base.bias, "auto") if plain else base(x)

    def _can(self, names, x):
        layer = self.layer
        for name in names:
            dropout = layer.lora_dropout[name]
            drops = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
            if drops or name in getattr(layer, "lora_variant", {}) or layer.lora_B[name].bias is not None:
                return False
            if layer.lora_A[name].weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
                return False
        return True


def _added(x, result, downs, ups, scales, index):
    """result + scale B A x of all adapters, or with an index of each row's own one."""
    if x.shape == result.shape and (index is None or len(set(scales)) == 1):
        return _fused(x, result, downs, ups, scales, index)
    return _wide(x, result, downs, ups, scales, index)


def _fused(x, result, downs, ups, scales, index):
    """One call; several active adapters are one of all their ranks, those of a mixed batch are a bank."""
    if index is None and len(downs) > 1:
        down, up = torch.cat(downs), torch.cat([u * s for u, s in zip(ups, scales, strict=True)], 1)
        return ops.adapter(x, down, None, up, None, residual=result, activation=None)
    if index is None:
        return ops.adapter(x, downs[0], None, ups[0], None, residual=result, activation=None, scale=scales[0])
    size = max(down.shape[0] for down in downs)
    down = torch.stack([F.pad(down, (0, 0, 0, size - down.shape[0])) for down in downs])
    up = torch.stack([F.pad(up, (0, size - up.shape[1])) for up in ups])
    return ops.adapter(x, down, None, up, None, residual=result, activation=None, scale=scales[0], index=index)


def _wide(x, result, downs, ups, scales, index):
    """Layers that are not square: all ranks side by side, those of other rows' adapters set to zero."""
    inner = F.linear(x, torch.cat(downs))
    if index is not None:
        owners = composition.numbers_of(tuple(n for n, d in enumerate(downs) for _ in range(d.shape[0])), x.device)
        own = index.reshape((-1,) + (1,) * (x.dim() - 1)) == owners
        inner = torch.where(own, inner, 0.0)
    return result + F.linear(inner, torch.cat([u * s for u, s in zip(ups, scales, strict=True)], 1))


class PlainLinear:
    """linear layer on ops.linear where that is faster"""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, input):
        return linear(input, self.layer.weight, self.layer.bias, "auto")


class PerceiverAttention:
    """attention of Perceiver on ops.latent_attention or ops.attention"""

    def __init__(self, layer):
        self.layer, self.original, self.view = layer, type(layer).forward, None
        self.names = tuple(inspect.signature(self.original).parameters)[1:]  # `head_mask` only before transformers 5
        if isinstance(layer.self.layernorm2, nn.LayerNorm) and self._plain():
            self._view()

    def __call__(self, *args, **kwargs):
        layer, inner = self.layer, self.layer.self
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden_states, inputs = given["hidden_states"], given.get("inputs")
        mask = given.get("attention_mask" if inputs is None else "inputs_mask")
        out = None
        if given.get("head_mask") is None and not given.get("output_attentions") and self._plain():
            if inputs is None or (inner.training and inner.dropout.p > 0):
                out = self._projected(hidden_states, inputs, mask)
            else:
                out = self._cross(hidden_states, inputs, mask)
        if out is None:
            return self.original(layer, *args, **kwargs)
        return (out + hidden_states if layer.use_query_residual else out,)

    def _plain(self):
        inner = self.layer.self
        linears = (inner.query, inner.key, inner.value, self.layer.output.dense)
        return all(type(linear) is nn.Linear for linear in linears)

    def _projected(self, hidden_states, inputs, mask):
        """Self-attention, and cross-attention whose probabilities are dropped."""
        inner = self.layer.self
        if mask is not None and (mask.dim() != 4 or not mask.is_floating_point()):
            return None
        hidden_states = inner.layernorm1(hidden_states)
        source = hidden_states if inputs is None else inner.layernorm2(inputs)
        q, k, v = inner.query(hidden_states), inner.key(source), inner.value(source)
        q, k, v = (split_heads(t, inner.num_heads) for t in (q, k, v))
        p = inner.dropout.p if inner.training else 0.0
        if mask is not None and mask.dtype != torch.float32:
            mask = mask.to(q.dtype)
        out = ops.attention(q, k, v, bias=mask, dropout_p=p)
        return self.layer.output(out.transpose(1, 2).flatten(2))

    def _cross(self, hidden_states, inputs, mask):
        """Cross-attention; latents and learned queries, which the library expands over the batch, stay one for all."""
        key_mask = None
        if mask is not None:
            if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or not mask.is_floating_point():
                return None
            key_mask = (mask[:, 0, 0] > torch.finfo(mask.dtype).min / 2).expand(inputs.shape[0], -1)
            # Looking at it waits for a GPU, which a captured graph cannot.
            captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
            if not torch.compiler.is_compiling() and not captured:
                some, none = torch.stack([~key_mask.all(), ~key_mask.any(1).all()]).tolist()
                if none:  # an example without any key: the library attends to all of them alike
                    return None
                key_mask = key_mask if some else None
        if hidden_states.stride(0) == 0:
            hidden_states = hidden_states[:1]
        return self._view()(hidden_states, inputs, key_mask=key_mask)

    def _view(self):
        """The library's modules as this package's; made again where one was put in the place of another."""
        inner, output = self.layer.self, self.layer.output.dense
        parts = {
            "query_norm": inner.layernorm1,
            "input_norm": inner.layernorm2,
            "query": inner.query,
            "key": inner.key,
            "value": inner.value,
            "output": output,
        }
        if self.view is None or any(getattr(self.view, name) is not part for name, part in parts.items()):
            view = LatentCrossAttention(
                inner.query.in_features,
                inner.key.in_features,
                num_heads=inner.num_heads,
                qk_channels=inner.query.out_features,
                v_channels=inner.value.out_features,
                output_channels=output.out_features,
                eps=inner.layernorm2.eps,
                device="meta",
            )
            for name, part in parts.items():
                setattr(view, name, part)
            self.view = view
        return self.view
