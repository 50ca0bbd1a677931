"""What the trainings of Perceiver and Perceiver IO share: options by a recipe, the model, the loop."""

import argparse
import re
from pathlib import Path

from . import cli

OPTIMIZERS = ("lamb", "adamw", "sgd", "adafactor")
# Field of a recipe -> option that has its value where it is not given.
_OPTIONS = {
    "config": "config",
    "batch_size": "batch_size",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "optimizer": "optimizer",
    "warmup_steps": "warmup",
    "clip_norm": "clip",
    "label_smoothing": "label_smoothing",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "randaugment": "randaugment",
    "crop": "crop",
    "flip": "flip",
    "video_dropout": "video_dropout",
    "label_weight": "label_weight",
}


def add_options(parser, *recipes, output, own=(), **changes) -> None:
    """The options of a training: what is not given is the recipe's, --recipe of several, or the only one with `changes`.

    Args:
        recipes: names, the first being the default.
        output: folder.
        own: fields of a recipe that this kind of training has an option for, beside those that all have.
    """
    import dataclasses

    from .recipes import RECIPES

    recipe = dataclasses.replace(RECIPES[recipes[0]], **changes)
    add = parser.add_argument

    def default(field):
        return "the recipe's" if len(recipes) > 1 else f"{_shown(getattr(recipe, field))}"

    if changes:
        parser.set_defaults(recipe=recipe)
    else:
        add("--recipe", choices=recipes, default=recipes[0], help=f"how it was trained, by name (default {recipes[0]})")
    cli.add_run_options(parser, output)
    length = parser.add_mutually_exclusive_group()
    for name in ("epochs", "steps"):
        shown = "the recipe's" if len(recipes) > 1 else _shown(getattr(recipe, name))
        length.add_argument(f"--{name}", type=cli.positive, help=f"default {shown}")
    add("--evaluate-every", type=cli.positive, metavar="STEPS", help="default: an epoch, or a tenth of --steps")
    for field, kind, more in (
        ("batch_size", cli.positive, ""),
        ("learning_rate", cli.positive_float, "highest learning rate "),
        ("weight_decay", cli.non_negative_float, ""),
        ("warmup_steps", cli.non_negative, "steps with a rising learning rate "),
        ("clip_norm", cli.positive_float, "largest norm of the gradients "),
        ("label_smoothing", cli.fraction_or_zero, "0: none "),
        ("mixup", cli.non_negative_float, "alpha; 0: none "),
        ("randaugment", _randaugment, "operations and their strength of 10, as N,M; 0,0: none "),
        ("crop", cli.fraction_or_zero, "least share of an image that a random crop shows; 0: no crops "),
        ("video_dropout", cli.fraction_or_zero, "how often a model is not shown the pictures in training "),
        ("label_weight", cli.non_negative_float, "of the label in the loss "),
    ):
        if field not in OWN or field in own:
            add(f"--{_OPTIONS[field].replace('_', '-')}", type=kind, help=f"{more}(default {default(field)})")
    for field, what in (("cutmix", "mix images by boxes"), ("flip", "mirror half of the training images left to right")):
        if field in own:
            add(f"--{field}", action=argparse.BooleanOptionalAction, help=f"{what} (default {default(field)})")
    add("--optimizer", choices=OPTIMIZERS, help=f"default {default('optimizer')}")
    add("--micro-batches", type=cli.positive, default=1, help="that a batch is cut into to need less memory (default 1)")
    add("--bfloat16", action="store_true", help="autocast")
    add("--config", metavar="NAME", help=f"model sizes by name, or a JSON file of them (default {default('config')})")


OWN = ("label_smoothing", "mixup", "cutmix", "randaugment", "crop", "flip", "video_dropout", "label_weight")


