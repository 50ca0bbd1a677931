"""GLUE and SuperGLUE as text to text: their files as distributed, or `datasets` folders, with T5's inputs and target texts.

T5's mixture has 16 tasks: `cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte` of GLUE and `boolq`, `cb`, `copa`,
`multirc`, `record`, `superglue_rte`, `wic`, `wsc` of SuperGLUE. `wnli` is not among them: like T5 it is only evaluated, as
generation of the noun that a pronoun stands for, which `wsc` teaches; it is read when asked for by name.

Layouts are those of T5's preprocessors (Raffel et al. 2020, appendix D, and the code released with it, which orders the fields
of `boolq` and `cb` by name). Test splits have no labels and are never read.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch

from ...models.registry import InputError, require


@dataclasses.dataclass(frozen=True)
class Example:
    """An input and its target, both text; what metrics compare generated text with; the group that some of them need."""

    input: str
    target: str
    truth: object = None
    group: object = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a task is stored and how it is said.

    `fields` are columns of the hub's data sets, in the order in which the input has them; `columns` are the TSV's names or
    numbers of these and of the label.
    """

    benchmark: str
    folder: str
    hub: tuple  # names of the hub's configurations
    fields: tuple
    labels: tuple = ("False", "True")
    metrics: tuple = ("accuracy",)
    columns: dict | None = None
    dev: dict = dataclasses.field(default_factory=dict)  # file stem -> hub's split, and the group of its examples
    prefix: str | None = None


ENTAILMENT = ("entailment", "not_entailment")
MNLI_DEV = {
    "dev_matched": ("validation_matched", "matched"),
    "dev_mismatched": ("validation_mismatched", "mismatched"),
}


def _glue(folder, hub, columns, labels=(), metrics=("accuracy",), **options):
    fields = tuple(name for name in columns if name != "label")
    options = {"dev": {"dev": ("validation", None)}, **options}
    return Spec("GLUE", folder, (hub,), fields, labels, metrics, columns, **options)


def _superglue(folder, hub, fields, *options, **more):
    return Spec("SuperGLUE", folder, hub, fields, *options, **more, dev={"val": ("validation", None)})


def _same(*names):
    return {name: name for name in names}


