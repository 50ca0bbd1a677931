"""AdapterHub: adapters, compositions of them and AdapterFusion in the user's own Hugging Face model, and their folders.

    model = BertForMaskedLM.from_pretrained(...)
    hub = AdapterHub(model)
    hub.add_adapter("en", "seq_bn_inv")
    hub.train_adapter("en")              # everything else is frozen
    loss = model(**batch).loss           # the model itself is what runs, trains, compiles and saves
    hub.save_adapter("en", folder)       # a folder of the library `adapters`, which reads it, as this reads that library's
    hub.set_active(Stack("en", "ner"))

Models of the layouts of BERT (RoBERTa, XLM-R, ELECTRA, DeBERTa, ...), ViT and T5 are known, of transformers 4 and 5. In each
layer the one place where a sub-layer's output meets its residual is replaced, by giving that module (or layer) a subclass with
another `forward`: `PostNorm`, `ViTLayer` and `T5Layer` below are all of it. Parameters are named as in the library.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..modules import composition
from ..modules.adapter import (
    ACTIVATIONS,
    PRESETS,
    AdapterBank,
    AdapterConfig,
    AdapterFusion,
    FusionConfig,
    InvertibleAdapter,
    make_adapter,
    shared_phm_parameters,
)
from ..modules.backend import check_backend, set_backend
from ..modules.composition import Activation, Block, Fuse, Place
from .official import read_pickle
from .registry import InputError, read_json, read_tensors, require, write_files

__all__ = ["PRESETS", "AdapterConfig", "AdapterHub", "FusionConfig"]

FORMAT = "adapters.1.3.0"  # the version in the files: whose layout they have
FILES = {  # kind -> (config, pickled weights, safetensors)
    "adapter": ("adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"),
    "head": ("head_config.json", "pytorch_model_head.bin", "model_head.safetensors"),
    "fusion": ("adapter_fusion_config.json", "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors"),
}
SETUP = "adapter_setup.json"
# Names in files of versions before 2, and of activations in configs without a version.
LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


# --- What is replaced in a model ---------------------------------------------------------------------------------------------


class PostNorm:
    """`*Output` and `*SelfOutput` of BERT and its like: dense, dropout, LayerNorm(h + r)."""

    def forward(self, hidden_states, input_tensor):
        return self.adapter_place(self.dropout(self.dense(hidden_states)), input_tensor, self.LayerNorm)


class ViTLayer:
    """Pre-norm layers of ViT: r + attention(LN(r)), then r + MLP(LN(r))."""

    def forward(self, hidden_states, *args, **kwargs):
        out = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        out = self._dropped(out[0] if isinstance(out, tuple) else out)
        hidden_states = self.attention_place(out, hidden_states)
        out = self.layernorm_after(hidden_states)
        if hasattr(self, "mlp"):  # transformers 5
            return self.output_place(self.dropout(self.mlp(out)), hidden_states)
        out = self.output.dropout(self.output.dense(self.intermediate(out)))
        return self.output_place(out, hidden_states)

    def _dropped(self, out):
        return self.dropout(out) if hasattr(self, "mlp") else out


class T5Layer:
    """Sub-layers of T5: r + dropout(inner(RMSNorm(r)))."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        normed = self.layer_norm(hidden_states)
        if hasattr(self, "DenseReluDense"):
            return self.adapter_place(self.dropout(self.DenseReluDense(normed)), hidden_states)
        inner = self.SelfAttention if hasattr(self, "SelfAttention") else self.EncDecAttention
        out, *rest = inner(normed, mask=attention_mask, **kwargs)
        return (self.adapter_place(self.dropout(out), hidden_states), *rest)


_ADAPTED = {}


def _replace_forward(module, style):
    """Makes `module` an instance of a subclass of its class, of the same name, with the forward of `style`."""
    base = type(module)
    if (base, style) not in _ADAPTED:
        methods = {"__module__": base.__module__, "__reduce_ex__": _reduce}
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


# --- Heads -------------------------------------------------------------------------------------------------------------------


