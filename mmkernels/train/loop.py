"""The training loop. Everything it does is a function of (settings, data, step), so it can stop anywhere and go on to the bit.

The order of the data and its augmentation come from (seed, epoch, index); the learning rate from the step; the rest (weights,
optimizer, generators) is in the checkpoint.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..models.registry import InputError, require
from . import checkpoint
from .data import batches, loader


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a training beside model and data; a run resumes only with the same values."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 50
    clip_norm: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"  # or "sgd", with momentum 0.9


@dataclasses.dataclass
class Task:
    """A data set with a loss and a metric."""

    training: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset
    loss: Callable  # (model, batch) -> scalar tensor
    evaluate: Callable  # (model, batches) -> dict of floats
    fingerprint: str  # changes when the data does


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return settings.learning_rate * min((step + 1) / max(settings.warmup_steps, 1), cosine)


def train_step(model, optimizer, loss, batch, clip_norm) -> torch.Tensor:
    """One update; returns the detached loss."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(model, batch)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return value.detach()


def to_device(batch, device):
    """A tensor, or a list, tuple or dict of them, nested as it may be."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, (list, tuple)) else batch.to(device)


def make_optimizer(model, settings):
    """AdamW, or SGD with momentum 0.9, without decay on biases, norms and other vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))


def fit(model, task: Task, settings: Settings, folder: Path, *, device="cpu", save_every=50, workers=0) -> list:
    """Trains `model` in place, from the folder's checkpoint if there is one, and returns the history: one dict per epoch.

    A checkpoint is written every `save_every` steps and after every epoch. Raises InputError where the folder holds a training
    with other settings, data or model.
    """
    tqdm = require("tqdm", "train").tqdm
    optimizer = make_optimizer(model, settings)
    identity = {
        "settings": dataclasses.asdict(settings),
        "model": dataclasses.asdict(model.config),
        "data": task.fingerprint,
    }
    identity = json.loads(json.dumps(identity))  # as it will be read: JSON has lists only
    state = {"identity": identity, "step": 0, "loss_sum": 0.0, "history": []}
    if (found := checkpoint.read_state(folder)) is not None:
        _check_same(found["identity"], identity, folder)
        state = checkpoint.restore(folder, model, optimizer)
    per_epoch = len(batches(len(task.training), settings.batch_size, settings.seed, 0))
    steps = per_epoch * settings.epochs
    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds between updates: a log file needs fewer lines
    with tqdm(total=steps, initial=state["step"], unit="step", mininterval=pace, dynamic_ncols=True) as bar:
        while state["step"] < steps:
            epoch, done = divmod(state["step"], per_epoch)
            order = batches(len(task.training), settings.batch_size, settings.seed, epoch)
            model.train()
            for batch in loader(task.training, order[done:], workers):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, state["step"], steps)
                batch = to_device(batch, device)
                loss = train_step(model, optimizer, task.loss, batch, settings.clip_norm).item()
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss became {loss} in step {state['step'] + 1}: the training diverged; a learning rate below "
                        f"{settings.learning_rate} may do, with --restart or another --output"
                    )
                state["loss_sum"] += loss
                state["step"] += 1
                bar.update()
                if state["step"] % per_epoch == 0:
                    state["history"].append(
                        {
                            "epoch": epoch + 1,
                            "loss": state["loss_sum"] / per_epoch,
                            **evaluate(model, task, settings, device, workers),
                        }
                    )
                    state["loss_sum"] = 0.0
                    bar.set_postfix({k: f"{v:.4g}" for k, v in state["history"][-1].items()})
                    checkpoint.save(folder, model, optimizer, state)
                elif state["step"] % save_every == 0:
                    checkpoint.save(folder, model, optimizer, state)
    return state["history"]


@torch.no_grad()
def evaluate(model, task, settings, device, workers=0) -> dict:
    """The task's metrics on its held-out data."""
    model.eval()
    order = batches(len(task.held_out), settings.batch_size, None, None)
    return task.evaluate(model, (to_device(batch, device) for batch in loader(task.held_out, order, workers)))


def _check_same(found, wanted, folder):
    for part, value in wanted.items():
        if found.get(part) == value:
            continue
        was, now = found.get(part), value
        if isinstance(was, dict):
            key = next(k for k in {**was, **now} if was.get(k) != now.get(k))
            part, was, now = key, was.get(key), now.get(key)
        raise InputError(
            f"{folder} holds a training with {part} {was!r}, asked for is {now!r}: "
            f"repeat the same command to resume it, or use --restart or another --output"
        )
