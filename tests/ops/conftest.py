"""The backends that op tests run on. MMKERNELS_REQUIRE_BACKENDS=cpp,triton,cuda makes a missing one a failure.

On a machine with a GPU `pytest -m gpu` runs the same tests there, on both GPU backends.
"""

import contextlib
import os

import pytest
import torch

from mmkernels import _backends, _library, testing

KERNEL_BACKENDS = ("cpp", "triton", "cuda")
ON_GPU = " on a GPU"


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


@pytest.fixture(autouse=True)
def tensor_device(request):
    """Where the tensors of a test are made: on the GPU if it is marked `gpu`."""
    device = torch.device("cuda" if request.node.get_closest_marker("gpu") else "cpu")
    if device.type == "cpu":
        yield device
    else:
        with device:
            yield device


@pytest.fixture(
    params=[*KERNEL_BACKENDS, *(pytest.param(name + ON_GPU, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
)
def backend(request, on):
    """Each kernel backend in turn: C++, Triton in the interpreter and CUDA in the emulator on CPU tensors, and, as tests
    marked `gpu`, Triton and CUDA where they belong."""
    if not request.param.endswith(ON_GPU):
        return on(request.param)
    name = request.param.removesuffix(ON_GPU)
    reasons = _backends.platform_refusals(name, torch.device("cuda", 0), torch.float32)
    if reasons:
        pytest.fail(f"backend {name!r} does not run on this GPU: {'; '.join(reasons)}")
    return name


@pytest.fixture
def generator(tensor_device):
    return torch.Generator(tensor_device).manual_seed(20210304)
