"""Perceiver IO (Jaegle et al., ICLR 2022): an encoder as Perceiver has it, and queries that read an output of any size.

    encode:   z <- Cross(latents, x)                       one time
    process:  z <- Self_l(z), l = 1..L, in every block     blocks share their weights
    decode:   y <- Cross(q, z);  out = Linear(y)           a query q for every output element

A model is five parts, each a plain dict in the config: the preprocessor of the input, the encoder, the queries, the decoder,
and the postprocessor of the output. Everything as in DeepMind's released code, but for what this file calls Hugging Face's:
what checkpoints of its library need; `from_huggingface` turns it on.
"""

import copy
import dataclasses
import math

import torch
from torch import nn

from ..modules import FourierPositions, PerceiverDecoder, PerceiverEncoder
from ..modules.backend import check_backend, set_backend
from ..modules.kinds import build, make
from ..modules.perceiver import ACTIVATIONS
from ..modules.postprocessors import POSTPROCESSORS, MultimodalOutput, TaskOutput, TokenOutput
from ..modules.preprocessors import PREPROCESSORS, MultimodalInput, TokenInput
from ..modules.queries import QUERIES, InputQueries, MultimodalQueries
from ..ops._shared.arguments import check_number
from . import official
from .registry import load_weights, save_pretrained


