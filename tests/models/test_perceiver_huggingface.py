"""Perceiver IO against the Perceiver classes of Hugging Face's library: weights in both directions, outputs, gradients."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

from mmkernels import models
from mmkernels.models import official, perceiver, perceiver_io

transformers.logging.set_verbosity_error()
SIZES = {
    "num_latents": 6,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "num_labels": 5,
}
TEXT = {"d_model": 32, "vocab_size": 20, "max_position_embeddings": 9, "qk_channels": 8, "v_channels": 16}
CASES = {  # class: the config's fields, our options, shape of the input, batch first
    "PerceiverForMaskedLM": (TEXT | {"num_cross_attention_heads": 4}, {}, "tokens"),
    "PerceiverForSequenceClassification": (TEXT, {}, "tokens"),
    "PerceiverForImageClassificationLearned": ({"image_size": 6}, {}, (3, 6, 6)),
    "PerceiverForImageClassificationFourier": ({}, {"image_shape": (7, 5)}, (3, 7, 5)),
    "PerceiverForImageClassificationConvProcessing": ({}, {"image_shape": (31, 26)}, (3, 31, 26)),
    "PerceiverForOpticalFlow": ({"train_size": [5, 8]}, {}, (2, 27, 5, 8)),
    "PerceiverForMultimodalAutoencoding": (
        {
            "num_frames": 2,
            "image_size": 4,
            "audio_samples_per_frame": 24,
            "samples_per_patch": 4,
            "output_shape": [1, 2, 16, 16],
            "output_num_channels": 12,
            "_label_trainable_num_channels": 10,
        },
        {},
        {"audio": (48, 1), "image": (2, 3, 16, 16), "label": (5,)},
    ),
    "PerceiverModel": ({"d_model": 7}, {}, (11, 7)),
}
POINTS = {"audio": torch.tensor([0, 3, 11]), "image": torch.tensor([0, 7, 300, 511]), "label": None}


def library_model(kind, **changes):
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(**{**SIZES, **CASES[kind][0]}, architectures=[kind], **changes)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "layernorm" in name and name.endswith("weight"):
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model.double().eval()


def input_of(kind):
    generator = torch.Generator().manual_seed(1)
    shape = CASES[kind][2]
    if shape == "tokens":
        return torch.randint(0, 20, (2, 9), generator=generator)
    if isinstance(shape, dict):
        return {n: torch.randn(2, *s, generator=generator, dtype=torch.float64) for n, s in shape.items()}
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def channels_last(kind, inputs):
    if isinstance(inputs, dict):
        return inputs | {"image": inputs["image"].movedim(2, -1)}
    return inputs.movedim(-3, -1) if "Image" in kind or "Flow" in kind else inputs


def ours_of(kind, theirs, **options):
    return perceiver_io.from_huggingface(
        theirs.config.to_dict(), theirs.state_dict(), **CASES[kind][1], **{"backend": "reference", **options}
    ).eval()


def outputs(kind, theirs, ours, **mask):
    inputs = input_of(kind)
    extra = {"subsampled_output_points": POINTS} if isinstance(inputs, dict) else {}
    expected = theirs(inputs=inputs, attention_mask=mask.get("key_mask"), **extra)
    expected = expected.last_hidden_state if kind == "PerceiverModel" else expected.logits
    points = {"points": POINTS} if extra else {}
    return expected, ours(channels_last(kind, inputs), **points, **mask)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"])
@pytest.mark.parametrize("kind", CASES)
def test_same_outputs_and_gradients(kind, activation):
    theirs = library_model(kind, hidden_act=activation)
    ours = ours_of(kind, theirs)
    expected, actual = outputs(kind, theirs, ours)
    if not isinstance(expected, dict):
        expected, actual = {"": expected}, {"": actual}
    # The library makes positions in float32, and so by other roundings.
    bound = 1e-9 if kind in ("PerceiverForMaskedLM", "PerceiverForSequenceClassification", "PerceiverModel") else 2e-4
    bound = 1e-9 if "Learned" in kind else bound
    weights = {n: torch.randn_like(t) for n, t in expected.items()}
    for name in expected:
        assert actual[name].shape == expected[name].shape
        torch.testing.assert_close(actual[name], expected[name], rtol=bound, atol=bound)
    for part in (expected, actual):
        sum((part[name] * weights[name]).sum() for name in part).backward()
    named = perceiver_io.to_huggingface(ours)
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = gradients[perceiver_io.checkpoints._hf_name(name, kind)]
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.view_as(parameter)
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, rtol=bound, atol=bound)
    assert named.keys() == theirs.state_dict().keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("kind", ["PerceiverForMaskedLM", "PerceiverForSequenceClassification", "PerceiverModel"])
def test_masks(kind):
    theirs = library_model(kind)
    length = 11 if kind == "PerceiverModel" else 9
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 5:] = False
    expected, actual = outputs(kind, theirs, ours_of(kind, theirs), key_mask=mask)
    torch.testing.assert_close(actual, expected)


def test_files(tmp_path):
    """A folder as the library saves it becomes one of ours."""
    theirs = library_model("PerceiverForMaskedLM").float()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(models.InputError, match="Hugging Face's library.*; models.perceiver_io.from_huggingface reads it"):
        models.load(tmp_path / "theirs")
    ours = perceiver_io.from_huggingface(*official.read_huggingface(tmp_path / "theirs")).eval()
    assert not ours.config.mask_queries and ours.config.activation == "gelu"
    ours.save_pretrained(tmp_path / "ours")
    ids = input_of("PerceiverForMaskedLM")
    expected = theirs(inputs=ids).logits
    torch.testing.assert_close(models.load(tmp_path / "ours").eval()(ids), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size > 0
    save_file(perceiver_io.to_huggingface(ours), tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    again = transformers.PerceiverForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(again(inputs=ids).logits, expected)


def test_bare_weights_of_a_task():
    """With or without the prefix of a task's class."""
    theirs = library_model("PerceiverForSequenceClassification")
    state = {name.removeprefix("perceiver."): tensor for name, tensor in theirs.state_dict().items()}
    ours = perceiver_io.from_huggingface(theirs.config.to_dict(), state)
    assert torch.equal(ours.encoder.latents, theirs.perceiver.embeddings.latents)


