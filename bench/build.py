"""Builds the native libraries for a GPU visit. Runs before anything loads them: a library cannot be loaded twice."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 400  # seconds
LOADS = "from mmkernels import _library as l; s = l.load('cuda'); print(s.reason); raise SystemExit(not s.loaded)"


def _why_not() -> str:
    """Why the CUDA library does not load in a new process; empty when it does."""
    process = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True)
    return "" if process.returncode == 0 else process.stdout.strip() or process.stderr.strip()[-300:] or "it does not load"


def ensure(device: torch.device) -> str:
    """The libraries for this GPU, unless the CUDA one loads already (built before, or brought along). Says what was done."""
    before = _why_not()
    if not before:
        return "the CUDA library was there"
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"MMKERNELS_CUDA_ARCHS": arch} | os.environ
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        return f"FAILED: the build took more than {TIMEOUT} s"
    after = _why_not()
    if after:
        print(process.stdout[-2000:], process.stderr[-2000:], sep="\n")
    return f"FAILED: {after}" if after else f"built for sm_{arch}; before: {before}"
