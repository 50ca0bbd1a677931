"""The backends that op tests run on. MMKERNELS_REQUIRE_BACKENDS=cpp,triton,cuda makes a missing one a failure."""

import contextlib
import os

import pytest
import torch

from mmkernels import _backends, _library, testing

KERNEL_BACKENDS = ("cpp", "triton", "cuda")


def missing(name: str) -> str:
    """Why a backend cannot run on CPU tensors here, or an empty string."""
    if name == "cpp":
        return _library.load("cpu").reason
    if name == "triton":
        return _backends.triton_missing() or ("" if _backends.INTERPRET else "TRITON_INTERPRET is not 1")
    if name == "cuda":
        return _library.load("emulator").reason
    return ""


@pytest.fixture
def on(request):
    """Makes `on(name)` usable in a test: requires the backend and enters what it needs to run on CPU tensors."""
    with contextlib.ExitStack() as stack:

        def enter(name):
            why = missing(name)
            if why and name in os.environ.get("MMKERNELS_REQUIRE_BACKENDS", "").split(","):
                pytest.fail(f"backend {name!r} is required and missing: {why}")
            if why:
                pytest.skip(why)
            if name == "cuda":
                stack.enter_context(testing.emulate_cuda())
            return name

        yield enter


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request, on):
    """Each kernel backend in turn, on CPU tensors: C++, Triton in the interpreter, CUDA in the emulator."""
    return on(request.param)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20210304)
