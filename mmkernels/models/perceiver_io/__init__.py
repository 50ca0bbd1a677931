"""Perceiver IO (Jaegle et al., ICLR 2022): an encoder as Perceiver has it, and queries that read an output of any size.

    encode:   z <- Cross(latents, x)                       one time
    process:  z <- Self_l(z), l = 1..L, in every block     blocks share their weights
    decode:   y <- Cross(q, z);  out = Linear(y)           a query q for every output element

A model is five parts, each a plain dict in the config: the preprocessor of the input, the encoder, the queries, the decoder,
and the postprocessor of the output. Everything as in DeepMind's released code, but for what is called Hugging Face's here:
what checkpoints of its library need; `from_huggingface` turns it on.

model.py    the model and its published configurations       checkpoints.py    the released files and Hugging Face's
"""

from .checkpoints import from_huggingface, from_official, huggingface_kind, read_official, to_huggingface
from .model import CONFIG, CONFIGS, MODEL, PerceiverIO, PerceiverIOConfig

__all__ = [
    "CONFIG",
    "CONFIGS",
    "MODEL",
    "PerceiverIO",
    "PerceiverIOConfig",
    "from_huggingface",
    "from_official",
    "huggingface_kind",
    "read_official",
    "to_huggingface",
]
