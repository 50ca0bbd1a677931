"""Masked language modelling on text files (Devlin et al. 2019, section 3.1): how MAD-X trains the adapter of a language.

hub.add_adapter("qu", "seq_bn_inv", reduction_factor=2)
hub.train_adapter("qu")
train(hub.model, make_task(files, tokenizer.encode, ...), settings, folder)
hub.save_adapter("qu", folder / "qu")
"""

import array
import copy
import dataclasses
import hashlib
from pathlib import Path

import torch

from ..models.registry import InputError
from . import checkpoint
from .data import derive_seed
from .data.text import Mixture
from .loop import Settings, Task, fit, split_by

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which tokens are to be guessed: each with `probability`; of them 80 % are replaced by the mask, 10 % by any token.

    With `separators`, ids that stand between words, whole words are to be guessed, `probability` of those of a block to the
    nearest whole number and at least one, and the mask stands for each of their tokens: the length of a word is still seen.
    """

    mask_id: int
    vocab_size: int
    probability: float = 0.15
    special_ids: tuple = ()  # never chosen, and never drawn as a replacement
    separators: tuple = ()


class TextBlocks(torch.utils.data.Dataset):
    """Text files as blocks of `length` tokens, lines one behind the other; the last tokens that fill no block are left out.

    Item (epoch, i): block i with the masks of (seed, epoch, i), "input_ids" (L,) and "labels" (L,), -100 for tokens not asked.

    Args:
        files: of UTF-8 text, a sentence or paragraph a line; empty lines count nothing.
        encode: line -> list of token ids, without special tokens.
        length: L, with `first` and `last`.
        first, last: ids that begin and end every block ([CLS] and [SEP]), or None.

    Raises InputError for files that cannot be read and texts that fill no block.
    """

    def __init__(self, files, encode, length, masking: Masking, *, first=None, last=None, seed=0):
        ids, self.masking, self.seed = array.array("i"), masking, seed
        for line in lines_of(files):
            ids.extend(encode(line))
        before, after = ([] if one is None else [one] for one in (first, last))
        inner = length - len(before) - len(after)
        if inner < 1 or len(ids) < inner:
            raise InputError(f"the texts have {len(ids)} tokens; one block of length {length} needs {max(inner, 1)}")
        if max(ids) >= masking.vocab_size or min(ids) < 0:
            raise InputError(f"the texts have token {max(ids)}; vocab_size is {masking.vocab_size}")
        blocks = torch.frombuffer(ids, dtype=torch.int32)[: len(ids) // inner * inner].view(-1, inner).long()
        edges = [torch.tensor(ids).expand(len(blocks), -1) for ids in (before, after)]
        self.blocks = torch.cat([edges[0], blocks, edges[1]], 1).long() if before or after else blocks
        self.sizes = [len(blocks)]  # of the texts that are mixed
        self.special = torch.tensor(sorted({*masking.special_ids, *before, *after, masking.mask_id}))
        self.ordinary = torch.tensor(sorted(set(range(masking.vocab_size)) - set(self.special.tolist())))

    def split(self, share: float) -> tuple:
        """(the first blocks, the last `share` of them, at least one of each); raises InputError for a single block."""
        count = max(round(len(self) * share), 1)
        if count >= len(self):
            raise InputError(f"the texts fill {len(self)} blocks; some to train on and {count} held out need more")
        parts = copy.copy(self), copy.copy(self)
        parts[0].blocks, parts[1].blocks = self.blocks[:-count], self.blocks[-count:]
        for part in parts:
            part.sizes = [len(part)]
        return parts

    @staticmethod
    def joined(texts: list):
        """Several of one length and masking as one, whose `sizes` are how many blocks each has, one behind the other."""
        whole = copy.copy(texts[0])
        whole.blocks, whole.sizes = torch.cat([text.blocks for text in texts]), [len(text) for text in texts]
        return whole

    def words(self, ids) -> torch.Tensor:
        """(L,) -> (L,), the number of the word that a token belongs to, from 0; -1 for separators and special tokens."""
        inside = ~torch.isin(ids, torch.cat([self.special, torch.tensor(self.masking.separators)]))
        begins = inside & ~inside.roll(1)
        begins[0] = inside[0]
        return torch.where(inside, begins.cumsum(0) - 1, -1)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *key))
        ids, masking = self.blocks[key[1]], self.masking
        if masking.separators:
            word = self.words(ids)
            count = int(word.max()) + 1
            words = torch.randperm(count, generator=generator)[: max(round(count * masking.probability), 1)]
            chosen = torch.isin(word, words)
            return {"input_ids": torch.where(chosen, masking.mask_id, ids), "labels": torch.where(chosen, ids, IGNORED)}
        chance, kind = torch.rand(2, len(ids), generator=generator)
        chosen = (chance < masking.probability) & ~torch.isin(ids, self.special)
        drawn = self.ordinary[torch.randint(len(self.ordinary), ids.shape, generator=generator)]
        labels = torch.where(chosen, ids, IGNORED)
        ids = torch.where(chosen & (kind < 0.8), masking.mask_id, ids)
        return {"input_ids": torch.where(chosen & (kind >= 0.9), drawn, ids), "labels": labels}


def files_of(path) -> list:
    """The file, or the .txt files of a folder and of those in it, by name; raises InputError where there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(found for found in path.rglob("*.txt") if found.is_file())
    if not files:
        raise InputError(f"{path} has no .txt files")
    return files


