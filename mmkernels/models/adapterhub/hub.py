"""The hub: adding, activating and training adapters, fusions of them, and heads."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...modules import composition
from ...modules.adapter import (
    AdapterBank,
    AdapterConfig,
    AdapterFusion,
    FusionConfig,
    InvertibleAdapter,
    make_adapter,
    shared_phm_parameters,
)
from ...modules.backend import check_backend
from ...modules.composition import Activation, Fuse, fuses
from ..registry import InputError
from .folders import Folders
from .heads import HEADS, PredictionHead, represented, shift_right
from .layouts import NAMES, patch, patch_calls, patch_embeddings


def check_name(name) -> None:
    """Raises ValueError for what cannot name an adapter or a head: they are modules in an `nn.ModuleDict`."""
    if not isinstance(name, str) or not name or "." in name or hasattr(AdapterBank(), name):
        raise ValueError(f"name is {name!r}; it must be a word without dots that nn.ModuleDict does not use itself")


class AdapterHub(Folders):
    """Adapters in a Hugging Face model, which stays the user's own object and is what runs.

    `model(..., task_ids=ids)`, and `model.generate`, give the task of each row to a `MultiTask`; with a Parallel the latter
    generates for every child, as `model(...)` computes. Threads may call one model at a time each; what is active is the
    same for all. Heads of `add_head` belong to `hub(...)`.

    Args:
        model: a model of transformers with or without a head, of the layout of BERT (RoBERTa, XLM-R, ELECTRA, DeBERTa, ...),
            ALBERT, DistilBERT, ViT, BEiT, CLIP, GPT-2, GPT-J, Llama (Mistral, Qwen2, ...), T5 or BART (mBART, Whisper, ...).
        compat: None, or "adapters" to compute compositions as the library of that name does, see `composition.Activation`.
        backend: of all adapters, a backend of `ops.adapter` or "eager"; `modules.set_backend` changes it later.
            With "auto" and active adapters the model's GELUs and linear layers are ours too, where they are faster.

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
        self.has_own_head = bool(self.own_head())
        self.configs, self.fusions, self.active_head = {}, {}, None  # name -> AdapterConfig; name -> (FusionConfig, names)
        self.channels = getattr(model.config, "hidden_size", None)  # None: texts and images have their own
        self.places = patch(self.base, self.active, backend)  # name in files, without the model's prefix -> (location, Place)
        if not self.places:
            raise InputError(f"model is a {type(model).__name__}; known are the layouts of {NAMES}")
        self.base.shared_parameters = nn.ModuleDict()
        self.inverted_name = patch_embeddings(model, self.base, self.active)
        parts = [getattr(self.base, name, None) for name in ("encoder", "decoder")]  # which `generate` calls alone
        called = dict.fromkeys([model, self.base, *(part for part in parts if isinstance(part, nn.Module))])
        patch_calls(self.active, model, called, self._invertible(), model.config.model_type.startswith("clip"))

    # --- Adding and taking away

    def add_adapter(self, name: str, config="seq_bn", *, set_active=False, **changes) -> None:
        """A new adapter at every place that its config names.

        Args:
            name: see `check_name`.
            config: the name of a preset, a dict of options, or an AdapterConfig; `changes` are options that differ from it.

        Raises ValueError for a name that is taken and options that are unknown.
        """
        config = AdapterConfig.of(config, **changes)
        if name in self.configs:
            raise ValueError(f"name is {name!r}, which is taken; delete_adapter frees it")
        check_name(name)
        if config.inv_adapter and self._invertible() is None:
            raise ValueError(f"inv_adapter is {config.inv_adapter!r}; a {type(self.base).__name__} has no place for one")
        factory = self._factory()
        sizes = sorted({place.channels for _, place in self.places.values()})
        if config.phm_layer and config.shared_W_phm and len(sizes) > 1:
            raise ValueError(f"shared_W_phm is True; layers of the sizes {sizes} can share no weights")
        shared = shared_phm_parameters(config, sizes[0], **factory) if config.phm_layer else None
        made = {}
        for key, (location, place) in self.places.items():
            if getattr(config, location) and place.layer not in config.leave_out:
                made[key] = make_adapter(
                    place.channels, config, layer=place.layer, shared=shared, backend=self.backend, **factory
                ).train(self.model.training)
        invertible = None
        if config.inv_adapter:
            options = {"activation": config.non_linearity, "reduction_factor": config.inv_adapter_reduction_factor or 2}
            width = self._invertible().channels
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

        names: also as "a,b" or Fuse("a", "b").
        config: "dynamic", "static", a dict of options or a FusionConfig.

        Raises ValueError for unknown adapters, a name that is taken, and adapters of which some have places that others have
        not: after attention, after the feed-forward layer, after cross-attention.
        """
        config = FusionConfig.of(config)
        if isinstance(names, Fuse):
            name, names = name or names.name, [path[-1] for child in names.children for path in composition.paths(child)[:1]]
        names = names.split(",") if isinstance(names, str) else list(names)
        self._known(names)
        if not names:
            raise ValueError("names is empty; it must have names of adapters")
        name = name or ",".join(names)
        check_name(name)
        if name in self.fusions:
            raise ValueError(f"name is {name!r}, which is taken; delete_adapter_fusion frees it")
        locations = dict.fromkeys(location for location, _ in self.places.values())
        where = {n: " and ".join(location for location in locations if getattr(self.configs[n], location)) for n in names}
        if len(set(where.values())) > 1:
            raise ValueError(
                f"names is {names}, whose adapters stand at different places: {where}; a fusion needs all at each"
            )
        dropout = self._rate("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
        for location, place in self.places.values():
            if all(getattr(self.configs[n], location) for n in names):
                fusion = AdapterFusion(place.channels, config, dropout=dropout, backend=self.backend, **self._factory())
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

        That of a language model begins with the model's own embeddings, where the model ties the two.

        Raises ValueError for what `check_name` refuses and unknown kinds and options, InputError on a model with its own head.
        """
        if self.has_own_head:
            raise InputError(f"model is a {type(self.model).__name__}, which has a head; add_head needs a model without one")
        check_name(name)
        if head_type not in HEADS:
            raise ValueError(f"head_type is {head_type!r}; allowed are {', '.join(map(repr, HEADS))}")
        if self.channels is None:
            raise InputError(f"model is a {type(self.model).__name__}; add_head needs a model with one hidden_size")
        unknown = set(options) - set(HEADS[head_type]) - {"label2id", "embedding_size"}
        if unknown:
            raise ValueError(f"a head of type {head_type!r} has no option {min(unknown)!r}")
        config = {"head_type": head_type, **options}
        sizes = self.model.config
        if "vocab_size" in HEADS[head_type]:
            config["vocab_size"] = config.get("vocab_size") or sizes.vocab_size
            if hasattr(sizes, "embedding_size"):  # ALBERT, ELECTRA
                config.setdefault("embedding_size", sizes.embedding_size)
        dropout = self._rate("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout", "resid_pdrop")
        head = PredictionHead(config, self.channels, dropout, getattr(sizes, "layer_norm_eps", 1e-12), **self._factory())
        std = getattr(sizes, "initializer_range", 0.02)
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if "vocab_size" in config and sizes.tie_word_embeddings:
            embeddings = self.base.get_input_embeddings().weight
            if embeddings.shape == head[-1].weight.shape:
                head[-1].weight.data.copy_(embeddings.detach())
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
        skip_layers = () if skip_layers is None else skip_layers
        if not isinstance(skip_layers, Iterable):
            raise TypeError(f"skip_layers is {skip_layers!r}; it must be numbers of layers, such as range(3)")
        if setup is not None:
            self._known(setup.names())
            for fuse in fuses(setup):
                self._known_fusion(fuse.name)
        self.active.setup, self.active.skip_layers = setup, frozenset(skip_layers)
        if setup is not None:
            last = setup.paths()[-1][-1]
            if last in getattr(self.model, "heads", {}):
                self.active_head = last

    def train_adapter(self, setup, *, train_embeddings=False) -> None:
        """Activates a setup and freezes everything but its adapters, and heads; `model.train()` included."""
        self.set_active(composition.parse_some(setup))
        self._freeze(train_embeddings)
        for name in self.active.setup.names():
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(True)
            if not self.configs[name].learn_phm and name in self.base.shared_parameters:
                for rule, parameter in self.base.shared_parameters[name].items():
                    parameter.requires_grad_(not rule.startswith("phm_rule"))

    def train_adapter_fusion(self, setup, *, unfreeze_adapters=False) -> None:
        """Activates a setup and freezes everything but its fusions (and adapters, if asked for), and heads."""
        setup = composition.parse_some(setup)
        found = fuses(setup)
        if not found:
            raise ValueError(f"setup is {setup}; it must have a Fuse")
        self.set_active(setup)
        self._freeze(False)
        for fuse in found:
            for _, place in self.places.values():
                if fuse.name in place.owner.adapter_fusion_layer:
                    place.owner.adapter_fusion_layer[fuse.name].requires_grad_(True)
        if unfreeze_adapters:
            for name in self.active.setup.names():
                for parameter in self.parameters_of(name):
                    parameter.requires_grad_(True)

    def fusion_regularization(self) -> torch.Tensor:
        """0.01 times the sum of |W_v - I|² over the active fusions' values that train: to be added to the loss."""
        names = {fuse.name for fuse in fuses(self.active.setup)} if self.active.setup is not None else ()
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
        ids = inputs.get("input_ids", args[0] if args else None)
        if hasattr(self.base, "decoder") and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            shifted = labels if self.model.heads[name].config["head_type"] == "seq2seq_lm" and labels is not None else ids
            inputs["decoder_input_ids"] = shift_right(shifted, self.model.config)
        output = self.model(*args, **inputs)
        rows = None if head else self._rows_of_heads(output.last_hidden_state)
        if rows is not None and labels is not None and not (isinstance(labels, Mapping) and rows.keys() <= labels.keys()):
            raise TypeError(f"labels is a {type(labels).__name__}; it must be a dict of labels by the heads {', '.join(rows)}")
        of_rows = any(self.model.heads[which].is_of_rows for which in rows or [name])
        hidden, whole = represented(self.model.config, output, ids if of_rows else None)
        pooled = getattr(output, "pooler_output", None)

        def logits_of(which, rows=slice(None)):
            invert = None
            if "vocab_size" in self.model.heads[which].config and self._invertible() is not None:

                def invert(x):
                    return self._invert(x, inverse=True)

            given = (None if x is None else x[rows] for x in (hidden, whole, pooled))
            return self.model.heads[which].logits(*given, invert)

        if rows is None:
            result = {"logits": logits_of(name), "output": output}
            if labels is not None:
                result["loss"] = self.model.heads[name].loss(result["logits"], labels)
            return result
        result = {"logits": {which: logits_of(which, part) for which, part in rows.items()}, "output": output}
        if labels is not None:
            parts = [
                self.model.heads[which].loss(logits, labels[which])
                for which, logits in result["logits"].items()
                if rows[which].stop > rows[which].start  # a mean over no rows would be NaN
            ]
            result["loss"] = sum(parts, hidden.new_zeros(()))
        return result

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

    def own_head(self) -> dict:
        """Name -> parameter of the head that the model has itself; empty without one."""
        inner = self.prefix
        if not inner and hasattr(self.model, "shared"):  # T5 with a head has its parts beside it
            inner = ("shared", "encoder.", "decoder.", "heads.")
        state = self.model.state_dict(keep_vars=True) if inner else {}
        return {name: tensor for name, tensor in state.items() if not name.startswith(inner)}

    def _rate(self, *names):
        """The first of the rates of dropout that the model's config has."""
        rates = (getattr(self.model.config, name, None) for name in names)
        return next((rate for rate in rates if rate is not None), 0.0)


def _state(module, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
