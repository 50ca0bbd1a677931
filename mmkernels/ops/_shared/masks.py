"""Key masks: what every family does about examples that have no key at all."""

import torch


def zero_without_keys(tensor, key_mask):
    """`tensor` (B, ...), zeros in the examples whose `key_mask` (B, M) hides every key.

    Selected, not multiplied: neither a NaN that stands there nor a NaN gradient that arrives there passes.
    """
    return torch.where(key_mask.any(1).view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0.0)
