"""The readers of GLUE, SuperGLUE, `datasets` folders and one's own tasks, T5's texts, and the metrics."""

import json
import random

import glue_files
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from mmkernels.models import InputError
from mmkernels.train import text_metrics
from mmkernels.train.data import glue
from mmkernels.train.data.glue import Example
from mmkernels.train.data.text import load_own, load_tasks

# --- Files as distributed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", glue.SPECS)
def test_files_become_what_t5_trains_on(name, tmp_path):
    task = load_tasks(glue_files.write(tmp_path), [*{name, "cola"}])[name]  # one that is only evaluated stands not alone
    first = task.dev[0]
    assert (first.input, first.target) == glue_files.DATA[name][2]
    assert task.benchmark == glue.SPECS[name].benchmark
    assert bool(task.training) == (name != "wnli")


def test_the_mixture_has_t5s_16_tasks(tmp_path):
    tasks = load_tasks(glue_files.write(tmp_path))
    assert list(tasks) == list(glue.MIXTURE) and len(tasks) == 16 and "wnli" not in tasks
    for place in ("glue", "superglue"):  # each benchmark in a folder of its own
        names = [name for name, spec in glue.SPECS.items() if spec.benchmark.lower() == place]
        glue_files.write(tmp_path / "apart" / place, *names)
    apart = load_tasks(tmp_path / "apart")
    assert {name: task.dev for name, task in apart.items()} == {name: task.dev for name, task in tasks.items()}


def test_what_is_special_of_single_tasks(tmp_path):
    tasks = load_tasks(glue_files.write(tmp_path))
    assert [example.input for example in tasks["cola"].training] == ['cola sentence: He said "so.', "cola sentence: Him said."]
    assert (len(tasks["qqp"].training), tasks["qqp"].left_out) == (1, 1)
    assert [example.group for example in tasks["mnli"].dev] == ["matched", "mismatched"]
    assert [(e.target, e.group) for e in tasks["multirc"].dev] == [("True", (0, 3)), ("False", (0, 3))]
    # One example per answer to train on, one per query to evaluate; every answer is right.
    assert [example.target for example in tasks["record"].training] == ["Ann", "Rome"]
    assert [example.truth for example in tasks["record"].dev] == [("Ann", "Rome")]
    # The noun of a wrong candidate is nothing to learn.
    assert [example.target for example in tasks["wsc"].training] == ["Tom"]
    assert tasks["wsc"].dev[0].truth == ("Tom", False)
    assert tasks["stsb"].dev[0].truth == 3.25


@pytest.mark.parametrize(
    ("score", "text"),
    [(0, "0.0"), (0.5, "0.4"), (1.8, "1.8"), (2.5, "2.4"), (2.7, "2.8"), (3.25, "3.2"), (3.9, "4.0"), (5, "5.0")],
)
def test_scores_are_rounded_to_fifths_and_halves_to_even(score, text):
    assert glue.score_text(score) == text
    assert text == f"{np.round(np.float32(score) * 5) / 5:.1f}"


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "marked"),
    [
        ("Bob asked Tom if he can lend.", "he", 4, "Bob asked Tom if *he* can lend."),
        # The two texts of WSC whose index is off, and which T5 names one by one.
        (
            'the pony threw him over. "Good for him," he said. ',
            "him",
            7,
            'the pony threw him over. "Good for *him* ," he said.',
        ),
        ("Some day they might want to use it , but", "it", 6, "Some day they might want to use *it* , but"),
    ],
)
def test_pronouns_are_marked(text, pronoun, index, marked):
    record = {"text": text, "span2_text": pronoun, "span2_index": index}
    assert glue.mark_pronoun(record, "") == marked


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        (
            "I stuck a pin through a carrot. When I pulled the pin out, it had a hole.",
            "The carrot had a hole.",
            (13, "The carrot"),
        ),
        ("Steve follows Fred's example in everything. He influences him hugely.", "Fred influences him hugely.", (6, "Fred")),
        ("The boy put his coat on the chair and sat on it.", "The boy sat on the chair.", (11, "the chair")),
        ("Tom said to Ray that his car was broken.", "Ray's car was broken.", (5, "Ray")),
    ],
)
def test_wnli_is_asked_as_wsc(premise, hypothesis, expected):
    text, noun = glue.winograd_of_nli(premise, hypothesis)
    words = premise.split()
    assert noun == expected[1] and text.split()[expected[0]] == f"*{words[expected[0]].rstrip('.')}*"


