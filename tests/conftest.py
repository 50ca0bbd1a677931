"""Triton runs in its interpreter in this whole process; kernels are compiled for GPUs in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Threads that wait by spinning make tests many times slower on a machine with other work; torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmkernels import testing  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    testing.fix_triton_interpreter()


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `gpu` where there is none, and `slow` unless `-m` names it."""
    left_out = [] if torch.cuda.is_available() else ["gpu"]
    left_out += [] if "slow" in config.option.markexpr else ["slow"]
    out = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def run_ranks():
    """run_ranks(script, count, *arguments): what the processes of a group print, each called `script RANK PORT *arguments`."""

    def run(script, count, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), port, *arguments],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            outputs = [process.communicate(timeout=200)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs

    return run
