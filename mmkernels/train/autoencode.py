"""Autoencoding of video, sound and label (Jaegle et al. 2022, section 4.3): the task, result files, pictures, predictions.

A model reads pixels, samples and a one-hot label through one bottleneck of latents and gives all of them back. What it is
trained on is a random part of the outputs; where the label is masked at the input, giving it back is classification.
"""

import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from ..models.registry import InputError, read_json, require, write_atomically
from .classification import CURVE, TASK, draw_losses, png
from .data import derive_seed
from .data.clips import READERS, Video, Waveform
from .data.media import write_video, write_wav
from .loop import Task, split_by, trained_model

IMAGE, AUDIO, LABEL = "image", "audio", "label"
RANGE = 2.0  # of pixels and of samples, both in [-1, 1]
PICTURE = "reconstruction.png"


class Autoencoded(torch.utils.data.Dataset):
    """(epoch, index) -> {"image": (T, H, W, 3), "audio": (samples,), "label": (classes,)}.

    Args:
        clips: (epoch, index) -> ({modality: tensor}, targets), as `Clips` or `DigitClips`, one window of held-out clips.
        names: {its modality: "image" or "audio"}.
    """

    def __init__(self, clips, names: dict):
        self.clips, self.names = clips, names

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        inputs, label = self.clips[key]
        inputs = {self.names[name]: tensor if key[0] is not None else tensor[0] for name, tensor in inputs.items()}
        return {**inputs, LABEL: label}

    def fingerprint(self) -> int:
        return derive_seed(self.clips.fingerprint(), self.names)


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """The loss and the metrics; the defaults are the paper's.

    Args:
        image, audio, label: weights of the mean errors of pixels and samples, and of the label's cross-entropy.
        points: outputs that a step asks for, of pixels and of patches of sound each.
        masked: how often the label is hidden from the model in training; it always is on held-out clips.
        patch: samples of sound of an output.
        audio_error: "absolute", or "squared". The least absolute error of a sample that is not known is that of silence, and a
            model has to know most of it to do better; the squared error falls with anything that it knows.
    """

    image: float = 0.03
    audio: float = 1.0
    label: float = 1e-4
    points: int = 512
    masked: float = 0.5
    patch: int = 16
    audio_error: str = "absolute"

    def __call__(self, model, batch) -> torch.Tensor:
        """The outputs and the masks are drawn from torch's generator, which a checkpoint holds."""
        targets = self.targets(batch)
        device = batch[LABEL].device
        points = {name: torch.randperm(t.shape[1])[: self.points].to(device) for name, t in targets.items()}
        hidden = torch.rand(len(batch[LABEL]), 1) < self.masked
        found = model(batch, masks={LABEL: hidden.to(device)}, points=points)
        loss = self.label * F.cross_entropy(found[LABEL].float(), batch[LABEL])
        for name, weight in ((IMAGE, self.image), (AUDIO, self.audio)):
            target = targets[name][:, points[name]]
            loss = loss + weight * self._error(name, found[name].float().view(target.shape) - target).mean()
        return loss

    def _error(self, name, difference):
        return difference.square() if name == AUDIO and self.audio_error == "squared" else difference.abs()

    def targets(self, batch) -> dict:
        """{"image": (B, pixels, 3), "audio": (B, patches, samples)}."""
        return {IMAGE: batch[IMAGE].flatten(1, -2), AUDIO: batch[AUDIO].unflatten(1, (-1, self.patch))}

    def evaluate(self, model, batches) -> dict:
        """Of held-out clips whose label is hidden: "accuracy" and "top5", "image_psnr" and "audio_psnr" in dB (see `psnr`),
        the mean of the clips, the loss without sub-sampling, and the PSNR of the clip's own mean ("mean_image_psnr", ...)."""
        sums, count = {}, 0
        for batch in batches:
            found = model.reconstruct(batch, masks=hidden_label(batch))
            label = batch[LABEL].argmax(-1)
            logits = found[LABEL].float()
            best = logits.topk(min(5, logits.shape[-1])).indices == label[:, None]
            values = {"accuracy": best[:, 0].float(), "top5": best.any(-1).float()}
            loss = self.label * F.cross_entropy(logits, label, reduction="none")
            for name, weight in ((IMAGE, self.image), (AUDIO, self.audio)):
                truth = batch[name].flatten(1)
                given = found[name].float().view(truth.shape)
                loss = loss + weight * self._error(name, given - truth).mean(-1)
                values[f"{name}_psnr"] = psnr(given, truth)
                values[f"mean_{name}_psnr"] = psnr(truth.mean(-1, keepdim=True), truth)
            for name, value in {**values, "held_out_loss": loss}.items():
                sums[name] = sums.get(name, 0.0) + value.sum().item()
            count += len(label)
        return {name: value / count for name, value in sums.items()}


