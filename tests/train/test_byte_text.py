"""Text as bytes: ids, whole-word masks, baselines, filling in, and the trainings on the command line."""

import json
import math

import pytest
import torch

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.train import byte_text, masked_lm
from mmkernels.train.byte_text import MASK, MASKING, RESERVED, decode, encode, encode_blanks, encode_line

TEXT = "The quick brown fox jumps over the lazy dog, and it does so again: déjà vu.\nA line of its own\t(with a tab).\n"
TINY = {
    "input": {"kind": "tokens", "vocab_size": 262, "max_length": 64, "channels": 16},
    "encoder": {
        **{"num_latents": 8, "latent_channels": 32, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
        **{"cross_qk_channels": 16, "cross_v_channels": 32},
    },
    "queries": {"kind": "learned", "count": 64, "channels": 16, "per_token": True},
    "decoder": {"qk_channels": 16, "v_channels": 16},
    "output": {"kind": "tokens", "vocab_size": 262},
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 120, encoding="utf-8")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def blocks(path, length=64, **changes):
    return masked_lm.TextBlocks([path], encode_line, length, MASKING, **changes)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def command(files, **options):
    more = {"--steps": 4, "--evaluate-every": 2, "--batch-size": 8, "--threads": 1, "--output": files / "run", **options}
    start = ["train", "perceiver-mlm", "--text", files / "text.txt", "--config", files / "tiny.json"]
    return [*start, *(part for option in more.items() for part in option)]


def test_ids_are_those_of_the_paper():
    assert encode("A\x00ÿ") == [65 + 6, 6, 0xC3 + 6, 0xBF + 6] and byte_text.SIZE == 262
    assert decode([4, *encode("déjà vu"), 5, 0]) == "déjà vu"
    assert decode([0xC3 + 6]) == "\ufffd"
    assert encode_blanks("a [MASK:3] b[MASK]") == [*encode("a "), MASK, MASK, MASK, *encode(" b"), MASK]


def test_masks_are_whole_words_and_fifteen_percent_of_them(files):
    data = blocks(files / "text.txt", 256)
    words, masked = 0, 0
    for index in range(len(data)):
        item = data[0, index]
        original = data.blocks[index]
        asked = item["labels"] != masked_lm.IGNORED
        assert torch.equal(asked, item["input_ids"] == MASK) and torch.equal(item["labels"][asked], original[asked])
        assert torch.equal(item["input_ids"][~asked], original[~asked])
        text = bytes((original - RESERVED).tolist())
        spans, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            spans.append(asked[start:at])
        chosen = [bool(span.all()) for span in spans]
        assert chosen == [bool(span.any()) for span in spans]  # whole words or nothing of them
        assert sum(len(span) for span in spans) == len(text) - sum(byte in b" \t\n" for byte in text)
        assert not asked[[byte in b" \t\n" for byte in text]].any()
        assert sum(chosen) == max(round(0.15 * len(spans)), 1)
        words, masked = words + len(spans), masked + sum(chosen)
    assert masked / words == pytest.approx(0.15, abs=0.01)
    assert torch.equal(data[0, 1]["labels"], data[0, 1]["labels"]) and not torch.equal(
        data[0, 1]["labels"], data[1, 1]["labels"]
    )


def test_tokens_are_masked_as_before_without_separators(files):
    masking = masked_lm.Masking(MASK, byte_text.SIZE, special_ids=tuple(range(RESERVED)))
    data = masked_lm.TextBlocks([files / "text.txt"], encode_line, 256, masking)
    asked = torch.stack([data[0, i]["labels"] != masked_lm.IGNORED for i in range(len(data))])
    assert asked.float().mean() == pytest.approx(0.15, abs=0.02)


def test_the_baselines_know_what_they_say(tmp_path):
    """Of words of two equally frequent letters: a bit a byte; with the first letter always a, and the second free, half."""
    generator = torch.Generator().manual_seed(0)
    letters = "".join("ab"[i] for i in torch.randint(2, (20_000,), generator=generator).tolist())
    (tmp_path / "free.txt").write_text(" ".join(letters[i : i + 2] for i in range(0, len(letters), 2)))
    (tmp_path / "first.txt").write_text(" ".join("c" + letter for letter in letters[:10_000]))
    free, first = (blocks(tmp_path / f"{name}.txt") for name in ("free", "first"))
    found = byte_text.context_free(*free.split(0.2))
    assert found["bytes"] == pytest.approx(math.log(2), rel=0.05)
    assert found["length and place"] == pytest.approx(math.log(2), rel=0.1)
    found = byte_text.context_free(*first.split(0.2))
    assert found["bytes"] == pytest.approx(1.5 * math.log(2), rel=0.05)
    assert found["length and place"] == pytest.approx(0.5 * math.log(2), rel=0.2)


def test_micro_batches_add_up_to_the_batch(files):
    """Also where their numbers of masked bytes differ."""
    torch.manual_seed(0)
    training, held_out = blocks(files / "text.txt").split(0.1)
    task = masked_lm.make_task(training, held_out)
    model = models.perceiver_io.PerceiverIO(models.perceiver_io.PerceiverIOConfig(**TINY))
    batch = next(iter(torch.utils.data.DataLoader([training[0, i] for i in range(7)], batch_size=7)))
    parts = task.split(batch, 3)
    assert [len(part["labels"]) for part, _ in parts] == [3, 3, 1] and sum(share for _, share in parts) == pytest.approx(1)
    whole = task.loss(model, batch)
    torch.testing.assert_close(sum(share * task.loss(model, part) for part, share in parts), whole)


def test_a_training_and_its_predictions(files, capsys):
    assert run(*command(files, **{"--steps": 20, "--evaluate-every": 10, "--optimizer": "adamw", "--lr": 0.01})) == 0
    out = capsys.readouterr().out
    assert "length and place" in out and "bits a byte" in out
    folder = files / "run"
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "model.safetensors", "task.json", "learning-curve.png", "examples.txt"}
    task = json.loads((folder / "task.json").read_text())
    assert [row["step"] for row in task["history"]] == [10, 20] and set(task["baselines"]) == {"bytes", "length and place"}
    assert task["history"][1]["held_out_loss"] < task["history"][0]["held_out_loss"]
    shown, filled, original = (folder / "examples.txt").read_text().split("\n\n")[0].split("\n")
    assert "_" in shown and len(shown.encode()) == len(original.encode()) and original in TEXT.replace("\n", " ") * 3
    assert run("predict", "--checkpoint", folder, "--text", "The [MASK:5] brown fox", "--text", "no blank") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("The ") and first.endswith(" brown fox") and "[" not in first and second == "no blank"
    assert run("predict", "--checkpoint", folder, "--text", "x" * 65) == 2
    assert "a text has 65 bytes; the model reads 1 to 64" in capsys.readouterr().err
    assert run("predict", "--checkpoint", folder, "picture.png") == 2
    assert "this model fills in text" in capsys.readouterr().err