@dataclasses.dataclass(frozen=True)
class PerceiverIOConfig:
    """The five parts of a Perceiver IO.

    `input`, `queries` and `output` have a "kind" and the arguments of that module (`modules/preprocessors.py`, `queries.py`,
    `postprocessors.py`), `encoder` and `decoder` those of `PerceiverEncoder` and `PerceiverDecoder`. What follows from another
    part is not repeated. Without queries there is no decoder, and the output reads the latents.
    """

    input: dict
    output: dict
    queries: dict | None = None
    encoder: dict = dataclasses.field(default_factory=dict)
    decoder: dict = dataclasses.field(default_factory=dict)
    mask_queries: bool = True  # a text's padding is no query either; Hugging Face's model asks it
    activation: str = "gelu_tanh"  # or "gelu", the exact one, as Hugging Face's checkpoints are run
    dropout: float = 0.0  # in the encoder's residual branches
    attention_dropout: float = 0.0  # of all attentions' weights
    eps: float = 1e-5  # of all layer norms
    backend: str = "auto"  # of attentions and linear layers; "eager" is plain PyTorch

    def __post_init__(self):
        for name in ("input", "output", "queries", "encoder", "decoder"):
            value = getattr(self, name)
            if not isinstance(value, dict) and (value is not None or name != "queries"):
                raise ValueError(f"{name} is {value!r}; it must be a dict")
            object.__setattr__(self, name, _plain(value))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        if not isinstance(self.mask_queries, bool):
            raise ValueError(f"mask_queries is {self.mask_queries!r}; it must be true or false")
        for name in ("dropout", "attention_dropout"):
            check_number(name, getattr(self, name), "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
        check_number("eps", self.eps, "a positive number", lambda eps: eps > 0.0)
        check_backend(self.backend)


def _plain(value):
    """A copy as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else copy.copy(value)


class PerceiverIO(nn.Module):
    """One model for all tasks; which it is says the config.

    Parameters: `input.*`, `encoder.latents`, `encoder.cross.0.*`, `encoder.blocks.<b>.<l>.*`, `queries.*`, `decoder.cross.*`,
    `decoder.output.*`, `output.*`.
    """

    def __init__(self, config: PerceiverIOConfig, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        options = {"activation": config.activation, "attention_dropout": config.attention_dropout}
        options |= {"eps": config.eps, "backend": config.backend, **factory}
        self.input = build("input", PREPROCESSORS, config.input, **factory)
        self.encoder = make(
            "encoder", PerceiverEncoder, config.encoder, self.input.channels, dropout=config.dropout, **options
        )
        latent_channels = self.encoder.latents.shape[1]
        self.queries = self.decoder = None
        width = latent_channels
        if config.queries is not None:
            derived = {"channels": self.input.channels} if config.queries.get("kind") == "input" else {}
            self.queries = build("queries", QUERIES, config.queries, **derived, **factory)
            width = self.queries.channels
        kind = config.output.get("kind")
        derived = {"pooled": {"latent_channels": width}, "tasks": {"query_channels": width}}.get(kind, {})
        self.output = build("output", POSTPROCESSORS, config.output, **derived, **factory)
        if self.output.pooled != (self.queries is None):
            needs = "reads the latents and takes no queries" if self.output.pooled else "needs queries"
            raise ValueError(f"queries is {config.queries!r}; the output {kind!r} {needs}")
        if self.queries is not None:
            self.decoder = make(
                "decoder",
                PerceiverDecoder,
                config.decoder,
                width,
                latent_channels,
                output_channels=self.output.channels,
                **options,
            )
        self._check_parts()
        set_backend(self, config.backend)
        self._reset_flow()

    def _check_parts(self):
        """Raises ValueError where two parts do not fit each other."""
        if isinstance(self.output, MultimodalOutput) != isinstance(self.queries, MultimodalQueries) or (
            isinstance(self.output, MultimodalOutput) and set(self.output.modalities) != set(self.queries.modalities)
        ):
            raise ValueError("queries and output must be multimodal both, with the same modalities")
        if isinstance(self.output, TaskOutput) and getattr(self.queries, "count", None) != len(self.output.heads):
            raise ValueError(f"queries must be as many as the output's tasks, {len(self.output.heads)}")
        if isinstance(self.output, TokenOutput):
            table = self.input.tokens.weight if isinstance(self.input, TokenInput) else None
            if table is None or table.shape != (self.output.bias.shape[0], self.queries.channels):
                raise ValueError(
                    "output 'tokens' takes the table of an input 'tokens' of the same vocab_size and of the queries' channels"
                )

    def _reset_flow(self):
        if self.config.output.get("kind") == "flow":
            nn.init.zeros_(self.decoder.output.weight)

    def reset_parameters(self):
        """Weights truncated normal of variance 1 / fan_in, tables of deviation 0.02, biases zero; a flow's last layer zero."""
        for part in self.children():
            part.reset_parameters()
        self._reset_flow()

    def forward(self, inputs, *, key_mask=None, query_mask=None, points=None, tasks=None, masks=None):
        """The output of a batch.

        Args:
            inputs: what the preprocessor takes: a picture (B, height, width, 3), token ids (B, T), a dict of modalities, ...
            key_mask: bool (B, M), True for input elements that count.
            query_mask: bool (B, O), True for outputs that count; others read nothing. A text's default is `key_mask`, if the
                config's `mask_queries` says so.
            points: the outputs that are wanted as flat row-major numbers, int64 (O,), default all; of a multimodal model
                {modality: numbers or None}.
            tasks: of a model with several, the list of those that are wanted, default all.
            masks: see `MultimodalInput`.

        Returns:
            what the postprocessor gives: logits (B, num_classes), (B, T, vocab_size), {task: logits}, flow (B, height, width,
            2), {modality: output}, latents (B, N, D).

        Raises ValueError or TypeError for shapes, dtypes and names that do not fit.
        """
        latents, tokens, position = self.encode(inputs, key_mask=key_mask, masks=masks)
        if query_mask is None and isinstance(self.output, TokenOutput) and self.config.mask_queries:
            query_mask = key_mask
        return self.decode(latents, tokens=tokens, position=position, query_mask=query_mask, points=points, tasks=tasks)

    def encode(self, inputs, *, key_mask=None, masks=None):
        """Latents (B, N, D), and the tokens (B, M, Cx) and positions (M, Cp) or None that they read; see `forward`."""
        if masks is not None and not isinstance(self.input, MultimodalInput):
            raise ValueError("masks is for a multimodal input")
        tokens, position = self.input(inputs) if masks is None else self.input(inputs, masks=masks)
        return self.encoder(tokens, position=position, key_mask=key_mask), tokens, position

    def decode(self, latents, *, tokens=None, position=None, query_mask=None, points=None, tasks=None):
        """The output of latents (B, N, D). Queries made of the input need its `tokens` and `position`; see `forward`."""
        if tasks is not None and not isinstance(self.output, TaskOutput):
            raise ValueError(f"tasks is {tasks!r}; only an output of the kind 'tasks' has several")
        if self.queries is None:
            if query_mask is not None or points is not None:
                raise ValueError("query_mask and points are for a model with queries; this one has none")
            return self.output(latents)
        if points is not None and isinstance(self.output, TaskOutput):
            raise ValueError("points is not for an output of the kind 'tasks', which takes tasks")
        if tasks is not None:
            points = torch.tensor(self.output.numbers(tasks), device=latents.device)
        needs_tokens = isinstance(self.queries, InputQueries) or getattr(self.queries, "per_token", False)
        if needs_tokens and tokens is None:
            raise ValueError("tokens is None; the queries of this model are made of them")
        queries, query_position = self.queries(latents, tokens=tokens, position=position, points=points)
        y = self.decoder(latents, queries, query_position=query_position, query_mask=query_mask)
        if isinstance(self.output, TokenOutput):
            return self.output(y, self.input.tokens.weight)
        if isinstance(self.output, TaskOutput):
            return self.output(y, tasks)
        if isinstance(self.output, MultimodalOutput):
            return self.output(y, self.queries.chosen(points))
        return self.output(y)

    @torch.no_grad()
    def reconstruct(self, inputs, *, chunk_size=16384, key_mask=None, masks=None, progress=None):
        """All outputs of a multimodal model, {modality: output}, of which at most `chunk_size` are decoded at a time.

        The input is encoded once. Outputs are placed as sub-sampled ones are (`FourierQueries`), as in the released demo.
        `progress` wraps a modality's chunks, as tqdm does.
        """
        if not isinstance(self.output, MultimodalOutput):
            raise ValueError("reconstruct is for a model with a multimodal output")
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size!r}; it must be a positive integer")
        latents, _, _ = self.encode(inputs, key_mask=key_mask, masks=masks)
        nothing = torch.empty(0, dtype=torch.int64, device=latents.device)
        results = {}
        for name, part in self.queries.modalities.items():
            chunks = []
            starts = range(0, part.count, chunk_size)
            for start in starts if progress is None else progress(starts):
                numbers = torch.arange(start, min(start + chunk_size, part.count), device=latents.device)
                queries, _ = self.queries(latents, points=dict.fromkeys(self.queries.modalities, nothing) | {name: numbers})
                chunks.append(self.output.project(name, self.decoder(latents, queries)))
            results[name] = self.output.modalities[name](torch.cat(chunks, 1))
        return results

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors into the folder `path`; `mmkernels.models.load(path)` reads them."""
        save_pretrained(self, path)


CONFIG, MODEL = PerceiverIOConfig, PerceiverIO


# --- Published configurations ------------------------------------------------------------------------------------------------


def _fourier(num_bands, max_resolution=None):
    return {"kind": "fourier", "num_bands": num_bands, "max_resolution": max_resolution}


def _classifier(input, num_classes=1000, *, residual=True, channels=1024, **fields):
    """One learned query of `channels`, whose output is the logits."""
    return PerceiverIOConfig(
        input=input,
        queries={"kind": "learned", "count": 1, "channels": channels},
        decoder={"residual": residual},
        output={"kind": "classes", "num_classes": num_classes},
        **fields,
    )


def _text(vocab_size, max_length, channels, num_layers, *, embedding=768, num_latents=256, qk_channels=256, heads=8):
    """The encoder and the input of a language model."""
    return {
        "input": {"kind": "tokens", "vocab_size": vocab_size, "max_length": max_length, "channels": embedding},
        "encoder": {
            "num_latents": num_latents,
            "latent_channels": channels,
            "num_blocks": 1,
            "layers_per_block": num_layers,
            "cross_heads": heads,
            "self_heads": heads,
            **dict.fromkeys(("cross_qk_channels", "self_qk_channels"), qk_channels),
            **dict.fromkeys(("cross_v_channels", "self_v_channels"), channels),
        },
    }


def _language(vocab_size, max_length, channels, num_layers, **sizes):
    """A masked language model: a learned query for every place, its logits by the table of the input."""
    parts = _text(vocab_size, max_length, channels, num_layers, **sizes)
    embedding, heads = parts["input"]["channels"], parts["encoder"]["cross_heads"]
    return PerceiverIOConfig(
        **parts,
        queries={"kind": "learned", "count": max_length, "channels": embedding, "per_token": True},
        decoder={"num_heads": heads, "qk_channels": parts["encoder"]["self_qk_channels"], "v_channels": embedding},
        output={"kind": "tokens", "vocab_size": vocab_size},
    )


def _tasks(tasks, vocab_size, max_length, channels, num_layers, **sizes):
    """The same encoder with a learned query for every task."""
    parts = _text(vocab_size, max_length, channels, num_layers, **sizes)
    embedding, heads = parts["input"]["channels"], parts["encoder"]["cross_heads"]
    return PerceiverIOConfig(
        **parts,
        queries={"kind": "learned", "count": len(tasks), "channels": channels},
        decoder={"num_heads": heads, "qk_channels": parts["encoder"]["self_qk_channels"], "v_channels": embedding},
        output={"kind": "tasks", "tasks": tasks},
    )


def _flow(shape, input, *, queries=None, upsample=1, **encoder):
    """Optical flow: the queries are the input."""
    return PerceiverIOConfig(
        input=input,
        encoder={
            "num_latents": 2048,
            "latent_channels": 512,
            "num_blocks": 1,
            "layers_per_block": 24,
            "self_heads": 16,
            **encoder,
        },
        queries={"kind": "input", **(queries or {})},
        decoder={"qk_channels": 512, "v_channels": 512},
        output={"kind": "flow", "shape": shape, "upsample": upsample},
    )


def _autoencoder(shape, samples, num_classes, *, patch, positions, samples_per_patch=16, label=1024, channels=512, **fields):
    """Video of a `shape` (frames, height, width), sound and a label in and out (Kinetics)."""
    image = {"kind": "grid", "shape": shape, "patch": [1, patch, patch], "positions": positions["image"]}
    audio = {"kind": "grid", "shape": [samples], "channels": 1, "patch": [samples_per_patch], "positions": positions["audio"]}
    return PerceiverIOConfig(
        input={
            "kind": "multimodal",
            "padding": 4,
            "mask_probs": {"audio": 0.0, "image": 0.0, "label": 1.0},
            "modalities": {"audio": audio, "image": image, "label": {"kind": "vector", "channels": num_classes}},
        },
        queries={
            "kind": "multimodal",
            "padding": 2,
            "modalities": {
                "audio": {**positions["audio"], "shape": [samples // samples_per_patch]},
                "image": {**positions["image"], "shape": shape},
                "label": {"kind": "learned", "count": 1, "channels": label},
            },
        },
        output={
            "kind": "multimodal",
            "channels": channels,
            "modalities": {
                "audio": {"kind": "samples", "samples": samples_per_patch},
                "image": {"kind": "array", "channels": 3, "shape": shape},
                "label": {"kind": "classes", "num_classes": num_classes},
            },
        },
        **fields,
    )


def _kinetics(num_latents):
    return _autoencoder(
        [16, 224, 224],
        30720,
        700,
        patch=4,
        positions={"audio": _fourier(192, [30720]), "image": _fourier(32, [16, 56, 56])},
        encoder={"num_latents": num_latents, "latent_channels": 512, "num_blocks": 1, "layers_per_block": 8},
    )


def _clip(audio):
    """A 32-frame clip and its sound."""
    video = {"kind": "grid", "shape": [32, 224, 224], "patch": [2, 8, 8], "positions": _fourier(16)}
    return {"kind": "multimodal", "padding": 4, "modalities": {"audio": audio, "video": video}}


def _audioset(audio, latent_channels):
    encoder = {"num_latents": 512, "latent_channels": latent_channels, "num_blocks": 1, "layers_per_block": 12}
    return _classifier(_clip(audio), 527, encoder=encoder)


def _perceiver(input, num_classes, **encoder):
    """The first paper's model: the input is read more than once, the latents' mean is classified."""
    return PerceiverIOConfig(input=input, encoder=encoder, output={"kind": "pooled", "num_classes": num_classes})


GLUE = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "qqp": 2, "rte": 2, "sst2": 2, "stsb": 1}
FLOW_SIZE = (368, 496)
_AUDIOSET = {"latent_channels": 512, "num_cross_attends": 2, "num_blocks": 2, "layers_per_block": 8}
_AUDIOSET |= {"share_cross": "none", "share_blocks": False}
_IMAGE_A = {"num_latents": 512, "latent_channels": 1024, "num_blocks": 8, "layers_per_block": 6}
_IMAGE_B = {**_IMAGE_A, "num_blocks": 1, "layers_per_block": 16, "self_widening": 4}
# 61,440 samples of sound in 480 patches; the spectrogram's 4,800 values are a token each (how they lie is not published).
_RAW_AUDIO = {"kind": "grid", "shape": [61440], "channels": 1, "patch": [128], "positions": _fourier(128)}
_MEL_AUDIO = {"kind": "grid", "shape": [75, 64], "channels": 1, "positions": _fourier(64)}
CONFIGS = {
    "perceiver-io-imagenet-fourier": _classifier(
        {"kind": "grid", "shape": [224, 224], "positions": _fourier(64)}, encoder=_IMAGE_A
    ),
    "perceiver-io-imagenet-learned": _classifier(
        {
            "kind": "grid",
            "shape": [224, 224],
            "projection": 256,
            "positions": {"kind": "learned", "channels": 256, "projection": 256},
        },
        residual=False,
        encoder=_IMAGE_A,
    ),
    "perceiver-io-imagenet-conv": _classifier(
        {"kind": "conv_stem", "shape": [224, 224], "positions": _fourier(64)}, encoder=_IMAGE_A
    ),
    "perceiver-io-imagenet-b": _classifier(
        {"kind": "grid", "shape": [224, 224], "projection": 256, "positions": _fourier(64)}, encoder=_IMAGE_B
    ),
    "perceiver-io-imagenet-b-conv": _classifier(
        {"kind": "conv_stem", "shape": [224, 224], "positions": _fourier(64)}, encoder=_IMAGE_B
    ),
    "perceiver-io-language-sentencepiece": _language(32000, 512, 1280, 26),
    "perceiver-io-language-bytes": _language(262, 2048, 1280, 26),
    "perceiver-io-language-bytes++": _language(262, 2048, 1536, 40),
    "perceiver-io-glue-bytes": _tasks(GLUE, 262, 2048, 1280, 26),
    "perceiver-io-flow": _flow(FLOW_SIZE, {"kind": "flow", "shape": FLOW_SIZE, "positions": _fourier(64)}),
    "perceiver-io-flow-pixels": _flow(
        FLOW_SIZE, {"kind": "flow", "shape": FLOW_SIZE, "neighbourhood": 1, "positions": _fourier(64)}
    ),
    # The queries are the tokens of the first frame.
    "perceiver-io-flow-separate": _flow(
        FLOW_SIZE,
        {"kind": "flow", "shape": FLOW_SIZE, "frames": "separate", "positions": _fourier(64)},
        queries={"count": math.prod(FLOW_SIZE)},
    ),
    # Both frames through one stem, 11,408 tokens; the flow is upsampled as in RAFT.
    "perceiver-io-flow-conv": _flow(
        FLOW_SIZE,
        {"kind": "conv_stem", "shape": FLOW_SIZE, "channels": 6, "positions": _fourier(64)},
        upsample=4,
    ),
    "perceiver-io-flow-conv-small": _flow(
        FLOW_SIZE,
        {"kind": "conv_stem", "shape": FLOW_SIZE, "channels": 6, "positions": _fourier(64)},
        upsample=4,
        num_latents=1024,
        layers_per_block=16,
    ),
    "perceiver-io-kinetics": _kinetics(784),
    "perceiver-io-kinetics-392": _kinetics(392),
    "perceiver-io-kinetics-196": _kinetics(196),
    "perceiver-io-audioset": _audioset(_RAW_AUDIO, 512),
    "perceiver-io-audioset-mel": _audioset(_MEL_AUDIO, 1024),
    # An encoder of 512 entities in place of a transformer: a vector for each of them comes out.
    "perceiver-io-starcraft": PerceiverIOConfig(
        input={"kind": "array", "channels": 128},
        encoder={"num_latents": 32, "latent_channels": 128, "num_blocks": 1, "layers_per_block": 3},
        queries={"kind": "input"},
        output={"kind": "array"},
    ),
    # Models of the first paper whose input is no grid with Fourier features; perceiver.py has the others.
    "perceiver-imagenet-learned": _perceiver(
        {"kind": "grid", "shape": [224, 224], "positions": {"kind": "learned", "channels": 128}}, 1000, **_IMAGE_A
    ),
    "perceiver-audioset": _perceiver(_clip(_RAW_AUDIO), 527, **_AUDIOSET),
    "perceiver-audioset-mel": _perceiver(_clip(_MEL_AUDIO), 527, **_AUDIOSET),
    "perceiver-modelnet40": _perceiver({"kind": "points"}, 40, num_cross_attends=2, num_blocks=2, layers_per_block=6),
    "perceiver-io-small": _classifier(
        {"kind": "grid", "shape": [64, 64], "positions": _fourier(16)},
        10,
        channels=128,
        encoder={"num_latents": 64, "latent_channels": 128, "num_blocks": 2, "layers_per_block": 4},
    ),
    "perceiver-io-digits": _classifier(
        {"kind": "grid", "shape": [48, 48], "channels": 1, "positions": _fourier(8, [16, 16])},
        10,
        channels=64,
        encoder={"num_latents": 32, "latent_channels": 64, "num_blocks": 3, "layers_per_block": 2, "self_heads": 4},
    ),
    "perceiver-io-language-tiny": _language(262, 256, 128, 4, embedding=64, num_latents=32, qk_channels=64, heads=4),
    "perceiver-io-language-demo": _language(262, 64, 96, 2, embedding=48, num_latents=24, qk_channels=64, heads=8),
    "perceiver-io-flow-tiny": _flow(
        (48, 64),
        {"kind": "flow", "shape": (48, 64), "projection": 16, "positions": _fourier(8)},
        num_latents=64,
        latent_channels=64,
        layers_per_block=4,
        self_heads=4,
    ),
    # Without what the query adds to its answer, the local estimate, a training of minutes does not begin to see motion.
    "perceiver-io-flow-demo": dataclasses.replace(
        _flow(
            (16, 24),
            {"kind": "flow", "shape": (16, 24), "projection": 24, "positions": _fourier(4)},
            num_latents=24,
            latent_channels=48,
            layers_per_block=2,
            self_heads=4,
        ),
        decoder={"qk_channels": 48, "v_channels": 48, "residual": True},
        output={"kind": "flow", "shape": (16, 24), "scale": 20.0},
    ),
    "perceiver-io-autoencoder-demo": _autoencoder(
        [8, 24, 24],
        5120,
        10,
        patch=4,
        positions={"audio": _fourier(32, [5120]), "image": _fourier(8, [8, 6, 6])},
        label=64,
        channels=64,
        encoder={"num_latents": 64, "latent_channels": 96, "num_blocks": 1, "layers_per_block": 3, "self_heads": 4},
    ),
    "perceiver-io-autoencoder-tiny": _autoencoder(
        [4, 32, 32],
        1024,
        10,
        patch=4,
        positions={"audio": _fourier(16, [1024]), "image": _fourier(8, [4, 8, 8])},
        label=64,
        channels=64,
        encoder={"num_latents": 64, "latent_channels": 64, "num_blocks": 1, "layers_per_block": 4, "self_heads": 4},
    ),
}


# --- The released checkpoints ------------------------------------------------------------------------------------------------

_ATTENTION = {"": "query", "_1": "key", "_2": "value", "_3": "output"}
_TABLE = "trainable_position_encoding/pos_embs"


def from_official(config: dict, state_dict: dict, *, backend="auto") -> PerceiverIO:
    """A Perceiver IO with the parameters of DeepMind's Haiku modules, in the dtype of `state_dict`; see `read_official`."""
    sizes, weights = read_official(config, state_dict)
    dtype = official.common_dtype({name: t for name, t in weights.items() if t.is_floating_point()})
    return _with_weights(dataclasses.replace(sizes, backend=backend), weights, dtype)


