"""Plain `nn.Module`s around the ops: ordinary parameters and state dicts, no hidden state."""

from .adapter import Adapter, AdapterBank, AdapterConfig, AdapterFusion, FusionConfig, InvertibleAdapter, PHMAdapter
from .backend import set_backend
from .bottleneck import BottleneckFusionLayer, MultimodalEncoder
from .composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from .conditional import ConditionalAlignment, ConditionalAttention, ConditionalBottleneck, ConditionalLayerNorm, FiLM
from .hypergrid import HyperGridLinear
from .latent import LatentCrossAttention, LatentSelfAttention
from .positions import FourierPositions

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterFusion",
    "Average",
    "BatchSplit",
    "BottleneckFusionLayer",
    "ConditionalAlignment",
    "ConditionalAttention",
    "ConditionalBottleneck",
    "ConditionalLayerNorm",
    "FiLM",
    "FourierPositions",
    "Fuse",
    "FusionConfig",
    "HyperGridLinear",
    "InvertibleAdapter",
    "LatentCrossAttention",
    "LatentSelfAttention",
    "MultiTask",
    "MultimodalEncoder",
    "PHMAdapter",
    "Parallel",
    "Split",
    "Stack",
    "set_backend",
]
