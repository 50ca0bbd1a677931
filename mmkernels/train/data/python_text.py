"""Five tasks of real text that every machine has: the docstrings of Python's standard library and of torch.

| task | input | target |
|---|---|---|
| `accept` | a sentence, or one with two neighbouring words exchanged | acceptable, unacceptable |
| `cloze` | a sentence with a preposition left out | the preposition |
| `match` | a function's head and the first sentence of a docstring, its own or another function's | match, no match |
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
VERBS = ("add", "check", "convert", "create", "get", "initialize", "read", "remove", "return", "set", "test", "write")
WORDS = 24  # of an input, at most
PER_TOPIC = 600


def write(folder: Path, seed=0, most=8000, held_out=1000) -> dict:
    """Writes the tasks as `folder`/NAME/{train,dev}.jsonl, at most so many examples each; returns {name: (train, dev) sizes}."""
    examples, seen = {}, set()
    files = sorted(documents(), key=lambda file: is_held_out(file[0]))  # those to train on first
    for name, nodes in files:
        held = is_held_out(name)
        tasks = examples.setdefault(held, {})
        for task, text, target in of_file(name, nodes, random.Random(derive_seed(seed, name)), seen, held):
            tasks.setdefault(task, {}).setdefault(text, target)
    for held, tasks in examples.items():
        tasks["match"] = matches(tasks.pop("pairs"), random.Random(derive_seed(seed, held)))
        tasks["topic"] = at_most(tasks["topic"], PER_TOPIC // 10 if held else PER_TOPIC)
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
    return sizes


def documents():
    """Yields (name such as "asyncio/events.py", [(node, docstring), ...]) of every file with docstrings, by name."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"]), "torch/": Path(torch.__file__).parent}
    for prefix, root in roots.items():
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
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [(node, ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, kinds)]
            found = [(node, text) for node, text in found if text]
            if found:
                yield prefix + "/".join(parts), found


def is_held_out(name) -> bool:
    return derive_seed("held out", name) % 10 == 0


def of_file(name, nodes, draw, seen: set, held: bool):
    """Yields (task, input, target); for "pairs" a docstring's sentence and the head that it belongs to.

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
                yield accept(words, draw)
                yield from cloze(words, draw)
        words = [word for sentence in sentences for word in sentence][:WORDS]
        if topic and len(words) >= 5:
            yield "topic", " ".join(words), topic.removeprefix("torch.")
        first = sentences[0] if sentences else []
        if len(first) >= 4 and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            verb = first[0].lower()
            verb = verb if verb in VERBS else verb.removesuffix("s")
            if verb in VERBS:
                yield "verb", " ".join(first[1:WORDS]), verb
            if not node.name.startswith("__"):
                yield "pairs", " ".join(first[:WORDS]), head(node)


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


def accept(words, draw):
    changed = list(words)
    if draw.random() < 0.5:
        places = [i for i in range(len(words) - 2) if words[i].lower() != words[i + 1].lower()]
        i = draw.choice(places) if places else 0
        changed[i], changed[i + 1] = changed[i + 1], changed[i]
        if i == 0:  # a capital in second place would give it away
            changed[0], changed[1] = changed[0][0].upper() + changed[0][1:], changed[1][0].lower() + changed[1][1:]
    return "accept", " ".join(changed), "acceptable" if changed == words else "unacceptable"


def cloze(words, draw):
    places = [i for i, word in enumerate(words) if word in PREPOSITIONS]
    if places:
        i = draw.choice(places)
        yield "cloze", " ".join([*words[:i], "_", *words[i + 1 :]]), words[i]


def head(node):
    arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{node.name}({', '.join(name for name in arguments[:8] if name not in ('self', 'cls'))})"


def matches(pairs: dict, draw) -> dict:
    """Half of the sentences with their own heads, half with those of others."""
    sentences, heads = list(pairs), list(pairs.values())
    found = {}
    for number, sentence in enumerate(sentences):
        own = draw.random() < 0.5
        other = heads[number] if own else draw.choice(heads)
        found[f"{other} {sentence}"] = "match" if other == heads[number] else "no match"
    return found


def at_most(rows: dict, count: int) -> dict:
    """At most so many of each target."""
    kept, counts = {}, {}
    for text, target in sorted(rows.items(), key=lambda row: derive_seed(row[0])):
        counts[target] = counts.get(target, 0) + 1
        if counts[target] <= count:
            kept[text] = target
    return kept