SPECS = {
    "cola": _glue("CoLA", "cola", {"sentence": 3, "label": 1}, ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _glue("SST-2", "sst2", _same("sentence", "label"), ("negative", "positive")),
    "mrpc": _glue(
        "MRPC",
        "mrpc",
        {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
    ),
    "qqp": _glue(
        "QQP",
        "qqp",
        {"question1": "question1", "question2": "question2", "label": "is_duplicate"},
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
    ),
    "stsb": _glue(
        "STS-B",
        "stsb",
        {"sentence1": "sentence1", "sentence2": "sentence2", "label": "score"},
        metrics=("pearson", "spearman"),
    ),
    "mnli": _glue(
        "MNLI",
        "mnli",
        {"hypothesis": "sentence2", "premise": "sentence1", "label": "gold_label"},
        ("entailment", "neutral", "contradiction"),
        ("accuracy_by_group",),
        dev=MNLI_DEV,
    ),
    "qnli": _glue("QNLI", "qnli", _same("question", "sentence", "label"), ENTAILMENT),
    "rte": _glue("RTE", "rte", _same("sentence1", "sentence2", "label"), ENTAILMENT),
    "wnli": _glue(
        "WNLI",
        "wnli",
        _same("sentence1", "sentence2", "label"),
        ("not_entailment", "entailment"),
        ("referent_accuracy",),
        prefix="wsc",
    ),
    "boolq": _superglue("BoolQ", ("boolq",), ("passage", "question")),
    "cb": _superglue(
        "CB", ("cb",), ("hypothesis", "premise"), ("entailment", "contradiction", "neutral"), ("macro_f1", "accuracy")
    ),
    "copa": _superglue("COPA", ("copa",), ("choice1", "choice2", "premise", "question"), ("choice1", "choice2")),
    "multirc": _superglue(
        "MultiRC", ("multirc",), ("question", "answer", "paragraph"), metrics=("f1", "exact_match_by_group")
    ),
    "record": _superglue("ReCoRD", ("record",), ("query", "entities", "passage"), metrics=("answer_f1", "answer_exact_match")),
    "superglue_rte": _superglue("RTE", ("rte",), ("hypothesis", "premise"), ENTAILMENT, prefix="rte"),
    "wic": _superglue("WiC", ("wic",), ("sentence1", "sentence2", "word")),
    "wsc": _superglue(
        "WSC", ("wsc.fixed", "wsc"), ("text", "span1_text", "span2_text", "span2_index"), metrics=("referent_accuracy",)
    ),
}
DEV_ONLY = ("wnli",)
MIXTURE = tuple(name for name in SPECS if name not in DEV_ONLY)  # T5's 16 tasks


def find(folder: Path, name: str):
    """The folder of a task in `folder`, or in one of its folders: (path, "files" or "datasets"); None where there is none."""
    spec = SPECS[name]
    suffix = "jsonl" if spec.benchmark == "SuperGLUE" else "tsv"
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        path = place / spec.folder
        if any((path / f"{stem}.{suffix}").is_file() for stem in ("train", *spec.dev)):
            return path, "files"
        for hub in spec.hub:
            path = place / hub
            if (path / "dataset_dict.json").is_file() and _columns_fit(path, spec):
                return path, "datasets"
    return None


def load(name: str, path: Path, kind: str) -> tuple:
    """(training examples, dev examples, number of broken rows that were left out) of a task at a place that `find` found.

    Raises InputError for missing files and columns, rows that are broken, without or with an unknown label, each with its
    line, and for an empty split. QQP alone is distributed with rows that are cut off; these are left out.
    """
    spec = SPECS[name]
    training, dev, left_out = [], [], 0
    splits = [] if name in DEV_ONLY else [("train", "train", None, training)]
    splits += [(stem, split, group, dev) for stem, (split, group) in spec.dev.items()]
    for stem, split, group, examples in splits:
        before = len(examples)
        for where, record in read(name, path, kind, stem, split):
            if record is None:
                left_out += 1
                continue
            examples += to_examples(name, record, where, training=examples is training, group=group)
        if len(examples) == before:
            raise InputError(f"{path} has no example of {name} in its split {stem!r}")
    return training, dev, left_out


def read(name: str, path: Path, kind: str, stem: str, split: str):
    """Yields (where, record with the hub's columns) of a split at a place that `find` found, None for one that is cut off."""
    return (_read_files if kind == "files" else _read_datasets)(name, path, stem, split)


# --- T5's texts --------------------------------------------------------------------------------------------------------------


def to_examples(name: str, record: dict, where: str, *, training: bool, group=None) -> list:
    """The examples of a record with the hub's columns: in training none for a wrong noun of WSC, one per answer of ReCoRD."""
    spec = SPECS[name]
    prefix = spec.prefix or name
    if name == "stsb":
        value = score(record["label"], where)
        text = f"stsb sentence1: {record['sentence1']} sentence2: {record['sentence2']}"
        return [Example(text, score_text(value), value)]
    if name == "record":
        entities, passage = ", ".join(record["entities"]), _passage(record["passage"])
        text = f"record query: {record['query']} entities: {entities} passage: {passage}"
        answers = tuple(record["answers"])
        if not answers:
            raise InputError(f"{where}: a query has no answers")
        return [Example(text, answer, answers) for answer in (answers if training else answers[:1])]
    label = label_text(record["label"], spec.labels, where)
    if name == "wnli":
        text, referent = winograd_of_nli(record["sentence1"], record["sentence2"], where)
        return [Example(f"wsc: {text}", referent, (referent, label == "entailment"))]
    if name == "wsc":
        referent, right = record["span1_text"], label == "True"
        if training and not right:
            return []
        return [Example(f"wsc: {mark_pronoun(record, where)}", referent, (referent, right))]
    text = " ".join((prefix, *(f"{field}: {record[field]}" for field in spec.fields)))
    if name == "multirc":
        text = re.sub("</?b>", "", text.replace("<br>", " "))
        group = (record["idx"]["paragraph"], record["idx"]["question"])
    return [Example(text, label, label, group)]


def score_text(score: float) -> str:
    """A similarity as T5 says it: rounded to fifths, halves to even, in float32."""
    return f"{float(torch.round(torch.tensor(score, dtype=torch.float32) * 5) / 5):.1f}"


def label_text(label, labels: tuple, where: str) -> str:
    """The text of a label that is one, or its number, or a truth value."""
    if isinstance(label, str) and label in labels:
        return label
    number = int(label) if isinstance(label, (bool, int)) or (isinstance(label, str) and label.isdecimal()) else None
    if number is not None and 0 <= number < len(labels):
        return labels[number]
    if label in (None, "", -1):
        raise InputError(f"{where} has no label: it belongs to a test split, or is broken")
    allowed = ", ".join(f"{i} or {text}" for i, text in enumerate(labels))
    raise InputError(f"{where} has the label {label!r}; allowed are {allowed}")


def mark_pronoun(record: dict, where: str) -> str:
    """The text with *stars* around its pronoun, what it is joined to set apart: `"Good for *him* ,"`.

    It is the word that `span2_index` counts; where that is another word, as in two texts of the original, the nearest that is.
    """
    words, pronoun = record["text"].strip().split(" "), record["span2_text"]
    found = []
    for number, word in enumerate(words):
        match = re.fullmatch(rf"(\W*){re.escape(pronoun)}(\W.*)?", word, re.DOTALL)
        if match:
            found.append((abs(number - record["span2_index"]), number, match[1], match[2]))
    if not found:
        raise InputError(f"{where}: the pronoun {pronoun!r} is not a word of the text")
    _, number, before, after = min(found)
    words[number] = f"{before}*{pronoun}*" + (f" {after}" if after else "")
    return " ".join(words)


def winograd_of_nli(premise: str, hypothesis: str, where: str = "") -> tuple:
    """(premise with *stars* around a pronoun, what the hypothesis has in its place), as T5's `wnli_simple`.

    The pronoun is the one whose neighbours, before and after, are found in the hypothesis at greatest length.
    """
    words, other = _plain_words(premise), " ".join(_plain_words(hypothesis))
    backwards = " ".join(_plain_words(hypothesis)[::-1])
    best = None
    for number, word in enumerate(words):
        if word not in PRONOUNS:
            continue
        after = words[number + 1 :]
        before = words[:number]
        after = after[: _prefix_length(after, other)]
        length = _prefix_length(before[::-1], backwards)
        before = before[len(before) - length :]
        if best is None or len(before) + len(after) > best[0]:
            best = (len(before) + len(after), number, before, after)
    candidate = ""
    if best and best[0]:
        before, after = ([re.escape(word) for word in part] for part in best[2:])
        for pattern in ([*before, "(.+)", *after], ["^(.+)", *after], [*before, "(.+)$"]):
            match = re.search(" ".join(pattern), other)
            if match:
                candidate = match[1]
                break
    named = candidate.split(" ")
    # What stands in front of the last article belongs to the sentence, not to the noun.
    named = named[max((named.index(article) for article in ("a", "an", "the") if article in named), default=0) :]
    pattern = " ".join(rf"{re.escape(word)}[.,?!]?" for word in named)
    match = re.search(pattern, hypothesis, re.IGNORECASE) if candidate else None
    if not match:
        raise InputError(f"{where}: no pronoun of the premise has a counterpart in the hypothesis {hypothesis!r}")
    noun = re.sub(r"('s|')$", "", re.sub(r"[.,?!]$", "", match[0]))
    marked = premise.strip().split(" ")
    place = [number for number, word in enumerate(marked) if _plain_words(word)][best[1]]
    word, end = re.fullmatch(r"(.*?)([.,?!]?)", marked[place], re.DOTALL).groups()
    marked[place] = f"*{word}*" + (f" {end}" if end else "")
    return " ".join(marked), noun


PRONOUNS = ("he", "she", "they", "it", "her", "his", "their", "them", "him")


def _plain_words(text):
    words = (re.sub(r"[.,?!]$", "", word) for word in text.strip().lower().split(" "))
    return [word for word in words if word]


def _prefix_length(words, text):
    """The most of the first words that stand in `text` one after another."""
    length = 0
    while length < len(words) and " ".join(words[: length + 1]) in text:
        length += 1
    return length


def _passage(text):
    """ReCoRD's highlights as sentences of the passage."""
    return re.sub(r"\n@highlight\n", ". ", re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text))


def score(label, where: str) -> float:
    """A similarity of STS-B."""
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = -1.0
    if not 0.0 <= value <= 5.0:
        raise InputError(f"{where} has the score {label!r}; it must be a number from 0 to 5")
    return value


# --- Files as distributed ----------------------------------------------------------------------------------------------------


def _read_files(name, path, stem, split):
    """Yields (where, record with the hub's columns), None for a record that is cut off where that is known of the files."""
    spec = SPECS[name]
    if spec.columns:
        yield from read_tsv(path / f"{stem}.tsv", spec.columns, header=name != "cola", skip_short=name == "qqp")
        return
    for where, row in read_jsonl(path / f"{stem}.jsonl"):
        try:
            records = list(_flat(name, row))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            missing = f"no {error}" if isinstance(error, KeyError) else f"another form: {error}"
            raise InputError(f"{where} has {missing}; it is no row of {spec.folder}") from error
        for record in records:
            for field, value in record.items():
                if field != "label" and not isinstance(value, KINDS.get(field, str)):
                    raise InputError(f"{where} has {field} {value!r}; it is no row of {spec.folder}")
            yield where, record


def read_tsv(path: Path, columns: dict, *, header=True, skip_short=False):
    """Yields (where, {name: cell}) for `columns`, {name: the file's name or number of it}.

    Quotes mean nothing, as in GLUE's files. `skip_short` yields (where, None) for a row that has too few cells, which else
    raises InputError.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            names, places = None, columns
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                if header and names is None:
                    names = cells
                    missing = [column for column in columns.values() if column not in names]
                    if missing:
                        raise InputError(f"{path}:1 has no column {missing[0]!r}; it has {', '.join(names)}")
                    places = {name: names.index(column) for name, column in columns.items()}
                    continue
                if cells == [""]:
                    continue
                if max(places.values()) >= len(cells):
                    if not skip_short:
                        wanted = len(names) if names else max(places.values()) + 1
                        raise InputError(f"{path}:{number} has {len(cells)} columns; it must have {wanted}")
                    yield f"{path}:{number}", None
                    continue
                yield f"{path}:{number}", {name: cells[place] for name, place in places.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_jsonl(path: Path):
    """Yields (where, object) for the lines of a file; raises InputError for one that is no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number} is no JSON: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number} is a JSON {type(row).__name__}; it must be an object")
                yield f"{path}:{number}", row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


