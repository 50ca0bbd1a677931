"""Tasks of text to text: those of GLUE and SuperGLUE, your own, batches of tokens, and mixtures of tasks.

A task of your own is a folder NAME with `train` and `dev`, each `.tsv` or `.jsonl`, with the columns `input` and `target`, or
a folder of `datasets` with these. Inputs begin with "NAME: ", or with what `task.json` beside them has as {"prefix": "..."}.
"""

import dataclasses
import hashlib
from pathlib import Path

import torch

from ...models.registry import InputError, read_json
from . import derive_seed, glue
from .glue import Example

PADDING = 8  # inputs are padded to a multiple of it


@dataclasses.dataclass
class TextTask:
    """The examples of a task, the metrics that it is judged by, and the benchmark that it belongs to."""

    name: str
    training: list
    dev: list
    metrics: tuple = ("accuracy",)
    benchmark: str | None = None
    left_out: int = 0


def load_tasks(folder, names=None) -> dict:
    """{name: TextTask} of the tasks in `folder`: those named, or all of T5's mixture and of your own that it has.

    Raises InputError for an unknown name, for a folder without tasks and for files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data is {folder}, which is no folder")
    places = {name: glue.find(folder, name) for name in glue.SPECS}
    taken = {place[0] for place in places.values() if place}
    taken |= {folder / spec.folder for spec in glue.SPECS.values()}
    own = {path.name: path for path in sorted(folder.iterdir()) if path not in taken and _is_task(path)}
    found = [name for name, place in places.items() if place]
    if names is None:
        names = [name for name in found if name in glue.MIXTURE] + list(own)
        if not names:
            raise InputError(f"{folder} has no task: no folder of GLUE or SuperGLUE, none with train.tsv or train.jsonl")
    tasks = {}
    for name in names:
        if name in own:
            tasks[name] = load_own(name, own[name])
            continue
        if name not in glue.SPECS:
            raise InputError(f"task {name!r} is unknown; allowed are {', '.join((*glue.SPECS, *own))}")
        if places[name] is None:
            spec = glue.SPECS[name]
            raise InputError(
                f"{folder} has no files of {name}: neither a folder {spec.folder} with train and "
                f"{', '.join(spec.dev)} nor a folder {spec.hub[0]} of datasets; it has {', '.join((*found, *own)) or 'none'}"
            )
        training, dev, left_out = glue.load(name, *places[name])
        spec = glue.SPECS[name]
        tasks[name] = TextTask(name, training, dev, spec.metrics, spec.benchmark, left_out)
    if not any(task.training for task in tasks.values()):
        raise InputError(f"{', '.join(tasks)} alone cannot be trained: it is only evaluated")
    return tasks


def load_own(name: str, path: Path) -> TextTask:
    """A task of the user's; raises InputError for missing files, columns and empty cells, with file and line."""
    prefix = f"{name}: "
    if (path / "task.json").is_file():
        prefix = read_json(path / "task.json").get("prefix", prefix)
        if not isinstance(prefix, str):
            raise InputError(f"{path / 'task.json'} has the prefix {prefix!r}; it must be text")
    splits = {}
    for split in ("train", "dev"):
        examples = examples_of(_own_rows(path, split), prefix)
        if not examples:
            raise InputError(f"{path} has no example of {name} in its split {split!r}")
        splits[split] = examples
    return TextTask(name, splits["train"], splits["dev"])


