"""`python -m mmkernels train` and `predict`. Nothing heavy is imported until a command runs."""

import argparse
import contextlib
import os
import sys
from pathlib import Path


def add_commands(subparsers) -> None:
    """Adds both commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    train = subparsers.add_parser("train", help="train a model")
    systems = train.add_subparsers(dest="system", required=True, metavar="SYSTEM")
    digits = systems.add_parser("perceiver-digits", help="Perceiver on scikit-learn's handwritten digits")
    _add_training_options(digits, config="perceiver-digits", output="runs/perceiver-digits", epochs=16, batch_size=16, lr=2e-3)
    digits.set_defaults(run=lambda arguments: guarded(_train, arguments, _digits))
    folder = systems.add_parser("perceiver", help="Perceiver on a folder of class folders of images")
    add_folder_options(folder)
    _add_training_options(folder, config="perceiver-small", output="runs/perceiver", epochs=30, batch_size=32, lr=1e-3)
    folder.set_defaults(run=lambda arguments: guarded(_train, arguments, folder_data))

    from . import adapters_cli, autoencode_cli, byte_text_cli, flow_cli, multimodal_cli, multitask_cli, perceiver_cli, text_cli

    perceiver_cli.add_systems(systems)
    byte_text_cli.add_systems(systems)
    flow_cli.add_systems(systems)
    autoencode_cli.add_systems(systems)
    multimodal_cli.add_systems(systems)
    text_cli.add_systems(systems)
    multitask_cli.add_systems(systems)
    adapters_cli.add_systems(systems)

    predict = subparsers.add_parser("predict", help="what a trained model makes of image files, a clip or a text")
    predict.add_argument("images", nargs="*", metavar="IMAGE")
    predict.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="MODALITY=PATH",
        help="for a model of clips, once for each modality of one clip: spectrogram=FILE (sound), rgb=FILE or FOLDER (frames)",
    )
    predict.add_argument("--text", action="append", default=[], help="for a model of text, with the prefix of its task")
    predict.add_argument("--task", help="of a model of several tasks; a tab in --text is between the two texts of a pair")
    predict.add_argument(
        "--output", type=Path, help="of optical flow (a .flo file, and a .png beside it) or of a clip (a folder)"
    )
    predict.add_argument("--checkpoint", required=True, metavar="DIR", help="the --output of a training")
    predict.add_argument("--backend", default="auto")
    predict.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    predict.set_defaults(run=lambda arguments: guarded(_predict, arguments))


def add_folder_options(parser):
    """Which images to train on; see `folder_data`."""
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="one folder of images per class")
    add("--val-data", metavar="FOLDER", help="held-out images in the same layout; default: a share of --data")
    add("--val-fraction", type=fraction, default=0.1, help="share of --data that is held out (default 0.1)")
    add("--flip", action="store_true", help="mirror half of the training images left to right")


def _add_training_options(parser, *, config, output, epochs, batch_size, lr):
    add = parser.add_argument
    add_common_options(parser, output=output, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=0.05)
    add("--no-compare", action="store_true", help="leave out the comparison with the plain PyTorch path")
    add(
        "--config", default=config, metavar="NAME", help=f"model sizes by name (default {config}); the flags below change them"
    )
    add("--image-size", type=positive, help="side of the square that images are sampled to")
    add("--latents", type=positive, help="number of latents")
    add("--latent-dim", type=positive, help="channels of a latent")
    add("--cross-attends", type=positive, help="how often the latents read the image")
    add("--layers", type=positive, help="latent layers after every cross-attend")
    add("--heads", type=positive, help="heads of the latent layers")
    add("--bands", type=positive, help="Fourier bands of the positions")


def add_common_options(parser, *, output, epochs, batch_size, lr, weight_decay):
    """The options of every training."""
    add = parser.add_argument
    add("--output", type=Path, default=Path(output), metavar="DIR", help=f"default {output}")
    if epochs is not None:
        add("--epochs", type=positive, default=epochs, help=f"default {epochs}")
    add("--batch-size", type=positive, default=batch_size, help=f"default {batch_size}")
    add("--lr", type=positive_float, default=lr, help=f"highest learning rate (default {lr})")
    add("--weight-decay", type=non_negative_float, default=weight_decay, help=f"default {weight_decay}")
    add("--seed", type=seed, default=0, help="of the split, the weights, the order and the augmentation (default 0)")
    add("--save-every", type=positive, default=50, metavar="STEPS", help="checkpoint interval (default 50)")
    add("--workers", type=non_negative, default=0, help="processes that read images (default 0)")
    add("--threads", type=threads, help="CPU threads; a resumed run needs the same number to repeat to the bit")
    add("--device", default=None, help="default: cuda where there is one, else cpu")
    add("--backend", default="auto", help="of the attentions; eager is plain PyTorch (default auto)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--resume", action="store_true", help="fail unless there is a training to resume (resuming is the default)"
    )
    choice.add_argument("--restart", action="store_true", help="discard the training in --output")


def guarded(command, *arguments):
    """Runs a command; what the user can mend becomes one line and exit code 2."""
    # Before torch is loaded: threads that wait by spinning make a step many times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .._backends import BackendError
    from ..models import InputError
    from ..models.registry import is_out_of_memory

    try:
        return command(*arguments)
    except (InputError, BackendError, ImportError, OSError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"not enough memory; smaller sizes or batches need less: {error}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _digits(arguments, image_size):
    from .data import digits

    training, held_out, preprocessing = digits.load(image_size, arguments.seed)
    return training, held_out, preprocessing, digits.CLASSES


def folder_data(arguments, image_size):
    from .data import folder

    return folder.load(
        arguments.data,
        image_size,
        arguments.seed,
        held_out_folder=arguments.val_data,
        held_out=arguments.val_fraction,
        flip=arguments.flip,
    )


def _train(arguments, load_data):
    import time

    import torch

    from .. import models
    from ..models import InputError
    from . import classification, compare, loop

    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = device_of(arguments)
    config = models.load(arguments.config, device="meta").config
    if not isinstance(config, models.perceiver.PerceiverConfig):
        raise InputError(
            f"--config is {arguments.config!r}, which is no Perceiver; allowed are {', '.join(models.perceiver.CONFIGS)}"
        )
    image_size = arguments.image_size or config.input_shape[0]
    training, held_out, preprocessing, classes = load_data(arguments, image_size)
    torch.manual_seed(arguments.seed)
    model = models.load(
        arguments.config,
        **_overrides(arguments),
        input_shape=(image_size, image_size),
        input_channels=len(preprocessing.mean),
        num_classes=len(classes),
        backend=arguments.backend,
        device=device,
    )
    settings = loop.Settings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
    )
    task = classification.make_task(training, held_out)

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(training)} images to train on, {len(held_out)} held out, {len(classes)} classes; "
        f"{parameters:,} parameters, {image_size * image_size} input elements, backend {compare.backend_of(model)}"
    )
    with resumable(arguments, arguments.output):
        history = loop.fit(
            model,
            task,
            settings,
            arguments.output,
            device=device,
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        classification.save_result(arguments.output, model, preprocessing, classes, history)
    print(f"held-out accuracy {history[-1]['accuracy']:.2%} after {len(history)} epochs")
    print(f"checkpoint {arguments.output}, learning curve {arguments.output / classification.CURVE}")
    if not arguments.no_compare:
        costs = compare.compare(model, settings.batch_size, device)
        print(compare.describe(costs, model, settings.batch_size))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


@contextlib.contextmanager
def resumable(arguments, folder):
    """Keeps other trainings out of `folder` and does with the one in it what --restart and --resume say."""
    from ..models import InputError
    from ..models.adapterhub.folders import FILES
    from . import autoencode, byte_text, checkpoint, classification, flow, loop, tokenizer

    with checkpoint.locked(folder):
        if arguments.restart:
            # The results as well: a folder with files of two trainings would be taken for a finished one.
            weights = ("config.json", "model.safetensors", loop.BEST, checkpoint.NAME, *tokenizer.FILES)
            adapters = (name for names in FILES.values() for name in names)
            pictures = (classification.CURVE, flow.PICTURE, autoencode.PICTURE, byte_text.EXAMPLES)
            for name in (classification.TASK, *pictures, *weights, *adapters):
                (folder / name).unlink(missing_ok=True)
        found = checkpoint.read_state(folder)
        if arguments.resume and found is None:
            raise InputError(f"--resume: {folder} holds no training to resume")
        if found is not None:
            print(f"resuming {folder} at step {found['step']}; --restart begins anew")
        try:
            yield
        except KeyboardInterrupt:
            print("the same command goes on where the last checkpoint stands", file=sys.stderr)
            raise


def _predict(arguments):
    from ..models import InputError
    from . import autoencode_cli, byte_text_cli, flow_cli, perceiver_cli

    own = {"tokens": byte_text_cli, "flow": flow_cli, "multimodal": autoencode_cli}
    if (kind := perceiver_cli.kind_of(arguments.checkpoint)) in own:
        return own[kind].predict(arguments)
    if arguments.output is not None:
        raise InputError("--output is for a model of optical flow or of clips that gives them back")
    if arguments.task is not None and not arguments.text:
        raise InputError("--task is given without --text")
    if arguments.text:
        from . import text_cli

        return text_cli.predict(arguments)
    if arguments.input:
        from . import multimodal_cli

        return multimodal_cli.predict(arguments)
    if not arguments.images:
        raise InputError("nothing to classify: give image files, --input for a model of clips, or --text for one of text")
    from .classification import predict

    for path, name, probability in predict(
        arguments.checkpoint, arguments.images, device=device_of(arguments), backend=arguments.backend
    ):
        # A file name may hold bytes that are no text.
        print(f"{path}\t{name}\t{probability:.4f}".encode(errors="surrogateescape").decode(errors="replace"))
    return 0


def inputs_of(arguments) -> dict:
    """{modality: path} of --input."""
    from ..models import InputError

    paths = {}
    for text in arguments.input:
        name, separator, path = text.partition("=")
        if not separator or not path or name in paths:
            raise InputError(f"--input is {text!r}; it must be MODALITY=PATH, once for each modality")
        paths[name] = path
    return paths


def device_of(arguments):
    import torch

    from ..models.registry import InputError, check_device

    name = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device is None else arguments.device
    check_device("--device", name)
    if torch.device(name).type == "meta":
        raise InputError("--device is 'meta', whose tensors hold no numbers; allowed are cpu and cuda")
    return name


def _overrides(arguments):
    fields = {
        "num_latents": arguments.latents,
        "latent_channels": arguments.latent_dim,
        "num_cross_attends": arguments.cross_attends,
        "layers_per_block": arguments.layers,
        "self_heads": arguments.heads,
        "num_bands": arguments.bands,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _number(kind, allowed, holds):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


seed = _number(int, "an integer from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)  # what scikit-learn takes
threads = _number(int, "an integer from 1 to 1024", lambda v: 1 <= v <= 1024)
positive = _number(int, "a positive integer", lambda v: v > 0)
non_negative = _number(int, "an integer of 0 or more", lambda v: v >= 0)
positive_float = _number(float, "a positive number", lambda v: 0 < v < float("inf"))
non_negative_float = _number(float, "a number of 0 or more", lambda v: 0 <= v < float("inf"))
fraction_or_zero = _number(float, "0 or between 0 and 1", lambda v: 0 <= v < 1)
fraction = _number(float, "between 0 and 1", lambda v: 0 < v < 1)
probability = _number(float, "from 0 to 1", lambda v: 0 <= v <= 1)
