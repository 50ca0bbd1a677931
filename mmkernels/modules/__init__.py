"""Plain `nn.Module`s around the ops: ordinary parameters and state dicts, no hidden state."""

from .backend import set_backend
from .bottleneck import BottleneckFusionLayer, MultimodalEncoder
from .conditional import ConditionalAlignment, ConditionalAttention, ConditionalBottleneck, ConditionalLayerNorm, FiLM
from .hypergrid import HyperGridLinear
from .latent import LatentCrossAttention, LatentSelfAttention
from .positions import FourierPositions

__all__ = [
    "BottleneckFusionLayer",
    "ConditionalAlignment",
    "ConditionalAttention",
    "ConditionalBottleneck",
    "ConditionalLayerNorm",
    "FiLM",
    "FourierPositions",
    "HyperGridLinear",
    "LatentCrossAttention",
    "LatentSelfAttention",
    "MultimodalEncoder",
    "set_backend",
]
