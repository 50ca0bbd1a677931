"""Folders: a model comes back in the dtypes that it was saved in, and what another library wrote is called so."""

import json

import pytest
import torch

from mmkernels import models
from mmkernels.models import perceiver_io

NAMES = ["ca-mtl-tiny", "hypergrid-t5-tiny", "mbt-digits", "perceiver-digits", "perceiver-io-digits"]  # one of every system
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.float32)
STEM = {  # with the averages and the counter of a batch norm
    "input": {"kind": "conv_stem", "shape": [16, 16], "out_channels": 4, "positions": {"kind": "fourier", "num_bands": 2}},
    "output": {"kind": "pooled", "num_classes": 3},
    "encoder": {"num_latents": 3, "latent_channels": 8, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
}


def check_equal(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def fresh(name):
    return perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**STEM)) if name == "stem" else models.load(name)


@pytest.mark.parametrize("name", [*NAMES, "stem"])
def test_dtypes_of_a_folder(name, tmp_path):
    model = fresh(name).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for dtype in DTYPES:
        model.to(dtype).save_pretrained(tmp_path)
        loaded = models.load(tmp_path)
        check_equal(loaded, model)
        assert all(buffer.dtype == dtype for buffer in loaded.buffers() if buffer.is_floating_point())
        for other in DTYPES:
            check_equal(models.load(tmp_path, dtype=other), fresh_copy(loaded, other))


def fresh_copy(model, dtype):
    copy = type(model)(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("name", [*NAMES, "stem"])
def test_a_folder_of_several_dtypes(name, tmp_path):
    model = fresh(name)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    for i, tensor in enumerate(tensors):
        tensor.data = torch.randn_like(tensor, dtype=torch.float64).to(DTYPES[i % 4])
    model.save_pretrained(tmp_path)
    check_equal(models.load(tmp_path), model)
    check_equal(models.load(tmp_path, dtype=torch.float64), fresh_copy(model, torch.float64))


def test_most_elements_say_it_for_tables_of_positions(tmp_path):
    """Norms kept in float32, as mixed precision has it, do not change them."""
    model = models.load("perceiver-digits").bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    check_equal(loaded, model)
    assert loaded.positions.features.dtype == model.positions.features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("perceiver", "models.perceiver_io.from_huggingface reads it, with models.official.read_huggingface"),
        ("bert", "models.ca_mtl.from_bert reads it"),
        ("t5", "models.hypergrid_t5.from_official reads it"),
        ("gpt2", "nothing here reads it"),
        (["x"], "nothing here reads it"),
    ],
)
def test_folders_of_another_library(model_type, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["X"]}))
    with pytest.raises(models.InputError, match=f"save_pretrained of Hugging Face's library, model_type .*; {message}"):
        models.load(tmp_path)
