"""`train adapters-demo`, `train mad-x` and `train mad-x-demo`; nothing heavy is imported until a command runs."""

import argparse
from pathlib import Path

from . import cli

HEAD, ADAPTER, FUSION, FULL = "head only", "adapter", "fusion", "full fine-tuning"
COMMONEST, TASK = "commonest answer", "task"


def add_systems(systems) -> None:
    """Adds the trainings of adapters to the systems of `train`."""
    demo = systems.add_parser("adapters-demo", help="adapters and their fusion for five tasks of text that comes with Python")
    _add_options(demo, output="runs/adapters-demo", steps=500, lr=5e-3)
    add = demo.add_argument
    add("--tasks", metavar="A,B", help="of cloze, kind, spell, topic, verb (default all)")
    add("--adapter", default="double_seq_bn", metavar="PRESET", help="of the adapters (default double_seq_bn)")
    add("--reduction", type=cli.positive, default=2, help="channels over bottleneck (default 2)")
    add("--fusion-lr", type=cli.positive_float, default=2e-3, help="of AdapterFusion (default 2e-3)")
    add("--full-lr", type=cli.positive_float, default=1e-3, help="of full fine-tuning (default 1e-3)")
    add("--examples", type=cli.positive, default=30_000, help="of a task, at most (default 30000)")
    add("--held-out", type=cli.positive, default=500, help="of a task, at most (default 500)")
    add("--serving-batch", type=cli.positive, default=32, help="requests of a batch that is served (default 32)")
    add("--rounds", type=cli.positive, default=5, help="of the requests that are served and timed (default 5)")
    demo.set_defaults(run=lambda arguments: cli.guarded(_demo, arguments))

    mad_x = systems.add_parser("mad-x", help="MAD-X: adapters of languages, a task in one of them, answers in the others")
    _add_options(mad_x, output="runs/mad-x", steps=1000, lr=1e-3)
    add = mad_x.add_argument
    add(
        "--text",
        type=_named,
        action="append",
        required=True,
        metavar="LANG=FILE",
        help="text of a language, once or more each",
    )
    add("--source", metavar="LANG", help="the language of --train (default: the first of --text)")
    add("--train", type=Path, required=True, metavar="FILE", help="the task: .tsv or .jsonl with input and target")
    add("--dev", type=_named, action="append", required=True, metavar="LANG=FILE", help="held out, for each language")
    _add_mad_x_options(mad_x)
    mad_x.set_defaults(run=lambda arguments: cli.guarded(_mad_x, arguments))

    messages = systems.add_parser("mad-x-demo", help="MAD-X on the messages of this system's programs and their translations")
    _add_options(messages, output="runs/mad-x-demo", steps=1000, lr=1e-3)
    messages.add_argument("--target", default="de", metavar="LANG", help="a language of /usr/share/locale (default de)")
    messages.add_argument("--catalogues", type=Path, default=Path("/usr/share/locale"), metavar="DIR", help="of gettext")
    _add_mad_x_options(messages)
    messages.set_defaults(run=lambda arguments: cli.guarded(_mad_x_demo, arguments))


def _add_mad_x_options(parser):
    add = parser.add_argument
    add("--language-steps", type=cli.positive, default=1000, metavar="STEPS", help="of each language's adapter (default 1000)")
    add("--language-lr", type=cli.positive_float, default=1e-3, help="of each language's adapter (default 1e-3)")
    add("--language-reduction", type=cli.positive, default=2, help="channels over bottleneck (default 2)")
    add("--reduction", type=cli.positive, default=16, help="the same of the task's adapter (default 16)")


def _named(argument):
    name, separator, path = argument.partition("=")
    if not separator or not path or not name.replace("-", "_").isidentifier():
        raise argparse.ArgumentTypeError(f"{argument!r} is not LANG=FILE, LANG being letters and digits")
    return name, Path(path)


