"""Tokenizers of T5 and of BERT: from files, and trained on text.

T5's are SentencePiece models and Hugging Face's tokenizer.json. Its SentencePiece models have 32 000 pieces, and its
vocabulary 100 sentinels more, `<extra_id_0>` being the last; the embedding has room up to the next multiple of 128.
"""

import collections
import hashlib
import io
import re
from pathlib import Path

from ..models.registry import InputError, read_json, require, write_atomically

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


class Bert:
    """BERT's WordPieces, through the library `tokenizers`; a tokenizer.json with [PAD], [CLS] and [SEP]."""

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
        self.pad_id, self.start, self.end = (self.model.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]"))
        for name, found in (("[PAD]", self.pad_id), ("[CLS]", self.start), ("[SEP]", self.end)):
            if found is None:
                raise InputError(f"{source} has no token {name!r}; it is not BERT's")

    def encode_pair(self, first: str, second: str | None, length: int) -> tuple:
        """([CLS] first [SEP], or [CLS] first [SEP] second [SEP], at most `length` ids; how many of them come before second).

        Tokens are cut off the end of the longer text, one after another; of the second where both are as long.
        """
        first, second = (
            None if text is None else self.model.encode(text, add_special_tokens=False).ids for text in (first, second)
        )
        return joined(first, second, length, self.start, self.end)

    fingerprint = SentencePiece.fingerprint


def joined(first: list, second: list | None, length: int, start: int, end: int) -> tuple:
    """`Bert.encode_pair` of ids."""
    a, b = list(first), list(second or ())
    surplus = len(a) + len(b) - (length - 2 - (second is not None))
    while surplus > 0:
        longer = a if len(a) > len(b) else b
        cut = min(max(abs(len(a) - len(b)), 1), surplus)
        del longer[-cut:]
        surplus -= cut
    ids = [start, *a, end]
    return (ids, len(ids)) if second is None else ([*ids, *b, end], len(ids))


class Pretrained:
    """The tokenizer of a checkpoint of Hugging Face, through transformers: of a BERT, RoBERTa, XLM-R and the like."""

    def __init__(self, folder):
        library = require("transformers", "adapters")
        try:
            self.model = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of the library, of tokenizers, of sentencepiece
            raise InputError(f"{folder} has no tokenizer that can be read: {error}") from error
        self.size, self.pad_id, self.mask_id = len(self.model), self.model.pad_token_id, self.model.mask_token_id
        self.start, self.end = self.model.cls_token_id, self.model.sep_token_id
        self.special_ids = tuple(self.model.all_special_ids)
        for name in ("pad_id", "mask_id", "start", "end"):
            if getattr(self, name) is None:
                raise InputError(f"{folder} has a tokenizer without {name}; it must be of a masked language model")

    def encode(self, text: str) -> list:
        """Ids without special tokens."""
        return self.model(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode_pair(self, first: str, second: str | None, length: int) -> tuple:
        """As `Bert.encode_pair`; the number is that of all ids where the model makes no difference between the texts."""
        made = self.model(first, second, truncation=True, max_length=length, return_token_type_ids=True)
        return made["input_ids"], made["token_type_ids"].count(0)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(repr(sorted(self.model.get_vocab().items())).encode(), digest_size=16).hexdigest()


BERT_FILES = ("tokenizer.json", "vocab.txt")


def load_bert(path: Path) -> Bert:
    """BERT's tokenizer from a tokenizer.json or vocab.txt, or a folder with one; raises InputError.

    A vocab.txt is taken for a cased one unless `tokenizer_config.json` beside it says {"do_lower_case": true}.
    """
    library, path = require("tokenizers", "text"), Path(path)
    if path.is_dir():
        found = next((path / name for name in BERT_FILES if (path / name).is_file()), None)
        if found is None:
            raise InputError(f"{path} has no tokenizer: neither {' nor '.join(BERT_FILES)}")
        path = found
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            return Bert(content, path)
        words = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    settings = path.parent / "tokenizer_config.json"
    lower = bool(read_json(settings).get("do_lower_case", False)) if settings.is_file() else False
    if missing := [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if name not in words]:
        raise InputError(f"{path} has no token {missing[0]!r}; it is no vocabulary of BERT")
    vocabulary = {word: number for number, word in enumerate(words)}
    return _bert(library.BertWordPieceTokenizer(vocabulary, lowercase=lower, strip_accents=lower))


def train_bert(texts, size: int) -> Bert:
    """A cased vocabulary of at most `size` tokens: letters, by themselves and inside of words, and the most frequent words.

    The same texts give the same bytes, which the trainer of the library does not promise.
    """
    library = require("tokenizers", "text")
    splitter = library.BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    counts = collections.Counter()
    for text in texts:
        normal = splitter._tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in splitter._tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    letters = sorted({letter for word in counts for letter in word})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    if len(words) > size:
        raise InputError(f"a tokenizer of {size} tokens has no room for the {len(letters)} letters of the tasks' texts")
    known = set(words)
    words += [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word not in known]
    vocabulary = {word: number for number, word in enumerate(words[:size])}
    return _bert(library.BertWordPieceTokenizer(vocabulary, lowercase=False, strip_accents=False))


def _bert(made) -> Bert:
    return Bert(made.to_str().encode())


def load(path: Path):
    """A tokenizer of T5 from a file, or from a folder with one of `FILES`; raises InputError."""
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
