"""GLUE as bytes for Perceiver IO: pairs of texts, the loss of rows of several tasks, the command, what it begins with."""

import json

import glue_files
import pytest
import torch

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import perceiver_io
from mmkernels.train import byte_text, multitask
from mmkernels.train.byte_text import CLS, PAIRS, SEP, encode
from mmkernels.train.data.pairs import Pair, Pairs, load_tasks

ENCODER = {
    **{"num_latents": 4, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    **{"cross_qk_channels": 16, "cross_v_channels": 16},
}
INPUT = {"kind": "tokens", "vocab_size": 262, "max_length": 48, "channels": 16}
TINY = {
    "input": INPUT,
    "encoder": ENCODER,
    "queries": {"kind": "learned", "count": 1, "channels": 16},
    "output": {"kind": "tasks", "tasks": {"any": 2}},
}
LANGUAGE = {
    "input": INPUT,
    "encoder": ENCODER,
    "queries": {"kind": "learned", "count": 48, "channels": 16, "per_token": True},
    "output": {"kind": "tokens", "vocab_size": 262},
}


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def glue(tmp_path):
    glue_files.write(tmp_path / "glue", "cola", "rte", "stsb")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def command(glue, *more):
    small = ["--steps", 6, "--evaluate-every", 3, "--batch-size", 4, "--threads", 1, "--lr", "1e-3", "--warmup", 0]
    start = ["train", "perceiver-glue", "--data", glue / "glue", "--config", glue / "tiny.json", "--output", glue / "run"]
    return [*start, *small, *more]


def test_pairs_of_texts():
    assert PAIRS.encode_pair("é", None, 9) == ([CLS, *encode("é"), SEP], 4)
    assert PAIRS.encode_pair("ab", "c", 9) == ([CLS, *encode("ab"), SEP, *encode("c"), SEP], 4)
    assert PAIRS.encode_pair("abcdef", "xyz", 8) == ([CLS, *encode("abc"), SEP, *encode("xy"), SEP], 5)


def test_a_row_is_judged_by_its_own_task():
    """Against a loop over the rows, each alone with its own query."""
    torch.manual_seed(0)
    tasks = {"cola": 2, "mnli": 3, "stsb": 1}
    parts = {**TINY, "queries": {**TINY["queries"], "count": 3}, "output": {"kind": "tasks", "tasks": tasks}}
    model = perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**parts)).double()
    rows = [
        Pair(2, "a cat", "a dog", 3.5, 3.5),
        Pair(0, "It rains.", None, 1.0, "acceptable"),
        Pair(2, "one", "two", 0.2, 0.2),
    ]
    data = Pairs(rows, PAIRS, 48, fixed=False)
    batch = data.collate([data[None, i] for i in range(3)])
    found = multitask.perceiver_answer(model, batch)
    costs = []
    for i, row in enumerate(rows):
        ids = torch.tensor([PAIRS.encode_pair(row.first, row.second, 48)[0]])
        own = list(model(ids).values())[row.task]
        label = torch.tensor([row.label])
        cost = torch.nn.functional.cross_entropy(own, label.long()) if row.task < 2 else (own[0, 0] - row.label) ** 2
        costs.append(cost)
        width = own.shape[1]
        torch.testing.assert_close(found.logits[i, :width], own[0], rtol=1e-9, atol=1e-9)
        assert (found.logits[i, width:] == -torch.inf).all()
    torch.testing.assert_close(found.loss, sum(costs) / 3, rtol=1e-9, atol=1e-9)
    wanted = torch.stack([costs[1], torch.zeros((), dtype=torch.float64), (costs[0] + costs[2]) / 2])
    torch.testing.assert_close(found.task_losses, wanted, rtol=1e-9, atol=1e-9)
    found.loss.backward()
    grad = model.queries.table.grad
    assert grad[0].any() and not grad[1].any() and grad[2].any()


def test_all_tasks_at_once_and_predictions(glue, capsys):
    status, out, _ = run(capsys, *command(glue))
    assert status == 0 and "cola: 2 examples to train on, 1 held out" in out and "average" in out
    assert {path.name for path in (glue / "run").iterdir()} >= {"config.json", "model.safetensors", "task.json"}
    config = json.loads((glue / "run" / "config.json").read_text())
    assert config["output"]["tasks"] == {"cola": 2, "rte": 2, "stsb": 1} and config["queries"]["count"] == 3
    texts = ["--text", "It rained.\tIt was wet.", "--text", "x\ty"]
    status, out, _ = run(capsys, "predict", "--checkpoint", glue / "run", "--task", "rte", *texts)
    assert status == 0 and set(out.split()) <= {"entailment", "not_entailment"} and len(out.splitlines()) == 2
    status, out, _ = run(capsys, "predict", "--checkpoint", glue / "run", "--task", "stsb", *texts[:2])
    float(out)
    status, _, error = run(capsys, "predict", "--checkpoint", glue / "run", "--task", "qqp", *texts[:2])
    assert status == 2 and "allowed are cola, rte, stsb" in error
    status, out, _ = run(capsys, *command(glue))
    assert status == 0 and "resuming" in out and "at step 6" in out


def test_one_task_from_a_language_model(glue, capsys):
    torch.manual_seed(0)
    language = perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**LANGUAGE))
    language.save_pretrained(glue / "language")
    status, out, _ = run(capsys, *command(glue, "--tasks", "cola", "--init", glue / "language", "--lr", "1e-12"))
    assert status == 0 and f"are those of {glue / 'language'}" in out
    model = models.load(glue / "run")
    torch.testing.assert_close(model.input.tokens.weight, language.input.tokens.weight)
    torch.testing.assert_close(model.encoder.latents, language.encoder.latents)
    assert list(model.output.heads) == ["cola"]
    other = perceiver_io.PerceiverIOConfig(**{**LANGUAGE, "encoder": {**ENCODER, "num_latents": 5}})
    perceiver_io.PerceiverIO(other).save_pretrained(glue / "other")
    status, _, error = run(capsys, *command(glue, "--init", glue / "other", "--restart"))
    assert status == 2 and "has no encoder.latents of the shape (4, 16)" in error


def test_bad_input(glue, capsys):
    for message, *more in (
        ("is no folder", "--data", glue / "gone"),
        ("task 'qnlo' is unknown", "--tasks", "cola,qnlo"),
        ("it must be 'tasks'", "--config", "perceiver-io-language-bytes"),
    ):
        status, _, error = run(capsys, *command(glue, *more))
        assert status == 2 and message in error and error.count("\n") == 1 and not (glue / "run").exists(), error


def test_micro_batches_are_the_batch(glue):
    torch.manual_seed(0)
    tasks = load_tasks(glue / "glue")
    task, _ = multitask.make_task(tasks, byte_text.PAIRS, length=48, batch_size=6, seed=0, answer=multitask.perceiver_answer)
    parts = {**TINY, "queries": {**TINY["queries"], "count": 3}}
    parts["output"] = {"kind": "tasks", "tasks": {"cola": 2, "rte": 2, "stsb": 1}}
    model = perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**parts))
    batch = task.training.collate([task.training[0, i] for i in range(len(task.training))])
    micro = task.split(batch, 3)
    assert [len(part["labels"]) for part, _ in micro] == [2, 2]
    torch.testing.assert_close(sum(share * task.loss(model, part) for part, share in micro), task.loss(model, batch))
