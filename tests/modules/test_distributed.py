"""DDP and FSDP2 with two gloo processes give the weights of one process on the whole batch."""

from pathlib import Path

from mmkernels import _library


def test_ddp_and_fsdp2(run_ranks):
    backend = "cpp" if _library.load("cpu").loaded else "reference"
    for output in run_ranks(Path(__file__).with_name("distributed.py"), 2, backend):
        assert "same weights" in output, output
