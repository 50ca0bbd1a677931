"""`train perceiver`, `perceiver-digits` and `perceiver-io`: images, of a folder or a table, by a recipe."""

import dataclasses
from pathlib import Path

from . import cli, perceiver_cli

_OF_DIGITS = ("label_smoothing", "mixup", "cutmix", "randaugment")
_OWN = (*_OF_DIGITS, "crop", "flip")


def add_systems(systems) -> None:
    """Adds the trainings of image classifiers to the systems of `train`."""
    digits = systems.add_parser("perceiver-digits", help="Perceiver on scikit-learn's handwritten digits")
    changes = {"config": "perceiver-digits", "epochs": 16, "batch_size": 16, "learning_rate": 2e-3}
    perceiver_cli.add_options(digits, "perceiver-small", output="runs/perceiver-digits", own=_OF_DIGITS, **changes)
    _add_sizes(digits)
    digits.set_defaults(run=perceiver_cli.running(_train_perceiver), data=None)

    images = systems.add_parser("perceiver", help="Perceiver on a folder of class folders of images, or a table of them")
    _add_data(images)
    recipes = ("perceiver-small", "perceiver-imagenet")
    perceiver_cli.add_options(images, *recipes, output="runs/perceiver", own=_OWN)
    _add_sizes(images)
    images.set_defaults(run=perceiver_cli.running(_train_perceiver))

    io = systems.add_parser("perceiver-io", help="Perceiver IO on the same, by the paper's recipes")
    _add_data(io)
    recipes = ("imagenet", "jft", "jft-fine-tune", "jft-fine-tune-conv")
    perceiver_cli.add_options(io, *(f"perceiver-io-{name}" for name in recipes), output="runs/perceiver-io", own=_OWN)
    perceiver_cli.add_init(io)
    io.set_defaults(run=perceiver_cli.running(_train_io))


def _add_data(parser):
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images per class, or a .csv or .parquet with columns image, label or labels (; between), split",
    )
    add("--val-data", metavar="FOLDER", help="held-out images in the same layout; default: a share of --data")
    add("--val-fraction", type=cli.fraction, default=0.1, help="share of --data that is held out (default 0.1)")
    add(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="broken rows of a table: stop (default), or go on",
    )


def _add_sizes(parser):
    add = parser.add_argument
    add("--no-compare", action="store_true", help="leave out the comparison with the plain PyTorch path")
    add("--image-size", type=cli.positive, help="side of the square that images are sampled to")
    add("--latents", type=cli.positive, help="number of latents")
    add("--latent-dim", type=cli.positive, help="channels of a latent")
    add("--cross-attends", type=cli.positive, help="how often the latents read the image")
    add("--layers", type=cli.positive, help="latent layers after every cross-attend")
    add("--heads", type=cli.positive, help="heads of the latent layers")
    add("--bands", type=cli.positive, help="Fourier bands of the positions")


def _sizes(arguments):
    fields = {
        "num_latents": arguments.latents,
        "latent_channels": arguments.latent_dim,
        "num_cross_attends": arguments.cross_attends,
        "layers_per_block": arguments.layers,
        "self_heads": arguments.heads,
        "num_bands": arguments.bands,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _load(arguments, size):
    """(training, held out, preprocessing, classes) of the options."""
    import sys

    from ..models import InputError
    from .data import digits, folder

    if arguments.data is None:
        training, held_out, preprocessing = digits.load(size, arguments.seed)
        training.augment = arguments.randaugment
        return training, held_out, preprocessing, digits.CLASSES
    augmentation = {"flip": arguments.flip, "crop": arguments.crop, "augment": arguments.randaugment}
    options = {"held_out": arguments.val_fraction, **augmentation}
    if arguments.data.suffix.lower() not in (".csv", ".parquet"):
        return folder.load(arguments.data, size, arguments.seed, held_out_folder=arguments.val_data, **options)
    if arguments.val_data is not None:
        raise InputError(f"--val-data is for folders; {arguments.data} says in its column 'split' what is held out")
    *found, problems = folder.load_table(arguments.data, size, arguments.seed, on_error=arguments.on_error, **options)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return found


def _task(arguments, training, held_out, classes):
    from . import classification

    loss = classification.MixedLoss(len(classes), arguments.label_smoothing, arguments.mixup, arguments.cutmix)
    return classification.make_task(training, held_out, loss)


def _train_io(arguments):
    from ..models import InputError
    from . import classification

    config = perceiver_cli.config_of(arguments, "classes", "pooled")
    shape = config.input.get("shape", ())
    if config.input.get("kind") not in ("grid", "conv_stem") or len(shape) != 2 or shape[0] != shape[1]:
        raise InputError(f"--config {arguments.config} reads {config.input}; it must read square images")
    training, held_out, preprocessing, classes = _load(arguments, shape[0])
    config = dataclasses.replace(
        config,
        input={**config.input, "channels": len(preprocessing.mean)},
        output={**config.output, "num_classes": len(classes)},
    )
    print(f"{len(training)} images to train on, {len(held_out)} held out, {len(classes)} classes")

    def save(model, history):
        classification.save_result(arguments.output, model, preprocessing, classes, history)

    task = _task(arguments, training, held_out, classes)
    start = perceiver_cli.started_from(arguments, task)
    _, history, seconds = perceiver_cli.fit(arguments, config, task, save, start=start)
    print(f"held-out accuracy {history[-1]['accuracy']:.2%} after {perceiver_cli.length_of(history)}")
    print(f"checkpoint and {classification.CURVE} in {arguments.output}; {seconds:.0f} s")
    return 0


def _train_perceiver(arguments):
    import time

    import torch

    from .. import models
    from ..models import InputError
    from . import classification, compare, loop

    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = cli.device_of(arguments)
    config = models.load(arguments.config, device="meta").config
    if not isinstance(config, models.perceiver.PerceiverConfig):
        raise InputError(
            f"--config is {arguments.config!r}, which is no Perceiver; allowed are {', '.join(models.perceiver.CONFIGS)}"
        )
    image_size = arguments.image_size or config.input_shape[0]
    training, held_out, preprocessing, classes = _load(arguments, image_size)
    torch.manual_seed(arguments.seed)
    model = models.load(
        arguments.config,
        **_sizes(arguments),
        input_shape=(image_size, image_size),
        input_channels=len(preprocessing.mean),
        num_classes=len(classes),
        backend=arguments.backend,
        device=device,
    )
    settings = perceiver_cli.settings_of(arguments)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(training)} images to train on, {len(held_out)} held out, {len(classes)} classes; "
        f"{parameters:,} parameters, {image_size * image_size} input elements, backend {compare.backend_of(model)}"
    )
    with cli.resumable(arguments, arguments.output):
        history = loop.fit(
            model,
            _task(arguments, training, held_out, classes),
            settings,
            arguments.output,
            device=device,
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        classification.save_result(arguments.output, model, preprocessing, classes, history)
    print(f"held-out accuracy {history[-1]['accuracy']:.2%} after {perceiver_cli.length_of(history)}")
    print(f"checkpoint {arguments.output}, learning curve {arguments.output / classification.CURVE}")
    if not arguments.no_compare:
        costs = compare.compare(model, settings.batch_size, device)
        print(compare.describe(costs, model, settings.batch_size))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0
