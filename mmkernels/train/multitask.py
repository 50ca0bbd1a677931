"""Classification of texts of several tasks by CA-MTL or Perceiver IO: data, losses, metrics and result files."""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from ..models import ca_mtl, perceiver_io
from ..models.registry import InputError, read_json, write_atomically
from . import byte_text, text, tokenizer, uncertainty
from .classification import CURVE, TASK
from .data import derive_seed
from .data.pairs import BySize, Candidates, Pair, Pairs, classes_of
from .loop import Task, best_row, load_best, split_by, to_device, trained_model

SAMPLINGS = ("size", "uncertainty")
ARGUMENTS = ("input_ids", "task_id", "attention_mask", "token_type_ids")


def answer(model, batch):
    """`ca_mtl.Output` of a batch, with the losses."""
    return model(**{name: batch[name] for name in ARGUMENTS}, labels=batch["labels"])


def perceiver_answer(model, batch) -> ca_mtl.Output:
    """The same of a Perceiver IO with a query for each task, of which it is asked those that the batch has.

    `logits` (B, most classes), -inf behind a task's own; `loss` is the mean over the rows, each by its own task:
    cross-entropy, or the square of the error of a score.
    """
    names = list(model.output.heads)
    number = batch["task_id"]
    present = number.unique().tolist()
    found = model(batch["input_ids"], key_mask=batch["attention_mask"], tasks=[names[i] for i in present])
    widths = [head[2].out_features for head in model.output.heads.values()]
    logits = found[names[present[0]]].new_full((len(number), max(widths)), -torch.inf)
    losses, means = 0.0, logits.new_zeros(len(names))
    for i in present:
        rows = number == i
        own, labels = found[names[i]][rows], batch["labels"][rows]
        logits[rows, : widths[i]] = own.detach()
        if widths[i] == 1:
            cost = (own[:, 0] - labels.to(own.dtype)).square()
        else:
            cost = F.cross_entropy(own, labels.long(), reduction="none")
        losses, means[i] = losses + cost.sum(), cost.detach().mean()
    return ca_mtl.Output(logits, losses / len(number), means, None, None)


def make_task(
    tasks: dict, tokens, *, length, batch_size, seed, sampling="size", share=1.0, dev_limit=None, answer=answer
) -> tuple:
    """(Task, steps of an epoch): training on `tasks`, {name: TextTask of Pairs}, judged by the average of their dev splits.

    Args:
        tokens: a tokenizer with `encode_pair`.
        length: tokens that pairs are cut and padded to.
        batch_size, seed: of the batches.
        sampling: "size", by the sizes of the tasks, or "uncertainty", see `uncertainty`: of a batch of each task the
            `batch_size` rows that the model, as it is in training, is least sure of.
        share: of an epoch of the latter.
        dev_limit: evaluate on so many examples of a task, spread over its dev split; default all.
        answer: (model, batch) -> `ca_mtl.Output`; CA-MTL divides texts that are padded to `length`, others are to the batch.
    """
    fixed = answer is not perceiver_answer
    sizes = [len(task.training) for task in tasks.values()]
    training = Pairs([example for task in tasks.values() for example in task.training], tokens, length, fixed=fixed)
    dev = [(task.name, example) for task in tasks.values() for example in text.spread(task.dev, dev_limit)]
    held_out = Pairs([example for _, example in dev], tokens, length, fixed=fixed)
    names = list(tasks)
    # The released code gives the regression of STS-B the scores of MRPC.
    stand_in = (names.index("stsb"), names.index("mrpc")) if {"stsb", "mrpc"} <= tasks.keys() else None
    chosen = Candidates(sizes, batch_size, seed, share) if sampling == "uncertainty" else BySize(sizes, batch_size, seed)

    def select(model, batch):
        logits = model(**{name: batch[name] for name in ARGUMENTS}).logits
        rows = uncertainty.select(logits, batch["task_id"], model.counts[batch["task_id"]], batch_size, stand_in)
        return {name: tensor[rows] for name, tensor in batch.items()}

    fingerprint = derive_seed(training.fingerprint(), held_out.fingerprint(), sizes, sampling, share)
    task = Task(
        training,
        held_out,
        lambda model, batch: answer(model, batch).loss,
        Judge([name for name, _ in dev], held_out.examples, tasks, answer).evaluate,
        f"{fingerprint:016x}",
        draw=chosen.batches,
        select=select if sampling == "uncertainty" else None,
        split=None if fixed else split_by(lambda batch: len(batch["labels"])),
        headline=text.AVERAGE,
    )
    return task, chosen.steps