def test_hub_folders_hold_the_same(tmp_path):
    """`datasets` writes what it reads: the hub's columns, labels by number, MNLI's two dev splits."""
    datasets = pytest.importorskip("datasets")
    from_files = load_tasks(glue_files.write(tmp_path / "files"))

    for name, spec in glue.SPECS.items():
        if name == "wnli":
            continue
        path, kind = glue.find(tmp_path / "files", name)
        splits = [("train", "train"), *((stem, split) for stem, (split, _) in spec.dev.items())]
        rows = {split: [r for _, r in glue._read_files(name, path, stem, split) if r] for stem, split in splits}
        for records in rows.values():
            for record in records:
                if name == "stsb":
                    record["label"] = float(record["label"])
                elif "label" in record:
                    record["label"] = spec.labels.index(glue.label_text(record["label"], spec.labels, ""))
        features = None
        if name not in ("stsb", "record"):
            features = datasets.Dataset.from_list(rows["train"]).features.copy()
            features["label"] = datasets.ClassLabel(names=list(spec.labels))
        made = {split: datasets.Dataset.from_list(records, features=features) for split, records in rows.items()}
        place = "glue" if spec.benchmark == "GLUE" else "superglue"
        datasets.DatasetDict(made).save_to_disk(tmp_path / "hub" / place / spec.hub[0])
    from_hub = load_tasks(tmp_path / "hub")
    assert list(from_hub) == list(glue.MIXTURE)
    for name, task in from_files.items():
        assert (from_hub[name].training, from_hub[name].dev) == (task.training, task.dev), name


def test_hub_folders_without_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"sentence": "A.", "label": -1}])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "cola")
    with pytest.raises(InputError, match=r"cola/train, row 0 has no label"):
        load_tasks(tmp_path)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "A.", "label": 1}])}).save_to_disk(tmp_path / "sst2")
    with pytest.raises(InputError, match=r"sst2/train has no column 'sentence'; it has text, label"):
        load_tasks(tmp_path, ["sst2"])


