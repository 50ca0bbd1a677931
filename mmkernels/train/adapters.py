"""Adapters in a masked language model of Hugging Face: its pre-training, tasks of classification, and serving them together.

What trains is decided by the `AdapterHub` (or by `requires_grad_`), and only that is in a checkpoint: everything else stays
as it was read, to the bit.
"""

import statistics
import time
from pathlib import Path

import torch

from ..models.adapterhub import AdapterHub
from ..models.registry import InputError, require
from ..modules.backend import set_backend
from ..modules.composition import BatchSplit, MultiTask
from . import masked_lm, text, tokenizer
from .classification import png
from .data import derive_seed, loader
from .data.pairs import Pair, Pairs
from .loop import Task, to_device

ARGUMENTS = ("input_ids", "attention_mask")


# --- The model that adapters go into -----------------------------------------------------------------------------------------


def new_backbone(lines, folder: Path, *, vocab_size, hidden_size, layers, length):
    """A BERT without weights of its own yet (BertForMaskedLM), and its tokenizer, trained on `lines` and saved in `folder`."""
    library = require("transformers", "adapters")
    made = tokenizer.train_bert(lines, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    library.PreTrainedTokenizerFast(tokenizer_object=made.model, **special).save_pretrained(folder)
    heads = max(hidden_size // 32, 1)
    try:
        config = library.BertConfig(
            vocab_size=made.size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=length,
            pad_token_id=made.pad_id,
            initializer_range=hidden_size**-0.5,  # BERT's 0.02 is for 768 channels: attention would be flat for long
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return library.BertForMaskedLM(config), tokenizer.Pretrained(folder)
    except ValueError as error:
        raise InputError(f"--hidden-size is {hidden_size}; {heads} heads must divide it: {error}") from error


def load(folder, *, device="cpu", language_model=False):
    """The encoder of a checkpoint of Hugging Face, or its masked language model; raises InputError."""
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"--model is {folder}, which is no folder with a config.json")
    library = require("transformers", "adapters")
    library.logging.set_verbosity_error()  # heads that a checkpoint lacks are none of an encoder's
    try:
        model = library.AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"--model is {folder}, which is no masked language model: {error}") from error
    model = (model if language_model else model.base_model).to(device)
    model.config._name_or_path = Path(folder).resolve().name  # in adapters' files and checkpoints, which may be moved
    return model


def blocks_of(files, tokens, length, *, seed, held_out=0.05):
    """(to train on, held out): `masked_lm.TextBlocks` of text files, with the special tokens of a `tokenizer.Pretrained`."""
    masking = masked_lm.Masking(tokens.mask_id, tokens.size, special_ids=tokens.special_ids)
    edges = {"first": tokens.start, "last": tokens.end}
    return masked_lm.TextBlocks(files, tokens.encode, length, masking, seed=seed, **edges).split(held_out)


# --- Tasks -------------------------------------------------------------------------------------------------------------------


def classes_of(examples) -> list:
    """The targets of a task, in the order of their numbers."""
    return sorted({example.target for example in examples})


def pairs_of(examples, classes, tokens, length, what="the data") -> Pairs:
    """Examples of text to text (`what` names them) as a classification; raises InputError for a target that is no class."""
    found = []
    for example in examples:
        if example.target not in classes:
            raise InputError(f"{what} has the target {example.target!r}, which training has not: {', '.join(classes)}")
        found.append(Pair(0, example.input, None, float(classes.index(example.target)), example.truth))
    return Pairs(found, tokens, length, fixed=False)


def make_task(hub: AdapterHub, head: str, training: Pairs, held_out: Pairs) -> Task:
    """Training what requires a gradient of `hub` with a head of `add_head`, and AdapterFusion's regularizer where it fuses."""

    def loss(model, batch):
        inputs = {name: batch[name] for name in ARGUMENTS}
        return hub(**inputs, labels=batch["labels"].long(), head=head)["loss"] + hub.fusion_regularization()

    def evaluate(model, batches):
        return accuracy(hub, head, held_out, batches)

    fingerprint = derive_seed(training.fingerprint(), held_out.fingerprint())
    return Task(training, held_out, loss, evaluate, f"{fingerprint:016x}")


@torch.no_grad()
def accuracy(hub, head, held_out: Pairs, batches) -> dict:
    """{"accuracy", "held_out_loss"} of what is active."""
    total, said = 0.0, []
    for batch in batches:
        logits = hub(**{name: batch[name] for name in ARGUMENTS}, head=head)["logits"].float()
        total += torch.nn.functional.cross_entropy(logits, batch["labels"].long(), reduction="sum").item()
        said += logits.argmax(-1).tolist()
    right = [int(example.label) for example in held_out.examples]
    share = require("sklearn.metrics", "train").accuracy_score(right, said)
    return {"accuracy": float(share), "held_out_loss": total / len(said)}


def average_history(histories: list) -> list:
    """[{"step", "average"}] over trainings that were evaluated at the same steps."""
    return [
        {"step": rows[0]["step"], text.AVERAGE: statistics.mean(row["accuracy"] for row in rows)}
        for rows in zip(*histories, strict=True)
    ]


def trained_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- Serving -----------------------------------------------------------------------------------------------------------------

MIXED, LOOP, EACH, APART = "mixed, one call", "mixed, a loop over adapters", "a batch of each task", "tasks kept apart"


class Requests:
    """The held-out examples of several tasks, in any order, for one model with an adapter and a head for each of them.

    Args:
        tasks: {name: Pairs}; the hub has adapters and heads of these names.
    """

    def __init__(self, hub: AdapterHub, tasks: dict, batch_size: int, seed: int, device="cpu"):
        self.hub, self.names = hub, list(tasks)
        examples = [
            Pair(number, example.first, example.second, example.label, example.truth)
            for number, pairs in enumerate(tasks.values())
            for example in pairs.examples
        ]
        first = next(iter(tasks.values()))
        rows = Pairs(examples, first.tokenizer, first.length, fixed=False)
        generator = torch.Generator().manual_seed(derive_seed(seed, "requests"))
        order = torch.randperm(len(rows), generator=generator).tolist()
        self.mixed = self._batches(rows, [order], batch_size, device)
        by_task = [[i for i in order if examples[i].task == number] for number in range(len(tasks))]
        self.apart = self._batches(rows, by_task, batch_size, device)
        self.size = len(rows)

    def _batches(self, rows, groups, batch_size, device):
        keys = [[(0, i) for i in group[a : a + batch_size]] for group in groups for a in range(0, len(group), batch_size)]
        return [to_device(batch, device) for batch in loader(rows, keys)]

    @torch.no_grad()
    def together(self, batch) -> dict:
        """{task: logits of its rows}; all rows through the model at once, each with its own adapter."""
        self.hub.set_active(MultiTask(*self.names))
        return self._heads(batch["task_id"], batch, task_ids=batch["task_id"])

    @torch.no_grad()
    def looped(self, batch) -> dict:
        """The same with a part of the batch for each adapter, as the library `adapters` computes it (backend "eager")."""
        order = batch["task_id"].argsort(stable=True)
        counts = torch.bincount(batch["task_id"], minlength=len(self.names)).tolist()
        present = [(name, count) for name, count in zip(self.names, counts, strict=True) if count]
        names, sizes = zip(*present, strict=True)
        self.hub.set_active(BatchSplit(*names, batch_sizes=sizes))
        return self._heads(batch["task_id"][order], {name: batch[name][order] for name in ARGUMENTS})

    @torch.no_grad()
    def alone(self, batch) -> dict:
        """The same with a pass through the model for the rows of each task, its adapter being the only one."""
        found = {}
        for number, name in enumerate(self.names):
            rows = batch["task_id"] == number
            if rows.any():
                self.hub.set_active(name)
                found[name] = self.hub(**{key: batch[key][rows] for key in ARGUMENTS}, head=name)["logits"]
        return found

    def _heads(self, tasks, batch, **more):
        hidden = self.hub.model(**{name: batch[name] for name in ARGUMENTS}, **more).last_hidden_state
        rows = {name: tasks == number for number, name in enumerate(self.names)}
        return {name: self.hub.model.heads[name].logits(hidden[r]) for name, r in rows.items() if r.any()}

    def check(self) -> tuple:
        """(the largest difference of a mixed batch's logits from those of each task alone, {task: accuracy of the former})."""
        largest, right, counts = 0.0, dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0)
        for batch in self.mixed:
            alone = self.alone(batch)
            for name, logits in self.together(batch).items():
                largest = max(largest, float((logits - alone[name]).abs().max()))
                labels = batch["labels"][batch["task_id"] == self.names.index(name)]
                right[name] += int((logits.argmax(-1) == labels).sum())
                counts[name] += len(labels)
        return largest, {name: right[name] / counts[name] for name in self.names}

    def rates(self, rounds: int) -> dict:
        """{way: rows a second}, the medians of `rounds` passes over all requests, the ways taking turns."""
        ways = {MIXED: (self.together, self.mixed), LOOP: (self.looped, self.mixed), EACH: (self.alone, self.mixed)}
        ways[APART] = self.alone, self.apart
        times, backend = {way: [] for way in ways}, self.hub.backend
        for turn in range(rounds + 1):
            for way, (serve, batches) in ways.items():
                set_backend(self.hub.model, "eager" if way == LOOP else backend)
                begin = time.perf_counter()
                for batch in batches:
                    logits = serve(batch)
                float(next(iter(logits.values())).sum())  # a GPU is done
                if turn:  # the first one warms up
                    times[way].append(time.perf_counter() - begin)
        set_backend(self.hub.model, backend)
        return {way: self.size / statistics.median(seconds) for way, seconds in times.items()}


