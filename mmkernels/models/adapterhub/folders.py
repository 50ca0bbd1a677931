"""The files of adapters, fusions, heads and compositions, as the library `adapters` writes and reads them.

An adapter's folder has adapter_config.json, its weights and, where it has one, the same of its head. What versions before 3
of the library (adapter-transformers) wrote can be read as well.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path

import torch

from ...modules import composition
from ...modules.adapter import PRESETS, AdapterConfig
from ...modules.composition import Block, Fuse, fuses
from ..official import read_pickle
from ..registry import InputError, read_json, read_tensors, require, write_files
from .heads import read_static

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


class Folders:
    """What an AdapterHub saves and loads."""

    def save_adapter(self, name: str, folder, *, with_head=True, safetensors=False) -> None:
        """Writes adapter_config.json and the weights, as the library does, and the head of that name or the model's own.

        Raises ValueError for an unknown adapter.
        """
        tensors = {self._saved(key): tensor for key, tensor in self._tensors(name).items()}
        self._write("adapter", folder, {"config": self.configs[name].to_dict(), "name": name}, tensors, safetensors)
        if with_head and (name in getattr(self.model, "heads", {}) or self.has_own_head):
            self.save_head(folder, None if self.has_own_head else name, safetensors=safetensors)

    def load_adapter(self, folder, *, load_as=None, leave_out=(), with_head=True, set_active=False) -> str:
        """Adds the adapter of a folder of this or of the library, with its head if there is one that fits; returns its name.

        leave_out: numbers of layers whose adapters are not loaded (AdapterDrop).

        Raises InputError for files that are missing, truncated or foreign, or do not fit: with the name and shape in question.
        """
        config, tensors, where = self._read("adapter", folder)
        options = config.get("config")
        if isinstance(options, str) and options in PRESETS:  # so named by old files
            options = PRESETS[options].to_dict()
        if not isinstance(options, dict):
            raise InputError(f"{Path(folder) / FILES['adapter'][0]} has config {options!r}; it must have an adapter's options")
        if options.get("architecture") is not None:
            kind = options["architecture"]
            raise InputError(f"{folder} holds {kind!r}; only bottleneck adapters (no architecture) can be loaded")
        width = config.get("hidden_size")
        if width is not None and width != self.channels:
            raise InputError(f"{folder} is of a model with hidden_size {width}; this one has {self.channels}")
        options, old = self._modern(options, config, tensors), config["name"]
        name = load_as or old
        left = tuple(sorted({*(options.get("leave_out") or ()), *leave_out}))
        with self._all_or_nothing(adapters=[name]):
            try:
                adapter_config = AdapterConfig.of(options, leave_out=left)
                if name not in self.configs:
                    self.add_adapter(name, adapter_config)
                elif self.configs[name] != adapter_config:
                    raise ValueError(f"the model has an adapter {name!r} of another config; give another name with load_as")
            except (ValueError, TypeError) as error:
                raise InputError(f"{folder}: {error}") from error
            renamed = {_rename(key, old, name): tensor for key, tensor in tensors.items()}
            dropped = [key for key, (_, place) in self.places.items() if place.layer in leave_out]
            self._assign(self._tensors(name), renamed, where, ignored=dropped)
            if with_head and (Path(folder) / FILES["head"][0]).is_file():
                self._load_fitting_head(folder, load_as, name)
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
        with self._all_or_nothing():  # an old one changes as a whole, or not
            try:
                if name not in self.fusions:
                    self.add_adapter_fusion(names, config.get("config"), name=name)
            except (ValueError, TypeError) as error:
                raise InputError(f"{folder}: {error}") from error
            inner = f"adapter_fusion_layer.{old}."
            renamed = {key.replace(inner, f"adapter_fusion_layer.{name}."): tensor for key, tensor in tensors.items()}
            self._assign(self._fusion_tensors(name), renamed, where)
        if set_active:
            self.set_active(Fuse(*names, name=name))
        return name

    def save_head(self, folder, name=None, *, safetensors=False) -> None:
        """Writes head_config.json and the weights of a head, or of the model's own where it has one (name None)."""
        if not self.has_own_head:
            self._known_head(name)
            config = {"config": dict(self.model.heads[name].config), "name": name}
            tensors = {f"heads.{name}.{key}": t for key, t in self.model.heads[name].state_dict(keep_vars=True).items()}
            class_name = type(self.model).__name__.removesuffix("Model") + "AdapterModel"  # which has such heads
        else:
            config = {"config": None, "name": None, "num_labels": getattr(self.model.config, "num_labels", None)}
            tensors, class_name = self.own_head(), type(self.model).__name__
        config["label2id"] = getattr(self.model.config, "label2id", None)
        self._write("head", folder, {**config, "model_class": class_name}, tensors, safetensors)

    def load_head(self, folder, *, load_as=None):
        """Reads a head: a new one into `hub(...)`, or the weights of the model's own. Returns its name, or None.

        The own head of a model, as of BertForSequenceClassification, becomes one of `hub(...)` in a model without.

        Raises InputError for files that are missing, foreign or do not fit.
        """
        config, tensors, where = self._read("head", folder)
        options, old = config.get("config"), config.get("name")
        if self.has_own_head:
            if options is not None or config.get("model_class") != type(self.model).__name__:
                raise InputError(
                    f"{folder} has a head of {config.get('model_class')}; the model is {type(self.model).__name__}"
                )
            self._assign(self.own_head(), tensors, where)
            return None
        name = load_as or old
        if options is None:
            options, parts = read_static(config.get("model_class"), tensors)
            if options is None:
                raise InputError(f"{folder} has the head of a {config.get('model_class')}; such a model can load it")
            if name is None:
                raise InputError(f"{folder} has a head without a name; load_as must give one")
        options = dict(options)
        kind = options.pop("head_type", None)
        kept, active = getattr(self.model, "heads", {}), self.active_head
        kept = kept[name] if name in kept else None
        try:
            head = self.add_head(name, kind, **options)
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder}: {error}") from error
        own = {f"heads.{name}.{key}": t for key, t in head.state_dict(keep_vars=True).items()}
        try:
            if config.get("config") is None:
                renamed = head.named_as(parts, tensors, f"heads.{name}.")
            else:
                renamed = {key.replace(f"heads.{old}.", f"heads.{name}."): t for key, t in tensors.items()}
            self._assign(own, renamed, where)
        except BaseException:
            self.delete_head(name)
            if kept is not None:
                self.model.heads[name] = kept
            self.active_head = active
            raise
        return name

    def save_setup(self, setup, folder, *, safetensors=False) -> None:
        """Writes a composition: adapter_setup.json, and its adapters and fusions in folders of their names."""
        setup, folder = composition.parse_some(setup), Path(folder)
        self._known(setup.names())
        found = fuses(setup)
        for fuse in found:
            self._known_fusion(fuse.name)
        for name in setup.names():
            self.save_adapter(name, folder / name, with_head=False, safetensors=safetensors)
        for fuse in found:
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
        with self._all_or_nothing(adapters=setup.names(), fusions=[fuse.name for fuse in fuses(setup)]):
            for name in setup.names():
                self.load_adapter(folder / name, with_head=False)
            for fuse in fuses(setup):
                self.load_adapter_fusion(folder / fuse.name)
        if set_active:
            self.set_active(setup)
        return setup

    @contextlib.contextmanager
    def _all_or_nothing(self, adapters=(), fusions=()):
        """An error inside takes back what was added, and the values of these adapters and fusions, where they were there."""
        before, old = (set(self.configs), set(self.fusions)), []
        for known, names, tensors in (
            (self.configs, adapters, self._tensors),
            (self.fusions, fusions, self._fusion_tensors),
        ):
            old += [tensor for name in names if name in known for tensor in tensors(name).values()]
        values = [tensor.detach().clone() for tensor in old]
        try:
            yield
        except BaseException:
            for name in set(self.fusions) - before[1]:
                self.delete_adapter_fusion(name)
            for name in set(self.configs) - before[0]:
                self.delete_adapter(name)
            with torch.no_grad():
                for tensor, value in zip(old, values, strict=True):
                    tensor.copy_(value)
            raise

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
            options["inv_adapter"] = old.get("block_type", "nice")
            options["inv_adapter_reduction_factor"] = old.get("reduction_factor", 2)
        if "version" not in config and options.get("non_linearity") in LEGACY_ACTIVATIONS:
            options["non_linearity"] = LEGACY_ACTIVATIONS[options["non_linearity"]]
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
        problems += [
            f"{name} has dtype {tensor.dtype}, the model has {own[name].dtype}"
            for name, tensor in found.items()
            if tensor.is_floating_point() != own[name].is_floating_point()
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}")
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)

    def _load_fitting_head(self, folder, load_as, adapter):
        own = read_json(Path(folder) / FILES["head"][0]).get("config") is None
        try:
            self.load_head(folder, load_as=adapter if own else load_as)
        except InputError as error:
            if own == self.has_own_head:
                raise
            warnings.warn(f"the head was left out: {error}", stacklevel=3)


def _rename(key, old, new):
    for was, now in LEGACY.items():
        key = key.replace(was, now)
    for group in ("adapters", "shared_parameters"):
        key = key.replace(f"{group}.{old}.", f"{group}.{new}.")
    return key


def _pickled(tensors):
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
