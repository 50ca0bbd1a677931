"""Into how many parts the keys are split: a model of waves of thread blocks.

A launch has `tiles` independent pieces of work (batch x heads x query tiles), each walking `blocks` key tiles. The device
runs `slots` of them at a time (multiprocessors x resident blocks). Splitting the keys s ways gives tiles * s pieces of
ceil(blocks / s) steps, which run in ceil(tiles * s / slots) waves; every piece pays a fixed start (loading queries, filling
the pipeline) worth START steps, and merging costs MERGE steps a split. The count that minimises

    waves(s) * (ceil(blocks / s) + START) + MERGE * (s > 1) * s

wins, the smallest of equals. It is a function of the shapes and the device alone, so results repeat to the bit.
`csrc/common/waves.h` is the same function for the C++ launchers; a test holds them together.
"""

START = 2.0
MERGE = 0.25
MAX_SPLITS = 256


def split_keys(tiles: int, blocks: int, slots: int) -> int:
    """Number of splits for `tiles` pieces of `blocks` key tiles on a device with `slots` places; every split has work."""
    best, best_cost = 1, None
    for splits in range(1, max(1, min(blocks, MAX_SPLITS)) + 1):
        steps = -(-blocks // splits)
        if steps and -(-blocks // steps) != splits:  # fewer splits walk as many steps: skip the ones that leave some empty
            continue
        cost = -(-tiles * splits // slots) * (steps + START) + (MERGE * splits if splits > 1 else 0.0)
        if best_cost is None or cost < best_cost:
            best, best_cost = splits, cost
    return best
