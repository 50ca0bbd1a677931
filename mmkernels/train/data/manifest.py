"""A table of clips or images, CSV or Parquet: a column of paths per modality, the labels, and which are held out. Or a folder.

| column | holds |
|---|---|
| the modalities' names, such as `rgb` and `spectrogram` | paths, relative to the table's folder |
| `label` | one class: softmax |
| `labels` | any number of classes, `;` between them: a sigmoid per class |
| `label.verb`, `label.noun`, ... | one class each from several vocabularies: a softmax over each |
| `split` | optional: `train`, or `val` or `test` for held-out rows |

In a folder of class folders every video file, and every folder of frames, is a clip; its sound is the file of the same name
that ends in .wav, or the video's own.
"""

import csv
import dataclasses
from pathlib import Path

import torch

from ...models.registry import InputError, require
from .clips import Clips, Video

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
SPLITS = {"train": False, "val": True, "test": True}  # name -> held out


@dataclasses.dataclass(frozen=True)
class Labels:
    """The vocabularies of a task: {head: class names}; one head, or several as in Epic-Kitchens (verb, noun)."""

    heads: dict
    multi_label: bool = False

    @property
    def names(self) -> list:
        return [name for head in self.heads.values() for name in head]

    @property
    def splits(self) -> list:
        return [len(head) for head in self.heads.values()]

    def targets(self, labels: dict) -> torch.Tensor:
        """{head: names} -> (classes,), one where a name is among them. Raises InputError for an unknown name."""
        parts = []
        for head, names in self.heads.items():
            part = torch.zeros(len(names))
            for name in labels[head]:
                if name not in names:
                    raise InputError(f"{head} is {name!r}, which no row to train on has")
                part[names.index(name)] = 1
            parts.append(part)
        return torch.cat(parts)


@dataclasses.dataclass
class Row:
    where: str  # names the row in messages
    paths: dict
    labels: dict
    held_out: bool | None
    lengths: dict = dataclasses.field(default_factory=dict)


def load(path, readers: dict, seed: int, *, held_out=0.1, windows=4, on_error="stop"):
    """(training, held out, labels, problems): two `Clips`, a `Labels`, and a line for every broken row, all left out.

    Every file is opened and every sound decoded once here, so that what is broken is named before the training starts.

    Args:
        path: the table, `.csv` or `.parquet`, or a folder of class folders of clips.
        readers: {modality: reader}.
        seed: of the split (where the table has no `split`) and the augmentation.
        held_out: share of the rows that is held out where the table does not say.
        windows: read of every held-out clip.
        on_error: "stop" raises InputError when a row is broken, "skip" goes on without it.

    Raises InputError for a table that cannot be read, lacks a column, or leaves too few rows.
    """
    path = Path(path)
    columns, records = _read_folder(path, readers) if path.is_dir() else _read_table(path)

    def measure(row):
        row.lengths = {name: reader.length(row.paths[name]) for name, reader in readers.items()}

    training, held_out, labels, problems = _rows(
        path, columns, records, list(readers), seed, measure, held_out=held_out, on_error=on_error, unit="clip"
    )

    def clips(pairs, windows):
        rows, targets = zip(*pairs, strict=True)
        paths, lengths = [row.paths for row in rows], [row.lengths for row in rows]
        return Clips(paths, lengths, torch.stack(targets), readers, windows=windows, seed=seed)

    return clips(training, 1), clips(held_out, windows), labels, problems


def load_images(path, seed: int, check, *, held_out=0.1, on_error="stop"):
    """((paths, targets) to train on, the same held out, labels, problems) of a table with a column `image`; see `load`.

    Args:
        check: of a path; raises InputError where it is no image.
    """
    path = Path(path)
    columns, records = _read_table(path)
    *parts, labels, problems = _rows(
        *(path, columns, records, ["image"], seed, lambda row: check(row.paths["image"])),
        held_out=held_out,
        on_error=on_error,
        unit="image",
    )
    parts = [([row.paths["image"] for row, _ in pairs], torch.stack([target for _, target in pairs])) for pairs in parts]
    return *parts, labels, problems


