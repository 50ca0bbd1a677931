"""`train hypergrid-t5`, `train hypergrid-t5-demo` and `predict --text`; nothing heavy is imported until a command runs."""

import argparse
from pathlib import Path

from . import cli

MIXINGS = ("proportional", "temperature", "equal")


def add_systems(systems) -> None:
    """Adds the trainings of HyperGrid-T5 to the systems of `train`."""
    text = systems.add_parser("hypergrid-t5", help="HyperGrid-T5 on GLUE, SuperGLUE and tasks of your own, together")
    add = text.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="a folder per task: GLUE's, SuperGLUE's, `datasets`', yours")
    add("--tasks", metavar="A,B", help="default: all of T5's mixture and of your own that --data has")
    add("--config", default="hypergrid-t5-small", metavar="NAME", help="sizes by name, or a JSON file (default ...-small)")
    add("--init", type=Path, metavar="DIR", help="begin with a T5 of Hugging Face; its config is then the model's")
    add("--tokenizer", type=Path, metavar="FILE", help="spiece.model or tokenizer.json; default: --init's, or a new one")
    _add_options(text, output="runs/hypergrid-t5", steps=100_000, batch_size=128, lr=1e-3, evaluate_every=1000)
    add("--mixing", choices=MIXINGS, default="proportional", help="of the tasks, by their sizes n: rates ~ min(n, limit)")
    add("--limit", type=cli.positive, default=2**19, help="on the size of a task (default 524288)")
    add("--temperature", type=cli.positive_float, default=2.0, help="rates ~ min(n, limit) ** (1 / T) (default 2)")
    add("--max-input", type=cli.positive, default=512, help="tokens (default 512)")
    add("--max-target", type=cli.positive, default=62, help="tokens (default 62)")
    add("--dev-limit", type=cli.positive, metavar="N", help="evaluate on so many examples of a task (default all)")
    text.set_defaults(run=lambda arguments: cli.guarded(_train, arguments))

    demo = systems.add_parser("hypergrid-t5-demo", help="five tasks of text that comes with Python, with and without grids")
    _add_options(demo, output="runs/hypergrid-t5-demo", steps=4000, batch_size=32, lr=5e-3, evaluate_every=500)
    demo.add_argument("--single-tasks", action="store_true", help="a model for each task as well, with its share of the steps")
    demo.add_argument("--examples", type=cli.positive, default=30_000, help="of a task, at most (default 30000)")
    demo.add_argument("--held-out", type=cli.positive, default=1000, help="of a task, at most (default 1000)")
    demo.set_defaults(
        run=lambda arguments: cli.guarded(_demo, arguments),
        **{"config": "hypergrid-t5-tiny", "init": None, "tokenizer": None, "vocab_size": 4096},
        **{"schedule": "cosine", "warmup": 200, "dropout": 0.0, "save_every": 250},
    )


def _add_options(parser, *, output, steps, batch_size, lr, evaluate_every):
    cli.add_common_options(parser, output=output, epochs=None, batch_size=batch_size, lr=lr, weight_decay=0.0)
    add = parser.add_argument
    add("--steps", type=cli.positive, default=steps, help=f"default {steps}")
    add("--evaluate-every", type=cli.positive, default=evaluate_every, metavar="STEPS", help=f"default {evaluate_every}")
    add("--optimizer", choices=["adafactor", "adamw", "sgd"], default="adafactor", help="default adafactor, as T5's")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate (default constant)")
    add("--warmup", type=cli.non_negative, default=0, metavar="STEPS", help="with a rising learning rate (default 0)")
    add("--micro-batches", type=cli.positive, default=1, help="that a batch is cut into to need less memory (default 1)")
    add("--bfloat16", action="store_true", help="autocast")
    add("--vocab-size", type=cli.positive, help="of a tokenizer that is trained (default: the config's)")
    add("--dropout", type=cli.fraction_or_zero, help="default: the config's")
    add("--grid", metavar="R,C", help="blocks over d_ff and d_model (default: the config's, or 32,32 with --init)")
    add("--variant", choices=["L2", "LG", "GL", "GG", "row", "column", "none"], help="of the grids; none: a plain T5")