def psnr(found, truth) -> torch.Tensor:
    """(B, n) twice -> (B,): 10 log10(range^2 / mean squared error) in dB, the range of pixels and samples being 2.

    A clip that is met exactly has the 120 dB of an error of a millionth of the range.
    """
    return -10 * ((found - truth).square().mean(-1) / RANGE**2).clamp(min=1e-12).log10()


def hidden_label(batch) -> dict:
    """The masks with which a model does not see the label."""
    return {LABEL: torch.ones(len(batch[IMAGE]), 1, dtype=torch.bool, device=batch[IMAGE].device)}


def make_task(training, held_out, objective: Autoencoding) -> Task:
    parts = (training.fingerprint(), held_out.fingerprint(), dataclasses.asdict(objective))
    split = split_by(lambda batch: len(batch[LABEL]))
    return Task(training, held_out, objective, objective.evaluate, f"{derive_seed(*parts):016x}", split=split)


def readers_of(config, *, sample_rate: int, stride: int, fps: float) -> dict:
    """{"image": Video, "audio": Waveform} with the inputs of a model of `config`; raises InputError where it has others."""
    try:
        shapes = {name: tuple(config.input["modalities"][name]["shape"]) for name in (IMAGE, AUDIO)}
        classes = config.input["modalities"][LABEL]["channels"]
        frames, height, width = shapes[IMAGE]
        (samples,) = shapes[AUDIO]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the config is no autoencoder of {IMAGE} (time, height, width), {AUDIO} and {LABEL}: {error!r}"
        ) from error
    if height != width or classes < 2:
        raise InputError(
            f"the config has frames of {height} x {width} and {classes} classes; allowed are squares and 2 or more"
        )
    return {
        IMAGE: Video(frames=frames, stride=stride, fps=fps, size=height),
        AUDIO: Waveform(samples=samples, sample_rate=sample_rate),
    }


def with_classes(config, count: int):
    """`config` with labels of `count` classes, in and out."""
    parts = {part: copy.deepcopy(getattr(config, part)) for part in ("input", "output")}
    parts["input"]["modalities"][LABEL]["channels"] = count
    parts["output"]["modalities"][LABEL]["num_classes"] = count
    return dataclasses.replace(config, **parts)


def check_shape(config, name: str, shape) -> None:
    """Raises InputError where the clips have another shape than the input of the config."""
    wanted = config.input["modalities"][name]["shape"]
    if list(shape)[: len(wanted)] != list(wanted):
        raise InputError(f"--config reads {name} of shape {tuple(wanted)}; these clips have {tuple(shape)}")


# --- Results -----------------------------------------------------------------------------------------------------------------