# --- Bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cola", "dev.tsv", None, r"CoLA/dev.tsv cannot be read"),
        (
            "cola",
            "train.tsv",
            "gj04\t2\t\tA.\n",
            r"CoLA/train.tsv:1 has the label '2'; allowed are 0 or unacceptable, 1 or acc",
        ),
        ("cola", "train.tsv", "gj04\t1\t\tA.\ngj04\t1\n", r"CoLA/train.tsv:2 has 2 columns; it must have 4"),
        ("cola", "train.tsv", "", r"has no example of cola in its split 'train'"),
        ("cola", "train.tsv", b"\xff\xfe", r"CoLA/train.tsv cannot be read: 'utf-8'"),
        ("sst2", "dev.tsv", "sentence\nA.\n", r"SST-2/dev.tsv:1 has no column 'label'; it has sentence"),
        ("sst2", "dev.tsv", "index\tsentence\n0\tA.\n", r"SST-2/dev.tsv:1 has no column 'label'"),  # a test split
        ("rte", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n", r"RTE/train.tsv:2 has the label 'maybe'"),
        ("mnli", "dev_mismatched.tsv", None, r"MNLI/dev_mismatched.tsv cannot be read"),
        (
            "stsb",
            "train.tsv",
            glue_files._tsv(glue_files.STSB_HEAD, ["0"] * 9 + ["7.5"]),
            r"STS-B/train.tsv:2 has the score '7.5'",
        ),
        ("boolq", "train.jsonl", '{"question": "a"}\n', r"BoolQ/train.jsonl:1 has no 'passage'; it is no row of BoolQ"),
        ("boolq", "train.jsonl", '\n{"question": "a", \n', r"BoolQ/train.jsonl:2 is no JSON"),
        ("boolq", "train.jsonl", "[1]\n", r"BoolQ/train.jsonl:1 is a JSON list; it must be an object"),
        ("boolq", "val.jsonl", '{"question": "a", "passage": "b", "idx": 0}\n', r"BoolQ/val.jsonl:1 has no label"),
        ("boolq", "val.jsonl", '{"question": "a", "passage": 3, "label": true}\n', r"BoolQ/val.jsonl:1 has passage 3"),
        (
            "copa",
            "val.jsonl",
            '{"premise": "p", "choice1": "a", "choice2": "b", "question": "q", "label": 2}',
            r"the label 2; allowed",
        ),
        ("multirc", "val.jsonl", '{"idx": 0, "passage": {"text": "t"}}', r"MultiRC/val.jsonl:1 has no 'questions'"),
        (
            "record",
            "val.jsonl",
            '{"passage": {"text": "t", "entities": []}, "qas": [{"query": "q"}]}',
            r"val.jsonl:1: a query has no",
        ),
        ("wsc", "train.jsonl", '{"text": "A b c.", "label": true}', r"WSC/train.jsonl:1 has no 'target'"),
        (
            "wsc",
            "train.jsonl",
            json.dumps({**glue_files.WSC, "text": "Mitchell asked Tom."}),
            r"WSC/train.jsonl:1: the pronoun 'he' is not a word of the text",
        ),
    ],
)
def test_broken_files_are_named_with_their_lines(name, file, content, message, tmp_path):
    glue_files.write(tmp_path, name)
    path = tmp_path / glue.SPECS[name].folder / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_tasks(tmp_path)


def test_unknown_tasks_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="has no task"):
        load_tasks(tmp_path)
    glue_files.write(tmp_path, "cola", "wnli")
    with pytest.raises(InputError, match="task 'squad' is unknown; allowed are cola, sst2, .*, wsc"):
        load_tasks(tmp_path, ["squad"])
    with pytest.raises(InputError, match="has no files of qnli: neither a folder QNLI with train and dev nor a folder qnli"):
        load_tasks(tmp_path, ["cola", "qnli"])
    with pytest.raises(InputError, match="wnli alone cannot be trained"):
        load_tasks(tmp_path, ["wnli"])
    with pytest.raises(InputError, match="is no folder"):
        load_tasks(tmp_path / "none")


def test_ones_own_tasks(tmp_path):
    folder = tmp_path / "greet"
    folder.mkdir()
    (folder / "train.tsv").write_text("target\tinput\nhello\tMorning\n")
    (folder / "dev.jsonl").write_text('{"input": "Evening", "target": "bye"}\n')
    task = load_tasks(tmp_path)["greet"]
    assert task.training == [Example("greet: Morning", "hello", "hello")] and task.dev[0].input == "greet: Evening"
    (folder / "task.json").write_text('{"prefix": ""}')
    assert load_own("greet", folder).dev[0].input == "Evening"
    (folder / "dev.jsonl").write_text('{"input": "Evening"}\n')
    with pytest.raises(InputError, match="greet/dev.jsonl:1 has target None; it must be text"):
        load_tasks(tmp_path)
    (folder / "train.tsv").write_text("text\ttarget\na\tb\n")
    with pytest.raises(InputError, match="greet/train.tsv:1 has no column 'input'; it has text, target"):
        load_tasks(tmp_path)


