"""Fewer docstrings than Python has."""

import sysconfig
from pathlib import Path

from mmkernels.train.data import python_text


def few(monkeypatch):
    """Python's docstrings are those of some packages of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr(
        python_text,
        "roots",
        lambda: {f"{name}/": library / name for name in ("asyncio", "email", "importlib", "unittest", "xml")},
    )
