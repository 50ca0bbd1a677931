"""Training of CA-MTL: uncertainty sampling against the released traces, GLUE as pairs, tokens, resuming, the command."""

import json
import os
import random
from pathlib import Path

import glue_files
import pytest
import torch
from safetensors.torch import load_file
from test_resume import check_same, content, run_plans

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import InputError, ca_mtl
from mmkernels.train import loop, multitask, tokenizer, uncertainty
from mmkernels.train.data import glue
from mmkernels.train.data.pairs import TASKS, BySize, Candidates, Pair, Pairs, classes_of, load_tasks

ROOTS = [Path(__file__).parents[1] / "golden" / "ca_mtl"]
if os.environ.get("MMKERNELS_GOLDEN"):
    ROOTS.append(Path(os.environ["MMKERNELS_GOLDEN"]) / "ca_mtl")
TRACES = [path for root in ROOTS for path in sorted(root.glob("uncertainty_sampling*"))]

TINY = {
    "max_seq_length": 16,
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


# --- Uncertainty sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", TRACES, ids=lambda path: path.name)
def test_released_traces(folder):
    config = json.loads((folder / "config.json").read_text())
    inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    counts = torch.tensor(config["num_labels"])
    names = config["tasks"]
    stand_in = (names.index("sts-b"), names.index("mrpc")) if config["stsb_mrpc_copy"] else None
    for step in range(config["steps"]):
        task_id, logits = inputs[f"step{step}.task_id"], inputs[f"step{step}.logits"]
        labels = counts[task_id]
        logits = logits.masked_fill(torch.arange(logits.shape[1]) >= labels[:, None], float("-inf"))
        entropy = uncertainty.normalized_entropy(logits, labels)
        torch.testing.assert_close(entropy, expected[f"step{step}.normalized_entropy"], atol=2e-6, rtol=1e-5)
        means = uncertainty.task_means(entropy, task_id)
        torch.testing.assert_close(means, expected[f"step{step}.task_mean"], atol=2e-6, rtol=1e-5)
        chosen = uncertainty.select(logits, task_id, labels, config["train_batch_size"], stand_in)
        assert chosen.tolist() == expected[f"step{step}.chosen_position"].tolist(), step


def test_a_regression_is_chosen_only_in_the_place_of_another():
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [1.0, float("-inf")], [2.0, float("-inf")]])
    task_id, counts = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 1, 1])
    entropy = uncertainty.normalized_entropy(logits, counts)
    assert (entropy[2:] == 0).all()
    assert uncertainty.select(logits, task_id, counts, 2).tolist() == [0, 1]
    scores = uncertainty.scores(entropy, task_id, (1, 0))
    assert scores[2:].tolist() == scores[:2].tolist()
    nothing = uncertainty.scores(torch.zeros(4), task_id)
    assert nothing.tolist() == [0.0] * 4


def test_candidates_are_a_batch_of_each_task():
    sizes = [9, 11, 6]
    draw = Candidates(sizes, 4, 3)
    assert draw.steps == 3 * 3  # 11 examples are 3 batches, and there are 3 tasks
    steps = draw.batches(0, 12)
    assert [len(step) for step in steps[:3]] == [4 + 4 + 4, 4 + 4 + 2, 1 + 3 + 4]
    for step in (2, 5):  # after its last batch a task begins anew, in another order
        of_first = [number for keys in steps[step - 2 : step + 1] for _, number in keys if number < 9]
        assert sorted(of_first) == list(range(9))
    assert steps[0] != steps[3]
    assert draw.batches(5, 8) == steps[5:8]  # wherever one goes on
    assert Candidates(sizes, 4, 3, 0.5).steps == 4


def test_batches_by_size_are_permutations():
    draw = BySize([5, 6], 4, 0)
    assert draw.steps == 2
    steps = draw.batches(0, 5)
    assert draw.batches(1, 4) == steps[1:4] and len(steps) == 5
    for epoch in range(2):
        numbers = [number for keys in steps[2 * epoch : 2 * epoch + 2] for _, number in keys]
        assert len(set(numbers)) == 8 and max(numbers) < 11


