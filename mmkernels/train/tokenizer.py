"""Tokenizers of T5: SentencePiece models and Hugging Face's tokenizer.json, from files, and SentencePiece trained on text.

T5's SentencePiece models have 32 000 pieces, and its vocabulary 100 sentinels more, `<extra_id_0>` being the last; the
embedding has room up to the next multiple of 128.
"""

import hashlib
import io
import re
from pathlib import Path

from ..models.registry import InputError, require, write_atomically

SENTINELS = 100
ROUND = 128
FILES = ("spiece.model", "tokenizer.json")  # in a run's folder, and in a checkpoint's


class SentencePiece:
    """A SentencePiece model with T5's sentinels behind its pieces."""

    file = "spiece.model"

    def __init__(self, content: bytes, source="the tokenizer"):
        library = require("sentencepiece", "text")
        try:
            self.model = library.SentencePieceProcessor(model_proto=content)
            self.pieces = self.model.get_piece_size()
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{source} cannot be read as a SentencePiece model: {error}") from error
        self.content = content
        self.size = self.pieces + SENTINELS
        self.pad_id, self.eos_id = max(self.model.pad_id(), 0), self.model.eos_id()
        if self.eos_id < 0:
            raise InputError(f"{source} has no end token '</s>'")

    def encode(self, text: str) -> list:
        """Ids without an end token; `<extra_id_n>` is a sentinel."""
        ids = []
        for number, part in enumerate(re.split(r"<extra_id_(\d{1,2})>", text)):
            ids += [self.size - 1 - int(part)] if number % 2 else self.model.encode(part)
        return ids

    def decode(self, ids: list) -> str:
        """The text up to the end token."""
        ids = _until(ids, self.eos_id)
        texts, run = [], []
        for token in (*ids, None):
            if token is not None and token < self.pieces:
                run.append(token)
                continue
            texts.append(self.model.decode([token for token in run if token != self.pad_id]))
            if token is not None and token < self.size:  # what is above is room that no token has
                texts.append(f"<extra_id_{self.size - 1 - token}>")
            run = []
        return " ".join(filter(None, texts))

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.content, digest_size=16).hexdigest()


class HuggingFace:
    """A tokenizer.json, through the library `tokenizers`; its tokens `<pad>` and `</s>` are the padding and the end."""

    file = "tokenizer.json"

    def __init__(self, content: bytes, source="the tokenizer"):
        library = require("tokenizers", "text")
        try:
            self.model = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"{source} cannot be read as a tokenizer.json: {error}") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.content, self.size = content, self.model.get_vocab_size()
        self.pad_id, self.eos_id = self.model.token_to_id("<pad>"), self.model.token_to_id("</s>")
        for name, found in (("<pad>", self.pad_id), ("</s>", self.eos_id)):
            if found is None:
                raise InputError(f"{source} has no token {name!r}")

    def encode(self, text: str) -> list:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list) -> str:
        return self.model.decode(_until(ids, self.eos_id), skip_special_tokens=True)

    fingerprint = SentencePiece.fingerprint


def load(path: Path):
    """A tokenizer from a file, or from a folder with one of `FILES`; raises InputError."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise InputError(f"{path} has no tokenizer: neither {' nor '.join(FILES)}")
        path = found
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return (HuggingFace if path.suffix == ".json" else SentencePiece)(content, path)


def train(texts, size: int, *, most=1_000_000) -> SentencePiece:
    """A unigram model of `size` tokens, sentinels included, or fewer where the text has not so many; T5's special tokens.

    Of more than `most` texts it takes every so-manieth. The same texts give the same bytes.

    Raises InputError where the text is too little for any model.
    """
    library = require("sentencepiece", "text")
    texts = list(texts)
    step = max(-(-len(texts) // most), 1)
    written = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[::step]),
            model_writer=written,
            model_type="unigram",
            vocab_size=max(size - SENTINELS, 8),
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"a tokenizer of {size} tokens, {SENTINELS} of them sentinels, cannot be trained on the text of the tasks: it is "
            f"too little, or has more letters than that: {error}"
        ) from error
    return SentencePiece(written.getvalue())


def save(tokenizer, folder: Path) -> None:
    write_atomically(folder / tokenizer.file, tokenizer.content)


def rounded(size: int) -> int:
    """The rows of an embedding for `size` tokens: 32 100 -> 32 128."""
    return -(-size // ROUND) * ROUND


def _until(ids, end):
    return ids[: ids.index(end)] if end in ids else ids
