"""The model, and the published configurations of its five parts."""

import copy
import dataclasses
import math

import torch
from torch import nn

from ...modules import PerceiverDecoder, PerceiverEncoder
from ...modules.backend import check_backend, set_backend
from ...modules.kinds import build, make
from ...modules.perceiver import ACTIVATIONS
from ...modules.postprocessors import POSTPROCESSORS, MultimodalOutput, TaskOutput, TokenOutput
from ...modules.preprocessors import PREPROCESSORS, MultimodalInput, TokenInput
from ...modules.queries import QUERIES, InputQueries, MultimodalQueries, check_points
from ...ops._shared.arguments import check_number
from ..registry import save_pretrained


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
    activation: str = "gelu_tanh"  # or "gelu", the exact one, as Hugging Face's checkpoints are run, "relu", "silu"
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
            if key_mask is not None and points is not None:
                check_points(points, key_mask.shape[1], key_mask.device)
                query_mask = key_mask[:, points]
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


def _autoencoder(
    shape, samples, num_classes, *, patch, positions, samples_per_patch=16, scale=1.0, label=1024, channels=512, **fields
):
    """Video of a `shape` (frames, height, width), sound of a `scale`, and a label, in and out (Kinetics)."""
    image = {"kind": "grid", "shape": shape, "patch": [1, patch, patch], "positions": positions["image"]}
    audio = {"kind": "grid", "shape": [samples], "channels": 1, "patch": [samples_per_patch], "positions": positions["audio"]}
    audio |= {"scale": scale}
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
                "audio": {"kind": "samples", "samples": samples_per_patch, "scale": scale},
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
    # About as many tokens of sound as of video, each with content as large as its positions: else the sound is not found.
    "perceiver-io-autoencoder-demo": _autoencoder(
        [8, 24, 24],
        5120,
        10,
        patch=8,
        positions={"audio": _fourier(40, [80]), "image": _fourier(6, [8, 6, 6])},
        samples_per_patch=64,
        scale=4.0,
        label=64,
        channels=64,
        encoder={"num_latents": 96, "latent_channels": 96, "num_blocks": 1, "layers_per_block": 2, "self_heads": 4},
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