def test_texts_are_mixed_by_weights(files):
    """However long they are; of every text, a folder of files among them, the end is held out."""
    (files / "long").mkdir()
    for number in range(3):
        (files / "long" / f"{number}.txt").write_text("abc " * 4000)
    short, long = (
        masked_lm.TextBlocks(masked_lm.files_of(files / name), encode_line, 64, MASKING) for name in ("text.txt", "long")
    )
    parts = [text.split(0.25) for text in (short, long)]
    training, held_out = (masked_lm.TextBlocks.joined(part) for part in zip(*parts, strict=True))
    assert training.sizes == [len(parts[0][0]), len(parts[1][0])] and 2 * training.sizes[0] < training.sizes[1]
    assert torch.equal(held_out.blocks[: held_out.sizes[0]], short.blocks[-held_out.sizes[0] :])
    task = masked_lm.make_task(training, held_out, shares=[70.0, 30.0], batch_size=10)
    drawn = [number for batch in task.draw(0, 1024) for _, number in batch]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(training))
    assert counts[: training.sizes[0]].sum() == round(0.7 * 10_240)
    for own in counts.split(training.sizes):  # each text is gone through, block by block
        assert own.max() - own.min() <= 1
    assert task.draw(5, 7) == task.draw(0, 9)[5:7]
    plain = masked_lm.make_task(training, held_out)
    assert plain.draw is None and plain.fingerprint != task.fingerprint


