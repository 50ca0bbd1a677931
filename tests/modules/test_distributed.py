"""DDP and FSDP2 with two gloo processes give the weights of one process on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mmkernels import _library

SCRIPT = Path(__file__).with_name("distributed.py")


def test_ddp_and_fsdp2():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    backend = "cpp" if _library.load("cpu").loaded else "reference"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), port, backend],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "same weights" in output, output
