"""Models by name or from a folder, and the folder itself: config.json and model.safetensors, replaced atomically."""

import dataclasses
import importlib
import json
import os
import tempfile
from pathlib import Path

import torch

SYSTEMS = (
    "ca_mtl",
    "hypergrid_t5",
    "mbt",
    "perceiver",
    "perceiver_io",
)  # modules of this package with CONFIGS (name -> config), CONFIG (class) and MODEL (class)
MODULES = ("adapterhub", *SYSTEMS)  # and those that work on models of others
# What reads a folder of Hugging Face's library, by its model_type.
_HUGGINGFACE = {
    "bert": "ca_mtl.from_bert",
    "mt5": "hypergrid_t5.from_official",
    "perceiver": "perceiver_io.from_huggingface",
    "t5": "hypergrid_t5.from_official",
    "vit": "mbt.from_vit",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that models are computed in


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what is allowed."""


def require(module: str, extra: str):
    """Imports an optional library, or raises ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"this needs the library {library!r} ({error}); install it with: pip install mmkernels[{extra}]"
        ) from error


def check_device(name: str, device) -> None:
    """Raises InputError unless tensors can be made on `device`."""
    try:
        torch.empty(0, device=device)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name} is {device!r}, which cannot be used here: {reason}; allowed are cpu and cuda") from error


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class for GPUs only: on a CPU it raises RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def names() -> list:
    """Every name that `load` knows."""
    return sorted(name for system in SYSTEMS for name in _system(system).CONFIGS)


def load(name_or_path, *, device=None, dtype=None, **overrides) -> torch.nn.Module:
    """A model with fresh weights by config name, or with saved weights from a folder written by `save_pretrained`.

    Args:
        name_or_path: one of `names()`, or a folder with config.json and model.safetensors.
        device: of the parameters.
        dtype: of the parameters; default torch's, and for saved ones that of each in the file, to the bit.
        overrides: fields of the config to change, e.g. `backend="eager"`, `num_classes=10`.

    Raises InputError for an unknown name, a wrong field or value, a file that is missing, truncated or foreign.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"name_or_path is a {type(name_or_path).__name__}; it must be the name of a config or a folder")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype is {dtype!r}; it must be a floating-point torch.dtype, or None")
    check_device("device", device)
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        return _load_folder(path, device, dtype, overrides)
    for system in map(_system, SYSTEMS):
        if str(name_or_path) in system.CONFIGS:
            fields = dataclasses.asdict(system.CONFIGS[str(name_or_path)])
            return _build(system, {**fields, **overrides}, str(name_or_path), device, dtype)
    raise InputError(
        f"{str(name_or_path)!r} is neither a folder with a config.json nor a known config; known are {', '.join(names())}"
    )


def config_of(option: str, system, name: str, allowed=None, **changes):
    """The config of `system`, a module of this package, that the value `name` of an option asks for, with `changes` to it.

    Args:
        name: one of the system's configs, or a file that ends in .json with the fields of one.
        allowed: the names that the message of another one tells; default all.

    Raises InputError for a name that is not known, a file that is no config, and sizes of which no model can be made.
    """
    if name in system.CONFIGS:
        fields = dataclasses.asdict(system.CONFIGS[name])
    elif name.endswith(".json"):
        fields = read_json(Path(name))
        fields.pop("system", None)
    else:
        names = system.CONFIGS if allowed is None else allowed
        raise InputError(f"{option} is {name!r}; allowed are a .json file and {', '.join(names)}")
    return _build(system, {**fields, **changes}, name, "meta", None).config


def save_pretrained(model: torch.nn.Module, path) -> None:
    """Writes config.json and model.safetensors into `path`: both, or a folder that `load` refuses; never parts of two."""
    safetensors = require("safetensors.torch", "train")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    system = type(model).__module__.removeprefix(f"{__package__}.").partition(".")[0]  # its file or folder here
    config = {"system": system, **dataclasses.asdict(model.config)}
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    contents = {"model.safetensors": safetensors.save(weights), "config.json": json.dumps(config, indent=1).encode()}
    write_files({path / name: content for name, content in contents.items()})


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: whoever reads it sees the old content or the new one, also after a crash."""
    write_files({path: content})


def write_files(contents: dict) -> None:
    """Replaces files of one folder by path -> bytes: all are written beside their places and forced to disk, then renamed.

    Of several the last is taken away before the first is replaced, so that it never stands beside files of another writing.
    """
    *_, last = contents
    temporaries = {}
    try:
        for path, content in contents.items():
            handle, temporaries[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporaries[path], 0o644)  # mkstemp makes files that only their owner can read
        if len(contents) > 1:
            last.unlink(missing_ok=True)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(last.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises InputError when it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; it must hold an object")
    return content


def read_tensors(path: Path) -> dict:
    """The tensors of a safetensors file; raises InputError when it is missing, truncated or something else."""
    safetensors = require("safetensors.torch", "train")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError is no subclass of anything narrower
        raise InputError(f"{path} cannot be read as safetensors (truncated, or written by something else): {error}") from error


def load_weights(model: torch.nn.Module, tensors: dict, source) -> None:
    """Strict `load_state_dict` that raises InputError naming the first entries that do not fit."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(tensors)


def _load_folder(path, device, dtype, overrides):
    fields = read_json(path / "config.json")
    name = fields.pop("system", None)
    if name is None and "model_type" in fields:
        kind = str(fields["model_type"])
        reader = _HUGGINGFACE.get(kind)
        how = f"models.{reader} reads it, with models.official.read_huggingface" if reader else "nothing here reads it"
        raise InputError(f"{path} was written by save_pretrained of Hugging Face's library, model_type {kind!r}; {how}")
    if name not in SYSTEMS:
        raise InputError(f"{path / 'config.json'} has system {name!r}; allowed are {', '.join(SYSTEMS)}")
    system = _system(name)
    tensors = read_tensors(path / "model.safetensors")
    stored = {n: t.dtype for n, t in tensors.items() if t.dtype in _DTYPES} if dtype is None else {}
    if stored:  # tables of positions, which no file has, get the dtype of most elements
        dtype = max(_DTYPES, key=lambda kind: sum(tensors[n].numel() for n in stored if stored[n] == kind))
    model = _build(system, {**fields, **overrides}, path / "config.json", device, dtype)
    for n, own in (*model.named_parameters(), *model.named_buffers()):
        if n in stored and own.is_floating_point():
            own.data = own.data.to(stored[n])
    load_weights(model, tensors, path / "model.safetensors")
    return model


def _build(system, fields, source, device, dtype):
    known = [field.name for field in dataclasses.fields(system.CONFIG)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(f"{source}: unknown field {unknown[0]!r}; allowed are {', '.join(known)}")
    try:
        config = system.CONFIG(**fields)
        return system.MODEL(config, device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{source}: a model of these sizes does not fit into memory: {config}") from error


def _system(name):
    return importlib.import_module(f".{name}", __package__)
