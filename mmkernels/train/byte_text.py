"""Text as bytes, as Perceiver IO's language model reads it: 6 reserved ids, then a byte b is b + 6; 262 in all."""

import json
import math
import re
from pathlib import Path

import torch

from ..models.registry import InputError, require, write_atomically
from . import tokenizer
from .classification import CURVE, TASK, draw_losses, png
from .loop import trained_model
from .masked_lm import IGNORED, Masking

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
RESERVED = 6
SIZE = RESERVED + 256
SPACES = tuple(byte + RESERVED for byte in b"\t\n\v\f\r ")
MASKING = Masking(MASK, SIZE, 0.15, special_ids=tuple(range(RESERVED)), separators=SPACES)
EXAMPLES = "examples.txt"
_BLANK = re.compile(r"\[MASK(?::(\d{1,3}))?\]")
_LONGEST = 24  # length of a word, and place in it, that `context_free` still tells apart


def encode(text: str) -> list:
    """Ids of the bytes of UTF-8."""
    return [byte + RESERVED for byte in text.encode(errors="surrogateescape")]


def encode_line(line: str) -> list:
    """With the end of the line, which stands between words."""
    return encode(line + "\n")


def encode_blanks(text: str) -> list:
    """As `encode`, but `[MASK]` is a byte to fill in and `[MASK:n]` are n of them."""
    ids, end = [], 0
    for found in _BLANK.finditer(text):
        ids += encode(text[end : found.start()]) + [MASK] * int(found[1] or 1)
        end = found.end()
    return ids + encode(text[end:])


class BytePairs:
    """One text or two as ids: [CLS] first [SEP], or [CLS] first [SEP] second [SEP]; as `tokenizer.Bert` does it."""

    size, pad_id, fingerprint = SIZE, PAD, "bytes"

    def encode_pair(self, first: str, second: str | None, length: int) -> tuple:
        """(at most `length` ids, how many of them come before second); bytes are cut off the end of the longer text."""
        return tokenizer.joined(encode(first), None if second is None else encode(second), length, CLS, SEP)


PAIRS = BytePairs()


def decode(ids) -> str:
    """Without reserved ids; bytes that are no UTF-8 are replaced."""
    return bytes(number - RESERVED for number in ids if RESERVED <= number < SIZE).decode(errors="replace")


def context_free(training, held_out) -> dict:
    """{"bytes", "length and place"}: what it costs to guess the held-out bytes that are masked without reading the text.

    Cross-entropy in nats of a masked byte, given the frequencies in words to train on of the bytes alone, and of the bytes at
    their place in a word of their length. A model that reads what is around the words must be below both.

    Args:
        training, held_out: `TextBlocks` with separators.
    """

    def places(blocks, row):
        """(length of the word, place in it) of every token, or of those outside of words whatever."""
        word = blocks.words(row)
        lengths = torch.bincount(word[word >= 0], minlength=1)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
        place = (word >= 0).cumsum(0) - 1 - starts[word]
        return lengths[word].clamp(max=_LONGEST - 1), place.clamp(0, _LONGEST - 1), word >= 0

    counts = torch.zeros(_LONGEST, _LONGEST, SIZE)
    for row in training.blocks:
        length, place, inside = places(training, row)
        counts.index_put_((length[inside], place[inside], row[inside]), torch.ones(()), accumulate=True)
    alone = counts.sum((0, 1)) + 1  # what was never seen is not impossible
    alone = alone / alone.sum()
    counts += alone  # and a place of which nothing is known is like any other
    tables = {"bytes": alone.expand_as(counts), "length and place": counts / counts.sum(-1, keepdim=True)}
    costs, total = dict.fromkeys(tables, 0.0), 0
    for index, row in enumerate(held_out.blocks):
        length, place, _ = places(held_out, row)
        asked = held_out[None, index]["labels"] != IGNORED
        total += int(asked.sum())
        for name, table in tables.items():
            costs[name] -= table[length[asked], place[asked], row[asked]].log().sum().item()
    return {name: cost / max(total, 1) for name, cost in costs.items()}


