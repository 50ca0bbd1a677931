"""Five tasks of real text that every machine has: the docstrings of Python's standard library and of torch.

| task | input | target |
|---|---|---|
| `cloze` | a sentence with a preposition left out | the preposition |
| `kind` | a docstring | what it describes: class, function, module |
| `spell` | a sentence, half of them with two letters of a word exchanged | right, misspelled |
| `topic` | a docstring | the package that it is from |
| `verb` | the first sentence of a docstring without its first word | the word: return, set, create, ... |

A tenth of the files is held out, chosen by name, without the sentences that the others have as well. The text depends
on the versions of Python and torch, and so do results.
"""

import ast
import json
import random
import re
import sysconfig
import warnings
from pathlib import Path

import torch

from ...models.registry import write_atomically
from . import derive_seed

LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "testing", "_inductor"}
# Packages that hold several files with docstrings in every version.
TOPICS = (
    *("asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml"),
    *("torch.ao", "torch.distributed", "torch.distributions", "torch.fx", "torch.nn", "torch.onnx", "torch.optim"),
)
PREPOSITIONS = ("as", "at", "by", "for", "from", "in", "of", "on", "to", "with")
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
VERBS = ("add", "check", "convert", "create", "get", "initialize", "read", "remove", "return", "set", "test", "write")
WORDS = 24  # of an input, at most
MOST = {"kind": 1200, "topic": 600}  # examples of each target, where they would be of very different numbers


SENTENCES = "sentences.txt"


def write(folder: Path, seed=0, most=8000, held_out=1000) -> dict:
    """Writes the tasks as `folder`/NAME/{train,dev}.jsonl; returns {name: [examples to train on, held out]}.

    `folder`/sentences.txt has the sentences of the files to train on, a line each, in an order of the seed.
    """
    examples, seen = {}, set()
    files = sorted(documents(), key=lambda file: is_held_out(file[0]))  # those to train on first
    for name, nodes in files:
        held = is_held_out(name)
        tasks = examples.setdefault(held, {})
        for task, text, target in of_file(name, nodes, random.Random(derive_seed(seed, name)), seen, held):
            tasks.setdefault(task, {}).setdefault(text, target)
    for held, tasks in examples.items():
        for task, count in MOST.items():
            tasks[task] = at_most(tasks[task], count // 6 if held else count)
    sizes = {}
    for task, training in sorted(examples[False].items()):
        dev = examples[True][task]
        (folder / task).mkdir(parents=True, exist_ok=True)
        sizes[task] = []
        for split, rows, limit in (("train", training, most), ("dev", dev, held_out)):
            rows = sorted(rows.items(), key=lambda row: derive_seed(seed, row[0]))[:limit]
            lines = [json.dumps({"input": text, "target": target}) for text, target in rows]
            write_atomically(folder / task / f"{split}.jsonl", "".join(f"{line}\n" for line in lines).encode())
            sizes[task].append(len(rows))
    lines = sorted(seen, key=lambda sentence: derive_seed(seed, "sentences", sentence))
    write_atomically(folder / SENTENCES, "".join(f"{line}\n" for line in lines).encode())
    return sizes


def write_text(folder: Path) -> tuple:
    """Writes `folder`/train.txt and held-out.txt, the sentences of a docstring a line, and returns their paths.

    A tenth of the files is held out, without the sentences that the others have as well.
    """
    lines, seen = {False: [], True: []}, set()
    for name, nodes in sorted(documents(), key=lambda file: is_held_out(file[0])):
        held = is_held_out(name)
        for _, docstring in nodes:
            sentences = [" ".join(words) for words in sentences_of(docstring)]
            if line := " ".join(sentence for sentence in sentences if sentence not in seen):
                lines[held].append(line)
            if not held:
                seen.update(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.txt", folder / "held-out.txt"
    for path, part in zip(paths, lines.values(), strict=True):
        write_atomically(path, "".join(f"{line}\n" for line in part).encode(errors="replace"))
    return paths


def roots() -> dict:
    """{what the names of its files begin with: folder}."""
    return {"": Path(sysconfig.get_paths()["stdlib"]), "torch/": Path(torch.__file__).parent}


def documents():
    """Yields (name such as "asyncio/events.py", [(node, docstring), ...]) of every file with docstrings, by name."""
    for prefix, root in roots().items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if LEFT_OUT & set(parts):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old escapes in others' strings
                    tree = ast.parse(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, SyntaxError):
                continue
            found = [(node, ast.get_docstring(node)) for node in ast.walk(tree) if type(node) in KINDS]
            found = [(node, text) for node, text in found if text]
            if found:
                yield prefix + "/".join(parts), found


def is_held_out(name) -> bool:
    return derive_seed("held out", name) % 10 == 0


def of_file(name, nodes, draw, seen: set, held: bool):
    """Yields (task, input, target).

    Sentences are added to `seen`; a file that is held out goes without those that are in it, also in other forms.
    """
    topic = next((topic for topic in TOPICS if name.startswith(topic.replace(".", "/") + "/")), None)
    for node, docstring in nodes:
        sentences = sentences_of(docstring)
        if held:
            sentences = [words for words in sentences if " ".join(words) not in seen]
        else:
            seen.update(" ".join(words) for words in sentences)
        for words in sentences:
            if 5 <= len(words) <= WORDS:
                yield from spell(words, draw)
                yield from cloze(words, draw)
        words = [word for sentence in sentences for word in sentence][:WORDS]
        if len(words) >= 5:
            yield "kind", " ".join(words), KINDS[type(node)]
            if topic:
                yield "topic", " ".join(words), topic.removeprefix("torch.")
        first = sentences[0] if sentences else []
        if len(first) >= 4 and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            verb = first[0].lower()
            verb = verb if verb in VERBS else verb.removesuffix("s")
            if verb in VERBS:
                yield "verb", " ".join(first[1:WORDS]), verb


def sentences_of(docstring) -> list:
    """The words of each sentence, its end among them. Examples, tables and code are no sentences."""
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if re.search(r">>>|::|^\s*[-=~+|]{3}", paragraph, re.MULTILINE):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            words = re.sub(r"[`*]+", "", sentence).split()
            letters = sum(letter.isalpha() or letter == " " for letter in sentence)
            if len(words) >= 3 and sentence[-1] in ".!?" and sentence[0].isupper() and letters > 0.85 * len(sentence):
                found.append(words)
    return found


def spell(words, draw):
    places = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha() and word.islower()]
    if not places:
        return
    changed, target = list(words), "right"
    if draw.random() < 0.5:
        i = draw.choice(places)
        word = words[i]
        swaps = [word[:j] + word[j + 1] + word[j] + word[j + 2 :] for j in range(1, len(word) - 1) if word[j] != word[j + 1]]
        if swaps:
            changed[i], target = draw.choice(swaps), "misspelled"
    yield "spell", " ".join(changed), target


def cloze(words, draw):
    places = [i for i, word in enumerate(words) if word in PREPOSITIONS]
    if places:
        i = draw.choice(places)
        yield "cloze", " ".join([*words[:i], "_", *words[i + 1 :]]), words[i]


def at_most(rows: dict, count: int) -> dict:
    """At most so many of each target."""
    kept, counts = {}, {}
    for text, target in sorted(rows.items(), key=lambda row: derive_seed(row[0])):
        counts[target] = counts.get(target, 0) + 1
        if counts[target] <= count:
            kept[text] = target
    return kept
