"""Optical flow: the task, inference in tiles, result files and pictures, and predictions from them."""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from ..models.registry import InputError, read_json, require, write_atomically
from .classification import CURVE, TASK, draw_losses, png
from .data import derive_seed, flow_files, flow_pairs
from .loop import Task, split_by, trained_model

PIXELS = 20.0  # that one of a model's output stands for, as in the released demo
PICTURE = "flow.png"


class EndpointError:
    """The loss, and the metrics: |predicted - true flow| in pixels, the mean over all pixels whose flow is known.

    Args:
        points: a step asks for so many pixels of the batch, drawn from torch's generator, which a checkpoint holds; None: all.
    """

    def __init__(self, points=None):
        self.points = points

    def __call__(self, model, batch) -> torch.Tensor:
        flow, valid = batch["flow"].flatten(1, 2), batch["valid"].flatten(1)
        points = None
        if self.points is not None and self.points < flow.shape[1]:
            points = torch.randperm(flow.shape[1])[: self.points].to(flow.device)
            flow, valid = flow[:, points], valid[:, points]
        predicted = PIXELS * model(batch["frames"], points=points).view(flow.shape).float()
        errors = (predicted - flow).norm(dim=-1)
        return errors.where(valid, 0.0).sum() / valid.sum().clamp(min=1)

    def evaluate(self, model, batches) -> dict:
        """{"epe", "zero_epe", "outliers", "held_out_loss"}: the mean error, that of no motion at all, and KITTI's share of
        pixels that are wrong by more than 3 pixels and a twentieth of their motion."""
        total, zero, outliers, count = 0.0, 0.0, 0, 0
        for batch in batches:
            flow, valid = batch["flow"], batch["valid"]
            error = (PIXELS * model(batch["frames"]).float() - flow).norm(dim=-1)[valid]
            length = flow.norm(dim=-1)[valid]
            total, zero, count = total + error.sum().item(), zero + length.sum().item(), count + len(error)
            outliers += ((error > 3) & (error > 0.05 * length)).sum().item()
        count = max(count, 1)
        return {"epe": total / count, "zero_epe": zero / count, "outliers": outliers / count, "held_out_loss": total / count}


def make_task(training, held_out, points=None) -> Task:
    objective = EndpointError(points)
    fingerprint = derive_seed(training.fingerprint(), held_out.fingerprint(), points)
    split = split_by(lambda batch: batch["valid"].sum())
    return Task(training, held_out, objective, objective.evaluate, f"{fingerprint:016x}", split=split)


# --- Inference in tiles ------------------------------------------------------------------------------------------------------


def tile_starts(length: int, tile: int, overlap: int) -> list:
    """Where tiles begin that cover `length`, each over its neighbour by `overlap` or, the last one, by more."""
    if not 0 <= overlap < tile:
        raise InputError(f"overlap is {overlap}; it must be 0 or more, and below the size of a tile, {tile}")
    return [*range(0, length - tile, tile - overlap), length - tile]


def edge_weights(height: int, width: int) -> torch.Tensor:
    """(height, width): the distance to the nearest edge, 1 in the middle and the least, not zero, at the edge."""
    y, x = (torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)) for n in (height, width))
    weights = torch.minimum(y[:, None], x).float()
    return weights / weights.max()


