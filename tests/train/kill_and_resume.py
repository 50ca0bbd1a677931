"""Runs a training command again and again and kills it: `kill_and_resume.py JSON`, prints the exit statuses.

JSON: [[arguments, [attempt, ...]], ...]; an attempt is {} (runs to its end), {"after": seconds} or {"call": "fsync" or
"replace", "number": n} (the process dies in front of its n-th call of that function, in the middle of a save). Attempts are
forks of a process that has imported everything, so that a kill falls into the training.
"""

import json
import os
import signal
import sys
import time

import av  # noqa: F401
import kaldi_native_fbank  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytorch_optimizer  # noqa: F401
import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import sklearn.datasets  # noqa: F401
import sklearn.metrics  # noqa: F401
import sklearn.model_selection  # noqa: F401
import torch
import tqdm  # noqa: F401

from mmkernels.__main__ import main
from mmkernels.models import hypergrid_t5, mbt, perceiver, perceiver_io  # noqa: F401


def die_at(name, number):
    original, calls = getattr(os, name), []

    def wrapper(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, wrapper)


def attempt(arguments, after=None, call=None, number=None):
    child = os.fork()
    if child == 0:
        if call:
            die_at(call, number)
        os._exit(main(arguments))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


torch.set_num_threads(1)
for arguments, attempts in json.loads(sys.argv[1]):
    print("statuses", [attempt(arguments, **options) for options in attempts], flush=True)
