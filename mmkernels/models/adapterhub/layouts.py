"""Where adapters sit: in each layer the place where what a sub-layer gives meets its residual.

`LAYOUTS` tells the kinds of layers by the names of their parts. A layer (or the one module in it that adds the residual) gets
a subclass with another `forward`, which calls the same parts and has a `Place` where the addition was. Places are named in
files as in the library `adapters`. Models of transformers 4 and 5 are known.
"""

import inspect
import re

import torch
from torch import nn
from torch.nn import functional as F

from ... import _library
from ...modules import composition
from ...modules.adapter import AdapterBank
from ...modules.backend import WithBackend, gelu, gelu_form, linear
from ...modules.composition import Place

# --- What is replaced in a model ---------------------------------------------------------------------------------------------


class PostNorm:
    """`*Output` and `*SelfOutput` of BERT and its like: dense, dropout, LayerNorm(h + r)."""

    def forward(self, hidden_states, input_tensor):
        return self.adapter_place(self.dropout(self.dense(hidden_states)), input_tensor, self.LayerNorm)


class Fast(WithBackend):
    """Linear layers and GELUs, by the ops that were measured to be faster where adapters are active and `backend` is "auto".

    Without adapters a model computes the same bits as before.
    """

    def forward(self, input):
        if self.active.setup is None or self.backend != "auto":
            return super().forward(input)
        return self.fast(input)


class FastLinear(Fast):
    def fast(self, input):
        return linear(input, self.weight, self.bias, self.backend)


class FastGelu(Fast):
    def fast(self, input):
        return gelu(input, gelu_form(self), self.backend)