def _with_weights(config, weights, dtype):
    """A model that never had others."""
    model = PerceiverIO(config, device="meta", dtype=dtype).to_empty(device=next(iter(weights.values())).device)
    for module in model.modules():
        if isinstance(module, FourierPositions):
            module.reset_parameters()
    load_weights(model, weights, "state_dict")
    return model


def read_official(config: dict, state_dict: dict) -> tuple:
    """(PerceiverIOConfig, state dict of `PerceiverIO`) from DeepMind's Haiku modules; the tensors are views of the given ones.

    Args:
        config: what the tensors do not say, by the names of the released code.
            `encoder`: `num_blocks`, `num_self_attend_heads`, `num_cross_attend_heads` (1), `use_query_residual` (true).
            `decoder`: `num_heads` (1), `use_query_residual` (false).
            Pictures: `preprocessor` (or `input_preprocessor`) with `num_bands` and `max_resolution`, or with
            `fourier_position_encoding_kwargs` of them; `spatial_downsample` (1, of a conv stem 4), `temporal_downsample` (1),
            `concat_or_add_pos` ("concat"); `index_shape`, of the picture without batch and channels (default
            `max_resolution`).
            Flow: `rescale_factor` (100), here or in `decoder`.
            Several modalities: `num_frames`, `image_size`, `patch`, `audio_samples`, `samples_per_patch`, `video_bands`,
            `video_max_resolution`, `audio_bands`, `audio_max_resolution`, `mask_probs`.
            `layer_norm_eps` (1e-5).
        state_dict: `module path/parameter` -> tensor, linear weights (in, out), convolutions (height, width, in, out), and of
            batch norms `state/module path/../average`. Or nested as the released files are, {module path: {parameter:
            array}}, alone or as "params" beside "state". Every other size is read off the tensors.

    Raises ValueError for missing, unknown or misshapen entries.
    """
    if isinstance(state_dict, dict) and any(isinstance(value, dict) for value in state_dict.values()):
        state_dict = {name.removeprefix("params/"): t for name, t in official.flattened(state_dict).items()}
    official.check_mappings(config, state_dict)
    if (kind := huggingface_kind(state_dict)) is not None:
        raise ValueError(f"state_dict is that of Hugging Face's {kind}; from_huggingface reads it")
    if "latents/pos_embs" in state_dict:
        raise ValueError("state_dict is that of a Perceiver of 2021; models.perceiver.from_official reads it")
    return _Official(config, state_dict).read()