class Judge:
    """The metrics of a dev split of several tasks."""

    def __init__(self, owners: list, examples: list, tasks: dict, answer=answer):
        self.owners, self.examples, self.tasks, self.answer = owners, examples, tasks, answer

    def evaluate(self, model, batches) -> dict:
        """The average over the tasks of the means of their metrics, all metrics, and the mean of the tasks' losses."""
        said = [None] * len(self.examples)
        totals, counts = torch.zeros(len(self.tasks)), torch.zeros(len(self.tasks))
        classes = [classes_of(name) for name in self.tasks]
        for batch in batches:
            output = self.answer(model, batch)
            tasks = batch["task_id"]
            rows = torch.bincount(tasks, minlength=len(classes)).cpu()
            totals, counts = totals + output.task_losses.cpu() * rows, counts + rows
            best, values = output.logits.argmax(1).tolist(), output.logits[:, 0].tolist()
            for number, task, label, value in zip(batch["number"].tolist(), tasks.tolist(), best, values, strict=True):
                said[number] = classes[task][label] if classes[task] else repr(value)
        found = text.score(said, self.owners, self.examples, self.tasks)
        return {**found, "held_out_loss": float((totals / counts).mean())}


def save_result(folder: Path, model, tokens, tasks: dict, history: list) -> dict:
    """The best model, config.json, its tokenizer, task.json and learning-curve.png; returns the best row of the history."""
    load_best(folder, model)
    model.save_pretrained(folder)
    if tokens is not byte_text.PAIRS:
        tokenizer.save(tokens, folder)
    best = best_row(history, text.AVERAGE)
    about = {name: {"metrics": list(task.metrics), "classes": list(classes_of(name))} for name, task in tasks.items()}
    content = {"kind": "multitask", "tasks": about, "best": best, "history": history}
    write_atomically(folder / TASK, json.dumps(content, indent=1).encode())
    write_atomically(folder / CURVE, text.learning_curve(history, "loss of a task"))
    return best


@torch.no_grad()
def predict(checkpoint, name: str | None, texts: list, *, device="cpu", backend="auto") -> list:
    """What the model of a finished training says of each text, or pair of texts with a tab between them: a class or a score.

    `name` is the task; None where the training had one only. Raises InputError for a folder without such a training.
    """
    checkpoint = Path(checkpoint)
    about = read_json(checkpoint / TASK).get("tasks")
    model = trained_model(checkpoint, device, backend)
    of_bytes = isinstance(model, perceiver_io.PerceiverIO)
    names = list(model.output.heads) if of_bytes else model.config.tasks
    if not isinstance(about, dict) or not all(isinstance(about.get(n), dict) and "classes" in about[n] for n in names):
        raise InputError(f"{checkpoint / TASK} does not describe the tasks of the model")
    name = names[0] if name is None and len(names) == 1 else name
    if name not in names:
        raise InputError(f"--task is {name!r}; allowed are {', '.join(names)}")
    number, classes = names.index(name), about[name]["classes"]
    examples = []
    for one in texts:
        first, tab, second = one.partition("\t")
        examples.append(Pair(number, first, second if tab else None, 0.0, None))
    if of_bytes:
        dataset = Pairs(examples, byte_text.PAIRS, model.input.size, fixed=False)
    else:
        dataset = Pairs(examples, tokenizer.load_bert(checkpoint), model.config.max_seq_length)
    found = []
    for i in range(len(examples)):
        batch = to_device(dataset.collate([dataset[None, i]]), device)
        logits = (perceiver_answer if of_bytes else answer)(model, batch).logits[0]
        found.append(classes[int(logits.argmax())] if classes else f"{float(logits[0]):.3f}")
    return found