KINDS = {"entities": list, "answers": list, "idx": dict, "span2_index": int}  # of fields that are no text


def _flat(name, row):
    """The records of a SuperGLUE row, as the hub has them."""
    if name == "multirc":
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                idx = {"paragraph": row["idx"], "question": question["idx"]}
                texts = {"question": question["question"], "answer": answer["text"], "paragraph": row["passage"]["text"]}
                yield {**texts, "label": answer.get("label"), "idx": idx}
    elif name == "record":
        text = row["passage"]["text"]
        # Ends are those of the last character.
        entities = sorted({text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]})
        for question in row["qas"]:
            answers = sorted({answer["text"] for answer in question.get("answers", ())})
            yield {"query": question["query"], "entities": entities, "passage": text, "answers": answers}
    elif name == "wsc":
        span = row["target"]
        referent = span["span1_text"].replace("\n", " ").rstrip(".")
        if referent not in row["text"]:  # but for the case of its first letter
            first = row["text"].split()[span["span1_index"]][0]
            referent = (referent[0].lower() if first.islower() else referent[0].upper()) + referent[1:]
        places = {"text": row["text"], "span2_text": span["span2_text"], "span2_index": span["span2_index"]}
        yield {**places, "span1_text": referent, "label": row.get("label")}
    else:
        yield {**{field: row[field] for field in SPECS[name].fields}, "label": row.get("label")}


# --- Folders of `datasets` ---------------------------------------------------------------------------------------------------


def read_datasets(path: Path) -> dict:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote."""
    datasets = require("datasets", "text")
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, fsspec, JSON and datasets itself have no common one
        raise InputError(f"{path} cannot be read as a folder of datasets: {error}") from error


def _read_datasets(name, path, stem, split):
    spec, splits = SPECS[name], read_datasets(path)
    if split not in splits:
        raise InputError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    wanted = [*spec.fields, "answers" if name == "record" else "label"] + ["idx"] * (name == "multirc")
    missing = [column for column in wanted if column not in splits[split].column_names]
    if missing:
        raise InputError(f"{path / split} has no column {missing[0]!r}; it has {', '.join(splits[split].column_names)}")
    for number, record in enumerate(splits[split]):
        yield f"{path / split}, row {number}", record


def _columns_fit(path, spec):
    """Whether it is this task: GLUE and SuperGLUE have both a data set 'rte'."""
    if spec.folder != "RTE":
        return True
    found = next(iter(sorted(path.glob("*/dataset_info.json"))), None)
    try:
        return found is not None and spec.fields[0] in json.loads(found.read_text())["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
