"""`python -m mmkernels info`: what is here, what was built, which backends run, and why the others do not."""

import importlib.metadata
import importlib.util
import json
import platform

from . import __version__, _library


def add_commands(subparsers) -> None:
    parser = subparsers.add_parser("info", help="what is here and what was built", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 0


def collect() -> dict:
    """Everything that `info` prints, as plain data."""
    import torch

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "mmkernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "platform": platform.platform(),
        "devices": {device: _device(device) for device in devices},
        "cpu_instruction_sets": cpu_features(),
        "build": _library.build_facts(),
        "libraries": {name: _library.load(name)._asdict() for name in ("cpu", "cuda")},
        "backends": {device: backends(device) for device in dict.fromkeys(device.partition(":")[0] for device in devices)},
    }


def cpu_features() -> dict:
    """Instruction sets that this CPU supports and the one that the CPU kernels use, as the info library says."""
    try:
        from . import _C_info
    except ImportError as error:
        return {"supported": None, "chosen": None, "why": f"the info library is not there: {_why_no_info(error)}"}
    return _C_info.cpu_features()


def backends(device: str) -> dict:
    """op -> backend -> reasons why it cannot run a small float32 problem of that op on `device`; none: it can."""
    import torch

    from . import explain

    def zeros(*shape):
        return torch.zeros(shape, device=device)

    problems = {
        "adapter": (zeros(1, 2, 8), zeros(2, 8), None, zeros(8, 2), None),
        "adapter_fusion": (zeros(1, 2, 8), zeros(1, 2, 3, 8), *(None,) * 5),
        "attention": (zeros(1, 1, 1, 8), zeros(1, 1, 2, 8), zeros(1, 1, 2, 8)),
        "bias_gelu": (zeros(2, 8), zeros(8)),
        "bottleneck_attention": ([zeros(1, 2, 3, 1, 8)], [zeros(1, 1, 3, 1, 8)]),
        "film_layer_norm": (zeros(1, 2, 8), None, None),
        "hypergrid_gate": (zeros(1, 2), zeros(1, 2)),
        "hypergrid_linear": (zeros(1, 1, 16), zeros(16, 16), zeros(1, 2, 2)),
        "latent_attention": (zeros(1, 1, 8), zeros(1, 2, 8), zeros(8, 8), zeros(8, 8)),
        "latent_attention_sharded": (zeros(1, 1, 8), zeros(1, 2, 8), zeros(8, 8), zeros(8, 8)),
        "latent_attention_stream": (zeros(1, 1, 8), [zeros(1, 2, 8)], zeros(8, 8), zeros(8, 8)),
        "latent_decode": (zeros(1, 2, 8), zeros(1, 2, 8), zeros(1, 2, 8), zeros(8, 8), zeros(8, 8)),
        "linear": (zeros(2, 8), zeros(8, 8)),
    }
    return {op: explain(op, *arguments).refusals for op, arguments in problems.items()}


def as_text(facts: dict) -> str:
    lines = ["  ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())]
    lines += [f"{device}: {name}" for device, name in facts["devices"].items()]
    isas = facts["cpu_instruction_sets"]
    lines.append(
        f"CPU kernels use: {isas['chosen'] or isas['why']}"
        + (f" of {', '.join(isas['supported'])}" if isas["supported"] else "")
    )
    lines += ["", "Libraries"]
    for name in ("cpu", "cuda", "emulator", "info"):
        built = facts["build"].get(name, {"built": False, "why": "this installation was made without building it"})
        line = "not built: " + built["why"] if not built["built"] else "built, " + _how_built(built)
        status = facts["libraries"].get(name)
        if built["built"] and status and not status["loaded"]:
            line += f"; not loaded: {status['reason']}"
        lines.append(f"  {name:9} {line}")
    for device, ops in facts["backends"].items():
        for op, refusals in ops.items():
            lines += ["", f"{op} on {device} tensors"]
            lines += [f"  {name:9} {'; '.join(reasons) or 'runs'}" for name, reasons in refusals.items()]
    return "\n".join(lines)


def _how_built(facts: dict) -> str:
    words = [facts["compiler"]]
    words += [f"instruction sets {', '.join(facts['isas'])}"] if "isas" in facts else []
    words += [f"{', '.join(facts['archs'])} and PTX of {facts['ptx']}"] if "archs" in facts else []
    words += [f"without {arch} ({why})" for arch, why in facts.get("left_out", {}).items()]
    return "; ".join(words)


def _why_no_info(error: ImportError) -> str:
    built = _library.build_facts().get("info", {})
    return str(error) if built.get("built") else built.get("why", "this installation was made without building it")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _device(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
