"""One of two processes that train the attention modules under DDP and FSDP2: `distributed.py RANK PORT`."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmkernels.models import perceiver

RANK, PORT = int(sys.argv[1]), sys.argv[2]
CONFIG = perceiver.PerceiverConfig(
    input_shape=(6, 5),
    input_channels=3,
    num_classes=4,
    num_latents=5,
    latent_channels=16,
    num_cross_attends=3,  # two of them and all latent layers share weights: each is called more than once
    layers_per_block=1,
    self_heads=4,
    num_bands=2,
    backend=sys.argv[3],
)


def train(model, inputs, labels):
    """Two steps of SGD; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=RANK, world_size=2)
torch.manual_seed(0)
single = perceiver.Perceiver(CONFIG)
nn.init.normal_(single.head.weight, std=0.1)
inputs, labels = torch.randn(4, 6, 5, 3), torch.tensor([0, 1, 2, 3])
half = slice(2 * RANK, 2 * RANK + 2)

replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(single))
sharded = copy.deepcopy(single)
mesh = init_device_mesh("cpu", (2,))
for block in (*sharded.cross, *(layer for tower in sharded.blocks for layer in tower)):
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)

train(single, inputs, labels)  # the whole batch: what both must reproduce from their halves
train(replicated, inputs[half], labels[half])
train(sharded, inputs[half], labels[half])
for (name, expected), a, b in zip(
    single.named_parameters(), replicated.module.parameters(), sharded.parameters(), strict=True
):
    torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"DDP, {n}: {m}")
    torch.testing.assert_close(b.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"FSDP2, {n}: {m}")
    assert b.to_local().numel() < expected.numel() or expected.shape[0] == 1
dist.destroy_process_group()
print("same weights")