# --- GLUE as pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_of_every_task(tmp_path):
    glue_files.write(tmp_path, *(name for name in TASKS if name != "wnli"))
    tasks = load_tasks(tmp_path)
    assert list(tasks) == [name for name in TASKS if name != "wnli"]
    assert list(tasks) == list(ca_mtl.GLUE)
    assert {name: len(classes_of(name)) or 1 for name in tasks} == ca_mtl.GLUE
    for number, task in enumerate(tasks.values()):
        assert task.training and task.dev and all(pair.task == number for pair in (*task.training, *task.dev))
    cola, stsb, mnli = tasks["cola"].dev[0], tasks["stsb"].dev[0], tasks["mnli"].dev
    assert (cola.first, cola.second, cola.label) == ("John made Bill master of himself.", None, 1.0)
    assert stsb.label == stsb.truth == 3.25 and stsb.second is not None
    assert [pair.group for pair in mnli] == ["matched", "mismatched"]
    assert all(classes_of("mnli")[int(pair.label)] == pair.truth for pair in mnli)
    assert classes_of("mnli") == ("contradiction", "entailment", "neutral")


def test_the_premise_comes_first(tmp_path):
    glue_files.write(tmp_path, "mnli")
    records = [record for _, record in glue.read("mnli", tmp_path / "MNLI", "files", "dev_matched", "validation_matched")]
    pair = load_tasks(tmp_path, ["mnli"])["mnli"].dev[0]
    assert (pair.first, pair.second) == (records[0]["premise"], records[0]["hypothesis"])


def test_wrong_data(tmp_path):
    with pytest.raises(InputError, match="has no task of GLUE"):
        load_tasks(tmp_path)
    with pytest.raises(InputError, match="which is no folder"):
        load_tasks(tmp_path / "none")
    glue_files.write(tmp_path, "cola")
    with pytest.raises(InputError, match="task 'copa' is unknown; allowed are cola, mnli"):
        load_tasks(tmp_path, ["copa"])
    with pytest.raises(InputError, match="has no files of rte; it has cola"):
        load_tasks(tmp_path, ["rte"])


# --- Tokens ------------------------------------------------------------------------------------------------------------------

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##c", "A"]


def test_pairs_of_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tokens = tokenizer.load_bert(tmp_path)
    assert (tokens.size, tokens.pad_id) == (10, 0)
    assert tokens.encode_pair("a b", None, 8) == ([2, 5, 6, 3], 4)
    assert tokens.encode_pair("ac", "b A", 8) == ([2, 5, 8, 3, 6, 9, 3], 4)
    dataset = Pairs([Pair(1, "a", "b", 2.0, None), Pair(0, "a b c", None, 1.0, None)], tokens, 6)
    batch = dataset.collate([dataset[0, 0], dataset[0, 1]])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 6, 3, 0], [2, 5, 6, 7, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6]
    assert batch["attention_mask"].tolist() == [[True] * 5 + [False]] * 2
    assert batch["labels"].tolist() == [2.0, 1.0] and batch["task_id"].tolist() == [1, 0]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert tokenizer.load_bert(tmp_path).encode_pair("A", None, 8)[0] == [2, 5, 3]


def test_long_pairs_are_cut_as_transformers_cuts_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tokens = tokenizer.load_bert(tmp_path / "vocab.txt")
    peer = transformers.BertTokenizerFast(tokenizer_file=None, tokenizer_object=tokens.model)
    for first, second in ((9, 2), (2, 9), (9, 9), (7, 8), (8, 7), (20, 3), (1, 1), (9, None)):
        texts = ["a " * first, None if second is None else "b " * second]
        for length in (5, 8, 11):
            ids, _ = tokens.encode_pair(*texts, length)
            right = peer(*texts, truncation="longest_first", max_length=length)["input_ids"]
            assert len(ids) == len(right) <= length
            assert abs(ids.count(5) - right.count(5)) <= 1  # which one of two equal texts is cut first differs by version


def test_a_vocabulary_of_texts():
    texts = ["red dog", "red cat", "blue cat!"]
    made = tokenizer.train_bert(texts, 60)
    assert made.content == tokenizer.train_bert(list(texts), 60).content
    words = made.model.get_vocab()
    assert {"red", "cat", "dog", "blue", "!", "r", "##r"} <= set(words) and words["cat"] < words["red"] < words["blue"]
    assert made.encode_pair("red", "bat", 16)[0] == [2, words["red"], 3, *(words[t] for t in ("b", "##a", "##t")), 3]
    with pytest.raises(InputError, match="a tokenizer of 12 tokens has no room for the .* letters"):
        tokenizer.train_bert(texts, 12)


