"""Data sets whose items are a function of (seed, epoch, index), and the batches drawn from them."""

import hashlib

import torch


def derive_seed(*parts) -> int:
    """A 63-bit seed from any values."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def batches(size: int, batch_size: int, seed, epoch) -> list:
    """Lists of (epoch, index): a permutation of (seed, epoch) cut into full batches, or everything in order for seed None."""
    if seed is None:
        order = range(size)
    else:
        batch_size = min(batch_size, size)
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        order = torch.randperm(size, generator=generator).tolist()[: size // batch_size * batch_size]
    keys = [(epoch, index) for index in order]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def loader(dataset, order: list, workers: int = 0):
    """An iterator over the batches of `order`; `dataset.collate`, where it has one, makes them of its items."""
    # A generator of its own: a loader otherwise draws from the global one, which would make a resumed run differ.
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        generator=torch.Generator(),
        collate_fn=getattr(dataset, "collate", None),
    )
