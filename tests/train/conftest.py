"""Tiny models: one thread is faster than several that wait for each other."""

import sysconfig
from pathlib import Path

import pytest
import torch

from mmkernels.train.data import python_text


@pytest.fixture(autouse=True)
def one_thread():
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


def part_of_the_library(monkeypatch):
    """Python's docstrings are those of some packages of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr(
        python_text,
        "roots",
        lambda: {f"{name}/": library / name for name in ("asyncio", "email", "importlib", "unittest", "xml")},
    )


@pytest.fixture
def few_files(monkeypatch):
    part_of_the_library(monkeypatch)