def examples_of(rows, prefix="") -> list:
    """Of (where, {"input", "target"}); raises InputError for empty cells."""
    examples = []
    for where, row in rows:
        for column in ("input", "target"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise InputError(f"{where} has {column} {row.get(column)!r}; it must be text")
        examples.append(Example(prefix + row["input"], row["target"], row["target"]))
    return examples


def read_file(path) -> list:
    """The examples of one .tsv or .jsonl file with `input` and `target`; raises InputError."""
    path = Path(path)
    rows = glue.read_jsonl(path) if path.suffix == ".jsonl" else glue.read_tsv(path, {"input": "input", "target": "target"})
    examples = examples_of(rows)
    if not examples:
        raise InputError(f"{path} has no example")
    return examples


def _is_task(path):
    return path.is_dir() and any((path / file).is_file() for file in ("train.tsv", "train.jsonl", "dataset_dict.json"))


def _own_rows(path, split):
    if (path / "dataset_dict.json").is_file():
        splits = glue.read_datasets(path)
        allowed = ("dev", "validation") if split == "dev" else (split,)
        found = next((name for name in allowed if name in splits), None)
        if found is None:
            raise InputError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
        return ((f"{path / found}, row {number}", row) for number, row in enumerate(splits[found]))
    if (path / f"{split}.jsonl").is_file():
        return glue.read_jsonl(path / f"{split}.jsonl")
    return glue.read_tsv(path / f"{split}.tsv", {"input": "input", "target": "target"})


# --- Tokens ------------------------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    """Examples as tokens, cut to a length with the end token and then padded with the batch."""

    def __init__(self, examples: list, tokenizer, max_input: int, max_target: int):
        self.examples, self.tokenizer, self.max_input, self.max_target = examples, tokenizer, max_input, max_target

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        """(number, input ids, target ids) of (epoch, number)."""
        example = self.examples[key[1]]
        return key[1], self._ids(example.input, self.max_input), self._ids(example.target, self.max_target)

    def _ids(self, text, length):
        return self.tokenizer.encode(text)[: length - 1] + [self.tokenizer.eos_id]

    def collate(self, items):
        """{"number" (B,), "input_ids" (B, S), "attention_mask" (B, S), "labels" (B, T), -100 behind a target}."""
        numbers, inputs, targets = zip(*items, strict=True)
        length = -(-max(map(len, inputs)) // PADDING) * PADDING
        ids, labels = pad(inputs, length, self.tokenizer.pad_id), pad(targets, max(map(len, targets)), -100)
        lengths = torch.tensor([len(row) for row in inputs])
        mask = torch.arange(length) < lengths[:, None]
        return {"number": torch.tensor(numbers), "input_ids": ids, "attention_mask": mask, "labels": labels}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(repr(dataclasses.astuple(example)).encode())
        digest.update(repr((self.max_input, self.max_target, self.tokenizer.fingerprint)).encode())
        return digest.hexdigest()


def pad(rows, length: int, value: int) -> torch.Tensor:
    """(rows, length), int64."""
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])


# --- Mixtures ----------------------------------------------------------------------------------------------------------------

MIXINGS = ("proportional", "temperature", "equal")
STEPS = 1024  # in which every task has its exact share


def rates(sizes: list, mixing="proportional", *, limit=2**19, temperature=2.0) -> torch.Tensor:
    """The share of each task, float64: of min(n, limit), "temperature": of its power 1 / temperature, or "equal"."""
    if mixing not in MIXINGS:
        raise InputError(f"mixing is {mixing!r}; allowed are {', '.join(MIXINGS)}")
    power = {"proportional": 1.0, "temperature": 1.0 / temperature, "equal": 0.0}[mixing]
    weights = torch.tensor(sizes, dtype=torch.float64).clamp(max=limit) ** power
    return weights / weights.sum()


class Mixture:
    """Which examples of several tasks, laid one behind the other, the batch of a step has: a function of (seed, step).

    In every 1024 steps each task has its share of the examples, to the nearest whole number and at least one, in an order of
    its own. Each task goes through its examples in permutations, one after another.
    """

    def __init__(self, sizes: list, shares, batch_size: int, seed: int):
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.counts = whole_shares(shares, STEPS * batch_size)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def batches(self, first: int, last: int) -> list:
        """[[(epoch, number), ...], ...] of the steps from `first` to before `last`."""
        drawn = []
        for block in range(first // STEPS, -(-last // STEPS)):
            steps = range(max(first - block * STEPS, 0), min(last - block * STEPS, STEPS))
            drawn += self._of_block(block, steps)
        return drawn

    def _of_block(self, block, steps):
        order = torch.repeat_interleave(torch.arange(len(self.sizes)), self.counts)
        order = order[self._permutation(len(order), "block", block)]
        wanted = slice(steps.start * self.batch_size, steps.stop * self.batch_size)
        numbers = [None] * (wanted.stop - wanted.start)
        for task, size in enumerate(self.sizes):
            mine = order == task
            place = int(mine[: wanted.start].sum()) + block * int(self.counts[task])
            permutations = {}
            for slot in mine[wanted].nonzero().flatten().tolist():
                epoch, index = divmod(place, size)
                if epoch not in permutations:
                    permutations[epoch] = self._permutation(size, task, epoch)
                numbers[slot] = (epoch, self.starts[task] + int(permutations[epoch][index]))
                place += 1
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]

    def _permutation(self, size, *parts):
        return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(self.seed, "mixture", *parts)))


def whole_shares(shares, total: int) -> torch.Tensor:
    """Whole numbers (int64) with the sum `total`, nearest to shares * total, none of them zero."""
    exact = shares * total
    counts = exact.floor().to(torch.int64).clamp(min=1)
    order = (exact - counts).argsort(descending=True, stable=True)
    missing = total - int(counts.sum())
    if missing >= 0:
        counts[order[:missing]] += 1
    else:  # many tasks had less than one
        counts[int(counts.argmax())] += missing
    return counts
