"""Triton runs in its interpreter in this whole process; kernels are compiled for GPUs in processes of their own."""

import os

# Threads that wait by spinning make tests many times slower on a machine with other work; torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mmkernels import testing  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    testing.fix_triton_interpreter()


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
