"""Parameters of DeepMind's release and of Hugging Face's library in, and those of the latter out."""

import dataclasses
import math

import torch

from ...modules import FourierPositions
from .. import official
from ..registry import load_weights
from .model import PerceiverIO, PerceiverIOConfig, _autoencoder, _fourier

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
        state_dict: `module path/parameter` -> tensor or array, linear weights (in, out), convolutions (height, width, in,
            out), and of batch norms `state/module path/../average`. Or nested as the released files are, {module path:
            {parameter: array}}, alone or as "params" beside "state". Every other size is read off the tensors.

    Raises ValueError for another kind of Perceiver, for missing, unknown or misshapen entries.
    """
    state_dict = official.haiku_state(config, state_dict)
    official.check_perceiver("models.perceiver_io.from_official", state_dict)
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

# A class of the library by how names start that no later one of them has, more than one so that an entry may be missing;
# names without the prefix "perceiver.".
_HF_KINDS = {
    "PerceiverForMaskedLM": ("embedding_decoder.", "decoder.decoding_cross_attention.", "decoder.output_position_encodings."),
    "PerceiverForMultimodalAutoencoding": ("input_preprocessor.padding.", "input_preprocessor.mask.", "decoder.modalities."),
    "PerceiverForOpticalFlow": ("input_preprocessor.conv_after_patches.",),
    "PerceiverForImageClassificationConvProcessing": ("input_preprocessor.convnet.",),
    "PerceiverForImageClassificationLearned": ("input_preprocessor.convnet_1x1.", "input_preprocessor.positions_projection."),
    "PerceiverForSequenceClassification": ("input_preprocessor.embeddings.", "input_preprocessor.position_embeddings.weight"),
    "PerceiverForImageClassificationFourier": ("decoder.decoder.",),
    "PerceiverModel": ("embeddings.latents",),
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
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
_HF_ACTIVATIONS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")


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
    return next(kind for kind, starts in _HF_KINDS.items() if any(name.startswith(starts) for name in names))


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

    Raises ValueError for another class than expected or another kind of Perceiver, for missing, unknown or misshapen entries.
    """
    official.check_mappings(config, state_dict)
    if config.get("model_type", "perceiver") != "perceiver":
        raise ValueError(f"config has model_type {config['model_type']!r}; it must be 'perceiver'")
    official.check_perceiver("models.perceiver_io.from_huggingface", state_dict)
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
