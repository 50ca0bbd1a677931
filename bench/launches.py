"""How many pieces of work one call hands to its device, counted by torch's profiler in a call of its own, which nobody times.

On a GPU: kernels, copies and fills. On a CPU: operators that compute or write something, as they are dispatched (a composite
one is its parts, a view or an allocation is nothing, one of ours is one, a fused loop of `torch.compile` is one).
"""

import os
import re
from collections.abc import Callable

import torch

FREE = re.compile(r"aten::(empty|new_empty|_unsafe_view$|resolve_|set_$|lift_fresh$)")  # no work, though not marked as views
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would stand between the rows


def count(call: Callable, device: torch.device) -> int | None:
    """Pieces of work of `call()`; None where the profiler sees no GPU."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities, experimental_config=_ExperimentalConfig(capture_overload_names=True)) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    events = profiler.events()
    if cuda:
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events) or None
    return sum(_work(event) for event in events if event.cpu_parent is None)


def _work(event) -> int:
    """Of an operator and what it calls: the outermost operators that work are counted, not what they call for it."""
    if "cpp_fused" in event.name:
        return 1
    if "::" in event.name and not event.name.startswith("autograd::"):
        op = _operator(event.name, event.overload_name or "default")
        if FREE.match(event.name):
            return 0
        if op is not None and not op.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            return 0 if op.is_view else 1
    return sum(_work(child) for child in event.cpu_children)


def _operator(name: str, overload: str):
    namespace, _, name = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)


def name_fused_loops() -> None:
    """The compiler's C++ loops say their names to the profiler, as torch's own operators always do."""
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True