def _add_options(parser, *, output, steps, lr):
    cli.add_common_options(parser, output=output, epochs=None, batch_size=16, lr=lr, weight_decay=0.01)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a masked language model of Hugging Face; default: a small new one")
    add("--steps", type=cli.positive, default=steps, help=f"of each adapter (default {steps})")
    add("--pretraining-steps", type=cli.positive, default=4000, metavar="STEPS", help="of a new model (default 4000)")
    add("--pretraining-lr", type=cli.positive_float, default=1e-3, help="of a new model (default 1e-3)")
    add("--hidden-size", type=cli.positive, default=128, help="of a new model (default 128)")
    add("--layers", type=cli.positive, default=2, help="of a new model (default 2)")
    add("--vocab-size", type=cli.positive, default=4096, help="of a new model (default 4096)")
    add("--max-length", type=cli.positive, default=48, help="tokens of a text (default 48)")


def _begin(arguments):
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def _backbone(arguments, files):
    """(folder, tokenizer) of --model, or of a new one that is trained on text files in --output."""
    import torch

    from ..models import InputError
    from . import adapters, masked_lm, tokenizer

    device = cli.device_of(arguments)
    if arguments.model is not None:
        most = getattr(adapters.load(arguments.model).config, "max_position_embeddings", arguments.max_length)
        if arguments.max_length > most:
            raise InputError(f"--max-length is {arguments.max_length}; the model of {arguments.model} has {most} positions")
        return arguments.model, tokenizer.Pretrained(arguments.model)
    folder = arguments.output / "backbone"
    torch.manual_seed(arguments.seed)
    sizes = {"vocab_size": arguments.vocab_size, "hidden_size": arguments.hidden_size, "layers": arguments.layers}
    with cli.resumable(arguments, folder):
        model, tokens = adapters.new_backbone(masked_lm.lines_of(files), folder, length=arguments.max_length, **sizes)
        blocks = adapters.blocks_of(files, tokens, arguments.max_length, seed=arguments.seed)
        arguments.resume = False  # what follows may not have begun
        task, lr, steps = masked_lm.make_task(*blocks), arguments.pretraining_lr, arguments.pretraining_steps
        print(f"a new model, {sum(p.numel() for p in model.parameters()):,} parameters, {len(blocks[0])} blocks of text")
        history, _ = _fit(arguments, model.to(device), task, folder, lr, steps)
        model.save_pretrained(folder)
    print(f"new model: {history[-1]['accuracy']:.1%} of the held-out text's masked tokens are guessed")
    return folder, tokens