def lines_of(files):
    """Yields the lines of text files that are not empty; raises InputError for one that cannot be read."""
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
        yield from filter(None, map(str.strip, lines))


def make_task(training: TextBlocks, held_out: TextBlocks, *, shares=None, batch_size=None) -> Task:
    """For `train`: the model's logits, and on the held-out texts the loss and the share of tokens that are guessed.

    With `shares`, a positive number for each of the texts that were joined to `training`, a step has so many blocks of each
    among its `batch_size`, on average, however long the texts are; else all blocks are read equally often.
    """
    digest = hashlib.blake2b(digest_size=8)
    for blocks in (training.blocks, held_out.blocks):
        digest.update(blocks.numpy().tobytes())
    fingerprint = f"{digest.hexdigest()} {training.masking} {training.seed}"
    draw = None
    if shares is not None:
        fingerprint += f" {training.sizes} by {shares}"
        shares = torch.tensor(shares, dtype=torch.float64)
        draw = Mixture(training.sizes, shares / shares.sum(), batch_size, training.seed).batches
    split = split_by(lambda batch: (batch["labels"] != IGNORED).sum())
    return Task(training, held_out, loss, accuracy, fingerprint, draw=draw, split=split)


def loss(model, batch) -> torch.Tensor:
    """The mean over all masked tokens; zero for a batch without any."""
    logits, labels = asked_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def asked_logits(model, batch) -> tuple:
    """(logits (n, vocabulary), labels (n,)) of the masked tokens; the head of most models is spared all other tokens."""
    asked = batch["labels"] != IGNORED
    head = next((getattr(model, name) for name in ("cls", "lm_head") if hasattr(model, name)), None)
    if head is None:
        output = model(batch["input_ids"])
        return getattr(output, "logits", output)[asked], batch["labels"][asked]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][asked][None], *args[1:]))
    try:
        return model(input_ids=batch["input_ids"]).logits[0], batch["labels"][asked]
    finally:
        hook.remove()


@torch.no_grad()
def accuracy(model, batches) -> dict:
    """{"held_out_loss", "accuracy"} over all masked tokens of the batches."""
    total, right, count = 0.0, 0, 0
    for batch in batches:
        logits, labels = asked_logits(model, batch)
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"held_out_loss": total / max(count, 1), "accuracy": right / max(count, 1)}


def train(model, task: Task, settings: Settings, folder, **options) -> list:
    """`loop.fit`; only what requires a gradient trains, which `AdapterHub.train_adapter` has decided."""
    with checkpoint.locked(Path(folder)):
        return fit(model, task, settings, Path(folder), **options)
