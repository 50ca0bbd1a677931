"""The objective of MBT's recipe: mixup, label smoothing, softmax or sigmoid cross-entropy per modality, and its metrics."""

import dataclasses

import torch
from torch.nn import functional as F

from ..models.registry import require


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss (call it with a model and a batch) and the metrics that belong to it.

    Args:
        splits: numbers of classes; one softmax over each part of the logits (Epic-Kitchens: 97 verbs, 300 nouns).
        multi_label: a sigmoid per class instead.
        label_smoothing: s; targets are 1 - s + s / n where they were one, s / n where they were zero.
        mixup: alpha of the Beta distribution that the weight of an example and its partner is drawn from; 0: none.
        mixmod: a weight of its own for every modality.
        dropped: {modality: how often an example is trained on with zeros in its place}.
    """

    splits: tuple
    multi_label: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    mixmod: bool = False
    dropped: dict = dataclasses.field(default_factory=dict)

    def __call__(self, model, batch) -> torch.Tensor:
        """The mean over modalities, where the model gives logits for each, of the mean over examples."""
        inputs, targets = batch
        inputs = {name: _dropped(tensor, self.dropped.get(name, 0.0)) for name, tensor in inputs.items()}
        weights = dict.fromkeys(inputs, 1.0)
        if self.mixup:
            inputs, weights = mix(inputs, self.mixup, self.mixmod)
        logits = model(inputs)
        if not isinstance(logits, dict):
            if len(set(weights.values())) > 1:
                raise ValueError("mixmod needs a model with logits of its own for every modality (classifier 'token')")
            logits = dict.fromkeys(list(inputs)[:1], logits)
        losses = [self.loss(part, mixed(targets, weights[name])) for name, part in logits.items()]
        return torch.stack(losses).mean()

    def loss(self, logits, targets) -> torch.Tensor:
        """(B, classes) twice -> a number: summed over classes, mean over examples (and over the splits)."""
        losses = []
        for part, target in zip(logits.float().split(self.splits, -1), targets.split(self.splits, -1), strict=True):
            target = (1 - self.label_smoothing) * target + self.label_smoothing / part.shape[-1]
            if self.multi_label:
                losses.append(F.binary_cross_entropy_with_logits(part, target, reduction="none").sum(-1).mean())
            else:
                losses.append(F.cross_entropy(part, target))
        return torch.stack(losses).mean()

    def evaluate(self, model, batches) -> dict:
        """Metrics by name, the first one being the headline; logits are averaged over the windows of a clip.

        multi-label: "map", the mean over the classes with examples of the average precision. One head: "accuracy" and
        "top5". Several: "accuracy", where all are right, and "accuracy_<number>" of each. Always "held_out_loss".
        """
        metrics = require("sklearn.metrics", "train")
        logits, targets = [], []
        for inputs, target in batches:
            logits.append(clip_logits(model, inputs).cpu())
            targets.append(target.cpu())
        logits, targets = torch.cat(logits), torch.cat(targets)
        plain = dataclasses.replace(self, label_smoothing=0.0)
        loss = {"held_out_loss": plain.loss(logits, targets).item()}
        if self.multi_label:
            some = targets.any(0)
            return {"map": float(metrics.average_precision_score(targets[:, some], logits[:, some])), **loss}
        found = {}
        right = torch.ones(len(logits), dtype=torch.bool)
        for number, (part, target) in enumerate(
            zip(logits.split(self.splits, -1), targets.split(self.splits, -1), strict=True)
        ):
            label, classes = target.argmax(-1), part.shape[-1]
            right &= part.argmax(-1) == label
            suffix = f"_{number}" if len(self.splits) > 1 else ""
            found[f"accuracy{suffix}"] = float(metrics.accuracy_score(label, part.argmax(-1)))
            if classes > 5:
                top = metrics.top_k_accuracy_score(label, part.numpy(), k=5, labels=range(classes))
                found[f"top5{suffix}"] = float(top)
        if len(self.splits) > 1:
            found = {"accuracy": right.float().mean().item(), **found}
        return {**found, **loss}


def clip_logits(model, inputs: dict) -> torch.Tensor:
    """{modality: (B, windows, ...)} -> (B, classes), the mean over the windows."""
    batch, windows = next(iter(inputs.values())).shape[:2]
    logits = model({name: tensor.flatten(0, 1) for name, tensor in inputs.items()}).float()
    return logits.view(batch, windows, -1).mean(1)


def mix(inputs: dict, alpha: float, separate: bool) -> tuple:
    """(mixed inputs, {modality: weight}): every example with the one as far from the batch's end as it is from its start.

    One weight from Beta(alpha, alpha) for the whole batch, or (`separate`) one per modality; from torch's global generator,
    which a checkpoint holds.
    """
    draws = torch.distributions.Beta(alpha, alpha).sample((len(inputs) if separate else 1,)).tolist()
    weights = dict(zip(inputs, draws if separate else draws * len(inputs), strict=True))
    return {name: mixed(tensor, weights[name]) for name, tensor in inputs.items()}, weights


def _dropped(tensor, probability: float):
    """(B, ...) with zeros for some of the examples."""
    if not probability:
        return tensor
    kept = (torch.rand(len(tensor)) >= probability).to(tensor)
    return tensor * kept.view(-1, *[1] * (tensor.dim() - 1))


def mixed(tensor, weight: float):
    """weight * tensor + (1 - weight) * the tensor in the opposite order."""
    return tensor if weight == 1.0 else torch.lerp(tensor.flip(0), tensor, weight)