def _train(arguments):
    from . import text
    from .data.text import load_tasks

    names = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    tasks = load_tasks(arguments.data, names)
    tokens, model, origin = _build(arguments, tasks)
    mixing = {"mixing": arguments.mixing, "limit": arguments.limit, "temperature": arguments.temperature}
    lengths = {"max_input": arguments.max_input, "max_target": arguments.max_target}
    options = {"origin": origin, "dev_limit": arguments.dev_limit, **mixing}
    best, history, _ = _fit(arguments, tasks, tokens, model, arguments.output, lengths, **options)
    print(f"\nheld out, best of {len(history)} evaluations, at step {best['step']}\n{text.table(best)}")
    print(f"checkpoint {arguments.output}, learning curve {arguments.output / 'learning-curve.png'}")
    return 0


def _demo(arguments):
    import dataclasses
    import json

    import torch

    from ..models.hypergrid_t5 import HyperGridT5
    from ..models.registry import write_atomically
    from . import text
    from .data import python_text
    from .data.text import load_tasks

    folder = arguments.output / "data"
    python_text.write(folder, most=arguments.examples, held_out=arguments.held_out)
    tasks = load_tasks(folder)
    tokens, model, _ = _build(arguments, tasks)
    gated = model.config
    plain = dataclasses.replace(gated, grid=None)
    lengths = {"max_input": 64, "max_target": 8}

    def trained(name, config, tasks, steps):
        torch.manual_seed(arguments.seed)
        changed = argparse.Namespace(**{**vars(arguments), "steps": steps})
        model = HyperGridT5(config, device=cli.device_of(arguments))
        return _fit(changed, tasks, tokens, model, arguments.output / name, lengths, mixing="temperature")

    rows, curves = {"majority": text.means(text.majority(tasks))}, {}
    if arguments.single_tasks:
        steps = max(arguments.steps // len(tasks), 1)
        single = {name: trained(f"single-{name}", plain, {name: task}, steps)[0] for name, task in tasks.items()}
        rows["a model a task"] = text.means({name: text.metrics_of(row, name) for name, row in single.items()})
    for name, config in (("together", plain), ("together, with grids", gated)):
        best, curves[name], _ = trained("grids" if config.grid else "plain", config, tasks, arguments.steps)
        rows[name] = text.means({task: text.metrics_of(best, task) for task in tasks})
    print(f"\n{text.comparison_table(rows)}")
    write_atomically(arguments.output / "comparison.json", json.dumps(rows, indent=1).encode())
    write_atomically(arguments.output / "comparison.png", text.comparison_picture(rows, curves))
    print(f"checkpoints, data, comparison.json and comparison.png in {arguments.output}")
    return 0


def _fit(arguments, tasks, tokens, model, folder, lengths, *, origin="", **options):
    """(best row, history, seconds); trains in `folder`, or goes on there. `origin` says what the weights began with."""
    import time

    from . import loop, text

    started = time.perf_counter()
    task = text.make_task(tasks, tokens, batch_size=arguments.batch_size, seed=arguments.seed, **lengths, **options)
    task.fingerprint += origin
    settings = loop.Settings(
        epochs=None,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup,
        clip_norm=None if arguments.optimizer == "adafactor" else 1.0,  # Adafactor clips its updates
        seed=arguments.seed,
        optimizer=arguments.optimizer,
        schedule=arguments.schedule,
        steps=arguments.steps,
        evaluate_every=arguments.evaluate_every,
        micro_batches=arguments.micro_batches,
        bfloat16=arguments.bfloat16,
    )
    parameters = sum(p.numel() for p in model.parameters())
    grid = f"grids of {model.config.grid}, {model.config.variant}" if model.config.grid else "no grids"
    print(f"{parameters:,} parameters, {grid}, {tokens.size} tokens in the vocabulary")
    with cli.resumable(arguments, folder):
        history = loop.fit(
            model,
            task,
            settings,
            folder,
            device=next(model.parameters()).device,
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        best = text.save_result(folder, model, tokens, tasks, history, **lengths)
    return best, history, time.perf_counter() - started


def _build(arguments, tasks):
    """(tokenizer, model, what its weights began with) of the options; says what there is to train on."""
    import dataclasses

    import torch

    from ..models import InputError, hypergrid_t5, official
    from . import checkpoint, tokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for task in tasks.values():
        left_out = f", {task.left_out} rows that are cut off left out" if task.left_out else ""
        print(f"{task.name}: {len(task.training)} examples to train on, {len(task.dev)} held out{left_out}")
    device = cli.device_of(arguments)
    config = grid_config(arguments, _config(arguments))
    if arguments.vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=arguments.vocab_size)
    path = arguments.tokenizer or arguments.init
    if path is not None:
        tokens = tokenizer.load(path)
    else:
        texts = (text for task in tasks.values() for example in task.training for text in (example.input, example.target))
        tokens = tokenizer.train(texts, config.vocab_size)
    torch.manual_seed(arguments.seed)
    if arguments.init is None:
        ids = {"pad_token_id": tokens.pad_id, "eos_token_id": tokens.eos_id, "decoder_start_token_id": tokens.pad_id}
        config = dataclasses.replace(config, vocab_size=tokenizer.rounded(tokens.size), **ids)
        return tokens, hypergrid_t5.HyperGridT5(config, device=device), ""
    fields, state = official.read_huggingface(arguments.init)
    if arguments.dropout is not None:
        fields = {**fields, "dropout_rate": arguments.dropout}
    grids = {"grid": config.grid, "variant": config.variant, "residual": config.residual, "backend": config.backend}
    try:
        model = hypergrid_t5.from_official(fields, state, **grids).float().to(device)
    except ValueError as error:
        raise InputError(f"{arguments.init}: {error}") from error
    known = model.config
    if tokens.size > known.vocab_size or (tokens.pad_id, tokens.eos_id) != (known.pad_token_id, known.eos_token_id):
        raise InputError(
            f"{path} has {tokens.size} tokens, padding {tokens.pad_id} and end {tokens.eos_id}; the model of {arguments.init} "
            f"has {known.vocab_size}, {known.pad_token_id} and {known.eos_token_id}"
        )
    return tokens, model, f" from {checkpoint.digest(state)}"


def _config(arguments):
    """The HyperGridT5Config of --config; that of --init has other sizes, and its grids are the only thing that is read."""
    from ..models import hypergrid_t5, registry

    return registry.config_of("--config", hypergrid_t5, arguments.config)


def grid_config(arguments, config):
    """`config` with --grid, --variant, --dropout and --backend."""
    import dataclasses

    from ..models import InputError, hypergrid_t5

    changes = {"backend": arguments.backend}
    if arguments.grid is not None:
        try:
            changes["grid"] = tuple(int(part) for part in arguments.grid.split(","))
        except ValueError as error:
            raise InputError(f"--grid is {arguments.grid!r}; it must be two numbers, such as 32,32") from error
    if arguments.variant == "none":
        changes["grid"] = None
    elif arguments.variant is not None:
        changes["variant"] = arguments.variant
    if arguments.dropout is not None:
        changes["dropout_rate"] = arguments.dropout
    try:
        config = dataclasses.replace(config, **changes)
        if arguments.init is None:
            hypergrid_t5.HyperGridT5(config, device="meta")  # grids that do not fit are said before the data are read
        return config
    except (TypeError, ValueError) as error:
        raise InputError(f"--grid, --variant or --dropout do not fit the model: {error}") from error


def predict(arguments) -> int:
    """Prints what is generated, or found, for each --text, a line each."""
    from ..models import InputError
    from ..models.registry import read_json
    from . import multitask, text
    from .classification import TASK

    if arguments.images or arguments.input:
        raise InputError("--text stands beside images or --input; give one of them")
    options = {"device": cli.device_of(arguments), "backend": arguments.backend}
    path = Path(arguments.checkpoint) / TASK
    if path.is_file() and read_json(path).get("kind") == "multitask":
        lines = multitask.predict(arguments.checkpoint, arguments.task, arguments.text, **options)
    elif arguments.task is not None:
        raise InputError(f"--task is for a model of several tasks; {arguments.checkpoint} holds none")
    else:
        lines = text.predict(arguments.checkpoint, arguments.text, **options)
    for line in lines:
        print(" ".join(line.split()))
    return 0