def save_result(folder: Path, model, readers: dict, classes: list, held_out, history: list) -> None:
    """config.json, model.safetensors, task.json, learning-curve.png and reconstruction.png of some held-out clips."""
    model.save_pretrained(folder)
    kinds = {reader: kind for kind, reader in READERS.items()}
    described = {name: {"kind": kinds[type(reader)], **dataclasses.asdict(reader)} for name, reader in readers.items()}
    task = {"kind": "autoencoding", "readers": described, "classes": classes, "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    figure = require("matplotlib.figure", "train").Figure(figsize=(11, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    by = "epoch" if "epoch" in history[-1] else "step"
    numbers = draw_losses(left, history, by, "loss")
    middle.plot(numbers, [100 * row["accuracy"] for row in history], ".-")
    middle.set(xlabel=by, ylabel="held out, label hidden: accuracy (%)")
    for name in (IMAGE, AUDIO):
        (line,) = right.plot(numbers, [row[f"{name}_psnr"] for row in history], ".-", label=name)
        right.plot(numbers, [row[f"mean_{name}_psnr"] for row in history], ":", color=line.get_color(), label="its mean")
    right.set(xlabel=by, ylabel="held-out PSNR (dB)")
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    write_atomically(folder / CURVE, png(figure))
    items = [held_out[None, round(i * (len(held_out) - 1) / 2)] for i in range(min(3, len(held_out)))]
    device = next(model.parameters()).device
    batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
    found = {name: tensor.float().cpu() for name, tensor in model.reconstruct(batch, masks=hidden_label(batch)).items()}
    write_atomically(folder / PICTURE, picture(items, found, classes))


def table(row: dict, classes: int) -> str:
    """The last metrics of the held-out clips beside what knows nothing of them."""
    lines = [f"{'held out, label hidden':<24}{'model':>10}{'baseline':>12}"]
    for name in (IMAGE, AUDIO):
        lines.append(f"{'PSNR of ' + name:<24}{row[f'{name}_psnr']:>7.2f} dB{row[f'mean_{name}_psnr']:>9.2f} dB  its own mean")
    lines.append(f"{'label':<24}{row['accuracy']:>10.1%}{1 / classes:>12.1%}  chance")
    return "\n".join(lines)


def picture(items: list, found: dict, classes: list, frames=8) -> bytes:
    """A PNG: for each clip its frames above those of the reconstruction, both sounds, and what label it got."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(frames + 5, 2.3 * len(items)), layout="constrained")
    grid = figure.add_gridspec(2 * len(items), frames + 5)
    for number, item in enumerate(items):
        truth = item[IMAGE]
        given = found[IMAGE][number].view(truth.shape)
        shown = [round(i * (len(truth) - 1) / max(frames - 1, 1)) for i in range(min(frames, len(truth)))]
        for row, video in enumerate((truth, given)):
            for column, frame in enumerate(shown):
                axes = figure.add_subplot(grid[2 * number + row, column])
                axes.imshow(((video[frame] + 1) / 2).clamp(0, 1).numpy())
                axes.set_axis_off()
        axes = figure.add_subplot(grid[2 * number : 2 * number + 2, frames:])
        axes.plot(item[AUDIO].numpy(), lw=0.5, label="sound")
        axes.plot(found[AUDIO][number].view(-1).numpy(), lw=0.5, label="given back")
        axes.legend(fontsize="x-small", loc="upper right")
        chances = found[LABEL][number].softmax(-1)
        axes.set_title(
            f"{classes[int(item[LABEL].argmax())]} taken for {classes[int(chances.argmax())]} ({chances.max():.0%})"
            if item[LABEL].any()
            else f"{classes[int(chances.argmax())]} ({chances.max():.0%})",
            fontsize="small",
        )
    figure.suptitle("above: clips as the model reads them, below: as it gives them back", fontsize="medium")
    return png(figure)


@torch.no_grad()
def predict(checkpoint, paths: dict, output: Path, *, progress=True, device="cpu", backend="auto") -> list:
    """Reconstructs the clip {"image": path, "audio": path} by the model in the folder `checkpoint`, its label hidden.

    Writes reconstruction.png, image.mp4 and audio.wav into `output`; returns [(class name, probability), ...], the five most
    probable first. A video with sound may stand for both. Raises InputError for what cannot be read.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    task = read_json(checkpoint / TASK)
    try:
        classes = [str(name) for name in task["classes"]]
        described = {name: dict(fields) for name, fields in task["readers"].items()}
        readers = {name: READERS[fields.pop("kind")](**fields) for name, fields in described.items()}
        video, sound = readers[IMAGE], readers[AUDIO]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / TASK} does not describe an autoencoding: {error!r}") from error
    if set(paths) != set(readers):
        raise InputError(f"--input has {', '.join(sorted(paths)) or 'nothing'}; it must have {AUDIO}=FILE and {IMAGE}=FILE")
    model = trained_model(checkpoint, device, backend)
    # The middle of the clip, as held-out ones are read.
    starts = {name: max(reader.length(paths[name]) - reader.seconds, 0.0) / 2 for name, reader in readers.items()}
    item = {name: reader.read(paths[name], starts[name]) for name, reader in readers.items()}
    item[LABEL] = torch.zeros(len(classes))
    batch = {name: tensor[None].to(device) for name, tensor in item.items()}
    tqdm = require("tqdm", "train").tqdm if progress else None
    found = model.reconstruct(batch, masks=hidden_label(batch), progress=tqdm)
    found = {name: tensor.float().cpu() for name, tensor in found.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / PICTURE, picture([item], found, classes))
    frames = found[IMAGE][0].view(item[IMAGE].shape)
    write_video(output / "image.mp4", ((frames + 1) * 127.5).round().clamp(0, 255).byte(), video.fps / video.stride)
    write_wav(output / "audio.wav", found[AUDIO][0].view(-1).clamp(-1, 1), sound.sample_rate)
    best = found[LABEL][0].softmax(-1).topk(min(5, len(classes)))
    return [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
