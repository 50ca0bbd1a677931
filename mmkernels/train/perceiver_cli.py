"""`train perceiver-io` of images, and what all trainings of Perceiver IO share: options by a recipe, the model, the loop."""

from pathlib import Path

from . import cli

OPTIMIZERS = ("lamb", "adamw", "sgd", "adafactor")


def add_systems(systems) -> None:
    """Adds the training of image classifiers to the systems of `train`."""
    images = systems.add_parser(
        "perceiver-io", help="Perceiver IO on a folder of class folders of images, by the paper's recipe"
    )
    cli.add_folder_options(images)
    add_options(images, recipe="perceiver-io-imagenet", config="perceiver-io-imagenet-fourier", output="runs/perceiver-io")
    add, recipe = images.add_argument, images.get_default("recipe")
    for name, kind in (("label_smoothing", cli.fraction_or_zero), ("mixup", cli.non_negative_float)):
        value = getattr(recipe, name)
        add(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"0: none (default {value})")
    add("--no-cutmix", action="store_true", help="mix images by their values alone")
    images.set_defaults(run=lambda arguments: cli.guarded(_train, arguments))


def _train(arguments):
    import dataclasses

    from ..models import InputError
    from . import classification

    config = config_of(arguments, "classes")
    shape = config.input.get("shape", ())
    if config.input.get("kind") not in ("grid", "conv_stem") or len(shape) != 2 or shape[0] != shape[1]:
        raise InputError(f"--config {arguments.config} reads {config.input}; it must read square images")
    training, held_out, preprocessing, classes = cli.folder_data(arguments, shape[0])
    config = dataclasses.replace(
        config,
        input={**config.input, "channels": len(preprocessing.mean)},
        output={**config.output, "num_classes": len(classes)},
    )
    print(f"{len(training)} images to train on, {len(held_out)} held out, {len(classes)} classes")

    def save(model, history):
        classification.save_result(arguments.output, model, preprocessing, classes, history)

    loss = classification.MixedLoss(len(classes), arguments.label_smoothing, arguments.mixup, not arguments.no_cutmix)
    _, history, seconds = fit(arguments, config, classification.make_task(training, held_out, loss), save)
    print(f"held-out accuracy {history[-1]['accuracy']:.2%} after {len(history)} epochs")
    print(f"checkpoint and {classification.CURVE} in {arguments.output}; {seconds:.0f} s")
    return 0


def add_options(parser, *, recipe, config, output, **changes) -> None:
    """The options of a training whose defaults are those of `recipe`, with `changes` to them."""
    import dataclasses

    from .recipes import RECIPES

    recipe = dataclasses.replace(RECIPES[recipe], **changes)
    lr, decay = recipe.learning_rate, recipe.weight_decay
    options = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "lr": lr, "weight_decay": decay}
    cli.add_common_options(parser, output=output, **options)
    add = parser.add_argument
    if recipe.epochs is None:
        every = max(recipe.steps // 10, 1)
        add("--steps", type=cli.positive, default=recipe.steps, help=f"default {recipe.steps}")
        add("--evaluate-every", type=cli.positive, default=every, metavar="STEPS", help=f"default {every}")
    add("--optimizer", choices=OPTIMIZERS, default=recipe.optimizer, help=f"default {recipe.optimizer}")
    add("--warmup", type=cli.non_negative, default=recipe.warmup_steps, metavar="STEPS", help="with a rising learning rate")
    clip = "none" if recipe.clip_norm is None else f"{recipe.clip_norm:g}"
    add("--clip", type=cli.positive_float, default=recipe.clip_norm, metavar="NORM", help=f"of the gradients (default {clip})")
    add("--micro-batches", type=cli.positive, default=1, help="that a batch is cut into to need less memory (default 1)")
    add("--bfloat16", action="store_true", help="autocast")
    add("--config", default=config, metavar="NAME", help=f"model sizes by name, or a JSON file of them (default {config})")
    parser.set_defaults(recipe=recipe)


def settings_of(arguments):
    """The `Settings` of the options: their recipe's, but for what they say."""
    lengths = {"epochs": arguments.epochs} if hasattr(arguments, "epochs") else {"steps": arguments.steps}
    if "steps" in lengths:
        lengths["evaluate_every"] = min(arguments.evaluate_every, arguments.steps)
    return arguments.recipe.settings(
        **lengths,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup,
        clip_norm=arguments.clip,
        seed=arguments.seed,
        optimizer=arguments.optimizer,
        micro_batches=arguments.micro_batches,
        bfloat16=arguments.bfloat16,
    )


def config_of(arguments, output: str):
    """The PerceiverIOConfig of --config, whose output must be of the kind `output`.

    Raises InputError for a name that is not known, a file that is no config, and sizes that do not fit.
    """
    import dataclasses

    from ..models import InputError, perceiver_io
    from ..models.registry import read_json

    allowed = [name for name, config in perceiver_io.CONFIGS.items() if config.output.get("kind") == output]
    if arguments.config in perceiver_io.CONFIGS:
        fields = dataclasses.asdict(perceiver_io.CONFIGS[arguments.config])
    elif arguments.config.endswith(".json"):
        fields = read_json(Path(arguments.config))
        fields.pop("system", None)
    else:
        raise InputError(f"--config is {arguments.config!r}; allowed are a .json file and {', '.join(allowed)}")
    try:
        config = perceiver_io.PerceiverIOConfig(**{**fields, "backend": arguments.backend})
        if config.output.get("kind") != output:
            raise InputError(f"--config {arguments.config} has an output {config.output.get('kind')!r}; it must be {output!r}")
        perceiver_io.PerceiverIO(config, device="meta")  # sizes that do not fit are said before the data are read
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{arguments.config}: {error}") from error
    return config


def fit(arguments, config, task, save):
    """(model, history, seconds); trains in --output, or goes on there, and calls `save(model, history)` at the end."""
    import time

    import torch

    from ..models.perceiver_io import PerceiverIO
    from . import loop

    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = PerceiverIO(config, device=cli.device_of(arguments))
    parameters = sum(p.numel() for p in model.parameters())
    latents = " x ".join(map(str, model.encoder.latents.shape))
    print(f"{parameters:,} parameters, latents {latents}, {arguments.optimizer} at {arguments.lr:g}")
    with cli.resumable(arguments, arguments.output):
        history = loop.fit(
            model,
            task,
            settings_of(arguments),
            arguments.output,
            device=cli.device_of(arguments),
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        save(model.eval(), history)
    return model, history, time.perf_counter() - started


def kind_of(checkpoint) -> str | None:
    """What a Perceiver IO in the folder `checkpoint` puts out, such as "flow"; None for other models and folders."""
    from ..models.registry import read_json

    path = Path(checkpoint) / "config.json"
    fields = read_json(path) if path.is_file() else {}
    output = fields.get("output")
    return output.get("kind") if fields.get("system") == "perceiver_io" and isinstance(output, dict) else None
