"""`train perceiver-clips`: Perceiver and Perceiver IO on clips of sound and pictures with many labels, as AudioSet's.

What all trainings on clips share is here as well: the options of their data, and how it is loaded.
"""

from pathlib import Path

from . import cli, perceiver_cli

AUDIO, VIDEO = "audio", "video"


def add_systems(systems) -> None:
    """Adds the training of classifiers of clips to the systems of `train`."""
    clips = systems.add_parser("perceiver-clips", help="Perceiver (IO) on clips with sound and pictures, as AudioSet's")
    what = ".csv or .parquet: columns audio, video (paths), labels (; between) or label, split; or class folders"
    add_data_options(clips, what, sample_rate=48000, stride=1, windows=16)
    recipes = ("perceiver-io-audioset", "perceiver-audioset")
    perceiver_cli.add_options(clips, *recipes, output="runs/perceiver-clips", own=("video_dropout",))
    clips.set_defaults(run=perceiver_cli.running(_train))


def add_data_options(parser, what: str, *, sample_rate: int, stride: int, windows: int | None = None) -> None:
    """The options of clips and how they are read, numbers with their defaults; see `load`.

    Args:
        what: the help of --data.
        windows: None for a model that reads one of every held-out clip, and has no such option.
    """
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help=what)
    add("--on-error", choices=["stop", "skip"], default="stop", help="broken rows: stop (default), or go on without them")
    add("--val-fraction", type=cli.fraction, default=0.1, help="held-out share of data without 'split' (default 0.1)")
    if windows is None:
        parser.set_defaults(windows=1)
    else:
        what = f"of every held-out clip; their logits are averaged (default {windows})"
        add("--windows", type=cli.positive, default=windows, help=what)
    add("--sample-rate", type=cli.positive, default=sample_rate, help=f"that sound is resampled to (default {sample_rate})")
    add("--fps", type=cli.positive_float, default=25.0, help="of the frames that are looked at (default 25)")
    add("--stride", type=cli.positive, default=stride, help=f"every so many of them is read (default {stride})")


def load(arguments, readers: dict):
    """(training, held out, labels) of the options of `add_data_options`, see `manifest.load`; says which rows are broken."""
    import sys

    from .data import manifest

    options = {"held_out": arguments.val_fraction, "windows": arguments.windows, "on_error": arguments.on_error}
    *found, problems = manifest.load(arguments.data, readers, arguments.seed, **options)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} broken rows of {arguments.data} are left out", file=sys.stderr)
    return found


def _train(arguments):
    import dataclasses

    from ..models import InputError
    from . import multimodal
    from .objective import Objective

    config = perceiver_cli.config_of(arguments, "classes", "pooled")
    readers = _readers(arguments, config)
    training, held_out, labels = load(arguments, readers)
    if len(labels.heads) > 1:
        raise InputError(f"{arguments.data} has labels {', '.join(labels.heads)}; allowed is 'label' or 'labels'")
    config = dataclasses.replace(config, output={**config.output, "num_classes": len(labels.names)})
    print(f"{len(training)} clips to train on, {len(held_out)} held out, {len(labels.names)} classes")

    def save(model, history):
        multimodal.save_result(arguments.output, model, readers, labels, history)

    objective = Objective(tuple(labels.splits), labels.multi_label, dropped={VIDEO: arguments.video_dropout})
    task = multimodal.make_task(training, held_out, objective)
    return perceiver_cli.train(arguments, config, task, save, lambda h: perceiver_cli.last(h, multimodal.headline(h)))


def _readers(arguments, config):
    """{"audio": .., "video": ..} with the inputs of a model of `config`; raises InputError where it has others."""
    from ..models import InputError
    from .data.clips import Spectrogram, Video, Waveform

    parts = config.input.get("modalities", {})
    if sorted(parts) != [AUDIO, VIDEO]:
        raise InputError(
            f"--config {arguments.config} reads {sorted(parts) or config.input}; it must read {AUDIO} and {VIDEO}"
        )
    sound, frames = (tuple(parts[name].get("shape", ())) for name in (AUDIO, VIDEO))
    if len(frames) != 3 or frames[1] != frames[2] or len(sound) not in (1, 2) or parts[AUDIO].get("channels", 3) != 1:
        raise InputError(
            f"--config {arguments.config} has {VIDEO} of shape {frames} and {AUDIO} of shape {sound}; allowed are (frames, "
            f"size, size), and (samples,) or (time bins, mel bins) of one channel"
        )
    rate = arguments.sample_rate
    if len(sound) == 1:
        reader = Waveform(*sound, rate)
    else:
        reader = Spectrogram(seconds=sound[0] / 100, mels=sound[1], channels=1, sample_rate=rate)
    return {AUDIO: reader, VIDEO: Video(frames=frames[0], stride=arguments.stride, fps=arguments.fps, size=frames[1])}
