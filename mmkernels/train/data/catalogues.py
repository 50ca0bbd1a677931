"""Messages of a system's programs in English and translated, from gettext's catalogues (/usr/share/locale on most Linuxes).

The task is to tell which program says a message. A tenth of the messages is held out, in both languages; a message stands
in the text, and in the task, once, and one of several programs in the text alone. The text depends on what is installed.
"""

import gettext
import json
import re
from pathlib import Path

from ...models.registry import InputError, write_atomically
from . import derive_seed

SOURCE = "en"
PROGRAMS = 8  # those with the most messages are the classes
MOST = 1200  # messages of one of them


def write(folder: Path, root: Path, language: str, seed=0) -> dict:
    """Writes en.txt, LANGUAGE.txt, train.jsonl (English), dev-en.jsonl and dev-LANGUAGE.jsonl; returns numbers of messages.

    Raises InputError where the language has too few messages.
    """
    said = {}  # message -> ({program}, translation)
    for path in sorted((root / language / "LC_MESSAGES").glob("*.mo")):
        for message, translation in _messages(path):
            programs, _ = said.setdefault(message, (set(), translation))
            programs.add(re.sub(r"-[0-9.]+$", "", path.stem))
    own = {}  # program -> its messages, which no other one has
    for message, (programs, _) in said.items():
        if len(programs) == 1:
            own.setdefault(*programs, []).append(message)
    chosen = sorted(own, key=lambda program: (-len(own[program]), program))[:PROGRAMS]
    if len(chosen) < 2 or len(own[chosen[-1]]) < 20:
        raise InputError(f"--catalogues {root} has {len(said)} messages in {language!r}; that is too little for the demo")

    def order(message):
        return derive_seed(seed, message)

    held_out = {message for message in said if order(message) % 10 == 0}
    folder.mkdir(parents=True, exist_ok=True)
    text = [message for message in sorted(said, key=order) if message not in held_out]
    _write(folder / f"{SOURCE}.txt", text)
    _write(folder / f"{language}.txt", [said[message][1] for message in text])
    rows = [(m, program) for program in chosen for m in sorted(own[program], key=order)[:MOST]]
    rows = sorted(rows, key=lambda row: order(row[0]))
    splits = {
        "train": [(m, program) for m, program in rows if m not in held_out],
        f"dev-{SOURCE}": [(m, program) for m, program in rows if m in held_out],
        f"dev-{language}": [(said[m][1], program) for m, program in rows if m in held_out],
    }
    for name, examples in splits.items():
        _write(folder / f"{name}.jsonl", [json.dumps({"input": m, "target": program}) for m, program in examples])
    return {"text": len(said), "train": len(splits["train"]), "dev": len(splits[f"dev-{SOURCE}"])}


def _messages(path):
    """(message, translation) of a catalogue, as one line each; only those of four words or more that are translated."""
    try:
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
    except (OSError, ValueError, UnicodeDecodeError):  # no catalogue, or of another encoding than it says
        return
    for message, translation in catalogue.items():
        if isinstance(message, str):  # no plural
            message, translation = " ".join(message.split()), " ".join(translation.split())
            if len(message.split()) >= 4 and translation and translation != message:
                yield message, translation


def _write(path, lines):
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
