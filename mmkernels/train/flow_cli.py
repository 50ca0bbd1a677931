"""`train perceiver-flow`, `train perceiver-flow-demo` and `predict` for their models; nothing heavy is imported early."""

from pathlib import Path

from . import cli, perceiver_cli


def add_systems(systems) -> None:
    """Adds the trainings of optical flow to the systems of `train`."""
    flow = systems.add_parser("perceiver-flow", help="Perceiver IO on pairs of frames: files with optical flow, or rendered")
    add = flow.add_argument
    add("--data", type=Path, metavar="DIR", help="pairs as Sintel, KITTI or FlyingChairs lay them out; default: rendered ones")
    add("--val-data", type=Path, metavar="DIR", help="held out; default: a share of --data, or rendered pairs")
    add("--val-fraction", type=cli.fraction, default=0.1, help="share of --data that is held out, by name (default 0.1)")
    what = "mirror pairs of --data and change their colours (default: no, as published)"
    add("--augment", action="store_true", help=what)
    _add_rendering(flow, pairs=400_000, held_out=200, motion=40.0, shapes=6)
    _add_options(flow, output="runs/perceiver-flow")
    flow.set_defaults(run=perceiver_cli.running(_train), keep=False)

    demo = systems.add_parser("perceiver-flow-demo", help="the same, small, on rendered pairs")
    _add_rendering(demo, pairs=2000, held_out=200, motion=2.0, shapes=2)
    changes = {"epochs": 30, "batch_size": 16, "learning_rate": 3e-3, "optimizer": "adamw", "warmup_steps": 100}
    changes |= {"weight_decay": 0.01, "clip_norm": 1.0, "beta2": 0.99, "config": "perceiver-io-flow-demo"}
    _add_options(demo, output="runs/perceiver-flow-demo", points=128, **changes)
    demo.set_defaults(run=perceiver_cli.running(_train), data=None, val_data=None, keep=True, save_every=500)


def _add_rendering(parser, *, pairs, held_out, motion, shapes):
    add = parser.add_argument
    add("--pairs", type=cli.positive, default=pairs, help=f"rendered to train on (default {pairs})")
    add("--held-out-pairs", type=cli.positive, default=held_out, help=f"rendered to evaluate on (default {held_out})")
    add("--motion", type=cli.positive_float, default=motion, metavar="PIXELS", help=f"largest shift (default {motion:g})")
    add("--shapes", type=cli.positive, default=shapes, help=f"in front of the background, at most (default {shapes})")


def _add_options(parser, *, output, points=None, **changes):
    perceiver_cli.add_options(parser, "perceiver-io-flow", output=output, **changes)
    what = "all" if points is None else points
    parser.add_argument("--points", type=cli.positive, default=points, help=f"pixels that a step asks for (default {what})")


def _train(arguments):
    from ..models import InputError
    from . import flow
    from .data import rendered_flow

    config = perceiver_cli.config_of(arguments, "flow")
    height, width = config.output["shape"]
    if arguments.points is not None and config.output.get("upsample", 1) > 1:
        raise InputError(f"--points is for a model that puts out every pixel; {arguments.config} upsamples them")
    rendering = rendered_flow.Rendering(
        height, width, shapes=(min(1, arguments.shapes - 1), arguments.shapes), translation=arguments.motion
    )
    temple, flower = rendered_flow.sample_photos()

    def rendered(size, name, photos, keep):
        return rendered_flow.RenderedFlow(size, rendering, (arguments.seed, name), photos, keep=keep)

    if arguments.data is not None:
        training, held_out = _folders(arguments, (height, width))
    else:
        # Textures that are held out come from the other photograph.
        training = rendered(arguments.pairs, "train", [temple], arguments.keep)
        held_out = rendered(arguments.held_out_pairs, "held out", [flower], True)
        if arguments.val_data is not None:
            held_out = _pairs(arguments, arguments.val_data, (height, width))
    if config.decoder.get("residual"):
        print("this model's decoder adds the query, a pixel's neighbourhood, to what it reads; the released model's does not")
    print(f"{len(training)} pairs of {height} x {width} pixels to train on, {len(held_out)} held out")

    def save(model, history):
        flow.save_result(arguments.output, model, held_out, history)

    task = flow.make_task(training, held_out, arguments.points)
    _, history, seconds = perceiver_cli.fit(arguments, config, task, save)
    last = history[-1]
    print(f"\n{'held out':<24}{'endpoint error':>16}\n{'no motion':<24}{last['zero_epe']:>13.3f} px")
    print(f"{'model':<24}{last['epe']:>13.3f} px\n{'wrong by KITTI':<24}{last['outliers']:>16.1%}")
    print(f"\ncheckpoint, learning-curve.png and {flow.PICTURE} in {arguments.output}; {seconds:.0f} s")
    return 0


def _folders(arguments, size):
    """(training, held out) of --data and --val-data."""
    import copy

    from ..models import InputError

    training = _pairs(arguments, arguments.data, size)
    if arguments.val_data is not None:
        return training, _pairs(arguments, arguments.val_data, size)
    count = max(round(arguments.val_fraction * len(training)), 1)
    if count >= len(training):
        raise InputError(f"--data has {len(training)} pair; one to train on and one held out need two")
    held_out = copy.copy(training)
    training.pairs, held_out.pairs = training.pairs[:-count], training.pairs[-count:]
    return training, held_out


def _pairs(arguments, folder, size):
    """`FlowPairs` of a folder, each of which has been looked at."""
    from ..models.registry import require
    from .data import flow_pairs

    pairs = flow_pairs.FlowPairs(flow_pairs.scan(folder), size, arguments.seed, arguments.augment)
    tqdm = require("tqdm", "train").tqdm
    for index in tqdm(range(len(pairs)), desc="checking pairs", unit="pair", leave=False, delay=1.0, dynamic_ncols=True):
        pairs.check(index)
    return pairs


def predict(arguments) -> int:
    """Writes the flow between two images and its colours, and prints how far things move."""
    from ..models import InputError
    from ..models.registry import require
    from . import flow
    from .data import flow_files

    if arguments.text or arguments.input or len(arguments.images) != 2:
        raise InputError(f"a model of optical flow takes two images, the first frame and the second: {arguments.images}")
    output = arguments.output or Path("flow.flo")
    if output.suffix.lower() != ".flo":
        raise InputError(f"--output is {output}; for a model of optical flow it must end in .flo")
    if not output.parent.is_dir():
        raise InputError(f"--output is {output}, but {output.parent} is not a folder")
    model = flow.load(arguments.checkpoint, device=cli.device_of(arguments), backend=arguments.backend)
    found = flow.predict(model, *arguments.images)
    flow_files.write_flo(output, found)
    shown = output.with_suffix(".png")
    require("PIL.Image", "train").fromarray(flow_files.colors(found).numpy()).save(shown)
    length = found.norm(dim=-1)
    print(f"{output} and {shown}: {length.mean():.2f} pixels in the mean, {length.max():.2f} at most")
    return 0
