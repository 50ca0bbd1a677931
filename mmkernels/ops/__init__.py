"""The ops: one folder per family. Every function validates, chooses a backend and runs; see each family's README."""

from .._backends import Explanation
from .activation import bias_gelu, explain_bias_gelu
from .adapter import adapter, adapter_fusion, explain_adapter, explain_adapter_fusion
from .attention import BlockDiagonalBias, attention, explain_attention
from .bottleneck import bottleneck_attention, explain_bottleneck_attention
from .hypergrid import explain_hypergrid_gate, explain_hypergrid_linear, hypergrid_gate, hypergrid_linear
from .latent import (
    LatentState,
    explain_latent_attention,
    explain_latent_attention_sharded,
    explain_latent_attention_stream,
    explain_latent_decode,
    latent_attention,
    latent_attention_sharded,
    latent_attention_stream,
    latent_decode,
)
from .linear import explain_linear, linear
from .norm import explain_film_layer_norm, film_layer_norm

EXPLAINERS = {
    "adapter": explain_adapter,
    "adapter_fusion": explain_adapter_fusion,
    "attention": explain_attention,
    "bias_gelu": explain_bias_gelu,
    "bottleneck_attention": explain_bottleneck_attention,
    "film_layer_norm": explain_film_layer_norm,
    "hypergrid_gate": explain_hypergrid_gate,
    "hypergrid_linear": explain_hypergrid_linear,
    "latent_attention": explain_latent_attention,
    "latent_attention_sharded": explain_latent_attention_sharded,
    "latent_attention_stream": explain_latent_attention_stream,
    "latent_decode": explain_latent_decode,
    "linear": explain_linear,
}

__all__ = [
    "BlockDiagonalBias",
    "LatentState",
    "adapter",
    "adapter_fusion",
    "attention",
    "bias_gelu",
    "bottleneck_attention",
    "film_layer_norm",
    "hypergrid_gate",
    "hypergrid_linear",
    "latent_attention",
    "latent_attention_sharded",
    "latent_attention_stream",
    "latent_decode",
    "linear",
]


def explain(op_name: str, *args, **kwargs) -> Explanation:
    """Says which backend would run `mmkernels.ops.<op_name>(*args, **kwargs)` and why the others would not.

    Computes nothing. Bad arguments raise the same errors as the op itself.
    """
    if op_name not in EXPLAINERS:
        raise ValueError(f"op_name is {op_name!r}; allowed are {', '.join(map(repr, sorted(EXPLAINERS)))}")
    return EXPLAINERS[op_name](*args, **kwargs)
