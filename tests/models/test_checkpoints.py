"""MessagePack checkpoints of Flax, packed here as `flax.serialization` packs them and read without it."""

import json
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmkernels import models
from mmkernels.models import mbt, official

CASE = Path(__file__).parents[1] / "golden/mbt/av_token_bottleneck"
CONFIG = json.loads((CASE / "config.json").read_text()) | {"input_shapes": {"rgb": (4, 8, 8), "spectrogram": (12, 8)}}


def pack(array, name=None):
    """One array: its shape, the name of its dtype, its bytes."""
    return msgpack.ExtType(1, msgpack.packb((array.shape, name or array.dtype.name, array.tobytes())))


def nested(weights):
    tree = {}
    for name, value in weights.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.fixture
def checkpoint(tmp_path):
    """As the release saves it: the parameters under optimizer/target, the momentum beside them."""
    target = nested({n: pack(t.numpy()) for n, t in load_file(CASE / "weights.safetensors").items()})
    momentum = {"step": 9, "param_states": target, "unread": msgpack.ExtType(1, b"nothing that can be decoded")}
    tree = {"global_step": 9, "optimizer": {"state": momentum, "target": target}, "rng": pack(np.zeros(2, "u4"))}
    path = tmp_path / "checkpoint"
    path.write_bytes(msgpack.packb(tree))
    return path


def test_released_checkpoints_are_read_without_jax(checkpoint):
    weights = load_file(CASE / "weights.safetensors")
    loaded = mbt.from_official(CONFIG, checkpoint, backend="reference").eval()
    assert "jax" not in sys.modules and "flax" not in sys.modules
    assert loaded.config.num_bottlenecks == 5  # the released code adds one to its 4
    tree = official.read_flax_checkpoint(checkpoint)
    flat = official.flattened(tree)
    assert flat.keys() == weights.keys() and all(torch.equal(flat[n], t) for n, t in weights.items())
    inputs, outputs = load_file(CASE / "inputs.safetensors"), load_file(CASE / "outputs.safetensors")
    for other in (loaded, mbt.from_official(CONFIG, tree, backend="reference").eval()):
        torch.testing.assert_close(other(inputs), outputs["out/logits"], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), loaded.parameters(), strict=True))


def test_arrays_of_other_kinds(tmp_path):
    values = torch.randn(5, 3)
    tree = {
        "half": pack(values.bfloat16().view(torch.int16).numpy(), "bfloat16"),
        "whole": pack(np.arange(3)),
        "scalar": msgpack.ExtType(3, msgpack.packb(((), "float32", np.float32(2.5).tobytes()))),
        "empty": pack(np.zeros((0, 4), np.float32)),
        "long": {
            "__msgpack_chunked_array__": True,
            "shape": {"0": 5, "1": 3},
            "chunks": {"0": pack(values.numpy().ravel()[:8]), "1": pack(values.numpy().ravel()[8:])},
        },
    }
    (tmp_path / "c").write_bytes(msgpack.packb({"params": tree}))
    read = official.read_flax_checkpoint(tmp_path / "c")
    assert torch.equal(read["half"], values.bfloat16()) and torch.equal(read["long"], values)
    assert read["whole"].tolist() == [0, 1, 2] and read["scalar"].item() == 2.5 and read["empty"].shape == (0, 4)


def test_corrupt_checkpoints(checkpoint, monkeypatch):
    whole = checkpoint.read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[:-1],
        whole + b"x",
        b"PK\x03\x04" + whole,
        msgpack.packb([1, 2]),
        msgpack.packb({"target": {"a": 1.0}}),
        msgpack.packb({"target": {"a": msgpack.ExtType(7, b"")}}),
        msgpack.packb({"target": {"a": msgpack.ExtType(1, b"\x93")}}),
        msgpack.packb({"target": {"a": pack(np.zeros(1), "float31")}}),
        msgpack.packb({"target": {"a": msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"1234")))}}),
    ):
        checkpoint.write_bytes(content)
        with pytest.raises(models.InputError, match="checkpoint cannot be read as a Flax checkpoint"):
            mbt.from_official(CONFIG, checkpoint)
    with pytest.raises(models.InputError, match="nowhere"):
        official.read_flax_checkpoint(checkpoint.with_name("nowhere"))
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match=r"'msgpack'.*pip install mmkernels\[checkpoints\]"):
        official.read_flax_checkpoint(checkpoint)
