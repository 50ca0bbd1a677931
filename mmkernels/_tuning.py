"""Tile sizes of the Triton kernels: heuristics in code, measured tables as data, nothing tuned while a program runs.

A family registers a default per kernel with `@default("name")`: a pure function of head dims, dtype and compute capability.
`configs/<gpu>/<kernel>.json`, written by the benchmark on a GPU, overrides it: a list of
`{"dims": [D, E], "dtype": "bfloat16", "tiles": {"queries": 128, ...}}` of which the nearest dims of the same dtype count, if
they are near enough to be covered by the same powers of two.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

CONFIGS = Path(__file__).resolve().parent / "configs"
INTERPRETER = 0  # the capability that stands for Triton's interpreter: largest tiles that still leave edges
_DEFAULTS = {}


class Tiles(NamedTuple):
    """One launch configuration."""

    queries: int  # rows of a query tile
    keys: int  # rows of a key tile
    head: int  # chunk of the head dim of q and k that a program loops over (0: it holds whole rows)
    value: int  # the same for the head dim of v
    num_warps: int
    num_stages: int
    out: int = 0  # columns of a gradient that one program sums where head dims are looped over (0: all)


def default(kernel: str):
    """Decorator: the heuristic of `kernel`, called with (dims, dtype, capability); capability 90 is an H200."""

    def register(function):
        _DEFAULTS[kernel] = function
        return function

    return register


def gpu_folder(device_name: str) -> str:
    """The folder under configs/ for what `torch.cuda.get_device_name` says: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@functools.cache
def _table(gpu: str, kernel: str) -> tuple:
    path = CONFIGS / gpu / f"{kernel}.json"
    return tuple(json.loads(path.read_text())) if path.is_file() else ()


def _octaves(dims) -> tuple:
    return tuple(max(0, dim - 1).bit_length() for dim in dims)


@functools.cache
def tiles(kernel: str, dims: tuple, dtype: str, capability: int, gpu: str = "") -> Tiles:
    """Tiles of `kernel` for head dims `dims` (D, E) and dtype "float32", "bfloat16" or "float16".

    `gpu` names the folder of measured tables ("": none). A table's fields replace those of the default.
    """
    tiles = _DEFAULTS[kernel](dims, dtype, capability)
    near = [row for row in _table(gpu, kernel) if row["dtype"] == dtype and _octaves(row["dims"]) == _octaves(dims)]
    if near:
        nearest = min(near, key=lambda row: sum(abs(a - b) for a, b in zip(row["dims"], dims, strict=True)))
        tiles = tiles._replace(**nearest["tiles"])
    return tiles


@functools.cache
def _device_facts(device: torch.device) -> tuple:
    if device.type != "cuda":
        return INTERPRETER, ""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, gpu_folder(torch.cuda.get_device_name(device))


def device_tiles(kernel: str, dims: tuple, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles of `kernel` on `device`; a CPU stands for the interpreter."""
    return tiles(kernel, dims, str(dtype).removeprefix("torch."), *_device_facts(device))