class PredictionHead(nn.Sequential):
    """A head of the library's `*AdapterModel`s, with its names: dropout and linear layers with activations between them.

    Args:
        config: head_config.json's "config": head_type "classification", "multilabel_classification", "tagging",
            "question_answering", "multiple_choice", "masked_lm" or "causal_lm"; num_labels or num_choices, layers,
            activation_function, use_pooler (classification), vocab_size (language models).
        channels, dropout, eps: of the model.
    """

    def __init__(self, config: dict, channels: int, dropout=0.0, eps=1e-12, *, device=None, dtype=None):
        factory = {"device": device, "dtype": dtype}
        config = {**HEADS[config["head_type"]], "label2id": None, **config}
        activation = config["activation_function"]
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation_function is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        if config.get("dropout_prob") is not None:
            dropout = config["dropout_prob"]
        layers = []
        if "vocab_size" in config:
            width = config.setdefault("embedding_size", channels)
            for number in range(config["layers"] - 1):
                layers.append(nn.Linear(channels if number == 0 else width, width, **factory))
                if activation is not None:
                    layers.append(_Activation(activation))
                if config["layer_norm"]:
                    layers.append(nn.LayerNorm(width, eps=eps, **factory))
            layers.append(nn.Linear(width, config["vocab_size"], bias=config["bias"], **factory))
        else:
            outputs = 1 if "num_choices" in config else config["num_labels"]
            for number in range(config["layers"]):
                layers.append(nn.Dropout(dropout))
                if number < config["layers"] - 1:
                    layers += [nn.Linear(channels, channels, **factory)]
                    layers += [] if activation is None else [_Activation(activation)]
                else:
                    layers.append(nn.Linear(channels, outputs, bias=config.get("bias", True), **factory))
        super().__init__(*layers)
        self.config = config

    def logits(self, hidden, pooled=None, invert=None):
        """Of the last hidden state (B, T, C): (B, labels), (B / choices, choices), or (B, T, labels or vocabulary)."""
        kind = self.config["head_type"]
        if "vocab_size" in self.config:
            *before, last = self
            for layer in before:
                hidden = layer(hidden)
            return last(hidden if invert is None else invert(hidden))
        if kind in ("tagging", "question_answering"):
            return self(hidden)
        if self.config["use_pooler"] and pooled is None:
            raise ValueError("the head has use_pooler; the model gave no pooler_output")
        logits = self(pooled if self.config["use_pooler"] else hidden[:, 0])
        return logits.view(-1, self.config["num_choices"]) if kind == "multiple_choice" else logits

    def loss(self, logits, labels):
        """The usual one of the kind: cross-entropy, squared error (one label), or binary cross-entropy (several at once).

        labels: (B,), (B, labels) for multilabel, (B, T) with -100 for no label, or (B, 2) starts and ends for answers.
        """
        kind = self.config["head_type"]
        if kind == "multilabel_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if kind == "question_answering":
            return sum(F.cross_entropy(logits[..., i], labels[:, i]) for i in (0, 1)) / 2
        if kind == "classification" and self.config["num_labels"] == 1:
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if self.config.get("shift_labels"):
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class _Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name][1](x)