# --- Results -----------------------------------------------------------------------------------------------------------------


def save_result(folder: Path, model, held_out, baselines: dict, history: list) -> dict:
    """config.json, model.safetensors, task.json, learning-curve.png and examples.txt; returns the rows of the table.

    Args:
        held_out: `TextBlocks`, of which some examples are written.
        baselines: of `context_free`.
    """
    model.save_pretrained(folder)
    last = history[-1]
    rows = {f"{name} alone" if name == "bytes" else name: (cost, None) for name, cost in baselines.items()}
    rows["model"] = (last["held_out_loss"], last["accuracy"])
    task = {"kind": "masked bytes", "baselines": baselines, "history": history}
    write_atomically(folder / TASK, json.dumps(task, indent=1).encode())
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = draw_losses(left, history, "step", "cross-entropy of a masked byte (nats)")
    for name, cost in baselines.items():
        left.axhline(cost, ls=":", color="k", lw=0.8)
        left.text(numbers[0], cost, name, fontsize="x-small", va="bottom")
    right.plot(numbers, [100 * row["accuracy"] for row in history], ".-")
    right.set(xlabel="step", ylabel="held out: bytes guessed (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_atomically(folder / CURVE, png(figure))
    write_atomically(folder / EXAMPLES, "\n\n".join(_examples(model, held_out)).encode())
    return rows


def table(rows: dict) -> str:
    """{what guesses: (nats of a masked byte, share that is right or None)} as text, in bits."""
    lines = [f"{'held out, whole words masked':<30}{'bits a byte':>12}{'right':>10}"]
    for name, (cost, right) in rows.items():
        lines.append(f"{name:<30}{cost / math.log(2):>12.3f}{'' if right is None else f'{right:.1%}':>10}")
    return "\n".join(lines)


def examples(folder: Path, count=2) -> str:
    """The first of the examples that a training has written."""
    return "\n\n".join((folder / EXAMPLES).read_text(encoding="utf-8").split("\n\n")[:count])


@torch.no_grad()
def _examples(model, held_out, count=8):
    """Yields three lines of a held-out block: with `_` for masked bytes, as the model fills them in, and the original."""
    for index in range(min(count, len(held_out))):
        item = held_out[None, index]
        ids, labels = item["input_ids"], item["labels"]
        filled = fill(model, [ids.tolist()])[0]
        original = torch.where(labels != IGNORED, labels, ids).tolist()
        shown = [ord("_") + RESERVED if number == MASK else number for number in ids.tolist()]
        yield "\n".join(decode(row).replace("\n", " ") for row in (shown, filled, original))


@torch.no_grad()
def fill(model, rows: list) -> list:
    """Lists of ids in which each MASK is replaced: one by one, the byte that the model is surest of first.

    Raises InputError for a text that is longer than the model reads.
    """
    longest = model.input.size
    found = []
    for row in rows:
        if not 1 <= len(row) <= longest:
            raise InputError(f"a text has {len(row)} bytes; the model reads 1 to {longest}")
        ids = torch.tensor(row, device=model.encoder.latents.device)
        while (blank := (ids == MASK).nonzero().flatten()).numel():
            chances = model(ids[None])[0, blank, RESERVED:].float().softmax(-1)
            best, byte = chances.max(-1)
            sure = best.argmax()
            ids[blank[sure]] = byte[sure] + RESERVED
        found.append(ids.tolist())
    return found


def predict(checkpoint, texts: list, *, device="cpu", backend="auto") -> list:
    """`texts` with their `[MASK]` and `[MASK:n]` filled in by the model in the folder `checkpoint`.

    Raises InputError for a model of another vocabulary and for texts that are too long.
    """
    model = trained_model(checkpoint, device, backend)
    if model.config.input.get("vocab_size") != SIZE:
        raise InputError(f"{checkpoint} has a vocabulary of {model.config.input.get('vocab_size')}; bytes have {SIZE}")
    return [decode(row) for row in fill(model, [encode_blanks(text) for text in texts])]