def test_wrong_tokenizers(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer: neither tokenizer.json nor vocab.txt"):
        tokenizer.load_bert(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"vocab.txt has no token '\[PAD\]'"):
        tokenizer.load_bert(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer.json"):
        tokenizer.load_bert(tmp_path)


# --- Training ----------------------------------------------------------------------------------------------------------------

WORDS = "red green blue dog cat bird runs sits flies".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tasks in GLUE's files: whether a text has `red`, whether two share their animal, how many words they share."""
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)
    (folder / "tiny.json").write_text(json.dumps(TINY))

    def text():
        return [draw.choice(WORDS[part : part + 3]) for part in (0, 3, 6)]

    for split, count in (("train", 150), ("dev", 40)):
        cola, mrpc = [], ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        stsb = ["\t".join(glue_files.STSB_HEAD)]
        for number in range(count):
            a, b = text(), text()
            cola.append(f"x\t{int(a[0] == 'red')}\t\t{' '.join(a)}")
            mrpc.append(f"{int(a[1] == b[1])}\t1\t2\t{' '.join(a)}\t{' '.join(b)}")
            if number < count // 2:
                same = sum(x == y for x, y in zip(a, b, strict=True))
                stsb.append("\t".join(["0", "g", "f", "y", "1", "s", "s", " ".join(a), " ".join(b), f"{5 * same / 3:.2f}"]))
        for name, lines in (("CoLA", cola), ("MRPC", mrpc), ("STS-B", stsb)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def tokens_of(tasks):
    examples = [example for task in tasks.values() for example in task.training]
    return tokenizer.train_bert((text for e in examples for text in (e.first, e.second or "")), 200)


def command(data, *more):
    start = ["train", "ca-mtl", "--data", data, "--config", data / "tiny.json", "--batch-size", 16, "--threads", 1]
    return [str(part) for part in (*start, "--backend", "eager", *more)]


def run(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    options = ("--epochs", 16, "--lr", 5e-3, "--dropout", 0.0, "--backend", "auto")
    assert main(command(data, "--output", output, *options)) == 0
    return output


def test_it_learns_all_tasks_together(trained, data):
    task = json.loads((trained / "task.json").read_text())
    assert task["kind"] == "multitask" and list(task["tasks"]) == ["cola", "stsb", "mrpc"]
    best = task["best"]
    assert best["cola/matthews"] > 0.95
    assert {"cola/matthews", "stsb/pearson", "stsb/spearman", "mrpc/f1", "mrpc/accuracy", "average"} <= set(best)
    means = [best["cola/matthews"], (best["stsb/pearson"] + best["stsb/spearman"]) / 2]
    means.append((best["mrpc/f1"] + best["mrpc/accuracy"]) / 2)
    assert best["average"] == pytest.approx(sum(means) / 3) and best["average"] > 0.5
    assert len(task["history"]) == 16 and task["history"][-1]["loss"] < task["history"][0]["loss"]
    assert (trained / "learning-curve.png").read_bytes()[:4] == b"\x89PNG"
    model = models.load(trained)
    assert model.config.tasks == ("cola", "stsb", "mrpc") and model.config.num_labels == (2, 1, 2)


def test_predict(trained, capsys):
    status, out, _ = run(
        capsys, "predict", "--checkpoint", trained, "--task", "cola", "--text", "red cat sits", "--text", "blue cat sits"
    )
    assert status == 0 and out.split() == ["acceptable", "unacceptable"]
    status, out, _ = run(capsys, "predict", "--checkpoint", trained, "--task", "stsb", "--text", "red cat sits\tred cat sits")
    assert status == 0 and float(out) > 1.0
    for options, message in (
        (["--text", "a"], "--task is None; allowed are cola, stsb, mrpc"),
        (["--text", "a", "--task", "rte"], "--task is 'rte'; allowed are cola, stsb, mrpc"),
        (["--task", "cola"], "--task is given without --text"),
    ):
        status, _, error = run(capsys, "predict", "--checkpoint", trained, *options)
        assert status == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("sampling", ["size", "uncertainty"])
def test_goes_on_to_the_same_bits(data, tmp_path_factory, sampling):
    options = command(data, "--epochs", 1, "--sampling", sampling, "--save-every", 3, "--lr", 1e-3, "--evaluate-every", 8)
    kills = [{"call": "replace", "number": 1}, {"call": "replace", "number": 4}]
    trainings = run_plans(options, {"whole": [{}], "killed": [*kills, {}]}, tmp_path_factory)
    assert trainings["whole"][1] == [0] and trainings["killed"][1] == [-9, -9, 0]
    check_same(trainings, "killed")
    whole, killed = (trainings[name][0] for name in ("whole", "killed"))
    assert content(whole / loop.BEST) == content(killed / loop.BEST)
    for name in ("task.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    history = json.loads((whole / "task.json").read_text())["history"]
    steps = (150 + 150 + 75) // 16 if sampling == "size" else 10 * 3
    assert history[-1]["step"] == steps


def test_the_batch_is_what_the_model_is_least_sure_of(data):
    """A step of the loop takes the rows that are chosen, in the order of their scores."""
    tasks = load_tasks(data)
    tokens = tokens_of(tasks)
    config = ca_mtl.CAMTLConfig(tasks=tuple(tasks), num_labels=(2, 1, 2), **TINY | {"vocab_size": tokens.size})
    torch.manual_seed(0)
    model = ca_mtl.CAMTL(config)
    task, steps = multitask.make_task(tasks, tokens, length=16, batch_size=8, seed=0, sampling="uncertainty", share=0.1)
    assert steps == int(19 * 3 * 0.1)
    (keys,) = task.draw(0, 1)
    batch = task.training.collate([task.training[key] for key in keys])
    assert len(batch["labels"]) == 24
    taken = task.select(model.eval(), batch)
    assert {len(tensor) for tensor in taken.values()} == {8}
    logits = model(**{name: batch[name] for name in multitask.ARGUMENTS}).logits
    entropy = uncertainty.normalized_entropy(logits, model.counts[batch["task_id"]])
    scores = uncertainty.scores(entropy, batch["task_id"], (1, 2))
    assert taken["number"].tolist() == batch["number"][scores.topk(8).indices].tolist()


def test_from_a_bert(data, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tasks = load_tasks(data)
    tokens = tokens_of(tasks)
    sizes = {name: value for name, value in TINY.items() if name != "max_seq_length"}
    transformers.BertModel(transformers.BertConfig(**sizes | {"vocab_size": tokens.size})).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_bytes(tokens.content)
    options = ("--init", tmp_path / "bert", "--freeze", "0-0", "--max-length", 16, "--epochs", 1, "--tasks", "cola,mrpc")
    status, out, error = run(capsys, *command(data, "--output", tmp_path / "run", *options))
    assert status == 0, error
    model = models.load(tmp_path / "run")
    peer = transformers.BertModel.from_pretrained(tmp_path / "bert")
    assert torch.equal(model.word.weight, peer.embeddings.word_embeddings.weight)  # frozen
    assert torch.equal(model.layers[0].fc1.weight, peer.encoder.layer[0].intermediate.dense.weight)
    assert (model.layers[0].attention.matrix != 0).any()  # goes on
    wrong = run(capsys, *command(data, "--output", tmp_path / "x", *options[:2], "--max-length", 7))
    assert wrong[0] == 2 and "max_seq_length is 7; it must divide" in wrong[2]
    wrong = run(capsys, *command(data, "--output", tmp_path / "x", "--freeze", "0-9"))
    assert wrong[0] == 2 and "--freeze: the layers from 0 to 9" in wrong[2]


def test_the_same_command_only(data, tmp_path, capsys):
    options = command(data, "--output", tmp_path, "--epochs", 1, "--tasks", "cola")
    assert run(capsys, *options)[0] == 0
    for change, message in ((["--lr", "0.1"], "learning_rate"), (["--freeze", "0-0"], "data"), (["--epochs", "2"], "steps")):
        status, _, error = run(capsys, *options, *change)
        assert status == 2 and message in error and error.count("\n") == 1, error


def test_the_learning_rate_rises_and_falls_in_lines():
    settings = loop.Settings(epochs=None, batch_size=1, learning_rate=1.0, warmup_steps=10, steps=100, schedule="linear")
    rates = [loop.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)