@torch.no_grad()
def tiled_flow(model, frames, *, overlap=None, batch_size=1, progress=True) -> torch.Tensor:
    """The flow (H, W, 2) in pixels between two frames (2, H, W, 3) in [-1, 1] of any size.

    Tiles of the size that the model was trained on, blended by their distance to the tiles' edges, as in the released demo.
    Smaller frames are continued by their border.

    Args:
        overlap: pixels that tiles share with their neighbours; default 20, or what a smaller tile allows.
        batch_size: tiles that the model is given at once.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
    tqdm = require("tqdm", "train").tqdm
    tile = tuple(model.config.input["shape"])
    height, width = frames.shape[1:3]
    more = [max(n - found, 0) for n, found in zip(tile, (height, width), strict=True)]
    padded = F.pad(frames.permute(0, 3, 1, 2), (0, more[1], 0, more[0]), mode="replicate").permute(0, 2, 3, 1)
    rows, columns = (
        tile_starts(n, t, min(20, t - 1) if overlap is None else overlap) for n, t in zip(padded.shape[1:3], tile, strict=True)
    )
    corners = [(top, left) for top in rows for left in columns]
    weights = edge_weights(*tile)[..., None]
    device = next(model.parameters()).device
    total = torch.zeros(*padded.shape[1:3], 3)  # weighted flow, and the weights
    chunks = [corners[i : i + batch_size] for i in range(0, len(corners), batch_size)]
    for chunk in tqdm(chunks, desc="tiles", leave=False, delay=1.0, dynamic_ncols=True, disable=not progress):
        cut = torch.stack([padded[:, top : top + tile[0], left : left + tile[1]] for top, left in chunk])
        found = PIXELS * model(cut.to(device)).float().cpu()
        for (top, left), flow in zip(chunk, found, strict=True):
            total[top : top + tile[0], left : left + tile[1]] += torch.cat([flow * weights, weights], -1)
    return (total[..., :2] / total[..., 2:])[:height, :width]


# --- Results -----------------------------------------------------------------------------------------------------------------


def save_result(folder: Path, model, held_out, history: list, *, rows=5) -> None:
    """config.json, model.safetensors, task.json, learning-curve.png and flow.png of the first held-out pairs."""
    model.save_pretrained(folder)
    task = {"kind": "flow", "pixels": PIXELS, "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    figure = require("matplotlib.figure", "train").Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = draw_losses(left, history, "epoch" if "epoch" in history[-1] else "step", "endpoint error (pixels)")
    right.plot(numbers, [100 * row["epe"] / row["zero_epe"] for row in history], ".-")
    right.set(xlabel=left.get_xlabel(), ylabel="held-out error, % of no motion's", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_atomically(folder / CURVE, png(figure))
    write_atomically(folder / PICTURE, picture(model, [held_out[None, i] for i in range(min(rows, len(held_out)))]))


@torch.no_grad()
def picture(model, items: list) -> bytes:
    """A PNG: a row a pair, both frames, the true flow, the predicted one, and how far they are apart."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(11, 1.6 * len(items) + 0.4), layout="constrained")
    grid = figure.subplots(len(items), 5, squeeze=False)
    device = next(model.parameters()).device
    for row, item in zip(grid, items, strict=True):
        predicted = PIXELS * model(item["frames"][None].to(device))[0].float().cpu()
        largest = float(item["flow"].norm(dim=-1).max())
        error = (predicted - item["flow"]).norm(dim=-1).where(item["valid"], 0.0)
        first, second = ((frame + 1) / 2 for frame in item["frames"])
        flows = [flow_files.colors(flow, largest) for flow in (item["flow"], predicted)]
        for axes, shown in zip(row, (first, second, *flows, error), strict=True):
            options = {"vmin": 0, "vmax": max(largest, 1e-6), "cmap": "magma"} if shown.dim() == 2 else {}
            axes.imshow(shown.clamp(0, 1).numpy() if shown is first or shown is second else shown.numpy(), **options)
            axes.set_axis_off()
        row[4].set_title(f"{error.sum() / item['valid'].sum().clamp(min=1):.2f} of {largest:.1f} px", fontsize="small")
    for axes, title in zip(grid[0], ("first frame", "second frame", "true flow", "predicted flow"), strict=False):
        axes.set_title(title, fontsize="small")
    return png(figure)


def load(checkpoint, *, device="cpu", backend="auto"):
    """The model of optical flow in the folder `checkpoint`, of a training or converted from released weights.

    Raises InputError for another model, and for a training whose outputs stand for other lengths.
    """
    path = Path(checkpoint) / TASK
    if path.is_file() and (pixels := read_json(path).get("pixels")) != PIXELS:
        raise InputError(f"{path} has outputs in units of {pixels!r} pixels; allowed is {PIXELS:g}")
    return trained_model(checkpoint, device, backend)


def predict(model, first, second, **options) -> torch.Tensor:
    """`tiled_flow` of two image files; raises InputError where they are no images or not of one size."""
    frames = [flow_pairs.read_frame(path) for path in (first, second)]
    if frames[0].shape != frames[1].shape:
        sizes = [f"{frame.shape[0]} x {frame.shape[1]}" for frame in frames]
        raise InputError(f"{second} has {sizes[1]} pixels, {first} has {sizes[0]}; both frames must have one size")
    return tiled_flow(model, torch.stack(frames), **options)
