"""`train perceiver-glue`; nothing heavy is imported until the command runs."""

from pathlib import Path

from . import cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the fine-tuning on GLUE to the systems of `train`."""
    parser = systems.add_parser("perceiver-glue", help="Perceiver IO on the tasks of GLUE as bytes, one or all")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="a folder per task, as GLUE is distributed, or of `datasets`")
    add("--tasks", metavar="A,B", help="one, or several with a query each; default: all of GLUE but WNLI that --data has")
    perceiver_cli.add_init(parser)
    perceiver_cli.add_options(parser, "perceiver-io-glue", output="runs/perceiver-glue")
    add("--dev-limit", type=cli.positive, metavar="N", help="evaluate on so many examples of a task (default all)")
    parser.set_defaults(run=perceiver_cli.running(_train))


def _train(arguments):
    import dataclasses

    from ..models import InputError
    from . import byte_text, multitask, text
    from .data.pairs import classes_of, load_tasks

    config = perceiver_cli.config_of(arguments, "tasks")
    if config.input.get("vocab_size") != byte_text.SIZE:
        raise InputError(f"--config reads {config.input}; text as bytes needs tokens of a vocab_size of {byte_text.SIZE}")
    names = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    tasks = load_tasks(arguments.data, names)
    for task in tasks.values():
        left_out = f", {task.left_out} rows that are cut off left out" if task.left_out else ""
        print(f"{task.name}: {len(task.training)} examples to train on, {len(task.dev)} held out{left_out}")
    config = dataclasses.replace(
        config,
        queries={**config.queries, "count": len(tasks)},
        output={**config.output, "tasks": {name: len(classes_of(name)) or 1 for name in tasks}},
    )
    task, per_epoch = multitask.make_task(
        tasks,
        byte_text.PAIRS,
        length=config.input["max_length"],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        dev_limit=arguments.dev_limit,
        answer=multitask.perceiver_answer,
    )
    best = {}

    def save(model, history):
        best.update(multitask.save_result(arguments.output, model, byte_text.PAIRS, tasks, history))

    steps = arguments.steps or arguments.epochs * per_epoch
    length = {"epochs": None, "steps": steps, "evaluate_every": min(arguments.evaluate_every or per_epoch, steps)}
    start = perceiver_cli.started_from(arguments, task)
    _, history, seconds = perceiver_cli.fit(arguments, config, task, save, start=start, **length)
    print(f"\nheld out, best of {len(history)} evaluations, at step {best['step']}\n{text.table(best)}")
    print(f"checkpoint and learning-curve.png in {arguments.output}; {seconds:.0f} s")
    return 0
