"""The plan chooser against the counts of every published configuration, and the split planner against its own model."""

import itertools

import pytest

from mmkernels.ops._shared import waves
from mmkernels.ops.latent.plan import SCORE_PLANS, VALUE_PLANS, absorbed, choose_plan, score_flops, value_flops

# name: M, N, key channels, query channels, heads, qk, v, out channels -> standard, best GFLOP, score plan, value plan.
# Sizes from the papers' tables, counts by the formulas of the absorption, rounded as printed there.
Q, K, P, R, O = "absorb_into_queries", "absorb_into_keys", "project", "raw_input", "output_side"  # noqa: E741
PUBLISHED = {
    "imagenet-fourier": (50176, 512, 261, 1024, 1, 261, 261, 1024, 41.04, 27.51, Q, R),
    "imagenet-learned": (50176, 512, 512, 1024, 1, 512, 512, 1024, 106, 54.22, Q, R),
    "imagenet-conv": (3136, 512, 322, 1024, 1, 322, 322, 1024, 4.04, 2.96, Q, R),
    "imagenet-b": (50176, 512, 514, 1024, 1, 514, 514, 1024, 107, 54.44, Q, R),
    "modelnet": (2048, 512, 387, 1024, 1, 387, 387, 1024, 3.66, 2.74, Q, R),
    "audioset-raw": (13024, 512, 487, 512, 1, 487, 487, 512, 25.86, 13.99, Q, R),
    "audioset-mel": (17344, 512, 487, 1024, 1, 487, 487, 1024, 34.77, 18.81, Q, R),
    "language-bytes": (2048, 256, 768, 1280, 8, 256, 1280, 1280, 7.45, 7.45, P, P),
    "language-pieces": (512, 256, 768, 1280, 8, 256, 1280, 1280, 2.62, 2.62, P, P),
    "language-bytes++": (2048, 256, 768, 1536, 8, 256, 1536, 1536, 8.93, 8.93, P, P),
    "flow": (182528, 2048, 322, 512, 1, 322, 322, 512, 559, 484, Q, R),
    "flow-separate": (365056, 2048, 451, 512, 1, 451, 451, 512, 1648, 1352, Q, R),
    "flow-conv": (11408, 2048, 322, 512, 1, 322, 322, 512, 36.17, 32.29, Q, R),
    "kinetics": (52097, 784, 704, 512, 1, 704, 704, 512, 219, 118, Q, R),
    "starcraft": (512, 32, 128, 1024, 1, 128, 128, 1024, 0.06, 0.03, Q, R),
    "imagenet-decoder": (512, 1, 1024, 1024, 1, 1024, 1024, 1024, 2.15, 0.01, Q, R),
    "audioset-decoder": (512, 1, 512, 1024, 1, 512, 512, 1024, 0.54, 0.00, Q, R),
    "mlm-decoder": (256, 2048, 1280, 768, 8, 256, 768, 768, 4.97, 4.97, P, P),
    "glue-decoder": (256, 8, 1280, 1280, 8, 256, 768, 1280, 0.70, 0.13, Q, R),
    "flow-decoder": (2048, 182528, 512, 322, 1, 512, 512, 322, 888, 485, K, O),
    "kinetics-decoder": (784, 804737, 512, 1026, 1, 512, 512, 1026, 2984, 2592, K, O),
    "kinetics-train-decoder": (784, 1025, 512, 1026, 1, 512, 512, 1026, 4.62, 4.62, P, P),
}


def rounds_to(value, printed):
    """True when `value` in GFLOP is the printed figure, which has two decimals below 100 and none above."""
    return abs(value / 1e9 - printed) <= (0.5 if printed >= 100 else 0.005) * 1.001


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    m, n, c, d, heads, qk, v, out, standard, best, score, value = PUBLISHED[name]
    plain = score_flops("project", n, m, d, c, qk, heads) + value_flops("project", n, m, c, v, out, heads)
    assert rounds_to(plain, standard), plain / 1e9
    plan = choose_plan(n, m, d, c, qk, v, out, heads)
    assert (plan.score, plan.value) == (score, value)
    assert rounds_to(plan.flops, best), plan.flops / 1e9
    assert absorbed(plan) == (score == Q and value == R)


def test_the_choice_is_the_cheapest_pair():
    for n, m, c, qk, heads in itertools.product((1, 8, 512), (7, 512, 9000), (24, 261), (24, 512), (1, 8)):
        sizes = dict(query_channels=64, key_channels=c, qk_channels=qk, heads=heads)
        plan = choose_plan(n, m, 64, c, qk, 2 * qk, 96, heads)
        totals = [
            score_flops(s, n, m, **sizes) + value_flops(v, n, m, c, 2 * qk, 96, heads)
            for s, v in itertools.product(SCORE_PLANS, VALUE_PLANS)
        ]
        assert plan.flops == min(totals)


def test_closed_form_of_the_encoder_criterion():
    """Absorbed wins if and only if C (Cqk + Cv) (M - N) > N M (2 H C - Cqk - Cv), for the two pure plans."""
    for n, m, c, qk, v, heads in itertools.product((4, 512), (3, 600, 50000), (32, 768), (32, 256), (32, 1280), (1, 8)):
        both = [
            score_flops(s, n, m, 0, c, qk, heads) + value_flops(w, n, m, c, v, 0, heads) for s, w in (("project",) * 2, (Q, R))
        ]
        assert (both[1] < both[0]) == (c * (qk + v) * (m - n) > n * m * (2 * heads * c - qk - v))


@pytest.mark.parametrize("slots", (1, 2, 108, 132, 264))
def test_splits_minimise_the_modelled_time(slots):
    def cost(tiles, blocks, splits):
        merge = waves.MERGE * splits if splits > 1 else 0.0
        return -(-tiles * splits // slots) * (-(-blocks // splits) + waves.START) + merge

    for tiles, blocks in itertools.product((0, 1, 4, 33, 132, 500), (0, 1, 2, 7, 49, 392, 784)):
        splits = waves.split_keys(tiles, blocks, slots)
        assert 1 <= splits <= max(1, blocks)
        if blocks:
            steps = -(-blocks // splits)
            assert steps * (splits - 1) < blocks, "a split has no work"
        everything = range(1, max(1, min(blocks, waves.MAX_SPLITS)) + 1)
        assert cost(tiles, blocks, splits) == min(cost(tiles, blocks, s) for s in everything)


def test_splits_fill_the_device_only_where_it_is_empty():
    assert waves.split_keys(4, 784, 132) == 33  # 512 latents in tiles of 128, one example: 4 of 132 places busy unsplit
    assert waves.split_keys(4 * 64, 784, 132) <= 2  # a batch of 64 fills it
    assert waves.split_keys(132, 784, 132) == 1
