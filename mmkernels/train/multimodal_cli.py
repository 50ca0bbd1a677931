"""`train mbt`, `train mbt-digits` and `predict --input`; nothing heavy is imported until a command runs."""

import json

from . import cli, clips_cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the trainings of MBT to the systems of `train`."""
    digits = systems.add_parser("mbt-digits", help="MBT on spoken and handwritten digits: sound, pictures, and both")
    _add_options(digits, config="mbt-digits", output="runs/mbt-digits", epochs=24, batch_size=32, lr=2e-3, optimizer="adamw")
    _add_recipe(digits, label_smoothing=0.1, mixup=0.0, stochastic_depth=0.0)
    digits.add_argument("--clips", type=cli.positive, help="train on so many of the clips (default all)")
    digits.set_defaults(run=lambda arguments: cli.guarded(_train_digits, arguments))

    clips = systems.add_parser("mbt", help="MBT on a table of clips: sound files, videos or folders of frames")
    what = ".csv or .parquet: a path per modality, labels, split"
    clips_cli.add_data_options(clips, what, sample_rate=16000, stride=2, windows=4)
    what = "which of the config's (default rgb,spectrogram)"
    clips.add_argument("--modalities", default="rgb,spectrogram", metavar="A,B", help=what)
    _add_options(clips, config="mbt-small", output="runs/mbt", epochs=50, batch_size=64, lr=0.5, optimizer="sgd")
    _add_recipe(clips, label_smoothing=0.3, mixup=0.5, stochastic_depth=0.3)
    clips.set_defaults(run=lambda arguments: cli.guarded(_train_table, arguments))


def _add_options(parser, *, config, output, epochs, batch_size, lr, optimizer):
    cli.add_common_options(parser, output=output, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=0.0)
    add = parser.add_argument
    add("--config", default=config, metavar="NAME", help=f"model sizes by name, or a JSON file of them (default {config})")
    add("--optimizer", choices=["sgd", "adamw"], default=optimizer, help=f"default {optimizer}; sgd has momentum 0.9")
    add("--warmup", type=cli.fraction, default=0.05, help="share of the steps with a rising learning rate (default 0.05)")


def _add_recipe(parser, *, label_smoothing, mixup, stochastic_depth):
    add = parser.add_argument
    add("--label-smoothing", type=cli.non_negative_float, default=label_smoothing, help=f"default {label_smoothing}")
    add("--mixup", type=cli.non_negative_float, default=mixup, metavar="ALPHA", help=f"0: none (default {mixup})")
    add("--mixmod", action="store_true", help="mixup with a weight of its own for every modality")
    add("--stochastic-depth", type=cli.non_negative_float, default=stochastic_depth, help=f"default {stochastic_depth}")


def _train_table(arguments):
    config = _config(arguments, _names(arguments.modalities))
    from . import multimodal

    readers = multimodal.readers_of(config, sample_rate=arguments.sample_rate, stride=arguments.stride, fps=arguments.fps)
    training, held_out, labels = clips_cli.load(arguments, readers)
    short = sum(lengths[name] < reader.seconds for lengths in training.lengths for name, reader in readers.items())
    if short:
        print(f"{short} of the inputs to train on are shorter than the window of their modality and are repeated")
    history, _, _ = _fit(arguments, config, training, held_out, labels, readers, arguments.output)
    print(perceiver_cli.last(history, multimodal.headline(history)))
    print(f"checkpoint {arguments.output}, learning curve {arguments.output / 'learning-curve.png'}")
    return 0


def _train_digits(arguments):
    from ..models.registry import write_atomically
    from . import multimodal
    from .data import digit_clips
    from .data.manifest import Labels

    labels = Labels({"label": digit_clips.CLASSES})
    histories, rows = {}, []
    for name, modalities in {"audio": ["spectrogram"], "video": ["rgb"], "audio+video": ["rgb", "spectrogram"]}.items():
        config = _config(arguments, modalities)
        training, held_out = digit_clips.load(modalities, arguments.seed, clips=arguments.clips)
        readers = {modality: digit_clips.READERS[modality] for modality in modalities}
        folder = arguments.output / name
        histories[name], parameters, seconds = _fit(arguments, config, training, held_out, labels, readers, folder)
        last = histories[name][-1]
        rows.append(f"{name:<12} {parameters:>10,} {last['accuracy']:>9.2%} {last['held_out_loss']:>8.3f} {seconds:>8.0f} s")
    print(f"\n{'held out':<12} {'parameters':>10} {'accuracy':>9} {'loss':>8} {'time':>10}")
    print("\n".join(rows))
    results = {name: history[-1] for name, history in histories.items()}
    clip = {modality: tensor[0] for modality, tensor in held_out[None, 0][0].items()}
    write_atomically(arguments.output / "comparison.json", json.dumps(results, indent=1).encode())
    write_atomically(arguments.output / "comparison.png", multimodal.comparison_picture(histories, clip))
    print(f"checkpoints and comparison.png in {arguments.output}")
    return 0


def _fit(arguments, config, training, held_out, labels, readers, folder):
    """(history, number of parameters, seconds); trains in `folder`, or goes on there."""
    import dataclasses
    import math
    import time

    import torch

    from ..models.mbt import MBT
    from . import loop, multimodal
    from .objective import Objective

    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = cli.device_of(arguments)
    torch.manual_seed(arguments.seed)
    config = dataclasses.replace(config, num_classes=len(labels.names))
    model = MBT(config, device=device)
    objective = Objective(
        tuple(labels.splits), labels.multi_label, arguments.label_smoothing, arguments.mixup, arguments.mixmod
    )
    steps = arguments.epochs * max(len(training) // arguments.batch_size, 1)
    settings = loop.Settings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=math.ceil(arguments.warmup * steps),
        seed=arguments.seed,
        optimizer=arguments.optimizer,
    )
    parameters = sum(p.numel() for p in model.parameters())
    tokens = ", ".join(f"{modality.num_tokens} of {modality.name}" for modality in config.modalities)
    print(
        f"{len(training)} clips to train on, {len(held_out)} held out, {len(labels.names)} classes; "
        f"{parameters:,} parameters, tokens: {tokens}"
    )
    with cli.resumable(arguments, folder):
        history = loop.fit(
            model,
            multimodal.make_task(training, held_out, objective),
            settings,
            folder,
            device=device,
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        multimodal.save_result(folder, model, readers, labels, history)
    return history, parameters, time.perf_counter() - started


def predict(arguments) -> int:
    """Prints a line per head: name, class, probability."""
    from ..models import InputError
    from . import multimodal

    if arguments.images:
        raise InputError(f"IMAGE is {arguments.images[0]!r} beside --input; give one or the other")
    paths = cli.inputs_of(arguments)
    found = multimodal.predict(arguments.checkpoint, paths, device=cli.device_of(arguments), backend=arguments.backend)
    for head, name, probability in found:
        print(f"{head}\t{name}\t{probability:.4f}")
    return 0


def _names(text):
    from ..models import InputError

    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise InputError(f"--modalities is {text!r}; it must name each modality once, with commas between them")
    return names


def _config(arguments, names):
    """The MBTConfig of --config with the modalities `names`, in its order."""
    import dataclasses

    from ..models import InputError, mbt, registry

    changes = {"stochastic_depth": arguments.stochastic_depth, "backend": arguments.backend}
    config = registry.config_of("--config", mbt, arguments.config, **changes)
    known = [modality.name for modality in config.modalities]
    for name in names:
        if name not in known:
            raise InputError(f"--modalities has {name!r}; {arguments.config} allows {', '.join(known)}")
    return dataclasses.replace(config, modalities=tuple(m for m in config.modalities if m.name in names))