def _fit(arguments, model, task, folder, lr, steps):
    """(history, seconds); raises RuntimeError where a frozen parameter has changed."""
    import time

    from . import checkpoint, loop

    settings = loop.Settings(
        epochs=None,
        batch_size=arguments.batch_size,
        learning_rate=lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=steps // 10,
        seed=arguments.seed,
        schedule="linear",
        steps=steps,
        evaluate_every=max(steps // 4, 1),
        beta2=0.999,
    )
    options = {"device": cli.device_of(arguments), "save_every": arguments.save_every, "workers": arguments.workers}
    frozen, began = checkpoint.digest(checkpoint.frozen_parameters(model)), time.perf_counter()
    history = loop.fit(model, task, settings, folder, **options)
    seconds = time.perf_counter() - began
    if checkpoint.digest(checkpoint.frozen_parameters(model)) != frozen:
        raise RuntimeError(f"{folder}: parameters that are frozen have changed")
    return history, seconds


def _batches(held_out, arguments, device):
    """All of a data set in order, on the device."""
    from . import loop
    from .data import batches, loader

    for batch in loader(held_out, batches(len(held_out), arguments.batch_size, None, None), arguments.workers):
        yield loop.to_device(batch, device)


def _trained(arguments, what, hub, task, folder, save, lr, steps):
    """(history, seconds, number of parameters trained) of what requires a gradient; `save` writes it into the folder."""
    from . import adapters

    count = adapters.trained_parameters(hub.model)
    with cli.resumable(arguments, folder):
        arguments.resume = False  # what follows may not have begun
        print(f"{what}: {count:,} of {sum(p.numel() for p in hub.model.parameters()):,} parameters trained")
        history, seconds = _fit(arguments, hub.model, task, folder, lr, steps)
        save(folder)
    return history, seconds, count


def _demo(arguments):
    import json

    import torch

    from ..models import InputError
    from ..models.adapterhub import AdapterHub
    from ..models.registry import write_atomically
    from ..modules.composition import Fuse
    from . import adapters, text
    from .data import python_text
    from .data.text import TextTask, read_file

    _begin(arguments)
    output, device = arguments.output, cli.device_of(arguments)
    data = output / "data"
    known = python_text.write(data, arguments.seed, most=arguments.examples, held_out=arguments.held_out)
    names = list(known) if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--tasks has {unknown[0]!r}; allowed are {', '.join(known)}")
    tasks = {
        name: TextTask(name, read_file(data / name / "train.jsonl"), read_file(data / name / "dev.jsonl")) for name in names
    }
    for task in tasks.values():
        print(f"{task.name}: {len(task.training)} examples to train on, {len(task.dev)} held out")
    backbone, tokens = _backbone(arguments, [data / python_text.SENTENCES])
    classes = {name: adapters.classes_of(task.training + task.dev) for name, task in tasks.items()}
    splits = {
        name: [adapters.pairs_of(part, classes[name], tokens, arguments.max_length) for part in (task.training, task.dev)]
        for name, task in tasks.items()
    }
    learning_rates = {HEAD: arguments.lr, ADAPTER: arguments.lr, FUSION: arguments.fusion_lr, FULL: arguments.full_lr}
    fuse = Fuse(*tasks)

    def prepared(method, name):
        """A hub in which what the method trains requires a gradient, and a function that saves it in a folder."""
        torch.manual_seed(arguments.seed)
        hub = AdapterHub(adapters.load(backbone, device=device), backend=arguments.backend)
        if method == FUSION:
            for other in tasks:
                hub.load_adapter(output / ADAPTER / other, with_head=False)
            hub.add_adapter_fusion(list(tasks))
        if method == ADAPTER:
            hub.add_adapter(name, arguments.adapter, reduction_factor=arguments.reduction)
        hub.add_head(name, num_labels=len(classes[name]))
        if method == FUSION:
            hub.train_adapter_fusion(fuse)
            return hub, lambda folder: (hub.save_adapter_fusion(fuse.name, folder), hub.save_head(folder, name))
        if method == ADAPTER:
            hub.train_adapter(name)
            return hub, lambda folder: hub.save_adapter(name, folder)
        hub.base.requires_grad_(method == FULL)
        hub.model.heads.requires_grad_(True)
        if method == HEAD:
            return hub, lambda folder: hub.save_head(folder, name)
        return hub, lambda folder: (hub.model.save_pretrained(folder), hub.save_head(folder, name))

    rows = {COMMONEST: {name: values["accuracy"] for name, values in text.majority(tasks).items()}}
    curves, parameters, seconds, attention = {}, {}, {}, {}
    for method, lr in learning_rates.items():
        histories, counts = {}, []
        seconds[method] = 0.0
        for name, (training, held_out) in splits.items():
            hub, save = prepared(method, name)
            task = adapters.make_task(hub, name, training, held_out)
            folder = output / method.replace(" ", "-") / name
            found = _trained(arguments, f"{method}, {name}", hub, task, folder, save, lr, arguments.steps)
            histories[name], passed, count = found
            seconds[method] += passed
            counts.append(count)
            if method == FUSION:
                attention[name] = adapters.fusion_attention(hub, fuse.name, _batches(held_out, arguments, device))
        rows[method] = {name: history[-1]["accuracy"] for name, history in histories.items()}
        curves[method] = adapters.average_history(list(histories.values()))
        parameters[method] = round(sum(counts) / len(counts))
    for row in rows.values():
        row[text.AVERAGE] = sum(row.values()) / len(row)

    hub = AdapterHub(adapters.load(backbone, device=device), backend=arguments.backend)
    for name in tasks:
        hub.load_adapter(output / ADAPTER / name)
    hub.model.eval()
    served_batch, seed = arguments.serving_batch, arguments.seed
    requests = adapters.Requests(hub, {name: parts[1] for name, parts in splits.items()}, served_batch, seed, device)
    difference, served = requests.check()
    rates = requests.rates(arguments.rounds)
    notes = {m: f"{count:>9,} parameters trained a task, {seconds[m]:.0f} s" for m, count in parameters.items()}
    print(f"\n{text.comparison_table(rows, notes)}")
    print("backbone and adapters that were frozen are the same to the bit")
    print(f"\n{requests.size} requests of all tasks, batches of {served_batch}, adapters and heads read from folders")
    print(f"accuracy {', '.join(f'{name} {value:.1%}' for name, value in served.items())}")
    print(f"logits of a mixed batch are those of each task alone to {difference:.1e}; rows a second:")
    print("\n".join(f"{way:<28}{rate:>8.0f}" for way, rate in rates.items()))
    content = {"held out": rows, "parameters": parameters, "attention": attention, "served": served}
    write_atomically(output / "comparison.json", json.dumps(content, indent=1).encode())
    write_atomically(output / "serving.json", json.dumps({"rows": requests.size, "rows_per_second": rates}, indent=1).encode())
    write_atomically(output / "comparison.png", text.comparison_picture(rows, curves))
    write_atomically(output / "serving.png", adapters.serving_picture(attention, rates))
    print(f"adapters, fusions, comparison.json, comparison.png and serving.png in {output}")
    return 0


def _mad_x(arguments):
    from ..models import InputError
    from ..models.adapterhub.hub import check_name
    from .data.text import TextTask, read_file

    texts = {}
    for language, path in arguments.text:
        try:
            check_name(language)
        except ValueError as error:
            raise InputError(f"--text has the language {language!r}, but it names an adapter: {error}") from error
        texts.setdefault(language, []).append(path)
    source = arguments.source or next(iter(texts))
    dev = dict(arguments.dev)
    if len(texts) < 2:
        raise InputError(f"--text has {', '.join(texts)} alone; it must have two languages or more")
    if TASK in texts:
        raise InputError(f"--text has the language {TASK!r}, which is the name of the task's adapter")
    if source not in texts:
        raise InputError(f"--source is {source!r}; allowed are the languages of --text: {', '.join(texts)}")
    if len(dev) < len(arguments.dev) or set(dev) != set(texts):
        named = ", ".join(language for language, _ in arguments.dev)
        raise InputError(f"--dev has {named}; it must have each language of --text once: {', '.join(texts)}")
    training = read_file(arguments.train)
    tasks = {language: TextTask(language, training, read_file(dev[language])) for language in texts}
    return _transfer(arguments, texts, source, tasks)


def _mad_x_demo(arguments):
    from .data import catalogues
    from .data.text import TextTask, read_file

    folder = arguments.output / "data"
    sizes = catalogues.write(folder, arguments.catalogues, arguments.target, arguments.seed)
    print(f"{sizes['text']} messages of programs in English and in {arguments.target!r}")
    languages = (catalogues.SOURCE, arguments.target)
    training = read_file(folder / "train.jsonl")
    tasks = {name: TextTask(name, training, read_file(folder / f"dev-{name}.jsonl")) for name in languages}
    return _transfer(arguments, {name: [folder / f"{name}.txt"] for name in languages}, catalogues.SOURCE, tasks)


def _transfer(arguments, texts, source, tasks):
    """Trains and compares: {language: text files}, the language of the task, {language: TextTask} of one training split."""
    import json

    import torch

    from ..models.adapterhub import AdapterHub
    from ..models.registry import write_atomically
    from ..modules.composition import Stack
    from . import adapters, loop, masked_lm, text

    _begin(arguments)
    output, device = arguments.output, cli.device_of(arguments)
    training = tasks[source].training
    held = ", ".join(f"{len(task.dev)} in {name!r}" for name, task in tasks.items())
    print(f"{len(training)} examples in {source!r} to train on, held out {held}")
    backbone, tokens = _backbone(arguments, [file for files in texts.values() for file in files])

    guessed, histories = {}, {}
    for language, files in texts.items():
        blocks = adapters.blocks_of(files, tokens, arguments.max_length, seed=arguments.seed)
        torch.manual_seed(arguments.seed)
        hub = AdapterHub(adapters.load(backbone, device=device, language_model=True), backend=arguments.backend)
        task = masked_lm.make_task(*blocks)
        settings = loop.Settings(None, arguments.batch_size, arguments.language_lr)
        before = loop.evaluate(hub.model, task, settings, device)
        hub.add_adapter(language, "seq_bn_inv", reduction_factor=arguments.language_reduction)
        hub.train_adapter(language)

        def save(folder, hub=hub, language=language):
            hub.save_adapter(language, folder, with_head=False)

        options = (output / "languages" / language, save, arguments.language_lr, arguments.language_steps)
        history, _, _ = _trained(arguments, f"language {language}", hub, task, *options)
        guessed[language] = [before["accuracy"], history[-1]["accuracy"]]
        histories[language] = history

    classes = adapters.classes_of(training)
    length = arguments.max_length
    pairs = {name: adapters.pairs_of(task.dev, classes, tokens, length, f"--dev {name}") for name, task in tasks.items()}
    to_train = adapters.pairs_of(training, classes, tokens, length)
    rows = {COMMONEST: {name: values["accuracy"] for name, values in text.majority(tasks).items()}}
    for with_language in (False, True):
        torch.manual_seed(arguments.seed)
        hub = AdapterHub(adapters.load(backbone, device=device), backend=arguments.backend)
        for language in texts:
            hub.load_adapter(output / "languages" / language)
        hub.add_adapter(TASK, reduction_factor=arguments.reduction)
        hub.add_head(TASK, num_labels=len(classes))
        hub.train_adapter(TASK)
        if with_language:
            hub.set_active(Stack(source, TASK))
        task = adapters.make_task(hub, TASK, to_train, pairs[source])
        folder = output / (TASK if with_language else f"{TASK}-without-languages")
        what = f"{TASK}, stacked on {source}" if with_language else f"{TASK}, without adapters of languages"

        def save(folder, hub=hub):
            hub.save_adapter(TASK, folder)

        _trained(arguments, what, hub, task, folder, save, arguments.lr, arguments.steps)
        hub.model.eval()

        def measured(active, language, hub=hub):
            hub.set_active(active)
            return adapters.accuracy(hub, TASK, pairs[language], _batches(pairs[language], arguments, device))["accuracy"]

        if with_language:
            rows[f"{source}'s adapter for all"] = {name: measured(Stack(source, TASK), name) for name in texts}
            rows["each its own adapter"] = {name: measured(Stack(name, TASK), name) for name in texts}
        else:
            rows["task adapter alone"] = {name: measured(TASK, name) for name in texts}

    print(f"\n{text.comparison_table(rows)}")
    print("masked tokens of held-out text that are guessed, without and with the adapter of the language:")
    print("\n".join(f"{name:<22}{before:>10.1%}{after:>10.1%}" for name, (before, after) in guessed.items()))
    content = {"source": source, "held out": rows, "masked tokens": guessed}
    write_atomically(output / "comparison.json", json.dumps(content, indent=1).encode())
    curves = {name: [{**row, text.AVERAGE: row["accuracy"]} for row in history] for name, history in histories.items()}
    write_atomically(output / "comparison.png", text.comparison_picture(rows, curves, "masked tokens guessed (%)"))
    print(f"adapters, comparison.json and comparison.png in {output}")
    return 0
