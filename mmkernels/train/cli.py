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
    from . import (
        adapters_cli,
        autoencode_cli,
        byte_glue_cli,
        byte_text_cli,
        clips_cli,
        flow_cli,
        images_cli,
        multimodal_cli,
        multitask_cli,
        points_cli,
        text_cli,
    )

    for commands in (
        *(images_cli, points_cli, byte_text_cli, byte_glue_cli, flow_cli, autoencode_cli, clips_cli),
        *(multimodal_cli, text_cli, multitask_cli, adapters_cli),
    ):
        commands.add_systems(systems)

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


def add_common_options(parser, *, output, epochs, batch_size, lr, weight_decay):
    """The options of a training, numbers with their defaults."""
    add_run_options(parser, output)
    add = parser.add_argument
    if epochs is not None:
        add("--epochs", type=positive, default=epochs, help=f"default {epochs}")
    add("--batch-size", type=positive, default=batch_size, help=f"default {batch_size}")
    add("--lr", type=positive_float, default=lr, help=f"highest learning rate (default {lr})")
    add("--weight-decay", type=non_negative_float, default=weight_decay, help=f"default {weight_decay}")


def add_run_options(parser, output):
    """The options of every training: where, and how it is run."""
    add = parser.add_argument
    add("--output", type=Path, default=Path(output), metavar="DIR", help=f"default {output}")
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
    from . import autoencode_cli, byte_text_cli, flow_cli, perceiver_cli, points_cli

    own = {"tokens": byte_text_cli, "flow": flow_cli, "multimodal": autoencode_cli, "classes of points": points_cli}
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
