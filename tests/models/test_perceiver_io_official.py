"""Perceiver IO under the released names: kinds of input and output that tests/golden has no case of, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkernels import models
from mmkernels.models import perceiver, perceiver_io

ENCODER = {"num_latents": 7, "latent_channels": 12, "num_blocks": 2, "layers_per_block": 2, "self_heads": 3}
FOURIER = {"kind": "fourier", "num_bands": 2, "max_resolution": [4, 6], "released_rounding": True}
CLASSES = {"queries": {"kind": "learned", "count": 1, "channels": 10}, "output": {"kind": "classes", "num_classes": 6}}
FLOW = {"queries": {"kind": "input"}, "output": {"kind": "flow", "shape": [4, 6], "scale": 50.0}}
STEM = "image_preprocessor/~/conv2_d_downsample/~"
BUILD = "image_preprocessor/~_build_network_inputs"
GOLDEN = Path(__file__).parents[1] / "golden/perceiver"
# our parts, the released config's preprocessor, the released paths of our modules
CASES = {
    "stem": (
        {"input": {"kind": "conv_stem", "shape": [16, 24], "out_channels": 4, "positions": FOURIER}, **CLASSES},
        {"prep_type": "conv", "spatial_downsample": 4},
        {"input.conv": f"{STEM}/conv", "input.norm": f"{STEM}/batchnorm"},
    ),
    "learned positions": (
        {
            "input": {
                "kind": "grid",
                "shape": [4, 6],
                "projection": 5,
                "positions": {"kind": "learned", "channels": 3, "projection": 4},
            },
            **CLASSES,
        },
        {"prep_type": "conv1x1", "position_encoding_type": "trainable"},
        {
            "input.linear": "image_preprocessor/~/conv2_d",
            "input.positions.table": f"{BUILD}/trainable_position_encoding",
            "input.positions.projection": f"{BUILD}/position_encoding_projector/linear",
        },
    ),
    "added positions": (
        {
            "input": {
                "kind": "grid",
                "shape": [4, 6],
                "positions": {"kind": "learned", "channels": 3},
                "add_positions": True,
            },
            **CLASSES,
        },
        {"prep_type": "pixels", "position_encoding_type": "trainable", "concat_or_add_pos": "add"},
        {"input.positions.table": f"{BUILD}/trainable_position_encoding"},
    ),
    "patches of a video": (
        {
            "input": {
                "kind": "grid",
                "shape": [4, 6, 8],
                "patch": [2, 2, 2],
                "positions": {**FOURIER, "max_resolution": [2, 3, 4]},
            },
            **CLASSES,
        },
        {"prep_type": "patches", "spatial_downsample": 2, "temporal_downsample": 2, "max_resolution": [2, 3, 4]},
        {},
    ),
    "flow": (
        {"input": {"kind": "flow", "shape": [4, 6], "projection": 5, "positions": FOURIER}, **FLOW},
        {"prep_type": "patches", "spatial_downsample": 1, "temporal_downsample": 2},
        {"input.linear": "image_preprocessor/patches_linear"},
    ),
    "flow of pixels": (
        {"input": {"kind": "flow", "shape": [4, 6], "projection": 5, "neighbourhood": 1, "positions": FOURIER}, **FLOW},
        {"prep_type": "patches", "spatial_downsample": 1, "temporal_downsample": 2},
        {"input.linear": "image_preprocessor/patches_linear"},
    ),
    "pooled": (
        {"input": {"kind": "grid", "shape": [4, 6], "positions": FOURIER}, "output": {"kind": "pooled", "num_classes": 6}},
        {"prep_type": "pixels"},
        {"output.linear": "projection_decoder/~/logits"},
    ),
    "array": (
        {"input": {"kind": "array", "channels": 5}, **CLASSES, "output": {"kind": "array", "channels": 6}},
        None,
        {},
    ),
}


def released(model, paths):
    """The parameters under the released names and in the released layouts."""
    kind = model.config.output["kind"]
    wrapper = {"flow": "flow_decoder/~/", "classes": "classification_decoder/~/"}.get(kind, "")
    decoder, encoder = f"{wrapper}basic_decoder", "perceiver_encoder/~"
    paths = {
        "encoder.latents": f"{encoder}/trainable_position_encoding",
        "encoder.cross.0": f"{encoder}/cross_attention",
        "encoder.blocks.0.0": f"{encoder}/self_attention",
        "encoder.blocks.0.1": f"{encoder}/self_attention_1",
        "decoder.cross": f"{decoder}/cross_attention",
        "decoder.output": f"{decoder}/output",
        "queries.table": f"{decoder}/~/trainable_position_encoding",
        **paths,
    }
    inner = {
        "attention.query_norm": "layer_norm",
        "attention.input_norm": "layer_norm_1",
        "attention.norm": "layer_norm",
        "attention.query": "attention/linear",
        "attention.key": "attention/linear_1",
        "attention.value": "attention/linear_2",
        "attention.output": "attention/linear_3",
        "mlp.0": "mlp/linear",
        "mlp.2": "mlp/linear_1",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        start = next(s for s in paths if name == s or name.startswith(f"{s}."))
        rest, _, leaf = name.removeprefix(start).lstrip(".").rpartition(".")
        path = paths[start]
        if rest == "norm":
            path += "/layer_norm_1" if "blocks" in start else "/layer_norm_2"
        elif rest:
            path += f"/{inner[rest]}"
        if not leaf:
            state[f"{path}/pos_embs"] = tensor
        elif leaf.startswith("running"):
            source = {"running_mean": "mean_ema", "running_var": "var_ema"}[leaf]
            state[f"state/{path}/~/{source}/average"] = tensor.view(1, 1, 1, -1)
            state[f"state/{path}/~/{source}/hidden"] = tensor.view(1, 1, 1, -1)
            state[f"state/{path}/~/{source}/counter"] = torch.tensor(3)
        elif leaf == "num_batches_tracked":
            continue
        elif "norm" in path.rpartition("/")[2]:
            state[f"{path}/{'scale' if leaf == 'weight' else 'offset'}"] = tensor
        elif leaf == "bias":
            state[f"{path}/b"] = tensor
        elif tensor.dim() == 4:
            state[f"{path}/w"] = tensor.permute(2, 3, 1, 0)
        else:
            state[f"{path}/w"] = tensor.T[None, None] if path.endswith("conv2_d") else tensor.T
    return state


def official_config(case):
    parts, preprocessor, _ = CASES[case]
    config = {
        "encoder": {"num_blocks": 2, "num_self_attend_heads": 3},
        "decoder": {"use_query_residual": False, "rescale_factor": 50.0},
        "layer_norm_eps": 1e-5,
    }
    if preprocessor is not None:
        config["preprocessor"] = {"num_bands": 2, "max_resolution": [4, 6], **preprocessor}
        shape = parts["input"]["shape"]
        config["index_shape"] = [2, *shape] if "flow" in case else shape
    return config


def model_of(case):
    torch.manual_seed(0)
    config = perceiver_io.PerceiverIOConfig(encoder=ENCODER, backend="reference", **CASES[case][0])
    model = perceiver_io.PerceiverIO(config, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
            tensor.uniform_(0.1, 0.9)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_released_names(case):
    """Read back, the model is what it was: every tensor, every output."""
    model = model_of(case)
    state = released(model, CASES[case][2])
    loaded = perceiver_io.from_official(official_config(case), state, backend="reference").eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shape = CASES[case][0]["input"].get("shape", [9])
    channels = CASES[case][0]["input"].get("channels", 3)
    inputs = torch.rand(2, *([2] if "flow" in case else []), *shape, channels, dtype=torch.float64)
    assert torch.equal(loaded(inputs), model(inputs))


def test_nested_sections_of_the_released_scripts():
    """`input_preprocessor`, and Fourier features in a section of their own."""
    config = official_config("stem")
    given = config.pop("preprocessor")
    fourier = {"num_bands": given.pop("num_bands"), "max_resolution": given.pop("max_resolution"), "concat_pos": True}
    config["input_preprocessor"] = given | {"fourier_position_encoding_kwargs": fourier}
    del config["index_shape"]  # four times the resolution of the positions
    model = model_of("stem")
    loaded = perceiver_io.from_official(config, released(model, CASES["stem"][2]))
    assert loaded.config.input == model.config.input | {"channels": 3, "batch_norm": True}


def test_nested_parameters_of_the_released_files():
    state, nested = released(model_of("stem"), CASES["stem"][2]), {"params": {}, "state": {}}
    for name, tensor in state.items():
        part = "state" if name.startswith("state/") else "params"
        module, _, parameter = name.removeprefix("state/").rpartition("/")
        nested[part].setdefault(module, {})[parameter] = tensor.numpy()
    flat = perceiver_io.from_official(official_config("stem"), state).state_dict()
    for given in (nested, nested["params"] | {f"state/{module}": values for module, values in nested["state"].items()}):
        loaded = perceiver_io.from_official(official_config("stem"), given).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in flat.items())


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("stem", {"encoder": {"num_self_attend_heads": 3}}, "encoder with num_blocks None; it must be a positive integer"),
        ("stem", {"encoder": {"num_blocks": 2}}, "num_self_attend_heads None"),
        ("stem", {"preprocessor": {"prep_type": "conv"}}, "Fourier features of bands None and max_resolution None"),
        ("stem", {"preprocessor": 3}, "config has preprocessor 3; it must be a dict"),
        ("pooled", {"preprocessor": {"prep_type": "conv", "num_bands": 2, "max_resolution": [4, 6]}}, "no conv/w"),
        (
            "pooled",
            {"preprocessor": {"prep_type": "pixels", "spatial_downsample": 2, "num_bands": 2, "max_resolution": [4, 6]}},
            "downsampling .2, 1. with prep_type 'pixels'",
        ),
        (
            "pooled",
            {"preprocessor": {"prep_type": "pixels", "sine_only": True, "num_bands": 2, "max_resolution": [4, 6]}},
            "without positions or without cosines",
        ),
        (
            "pooled",
            {"preprocessor": {"position_encoding_type": "trainable"}},
            "no pos_embs of the picture",
        ),
        ("pooled", {"encoder": {"num_blocks": 2, "num_self_attend_heads": 5}}, "must be a multiple of num_heads, 5"),
    ],
)
def test_configs_that_do_not_fit(case, changes, message):
    state = released(model_of(case), CASES[case][2])
    with pytest.raises(ValueError, match=message):
        perceiver_io.from_official({**official_config(case), **changes}, state)


def test_flat_arrays():
    state = released(model_of("stem"), CASES["stem"][2])
    expected = perceiver_io.from_official(official_config("stem"), state).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    loaded = perceiver_io.from_official(official_config("stem"), arrays).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_checkpoints_of_another_kind():
    """Every reader says what it was given and what reads that, whatever the config."""
    own = "this package's "
    kinds = {
        f"{own}PerceiverIO; PerceiverIO.load_state_dict": [
            models.load(name).state_dict() for name in ("perceiver-io-digits", "perceiver-io-autoencoder-tiny")
        ],
        f"{own}Perceiver; Perceiver.load_state_dict": [models.load("perceiver-digits").state_dict()],
        "DeepMind's Perceiver IO; models.perceiver_io.from_official": [
            load_file(GOLDEN / name / "weights.safetensors")
            for name in ("image_fourier_shared_blocks", "mlm_masked", "multimodal_autoencode")
        ],
        "DeepMind's Perceiver of 2021; models.perceiver.from_official": [
            load_file(GOLDEN / "perceiver1_iterative/weights.safetensors")
        ],
    }
    for read in (perceiver_io.from_official, perceiver_io.from_huggingface, perceiver.from_official):
        reader = f"{read.__module__.removeprefix('mmkernels.').removesuffix('.checkpoints')}.{read.__name__}"
        for message, states in kinds.items():
            for state in states:
                with pytest.raises(ValueError) as caught:
                    read({}, state)
                assert (f"state_dict is that of {message} reads it" == str(caught.value)) != message.endswith(f"; {reader}")


def test_weights_that_do_not_fit():
    config, state = official_config("stem"), released(model_of("stem"), CASES["stem"][2])
    for name in ("perceiver_encoder/~/cross_attention/mlp/linear/w", f"{STEM}/batchnorm/offset"):
        with pytest.raises(ValueError, match=f"no '{name}'"):
            perceiver_io.from_official(config, {n: t for n, t in state.items() if n != name})
    average = f"state/{STEM}/batchnorm/~/var_ema/average"
    with pytest.raises(ValueError, match=f"no '{average}'"):
        perceiver_io.from_official(config, {n: t for n, t in state.items() if n != average})
    with pytest.raises(ValueError, match="has 'something/w', which this Perceiver IO does not have"):
        perceiver_io.from_official(config, {**state, "something/w": torch.zeros(2, 2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="has cross-attentions at ..; one of them must be an encoder's"):
        perceiver_io.from_official(config, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="neither a decoder's cross_attention nor the logits"):
        perceiver_io.from_official(config, {n: t for n, t in state.items() if "decoder" not in n})
    with pytest.raises(TypeError, match="state_dict is a list"):
        perceiver_io.from_official(config, [])


def test_several_modalities_need_their_sizes():
    folder = GOLDEN / "multimodal_autoencode"
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors")
    with pytest.raises(ValueError, match="config has audio_samples None; several modalities need it"):
        perceiver_io.from_official({n: v for n, v in config.items() if n != "audio_samples"}, state)
    with pytest.raises(ValueError, match="does not fit the model: input.padding.audio has shape"):
        perceiver_io.from_official({**config, "video_bands": 2, "min_padding_size_query": 2}, state)
