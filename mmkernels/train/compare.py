"""One training step of a model on its fused path and on the plain PyTorch path: median time and peak memory.

Times are taken in turns in this process. Memory is taken in a fresh process per path, as what the step adds to a process that
has already done a step on one example (so libraries and thread pools are loaded): the peak resident set on a CPU, torch's
peak allocation on a GPU.
"""

import copy
import json
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch

from .. import models, modules, ops
from ..models import perceiver
from .loop import Settings, make_optimizer, train_step

PATHS = ("fused", "eager")


class Cost(NamedTuple):
    seconds: float
    bytes: int


class Step:
    """A training step on random data, on `path` "fused" (the model's own backend) or "eager"."""

    def __init__(self, model, path, batch_size, device):
        config = model.config
        self.model = copy.deepcopy(model).train()
        if path == "eager":
            modules.set_backend(self.model, "eager")
        self.optimizer = make_optimizer(self.model, Settings(epochs=1, batch_size=batch_size, learning_rate=1e-4))
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, *config.input_shape, config.input_channels)
        self.batch = [
            torch.randn(shape, generator=generator).to(device),
            torch.randint(config.num_classes, (batch_size,), generator=generator).to(device),
        ]
        self.device = torch.device(device)

    def __call__(self, examples=None):
        batch = [tensor[:examples] for tensor in self.batch]
        train_step(self.model, self.optimizer, classification_loss, [(batch, 1.0)], 1.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def classification_loss(model, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(model(inputs), labels)


def compare(model, batch_size, device="cpu", budget=10.0) -> dict:
    """{path: Cost} after about `budget` seconds of timing, at least three steps of each path."""
    steps = {path: Step(model, path, batch_size, device) for path in PATHS}
    times = {path: [] for path in PATHS}
    for step in steps.values():
        step()
    end = time.perf_counter() + budget
    while len(times["eager"]) < 3 or time.perf_counter() < end:
        for path, step in steps.items():
            start = time.perf_counter()
            step()
            times[path].append(time.perf_counter() - start)
    return {path: Cost(statistics.median(times[path]), peak_memory(model, path, batch_size, device)) for path in PATHS}


def describe(costs: dict, model, batch_size) -> str:
    """The comparison as one line."""
    fused, eager = costs["fused"], costs["eager"]
    return (
        f"training step, batch {batch_size}: mmkernels ({backend_of(model)}) {fused.seconds * 1e3:.1f} ms, "
        f"+{fused.bytes / 2**20:.1f} MiB; plain PyTorch {eager.seconds * 1e3:.1f} ms, +{eager.bytes / 2**20:.1f} MiB: "
        f"{eager.seconds / fused.seconds:.2f} times as fast, {eager.bytes / max(fused.bytes, 1):.1f} times less memory"
    )


def backend_of(model) -> str:
    """The backend that the model's cross-attention runs on."""
    attention = model.cross[0].attention
    if attention.backend == "eager":
        return "eager"
    weight = attention.key.weight
    q = weight.new_empty(1, 1, weight.shape[0])
    x = weight.new_empty(1, 1, weight.shape[1])
    return ops.EXPLAINERS["latent_attention"](
        q, x, weight, attention.value.weight, num_heads=attention.num_heads, backend=attention.backend
    ).backend


def peak_memory(model, path, batch_size, device="cpu") -> int:
    """Bytes that one training step adds at its peak, measured in a fresh process."""
    from dataclasses import asdict

    request = {"config": asdict(model.config), "path": path, "batch_size": batch_size, "device": str(device)}
    request["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed: {done.stderr.strip()}")
    return int(done.stdout)


def _measure(config, path, batch_size, device, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = Step(perceiver.Perceiver(models.perceiver.PerceiverConfig(**config), device=device), path, batch_size, device)
    step(examples=1)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        before = torch.cuda.memory_allocated(step.device)
        step()
        return torch.cuda.max_memory_allocated(step.device) - before
    before = _resident("VmRSS") if _reset_peak() else _peak()
    step()
    return _peak() - before


def _reset_peak():
    """Linux only: the peak of the resident set starts anew."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _peak():
    try:
        return _resident("VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
