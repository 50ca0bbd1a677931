"""The tasks made of Python's docstrings, and the comparison that is trained on them."""

import ast
import json
import random

import pytest

from mmkernels.__main__ import main
from mmkernels.train.data import python_text
from mmkernels.train.data.text import load_tasks

SOURCE = '''"""Tools for tests of the parser and its friends.

>>> not_a_sentence()

And this is one of the sentences. This too is a sentence
that goes on in the next line!
"""
class Base:
    """A base for `all` of the *handlers* in this file."""
    def get(self, name):
        """Return the handler with this name."""
    def __len__(self):
        """Returns 3."""
'''


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_source(seen, held):
    nodes = [(node, ast.get_docstring(node)) for node in ast.walk(ast.parse(SOURCE)) if type(node) in python_text.KINDS]
    return list(python_text.of_file("asyncio/x.py", nodes, random.Random(0), seen, held))


def test_what_is_made_of_a_file():
    seen = set()
    found = of_source(seen, False)
    by_task = {task: {text: target for t, text, target in found if t == task} for task, _, _ in found}
    assert set(by_task) == {"cloze", "kind", "spell", "topic", "verb"}
    assert by_task["verb"] == {"the handler with this name.": "return"}
    assert by_task["kind"]["A base for all of the handlers in this file."] == "class"
    assert by_task["topic"]["Return the handler with this name."] == "asyncio"
    assert "Return the handler _ this name." in by_task["cloze"]
    assert not any("not_a_sentence" in text for text in by_task["kind"])
    sentence = "This too is a sentence that goes on in the next line!"
    assert sentence in seen and any(sorted(text) == sorted(sentence) for text in by_task["spell"])
    for text, target in by_task["spell"].items():
        assert (text in seen) == (target == "right")
    # A held-out file with the same sentences gives nothing.
    assert of_source(seen, True) == []


def test_tasks_are_the_same_every_time_and_nothing_leaks(few_files, tmp_path):
    sizes = python_text.write(tmp_path / "a", most=500, held_out=100)
    python_text.write(tmp_path / "b", most=500, held_out=100)
    assert list(sizes) == ["cloze", "kind", "spell", "topic", "verb"] and all(10 < sizes[task][0] for task in sizes)
    for task in sizes:
        for split in ("train", "dev"):
            assert (tmp_path / "a" / task / f"{split}.jsonl").read_bytes() == (
                tmp_path / "b" / task / f"{split}.jsonl"
            ).read_bytes()
        training, dev = (rows(tmp_path / "a" / task / f"{split}.jsonl") for split in ("train", "dev"))
        assert [len(training), len(dev)] == sizes[task]
        assert not {row["input"] for row in training} & {row["input"] for row in dev}
    assert list(load_tasks(tmp_path / "a")) == list(sizes)


def test_the_comparison(few_files, tmp_path, capsys):
    options = "--steps 2 --evaluate-every 1 --examples 60 --held-out 5 --batch-size 4 --vocab-size 400 --threads 1"
    more = ["--backend", "eager", "--single-tasks", "--output", str(tmp_path)]
    command = ["train", "hypergrid-t5-demo", *options.split(), *more]
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert list(found) == ["majority", "a model a task", "together", "together, with grids"]
    tasks = ["cloze", "kind", "spell", "topic", "verb"]
    assert all(list(row) == [*tasks, "average"] for row in found.values())
    assert found["majority"]["average"] == pytest.approx(sum(found["majority"][task] for task in tasks) / 5)
    assert "together, with grids" in printed and (tmp_path / "comparison.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "grids/config.json").read_text())["grid"] == [8, 8]
    assert json.loads((tmp_path / "plain/config.json").read_text())["grid"] is None
