"""The training loop. Everything it does is a function of (settings, data, step), so it can stop anywhere and go on to the bit.

The order of the data and its augmentation come from (seed, epoch, index); the learning rate from the step; the rest (weights,
optimizer, generators) is in the checkpoint.

A training has epochs of one data set, or steps that draw from a mixture of several. It is evaluated after each epoch, or every
so many steps.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..models.registry import InputError, load, read_tensors, require, write_atomically
from . import checkpoint
from .data import batches, loader

BEST = "best.safetensors"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a training beside model and data; a run resumes only with the same values."""

    epochs: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup_steps: int = 50
    clip_norm: float | None = 1.0  # None: gradients are not clipped
    seed: int = 0
    optimizer: str = "adamw"  # or "lamb", or "sgd", with momentum 0.9, or "adafactor"
    schedule: str = "cosine"  # or "linear", "constant", or "steps"; after the warm-up
    steps: int | None = None  # in place of epochs
    evaluate_every: int | None = None  # so many steps; None: after every epoch
    micro_batches: int = 1  # that a batch is cut into, one in memory at a time
    bfloat16: bool = False  # autocast
    beta2: float = 0.99  # of AdamW and LAMB
    flat: float = 0.0  # share of the steps at the highest rate, in front of the cosine
    milestones: tuple = ()  # of "steps": shares of the steps after which the rate falls to a tenth


@dataclasses.dataclass
class Task:
    """A data set with a loss and a metric."""

    training: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset
    loss: Callable  # (model, batch) -> scalar tensor
    evaluate: Callable  # (model, batches) -> dict of floats
    fingerprint: str  # changes when the data does
    draw: Callable | None = None  # (first, last) -> the batches of these steps; None: permutations of `training`
    select: Callable | None = None  # (model, batch) -> the part of a batch that a step takes, chosen in training mode
    split: Callable | None = None  # (batch, n) -> [(micro-batch, its share of the loss)]
    headline: str | None = None  # the metric whose best model is kept, beside the last one


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero, a line to zero, tenths at the milestones, or no change."""
    if settings.schedule == "linear":
        rest = (steps - step) / max(steps - settings.warmup_steps, 1)
    elif settings.schedule == "steps":
        rest = 0.1 ** sum(step >= milestone * steps for milestone in settings.milestones)
    elif settings.schedule == "constant":
        rest = 1.0
    else:
        flat = settings.flat * steps
        rest = 0.5 * (1 + math.cos(math.pi * max(step - flat, 0) / (steps - flat)))
    return settings.learning_rate * min((step + 1) / max(settings.warmup_steps, 1), rest)


def train_step(model, optimizer, loss, parts, clip_norm) -> torch.Tensor:
    """One update from `parts`, [(micro-batch, its share of the loss)]; returns the detached loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch, share in parts:
        value = loss(model, batch) * share
        value.backward()
        total = total + value.detach()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return total


def split_by(count: Callable) -> Callable:
    """A `Task.split` for a loss that is a mean over what `count(batch)` is the number of: micro-batches of equal rows."""

    def split(batch, parts: int) -> list:
        tensors = batch if isinstance(batch, (list, tuple)) else list(batch.values())
        found = []
        for rows in torch.arange(len(tensors[0]), device=tensors[0].device).chunk(parts):
            chosen = [tensor[rows] for tensor in tensors]
            found.append(dict(zip(batch, chosen, strict=True)) if isinstance(batch, dict) else chosen)
        counts = [int(count(micro)) for micro in found]
        return [(micro, number / max(sum(counts), 1)) for micro, number in zip(found, counts, strict=True)]

    return split


