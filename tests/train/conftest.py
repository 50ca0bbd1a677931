"""Tiny models: one thread is faster than several that wait for each other."""

import docstring_files
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture
def few_files(monkeypatch):
    """Python's docstrings are those of some packages."""
    docstring_files.few(monkeypatch)
