"""Spoken English digits, 8 kHz 16-bit mono WAV, `<speaker>/<digit>.wav`, and speakers.csv, which says how each was made.

Origin: synthesised with eSpeak NG 1.52, a formant synthesiser: a speaker is one of its voice variants with an English accent,
a pitch and a speed of its own. Nobody's recorded voice is in them. The synthesiser is licensed under the GPL, which does not
reach the sound it makes; the files here are under the licence of this package. They are made by

    pip install mmkernels[media,spoken-digits] && python -m mmkernels.train.data.spoken_digits FOLDER

which is not needed to use them. Speakers are split into those to train on and those held out: nothing of a held-out voice is
heard in training.
"""

import csv
import functools
from pathlib import Path

import torch

from ....models.registry import require
from ..media import read_audio, write_wav

FOLDER = Path(__file__).parent
SAMPLE_RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# eSpeak NG's voice variants. Those that share a name (edward, edward2) are one family and stay on one side of the split.
_TRAINING = (
    "f1 f2 f3 m1 m2 m3 m4 m5 m6 Alex Alicia Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike "
    "Nguyen Reed RicishayMax Storm Tweaky adam anika announcer antonio aunty belinda benjamin boris caleb david ed edward "
    "edward2 gustave iven klatt2 klatt4"
).split()
_HELD_OUT = "f4 f5 m7 m8 Andrea grandma ian john linda marcelo norbert quincy rob shelby steph travis".split()
_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")


@functools.cache
def load(split: str) -> list:
    """[waveforms of digit 0, ..., of digit 9] of the speakers of `split`, "train" or "test"; float32 (samples,) each."""
    with open(FOLDER / "speakers.csv", newline="") as file:
        speakers = [row["speaker"] for row in csv.DictReader(file) if row["split"] == split]
    return [[read_audio(FOLDER / speaker / f"{digit}.wav", SAMPLE_RATE) for speaker in speakers] for digit in range(10)]


def make(folder) -> None:
    """Writes every WAV file and speakers.csv to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    synthesiser = _Synthesiser()
    with open(folder / "speakers.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["speaker", "split", "accent", "pitch", "words_per_minute"])
        for number, variant in enumerate((*_TRAINING, *_HELD_OUT)):
            # Steps prime to the number of values: accent, pitch and speed vary independently of each other.
            accent, pitch, speed = _ACCENTS[number * 3 % 8], 30 + number * 17 % 41, 160 + number * 29 % 61
            table.writerow([variant, "train" if variant in _TRAINING else "test", accent, pitch, speed])
            (folder / variant).mkdir(exist_ok=True)
            for digit, word in enumerate(WORDS):
                samples = synthesiser.say(word, f"{accent}+{variant}", pitch, speed)
                write_wav(folder / variant / f"{digit}.wav", _trimmed(samples), SAMPLE_RATE)


class _Synthesiser:
    """eSpeak NG through its C interface."""

    def __init__(self):
        import ctypes

        loader = require("espeakng_loader", "spoken-digits")
        self.library = ctypes.CDLL(loader.get_library_path())
        synchronous, do_not_exit = 2, 0x8000
        self.sample_rate = self.library.espeak_Initialize(synchronous, 0, loader.get_data_path().encode(), do_not_exit)
        if self.sample_rate <= 0:
            raise RuntimeError("eSpeak NG does not start")
        self.samples = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def receive(samples, count, events):
            if samples:
                self.samples += samples[:count]
            return 0

        self.receive = receive  # the library keeps only a pointer
        self.library.espeak_SetSynthCallback(receive)

    def say(self, word: str, voice: str, pitch: int, words_per_minute: int) -> torch.Tensor:
        import ctypes

        rate_parameter, pitch_parameter, characters_utf8 = 1, 3, 1
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(rate_parameter, words_per_minute, 0)
        self.library.espeak_SetParameter(pitch_parameter, pitch, 0)
        self.samples.clear()
        text = word.encode() + b"\0"
        self.library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, characters_utf8, None, None)
        resample = require("scipy.signal", "spoken-digits").resample_poly
        samples = torch.tensor(self.samples, dtype=torch.float64).numpy()
        return torch.from_numpy(resample(samples, SAMPLE_RATE, self.sample_rate))


def _trimmed(samples):
    """Without the silence around the word, at a root mean square of 0.1 (or less, where that would clip)."""
    loud = (samples.abs() > 0.02 * samples.abs().max()).nonzero()
    margin = SAMPLE_RATE // 100
    samples = samples[max(int(loud[0]) - margin, 0) : int(loud[-1]) + margin]
    return samples * min(0.1 / samples.square().mean().sqrt(), 0.99 / samples.abs().max())
