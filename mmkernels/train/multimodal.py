"""Clips of several modalities: the task, its result files, pictures, and predictions from them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from .. import models
from ..models.registry import InputError, read_json, require, write_atomically
from .classification import TASK, learning_curve, num_classes, png
from .data import derive_seed
from .data.clips import READERS, Clips
from .data.manifest import Labels
from .loop import Task, trained_model
from .objective import Objective, clip_logits

KINDS = {reader: kind for kind, reader in READERS.items()}


def make_task(training, held_out, objective: Objective) -> Task:
    parts = (training.fingerprint(), held_out.fingerprint(), asdict(objective))
    return Task(training, held_out, objective, objective.evaluate, f"{derive_seed(*parts):016x}", split=_split)


def _split(batch, parts: int) -> list:
    inputs, targets = batch
    found = []
    for rows in torch.arange(len(targets), device=targets.device).chunk(parts):
        micro = {name: tensor[rows] for name, tensor in inputs.items()}, targets[rows]
        found.append((micro, len(rows) / len(targets)))
    return found


def readers_of(config, *, sample_rate=16000, stride=2, fps=25.0) -> dict:
    """{modality: reader} with the inputs that an MBT of `config` takes: frames for three axes, a spectrogram for two.

    Raises InputError for a modality that nothing here reads.
    """
    readers = {}
    for modality in config.modalities:
        shape, name = modality.shape, modality.name
        if len(shape) == 3 and shape[1] == shape[2] and modality.channels == 3:
            readers[name] = READERS["video"](frames=shape[0], stride=stride, fps=fps, size=shape[1])
        elif len(shape) == 2:
            readers[name] = READERS["spectrogram"](
                seconds=shape[0] / 100, mels=shape[1], channels=modality.channels, sample_rate=sample_rate
            )
        else:
            raise InputError(
                f"modality {name!r} has inputs of shape {(*shape, modality.channels)}; allowed are (frames, size, size, 3) "
                f"and (time bins, mel bins, channels)"
            )
    return readers


def save_result(folder: Path, model, readers: dict, labels: Labels, history: list) -> None:
    """config.json, model.safetensors, task.json and learning-curve.png, each complete or not replaced at all."""
    model.save_pretrained(folder)
    described = {name: {"kind": KINDS[type(reader)], **asdict(reader)} for name, reader in readers.items()}
    task = {"readers": described, "labels": asdict(labels), "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    write_atomically(folder / "learning-curve.png", learning_curve(history, headline(history)))


def headline(history: list) -> str:
    """The metric by which a training is judged: the first one that its objective names."""
    return next(name for name in history[-1] if name not in ("epoch", "step", "loss"))


@torch.no_grad()
def predict(checkpoint, paths: dict, *, windows=4, device="cpu", backend="auto") -> list:
    """[(head, class name, probability), ...] for the clip {modality: path}, by the model left in the folder `checkpoint`.

    The most probable class of every head; of a multi-label task the five most probable classes. Modalities that the model
    knows may be missing, but for a Perceiver. The logits are the mean over `windows` windows. Raises InputError for what
    cannot be read.
    """
    checkpoint = Path(checkpoint)
    for name in ("config.json", "model.safetensors", TASK):
        if not (checkpoint / name).is_file():
            raise InputError(f"{checkpoint} has no {name}: it is not the --output of a finished training")
    task = read_json(checkpoint / TASK)
    try:
        labels = Labels(**task["labels"])
        described = {name: dict(fields) for name, fields in task["readers"].items()}
        readers = {name: READERS[fields.pop("kind")](**fields) for name, fields in described.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / TASK} does not describe a classification of clips: {error!r}") from error
    for name in paths:
        if name not in readers:
            raise InputError(f"--input has the modality {name!r}; allowed are {', '.join(readers)}")
    model = trained_model(checkpoint, device, backend)
    if (classes := num_classes(model.config)) != len(labels.names):
        raise InputError(f"{checkpoint} has {len(labels.names)} classes in {TASK} and {classes} in config.json")
    if isinstance(model, models.perceiver_io.PerceiverIO) and set(paths) != set(readers):
        raise InputError(f"--input has {', '.join(paths)}; this model needs all of {', '.join(readers)}")
    chosen = {name: readers[name] for name in paths}
    lengths = {name: reader.length(paths[name]) for name, reader in chosen.items()}
    clip = Clips([paths], [lengths], torch.zeros(1, len(labels.names)), chosen, windows=windows)
    logits = clip_logits(model, {name: tensor[None].to(device) for name, tensor in clip[None, 0][0].items()})[0].cpu()
    found = []
    for (head, names), part in zip(labels.heads.items(), logits.split(labels.splits), strict=True):
        probabilities = part.sigmoid() if labels.multi_label else part.softmax(-1)
        best = probabilities.topk(min(5, len(names)) if labels.multi_label else 1)
        found += [(head, names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return found


def comparison_picture(results: dict, clip: dict) -> bytes:
    """A PNG: held-out accuracy of every model by epoch and at the end, and one held-out clip.

    Args:
        results: {name: history}.
        clip: {"rgb": (frames, h, w, 3), "spectrogram": (time, mel, 3)}.
    """
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    curves, bars = top.subplots(1, 2)
    for name, history in results.items():
        curves.plot([row["epoch"] for row in history], [100 * row["accuracy"] for row in history], label=name)
    curves.set(xlabel="epoch", ylabel="held-out accuracy (%)")
    curves.legend()
    curves.grid(alpha=0.3)
    shown = bars.bar(list(results), [100 * history[-1]["accuracy"] for history in results.values()], color=["C0", "C1", "C2"])
    bars.bar_label(shown, fmt="%.1f")
    bars.set(ylabel="held-out accuracy (%)", ylim=(0, 105))
    frames = clip["rgb"]
    grid = bottom.add_gridspec(2, len(frames))
    for number, frame in enumerate(frames):
        axes = bottom.add_subplot(grid[0, number])
        axes.imshow(((frame + 1) / 2).clamp(0, 1).numpy())
        axes.set_axis_off()
    axes = bottom.add_subplot(grid[1, :])
    axes.imshow(clip["spectrogram"][..., 0].T.numpy(), origin="lower", aspect="auto")
    axes.set(xlabel="1/100 s", ylabel="mel")
    bottom.suptitle("a held-out clip as the models get it", fontsize="medium")
    return png(figure)