def test_ones_own_task_as_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input": "a", "target": "b"}])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "copy")
    assert load_tasks(tmp_path)["copy"].dev == [Example("copy: a", "b", "b")]


# --- Metrics -----------------------------------------------------------------------------------------------------------------


def examples(truth, groups=None):
    return [Example("", "", t, group) for t, group in zip(truth, groups or [None] * len(truth), strict=True)]


def test_classification_metrics_are_scikit_learns():
    draw = random.Random(0)
    for name, labels in (("mrpc", ("not_equivalent", "equivalent")), ("cb", glue.SPECS["cb"].labels)):
        truth = [draw.choice(labels) for _ in range(200)]
        said = [draw.choice((*labels, t)) for t in truth]
        found = text_metrics.evaluate(glue.SPECS[name].metrics, said, examples(truth))
        assert found["accuracy"] == sklearn.metrics.accuracy_score(truth, said)
        if name == "cb":
            assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, said, average="macro"))
        else:
            assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(truth, said, pos_label="equivalent"))
            mcc = sklearn.metrics.matthews_corrcoef(truth, said)
            assert text_metrics.matthews(said, examples(truth))["matthews"] == pytest.approx(mcc)


def test_texts_that_are_no_label_are_wrong():
    truth = ["True", "True", "False", "False"]
    # As if the two strange texts were the opposite of the truth: one right of two positives, one false positive.
    assert text_metrics.f1(["True", "Tru", "False", "?"], examples(truth))["f1"] == 0.5
    assert text_metrics.accuracy(["True", "Tru", "False", "?"], examples(truth))["accuracy"] == 0.5
    assert text_metrics.matthews(["x"] * 4, examples(truth))["matthews"] == 0.0
    assert text_metrics.macro_f1(["neutral", "x"], examples(["neutral", "neutral"]))["macro_f1"] == pytest.approx(2 / 9)


def test_correlations_are_scipys_of_the_scores_themselves():
    truth, said = [0.1, 1.25, 3.3, 4.9], ["0.2", "two", "3.0", "nan"]
    numbers = [0.2, -1.0, 3.0, -1.0]
    found = text_metrics.evaluate(("pearson", "spearman"), said, examples(truth))
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(truth, numbers)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(truth, numbers)[0])
    assert text_metrics.pearson(["1.0"] * 4, examples(truth))["pearson"] == 0.0


def test_groups():
    matched = text_metrics.accuracy_by_group(["a", "a", "b"], examples(["a", "b", "b"], ["matched", "matched", "mismatched"]))
    assert matched == {"accuracy_matched": 0.5, "accuracy_mismatched": 1.0}
    texts, truth, questions = (
        ["True", "False", "True", "True"],
        ["True", "False", "True", "False"],
        [(0, 0), (0, 0), (0, 1), (0, 1)],
    )
    assert text_metrics.exact_match_by_group(texts, examples(truth, questions)) == {"exact_match": 0.5}


def test_answers_are_compared_as_squad_does():
    answers = examples([("The Beatles", "Beatles"), ("New York City",), ("Rome",), ("Bonn",)])
    texts = ["the beatles!", "York city", "in the Rome", ""]
    assert text_metrics.answer_exact_match(texts, answers) == {"exact_match": 0.25}
    assert text_metrics.answer_f1(texts, answers)["f1"] == pytest.approx((1 + 2 * 2 / 5 + 2 / 3 + 0) / 4)


@pytest.mark.parametrize(
    ("said", "candidate", "same"),
    [
        ("The fuzzy bunny", "bunny", True),
        ("bob", "Bob's hat", False),
        ("their cat", "my cat ", True),
        ("dog", "cat", False),
        ("", "cat", False),
    ],
)
def test_nouns_are_compared_as_t5_does(said, candidate, same):
    assert text_metrics.same_noun(said, candidate) is same
    assert text_metrics.referent_accuracy([said], examples([(candidate, True)])) == {"accuracy": float(same)}