_CLASSIFIER = {"num_labels": 2, "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}
_CLASSIFIER |= {"dropout_prob": None}
_TAGGER = {"num_labels": 2, "layers": 1, "activation_function": "tanh", "dropout_prob": None}
_LM = {"vocab_size": None, "layers": 1, "activation_function": None, "layer_norm": False, "bias": False, "shift_labels": True}
HEADS = {  # head_type -> its options
    "classification": _CLASSIFIER,
    "multilabel_classification": _CLASSIFIER,
    "multiple_choice": {
        "num_choices": 2,
        "layers": 2,
        "activation_function": "tanh",
        "use_pooler": False,
        "dropout_prob": None,
    },
    "tagging": _TAGGER,
    "question_answering": _TAGGER,
    "causal_lm": {**_LM, "dropout_prob": None},
    "masked_lm": {**_LM, "layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True, "shift_labels": False},
}


# --- The hub -----------------------------------------------------------------------------------------------------------------


class AdapterHub:
    """Adapters in a Hugging Face model, which stays the user's own object and is what runs.

    `model(..., task_ids=ids)` gives the task of each row to a `MultiTask`. Heads of `add_head` belong to `hub(...)`.

    Args:
        model: a model of transformers of the layout of BERT, ViT or T5, with or without a head.
        compat: None, or "adapters" to compute compositions as the library of that name does, see `composition.Activation`.
        backend: of all adapters, a backend of `ops.adapter` or "eager"; `modules.set_backend` changes it later.

    Raises InputError for models of another layout, and those that have adapters already.
    """

    def __init__(self, model: nn.Module, *, compat=None, backend="auto"):
        check_backend(backend)
        if compat not in (None, "adapters"):
            raise ValueError(f"compat is {compat!r}; allowed are None and 'adapters'")
        if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "base_model"):
            raise InputError(f"model is a {type(model).__name__}; it must be a model of transformers")
        self.model, self.base, self.backend = model, model.base_model, backend
        if hasattr(self.base, "shared_parameters"):
            raise InputError("model has adapters already; a model has one AdapterHub")
        self.active = Activation(compat=compat)
        self.prefix = "" if self.base is model else f"{model.base_model_prefix}."
        self.configs, self.fusions, self.active_head = {}, {}, None  # name -> AdapterConfig; name -> (FusionConfig, names)
        self.channels = model.config.hidden_size
        self.places = {}  # name in files, without the model's prefix -> (location, Place)
        layers, self.inverted_name = _patch(self)
        if not self.places:
            raise InputError(f"model is a {type(model).__name__}; known are the layouts of BERT, ViT and T5")
        self.base.shared_parameters = nn.ModuleDict()
        if self.inverted_name:
            _patch_embeddings(self)
        for layer in layers:
            layer.register_forward_pre_hook(_RepeatLike(self.active), with_kwargs=True)
        for module in {id(model): model, id(self.base): self.base}.values():
            module.register_forward_pre_hook(_Begin(self.active, module is model), with_kwargs=True)

    # --- Adding and taking away

    def add_adapter(self, name: str, config="seq_bn", *, set_active=False, **changes) -> None:
        """A new adapter at every place that its config names.

        Args:
            name: without dots.
            config: the name of a preset, a dict of options, or an AdapterConfig; `changes` are options that differ from it.

        Raises ValueError for a name that is taken and options that are unknown.
        """
        config = AdapterConfig.of(config, **changes)
        if name in self.configs:
            raise ValueError(f"name is {name!r}, which is taken; delete_adapter frees it")
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"name is {name!r}; it must be a word without dots that nn.ModuleDict does not use itself")
        if config.inv_adapter and self._invertible() is None:
            raise ValueError(f"inv_adapter is {config.inv_adapter!r}; models of the layout of ViT have none")
        factory = self._factory()
        shared = shared_phm_parameters(config, self.channels, **factory) if config.phm_layer else None
        made = {}
        for key, (location, place) in self.places.items():
            if getattr(config, location) and place.layer not in config.leave_out:
                made[key] = make_adapter(
                    self.channels, config, layer=place.layer, shared=shared, backend=self.backend, **factory
                ).train(self.model.training)
        invertible = None
        if config.inv_adapter:
            width = getattr(self.model.config, "embedding_size", None) or self.channels
            options = {"activation": config.non_linearity, "reduction_factor": config.inv_adapter_reduction_factor or 2}
            invertible = InvertibleAdapter(width, config.inv_adapter, backend=self.backend, **options, **factory)
        for key, adapter in made.items():
            self.places[key][1].owner.adapters[name] = adapter
        if shared:
            self.base.shared_parameters[name] = shared
        if invertible is not None:
            self._invertible()[name] = invertible.train(self.model.training)
        self.configs[name] = config
        if set_active:
            self.set_active(name)

    def delete_adapter(self, name: str) -> None:
        """Takes an adapter out of the model; what is active must not have it.

        Raises ValueError for an unknown one, for one that is active, and for one that a fusion has.
        """
        self._known([name])
        if self.active.setup is not None and name in self.active.setup.names():
            raise ValueError(f"adapter {name!r} is active in {self.active.setup}; activate something else first")
        fusions = [fusion for fusion, (_, names) in self.fusions.items() if name in names]
        if fusions:
            raise ValueError(f"adapter {name!r} is in the fusion {fusions[0]!r}; delete that first")
        for _, place in self.places.values():
            if name in place.owner.adapters:
                del place.owner.adapters[name]
        for group in (self.base.shared_parameters, self._invertible()):
            if group is not None and name in group:
                del group[name]
        del self.configs[name]

    def add_adapter_fusion(self, names: list, config="dynamic", *, name=None, set_active=False) -> None:
        """A new fusion of adapters, where all of them can be; `name` is theirs with commas between by default.

        config: "dynamic", "static", a dict of options or a FusionConfig.
        """
        config, names = FusionConfig.of(config), list(names)
        self._known(names)
        name = name or ",".join(names)
        if name in self.fusions:
            raise ValueError(f"name is {name!r}, which is taken; delete_adapter_fusion frees it")
        dropout = getattr(self.model.config, "attention_probs_dropout_prob", 0.0)
        for location, place in self.places.values():
            if all(getattr(self.configs[n], location) for n in names):
                fusion = AdapterFusion(self.channels, config, dropout=dropout, backend=self.backend, **self._factory())
                fusion.always_falls = self.active.compat == "adapters"
                place.owner.adapter_fusion_layer[name] = fusion.train(self.model.training)
        self.fusions[name] = config, names
        if set_active:
            self.set_active(Fuse(*names, name=name))

    def delete_adapter_fusion(self, name: str) -> None:
        """Takes a fusion out of the model."""
        self._known_fusion(name)
        for _, place in self.places.values():
            if name in place.owner.adapter_fusion_layer:
                del place.owner.adapter_fusion_layer[name]
        del self.fusions[name]

    def add_head(self, name: str, head_type="classification", **options) -> PredictionHead:
        """A head over the last hidden state, `hub(...)` computes it; see `PredictionHead`.

        Raises ValueError for an unknown kind or option, and InputError on a model that has a head of its own.
        """
        if self.base is not self.model:
            raise InputError(f"model is a {type(self.model).__name__}, which has a head; add_head needs a model without one")
        if head_type not in HEADS:
            raise ValueError(f"head_type is {head_type!r}; allowed are {', '.join(map(repr, HEADS))}")
        unknown = set(options) - set(HEADS[head_type]) - {"label2id", "embedding_size"}
        if unknown:
            raise ValueError(f"a head of type {head_type!r} has no option {min(unknown)!r}")
        config = {"head_type": head_type, **options}
        if "vocab_size" in HEADS[head_type] and not config.get("vocab_size"):
            config["vocab_size"] = self.model.config.vocab_size
        sizes = self.model.config
        dropout = getattr(sizes, "classifier_dropout", None)
        dropout = getattr(sizes, "hidden_dropout_prob", 0.0) if dropout is None else dropout
        head = PredictionHead(config, self.channels, dropout, getattr(sizes, "layer_norm_eps", 1e-12), **self._factory())
        std = getattr(sizes, "initializer_range", 0.02)
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if not hasattr(self.model, "heads"):
            self.model.heads = nn.ModuleDict()
        self.model.heads[name] = head.train(self.model.training)
        self.active_head = name
        return head

    def delete_head(self, name: str) -> None:
        """Takes a head away."""
        self._known_head(name)
        del self.model.heads[name]
        if self.active_head == name:
            self.active_head = None

    # --- Running and training

    def set_active(self, setup, *, skip_layers=()) -> None:
        """What runs from now on: a name, a composition, or None for the plain model.

        skip_layers: numbers of layers whose adapters are passed over (AdapterDrop, Rücklé et al. 2021). For robust training
            give `range(n)` with another n for each batch.

        Raises ValueError for unknown adapters and fusions.
        """
        setup = composition.parse(setup)
        if setup is not None:
            self._known(setup.names())
            for fuse in _fuses(setup):
                self._known_fusion(fuse.name)
        self.active.setup, self.active.skip_layers = setup, frozenset(skip_layers or ())
        if setup is not None:
            last = setup.paths()[-1][-1]
            if last in getattr(self.model, "heads", {}):
                self.active_head = last

    def train_adapter(self, setup, *, train_embeddings=False) -> None:
        """Activates a setup and freezes everything but its adapters, and heads; `model.train()` included."""
        self.set_active(setup)
        self._freeze(train_embeddings)
        for name in self.active.setup.names():
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(True)
            if not self.configs[name].learn_phm and name in self.base.shared_parameters:
                for rule, parameter in self.base.shared_parameters[name].items():
                    parameter.requires_grad_(not rule.startswith("phm_rule"))

    def train_adapter_fusion(self, setup, *, unfreeze_adapters=False) -> None:
        """Activates a setup and freezes everything but its fusions (and adapters, if asked for), and heads."""
        self.set_active(setup)
        fuses = _fuses(self.active.setup)
        if not fuses:
            raise ValueError(f"setup is {self.active.setup}; it must have a Fuse")
        self._freeze(False)
        for fuse in fuses:
            for _, place in self.places.values():
                if fuse.name in place.owner.adapter_fusion_layer:
                    place.owner.adapter_fusion_layer[fuse.name].requires_grad_(True)
        if unfreeze_adapters:
            for name in self.active.setup.names():
                for parameter in self.parameters_of(name):
                    parameter.requires_grad_(True)

    def fusion_regularization(self) -> torch.Tensor:
        """0.01 times the sum of |W_v - I|² over the active fusions' values that train: to be added to the loss."""
        names = {fuse.name for fuse in _fuses(self.active.setup)} if self.active.setup is not None else ()
        layers = (place.owner.adapter_fusion_layer for _, place in self.places.values())
        terms = [layer[name].regularization() for layer in layers for name in names if name in layer]
        return sum(terms) if terms else next(self.model.parameters()).new_zeros(())

    def parameters_of(self, name: str) -> list:
        """All parameters of an adapter."""
        self._known([name])
        return list(dict.fromkeys(self._tensors(name).values()))

    def num_parameters(self, name: str) -> int:
        return sum(parameter.numel() for parameter in self.parameters_of(name))

    def __call__(self, *args, labels=None, head=None, **inputs):
        """The model's output; with a head of `add_head` a dict of its "logits", "loss" if labels are given, and "output".

        With Parallel or BatchSplit at the end of what is active, and a head for each of its children, logits is a dict of
        them by name, each of its own rows, and so must labels be; the loss is their sum.
        """
        name = head or self.active_head
        if name is None:
            return self.model(*args, **inputs) if labels is None else self.model(*args, labels=labels, **inputs)
        self._known_head(name)
        output = self.model(*args, **inputs)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        rows = None if head else self._rows_of_heads(hidden)

        def logits_of(which, rows=slice(None)):
            invert = None
            if "vocab_size" in self.model.heads[which].config and self._invertible() is not None:

                def invert(x):
                    return self._invert(x, inverse=True)

            return self.model.heads[which].logits(hidden[rows], None if pooled is None else pooled[rows], invert)

        if rows is None:
            result = {"logits": logits_of(name), "output": output}
            if labels is not None:
                result["loss"] = self.model.heads[name].loss(result["logits"], labels)
            return result
        result = {"logits": {which: logits_of(which, part) for which, part in rows.items()}, "output": output}
        if labels is not None:
            result["loss"] = sum(self.model.heads[n].loss(logits, labels[n]) for n, logits in result["logits"].items())
        return result

    # --- Folders

    def save_adapter(self, name: str, folder, *, with_head=True, safetensors=False) -> None:
        """Writes adapter_config.json and the weights, as the library does, and the head of that name or the model's own.

        Raises ValueError for an unknown adapter.
        """
        tensors = {self._saved(key): tensor for key, tensor in self._tensors(name).items()}
        self._write("adapter", folder, {"config": self.configs[name].to_dict(), "name": name}, tensors, safetensors)
        if with_head and (name in getattr(self.model, "heads", {}) or self.base is not self.model):
            self.save_head(folder, name if self.base is self.model else None, safetensors=safetensors)

    def load_adapter(self, folder, *, load_as=None, leave_out=(), with_head=True, set_active=False) -> str:
        """Adds the adapter of a folder of this or of the library, with its head if there is one that fits; returns its name.

        leave_out: numbers of layers whose adapters are not loaded (AdapterDrop).

        Raises InputError for files that are missing, truncated or foreign, or do not fit: with the name and shape in question.
        """
        config, tensors, where = self._read("adapter", folder)
        options = config.get("config")
        if not isinstance(options, dict):
            raise InputError(f"{Path(folder) / FILES['adapter'][0]} has no 'config'; it must have an adapter's options")
        if options.get("architecture") is not None:
            kind = options["architecture"]
            raise InputError(f"{folder} holds {kind!r}; only bottleneck adapters (no architecture) can be loaded")
        width = config.get("hidden_size")
        if width is not None and width != self.channels:
            raise InputError(f"{folder} is of a model with hidden_size {width}; this one has {self.channels}")
        options, old = self._modern(options, config, tensors), config["name"]
        name = load_as or old
        left = tuple(sorted({*(options.get("leave_out") or ()), *leave_out}))
        try:
            adapter_config = AdapterConfig.of(options, leave_out=left)
            present = name in self.configs
            if present and self.configs[name] != adapter_config:
                raise ValueError(f"the model has an adapter {name!r} of another config; give another name with load_as")
            if not present:
                self.add_adapter(name, adapter_config)
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder}: {error}") from error
        try:
            renamed = {_rename(key, old, name): tensor for key, tensor in tensors.items()}
            dropped = [key for key, (_, place) in self.places.items() if place.layer in leave_out]
            self._assign(self._tensors(name), renamed, where, ignored=dropped)
        except BaseException:
            if not present:
                self.delete_adapter(name)
            raise
        if with_head and (Path(folder) / FILES["head"][0]).is_file():
            self._load_fitting_head(folder, load_as)
        if set_active:
            self.set_active(name)
        return name

    def save_adapter_fusion(self, name, folder, *, safetensors=False) -> None:
        """Writes adapter_fusion_config.json and the weights; the adapters have folders of their own."""
        name = name if isinstance(name, str) else ",".join(name)
        config, names = self._known_fusion(name)
        tensors = {self._saved(key): tensor for key, tensor in self._fusion_tensors(name).items()}
        content = {"config": config.to_dict(), "name": name, "adapter_names": names}
        self._write("fusion", folder, content, tensors, safetensors)

    def load_adapter_fusion(self, folder, *, load_as=None, set_active=False) -> str:
        """Adds the fusion of a folder, whose adapters the model must have; returns its name. Raises as `load_adapter`."""
        config, tensors, where = self._read("fusion", folder)
        old = config["name"]
        name, names = load_as or old, config.get("adapter_names") or old.split(",")
        names = names.split(",") if isinstance(names, str) else names
        try:
            present = name in self.fusions
            if not present:
                self.add_adapter_fusion(names, config.get("config"), name=name)
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder}: {error}") from error
        try:
            inner = f"adapter_fusion_layer.{old}."
            renamed = {key.replace(inner, f"adapter_fusion_layer.{name}."): tensor for key, tensor in tensors.items()}
            self._assign(self._fusion_tensors(name), renamed, where)
        except BaseException:
            if not present:
                self.delete_adapter_fusion(name)
            raise
        if set_active:
            self.set_active(Fuse(*names, name=name))
        return name

    def save_head(self, folder, name=None, *, safetensors=False) -> None:
        """Writes head_config.json and the weights of a head, or of the model's own where it has one (name None)."""
        if self.base is self.model:
            self._known_head(name)
            config = {"config": dict(self.model.heads[name].config), "name": name}
            tensors = {f"heads.{name}.{key}": t for key, t in self.model.heads[name].state_dict(keep_vars=True).items()}
            class_name = type(self.model).__name__.removesuffix("Model") + "AdapterModel"  # which has such heads
        else:
            config = {"config": None, "name": None, "num_labels": getattr(self.model.config, "num_labels", None)}
            tensors, class_name = self._own_head(), type(self.model).__name__
        config["label2id"] = getattr(self.model.config, "label2id", None)
        self._write("head", folder, {**config, "model_class": class_name}, tensors, safetensors)

    def load_head(self, folder, *, load_as=None):
        """Reads a head: a new one into `hub(...)`, or the weights of the model's own. Returns its name, or None.

        Raises InputError for files that are missing, foreign or do not fit.
        """
        config, tensors, where = self._read("head", folder)
        options, old = config.get("config"), config.get("name")
        if self.base is not self.model:
            if options is not None or config.get("model_class") != type(self.model).__name__:
                raise InputError(
                    f"{folder} has a head of {config.get('model_class')}; the model is {type(self.model).__name__}"
                )
            self._assign(self._own_head(), tensors, where)
            return None
        if options is None:
            raise InputError(f"{folder} has the head of a {config.get('model_class')}; such a model can load it")
        options, name = dict(options), load_as or old
        kind = options.pop("head_type", None)
        try:
            kept = getattr(self.model, "heads", {}).get(name) if hasattr(self.model, "heads") else None
            head = self.add_head(name, kind, **options)
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder}: {error}") from error
        own = {f"heads.{name}.{key}": t for key, t in head.state_dict(keep_vars=True).items()}
        try:
            self._assign(own, {k.replace(f"heads.{old}.", f"heads.{name}."): t for k, t in tensors.items()}, where)
        except BaseException:
            self.delete_head(name)
            if kept is not None:
                self.model.heads[name] = kept
            raise
        return name

    def save_setup(self, setup, folder, *, safetensors=False) -> None:
        """Writes a composition: adapter_setup.json, and its adapters and fusions in folders of their names."""
        setup, folder = composition.parse(setup), Path(folder)
        self._known(setup.names())
        fuses = _fuses(setup)
        for fuse in fuses:
            self._known_fusion(fuse.name)
        for name in setup.names():
            self.save_adapter(name, folder / name, with_head=False, safetensors=safetensors)
        for fuse in fuses:
            self.save_adapter_fusion(fuse.name, folder / fuse.name, safetensors=safetensors)
        content = {"adapter_setup": setup.to_dict(), "head_setup": None, "version": FORMAT}
        write_files({folder / SETUP: json.dumps(content, indent=2).encode()})

    def load_setup(self, folder, *, set_active=True) -> Block:
        """Adds the adapters and fusions of `save_setup`'s folder, or the library's; returns the composition."""
        folder = Path(folder)
        content = read_json(folder / SETUP)
        try:
            setup = composition.from_dict(content.get("adapter_setup"))
        except ValueError as error:
            raise InputError(f"{folder / SETUP}: {error}") from error
        for name in setup.names():
            self.load_adapter(folder / name, with_head=False)
        for fuse in _fuses(setup):
            self.load_adapter_fusion(folder / fuse.name)
        if set_active:
            self.set_active(setup)
        return setup

    # --- Inside

    def _factory(self):
        parameter = next(self.base.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}

    def _known(self, names):
        for name in names:
            if name not in self.configs:
                known = ", ".join(map(repr, self.configs)) or "none"
                raise ValueError(f"adapter {name!r} is unknown; known are {known}")

    def _known_fusion(self, name):
        if name not in self.fusions:
            raise ValueError(f"fusion {name!r} is unknown; known are {', '.join(map(repr, self.fusions)) or 'none'}")
        return self.fusions[name]

    def _known_head(self, name):
        heads = getattr(self.model, "heads", {})
        if name is None or name not in heads:
            raise ValueError(f"head {name!r} is unknown; known are {', '.join(map(repr, heads)) or 'none'}")

    def _invertible(self):
        if not self.inverted_name:
            return None
        return self.base.get_submodule(self.inverted_name)

    def _invert(self, hidden, inverse=False):
        return composition.invert(self.active, self._invertible(), hidden, inverse)

    def _rows_of_heads(self, hidden):
        """name -> slice, where what is active ends in a Parallel or BatchSplit of adapters that all have heads."""
        block = self.active.setup
        if isinstance(block, composition.Stack):
            block = block.children[-1]
        if not isinstance(block, (composition.Parallel, composition.BatchSplit)):
            return None
        names = [path[-1] for child in block.children for path in composition.paths(child)]
        if len(names) != len(block.children) or not all(name in self.model.heads for name in names):
            return None
        _, sizes = composition.parts(block, hidden)
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return {name: slice(s, s + size) for name, s, size in zip(names, starts, sizes, strict=True)}

    def _freeze(self, train_embeddings):
        self.model.train()
        heads = getattr(self.model, "heads", None)
        trained = [] if heads is None else [parameter for parameter in heads.parameters() if parameter.requires_grad]
        self.base.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if train_embeddings:
            self.base.get_input_embeddings().requires_grad_(True)
        elif self.model.get_output_embeddings() is not None:
            self.model.get_output_embeddings().requires_grad_(False)

    def _tensors(self, name):
        """Name in files, without the model's prefix -> parameter."""
        self._known([name])
        result = {}
        for key, (_, place) in self.places.items():
            if name in place.owner.adapters:
                result |= _state(place.owner.adapters[name], f"{key}.adapters.{name}.")
        if name in self.base.shared_parameters:
            result |= _state(self.base.shared_parameters[name], f"shared_parameters.{name}.")
        if self._invertible() is not None and name in self._invertible():
            result |= _state(self._invertible()[name], f"{self.inverted_name}.{name}.")
        return result

    def _fusion_tensors(self, name):
        result = {}
        for key, (_, place) in self.places.items():
            if name in place.owner.adapter_fusion_layer:
                result |= _state(place.owner.adapter_fusion_layer[name], f"{key}.adapter_fusion_layer.{name}.")
        return result

    def _own_head(self):
        state = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if not name.startswith(self.prefix)}

    def _saved(self, key):
        return f"{self.prefix}{key}"

    def _write(self, kind, folder, content, tensors, safetensors):
        config = self.model.config
        content = {
            "hidden_size": self.channels,
            "model_class": type(self.model).__name__,
            "model_name": getattr(config, "_name_or_path", "") or "",
            "model_type": config.model_type,
            "version": FORMAT,
            **content,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # copies: safetensors refuses one tensor under two names, as the norm of ln_before and tied embeddings have them
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        json_name, pickle_name, safe_name = FILES[kind]
        if safetensors:
            weights = {folder / safe_name: require("safetensors.torch", "train").save(tensors)}
        else:
            weights = {folder / pickle_name: _pickled(tensors)}
        write_files({**weights, folder / json_name: json.dumps(content, indent=2, sort_keys=True).encode()})
        (folder / (pickle_name if safetensors else safe_name)).unlink(missing_ok=True)

    def _read(self, kind, folder):
        """(config, tensors, file of the tensors)."""
        folder = Path(folder)
        json_name, pickle_name, safe_name = FILES[kind]
        config = read_json(folder / json_name)
        if kind != "head" and not isinstance(config.get("name"), str):
            raise InputError(f"{folder / json_name} has no 'name'; it must have one")
        for name, read in ((safe_name, read_tensors), (pickle_name, read_pickle)):
            if (folder / name).is_file():
                tensors = read(folder / name)
                for key, tensor in tensors.items():
                    if not isinstance(tensor, torch.Tensor):
                        raise InputError(f"{folder / name} has {key!r}, a {type(tensor).__name__}; it must hold tensors")
                return config, tensors, folder / name
        raise InputError(f"{folder} has neither {pickle_name} nor {safe_name}")

    def _modern(self, options, config, tensors):
        """Options of old files as they are called now."""
        options = dict(options)
        old = options.pop("invertible_adapter", None)
        if old:
            options["inv_adapter"], options["inv_adapter_reduction_factor"] = old["block_type"], old["reduction_factor"]
        if "version" not in config:
            activation = options.get("non_linearity")
            options["non_linearity"] = LEGACY_ACTIVATIONS.get(activation, activation)
        if config.get("type") == "text_task" and not any("invertible" in key for key in tensors):
            options |= {"inv_adapter": None, "inv_adapter_reduction_factor": None}  # named by old task adapters, never used
        known = AdapterConfig.__dataclass_fields__
        unknown = sorted(set(options) - set(known) - {"architecture"})
        if unknown:
            warnings.warn(f"options of an adapter that are not known: {', '.join(unknown)}", stacklevel=3)
        return {option: value for option, value in options.items() if option in known}

    def _assign(self, own, tensors, where, ignored=()):
        """Copies tensors into parameters of the same names, with or without a prefix; strict."""
        found, unknown = {}, []
        for key, tensor in tensors.items():
            for candidate in (key, key.partition(".")[2]):
                if candidate in own:
                    found[candidate] = tensor
                    break
                if any(candidate.startswith(f"{place}.") for place in ignored):
                    break
            else:
                unknown.append(key)
        problems = [f"{name} is missing" for name in own if name not in found]
        problems += [f"{name} is unknown" for name in unknown]
        problems += [
            f"{name} has shape {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
            for name, tensor in found.items()
            if tensor.shape != own[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}")
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)

    def _load_fitting_head(self, folder, load_as):
        try:
            self.load_head(folder, load_as=load_as)
        except InputError as error:
            flexible = read_json(Path(folder) / FILES["head"][0]).get("config") is not None
            if flexible == (self.base is self.model):
                raise
            warnings.warn(f"the head was left out: {error}", stacklevel=3)


def set_hub_backend(hub: AdapterHub, backend: str) -> None:
    """Changes what computes all adapters of a hub."""
    set_backend(hub.model, backend)
    hub.backend = backend
    for _, place in hub.places.values():
        place.owner.adapters.backend = backend


def _patch(hub):
    """Finds the places of a model. Returns (layers, embeddings, where invertible adapters are or "")."""
    base, active, backend = hub.base, hub.active, hub.backend
    layers = []
    encoder_layers = len(base.encoder.block) if hasattr(getattr(base, "encoder", None), "block") else 0
    for name, module in list(base.named_modules()):
        children = {child for child, _ in module.named_children()}
        layer = re.search(r"(?:^|\.)(?:layer|layers|block)\.(\d+)(?:\.|$)", name)
        number = int(layer[1]) if layer else -1
        if layer and {"dense", "LayerNorm", "dropout"} <= children and name.endswith("output"):
            attention = re.search(r"attention\.output$", name)
            _hold(module, backend)
            module.adapter_place = Place(module, number, active)
            hub.places[name] = ("mh_adapter" if attention else "output_adapter", module.adapter_place)
            _replace_forward(module, PostNorm)
            if not attention:
                layers.append(base.get_submodule(name.rpartition(".")[0]))
        elif layer and children in (_VIT_LAYER, _VIT_5_LAYER):
            attention, output = AdapterLayer(backend), AdapterLayer(backend)
            module.attention_adapters = attention
            (module.output if "output" in children else module).output_adapters = output
            module.attention_place, module.output_place = Place(attention, number, active), Place(output, number, active)
            _replace_forward(module, ViTLayer)
            hub.places[f"encoder.layer.{number}.attention_adapters"] = "mh_adapter", module.attention_place
            hub.places[f"encoder.layer.{number}.output.output_adapters"] = "output_adapter", module.output_place
            layers.append(module)
        elif layer and {"layer_norm", "dropout"} < children and children & set(_T5_INNER):
            (inner,) = children & set(_T5_INNER)
            number += encoder_layers if name.startswith("decoder.") else 0
            _hold(module, backend)
            module.adapter_place = Place(module, number, active)
            hub.places[name] = _T5_INNER[inner], module.adapter_place
            _replace_forward(module, T5Layer)
            if inner == "SelfAttention":
                layers.append(base.get_submodule(name.rpartition(".layer.")[0]))
    if encoder_layers:
        return layers, "encoder.invertible_adapters"
    return layers, "" if any("output_adapters" in key for key in hub.places) else "invertible_adapters"


def _patch_embeddings(hub):
    """Invertible adapters behind the embeddings, and backwards in front of those of the output."""
    owner, invertible = hub.base, nn.ModuleDict()
    if hub.inverted_name.startswith("encoder."):  # T5: after the embeddings' dropout
        owner = hub.base.encoder
        owner.block[0].register_forward_pre_hook(_Invert(hub.active, invertible))
    else:
        owner.embeddings.register_forward_hook(_Invert(hub.active, invertible))
        last = hub.model.get_output_embeddings()
        if last is not None and hub.active.compat is None:  # the library has it in heads of its own alone
            last.register_forward_pre_hook(_Invert(hub.active, invertible, inverse=True))
    owner.invertible_adapters = invertible


_VIT_LAYER = {"attention", "intermediate", "output", "layernorm_before", "layernorm_after"}
_VIT_5_LAYER = {"attention", "layernorm_before", "layernorm_after", "mlp", "dropout"}
_T5_INNER = {"SelfAttention": "mh_adapter", "EncDecAttention": "cross_adapter", "DenseReluDense": "output_adapter"}


# Hooks are objects, not closures, so that a copy of the model gets copies of what they use.


class _Begin:
    """Before a model, or its base: a forward pass begins, with the tasks of its rows."""

    def __init__(self, active, outermost):
        self.active, self.outermost = active, outermost

    def __call__(self, module, args, kwargs):
        tasks = None if self.outermost else self.active.task_ids
        if "task_ids" in kwargs:
            kwargs = dict(kwargs)
            tasks = kwargs.pop("task_ids")
        self.active.begin(tasks)
        return args, kwargs


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

    def __init__(self, active):
        self.active = active

    def __call__(self, module, args, kwargs):
        batch = self.active.batch
        if batch is None:
            return None
        states = [*args[:1], kwargs.get("hidden_states"), *args[3:4], kwargs.get("encoder_hidden_states")]
        rows = max(t.shape[0] for t in states if isinstance(t, torch.Tensor) and t.dim() == 3)
        if rows == batch:
            return None

        def repeated(value):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch:
                return value.repeat((rows // batch,) + (1,) * (value.dim() - 1))
            return value

        return tuple(map(repeated, args)), {name: repeated(value) for name, value in kwargs.items()}


def _fuses(node) -> list:
    if isinstance(node, str):
        return []
    return ([node] if isinstance(node, Fuse) else []) + [fuse for child in node.children for fuse in _fuses(child)]


def _state(module, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def _rename(key, old, new):
    for was, now in LEGACY.items():
        key = key.replace(was, now)
    for group in ("adapters", "shared_parameters"):
        key = key.replace(f"{group}.{old}.", f"{group}.{new}.")
    return key


def _pickled(tensors):
    import io

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
