"""Checks of arguments that families share; their errors name the argument, what it was and what is allowed."""

import torch


def check_tensor(name: str, tensor, dimensions: tuple | str, other: str, device: torch.device) -> None:
    """Raises unless `tensor` is dense, of a float dtype, of the given named dimensions, and on `device`, that of `other`."""
    check_dense(name, tensor)
    if tensor.dim() != len(dimensions):
        layout = f"({', '.join(dimensions)}{',' if len(dimensions) == 1 else ''})"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must have {len(dimensions)} dimension"
            f"{'s' if len(dimensions) > 1 else ''} {layout}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other}'s device, {device}")


def check_dense(name: str, tensor) -> None:
    """Raises TypeError for what is no tensor with strides."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is a {kind} tensor; it must be a dense one (torch.strided)")


def check_key_mask(key_mask, batch: int, keys: int, device: torch.device, name: str = "key_mask") -> None:
    """Raises unless `key_mask` is a bool tensor (batch, keys) on `device`; `name` is what the user calls it."""
    check_dense(name, key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"{name} is a {key_mask.dtype}; it must be a bool tensor, True where a key may be attended")
    if key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] != keys:
        raise ValueError(f"{name} has shape {tuple(key_mask.shape)}; it must be (B, M) = ({batch}, {keys})")
    if key_mask.device != device:
        raise ValueError(f"{name} is on {key_mask.device}; it must be on {device}")


def check_index(name: str, index, shapes: tuple, count: int, of: str, device: torch.device) -> torch.Tensor:
    """`index` as flat int64; raises unless it has one of `shapes` and passes `check_numbers` for `count` rows of `of`."""
    check_dense(name, index)
    if all(index.dim() != len(s) or any(a != b for a, b in zip(index.shape, s, strict=True)) for s in shapes):
        raise ValueError(f"{name} has shape {tuple(index.shape)}; it must be {' or '.join(map(str, shapes))}")
    if index.numel() and count == 0:
        raise ValueError(f"{of} has no rows; {name} needs one or more")
    check_numbers(name, index, count, device)
    return index.reshape(-1).to(torch.int64)


def check_numbers(name: str, index, count: int, device: torch.device, none: str = "") -> None:
    """Raises unless `index` is on `device` and has numbers in [0, count), or -1 where that stands for `none`.

    They are looked at on a CPU only: on a GPU that would wait for it.
    """
    check_dense(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {index.dtype}; it must be torch.int32 or torch.int64")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}; it must be on {device}")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(index))
        if low < (-1 if none else 0) or high >= count:
            allowed = f"[0, {count})" + (f", or -1 for {none}" if none else "")
            raise IndexError(f"{name} has numbers from {low} to {high}; they must be in {allowed}")


def check_seed(seed, other: str, device: torch.device) -> torch.Tensor | None:
    """`dropout_seed` as int64 (1), or None; raises unless it has one element and is on `device`, that of `other`."""
    if seed is None:
        return None
    check_dense("dropout_seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        what = f"has shape {tuple(seed.shape)} and dtype {seed.dtype}"
        raise ValueError(f"dropout_seed {what}; it must be an int64 tensor of one element, or None")
    if seed.device != device:
        raise ValueError(f"dropout_seed is on {seed.device}; it must be on {other}'s device, {device}")
    return seed.reshape(1)


def check_number(name: str, value, allowed: str = "a finite number", holds=lambda value: True) -> float:
    """`value` as a float; raises unless it is a finite number that `holds`. A tensor is none: its gradient would be lost."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {_shown(value)}; it must be {allowed}")
    if not (float("-inf") < value < float("inf") and holds(value)):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    return float(value)


def check_integer(name: str, value, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer, no bool, of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of {least} or more")


def _shown(value) -> str:
    return repr(value) if isinstance(value, (str, type(None))) else f"a {type(value).__name__}"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast wants on `device`; None where it is off, or where there is none ("meta")."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
