"""`train perceiver-points` and `predict` for its models; nothing heavy is imported until a command runs."""

import json
from pathlib import Path

from . import cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the training on clouds of points to the systems of `train`."""
    points = systems.add_parser("perceiver-points", help="Perceiver on clouds of points, as ModelNet40's")
    add = points.add_argument
    what = "CLASS/train/ and CLASS/test/, or CLASS/, of .off, .npy, .txt"
    add("--data", type=Path, required=True, metavar="FOLDER", help=what)
    add("--val-fraction", type=cli.fraction, default=0.1, help="held-out share where there is no test/ (default 0.1)")
    add("--points", type=cli.positive, default=2048, help="drawn of every cloud (default 2048)")
    perceiver_cli.add_options(points, "perceiver-modelnet40", output="runs/perceiver-points")
    points.set_defaults(run=perceiver_cli.running(_train))


def _train(arguments):
    import dataclasses

    from ..models import InputError
    from ..models.registry import write_atomically
    from . import classification
    from .data import points

    config = perceiver_cli.config_of(arguments, "pooled", "classes")
    if config.input.get("kind") != "points" or config.input.get("axes", 3) != 3:
        raise InputError(f"--config {arguments.config} reads {config.input}; it must read points of 3 axes")
    options = {"held_out": arguments.val_fraction}
    training, held_out, classes = points.load(arguments.data, arguments.points, arguments.seed, **options)
    config = dataclasses.replace(config, output={**config.output, "num_classes": len(classes)})
    print(f"{len(training)} clouds to train on, {len(held_out)} held out, {len(classes)} classes")

    def save(model, history):
        model.save_pretrained(arguments.output)
        task = {"kind": "points", "classes": classes, "points": arguments.points, "history": history}
        write_atomically(arguments.output / classification.TASK, json.dumps(task, indent=1).encode())
        write_atomically(arguments.output / classification.CURVE, classification.learning_curve(history))

    task = classification.make_task(training, held_out, classification.MixedLoss(len(classes)))
    return perceiver_cli.train(arguments, config, task, save, perceiver_cli.last)


def predict(arguments) -> int:
    """Prints the class of every file of points."""
    import torch

    from ..models import InputError
    from ..models.registry import read_json
    from . import classification
    from .data import points
    from .loop import trained_model

    if arguments.text or arguments.input or not arguments.images:
        raise InputError(f"this model classifies clouds of points: give files ending in {', '.join(points.EXTENSIONS)}")
    path = Path(arguments.checkpoint) / classification.TASK
    task = read_json(path)
    device = cli.device_of(arguments)
    model = trained_model(arguments.checkpoint, device, arguments.backend)
    classes, count = task.get("classes"), task.get("points")
    if not isinstance(count, int) or not isinstance(classes, list) or len(classes) != model.config.output["num_classes"]:
        raise InputError(f"{path} does not describe a training on points of this model")
    clouds = [points.in_cube(points.read(path, count, 0)) for path in arguments.images]
    for path, cloud in zip(arguments.images, clouds, strict=True):
        with torch.no_grad():
            probability, label = model(cloud[None].to(device)).float().softmax(-1)[0].max(-1)
        print(f"{path}\t{classes[int(label)]}\t{float(probability):.4f}")
    return 0