@torch.no_grad()
def fusion_attention(hub: AdapterHub, name: str, batches) -> list:
    """How much the active fusion `name` attends to each of its adapters, the mean over layers and tokens."""
    layers = [place.owner.adapter_fusion_layer for _, place in hub.places.values()]
    layers = [layer[name] for layer in layers if name in layer]
    total, count = 0.0, 0
    for layer in layers:
        layer.keep_attention = True
    hub.model.eval()
    for batch in batches:
        hub.model(**{key: batch[key] for key in ARGUMENTS})
        for layer in layers:
            kept = layer.attention[batch["attention_mask"].bool()]
            total, count = total + kept.double().sum(0), count + len(kept)
            layer.attention = None
    for layer in layers:
        layer.keep_attention = False
    return (total / count).tolist()


def serving_picture(attention: dict, rates: dict) -> bytes:
    """A PNG: what the fusion of each task attends to, {task: shares}, and rows a second of each way to serve."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(attention)
    shares = [attention[name] for name in names]
    left.imshow(shares, cmap="Blues", vmin=0.0)
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            dark = value > 0.6 * max(map(max, shares))
            left.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if dark else "black")
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="adapter", ylabel="task that the fusion is for", title="AdapterFusion: what is attended to")
    bars = right.barh(list(rates), list(rates.values()))
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.invert_yaxis()
    right.set(xlabel="rows a second", title="serving the rows of all tasks", xlim=(0, 1.15 * max(rates.values())))
    return png(figure)