def test_a_missing_entry_does_not_make_it_another_class():
    """A text model without its bias is a broken text model, whether or not the config names the class."""
    for kind in CASES:
        theirs = library_model(kind)
        config = {**theirs.config.to_dict(), "architectures": None}
        state = theirs.state_dict()
        for missing in state:
            if missing.endswith("num_batches_tracked") or "latents" in missing:
                continue
            rest = {name: tensor for name, tensor in state.items() if name != missing}
            assert perceiver_io.huggingface_kind(rest) == kind, missing
        with pytest.raises(ValueError, match=f"no '{missing}', which a {kind} has"):
            perceiver_io.from_huggingface(config, rest, **CASES[kind][1])


def test_checkpoints_of_another_kind():
    theirs = {kind: library_model(kind) for kind in CASES}
    for kind, model in theirs.items():
        assert perceiver_io.huggingface_kind(model.state_dict()) == kind
    flow, words = theirs["PerceiverForOpticalFlow"], theirs["PerceiverForMaskedLM"]
    with pytest.raises(ValueError, match="state_dict is that of a PerceiverForOpticalFlow, not of a PerceiverForMaskedLM"):
        perceiver_io.from_huggingface(words.config.to_dict(), flow.state_dict())
    with pytest.raises(ValueError, match="not of a PerceiverForMaskedLM"):
        perceiver_io.from_huggingface(flow.config.to_dict(), flow.state_dict(), kind="PerceiverForMaskedLM")
    with pytest.raises(ValueError, match="kind is 'Perceiver'; allowed are 'PerceiverForMaskedLM'"):
        perceiver_io.from_huggingface(flow.config.to_dict(), flow.state_dict(), kind="Perceiver")
    for read in (perceiver_io.from_official, perceiver.from_official):
        for model in theirs.values():
            with pytest.raises(
                ValueError, match="that of Hugging Face's Perceiver; models.perceiver_io.from_huggingface reads"
            ):
                read({}, model.state_dict())
    with pytest.raises(ValueError, match="model_type 'bert'; it must be 'perceiver'"):
        perceiver_io.from_huggingface({"model_type": "bert"}, {})
    with pytest.raises(ValueError, match="no 'embeddings.latents'.*'encoder/w'"):
        perceiver_io.from_huggingface({}, {"encoder/w": torch.zeros(1)})
    config, state = words.config.to_dict(), words.state_dict()
    with pytest.raises(ValueError, match="hidden_act 'mish'; allowed are 'gelu'"):
        perceiver_io.from_huggingface(config | {"hidden_act": "mish"}, state)
    with pytest.raises(ValueError, match="no 'perceiver.encoder.self_attends.2"):
        perceiver_io.from_huggingface(config | {"num_self_attends_per_block": 3}, state)
    with pytest.raises(ValueError, match="has 'perceiver.encoder.self_attends.1.*which a PerceiverForMaskedLM of this config"):
        perceiver_io.from_huggingface(config | {"num_self_attends_per_block": 1}, state)
    with pytest.raises(ValueError, match="an input 'points' and an output 'latents', as no class"):
        config = perceiver_io.PerceiverIOConfig(
            input={"kind": "points", "num_bands": 1}, encoder={"latent_channels": 8}, output={"kind": "latents"}
        )
        perceiver_io.to_huggingface(perceiver_io.PerceiverIO(config, device="meta"))