class T5Layer:
    """Sub-layers of T5: r + dropout(inner(RMSNorm(r)))."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        normed = self.layer_norm(hidden_states)
        if hasattr(self, "DenseReluDense"):
            return self.adapter_place(self.dropout(self.DenseReluDense(normed)), hidden_states)
        inner = self.SelfAttention if hasattr(self, "SelfAttention") else self.EncDecAttention
        out, *rest = inner(normed, mask=attention_mask, **kwargs)
        return (self.adapter_place(self.dropout(out), hidden_states), *rest)


class Layer:
    """Whole layers: attention, cross-attention where a decoder has it, and the feed-forward layer, each with its residual.

    A kind of layer says how its parts are called: `attend` and `cross` give (output, attention weights...), `feed` the output.
    `norms` are the names of their LayerNorms: in front, LN(r) -> inner -> r + h, or `norms_behind`, LN(r + h).
    """

    norms = ()
    norms_behind = clamps = False

    def forward(self, hidden_states, *args, **kwargs):
        _, *names = self.argument_names
        kwargs.update(zip(names, args, strict=False))
        behind = self.norms_behind
        attention_norm, cross_norm, output_norm = (getattr(self, name, None) for name in self.norms)
        x = hidden_states if behind else attention_norm(hidden_states)
        h, *weights = self.attend(x, kwargs)
        hidden_states = self.attention_place(h, hidden_states, attention_norm if behind else None)
        if kwargs.get("encoder_hidden_states") is not None:
            x = hidden_states if behind else cross_norm(hidden_states)
            h, *cross_weights = self.cross(x, kwargs)
            hidden_states = self.cross_place(h, hidden_states, cross_norm if behind else None)
            weights += cross_weights
        x = hidden_states if behind else output_norm(hidden_states)
        hidden_states = self.output_place(self.feed(x), hidden_states, output_norm if behind else None)
        if self.clamps and hidden_states.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        if "output_attentions" not in self.argument_names:  # transformers 5, and ViT before
            return hidden_states
        return self.results(hidden_states, weights if kwargs.get("output_attentions") else [])

    def results(self, hidden_states, weights):
        return (hidden_states, *weights)


def _without(kwargs, *names):
    return {name: value for name, value in kwargs.items() if name not in names}


class ViTLayer(Layer):
    """ViT, and BEiT, which scales what the sub-layers give and drops whole ones of them."""

    norms = ("layernorm_before", "", "layernorm_after")

    def attend(self, x, kwargs):
        out = self.attention(x, **kwargs)
        out, *weights = out if isinstance(out, tuple) else (out,)
        return self._scaled(self.dropout(out) if hasattr(self, "mlp") else out, "lambda_1"), *weights

    def feed(self, x):
        if hasattr(self, "mlp"):  # transformers 5
            out = self.dropout(self.mlp(x))
        else:
            out = self.output.dropout(self.output.dense(self.intermediate(x)))
        return self._scaled(out, "lambda_2")

    def _scaled(self, out, name):
        scale = getattr(self, name, None)
        out = out if scale is None else scale * out
        return self.drop_path(out) if hasattr(self, "drop_path") else out


class BartLayer(Layer):
    """BART and its like; norms are behind but where the stack ends with a norm of its own, as in mBART."""

    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    clamps = True
    CROSS = ("encoder_hidden_states", "encoder_attention_mask", "cross_attn_layer_head_mask", "use_cache")

    def attend(self, x, kwargs):
        out, *weights = self.self_attn(hidden_states=x, **_without(kwargs, *self.CROSS))
        return F.dropout(out, self.dropout, self.training), *weights[:1]

    def cross(self, x, kwargs):
        own = _without(kwargs, *self.CROSS, "attention_mask", "layer_head_mask")
        if "layer_head_mask" in self.argument_names:
            own["layer_head_mask"] = kwargs.get("cross_attn_layer_head_mask")
        states, mask = kwargs["encoder_hidden_states"], kwargs.get("encoder_attention_mask")
        out, *weights = self.encoder_attn(hidden_states=x, key_value_states=states, attention_mask=mask, **own)
        return F.dropout(out, self.dropout, self.training), *weights[:1]

    def feed(self, x):
        inner = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return F.dropout(self.fc2(inner), self.dropout, self.training)


class ClipLayer(Layer):
    """Both towers of CLIP."""

    norms = ("layer_norm1", "", "layer_norm2")

    def attend(self, x, kwargs):
        return self.self_attn(hidden_states=x, **kwargs)

    def feed(self, x):
        return self.mlp(x)


class DistilBertLayer(Layer):
    norms = ("sa_layer_norm", "", "output_layer_norm")
    norms_behind = True

    def attend(self, x, kwargs):
        if "attn_mask" not in kwargs:  # transformers 5
            return self.attention(x, **kwargs)
        own = _without(kwargs, "attn_mask")
        return self.attention(query=x, key=x, value=x, mask=kwargs["attn_mask"], **own)

    def feed(self, x):
        return self.ffn(x)

    def results(self, hidden_states, weights):
        return (*weights, hidden_states)


class GPT2Layer(Layer):
    """GPT-2; what it crosses with has no adapters, as in the library."""

    norms = ("ln_1", "ln_cross_attn", "ln_2")

    def attend(self, x, kwargs):
        return self.attn(x, **_without(kwargs, "encoder_hidden_states", "encoder_attention_mask"))

    def cross(self, x, kwargs):
        return self.crossattention(x, **_without(kwargs, "use_cache", "cache_position", "position_ids"))

    def cross_place(self, hidden, residual, norm):
        return residual + hidden

    def feed(self, x):
        return self.mlp(x)


class GPTJLayer(Layer):
    """GPT-J, whose attention and feed-forward layer read the same norm side by side."""

    norms = ("ln_1", "", "ln_1")

    def forward(self, hidden_states, *args, **kwargs):
        if self.attention_place.active.setup is None:  # the model adds the three in another order
            return super(Layer, self).forward(hidden_states, *args, **kwargs)
        _, *names = self.argument_names
        kwargs.update(zip(names, args, strict=False))
        x = self.ln_1(hidden_states)
        h, *weights = self.attn(hidden_states=x, **kwargs)
        hidden_states = self.attention_place(h, hidden_states)
        h = self.mlp(x)
        if h.shape[0] != hidden_states.shape[0]:  # a Parallel has repeated them
            h = h.repeat(hidden_states.shape[0] // h.shape[0], 1, 1)
        return self.results(self.output_place(h, hidden_states), weights)


class AlbertLayer(Layer):
    """ALBERT, whose attention ends with its residual and norm: they are made anew from what its dropout gave."""

    norms = ("full_layer_layer_norm", "", "full_layer_layer_norm")

    def forward(self, hidden_states, *args, **kwargs):
        place, norm = self.attention_place, self.attention.LayerNorm
        if place.active.setup is None:
            return super(Layer, self).forward(hidden_states, *args, **kwargs)
        kept = []
        keep = self.attention.output_dropout.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            out = self.attention(hidden_states, *args, **kwargs)
        finally:
            keep.remove()
        pair = (hidden_states, kept[0]) if place.active.compat == "adapters" else (kept[0], hidden_states)  # it exchanges them
        hidden_states = place(*pair, norm)
        pieces = hidden_states.split(self.chunk_size_feed_forward or hidden_states.shape[1], 1)
        h = torch.cat([self.ff_chunk(piece) for piece in pieces], 1)
        return (self.output_place(h, hidden_states, self.full_layer_layer_norm), *out[1:])


class LlamaLayer(Layer):
    """Llama and its like: Mistral, Qwen2, ..."""

    norms = ("input_layernorm", "", "post_attention_layernorm")

    def attend(self, x, kwargs):
        return self.self_attn(hidden_states=x, **kwargs)

    def feed(self, x):
        return self.mlp(x)


_VIT = {"attention", "layernorm_before", "layernorm_after"}
_PLACES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
LAYOUTS = [  # what a layer has, other parts that it may have, its kind, location of an adapter -> where it is in files
    (_VIT | {"intermediate", "output"}, set(), ViTLayer, {**_PLACES, "output_adapter": "output.output_adapters"}),
    (_VIT | {"mlp", "dropout"}, set(), ViTLayer, {**_PLACES, "output_adapter": "output.output_adapters"}),  # transformers 5
    (_VIT | {"intermediate", "output", "drop_path", "lambda_1"}, set(), ViTLayer, _PLACES),
    ({"self_attn", "layer_norm1", "mlp", "layer_norm2"}, set(), ClipLayer, _PLACES),
    ({"attention", "sa_layer_norm", "ffn", "output_layer_norm"}, set(), DistilBertLayer, _PLACES),
    ({"ln_1", "attn", "ln_2", "mlp"}, {"crossattention", "ln_cross_attn"}, GPT2Layer, _PLACES),
    ({"ln_1", "attn", "mlp"}, set(), GPTJLayer, _PLACES),
    (
        {"attention", "ffn", "ffn_output", "dropout", "full_layer_layer_norm"},
        {"activation"},
        AlbertLayer,
        {**_PLACES, "mh_adapter": "attention.attention_adapters"},
    ),
    ({"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"}, set(), LlamaLayer, _PLACES),
    (
        {"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"},
        {"activation_fn", "encoder_attn", "encoder_attn_layer_norm"},
        BartLayer,
        {**_PLACES, "cross_adapter": "cross_attention_adapters"},
    ),
]
NAMES = "BERT, ALBERT, ViT, BEiT, T5, BART, CLIP, DistilBERT, GPT-2, GPT-J and Llama"
_T5_INNER = {"SelfAttention": "mh_adapter", "EncDecAttention": "cross_adapter", "DenseReluDense": "output_adapter"}


# --- Replacing it ------------------------------------------------------------------------------------------------------------

_ADAPTED = {}


def _replace_forward(module, style):
    """Makes `module` an instance of a subclass of its class, of the same name, with the forward of `style`."""
    base = type(module)
    if (base, style) not in _ADAPTED:
        names = tuple(inspect.signature(base.forward).parameters)[1:]
        methods = {"__module__": base.__module__, "__reduce_ex__": _reduce, "argument_names": names}
        _ADAPTED[base, style] = type(base.__name__, (style, base), methods)
    module.__class__ = _ADAPTED[base, style]


def _reduce(module, protocol):
    style, base = type(module).__bases__
    return _rebuild, (base, style), module.__dict__


def _rebuild(base, style):
    module = base.__new__(base)
    nn.Module.__init__(module)
    _replace_forward(module, style)
    return module


class AdapterLayer(nn.Module):
    """The adapters of one place, where the model has no module of its own to hold them."""

    def __init__(self, backend):
        super().__init__()
        _hold(self, backend)


def _hold(owner, backend):
    owner.adapters = AdapterBank(backend=backend)
    owner.adapter_fusion_layer = nn.ModuleDict()


def patch(base: nn.Module, active, backend) -> dict:
    """Puts places into a model: name in files, without the model's prefix -> (location, Place).

    Layers are numbered through the whole model: decoders after encoders, images after texts. GELUs and, where
    the library's product is slow, linear layers become `Fast`.
    """
    places, layers, starts, count = {}, {}, {}, 0

    def place(owner, name, location, norm):
        places[name] = location, Place(owner, number, active, norm.weight.shape[0])
        return places[name][1]

    for name, module in list(base.named_modules()):
        found = re.match(r"(.*?\b(?:layer|layers|albert_layers|block|h))\.(\d+)(?:\.|$)", name)
        if not found:
            continue
        stack = found[1]
        if stack not in starts:
            starts[stack] = count
            count += len(base.get_submodule(stack))
        number = starts[stack] + int(found[2])
        children = {child for child, _ in module.named_children()}
        if {"dense", "LayerNorm", "dropout"} <= children and name.endswith("output"):
            _hold(module, backend)
            location = "mh_adapter" if re.search(r"attention\.output$", name) else "output_adapter"
            module.adapter_place = place(module, name, location, module.LayerNorm)
            _replace_forward(module, PostNorm)
        elif {"layer_norm", "dropout"} < children and children & set(_T5_INNER):
            (inner,) = children & set(_T5_INNER)
            _hold(module, backend)
            module.adapter_place = place(module, name, _T5_INNER[inner], module.layer_norm)
            _replace_forward(module, T5Layer)
        else:
            layout = next((row for row in LAYOUTS if _fits(module, children, *row[:2])), None)
            if layout is None:
                continue
            _, _, style, where = layout
            if hasattr(module, "layernorm_before"):  # in files as in transformers 4
                name = f"encoder.layer.{number}"
            for norm, (location, path) in zip([style.norms[0], style.norms[2], style.norms[1]], where.items(), strict=False):
                if not hasattr(module, norm):
                    continue
                holder, _, attribute = path.rpartition(".")
                owner = AdapterLayer(backend)
                setattr(getattr(module, holder, module), attribute, owner)
                kind = {"mh_adapter": "attention", "output_adapter": "output", "cross_adapter": "cross"}[location]
                setattr(module, f"{kind}_place", place(owner, f"{name}.{path}", location, getattr(module, norm)))
            if style is BartLayer:
                module.norms_behind = not hasattr(base.get_submodule(stack.rpartition(".")[0]), "layer_norm")
            _replace_forward(module, style)
        layers[base.get_submodule(f"{stack}.{found[2]}")] = None
    for module in list(base.modules()) if places else ():
        style = FastGelu if gelu_form(module) else FastLinear if _library.SLOW_MKL and type(module) is nn.Linear else None
        if style is not None:
            module.active, module.backend = active, backend
            _replace_forward(module, style)
    for layer in layers:
        layer.register_forward_pre_hook(_RepeatLike(active, layer), with_kwargs=True)
    return places


def _fits(module, children, parts, others):
    return all(hasattr(module, part) for part in parts) and children <= parts | others


def patch_embeddings(model, base, active) -> str:
    """Invertible adapters behind the embeddings, and backwards in front of those of the output; their name, "" without."""
    for owner, name in (
        ("encoder", "encoder.layernorm_embedding"),  # BART
        ("encoder", "encoder.block.0"),  # T5: after the embeddings' dropout
        ("text_model", "text_model.embeddings"),  # CLIP
        ("", "embeddings"),  # BERT, DistilBERT
        ("", "drop"),  # GPT-2, GPT-J
        ("", "embed_tokens"),  # Llama
    ):
        try:
            module, holder = base.get_submodule(name), base.get_submodule(owner)
        except AttributeError:
            continue
        embeddings = (m for n, m in holder.named_modules() if isinstance(m, nn.Embedding) and "position" not in n)
        embedding = next(embeddings, None)
        if embedding is None:  # images
            continue
        holder.invertible_adapters = invertible = nn.ModuleDict()
        invertible.channels = embedding.embedding_dim
        if name == "encoder.block.0":
            module.register_forward_pre_hook(_Invert(active, invertible))
        else:
            module.register_forward_hook(_Invert(active, invertible))
        last = model.get_output_embeddings()
        # behind a decoder is not behind the encoder's embeddings; the library has it in heads of its own alone
        if last is not None and not owner and active.compat is None:
            last.register_forward_pre_hook(_Invert(active, invertible, inverse=True))
        return f"{owner}.invertible_adapters".lstrip(".")
    return ""


# --- Hooks: objects, not closures, so that a copy of the model gets copies of what they use --------------------------------


def patch_calls(active, model, modules, invertible, always_ahead) -> None:
    """A model, and parts of it that may be called alone, from outside in: the outermost call is a forward pass.

    `invertible`: the adapters behind the embeddings, or None. `always_ahead`: a Parallel cannot repeat rows inside of the
    model, which asks its inputs again later on (CLIP for the places of its tokens).
    """
    for module in modules:
        module.register_forward_pre_hook(_Begin(active, invertible, always_ahead), with_kwargs=True)
        module.register_forward_hook(_End(active), always_call=True)
    if hasattr(model, "generate"):
        model.generate = _Generate(active, model)


# Arguments of models whose first axis is that of the batch.
_ROWS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features", "input_values", "decoder_input_ids")


def _tiled(args, kwargs, block):
    """What a model is given, with its rows once for each child of a Parallel."""
    count, given = len(block.children), [*args, *(kwargs.get(name) for name in _ROWS)]
    batches = {value.shape[0] for value in given if isinstance(value, torch.Tensor) and value.dim() > 1}
    if not batches:
        raise ValueError(f"{block} has nothing to repeat: the model is given none of {', '.join(_ROWS)}")

    def tiled(name, value):
        if isinstance(value, (list, tuple)) and name == "task_ids":
            return list(value) * count
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] not in batches or "head_mask" in name:
            return value
        return value.repeat((count,) + (1,) * (value.dim() - 1))

    return tuple(tiled("", value) for value in args), {name: tiled(name, value) for name, value in kwargs.items()}


def _parallel(setup):
    """The Parallel of a composition, which is the whole of it or in its Stack; or None."""
    blocks = [setup, *(setup.children if isinstance(setup, composition.Stack) else ())]
    return next((block for block in blocks if isinstance(block, composition.Parallel)), None)


class _Begin:
    """A forward pass begins, with the tasks of its rows.

    A Parallel repeats the batch before the model begins where its adapters stand behind the embeddings already: masks,
    caches and positions, which the model makes of its inputs, are right then.
    """

    def __init__(self, active, invertible, always_ahead):
        self.active, self.invertible, self.always_ahead = active, invertible, always_ahead

    def __call__(self, module, args, kwargs):
        kwargs = dict(kwargs)
        tasks, block = kwargs.pop("task_ids", None), _parallel(self.active.setup)
        now = self.active.enter(tasks)
        if block is None or now.depth > 1:
            return args, kwargs
        behind = self.invertible is not None and any(name in self.invertible for name in block.names())
        now.ahead = self.always_ahead or (behind and self.active.compat is None)
        if now.ahead:
            args, kwargs = _tiled(args, {**kwargs, "task_ids": tasks}, block)
            now.task_ids = kwargs.pop("task_ids")
        return args, kwargs


class _End:
    def __init__(self, active):
        self.active = active

    def __call__(self, module, args, output):
        self.active.leave()


class _Generate:
    """`generate` with `task_ids`, a task for each row of the prompts, and with a Parallel: the rows of its first child, then
    those of the next, each prompt once for every child."""

    def __init__(self, active, model):
        self.active, self.model = active, model

    def __call__(self, *args, task_ids=None, **kwargs):
        block = _parallel(self.active.setup)
        if block is not None:
            args, kwargs = _tiled(args, {**kwargs, "task_ids": task_ids}, block)
            task_ids = kwargs.pop("task_ids")
        self.active.enter(task_ids, beside=True, ahead=block is not None)
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.active.leave()


class _Invert:
    """Invertible adapters, as a pre-hook on the first argument, or as a hook on the output."""

    def __init__(self, active, adapters, inverse=False):
        self.active, self.adapters, self.inverse = active, adapters, inverse

    def __call__(self, module, args, *output):
        if output:
            return composition.invert(self.active, self.adapters, output[0], self.inverse)
        return (composition.invert(self.active, self.adapters, args[0], self.inverse), *args[1:])


class _RepeatLike:
    """Before a layer: what has the rows of the batch gets those of the hidden states, which a Parallel has repeated."""

    def __init__(self, active, layer):
        names = list(getattr(layer, "argument_names", None) or inspect.signature(layer.forward).parameters)
        self.active = active
        self.crossed = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else len(names)

    def __call__(self, module, args, kwargs):
        batch = self.active.running.batch
        if batch is None:
            return None
        crossed = args[self.crossed : self.crossed + 1]
        states = [*args[:1], kwargs.get("hidden_states"), *crossed, kwargs.get("encoder_hidden_states")]
        rows = max(t.shape[0] for t in states if isinstance(t, torch.Tensor))
        if rows == batch:
            return None

        def repeated(value):
            if isinstance(value, tuple):  # sines and cosines of Llama's positions
                return tuple(map(repeated, value))
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch:
                return value.repeat((rows // batch,) + (1,) * (value.dim() - 1))
            return value

        return tuple(map(repeated, args)), {name: repeated(value) for name, value in kwargs.items()}
