"""The state of a training in one file: tensors in safetensors, everything else as JSON in its header.

One file, replaced in one rename, so that a process killed at any moment leaves the old state or the new one. Nothing that is
read back can execute code.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import torch

from ..models.registry import InputError, require, write_atomically

NAME = "training.safetensors"
FORMAT = "mmkernels training state 1"


@contextlib.contextmanager
def locked(folder: Path):
    """Makes `folder` and keeps other trainings out of it; the lock dies with the process. Raises InputError when held."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"--output is {folder}, where nothing can be written: {error.strerror}") from error
    with file:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another training is running in {folder}; choose another --output") from error
        for part in folder.glob(".*.part"):  # left by a process that was killed while it wrote
            part.unlink(missing_ok=True)
        yield


def save(folder: Path, model, optimizer, state: dict) -> None:
    """Writes model, optimizer, random number generators and `state` (JSON values) to `folder`/training.safetensors.

    Frozen parameters are left out: whoever goes on has them already.
    """
    frozen = frozen_parameters(model)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items() if name not in frozen}
    optimizer_state = optimizer.state_dict()
    scalars = {}
    for index, entries in optimizer_state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                scalars[f"{index}/{name}"] = value
    tensors["generator/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator/cuda"] = torch.cuda.get_rng_state()
    header = {
        "format": FORMAT,
        "state": json.dumps(state),
        "optimizer": json.dumps({"scalars": scalars, "param_groups": optimizer_state["param_groups"]}),
    }
    write_atomically(folder / NAME, require("safetensors.torch", "train").save(apart(tensors), header))


def frozen_parameters(model) -> dict:
    """{name: tensor} of the parameters that require no gradient, under all names that the model's state has for them."""
    state = model.state_dict(keep_vars=True)
    return {n: t for n, t in state.items() if isinstance(t, torch.nn.Parameter) and not t.requires_grad}


def digest(tensors: dict) -> str:
    """Of names and bits."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def apart(tensors: dict) -> dict:
    """Contiguous tensors on the CPU, no two of which share memory, as tied weights do: safetensors refuses them."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def read_state(folder: Path) -> dict | None:
    """The JSON `state` of the folder's training, None where there is none; raises InputError for a foreign or broken file."""
    return _read_header(folder)[0] if (folder / NAME).exists() else None


def restore(folder: Path, model, optimizer) -> dict:
    """Fills model, optimizer and generators from the folder; returns the `state` given to `save`."""
    state, header = _read_header(folder)
    path = folder / NAME
    groups = {"model": {}, "optimizer": {}, "generator": {}}
    try:
        with require("safetensors", "train").safe_open(path, "pt") as file:
            for name in file.keys():
                # A fresh copy: slices of the file are not aligned, and alignment can change the rounding of vectorised sums.
                group, _, rest = name.partition("/")
                groups[group][rest] = file.get_tensor(name).clone()
        absent = model.load_state_dict(groups["model"], strict=False)
        absent = [*(set(absent.missing_keys) - frozen_parameters(model).keys()), *absent.unexpected_keys]
        if absent:
            raise ValueError(f"{absent[0]} is missing or unknown")
        entries = {}
        for name, value in (*groups["optimizer"].items(), *header["scalars"].items()):
            index, _, key = name.partition("/")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": header["param_groups"]})
        torch.set_rng_state(groups["generator"]["cpu"])
        if torch.cuda.is_available() and "cuda" in groups["generator"]:
            torch.cuda.set_rng_state(groups["generator"]["cuda"])
    except Exception as error:  # a file with the right header and other contents: every access above may fail
        raise InputError(f"{path} does not hold the state of this training: {error!r}; --restart discards it") from error
    return state


def _read_header(folder):
    path = folder / NAME
    try:
        with require("safetensors", "train").safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except ImportError:
        raise
    except Exception as error:  # SafetensorError is no subclass of anything narrower
        raise InputError(
            f"{path} cannot be read (truncated, or written by something else): {error}; --restart discards it"
        ) from error
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is no training state of this version ({header.get('format')!r}); --restart discards it")
    try:
        state, optimizer = json.loads(header["state"]), json.loads(header["optimizer"])
        complete = {"identity", "step", "loss_sum", "history"} <= set(state) and isinstance(optimizer, dict)
    except (KeyError, TypeError, ValueError):
        complete = False
    if not complete:
        raise InputError(f"{path} has a header that is not complete; --restart discards it")
    return state, optimizer
