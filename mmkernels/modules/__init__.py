"""Plain `nn.Module`s around the ops: ordinary parameters and state dicts, no hidden state."""

from .adapter import Adapter, AdapterBank, AdapterConfig, AdapterFusion, FusionConfig, InvertibleAdapter, PHMAdapter
from .backend import set_backend
from .bottleneck import BottleneckFusionLayer, MultimodalEncoder
from .composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from .conditional import ConditionalAlignment, ConditionalAttention, ConditionalBottleneck, ConditionalLayerNorm, FiLM
from .hypergrid import HyperGridLinear
from .latent import LatentCrossAttention, LatentSelfAttention
from .perceiver import PerceiverDecoder, PerceiverEncoder
from .positions import FourierPositions, LearnedPositions
from .postprocessors import (
    ArrayOutput,
    ClassOutput,
    FlowOutput,
    LatentOutput,
    MultimodalOutput,
    PooledOutput,
    SampleOutput,
    TaskOutput,
    TokenOutput,
)
from .preprocessors import (
    ArrayInput,
    ConvStemInput,
    FlowInput,
    GridInput,
    MultimodalInput,
    PointInput,
    TokenInput,
    VectorInput,
)
from .queries import FourierQueries, InputQueries, LearnedQueries, MultimodalQueries
from .resampler import PerceiverResampler

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterFusion",
    "ArrayInput",
    "ArrayOutput",
    "Average",
    "BatchSplit",
    "BottleneckFusionLayer",
    "ClassOutput",
    "ConditionalAlignment",
    "ConditionalAttention",
    "ConditionalBottleneck",
    "ConditionalLayerNorm",
    "ConvStemInput",
    "FiLM",
    "FlowInput",
    "FlowOutput",
    "FourierPositions",
    "FourierQueries",
    "Fuse",
    "FusionConfig",
    "GridInput",
    "HyperGridLinear",
    "InputQueries",
    "InvertibleAdapter",
    "LatentCrossAttention",
    "LatentOutput",
    "LatentSelfAttention",
    "LearnedPositions",
    "LearnedQueries",
    "MultiTask",
    "MultimodalEncoder",
    "MultimodalInput",
    "MultimodalOutput",
    "MultimodalQueries",
    "PHMAdapter",
    "Parallel",
    "PerceiverDecoder",
    "PerceiverEncoder",
    "PerceiverResampler",
    "PointInput",
    "PooledOutput",
    "SampleOutput",
    "Split",
    "Stack",
    "TaskOutput",
    "TokenInput",
    "TokenOutput",
    "VectorInput",
    "set_backend",
]
