"""`train perceiver-autoencode`, its demo, and `predict` for their models; nothing heavy is imported until a command runs."""

from pathlib import Path

from . import cli, clips_cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the trainings of autoencoders to the systems of `train`."""
    clips = systems.add_parser("perceiver-autoencode", help="Perceiver IO that gives back clips: video, sound and label")
    what = "a table with columns image, audio, label, or class folders"
    clips_cli.add_data_options(clips, what, sample_rate=48000, stride=1)
    recipes = ("perceiver-io-kinetics", "perceiver-io-kinetics-label")
    _add_options(clips, *recipes, output="runs/perceiver-autoencode", points=512)
    clips.set_defaults(run=perceiver_cli.running(_train))

    demo = systems.add_parser("perceiver-autoencode-demo", help="the same, small, on written and spoken digits")
    demo.add_argument("--clips", type=cli.positive, help="train on so many of the clips (default all)")
    demo.add_argument("--held-out", type=cli.positive, default=60, help="clips, at most (default 60)")
    changes = {"epochs": None, "steps": 2000, "batch_size": 8, "learning_rate": 3e-3, "optimizer": "adamw"}
    changes |= {"warmup_steps": 100, "weight_decay": 0.01, "clip_norm": 1.0, "beta2": 0.99, "label_weight": 0.2}
    changes |= {"config": "perceiver-io-autoencoder-demo"}
    options = {"output": "runs/perceiver-autoencode-demo", "points": 128, "weights": (1.0, 640.0), "audio_error": "squared"}
    _add_options(demo, "perceiver-io-kinetics", **options, **changes)
    demo.set_defaults(run=perceiver_cli.running(_demo), save_every=500, evaluate_every=500)


def _add_options(parser, *recipes, output, points, weights=(0.03, 1.0), audio_error="absolute", **changes):
    perceiver_cli.add_options(parser, *recipes, output=output, own=("label_weight",), **changes)
    add = parser.add_argument
    add("--points", type=cli.positive, default=points, help=f"pixels, and patches of sound, of a step (default {points})")
    for name, weight in zip(("image", "audio"), weights, strict=True):
        add(f"--{name}-weight", type=cli.non_negative_float, default=weight, help=f"in the loss (default {weight:g})")
    errors = ["absolute", "squared"]
    add("--audio-error", choices=errors, default=audio_error, help=f"of a sample, in the loss (default {audio_error})")
    add("--masked", type=cli.probability, default=0.5, help="how often the label is hidden in training (default 0.5)")


def _train(arguments):
    from ..models import InputError
    from . import autoencode

    config = perceiver_cli.config_of(arguments, "multimodal")
    options = {"sample_rate": arguments.sample_rate, "stride": arguments.stride, "fps": arguments.fps}
    readers = autoencode.readers_of(config, **options)
    training, held_out, labels = clips_cli.load(arguments, readers)
    if len(labels.heads) > 1 or labels.multi_label:
        raise InputError(f"{arguments.data} has labels {', '.join(labels.heads)}; an autoencoder takes one 'label'")
    names = {name: name for name in readers}
    return _fit(arguments, config, readers, labels.names, *(autoencode.Autoencoded(c, names) for c in (training, held_out)))


def _demo(arguments):
    from . import autoencode
    from .data import digit_clips

    config = perceiver_cli.config_of(arguments, "multimodal")
    names = {"rgb": autoencode.IMAGE, "waveform": autoencode.AUDIO}
    clips = digit_clips.load(list(names), arguments.seed, clips=arguments.clips, hardest=0.0)
    clips[1].images = clips[1].images[: arguments.held_out]
    readers = {own: digit_clips.READERS[name] for name, own in names.items()}
    parts = (autoencode.Autoencoded(part, names) for part in clips)
    return _fit(arguments, config, readers, digit_clips.CLASSES, *parts, start=_still)


def _still(model):
    """Latent layers that change nothing at first: what they mix would hide the sound, of which a model learns late enough."""
    import torch

    for layer in (layer for block in model.encoder.blocks for layer in block):
        torch.nn.init.zeros_(layer.attention.output.weight)
        torch.nn.init.zeros_(layer.mlp[2].weight)


def _fit(arguments, config, readers, classes, training, held_out, start=None):
    from . import autoencode

    config = autoencode.with_classes(config, len(classes))
    for name, reader in readers.items():
        autoencode.check_shape(config, name, reader.shape)
    objective = autoencode.Autoencoding(
        arguments.image_weight,
        arguments.audio_weight,
        arguments.label_weight,
        arguments.points,
        arguments.masked,
        config.output["modalities"][autoencode.AUDIO]["samples"],
        arguments.audio_error,
    )
    print(f"{len(training)} clips to train on, {len(held_out)} held out, {len(classes)} classes")

    def save(model, history):
        autoencode.save_result(arguments.output, model, readers, classes, held_out, history)

    task = autoencode.make_task(training, held_out, objective)

    def told(history):
        return f"\n{autoencode.table(history[-1], len(classes))}\n"

    return perceiver_cli.train(arguments, config, task, save, told, autoencode.PICTURE, start=start)


def predict(arguments) -> int:
    """Writes what the model gives back of a clip, and prints the most probable labels."""
    from ..models import InputError
    from . import autoencode

    if arguments.images or arguments.text:
        raise InputError("this model gives back clips: --input image=FILE or FOLDER and --input audio=FILE")
    output = arguments.output or Path("reconstruction")
    # It is made later, with the folders above it.
    if not (there := next(folder for folder in (output, *output.parents) if folder.exists())).is_dir():
        raise InputError(f"--output is {output}, but {there} is not a folder")
    options = {"device": cli.device_of(arguments), "backend": arguments.backend}
    for name, probability in autoencode.predict(arguments.checkpoint, cli.inputs_of(arguments), output, **options):
        print(f"label\t{name}\t{probability:.4f}")
    print(f"{autoencode.PICTURE}, image.mp4 and audio.wav in {output}")
    return 0