class _Official:
    """One checkpoint on the way: `weights` grows by our names, `unread` shrinks by the others."""

    def __init__(self, config, state):
        self.config, self.state, self.weights, self.unread = config, state, {}, set(state)

    def read(self):
        encoder, decoder = self._paths()
        channels = self._size(f"{encoder}/cross_attention/layer_norm_1/scale", 0)
        parts = {"encoder": self._encoder(encoder), "input": self._input(channels)}
        if decoder is not None:
            parts |= self._decoder(decoder)
        else:
            logits = self._find("logits/w")
            if logits is None:
                raise ValueError("state_dict has neither a decoder's cross_attention nor the logits of a projection")
            self._linear(logits.removesuffix("/w"), "output.linear")
            parts["output"] = {"kind": "pooled", "num_classes": self._size(logits, 1)}
        # What a moving average was made of is not needed any more.
        self.unread -= {name for name in self.unread if name.startswith("state/")}
        if self.unread:
            raise ValueError(f"state_dict has {min(self.unread)!r}, which this Perceiver IO does not have")
        return PerceiverIOConfig(**parts, eps=self.config.get("layer_norm_eps", 1e-5)), self.weights

    def _paths(self):
        """The module paths of the encoder and the decoder: the one has self-attentions, the other, if it is there, not."""
        end = "/cross_attention/attention/linear/w"
        paths = [name.removesuffix(end) for name in self.state if name.endswith(end)]
        encoders = [path for path in paths if f"{path}/{_TABLE}" in self.state]
        if len(encoders) != 1 or len(paths) > 2:
            raise ValueError(
                f"state_dict has cross-attentions at {paths}; one of them must be an encoder's, beside its latents, and one "
                "more may be a decoder's"
            )
        return encoders[0], next((path for path in paths if path != encoders[0]), None)

    def _encoder(self, path):
        given = self._section("encoder")
        layers = [f"{path}/self_attention"] if f"{path}/self_attention/attention/linear/w" in self.state else []
        while layers and f"{path}/self_attention_{len(layers)}/attention/linear/w" in self.state:
            layers.append(f"{path}/self_attention_{len(layers)}")
        self._array(f"{path}/{_TABLE}", "encoder.latents")
        self._block(f"{path}/cross_attention", "encoder.cross.0", ("query_norm", "input_norm"))
        for i, layer in enumerate(layers):
            self._block(layer, f"encoder.blocks.0.{i}", ("norm",))
        count, channels = self.weights["encoder.latents"].shape
        encoder = {
            "num_latents": count,
            "latent_channels": channels,
            "num_blocks": self._integer("encoder", "num_blocks"),
            "layers_per_block": len(layers),
            "residual": given.get("use_query_residual", True),
            "cross_heads": given.get("num_cross_attend_heads", 1),
            **self._sizes(f"{path}/cross_attention", channels, "cross_"),
        }
        if layers:
            encoder["self_heads"] = self._integer("encoder", "num_self_attend_heads")
            encoder |= self._sizes(layers[0], channels, "self_")
        return encoder

    def _decoder(self, path):
        given = self._section("decoder")
        self._block(f"{path}/cross_attention", "decoder.cross", ("query_norm", "input_norm"))
        width = self._size(f"{path}/cross_attention/layer_norm/scale", 0)
        parts = {
            "decoder": {
                "num_heads": given.get("num_heads", 1),
                "residual": given.get("use_query_residual", False),
                **self._sizes(f"{path}/cross_attention", width, ""),
            }
        }
        channels = None
        if f"{path}/output/w" in self.state:
            self._linear(f"{path}/output", "decoder.output")
            channels = self._size(f"{path}/output/b", 0)
        if any("postprocessor/" in name for name in self.unread):
            return parts | self._multimodal_output(channels)
        table = self._find(f"/{_TABLE}")
        if table is None:
            scale = given.get("rescale_factor", self.config.get("rescale_factor", 100.0))
            output = {"kind": "flow", "shape": self._index_shape()[-2:], "scale": scale}
            return parts | {"queries": {"kind": "input"}, "output": output}
        self._array(table, "queries.table")
        queries = {"kind": "learned", "count": self._size(table, 0), "channels": width}
        output = {"kind": "array", "channels": channels}
        if channels is None and "embedding_decoder/bias" in self.state:
            self._array("embedding_decoder/bias", "output.bias")
            output = {"kind": "tokens", "vocab_size": self._size("embedding_decoder/bias", 0)}
            queries["per_token"] = True
        elif "classification_decoder" in path:
            output = {"kind": "classes", "num_classes": channels}
        return parts | {"queries": queries, "output": output}

    def _input(self, channels):
        """The input of a checkpoint whose encoder reads so many channels."""
        if "embed/embeddings" in self.state:
            self._array("embed/embeddings", "input.tokens.weight")
            self._array(_TABLE, "input.positions.table")
            vocab_size, width = self.state["embed/embeddings"].shape
            return {"kind": "tokens", "vocab_size": vocab_size, "max_length": self._size(_TABLE, 0), "channels": width}
        if self._find_all("_padding/pos_embs"):
            return self._multimodal_input()
        if not self._section("preprocessor") and not self._find_all("image_preprocessor/"):
            return {"kind": "array", "channels": channels}
        return self._picture(channels)

    def _picture(self, channels):
        given = self._section("preprocessor")
        made = {"/conv/w": "conv", "/conv2_d/w": "conv1x1", "/patches_linear/w": "patches"}
        kind = given.get("prep_type", next((kind for end, kind in made.items() if self._find(end)), "pixels"))
        positions, position_channels = self._positions(given)
        added = given.get("concat_or_add_pos", "concat") == "add"
        width = channels - (0 if added else position_channels)
        if kind == "conv":
            return self._conv_stem(positions, width)
        steps = given.get("spatial_downsample", 1), given.get("temporal_downsample", 1)
        if kind != "patches" and steps != (1, 1):
            raise ValueError(f"preprocessor has downsampling {steps} with prep_type {kind!r}; only 'patches' may have it")
        linear = self._find("/patches_linear/w") or self._find("/conv2_d/w")
        inner = width
        if linear is not None:
            path = linear.removesuffix("/w")
            self._linear(path, "input.linear")
            inner = math.prod(self.state[linear].shape[:-1])
        shape = self._index_shape()
        if kind == "patches" and self._find_all("flow_decoder/"):
            side = math.isqrt(inner // 6)  # of neighbourhoods in two frames of three channels; else frames as they are
            frame = 3 if 6 * side**2 == inner else inner // 2
            sizes = {"channels": frame, "neighbourhood": side if frame == 3 else 1, "projection": width}
            return {"kind": "flow", "shape": shape[-2:], "positions": positions, **sizes}
        patch = [*[steps[1]] * (len(shape) == 3), steps[0], steps[0]] if kind == "patches" else [1] * len(shape)
        sizes = {"channels": inner // math.prod(patch), "projection": width if linear is not None else None}
        return {"kind": "grid", "shape": shape, "patch": patch, "positions": positions, "add_positions": added, **sizes}

    def _conv_stem(self, positions, width):
        conv = self._find("/conv/w")
        if conv is None:
            raise ValueError("state_dict has no conv/w, which prep_type 'conv' needs")
        self._take(official.haiku_conv, conv.removesuffix("/w"), "input.conv")
        norm = self._find("/batchnorm/scale")
        if norm is not None:
            path = norm.removesuffix("/scale")
            self._take(official.haiku_norm, path, "input.norm")
            for source, target in (("mean_ema", "running_mean"), ("var_ema", "running_var")):
                average = self._find(f"{path}/~/{source}/average")
                if average is None:
                    raise ValueError(f"state_dict has no 'state/{path}/~/{source}/average'")
                self._array(average, f"input.norm.{target}")
                self.weights[f"input.norm.{target}"] = self.weights[f"input.norm.{target}"].detach().flatten()
            self.weights["input.norm.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        sizes = {"channels": self._size(conv, 2), "out_channels": width, "batch_norm": norm is not None}
        return {"kind": "conv_stem", "shape": self._index_shape(4), "positions": positions, **sizes}

    def _positions(self, given):
        """(spec, channels) of a picture's positions."""
        table = self._find(f"/~_build_network_inputs/{_TABLE}")
        if given.get("position_encoding_type", "fourier" if table is None else "trainable") == "trainable":
            if table is None:
                raise ValueError("state_dict has no pos_embs of the picture, which position_encoding_type 'trainable' needs")
            self._array(table, "input.positions.table")
            projector, projection = self._find("/position_encoding_projector/linear/w"), None
            if projector is not None:
                self._linear(projector.removesuffix("/w"), "input.positions.projection")
                projection = self._size(projector, 1)
            channels = self._size(table, 1)
            return {"kind": "learned", "channels": channels, "projection": projection}, projection or channels
        return self._fourier(given, "preprocessor")

    def _fourier(self, given, where, prefix=""):
        if not given.get("concat_pos", True) or given.get("sine_only", False):
            raise ValueError(
                f"{where} has Fourier features without positions or without cosines; only all of them are supported"
            )
        bands, resolution = given.get(f"{prefix}bands" if prefix else "num_bands"), given.get(f"{prefix}max_resolution")
        if not isinstance(bands, int) or not isinstance(resolution, (list, tuple)):
            raise ValueError(
                f"{where} has Fourier features of bands {bands!r} and max_resolution {resolution!r}; both are needed"
            )
        return _fourier(bands, resolution) | {"released_rounding": True}, len(resolution) * (2 * bands + 1)

    def _index_shape(self, factor=1):
        """The picture without batch and channels; by default what its positions resolve, `factor` times as large."""
        resolution = self._section("preprocessor").get("max_resolution")
        shape = self.config.get("index_shape", None if resolution is None else [n * factor for n in resolution])
        if shape is None:
            raise ValueError("config has no 'index_shape', the shape of the picture without batch and channels")
        return list(shape)

    # Several modalities: the released code builds them by hand, and so their sizes have names of their own

    def _multimodal_input(self):
        c = self._all("audio_samples", "samples_per_patch", "num_frames", "image_size", "patch", "num_classes")
        audio, _ = self._fourier(self.config, "config", "audio_")
        video, _ = self._fourier(self.config, "config", "video_")
        for name in self._find_all("_preprocessor/", "_padding/pos_embs"):
            self._array(name, f"input.padding.{name.split('/')[-2].removesuffix('_padding')}")
        for name in self._find_all("_preprocessor/", "_mask_token/pos_embs"):
            self._array(name, f"input.mask_tokens.{name.split('/')[-2].removesuffix('_mask_token')}")
        step = c["patch"]
        image = {"kind": "grid", "shape": [c["num_frames"], *[c["image_size"]] * 2], "patch": [1, step, step]}
        sound = {"kind": "grid", "shape": [c["audio_samples"]], "channels": 1, "patch": [c["samples_per_patch"]]}
        return {
            "kind": "multimodal",
            "padding": self.config.get("min_padding_size_input", 4),
            "mask_probs": self.config.get("mask_probs"),
            "modalities": {
                "audio": {**sound, "positions": audio},
                "image": {**image, "positions": video},
                "label": {"kind": "vector", "channels": c["num_classes"]},
            },
        }

    def _multimodal_output(self, channels):
        c = self._all("audio_samples", "samples_per_patch", "num_frames", "image_size", "num_classes")
        audio, _ = self._fourier(self.config, "config", "audio_")
        video, _ = self._fourier(self.config, "config", "video_")
        for name in self._find_all("decoder_query/", "_padding/pos_embs"):
            self._array(name, f"queries.padding.{name.split('/')[-2].removesuffix('_padding')}")
        label = self._find(f"classification_decoder/~/basic_decoder/~/{_TABLE}")
        if label is None:
            raise ValueError("state_dict has no pos_embs of the label's query")
        self._array(label, "queries.modalities.label.table")
        for modality, name in {"audio": "audio", "image": "projection", "label": "classification"}.items():
            self._linear(f"{name}_postprocessor/linear", f"output.linear.{modality}")
        shape = [c["num_frames"], *[c["image_size"]] * 2]
        tokens = c["audio_samples"] // c["samples_per_patch"]
        return {
            "queries": {
                "kind": "multimodal",
                "padding": self.config.get("min_padding_size_query", 2),
                "modalities": {
                    "audio": {**audio, "shape": [tokens]},
                    "image": {**video, "shape": shape},
                    "label": {"kind": "learned", "count": 1, "channels": self._size(label, 1)},
                },
            },
            "output": {
                "kind": "multimodal",
                "channels": channels,
                "modalities": {
                    "audio": {"kind": "samples", "samples": self._size("audio_postprocessor/linear/b", 0)},
                    "image": {
                        "kind": "array",
                        "channels": self._size("projection_postprocessor/linear/b", 0),
                        "shape": shape,
                    },
                    "label": {"kind": "classes", "num_classes": c["num_classes"]},
                },
            },
        }

    # Names and sizes

    def _section(self, name):
        section = self.config.get(name, self.config.get(f"input_{name}", {}))
        if not isinstance(section, dict):
            raise ValueError(f"config has {name} {section!r}; it must be a dict")
        return {**section, **section.get("fourier_position_encoding_kwargs", {})}

    def _all(self, *names):
        for name in names:
            if not isinstance(self.config.get(name), int):
                raise ValueError(f"config has {name} {self.config.get(name)!r}; several modalities need it, an integer")
        return {name: self.config[name] for name in names}

    def _integer(self, section, name):
        value = self._section(section).get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config has {section} with {name} {value!r}; it must be a positive integer")
        return value

    def _find_all(self, *parts):
        return sorted(name for name in self.unread if all(part in name for part in parts))

    def _find(self, end):
        """The one entry not read yet that ends so, or None."""
        found = [name for name in sorted(self.unread) if name.endswith(end)]
        if len(found) > 1:
            raise ValueError(f"state_dict has {found[0]!r} and {found[1]!r}; one is expected")
        return found[0] if found else None

    def _size(self, name, axis):
        if name not in self.state:
            raise ValueError(f"state_dict has no {name!r}")
        shape = self.state[name].shape
        if len(shape) <= axis:
            raise ValueError(f"state_dict has {name!r} of shape {tuple(shape)}; it must have {axis + 1} dimensions or more")
        return shape[axis]

    def _sizes(self, path, channels, prefix):
        """Channels and widening of a block."""
        widening = self._size(f"{path}/mlp/linear/w", 1) // channels
        return {
            f"{prefix}qk_channels": self._size(f"{path}/attention/linear/w", 1),
            f"{prefix}v_channels": self._size(f"{path}/attention/linear_2/w", 1),
            f"{prefix}widening": widening,
        }

    def _array(self, source, target):
        self.weights[target] = official.array(self.state, source)
        self.unread.discard(source)

    def _take(self, function, source, target):
        self.weights |= function(self.state, source, target)
        self.unread -= {name for name in self.unread if name.rpartition("/")[0] == source}

    def _linear(self, source, target):
        """A linear layer, or a 1 x 1 convolution."""
        self._take(official.haiku_linear, source, target)

    def _block(self, source, target, norms):
        for i, name in enumerate(norms):
            self._take(official.haiku_norm, f"{source}/layer_norm{f'_{i}' * (i > 0)}", f"{target}.attention.{name}")
        self._take(official.haiku_norm, f"{source}/layer_norm_{len(norms)}", f"{target}.norm")
        for suffix, name in _ATTENTION.items():
            self._linear(f"{source}/attention/linear{suffix}", f"{target}.attention.{name}")
        for suffix, index in {"": 0, "_1": 2}.items():
            self._linear(f"{source}/mlp/linear{suffix}", f"{target}.mlp.{index}")


# --- Checkpoints of Hugging Face ---------------------------------------------------------------------------------------------

# A class of the library by an entry that no other one of them has, in this order; names without the prefix "perceiver.".
_HF_KINDS = {
    "PerceiverForMaskedLM": "embedding_decoder.bias",
    "PerceiverForMultimodalAutoencoding": "input_preprocessor.padding.audio",
    "PerceiverForOpticalFlow": "input_preprocessor.conv_after_patches.weight",
    "PerceiverForImageClassificationConvProcessing": "input_preprocessor.convnet.conv.weight",
    "PerceiverForImageClassificationLearned": "input_preprocessor.convnet_1x1.weight",
    "PerceiverForSequenceClassification": "input_preprocessor.embeddings.weight",
    "PerceiverForImageClassificationFourier": "decoder.decoder.final_layer.weight",
    "PerceiverModel": "embeddings.latents",
}
_HF_BLOCK = {
    "attention.query_norm.": "attention.self.layernorm1.",
    "attention.input_norm.": "attention.self.layernorm2.",
    "attention.norm.": "attention.self.layernorm1.",
    "attention.query.": "attention.self.query.",
    "attention.key.": "attention.self.key.",
    "attention.value.": "attention.self.value.",
    "attention.output.": "attention.output.dense.",
    "norm.": "layernorm.",
    "mlp.0.": "mlp.dense1.",
    "mlp.2.": "mlp.dense2.",
}
_HF_NAMES = {
    "encoder.latents": "embeddings.latents",
    "input.tokens.": "input_preprocessor.embeddings.",
    "input.positions.projection.": "input_preprocessor.positions_projection.",
    "input.conv.": "input_preprocessor.convnet.conv.",
    "input.norm.": "input_preprocessor.convnet.batchnorm.",
    "input.padding.": "input_preprocessor.padding.",
    "input.mask_tokens.": "input_preprocessor.mask.",
    "queries.padding.": "decoder.padding.",
    "queries.modalities.label.table": "decoder.modalities.label.decoder.output_position_encodings.position_embeddings",
    "decoder.output.": "decoder.decoder.final_layer.",
}
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def _hf_name(name, kind):
    """The library's name of our entry `name` in a checkpoint of the class `kind`."""
    if name == "output.bias":
        return "embedding_decoder.bias"
    table = {"PerceiverForMaskedLM": "decoder.", "PerceiverForSequenceClassification": "decoder.decoder."}
    decoder = table.get(kind, "decoder.decoder.")
    text = kind in table
    own = _HF_NAMES | {
        "input.positions.table": "input_preprocessor.position_embeddings." + ("weight" if text else "position_embeddings"),
        "input.linear.": "input_preprocessor." + ("conv_after_patches." if "Flow" in kind else "convnet_1x1."),
        "queries.table": f"{decoder}output_position_encodings.position_embeddings",
    }
    prefix = "" if kind == "PerceiverModel" else "perceiver."
    for ours, theirs in own.items():
        if name.startswith(ours):
            return prefix + theirs + name.removeprefix(ours)
    if name.startswith("output.linear."):
        _, _, modality, end = name.split(".")
        return f"{prefix}output_postprocessor.modalities.{modality}.classifier.{end}"
    for ours, theirs in (
        ("encoder.cross.0.", "encoder.cross_attention."),
        ("encoder.blocks.0.", "encoder.self_attends."),
        ("decoder.cross.", f"{decoder}decoding_cross_attention."),
    ):
        if name.startswith(ours):
            inner = name.removeprefix(ours)
            number, _, rest = inner.partition(".") if ours == "encoder.blocks.0." else ("", "", inner)
            part = next(part for part in _HF_BLOCK if rest.startswith(part))
            return f"{prefix}{theirs}{number}{'.' * bool(number)}{_HF_BLOCK[part]}{rest.removeprefix(part)}"
    raise ValueError(f"the model has {name!r}, which a {kind} does not have")


def huggingface_kind(state_dict: dict) -> str | None:
    """The class of Hugging Face's library that these names are of, or None."""
    names = {name.removeprefix("perceiver.") for name in state_dict}
    if "embeddings.latents" not in names:
        return None
    return next(kind for kind, name in _HF_KINDS.items() if name in names)


def from_huggingface(config: dict, state_dict: dict, *, kind=None, image_shape=None, backend="auto") -> PerceiverIO:
    """A Perceiver IO with the parameters of one of Hugging Face's Perceiver classes, in the dtype of `state_dict`.

    Computes what the library does in evaluation, also where that is not the released code: exact GELU unless the config says
    tanh, padding that is asked (`mask_queries` false), the padding of the stem, the residual of learned-position classifiers.
    In training attention weights are dropped as the config says. Inputs have their channels last here: what is (B, 3, H, W)
    there is (B, H, W, 3), and patches are (B, 2, H, W, 27).

    Args:
        config: the fields of config.json.
        state_dict: its parameters. `official.read_huggingface(folder)` reads both.
        kind: the class that is expected; default that in the config's `architectures`, or any.
        image_shape: (height, width) of the pictures of a Fourier or a convolutional classifier; default (224, 224).

    Raises ValueError for another class than expected, for missing, unknown or misshapen entries.
    """
    official.check_mappings(config, state_dict)
    if config.get("model_type", "perceiver") != "perceiver":
        raise ValueError(f"config has model_type {config['model_type']!r}; it must be 'perceiver'")
    found = huggingface_kind(state_dict)
    if found is None:
        raise ValueError(
            f"state_dict has no 'embeddings.latents', as a Perceiver of Hugging Face has; its first entry is "
            f"{next(iter(state_dict), None)!r}"
        )
    expected = kind or next(iter(config.get("architectures") or ()), found)
    if expected not in _HF_KINDS:
        raise ValueError(f"kind is {expected!r}; allowed are {', '.join(map(repr, _HF_KINDS))}")
    if found != expected:
        raise ValueError(f"state_dict is that of a {found}, not of a {expected}")
    # A task's class has the prefix, the bare model has not.
    prefix = "" if found == "PerceiverModel" else "perceiver."
    state = dict(state_dict)
    if found == "PerceiverModel" and "perceiver.embeddings.latents" in state:
        state = {name.removeprefix("perceiver."): tensor for name, tensor in state.items()}
    elif found != "PerceiverModel" and "embeddings.latents" in state:
        state = {name if name.startswith("embedding_decoder") else prefix + name: tensor for name, tensor in state.items()}
    dtype = official.common_dtype({name: t for name, t in state.items() if t.is_floating_point()})
    sizes = dataclasses.replace(_hf_config(config, state, found, image_shape), backend=backend)
    weights = {}
    for name, own in PerceiverIO(sizes, device="meta").state_dict().items():
        theirs = _hf_name(name, found)
        if theirs not in state:
            raise ValueError(f"state_dict has no {theirs!r}, which a {found} has")
        weights[name] = state.pop(theirs)
        if weights[name].dim() == 4 and own.dim() == 2:  # a 1 x 1 convolution
            weights[name] = weights[name].flatten(1)
    if state:
        raise ValueError(f"state_dict has {min(state)!r}, which a {found} of this config does not have")
    return _with_weights(sizes, weights, dtype)


# What the library's PerceiverConfig has where config.json says nothing.
_HF_DEFAULTS = {
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "cross_attention_widening_factor": 1,
    "self_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.1,
    "use_query_residual": True,
    "vocab_size": 262,
    "max_position_embeddings": 2048,
    "image_size": 56,
    "train_size": [368, 496],
    "num_frames": 16,
    "audio_samples_per_frame": 1920,
    "samples_per_patch": 16,
    "output_shape": [1, 16, 224, 224],
    "output_num_channels": 512,
    "_label_trainable_num_channels": 1024,
}


def _hf_config(config, state, kind, image_shape):
    c = {name: config.get(name, default) for name, default in _HF_DEFAULTS.items()}
    if c["hidden_act"] not in _HF_ACTIVATIONS:
        raise ValueError(f"config has hidden_act {c['hidden_act']!r}; allowed are {', '.join(map(repr, _HF_ACTIVATIONS))}")
    prefix = "" if kind == "PerceiverModel" else "perceiver."

    def rows(name):
        tensor = state.get(prefix + name)
        if tensor is None or tensor.dim() == 0:
            raise ValueError(f"state_dict has no {prefix + name!r}, which a {kind} has")
        return tensor.shape[0]

    def channels(block, cross=""):
        return {
            f"{cross}{n}_channels": rows(f"{block}.attention.self.{m}.weight") for n, m in (("qk", "query"), ("v", "value"))
        }

    encoder = {
        "num_latents": c["num_latents"],
        "latent_channels": c["d_latents"],
        "num_blocks": c["num_blocks"],
        "layers_per_block": c["num_self_attends_per_block"],
        "residual": c["use_query_residual"],
        "cross_heads": c["num_cross_attention_heads"],
        "self_heads": c["num_self_attention_heads"],
        "cross_widening": c["cross_attention_widening_factor"],
        "self_widening": c["self_attention_widening_factor"],
        **channels("encoder.cross_attention", "cross_"),
    }
    if c["num_self_attends_per_block"]:
        encoder |= channels("encoder.self_attends.0", "self_")
    common = {"encoder": encoder, "activation": _HF_ACTIVATIONS[c["hidden_act"]], "mask_queries": False}
    common["attention_dropout"] = c["attention_probs_dropout_prob"]
    if kind == "PerceiverModel":
        return PerceiverIOConfig(input={"kind": "array", "channels": c["d_model"]}, output={"kind": "latents"}, **common)
    text = {
        "kind": "tokens",
        "vocab_size": c["vocab_size"],
        "max_length": c["max_position_embeddings"],
        "channels": c["d_model"],
    }
    if kind == "PerceiverForMaskedLM":
        return PerceiverIOConfig(
            input=text,
            queries={"kind": "learned", "count": c["max_position_embeddings"], "channels": c["d_model"], "per_token": True},
            decoder={"num_heads": 8, **channels("decoder.decoding_cross_attention")},
            output={"kind": "tokens", "vocab_size": c["vocab_size"]},
            **common,
        )
    common["decoder"] = channels("decoder.decoder.decoding_cross_attention")
    if kind == "PerceiverForOpticalFlow":
        shape = c["train_size"]
        return PerceiverIOConfig(
            input={"kind": "flow", "shape": shape, "positions": _fourier(64, shape)},
            queries={"kind": "input"},
            output={"kind": "flow", "shape": shape},
            **common,
        )
    if kind == "PerceiverForMultimodalAutoencoding":
        frames, height, width = c["output_shape"][1:]
        positions = {
            "audio": _fourier(192, [c["num_frames"] * c["audio_samples_per_frame"]]),
            "image": _fourier(32, [c["num_frames"], c["image_size"], c["image_size"]]),
        }
        return _autoencoder(
            (frames, height, width),
            c["num_frames"] * c["audio_samples_per_frame"],
            rows("output_postprocessor.modalities.label.classifier.weight"),
            patch=4,
            positions=positions,
            samples_per_patch=c["samples_per_patch"],
            label=c["_label_trainable_num_channels"],
            channels=c["output_num_channels"],
            **common,
        )
    common["decoder"] |= {"residual": True}
    if kind == "PerceiverForSequenceClassification":
        input = text
    elif kind == "PerceiverForImageClassificationLearned":
        positions = {"kind": "learned", "channels": 256, "projection": 256}
        input = {"kind": "grid", "shape": [c["image_size"]] * 2, "projection": 256, "positions": positions}
    else:
        shape = [224, 224] if image_shape is None else image_shape
        input = {"kind": "grid", "shape": shape, "positions": _fourier(64, [224, 224])}
        if kind == "PerceiverForImageClassificationConvProcessing":
            input |= {"kind": "conv_stem", "positions": _fourier(64, [56, 56]), "padding": "huggingface"}
    return PerceiverIOConfig(
        input=input,
        queries={"kind": "learned", "count": 1, "channels": c["d_latents"]},
        output={"kind": "classes", "num_classes": rows("decoder.decoder.final_layer.weight")},
        **common,
    )


def to_huggingface(model: PerceiverIO) -> dict:
    """The parameters under the names of Hugging Face's class for such a model, for its `load_state_dict`.

    Raises ValueError for a model that none of the classes can hold. The sizes are not compared: that is what the library's
    config is for.
    """
    kinds = {
        ("tokens", "tokens"): "PerceiverForMaskedLM",
        ("tokens", "classes"): "PerceiverForSequenceClassification",
        ("flow", "flow"): "PerceiverForOpticalFlow",
        ("multimodal", "multimodal"): "PerceiverForMultimodalAutoencoding",
        ("conv_stem", "classes"): "PerceiverForImageClassificationConvProcessing",
        ("array", "latents"): "PerceiverModel",
        ("grid", "classes"): "PerceiverForImageClassificationLearned",
    }
    pair = model.config.input["kind"], model.config.output["kind"]
    if pair not in kinds:
        raise ValueError(f"the model has an input {pair[0]!r} and an output {pair[1]!r}, as no class of the library has")
    kind = kinds[pair]
    state = {_hf_name(name, kind): tensor for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("convnet_1x1.weight"):
            state[name] = state[name][..., None, None]
    return state
