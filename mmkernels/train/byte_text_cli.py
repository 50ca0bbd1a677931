"""`train perceiver-mlm`, `train perceiver-mlm-demo` and `predict --text` for their models; nothing heavy is imported early."""

from pathlib import Path

from . import cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the trainings of masked bytes to the systems of `train`."""
    text = systems.add_parser("perceiver-mlm", help="Perceiver IO on text as bytes, whole words masked")
    add = text.add_argument
    what = "UTF-8: a file, or a folder with .txt files; can be repeated"
    add("--text", type=Path, action="append", required=True, metavar="PATH", help=what)
    what = "share of each --text in the batches, such as 70,30 (default: all of their blocks equally often)"
    add("--weights", type=_weights, metavar="A,B", help=what)
    add("--val-text", type=Path, action="append", metavar="PATH", help="held out; default: a share of every --text")
    add("--val-fraction", type=cli.fraction, default=0.05, help="share of a --text, its end (default 0.05)")
    perceiver_cli.add_options(text, "perceiver-io-mlm", output="runs/perceiver-mlm")
    text.set_defaults(run=perceiver_cli.running(_train))
    demo = systems.add_parser("perceiver-mlm-demo", help="the same, small, on docstrings of Python and torch")
    changes = {"steps": 16_000, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 200, "optimizer": "adamw"}
    changes |= {"config": "perceiver-io-language-demo", "clip_norm": 1.0, "beta2": 0.99}
    perceiver_cli.add_options(demo, "perceiver-io-mlm", output="runs/perceiver-mlm-demo", **changes)
    demo.add_argument("--held-out", type=cli.positive, default=500, help="blocks, at most (default 500)")
    demo.set_defaults(run=perceiver_cli.running(_demo))


def _weights(text):
    return [cli.positive_float(part) for part in text.split(",")]


def _train(arguments):
    from ..models import InputError
    from . import byte_text, masked_lm

    config = perceiver_cli.config_of(arguments, "tokens")
    length, shares = config.input["max_length"], arguments.weights
    if shares is not None and len(shares) != len(arguments.text):
        raise InputError(f"--weights has {len(shares)} numbers; it must have one for each --text, {len(arguments.text)}")

    def blocks(path):
        files = masked_lm.files_of(path)
        return masked_lm.TextBlocks(files, byte_text.encode_line, length, byte_text.MASKING, seed=arguments.seed)

    texts = [blocks(path) for path in arguments.text]
    if arguments.val_text:
        held_out = [blocks(path) for path in arguments.val_text]
    else:
        texts, held_out = zip(*(text.split(arguments.val_fraction) for text in texts), strict=True)
    join = masked_lm.TextBlocks.joined
    return _fit(arguments, config, join(texts), join(held_out), shares)


def _demo(arguments):
    from . import byte_text, masked_lm
    from .data import python_text

    config = perceiver_cli.config_of(arguments, "tokens")
    training, held_out = (
        masked_lm.TextBlocks([path], byte_text.encode_line, config.input["max_length"], byte_text.MASKING, seed=arguments.seed)
        for path in python_text.write_text(arguments.output / "text")
    )
    held_out.blocks = held_out.blocks[: arguments.held_out]
    return _fit(arguments, config, training, held_out)


def _fit(arguments, config, training, held_out, shares=None):
    from ..models import InputError
    from . import byte_text, masked_lm

    if config.input["vocab_size"] != byte_text.SIZE:
        raise InputError(f"--config has vocab_size {config.input['vocab_size']}; text as bytes needs {byte_text.SIZE}")
    length = config.input["max_length"]
    print(f"{len(training)} blocks of {length} bytes to train on, {len(held_out)} held out")
    baselines = byte_text.context_free(training, held_out)
    rows = {}

    def save(model, history):
        rows.update(byte_text.save_result(arguments.output, model, held_out, baselines, history))

    task = masked_lm.make_task(training, held_out, shares=shares, batch_size=arguments.batch_size)

    def told(_):
        return f"\n{byte_text.table(rows)}\n\n{byte_text.examples(arguments.output)}\n"

    return perceiver_cli.train(arguments, config, task, save, told, byte_text.EXAMPLES)


def predict(arguments) -> int:
    """Prints each --text with its blanks filled in."""
    from ..models import InputError
    from . import byte_text

    if arguments.images or arguments.input or not arguments.text:
        raise InputError("this model fills in text: give --text with [MASK] for a byte, [MASK:5] for five")
    options = {"device": cli.device_of(arguments), "backend": arguments.backend}
    for line in byte_text.predict(arguments.checkpoint, arguments.text, **options):
        print("".join(letter if letter.isprintable() else " " for letter in line))
    return 0