def to_device(batch, device):
    """A tensor, or a list, tuple or dict of them, nested as it may be."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, (list, tuple)) else batch.to(device)


def make_optimizer(model, settings):
    """AdamW, LAMB, SGD with momentum 0.9, or Adafactor as T5 has it; no decay on biases, norms and other vectors.

    LAMB (You et al. 2020): the step of Adam, decay included, times |parameter| / |step|, so that every tensor changes by the
    same share of its norm, the learning rate; tensors of zeros make a step of Adam's.

    Adafactor (Shazeer and Stern 2018) here: no momentum, updates clipped to a root mean square of 1, and steps relative to
    that of the parameter (at least 1e-3): a constant learning rate of 1e-3 is a change of a thousandth a step.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    if settings.optimizer == "adafactor":
        # torch adds its first epsilon to no square and clamps with it: the default, 1e-7, would flatten small gradients.
        return torch.optim.Adafactor(groups, lr=settings.learning_rate, eps=(1e-15, 1e-3), d=1.0, beta2_decay=-0.8)
    if settings.optimizer == "lamb":
        # The decay belongs to the step, whose length the ratio sets: nothing is left to correct for the first steps' bias.
        options = {"betas": (0.9, settings.beta2), "eps": 1e-6, "weight_decouple": False, "adam_debias": True}
        lamb = require("pytorch_optimizer", "train").Lamb(groups, lr=settings.learning_rate, **options)
        lamb.clamp = math.inf  # norms of parameters count as they are; the library would take those above 10 for 10
        return lamb
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def fit(model, task: Task, settings: Settings, folder: Path, *, device="cpu", save_every=50, workers=0) -> list:
    """Trains what requires a gradient in `model`, in place, from the folder's checkpoint if there is one. Returns the history.

    It has a dict for every epoch, or every `evaluate_every` steps. A checkpoint is written every `save_every` steps and with
    every row of the history. With a headline the weights of its highest value are kept in the folder as well, for `load_best`.

    Raises InputError where the folder holds a training with other settings, data or model.
    """
    tqdm = require("tqdm", "train").tqdm
    optimizer = make_optimizer(model, settings)
    config = model.config
    identity = {
        "settings": dataclasses.asdict(settings),
        # transformers' configs, which became dataclasses in release 5, hold what JSON has not.
        "model": json.loads(config.to_json_string(False)) if hasattr(config, "to_json_string") else dataclasses.asdict(config),
        "data": task.fingerprint,
    }
    if frozen := checkpoint.frozen_parameters(model):
        identity["frozen"] = checkpoint.digest(frozen)
    identity = json.loads(json.dumps(identity))  # as it will be read: JSON has lists only
    state = {"identity": identity, "step": 0, "loss_sum": 0.0, "history": []}
    if (found := checkpoint.read_state(folder)) is not None:
        _check_same(found["identity"], identity, folder)
        state = checkpoint.restore(folder, model, optimizer)
    per_epoch = len(task.training) // min(settings.batch_size, len(task.training))
    steps = settings.steps or per_epoch * settings.epochs
    interval = settings.evaluate_every or per_epoch

    def loss_of(model, batch):
        with _precision(settings, device):
            return task.loss(model, batch)

    pace = 0.2 if sys.stderr.isatty() else 10.0  # seconds between updates: a log file needs fewer lines
    with tqdm(total=steps, initial=state["step"], unit="step", mininterval=pace, dynamic_ncols=True) as bar:
        while state["step"] < steps:
            # As far as the draw is one: to the end of the epoch, or to the next evaluation.
            epoch, done = divmod(state["step"], per_epoch)
            if task.draw is None:
                order = batches(len(task.training), settings.batch_size, settings.seed, epoch)[done:]
            else:
                order = task.draw(state["step"], min((state["step"] // interval + 1) * interval, steps))
            model.train()
            for batch in loader(task.training, order[: steps - state["step"]], workers):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, state["step"], steps)
                parts = [(_selected(model, task, to_device(batch, device), settings, device), 1.0)]
                if settings.micro_batches > 1:
                    parts = task.split(parts[0][0], settings.micro_batches)
                loss = train_step(model, optimizer, loss_of, parts, settings.clip_norm).item()
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss became {loss} in step {state['step'] + 1}: the training diverged; a learning rate below "
                        f"{settings.learning_rate} may do, with --restart or another --output"
                    )
                state["loss_sum"] += loss
                state["step"] += 1
                bar.update()
                if state["step"] % interval == 0 or state["step"] == steps:
                    passed = (state["step"] - 1) % interval + 1
                    when = {"epoch": epoch + 1} if settings.evaluate_every is None else {"step": state["step"]}
                    metrics = evaluate(model, task, settings, device, workers)
                    state["history"].append({**when, "loss": state["loss_sum"] / passed, **metrics})
                    state["loss_sum"] = 0.0
                    bar.set_postfix({k: f"{v:.4g}" for k, v in list(state["history"][-1].items())[:6]})
                    if task.headline and best_row(state["history"], task.headline) is state["history"][-1]:
                        save_best(folder, model)
                    checkpoint.save(folder, model, optimizer, state)
                    model.train()
                elif state["step"] % save_every == 0:
                    checkpoint.save(folder, model, optimizer, state)
    return state["history"]


def _selected(model, task, batch, settings, device):
    if task.select is None:
        return batch
    with torch.no_grad(), _precision(settings, device):
        return task.select(model, batch)


@torch.no_grad()
def evaluate(model, task, settings, device, workers=0) -> dict:
    """The task's metrics on its held-out data."""
    model.eval()
    order = batches(len(task.held_out), settings.batch_size, None, None)
    with _precision(settings, device):
        return task.evaluate(model, (to_device(batch, device) for batch in loader(task.held_out, order, workers)))


def best_row(history: list, headline: str) -> dict:
    """The first row with the highest value."""
    return max(history, key=lambda row: row[headline])


def save_best(folder: Path, model) -> None:
    # In front of the checkpoint of the same step: killed between the two, the training comes here again with the same bits.
    write_atomically(folder / BEST, require("safetensors.torch", "train").save(checkpoint.apart(model.state_dict())))


def load_best(folder: Path, model) -> None:
    model.load_state_dict(read_tensors(folder / BEST))


def trained_model(folder, device, backend):
    """The model of a finished training, ready to predict: in float32, whatever its folder has, as results are written."""
    return load(folder, device=device, dtype=torch.float32, backend=backend).eval()


def _precision(settings, device):
    if not settings.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


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