def _shown(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {None: "none", True: "yes", False: "no"}.get(value, value) if not isinstance(value, (int, float)) else f"{value:g}"


def _randaugment(text):
    found = re.fullmatch(r"(\d{1,2}),(\d+(?:\.\d+)?)", text)
    if not found or float(found[2]) > 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,M, such as 4,5: N operations, M from 0 to 10")
    return int(found[1]), float(found[2])


def running(train):
    """The `run` of a parser whose options are of `add_options`."""
    return lambda arguments: cli.guarded(lambda: train(settled(arguments)))


def settled(arguments):
    """`arguments` in which what is not given is the recipe's, `arguments.recipe` being a `Recipe`."""
    from .recipes import RECIPES

    if isinstance(arguments.recipe, str):
        arguments.recipe = RECIPES[arguments.recipe]
    for field, name in _OPTIONS.items():
        if getattr(arguments, name, 0) is None:
            setattr(arguments, name, getattr(arguments.recipe, field))
    if arguments.epochs is None and arguments.steps is None:
        arguments.epochs, arguments.steps = arguments.recipe.epochs, arguments.recipe.steps
    return arguments


def settings_of(arguments, **changes):
    """The `Settings` of `settled` options, with `changes`."""
    every = arguments.evaluate_every
    if arguments.steps is not None:
        every = min(every or max(arguments.steps // 10, 1), arguments.steps)
    options = {
        "epochs": arguments.epochs,
        "steps": arguments.steps,
        "evaluate_every": every,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.lr,
        "weight_decay": arguments.weight_decay,
        "warmup_steps": arguments.warmup,
        "clip_norm": arguments.clip,
        "seed": arguments.seed,
        "optimizer": arguments.optimizer,
        "micro_batches": arguments.micro_batches,
        "bfloat16": arguments.bfloat16,
    }
    return arguments.recipe.settings(**{**options, **changes})


def length_of(history: list) -> str:
    """How long a training was, in words."""
    return f"{len(history)} epochs" if "epoch" in history[-1] else f"{history[-1]['step']} steps"


def config_of(arguments, *outputs: str):
    """The PerceiverIOConfig of --config, whose output must be of one of the kinds `outputs`.

    Raises InputError for a name that is not known, a file that is no config, and sizes that do not fit.
    """
    from ..models import InputError, perceiver_io, registry

    allowed = [name for name, config in perceiver_io.CONFIGS.items() if config.output.get("kind") in outputs]
    config = registry.config_of("--config", perceiver_io, arguments.config, allowed, backend=arguments.backend)
    if (kind := config.output.get("kind")) not in outputs:
        wanted = " or ".join(map(repr, outputs))
        raise InputError(f"--config {arguments.config} has an output {kind!r}; it must be {wanted}")
    return config


def fit(arguments, config, task, save, *, start=None, **changes):
    """(model, history, seconds); trains in --output, or goes on there, and calls `save(model, history)` at the end.

    Args:
        start: called with the new model, before what a training has left in --output is read.
        changes: to the settings.
    """
    import time

    import torch

    from ..models.perceiver_io import PerceiverIO
    from . import loop

    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = PerceiverIO(config, device=cli.device_of(arguments))
    if start is not None:
        start(model)
    parameters = sum(p.numel() for p in model.parameters())
    latents = " x ".join(map(str, model.encoder.latents.shape))
    print(f"{parameters:,} parameters, latents {latents}, {arguments.optimizer} at {arguments.lr:g}")
    with cli.resumable(arguments, arguments.output):
        history = loop.fit(
            model,
            task,
            settings_of(arguments, **changes),
            arguments.output,
            device=cli.device_of(arguments),
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        save(model.eval(), history)
    return model, history, time.perf_counter() - started


def train(arguments, config, task, save, told, *files: str, **options) -> int:
    """`fit` with `options`; prints what `told(history)` says of it, then where its `files` are, and returns the exit code."""
    from .classification import CURVE

    _, history, seconds = fit(arguments, config, task, save, **options)
    *names, last_name = "checkpoint", CURVE, *files
    print(f"{told(history)}\n{', '.join(names)} and {last_name} in {arguments.output}; {seconds:.0f} s")
    return 0


def last(history: list, metric="accuracy") -> str:
    """The last evaluation of a training in words."""
    return f"held-out {metric} {history[-1][metric]:.2%} after {length_of(history)}"


def add_init(parser) -> None:
    """Which trained model to begin with; see `started_from`."""
    parser.add_argument("--init", type=Path, metavar="DIR", help="begin with the weights of a trained or converted model")


def started_from(arguments, task):
    """A `start` for `fit` that takes over all of the model in --init that has the shapes of the new one, None without --init.

    The task's fingerprint then says what it began with. Raises InputError for a folder without a model, and for one whose
    encoder is another.
    """
    if arguments.init is None:
        return None
    from .. import models
    from ..models import InputError
    from . import checkpoint

    weights = models.load(arguments.init).state_dict()
    task.fingerprint += f" from {checkpoint.digest(weights)}"

    def start(model):
        own = model.state_dict()
        same = {name: t for name, t in weights.items() if name in own and own[name].shape == t.shape}
        missing = [name for name in own if name.startswith("encoder.") and name not in same]
        if missing:
            raise InputError(f"--init {arguments.init} has no {missing[0]} of the shape {tuple(own[missing[0]].shape)}")
        model.load_state_dict(same, strict=False)
        print(f"{len(same)} of {len(own)} tensors are those of {arguments.init}")

    return start


def kind_of(checkpoint) -> str | None:
    """What a Perceiver IO in the folder `checkpoint` puts out, such as "flow"; None for other models and folders.

    Of a classifier what it reads as well: "classes of points", "classes of multimodal", ...
    """
    from ..models.registry import read_json

    path = Path(checkpoint) / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if fields.get("system") != "perceiver_io":
        return None
    reads, gives = (fields[part].get("kind") if isinstance(fields.get(part), dict) else None for part in ("input", "output"))
    return f"classes of {reads}" if gives in ("classes", "pooled") else gives
