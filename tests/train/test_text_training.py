"""Training of text to text: mixtures, tokenizers, Adafactor, resuming, the command from end to end."""

import json
import random

import pytest
import torch
from test_resume import check_same, content, run_plans

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.models.hypergrid_t5 import HyperGridT5, HyperGridT5Config
from mmkernels.train import loop, text, text_cli, tokenizer
from mmkernels.train.data.glue import Example
from mmkernels.train.data.text import MIXINGS, Mixture, Texts, TextTask, rates, whole_shares

TINY = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": 256,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "grid": [4, 4],
}
WORDS = (("red", "green", "blue"), ("dog", "cat", "bird"), ("runs", "sits", "flies"))


def run(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks of three-word sentences, one as TSV and one as JSONL: which colour, which animal."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for place, name in enumerate(("color", "animal")):
        (folder / name).mkdir()
        for split, count in (("train", 200), ("dev", 40)):
            rows = [[draw.choice(part) for part in WORDS] for _ in range(count)]
            rows = [{"input": " ".join(words), "target": words[place]} for words in rows]
            if place:
                (folder / name / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            else:
                lines = "".join(f"{row['input']}\t{row['target']}\n" for row in rows)
                (folder / name / f"{split}.tsv").write_text("input\ttarget\n" + lines)
    return folder


def command(data, *more, steps=60):
    options = "--batch-size 16 --lr 2e-2 --evaluate-every 20 --threads 1 --dropout 0.1".split()
    start = ["train", "hypergrid-t5", "--data", data, "--config", data / "tiny.json", "--steps", steps]
    return [str(part) for part in (*start, *options, *more)]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert main(command(data, "--output", output, steps=140)) == 0
    return output


@pytest.fixture(scope="module")
def tokens():
    return tokenizer.train([" ".join(part) for part in WORDS] * 20, 128)


# --- Mixtures ----------------------------------------------------------------------------------------------------------------


def test_rates():
    sizes = [100, 400, 10_000]
    assert rates(sizes, limit=1600).tolist() == pytest.approx([100 / 2100, 400 / 2100, 1600 / 2100])
    assert rates(sizes, "temperature", limit=1600, temperature=2.0).tolist() == pytest.approx([10 / 70, 20 / 70, 40 / 70])
    assert rates(sizes, "equal").tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(InputError, match="mixing is 'by size'; allowed are proportional, temperature, equal"):
        rates(sizes, "by size")
    assert text_cli.MIXINGS == MIXINGS


def test_shares_are_whole_and_none_is_nothing():
    assert whole_shares(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 6).sum() == 6
    assert whole_shares(torch.tensor([0.9999, 0.00005, 0.00005], dtype=torch.float64), 100).tolist() == [98, 1, 1]


def test_mixtures_keep_their_shares_and_their_epochs():
    sizes = [50, 7, 300]
    mixture = Mixture(sizes, rates(sizes, "temperature"), 4, seed=3)
    drawn = [key for batch in mixture.batches(0, 1024) for key in batch]
    assert len(drawn) == 4096
    first = 0
    for size, share in zip(sizes, rates(sizes, "temperature").tolist(), strict=True):
        mine = [(epoch, number - first) for epoch, number in drawn if first <= number < first + size]
        assert abs(len(mine) - 4096 * share) <= 1
        # Every epoch is a permutation, and no two are the same.
        assert [epoch for epoch, _ in mine] == [i // size for i in range(len(mine))]
        orders = [[number for epoch, number in mine if epoch == e] for e in range(len(mine) // size)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert len(orders) < 2 or orders[0] != orders[1]
        first += size


def test_mixtures_are_functions_of_seed_and_step():
    sizes = [50, 7, 300]

    def batches(first, last, seed=0):
        return Mixture(sizes, rates(sizes), 4, seed).batches(first, last)

    whole = batches(0, 2100)
    assert batches(1000, 1003) == whole[1000:1003] and batches(1020, 2060) == whole[1020:2060]
    assert len({key for batch in whole[1023:1026] for key in batch}) == 12
    assert batches(0, 10, seed=1) != whole[:10]


# --- Tokens ------------------------------------------------------------------------------------------------------------------


def test_sentencepiece_as_t5_has_it(tokens, tmp_path):
    assert (tokens.pad_id, tokens.eos_id, tokens.model.unk_id()) == (0, 1, 2)
    assert tokens.size == tokens.pieces + 100
    ids = tokens.encode("red dog<extra_id_0>runs<extra_id_99>")
    assert ids.count(tokens.size - 1) == 1 and ids[-1] == tokens.size - 100 == tokens.pieces
    assert tokens.decode(tokens.encode("red dog") + [1] + tokens.encode("cat")) == "red dog"
    assert tokens.decode(ids) == "red dog <extra_id_0> runs <extra_id_99>"
    assert tokens.decode([tokens.size, tokens.size + 20]) == ""  # room that the embedding has and no token
    tokenizer.save(tokens, tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.encode("blue bird") == tokens.encode("blue bird") and again.fingerprint == tokens.fingerprint
    assert [tokenizer.rounded(size) for size in (32100, 32128, 32129)] == [32128, 32128, 32256]


def test_the_same_text_trains_the_same_tokenizer(tokens):
    lines = [" ".join(part) for part in WORDS] * 20
    assert tokenizer.train(lines, 128).content == tokens.content != tokenizer.train([*lines, "fish"] * 9, 128).content


def test_tokenizer_json(tokens, tmp_path):
    """A tokenizer.json with SentencePiece's pieces gives its ids."""
    library = pytest.importorskip("tokenizers")
    pieces = [(tokens.model.id_to_piece(i), tokens.model.get_score(i)) for i in range(tokens.pieces)]
    other = library.Tokenizer(library.models.Unigram(pieces, unk_id=2))
    other.pre_tokenizer = library.pre_tokenizers.Metaspace()
    other.decoder = library.decoders.Metaspace()
    other.add_special_tokens(["<pad>", "</s>"])
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    for line in ("red dog runs", "green bird"):
        assert loaded.encode(line) == tokens.encode(line)
        assert loaded.decode([*loaded.encode(line), 1, 5]) == line
    assert (loaded.pad_id, loaded.eos_id) == (0, 1) and loaded.file == "tokenizer.json"
    bare = library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(InputError, match=r"bare.json has no token '<pad>'"):
        tokenizer.load(tmp_path / "bare.json")


@pytest.mark.parametrize("name", tokenizer.FILES)
def test_broken_tokenizers(name, tmp_path):
    with pytest.raises(InputError, match="has no tokenizer: neither spiece.model nor tokenizer.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        tokenizer.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00nothing")
    with pytest.raises(InputError, match=f"{name} cannot be read as a"):
        tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="cannot be trained on the text of the tasks"):
        tokenizer.train([], 200)


def test_texts_are_cut_with_their_end_and_padded(tokens):
    examples = [Example("red dog runs", "red"), Example("blue", "flies " * 9)]
    texts = Texts(examples, tokens, max_input=3, max_target=4)
    batch = texts.collate([texts[0, 0], texts[0, 1]])
    assert batch["number"].tolist() == [0, 1] and batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0, :3].tolist() == [*tokens.encode("red dog runs")[:2], 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, min(len(tokens.encode("blue")) + 1, 3)]
    assert batch["labels"].shape[1] == 4 and batch["labels"][1].tolist() == [*tokens.encode("flies " * 9)[:3], 1]
    kept = batch["labels"][0] >= 0
    assert batch["labels"][0][kept].tolist() == [*tokens.encode("red"), 1][:4]
    assert (
        Texts(examples[:1], tokens, 3, 4).fingerprint() != texts.fingerprint() != Texts(examples, tokens, 4, 4).fingerprint()
    )


# --- Steps -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_adafactor_is_t5s(scale):
    """Against the implementation that T5 is fine-tuned with elsewhere, also where gradients are small."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours, theirs = (torch.nn.ParameterList([torch.randn(6, 8), torch.randn(5)]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = loop.Settings(None, 1, 1e-2, weight_decay=0.0, optimizer="adafactor")
    optimizer = loop.make_optimizer(ours, settings)
    peer = transformers.optimization.Adafactor(
        theirs, lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False, clip_threshold=1.0
    )
    start = [parameter.clone() for parameter in ours]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * scale * torch.linspace(0.1, 3, a.shape[-1])
            b.grad = a.grad.clone()
        optimizer.step()
        peer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a - before, b - before, rtol=1e-4, atol=1e-7)


def test_learning_rates():
    constant = loop.Settings(None, 1, 1e-3, warmup_steps=4, schedule="constant")
    assert [loop.learning_rate(constant, step, 100) for step in (0, 1, 3, 50, 99)] == [2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3]
    assert loop.learning_rate(loop.Settings(None, 1, 1e-3, warmup_steps=0, schedule="constant"), 0, 9) == 1e-3


def test_micro_batches_have_the_whole_gradient(tokens):
    """Targets of different lengths: the mean over tokens is no mean of the parts' means."""
    model = HyperGridT5(HyperGridT5Config(**{**TINY, "dropout_rate": 0.0, "backend": "eager"})).double()
    examples = [Example("red dog", "cat"), Example("blue", "red dog runs sits"), Example("green bird sits", "blue red")]
    texts = Texts(examples, tokens, 16, 16)
    batch = texts.collate([texts[0, i] for i in range(3)])
    text.loss(model, batch).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    parts = text.split(batch, 2)
    assert [len(part["labels"]) for part, _ in parts] == [2, 1] and sum(share for _, share in parts) == pytest.approx(1.0)
    model.zero_grad()
    for part, share in parts:
        (text.loss(model, part) * share).backward()
    for parameter, wanted in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-12, atol=1e-14)


def test_averages():
    """The mean over tasks of the means of their metrics, each benchmark's and all tasks'."""
    dev = [Example("", "equivalent", "equivalent"), Example("", "not_equivalent", "not_equivalent")]
    tasks = {
        "mrpc": TextTask("mrpc", dev, dev, ("f1", "accuracy"), "GLUE"),
        "sst2": TextTask("sst2", dev, dev, ("accuracy",), "GLUE"),
        "own": TextTask("own", dev, dev),
    }
    owners = [name for name in tasks for _ in dev]
    tokens = type("Tokens", (), {"encode": lambda self, line: [5] * len(line.split())})()
    judge = text.Generation(owners, Texts(dev * 3, tokens, 9, 9), tasks, 4)
    assert judge.max_new_tokens == 3  # the label, its end, and one more to see that it goes on
    # mrpc: says "equivalent" twice, f1 2/3 and accuracy 1/2; sst2: all right; own: none.
    row = judge.score(["equivalent", "equivalent", "equivalent", "not_equivalent", "x", "y"])
    mrpc = (2 / 3 + 1 / 2) / 2
    assert row["GLUE"] == pytest.approx((mrpc + 1) / 2) and row["average"] == pytest.approx((mrpc + 1 + 0) / 3)
    assert row["mrpc/f1"] == pytest.approx(2 / 3) and row["own/accuracy"] == 0.0 and "SuperGLUE" not in row
    assert text.majority(tasks)["mrpc"]["accuracy"] == 0.5


def test_the_best_is_the_first_of_the_highest():
    history = [{"step": i, "average": value} for i, value in enumerate((0.1, 0.5, 0.3, 0.5))]
    assert loop.best_row(history, "average")["step"] == 1


# --- The command -------------------------------------------------------------------------------------------------------------


def test_training_from_tasks(trained):
    assert {path.name for path in trained.iterdir()} == {
        ".lock",
        "best.safetensors",
        "config.json",
        "learning-curve.png",
        "model.safetensors",
        "spiece.model",
        "task.json",
        "training.safetensors",
    }
    task = json.loads((trained / "task.json").read_text())
    history = task["history"]
    assert [row["step"] for row in history] == [20, 40, 60, 80, 100, 120, 140]
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert task["best"]["average"] == max(row["average"] for row in history) > 0.9  # a third is chance
    config = models.load(trained).config
    assert config.grid == (4, 4) and config.vocab_size % 128 == 0


def test_predictions(trained, capsys):
    status, out, _ = run(
        capsys, "predict", "--checkpoint", trained, "--text", "color: blue dog runs", "--text", "animal: red cat sits"
    )
    assert (status, out.split()) == (0, ["blue", "cat"])


def test_the_best_model_is_kept_not_the_last(data, tmp_path, capsys, monkeypatch):
    """The score is made to be highest at the second of three evaluations."""
    scores = iter((0.1, 0.9, 0.5))
    monkeypatch.setattr(text.Generation, "score", lambda self, texts: {"average": next(scores), "own/accuracy": 0.5})
    kept = {}
    save = loop.save_best

    def saving(folder, model):
        save(folder, model)
        kept[len(kept)] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    monkeypatch.setattr(loop, "save_best", saving)
    assert main(command(data, "--output", tmp_path, steps=60)) == 0
    assert list(kept) == [0, 1] and "at step 40" in capsys.readouterr().out
    saved = models.load(tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept[1].items())


def test_killed_trainings_go_on_to_the_same_bits(data, tmp_path_factory):
    options = command(data, "--save-every", "3", "--evaluate-every", "8", steps=16)
    # Saves at steps 3 and 6, at 8 the best model and then the state: killed in front of the renames of the first two, then,
    # going on from 6, of the state whose best model is there; then, from 6 again, in the middle of the results.
    kills = [{"call": "replace", "number": 1}, {"call": "replace", "number": 4}, {"call": "replace", "number": 8}]
    trainings = run_plans(options, {"whole": [{}], "killed": [*kills, {}]}, tmp_path_factory)
    assert trainings["whole"][1] == [0] and trainings["killed"][1] == [-9] * len(kills) + [0]
    check_same(trainings, "killed")
    whole, killed = (trainings[name][0] for name in ("whole", "killed"))
    assert content(whole / loop.BEST) == content(killed / loop.BEST)
    for name in ("task.json", "spiece.model"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_the_same_command_only(data, trained, capsys):
    before = content(trained / "training.safetensors")
    for change, message in (
        (["--lr", "0.1"], "learning_rate 0.02, asked for is 0.1"),
        (["--mixing", "equal"], "data"),
        (["--grid", "8,4"], "grid"),
        (["--tasks", "color"], "vocab_size 256"),
    ):
        status, _, error = run(capsys, *command(data, "--output", trained, *change, steps=140))
        assert status == 2 and message in error and error.count("\n") == 1, error
    assert content(trained / "training.safetensors") == before
    assert run(capsys, *command(data, "--output", trained, "--resume", steps=140))[0] == 0


def test_from_a_checkpoint_of_hugging_face(data, tmp_path, tokens, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {name: value for name, value in TINY.items() if name != "grid"}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save(tokens, tmp_path / "t5")
    start = command(data, "--init", tmp_path / "t5", "--output", tmp_path / "run", "--evaluate-every", 1, steps=1)
    status, out, error = run(capsys, *start, "--lr", "1e-12", "--micro-batches", "2", "--bfloat16")
    assert status == 0, error
    saved = models.load(tmp_path / "run")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").state_dict()
    torch.testing.assert_close(saved.shared.weight, theirs["shared.weight"])
    assert saved.config.grid == (4, 4) and (tmp_path / "run/spiece.model").read_bytes() == tokens.content
    small = tokenizer.train([" ".join(part) for part in WORDS] * 20 + [chr(i) for i in range(200, 600)], 1000)
    tokenizer.save(small, tmp_path)
    status, _, error = run(capsys, *start, "--tokenizer", tmp_path / "spiece.model")
    assert (
        status == 2 and f"has {small.size} tokens, padding 0 and end 1; the model of" in error and "has 256, 0 and 1" in error
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "color,squad"], "task 'squad' is unknown; allowed are cola, sst2, "),
        (
            ["--config", "t5-base"],
            "--config is 't5-base'; allowed are a .json file and hypergrid-t5-",
        ),
        (["--grid", "5,4"], "--grid, --variant or --dropout do not fit the model: "),
        (["--grid", "4x4"], "--grid is '4x4'; it must be two numbers, such as 32,32"),
        (["--tokenizer", "none.model"], "none.model cannot be read"),
        (["--init", "none"], "none"),
        (["--backend", "best"], "best"),
    ],
)
def test_bad_options(change, message, data, tmp_path, capsys):
    status, _, error = run(capsys, *command(data, "--output", tmp_path, *change))
    assert status == 2 and message in error and error.count("\n") == 1 and error.startswith("error: "), error


def test_a_plain_t5(data, tmp_path, capsys):
    status, out, _ = run(capsys, *command(data, "--output", tmp_path, "--variant", "none", steps=20))
    assert status == 0 and "no grids" in out and models.load(tmp_path).config.grid is None


def test_predictions_of_what_is_no_text_model(trained, tmp_path, capsys):
    for folder, message in ((tmp_path, "it is not the --output of a finished training"), (trained, "give one of them")):
        more = ["a.png"] if folder is trained else []
        status, _, error = run(capsys, "predict", "--checkpoint", folder, "--text", "a", *more)
        assert status == 2 and message in error
    (tmp_path / "task.json").write_text('{"classes": []}')
    status, _, error = run(capsys, "predict", "--checkpoint", tmp_path, "--text", "a")
    assert status == 2 and "holds no model of text" in error
