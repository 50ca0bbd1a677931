"""Text to text: the task of a mixture, evaluation by generation, result files, and predictions from them."""

import collections
import json
from pathlib import Path

import torch

from ..models.registry import InputError, read_json, require, write_atomically
from . import text_metrics, tokenizer
from .classification import CURVE, TASK, draw_losses, png
from .data import derive_seed
from .data.text import Mixture, Texts, pad, rates
from .loop import Task, best_row, load_best, trained_model

AVERAGE = "average"


def make_task(tasks: dict, tokens, *, batch_size, seed, max_input=512, max_target=62, dev_limit=None, **mixing) -> Task:
    """Training on a mixture of `tasks`, {name: TextTask}, judged by the average over their dev splits.

    Args:
        tokens: the tokenizer.
        batch_size, seed: of the mixture's batches.
        max_input, max_target: tokens, the end token included, that texts are cut to.
        dev_limit: evaluate on so many examples of a task, spread over its dev split; default all.
        mixing: `mixing`, `limit` and `temperature`, see `data.text.rates`.
    """
    trained = [task for task in tasks.values() if task.training]
    sizes = [len(task.training) for task in trained]
    mixture = Mixture(sizes, rates(sizes, **mixing), batch_size, seed)
    training = Texts([example for task in trained for example in task.training], tokens, max_input, max_target)
    dev = [(task, example) for task in tasks.values() for example in spread(task.dev, dev_limit)]
    dev.sort(key=lambda pair: min(len(tokens.encode(pair[1].input)), max_input))  # batches of like lengths, and little padding
    held_out = Texts([example for _, example in dev], tokens, max_input, max_target)
    objective = Generation([task.name for task, _ in dev], held_out, tasks, batch_size)
    fingerprint = derive_seed(training.fingerprint(), held_out.fingerprint(), sizes, sorted(mixing.items()))
    return Task(
        training,
        held_out,
        loss,
        objective.evaluate,
        f"{fingerprint:016x}",
        draw=mixture.batches,
        split=split,
        headline=AVERAGE,
    )


def spread(examples, limit):
    """`limit` of the examples at even distances. Groups, which are neighbours, are cut: a quick look and no benchmark."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i * len(examples) // limit] for i in range(limit)]


def loss(model, batch) -> torch.Tensor:
    """The mean cross-entropy of the targets' tokens."""
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss


def split(batch: dict, parts: int) -> list:
    """[(micro-batch, its share of the batch's labels)], each as narrow as its own texts."""
    counted = batch["labels"] >= 0
    found = []
    for rows in torch.arange(len(counted), device=counted.device).chunk(parts):
        width = int(batch["attention_mask"][rows].sum(1).max())
        length = int(counted[rows].sum(1).max())
        micro = {name: tensor[rows] for name, tensor in batch.items()}
        micro |= {name: micro[name][:, :width] for name in ("input_ids", "attention_mask")}
        micro["labels"] = micro["labels"][:, :length]
        found.append((micro, int(counted[rows].sum()) / int(counted.sum())))
    return found


