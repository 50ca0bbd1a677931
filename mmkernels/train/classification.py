"""Image classification: the task, its result files, and predictions from them."""

import dataclasses
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch

from ..models.registry import InputError, read_json, require, write_atomically
from .data import derive_seed
from .data.images import Images, Preprocessing
from .loop import Task, split_by, trained_model
from .objective import mixed

TASK, CURVE = "task.json", "learning-curve.png"


@dataclasses.dataclass(frozen=True)
class MixedLoss:
    """Cross-entropy with label smoothing, of images that are mixed with others of the batch; call it with a model and a batch.

    With `mixup` and `cutmix` the first half of a batch gets the one and the second half the other. What is drawn comes from
    torch's generator, which a checkpoint holds.

    Args:
        classes: number of them.
        label_smoothing: s; targets are 1 - s + s / n where they were one, s / n where they were zero.
        mixup: alpha of Beta(alpha, alpha), from which the weight of an image and its partner is drawn (Zhang et al. 2018).
        cutmix: a box of a uniform share of the picture shows the partner instead (Yun et al. 2019).
    """

    classes: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: bool = False

    def __call__(self, model, batch) -> torch.Tensor:
        images, labels = batch
        targets = distribution(labels, self.classes)
        kinds = [kind for kind, wanted in ((self._mixup, self.mixup), (self._cutmix, self.cutmix)) if wanted]
        if kinds:
            parts = zip(kinds, images.chunk(len(kinds)), targets.chunk(len(kinds)), strict=False)
            images, targets = (torch.cat(found) for found in zip(*(kind(*part) for kind, *part in parts), strict=True))
        logits = model(images).float()
        return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _mixup(self, images, targets):
        weight = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        return mixed(images, weight), mixed(targets, weight)

    def _cutmix(self, images, targets):
        height, width = images.shape[1:3]
        share, row, column = torch.rand(3).tolist()
        rows, columns = (
            slice(max(round(place * n - side / 2), 0), max(min(round(place * n + side / 2), n), 0))
            for place, n, side in ((row, height, math.sqrt(share) * height), (column, width, math.sqrt(share) * width))
        )
        images, partners = images.clone(), images.flip(0)
        images[:, rows, columns] = partners[:, rows, columns]
        cut = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)  # a box may stick out
        return images, mixed(targets, 1 - cut)


def distribution(labels, classes: int) -> torch.Tensor:
    """Class numbers (B,), or ones and zeros (B, classes), as shares (B, classes) whose sum is 1 for every image."""
    if labels.dim() == 1:
        return torch.nn.functional.one_hot(labels, classes).float()
    return labels / labels.sum(-1, keepdim=True)


def make_task(training: Images, held_out: Images, loss: MixedLoss) -> Task:
    fingerprint = derive_seed(training.fingerprint(), held_out.fingerprint(), asdict(loss))
    split = split_by(lambda batch: len(batch[0]))
    return Task(training, held_out, loss, accuracy, f"{fingerprint:016x}", split=split)


def accuracy(model, batches) -> dict:
    """{"accuracy": share of images whose first answer is one of their labels, "held_out_loss": mean cross-entropy}."""
    right, count, loss = 0, 0, 0.0
    for inputs, labels in batches:
        logits = model(inputs).float()
        targets = distribution(labels, logits.shape[-1])
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right += (targets.gather(1, logits.argmax(-1, keepdim=True)) > 0).sum().item()
        count += len(labels)
    return {"accuracy": right / count, "held_out_loss": loss / count}


def save_result(folder: Path, model, preprocessing: Preprocessing, classes: list, history: list) -> None:
    """config.json, model.safetensors, task.json and learning-curve.png, each complete or not replaced at all."""
    model.save_pretrained(folder)
    task = {"classes": classes, "preprocessing": asdict(preprocessing), "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    write_atomically(folder / CURVE, learning_curve(history))


def learning_curve(history: list, metric="accuracy") -> bytes:
    """A PNG: training and held-out loss, and a metric of the held-out data, by epoch."""
    figure_class = require("matplotlib.figure", "train").Figure  # no pyplot: no display is looked for
    figure = figure_class(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    by = "epoch" if "epoch" in history[-1] else "step"
    numbers = draw_losses(left, history, by, "cross-entropy")
    right.plot(numbers, [100 * row[metric] for row in history], ".-")
    right.set(xlabel=by, ylabel=f"held-out {metric} (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def draw_losses(axes, history: list, by: str, what: str) -> list:
    """Training and held-out loss by "epoch" or "step", whose numbers it returns; `what` names the loss."""
    numbers = [row[by] for row in history]
    axes.plot(numbers, [row["loss"] for row in history], ".-", label="training")
    axes.plot(numbers, [row["held_out_loss"] for row in history], ".-", label="held out")
    axes.set(xlabel=by, ylabel=what, yscale="log")
    axes.legend()
    return numbers


def png(figure) -> bytes:
    """A matplotlib figure as the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _image_shape(config) -> tuple:
    """(height, width, channels) of what a Perceiver or a Perceiver IO reads."""
    if isinstance(getattr(config, "input", None), dict):
        return *config.input.get("shape", ()), config.input.get("channels", 3)
    return *config.input_shape, config.input_channels


def num_classes(config) -> int:
    """Of a model of any kind."""
    return config.output.get("num_classes") if isinstance(getattr(config, "output", None), dict) else config.num_classes


@torch.no_grad()
def predict(checkpoint, paths, *, device="cpu", backend="auto") -> list:
    """[(path, class name, probability)] for image files, by the model that a training left in the folder `checkpoint`.

    Raises InputError for a folder without a finished training, and for a file that is no image; all files are read first.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not a folder; it must be the --output of a finished training")
    for name in ("config.json", "model.safetensors", TASK):
        if not (checkpoint / name).is_file():
            raise InputError(f"{checkpoint} has no {name}: it is not the --output of a finished training")
    task = read_json(checkpoint / TASK)
    try:
        classes, preprocessing = [str(name) for name in task["classes"]], Preprocessing(**task["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / TASK} does not describe an image classification: {error!r}") from error
    model = trained_model(checkpoint, device, backend)
    wanted = (*_image_shape(model.config), num_classes(model.config))
    if (preprocessing.size, preprocessing.size, len(preprocessing.mean), len(classes)) != wanted:
        raise InputError(
            f"{checkpoint} was not written by one training: {TASK} has {len(classes)} classes and images of "
            f"{preprocessing.size} x {preprocessing.size} x {len(preprocessing.mean)}, config.json has {wanted[-1]} classes "
            f"and images of {' x '.join(map(str, wanted[:-1]))}"
        )
    inputs = [preprocessing.finish(preprocessing.read(path)) for path in paths]
    results = []
    for path, image in zip(paths, inputs, strict=True):
        probability, label = model(image[None].to(device)).float().softmax(-1)[0].max(-1)
        results.append((path, classes[int(label)], float(probability)))
    return results
