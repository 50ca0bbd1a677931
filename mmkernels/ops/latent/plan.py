"""Where the projections go: one pure function of the shapes.

Two sides, each with its own choice. Scores: project the keys, absorb the key projection into the queries, or absorb the
query projection into the keys. Values: project them, read the raw input and project the few results, or fold the output
projection into the values. Counts are multiplications and additions of one example, everything between the layer norms and
the output projection included; derivation in this folder's README.
"""

from typing import NamedTuple

SCORE_PLANS = ("project", "absorb_into_queries", "absorb_into_keys")
VALUE_PLANS = ("project", "raw_input", "output_side")


class Plan(NamedTuple):
    score: str
    value: str
    flops: int


def absorbed(plan: Plan) -> bool:
    """Keys and values are the normalised input itself: no M-sized tensor is written.

    A function, because the compiler of torch 2.10 does not trace properties of named tuples.
    """
    return plan.score == "absorb_into_queries" and plan.value == "raw_input"


def score_flops(plan, queries, keys, query_channels, key_channels, qk_channels, heads):
    """Operations of the score side, projections of the queries included."""
    project_queries = 2 * queries * query_channels * qk_channels
    if plan == "project":
        return project_queries + 2 * keys * key_channels * qk_channels + 2 * queries * keys * qk_channels
    if plan == "absorb_into_queries":
        return project_queries + 2 * queries * key_channels * qk_channels + 2 * queries * keys * heads * key_channels
    project_keys = 2 * keys * key_channels * qk_channels
    return project_keys + 2 * keys * qk_channels * query_channels + 2 * queries * keys * heads * query_channels


def value_flops(plan, queries, keys, key_channels, v_channels, out_channels, heads):
    """Operations of the value side, the output projection included."""
    project_output = 2 * queries * v_channels * out_channels
    if plan == "project":
        return 2 * keys * key_channels * v_channels + 2 * queries * keys * v_channels + project_output
    if plan == "raw_input":
        return 2 * queries * keys * heads * key_channels + 2 * queries * key_channels * v_channels + project_output
    project_values = 2 * keys * key_channels * v_channels
    return project_values + 2 * keys * v_channels * out_channels + 2 * queries * keys * heads * out_channels


def choose_plan(
    queries,
    keys,
    query_channels,
    key_channels,
    qk_channels,
    v_channels,
    out_channels,
    heads=1,
    score_plans=SCORE_PLANS,
    value_plans=VALUE_PLANS,
) -> Plan:
    """The cheapest pair of plans among those allowed; of equals the first.

    Args are the sizes of one attention: N queries of `query_channels`, M keys of `key_channels`, projected to
    `qk_channels` and `v_channels` in all heads together, then to `out_channels`.
    """
    score = [(score_flops(p, queries, keys, query_channels, key_channels, qk_channels, heads), p) for p in score_plans]
    value = [(value_flops(p, queries, keys, key_channels, v_channels, out_channels, heads), p) for p in value_plans]
    best_score, best_value = score[0], value[0]
    for candidate in score[1:]:
        if candidate[0] < best_score[0]:
            best_score = candidate
    for candidate in value[1:]:
        if candidate[0] < best_value[0]:
            best_value = candidate
    return Plan(best_score[1], best_value[1], best_score[0] + best_value[0])


def absorbing_share(*sizes) -> float:
    """Operations of absorbing both sides into the queries, of one attention, over those of projecting keys and values."""
    absorb, project = (
        choose_plan(*sizes, score_plans=(score,), value_plans=(value,)).flops
        for score, value in (("absorb_into_queries", "raw_input"), ("project", "project"))
    )
    return absorb / project


def decoding_is_cheaper(*sizes) -> bool:
    """Has `ops.latent_decode` a plan of fewer operations than all of `ops.latent_attention`? Args as of `choose_plan`."""
    decoding = choose_plan(*sizes, score_plans=SCORE_PLANS[::2], value_plans=VALUE_PLANS[::2])
    return decoding.flops < choose_plan(*sizes, score_plans=SCORE_PLANS[:2], value_plans=VALUE_PLANS[:2]).flops