class Generation:
    """Greedy texts for a dev split of several tasks, and what their metrics make of them."""

    def __init__(self, owners: list, held_out: Texts, tasks: dict, batch_size: int):
        self.owners, self.held_out, self.tasks, self.batch_size = owners, held_out, tasks, batch_size
        targets = {example.target for task in tasks.values() for example in (*task.training, *task.dev)}
        longest = max(len(held_out.tokenizer.encode(target)) for target in targets) + 1
        # One more than any target has: a text that does not end where it should is then seen to go on.
        self.max_new_tokens = min(longest + 1, held_out.max_target)

    def evaluate(self, model, batches) -> dict:
        """The average over the tasks of the means of their metrics, the same of each benchmark, all metrics, and the loss."""
        tqdm = require("tqdm", "train").tqdm
        texts = [None] * len(self.held_out)
        total, counted = 0.0, 0
        size = -(-len(self.held_out) // self.batch_size)
        for batch in tqdm(batches, total=size, desc="generating", leave=False, mininterval=1.0, dynamic_ncols=True):
            labels = (batch["labels"] >= 0).sum().item()
            total, counted = total + loss(model, batch).item() * labels, counted + labels
            ids = model.generate(
                batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=self.max_new_tokens
            )
            for number, row in zip(batch["number"].tolist(), ids[:, 1:].tolist(), strict=True):
                texts[number] = self.held_out.tokenizer.decode(row)
        return {**self.score(texts), "held_out_loss": total / counted}

    def score(self, texts: list) -> dict:
        """The metrics of a text for each example."""
        return score(texts, self.owners, self.held_out.examples, self.tasks)


def score(texts: list, owners: list, examples: list, tasks: dict) -> dict:
    """Metrics of what was said of each of `examples`, which belong to the tasks `owners` name, and their averages."""
    values, means = {}, {}
    for name, task in tasks.items():
        mine = [i for i, owner in enumerate(owners) if owner == name]
        found = text_metrics.evaluate(task.metrics, [texts[i] for i in mine], [examples[i] for i in mine])
        values |= {f"{name}/{metric}": value for metric, value in found.items()}
        means[name] = sum(found.values()) / len(found)
    averages = {AVERAGE: sum(means.values()) / len(means)}
    for benchmark in ("GLUE", "SuperGLUE"):
        mine = [means[name] for name, task in tasks.items() if task.benchmark == benchmark]
        if mine:
            averages[benchmark] = sum(mine) / len(mine)
    return {**averages, **values}


def majority(tasks: dict) -> dict:
    """{task: metrics} of always saying the target that its training split has most often."""
    found = {}
    for name, task in tasks.items():
        counts = collections.Counter(example.target for example in task.training or task.dev)
        most = max(sorted(counts), key=counts.get)
        found[name] = text_metrics.evaluate(task.metrics, [most] * len(task.dev), task.dev)
    return found


# --- Results -----------------------------------------------------------------------------------------------------------------


def save_result(folder: Path, model, tokens, tasks: dict, history: list, *, max_input: int, max_target: int) -> dict:
    """The best model, config.json, its tokenizer, task.json and learning-curve.png; returns the best row of the history."""
    load_best(folder, model)
    model.save_pretrained(folder)
    tokenizer.save(tokens, folder)
    best = best_row(history, AVERAGE)
    names = {name: list(task.metrics) for name, task in tasks.items()}
    task = {"kind": "text", "tasks": names, "max_input": max_input, "max_target": max_target, "best": best, "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    write_atomically(folder / CURVE, learning_curve(history))
    return best


def table(row: dict) -> str:
    """The metrics of a row of the history, one task a line."""
    lines = []
    for name in dict.fromkeys(key.partition("/")[0] for key in row if "/" in key):
        shown = "  ".join(f"{metric} {value:.2%}" for metric, value in metrics_of(row, name).items())
        lines.append(f"{name:<16}{shown}")
    for name in ("GLUE", "SuperGLUE", AVERAGE):
        if name in row:
            lines.append(f"{name:<16}{row[name]:.2%}")
    return "\n".join(lines)


def learning_curve(history: list, loss="cross-entropy of a token") -> bytes:
    """A PNG: training and held-out loss by step, and the mean of every task's metrics with their average."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = draw_losses(left, history, "step", loss)
    for name in dict.fromkeys(key.partition("/")[0] for key in history[-1] if "/" in key):
        right.plot(steps, [100 * mean_of(row, name) for row in history], lw=0.8, label=name)
    right.plot(steps, [100 * row[AVERAGE] for row in history], "k.-", lw=2, label=AVERAGE)
    right.set(xlabel="step", ylabel="held out (%)")
    right.legend(fontsize="x-small", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return png(figure)


def metrics_of(row: dict, task: str) -> dict:
    """A task's metrics in a row of the history."""
    return {key.removeprefix(f"{task}/"): value for key, value in row.items() if key.startswith(f"{task}/")}


def mean_of(row: dict, task: str) -> float:
    values = metrics_of(row, task).values()
    return sum(values) / len(values)


def means(metrics: dict) -> dict:
    """{task: the mean of its metrics, "average": of all tasks} from {task: metrics}."""
    found = {name: sum(values.values()) / len(values) for name, values in metrics.items()}
    return {**found, AVERAGE: sum(found.values()) / len(found)}


def comparison_table(rows: dict, notes: dict | None = None) -> str:
    """Models by rows, tasks by columns, from {model: {task: value}}; what `notes` has of a model ends its row."""
    tasks, notes = list(next(iter(rows.values()))), notes or {}
    lines = [f"{'held out':<22}" + "".join(f"{task:>10}" for task in tasks)]
    for name, row in rows.items():
        lines.append(f"{name:<22}" + "".join(f"{row[task]:>10.1%}" for task in tasks) + f"  {notes.get(name, '')}".rstrip())
    return "\n".join(lines)


def comparison_picture(rows: dict, histories: dict, by_step="average, held out (%)") -> bytes:
    """A PNG: bars of every model by task, and the average (or what `by_step` says) by step of those with a history."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(11, 4), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=[3, 2])
    tasks, width = list(next(iter(rows.values()))), 0.85 / len(rows)
    for number, (name, row) in enumerate(rows.items()):
        places = [i + (number - (len(rows) - 1) / 2) * width for i in range(len(tasks))]
        shown = bars.bar(places, [100 * row[task] for task in tasks], width, label=name)
        bars.bar_label(shown, fmt="%.0f", fontsize="x-small")
    bars.set(ylabel="held out (%)", ylim=(0, 105))
    bars.set_xticks(range(len(tasks)), tasks)
    bars.legend(fontsize="small", ncols=min(len(rows), 3), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    for name, history in histories.items():
        curves.plot([row["step"] for row in history], [100 * row[AVERAGE] for row in history], ".-", label=name)
    curves.set(xlabel="step", ylabel=by_step)
    curves.legend(fontsize="small")
    curves.grid(alpha=0.3)
    return png(figure)


@torch.no_grad()
def predict(checkpoint, texts: list, *, device="cpu", backend="auto", num_beams=1) -> list:
    """What the model of a finished training generates for each text.

    Raises InputError for a folder without a finished training of text.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TASK).is_file():
        raise InputError(f"{checkpoint} has no {TASK}: it is not the --output of a finished training")
    task = read_json(checkpoint / TASK)
    if task.get("kind") != "text":
        raise InputError(f"{checkpoint} holds no model of text")
    try:
        max_input, max_target = int(task["max_input"]), int(task["max_target"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / TASK} does not describe a training of text: {error!r}") from error
    tokens = tokenizer.load(checkpoint)
    model = trained_model(checkpoint, device, backend)
    if tokens.size > model.config.vocab_size:
        raise InputError(f"{checkpoint} has a tokenizer of {tokens.size} tokens and a model of {model.config.vocab_size}")
    found = []
    for text in texts:
        ids = tokens.encode(text)[: max_input - 1] + [tokens.eos_id]
        made = model.generate(pad([ids], len(ids), 0).to(device), max_new_tokens=max_target, num_beams=num_beams)
        found.append(tokens.decode(made[0, 1:].tolist()))
    return found
