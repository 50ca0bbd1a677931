"""Builds the native libraries for a GPU visit. Runs before anything loads them: a library cannot be loaded twice."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAMP = ROOT / "build/native/visit.sha256"  # of the sources that `ensure` built
TIMEOUT = 400  # seconds
# Loading says little: code for another GPU, or of a newer CUDA than the driver's, fails at its first launch.
WORKS = """
import sys, torch
from mmkernels import _library, ops
status = _library.load("cuda")
if not status.loaded:
    sys.exit(status.reason)
q = torch.ones(1, 1, 2, 8, device=sys.argv[1])
out = ops.attention(q, q, q, backend="cuda")
assert bool((out == 1).all()), f"attention of ones is {out.tolist()}"
"""


def _why_not(device) -> str:
    """Why the CUDA kernels do not run in a new process; empty when they do."""
    process = subprocess.run([sys.executable, "-c", WORKS, str(device)], cwd=ROOT, capture_output=True, text=True)
    return "" if process.returncode == 0 else (process.stderr.strip().splitlines() or ["it does not load"])[-1]


def _sources() -> str:
    files = [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def ensure(device: torch.device) -> str:
    """The libraries for this GPU, unless the CUDA one runs already: brought along, or built by an earlier visit from the same
    sources. Says what was done."""
    stale = STAMP.is_file() and STAMP.read_text() != _sources()
    before = "its sources have changed" if stale else _why_not(device)
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
    after = _why_not(device)
    if after:
        print(process.stdout[-2000:], process.stderr[-2000:], sep="\n")
        return f"FAILED: {after}"
    STAMP.write_text(_sources())
    return f"built for sm_{arch}; before: {before}"
