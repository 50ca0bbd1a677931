"""Extra peak memory of one call: beyond the inputs, everything that is alive at the same time, the result included.

On a GPU torch's allocator counts. On a CPU the call runs in a fresh process, forked from a server that has imported torch and
computed nothing; there the kernel's own high-water mark of resident memory is reset just before the call. Large blocks go
back to the system at once (`mallopt`), so memory kept from the warm-up does not hide what the call needs.
"""

import ctypes
import functools
import gc
import multiprocessing
import os
import re
from pathlib import Path

import torch

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
TIMEOUT = 300  # seconds for one measurement


def peak(case, candidate_name: str, device: torch.device, timer, seed: int = 0) -> int | None:
    """Bytes; None where the platform cannot tell or the process fails."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timer.forward() if case.pass_ == "forward" else timer.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, case, candidate_name, seed, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIMEOUT) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory", "bench.run"])
    return context


def _child(sender, case, candidate_name, seed, threads):
    from . import baselines, run
    from .registry import make_inputs, wanted

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 16)
    torch.set_num_threads(threads)
    with baselines.quiet():
        inputs = make_inputs(case.problem, torch.device("cpu"), seed)
        candidate = next(c for c in baselines.candidates(case.problem, inputs) if c.name == candidate_name)
        inputs, names = candidate.given(inputs, wanted(case.problem, case.pass_))
        timer = run.Timer(candidate.function, inputs, case.pass_, names, None)
        call = timer.forward if case.pass_ == "forward" else timer.step
        call()  # thread pools, compilers and buffers that are made once
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = call()
        after = _status("VmHWM")
    del result
    sender.send(max(0, after - before))


def _status(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