def test_a_training_on_a_mixture(files, capsys):
    (files / "more").mkdir()
    (files / "more" / "a.txt").write_text(TEXT * 30)
    options = {"--batch-size": 4}
    assert run(*command(files, **options), "--text", files / "more", "--weights", "70,30") == 0
    assert "resuming" not in capsys.readouterr().out
    assert run(*command(files, **options), "--text", files / "more", "--weights", "60,40") == 2
    assert "holds a training with data" in capsys.readouterr().err


def test_blanks_are_filled_in_the_order_of_certainty():
    """A model that is sure of a byte only where the one to its left is known."""

    class Next(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.input = type("Input", (), {"size": 8})
            self.encoder = type("Encoder", (), {"latents": torch.zeros(1)})

        def forward(self, ids):
            before = ids.roll(1, 1)
            sure = torch.where(before == MASK, 0.1, 9.0)
            return torch.nn.functional.one_hot(before + 1, byte_text.SIZE) * sure[..., None]

    assert byte_text.fill(Next(), [encode("a") + [MASK] * 4]) == [encode("abcde")]


def test_bad_input(files, capsys):
    def fails(message, **options):
        assert run(*command(files, **options)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("error: "), error
        assert not (files / "run").exists()

    fails("gone.txt cannot be read as UTF-8 text", **{"--text": files / "gone.txt"})
    fails("allowed are a .json file and perceiver-io-language", **{"--config": "perceiver-io-langage"})
    fails("has an output 'flow'; it must be 'tokens'", **{"--config": "perceiver-io-flow"})
    (files / "odd.json").write_text(json.dumps({**TINY, "width": 3}))
    fails("odd.json: ", **{"--config": files / "odd.json"})
    (files / "other.json").write_text(json.dumps({**TINY, "input": {**TINY["input"], "vocab_size": 30}}))
    fails("other.json: ", **{"--config": files / "other.json"})
    (files / "short.txt").write_text("too short")
    fails("one block of length 64 needs 64", **{"--text": files / "short.txt", "--val-text": files / "short.txt"})
    fails("--weights has 2 numbers; it must have one for each --text, 1", **{"--weights": "1,2"})
    (files / "empty").mkdir()
    fails("has no .txt files", **{"--val-text": files / "empty"})
    for weights in ("1,-1", "a", ""):
        with pytest.raises(SystemExit):
            run(*command(files, **{"--weights": weights}))
        capsys.readouterr()
    with pytest.raises(InputError, match="has a vocabulary of 30"):
        part = {**TINY, "input": {**TINY["input"], "vocab_size": 30}, "output": {"kind": "tokens", "vocab_size": 30}}
        models.perceiver_io.PerceiverIO(models.perceiver_io.PerceiverIOConfig(**part)).save_pretrained(files / "small")
        byte_text.predict(files / "small", ["a"])


def test_the_demo(few_files, tmp_path, capsys):
    options = "--steps 2 --evaluate-every 1 --batch-size 4 --held-out 5 --threads 1 --backend eager --output".split()
    assert main(["train", "perceiver-mlm-demo", *options, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bytes alone" in out and "model" in out and (tmp_path / "learning-curve.png").stat().st_size > 10_000
    training, held_out = ((tmp_path / "text" / f"{name}.txt").read_text() for name in ("train", "held-out"))
    assert len(training) > 3 * len(held_out) > 3000
    assert not set(held_out.splitlines()) & set(training.splitlines())
