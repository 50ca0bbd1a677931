"""One of two processes that train the models under DDP and FSDP2: `distributed.py RANK PORT BACKEND`."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmkernels.models import mbt, perceiver

RANK, PORT, BACKEND = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def make_perceiver():
    """Two cross-attends and all latent layers share weights: each is called more than once."""
    config = perceiver.PerceiverConfig(
        input_shape=(6, 5),
        input_channels=3,
        num_classes=4,
        num_latents=5,
        latent_channels=16,
        num_cross_attends=3,
        layers_per_block=1,
        self_heads=4,
        num_bands=2,
        backend=BACKEND,
    )
    return perceiver.Perceiver(config), torch.randn(4, 6, 5, 3)


def make_mbt():
    """Two streams that meet in the second layer, in a bottleneck that is the same parameter for both."""
    modalities = (
        mbt.ModalityConfig("rgb", (2, 8, 8), (2, 4, 4), "3d_conv"),
        mbt.ModalityConfig("spectrogram", (12, 8), (4, 4), "2d_conv"),
    )
    config = mbt.MBTConfig(
        modalities=modalities,
        num_classes=4,
        channels=16,
        num_layers=2,
        num_heads=4,
        mlp_channels=32,
        fusion_layer=1,
        backend=BACKEND,
    )
    return mbt.MBT(config), {"rgb": torch.randn(4, 2, 8, 8, 3), "spectrogram": torch.randn(4, 12, 8, 3)}


def blocks_of(model):
    if isinstance(model, mbt.MBT):
        return model.encoder.layers
    return [*model.cross, *(layer for tower in model.blocks for layer in tower)]


def part(inputs, rows):
    return {name: x[rows] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def train(model, inputs, labels):
    """Two steps of SGD on the mean of the losses, where there are several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        outputs = model(inputs)
        outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
        loss = torch.stack([nn.functional.cross_entropy(y, labels) for y in outputs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=RANK, world_size=2)
half = slice(2 * RANK, 2 * RANK + 2)
mesh = init_device_mesh("cpu", (2,))
labels = torch.tensor([0, 1, 2, 3])
for make in (make_perceiver, make_mbt):
    torch.manual_seed(0)
    single, inputs = make()
    nn.init.normal_(single.head.weight, std=0.1)
    replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(single))
    sharded = copy.deepcopy(single)
    for block in blocks_of(sharded):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(single, inputs, labels)  # the whole batch: what both must reproduce from their halves
    train(replicated, part(inputs, half), labels[half])
    train(sharded, part(inputs, half), labels[half])
    for (name, expected), a, b in zip(
        single.named_parameters(), replicated.module.parameters(), sharded.parameters(), strict=True
    ):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"DDP, {n}: {m}")
        torch.testing.assert_close(b.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"FSDP2, {n}: {m}")
        assert b.to_local().numel() < expected.numel() or expected.shape[0] == 1
dist.destroy_process_group()
print("same weights")
