"""`train ca-mtl`; nothing heavy is imported until the command runs."""

import argparse
from pathlib import Path

from . import cli


def add_systems(systems) -> None:
    """Adds the training of CA-MTL to the systems of `train`."""
    parser = systems.add_parser("ca-mtl", help="CA-MTL on the tasks of GLUE, together")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="a folder per task, as GLUE is distributed, or of `datasets`")
    add("--tasks", metavar="A,B", help="default: all of GLUE but WNLI that --data has")
    add("--config", default="ca-mtl-base", metavar="NAME", help="sizes by name, or a JSON file (default ca-mtl-base)")
    add("--init", type=Path, metavar="DIR", help="begin with a BERT of Hugging Face; its sizes are then the model's")
    add("--tokenizer", type=Path, metavar="FILE", help="vocab.txt or tokenizer.json; default: --init's, or a new one")
    cli.add_common_options(parser, output="runs/ca-mtl", epochs=5, batch_size=32, lr=2e-5, weight_decay=0.0)
    add("--sampling", choices=["size", "uncertainty"], default="size", help="of the tasks (default size)")
    add("--share", type=cli.positive_float, default=1.0, help="of an epoch of --sampling uncertainty (default 1)")
    add("--freeze", type=_layers, metavar="A-B", help="layers whose BERT is not trained, with the embeddings; released: 0-4")
    add("--max-length", type=cli.positive, help="tokens of a pair; a divisor of the hidden size (default: the config's)")
    add("--warmup", type=cli.fraction_or_zero, default=0.1, help="share of the steps with a rising rate (default 0.1)")
    add("--evaluate-every", type=cli.positive, metavar="STEPS", help="default: an epoch")
    add("--dev-limit", type=cli.positive, metavar="N", help="evaluate on so many examples of a task (default all)")
    add("--dropout", type=cli.fraction_or_zero, help="default: the config's")
    add("--bfloat16", action="store_true", help="autocast")
    parser.set_defaults(run=lambda arguments: cli.guarded(_train, arguments))


def _layers(text):
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers, such as 0-4")
    return int(first), int(last)


def _train(arguments):
    from ..models import InputError
    from . import loop, multitask, text
    from .data.pairs import load_tasks

    names = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    tasks = load_tasks(arguments.data, names)
    tokens, model, origin = _build(arguments, tasks)
    if arguments.freeze is not None:
        try:
            model.freeze(*arguments.freeze)
        except ValueError as error:
            raise InputError(f"--freeze: {error}") from error
    task, per_epoch = multitask.make_task(
        tasks,
        tokens,
        length=model.config.max_seq_length,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        sampling=arguments.sampling,
        share=arguments.share,
        dev_limit=arguments.dev_limit,
    )
    task.fingerprint += f"{origin}{'' if arguments.freeze is None else f' without {arguments.freeze}'}"
    steps = arguments.epochs * per_epoch
    settings = loop.Settings(
        epochs=None,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=round(arguments.warmup * steps),
        seed=arguments.seed,
        schedule="linear",
        steps=steps,
        evaluate_every=arguments.evaluate_every or per_epoch,
        bfloat16=arguments.bfloat16,
        beta2=0.999,
    )
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) for trained in (False, True)]
    print(f"{counts[0]:,} parameters, {counts[1]:,} of them trained, {tokens.size} tokens in the vocabulary, {steps} steps")
    with cli.resumable(arguments, arguments.output):
        history = loop.fit(
            model,
            task,
            settings,
            arguments.output,
            device=next(model.parameters()).device,
            save_every=arguments.save_every,
            workers=arguments.workers,
        )
        best = multitask.save_result(arguments.output, model, tokens, tasks, history)
    print(f"\nheld out, best of {len(history)} evaluations, at step {best['step']}\n{text.table(best)}")
    print(f"checkpoint {arguments.output}, learning curve {arguments.output / 'learning-curve.png'}")
    return 0


def _build(arguments, tasks):
    """(tokenizer, model, what its weights began with) of the options; says what there is to train on."""
    import dataclasses

    import torch

    from ..models import InputError, ca_mtl, official
    from . import checkpoint, tokenizer
    from .data.pairs import classes_of

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for task in tasks.values():
        left_out = f", {task.left_out} rows that are cut off left out" if task.left_out else ""
        print(f"{task.name}: {len(task.training)} examples to train on, {len(task.dev)} held out{left_out}")
    device = cli.device_of(arguments)
    config = _config(arguments)
    changes = {"tasks": tuple(tasks), "num_labels": tuple(len(classes_of(name)) or 1 for name in tasks)}
    changes["max_seq_length"] = arguments.max_length or config.max_seq_length
    dropouts = {}
    if arguments.dropout is not None:
        dropouts = {"hidden_dropout_prob": arguments.dropout, "attention_probs_dropout_prob": arguments.dropout}
    path = arguments.tokenizer or arguments.init
    if path is not None:
        tokens = tokenizer.load_bert(path)
    else:
        examples = (example for task in tasks.values() for example in task.training)
        tokens = tokenizer.train_bert((t for e in examples for t in (e.first, e.second) if t is not None), config.vocab_size)
    torch.manual_seed(arguments.seed)
    try:
        if arguments.init is None:
            vocabulary = {"vocab_size": tokens.size, "pad_token_id": tokens.pad_id, "backend": arguments.backend}
            config = dataclasses.replace(config, **changes, **dropouts, **vocabulary)
            return tokens, ca_mtl.CAMTL(config, device=device), ""
        fields, state = official.read_huggingface(arguments.init)
        options = {"variant": config.variant, "backend": arguments.backend}
        model = ca_mtl.from_bert({**fields, **dropouts}, state, **options, **changes)
    except ValueError as error:
        raise InputError(f"{arguments.init or arguments.config}: {error}") from error
    if tokens.size > model.config.vocab_size or tokens.pad_id != model.config.pad_token_id:
        raise InputError(
            f"{path} has {tokens.size} tokens and the padding {tokens.pad_id}; the model of {arguments.init} has "
            f"{model.config.vocab_size} and {model.config.pad_token_id}"
        )
    return tokens, model.float().to(device), f" from {checkpoint.digest(state)}"


def _config(arguments):
    """The CAMTLConfig of --config; with --init its variant and length are all that is read."""
    from ..models import ca_mtl, registry

    return registry.config_of("--config", ca_mtl, arguments.config)
