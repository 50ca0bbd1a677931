"""GLUE as classification: texts and pairs of texts with a class or a score, tokens as BERT has them, mixtures of tasks.

Files are read as in `glue`. Classes are numbered as in CA-MTL's released code: MNLI's contradiction, entailment, neutral.
"""

import dataclasses
import hashlib
from pathlib import Path

import torch

from ...models.registry import InputError
from . import batches, derive_seed, glue
from .text import TextTask, pad

# In the released order, which numbers the tasks. WNLI is read when it is asked for.
TASKS = ("cola", "mnli", "rte", "wnli", "qqp", "stsb", "sst2", "qnli", "mrpc")
ENTAILED = ("not_entailment", "entailment")
CLASSES = {"mnli": ("contradiction", "entailment", "neutral"), "wnli": ENTAILED}  # where they are not glue's
FIELDS = {"mnli": ("premise", "hypothesis")}
METRICS = {"wnli": ("accuracy",)}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A text, or a pair of them, with its class or score; what metrics compare with, and the group that some of them need."""

    task: int
    first: str
    second: str | None
    label: float
    truth: object
    group: object = None


def classes_of(name: str) -> tuple:
    """The classes of a task, in the order of their numbers; none of a regression."""
    return CLASSES.get(name, glue.SPECS[name].labels)


def load_tasks(folder, names=None) -> dict:
    """{name: TextTask of Pairs} of the tasks of GLUE in `folder`: those named, or all but WNLI that it has.

    Raises InputError for an unknown name, for a folder without tasks and for files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data is {folder}, which is no folder")
    places = {name: glue.find(folder, name) for name in TASKS}
    found = [name for name in TASKS if places[name]]
    if names is None:
        names = [name for name in found if name not in glue.DEV_ONLY]
        if not names:
            raise InputError(f"{folder} has no task of GLUE: no folder {', '.join(glue.SPECS[name].folder for name in TASKS)}")
    for name in names:
        if name not in TASKS:
            raise InputError(f"task {name!r} is unknown; allowed are {', '.join(TASKS)}")
        if places[name] is None:
            raise InputError(f"{folder} has no files of {name}; it has {', '.join(found) or 'none'}")
    names = [name for name in TASKS if name in names]
    return {name: _load(name, number, *places[name]) for number, name in enumerate(names)}


def _load(name, number, path, kind):
    spec = glue.SPECS[name]
    task = TextTask(name, [], [], METRICS.get(name, spec.metrics), "GLUE")
    splits = [("train", "train", None, task.training)]
    splits += [(stem, split, group, task.dev) for stem, (split, group) in spec.dev.items()]
    for stem, split, group, examples in splits:
        before = len(examples)
        for where, record in glue.read(name, path, kind, stem, split):
            if record is None:
                task.left_out += 1
                continue
            examples.append(_pair(name, number, record, where, group))
        if len(examples) == before:
            raise InputError(f"{path} has no example of {name} in its split {stem!r}")
    return task


def _pair(name, number, record, where, group):
    first, *rest = (record[field] for field in FIELDS.get(name, glue.SPECS[name].fields))
    classes = classes_of(name)
    if classes:
        truth = glue.label_text(record["label"], glue.SPECS[name].labels, where)
        label = float(classes.index(truth))
    else:
        truth = label = glue.score(record["label"], where)
    return Pair(number, first, rest[0] if rest else None, label, truth, group)


# --- Tokens ------------------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """Examples as [CLS] first [SEP] second [SEP], cut to a length; padded to it as well, or as far as the batch needs it."""

    def __init__(self, examples: list, tokenizer, length: int, *, fixed=True):
        self.examples, self.tokenizer, self.length, self.fixed = examples, tokenizer, length, fixed

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        """(number, ids, how many of them belong to the first text) of (epoch, number)."""
        example = self.examples[key[1]]
        return key[1], *self.tokenizer.encode_pair(example.first, example.second, self.length)

    def collate(self, items):
        """{"number", "task_id", "labels" (B,), "input_ids", "attention_mask", "token_type_ids" (B, L)}."""
        numbers, rows, firsts = zip(*items, strict=True)
        length = self.length if self.fixed else max(map(len, rows))
        places = torch.arange(length)
        mask = places < torch.tensor([len(row) for row in rows])[:, None]
        examples = [self.examples[number] for number in numbers]
        return {
            "number": torch.tensor(numbers),
            "task_id": torch.tensor([example.task for example in examples]),
            "labels": torch.tensor([example.label for example in examples]),
            "input_ids": pad(rows, length, self.tokenizer.pad_id),
            "attention_mask": mask,
            "token_type_ids": ((places >= torch.tensor(firsts)[:, None]) & mask).long(),
        }

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(repr(dataclasses.astuple(example)).encode())
        digest.update(repr((self.length, self.tokenizer.fingerprint)).encode())
        return digest.hexdigest()


# --- Which examples a step has -----------------------------------------------------------------------------------------------


class BySize:
    """All tasks' examples in one permutation after another: every task has a share of its size."""

    def __init__(self, sizes: list, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = sum(sizes), min(batch_size, sum(sizes)), seed
        self.steps = self.size // self.batch_size  # of an epoch

    def batches(self, first: int, last: int) -> list:
        """[[(epoch, number), ...], ...] of the steps from `first` to before `last`."""
        drawn = []
        for epoch in range(first // self.steps, -(-last // self.steps)):
            drawn += batches(self.size, self.batch_size, self.seed, epoch)
        skipped = first // self.steps * self.steps
        return drawn[first - skipped : last - skipped]


class Candidates:
    """A batch of each task, one behind the other, for a model to choose from (see `uncertainty`).

    Each task goes through its examples in permutations of its own, the last batch of one being as short as it is. An epoch
    has as many steps as the longest task has batches, times the number of tasks, times `share`.
    """

    def __init__(self, sizes: list, batch_size: int, seed: int, share: float = 1.0):
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.counts = [-(-size // batch_size) for size in sizes]
        self.steps = max(int(max(self.counts) * len(sizes) * share), 1)

    def batches(self, first: int, last: int) -> list:
        """[[(epoch, number), ...], ...] of the steps from `first` to before `last`."""
        permutations, drawn = {}, []
        for step in range(first, last):
            keys = []
            for task, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
                epoch, part = divmod(step, count)
                if permutations.get(task, (None,))[0] != epoch:
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "candidates", task, epoch))
                    permutations[task] = epoch, torch.randperm(size, generator=generator).tolist()
                own = permutations[task][1][part * self.batch_size : (part + 1) * self.batch_size]
                keys += [(epoch, self.starts[task] + number) for number in own]
            drawn.append(keys)
        return drawn
