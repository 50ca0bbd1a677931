"""`python -m mmkernels <command>`: one place where the commands are named; each is imported only when it is asked for."""

import argparse
import importlib
import os
import sys
from pathlib import Path

from . import __version__

ROOT = Path(__file__).resolve().parents[1]
# command -> (module with `add_commands(subparsers)`, what the list of commands says). `add_commands` sets `run`, a function
# of the parsed arguments that returns the exit status.
COMMANDS = {
    "info": ("mmkernels._info", "versions, devices, what was built and which backends run here, and why not the others"),
    "train": ("mmkernels.train.cli", "train a model"),
    "predict": ("mmkernels.train.cli", "classify images or clips, or answer a text, with a trained model"),
    "bench": ("bench.cli", "time the ops and their peers (in a source tree)"),
    "kernel-report": ("mmkernels.kernel_report", "compile every GPU kernel and read registers, spills and instructions"),
}


class CommandError(Exception):
    """A command cannot run here; the message is one line for the user."""


def add_command(name: str, subparsers) -> None:
    """Imports the module of a command and lets it add its parser. Raises CommandError where it is not there."""
    module = COMMANDS[name][0]
    if module.startswith("bench."):
        if not (ROOT / "bench/cli.py").is_file():
            raise CommandError("it needs a source tree: the folder bench/ is not part of the installed package")
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
    importlib.import_module(module).add_commands(subparsers)


def main(arguments: list | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m mmkernels", description="Fused kernels for multimodal transformers.")
    parser.add_argument("--version", action="version", version=f"mmkernels {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    name = arguments[0] if arguments else None
    try:
        if name in COMMANDS:
            add_command(name, subparsers)
        else:
            for command, (_, help) in COMMANDS.items():
                subparsers.add_parser(command, help=help)
        parsed = parser.parse_args(arguments)
        if name is None:
            parser.print_help()
            return 0
        status = parsed.run(parsed) or 0
        sys.stdout.flush()
        return status
    except CommandError as error:
        message = str(error)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("mmkernels", "bench"):
            raise
        message = f"it needs {package}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered must go somewhere at exit
        return 1
    print(f"python -m mmkernels {name}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