def _rows(path, columns, records, names, seed, measure, *, held_out, on_error, unit):
    """([(Row, targets), ...] to train on, the same held out, `Labels`, a line for every broken row); `measure` reads a row."""
    kind = _label_columns(path, columns)
    for name in names:
        if name not in columns:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(columns)}")
    rows, problems = [], []
    tqdm = require("tqdm", "train").tqdm  # every frame of a folder is decoded once
    for where, record in tqdm(records, desc=f"checking {unit}s", unit=unit, leave=False, delay=1.0, dynamic_ncols=True):
        try:
            row = _parse(where, record, path if path.is_dir() else path.parent, names, kind)
            measure(row)
            rows.append(row)
        except InputError as error:
            problems.append(f"{where}: {error}")
    if rows and rows[0].held_out is None:
        count = max(1, round(held_out * len(rows)))
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        for index, row in enumerate(rows):
            row.held_out = index in drawn
    training = [row for row in rows if not row.held_out]
    heads = {head: sorted({name for row in training for name in row.labels[head]}) for head in kind}
    labels = Labels(heads, multi_label=kind == {"labels": True})
    chosen = {False: [], True: []}
    for row in rows:
        try:
            chosen[row.held_out].append((row, labels.targets(row.labels)))
        except InputError as error:
            problems.append(f"{row.where}: {error}")
    if problems and on_error == "stop":
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise InputError(
            f"{path} has {len(problems)} broken row{'s' * (len(problems) > 1)}: {shown}; --on-error skip leaves them out"
        )
    for name, part in ((False, "to train on"), (True, "held out")):
        if not chosen[name]:
            raise InputError(f"{path} has no row {part}: {len(records)} rows, {len(problems)} of them broken")
    if len(labels.names) < 2:
        raise InputError(f"{path} has only the class {labels.names}; a classifier needs at least two")
    return chosen[False], chosen[True], labels, problems


def _read_folder(path, readers):
    """As `_read_table`, of `path`/CLASS/CLIP."""
    records = []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for clip in sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            if not clip.is_dir() and clip.suffix.lower() not in VIDEOS:
                continue
            sound = clip.with_suffix(".wav") if clip.is_file() else clip.with_name(f"{clip.name}.wav")
            sound = sound if sound.is_file() or clip.is_dir() else clip
            shown = {name: clip if isinstance(reader, Video) else sound for name, reader in readers.items()}
            record = {name: source.relative_to(path) for name, source in shown.items()}
            records.append((str(clip.relative_to(path)), {**record, "label": folder.name}))
    if not records:
        raise InputError(
            f"{path} has no clips; they must be in a folder for each class: folders of frames or {', '.join(VIDEOS)}"
        )
    return [*readers, "label"], records


def _read_table(path):
    """(columns, [(where, {column: text})])."""
    if path.suffix.lower() == ".csv":
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                records = [(f"line {reader.line_num}", record) for record in reader]
                columns = reader.fieldnames or []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as CSV: {error}") from error
    elif path.suffix.lower() == ".parquet":
        parquet, arrow = require("pyarrow.parquet", "media"), require("pyarrow", "media")
        try:
            table = parquet.read_table(path)
        except (OSError, arrow.ArrowException) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from error
        columns = table.column_names
        records = [(f"row {number}", record) for number, record in enumerate(table.to_pylist(), 1)]
    else:
        raise InputError(f"{path} is no table of clips or images; allowed are files ending in .csv and .parquet")
    if not records:
        raise InputError(f"{path} has no rows")
    return columns, records


def _label_columns(path, columns) -> dict:
    """{column: whether it holds several names}."""
    heads = [name for name in columns if name.startswith("label.")]
    found = [kind for kind in ({"label": False}, {"labels": True}, dict.fromkeys(heads, False)) if set(kind) & set(columns)]
    if len(found) != 1:
        raise InputError(
            f"{path} has the columns {', '.join(columns)}; it must have labels in one form: 'label', 'labels', or columns "
            f"'label.NAME'"
        )
    return found[0]


def _parse(where, record, folder, modalities, kind) -> Row:
    if None in record:
        raise InputError("it has more cells than the table has columns")
    paths = {}
    for name in modalities:
        if not record[name]:
            raise InputError(f"{name} is empty")
        paths[name] = folder / str(record[name])
        if not paths[name].exists():
            raise InputError(f"{name}: {paths[name]} does not exist")
    labels = {}
    for column, several in kind.items():
        cell = record[column]
        if not several:
            names = [] if cell is None else [str(cell).strip()]
        else:
            names = [str(name).strip() for name in (cell if isinstance(cell, list) else (cell or "").split(";"))]
        labels[column] = sorted(set(filter(None, names)))
        if not labels[column]:
            raise InputError(f"{column} is empty")
    held_out = None
    if "split" in record:
        if record["split"] not in SPLITS:
            raise InputError(f"split is {record['split']!r}; allowed are {', '.join(SPLITS)}")
        held_out = SPLITS[record["split"]]
    return Row(where, paths, labels, held_out)
