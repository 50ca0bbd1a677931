"""Perceiver IO: published sizes, every task at a tiny size, files, errors. test_golden.py has the released code's numbers."""

import importlib
import json

import pytest
import torch

import mmkernels
from mmkernels import _library, models
from mmkernels.models import perceiver_io
from mmkernels.modules import set_backend
from mmkernels.modules.backend import Linear
from mmkernels.modules.postprocessors import TokenOutput

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
ENCODER = {"num_latents": 7, "latent_channels": 12, "num_blocks": 2, "layers_per_block": 2, "self_heads": 3}
FOURIER = {"kind": "fourier", "num_bands": 2}


def one_query(input, **fields):
    return {
        "input": input,
        "encoder": ENCODER,
        "queries": {"kind": "learned", "count": 1, "channels": 10},
        "output": {"kind": "classes", "num_classes": 6},
        **fields,
    }


MULTIMODAL = {
    "input": {
        "kind": "multimodal",
        "mask_probs": {"audio": 0.0, "label": 1.0},
        "modalities": {
            "label": {"kind": "vector", "channels": 5},
            "audio": {"kind": "grid", "shape": [12], "channels": 1, "patch": [3], "positions": FOURIER},
            "image": {"kind": "grid", "shape": [2, 4, 4], "patch": [1, 2, 2], "positions": FOURIER},
        },
    },
    "encoder": ENCODER,
    "queries": {
        "kind": "multimodal",
        "modalities": {
            "audio": {**FOURIER, "shape": [4]},
            "image": {**FOURIER, "shape": [2, 4, 4]},
            "label": {"kind": "learned", "count": 1, "channels": 9},
        },
    },
    "output": {
        "kind": "multimodal",
        "channels": 8,
        "modalities": {
            "audio": {"kind": "samples", "samples": 3},
            "image": {"kind": "array", "channels": 3, "shape": [2, 4, 4]},
            "label": {"kind": "classes", "num_classes": 5},
        },
    },
}
TEXT = {"kind": "tokens", "vocab_size": 11, "max_length": 6, "channels": 8}
# what a model is made of, what goes in, and the shape of what comes out
TASKS = {
    "pixels": (one_query({"kind": "grid", "shape": [5, 4], "positions": FOURIER}), (5, 4, 3), (6,)),
    "learned positions": (
        one_query(
            {
                "kind": "grid",
                "shape": [5, 4],
                "projection": 4,
                "positions": {"kind": "learned", "channels": 3, "projection": 4},
                "add_positions": True,
            }
        ),
        (5, 4, 3),
        (6,),
    ),
    "stem": (one_query({"kind": "conv_stem", "shape": [9, 14], "out_channels": 4, "positions": FOURIER}), (9, 14, 3), (6,)),
    "pooled": (
        {"input": {"kind": "array", "channels": 5}, "encoder": ENCODER, "output": {"kind": "pooled", "num_classes": 6}},
    )
    + ((8, 5), (6,)),
    "latents": (
        {"input": {"kind": "array", "channels": 5}, "encoder": ENCODER, "output": {"kind": "latents"}},
        (8, 5),
        (7, 12),
    ),
    "points": (one_query({"kind": "points", "num_bands": 2, "max_resolution": [8, 8, 8]}), (9, 3), (6,)),
    "entities": (
        {
            "input": {"kind": "array", "channels": 5},
            "encoder": ENCODER,
            "queries": {"kind": "input"},
            "output": {"kind": "array", "channels": 4},
        },
        (8, 5),
        (8, 4),
    ),
    "flow": (
        {
            "input": {"kind": "flow", "shape": [4, 6], "projection": 5, "positions": FOURIER},
            "encoder": ENCODER,
            "queries": {"kind": "input"},
            "output": {"kind": "flow", "shape": [4, 6]},
        },
        (2, 4, 6, 3),
        (4, 6, 2),
    ),
    "flow of separate frames": (
        {
            "input": {"kind": "flow", "shape": [4, 6], "projection": 5, "frames": "separate", "positions": FOURIER},
            "encoder": ENCODER,
            "queries": {"kind": "input", "count": 24},
            "output": {"kind": "flow", "shape": [4, 6]},
        },
        (2, 4, 6, 3),
        (4, 6, 2),
    ),
    "flow upsampled": (
        {
            "input": {"kind": "conv_stem", "shape": [8, 12], "channels": 6, "out_channels": 4, "positions": FOURIER},
            "encoder": ENCODER,
            "queries": {"kind": "input"},
            "output": {"kind": "flow", "shape": [8, 12], "upsample": 4},
        },
        (8, 12, 6),
        (8, 12, 2),
    ),
    "masked words": (
        {
            "input": TEXT,
            "encoder": ENCODER,
            "queries": {"kind": "learned", "count": 6, "channels": 8, "per_token": True},
            "decoder": {"num_heads": 2, "qk_channels": 4, "v_channels": 6},
            "output": {"kind": "tokens", "vocab_size": 11},
        },
        "tokens",
        (6, 11),
    ),
    "tasks": (
        {
            "input": TEXT,
            "encoder": ENCODER,
            "queries": {"kind": "learned", "count": 3, "channels": 8},
            "output": {"kind": "tasks", "tasks": {"a": 2, "b": 1, "c": 4}},
        },
        "tokens",
        {"a": (2,), "b": (1,), "c": (4,)},
    ),
    "modalities": (
        MULTIMODAL,
        {"audio": (12, 1), "image": (2, 4, 4, 3), "label": (5,)},
        {"audio": (12,), "image": (2, 4, 4, 3), "label": (5,)},
    ),
}


def model_of(task, dtype=torch.float64, **fields):
    """A model with weights at random everywhere, also where they start with zero."""
    torch.manual_seed(0)
    config = perceiver_io.PerceiverIOConfig(**{"backend": "reference", **TASKS[task][0], **fields})
    model = perceiver_io.PerceiverIO(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def input_of(task, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = TASKS[task][1]
    if shape == "tokens":
        return torch.randint(0, 11, (batch, 6), generator=generator)
    if isinstance(shape, dict):
        return {name: torch.randn(batch, *s, generator=generator, dtype=dtype) for name, s in shape.items()}
    return torch.randn(batch, *shape, generator=generator, dtype=dtype)


def total(output):
    """A number that every part of the output has its share of."""
    parts = output.values() if isinstance(output, dict) else [output]
    return sum((part * torch.linspace(0.3, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in parts)


@pytest.fixture
def products(monkeypatch):
    """The backends that `ops.linear` is called with, on a processor where it is the faster one for any number of rows."""
    found, linear = [], mmkernels.ops.linear
    monkeypatch.setattr(_library, "SLOW_MKL", True)
    monkeypatch.setattr(importlib.import_module("mmkernels.ops.linear.api"), "LEAST_ROWS", 1)

    def counted(*layer, backend):
        found.append(backend)
        return linear(*layer, backend=backend)

    monkeypatch.setattr(mmkernels.ops, "linear", counted)
    return found


# --- Published sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, millions, decimals",
    [  # counted with the released code or its port, else as published
        ("imagenet-fourier", 48.441, 3),
        ("imagenet-learned", 62.256, 3),
        ("imagenet-conv", 48.647, 3),
        ("imagenet-b-conv", 212, 0),
        ("language-sentencepiece", 223, 0),
        ("language-bytes", 201.108, 3),
        ("flow", 41.057, 3),
        ("kinetics", 19.859, 3),
    ],
)
def test_parameter_counts(name, millions, decimals):
    model = models.load(f"perceiver-io-{name}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, decimals) == millions


@pytest.mark.parametrize(
    "name, millions, within",  # of published numbers, where the sizes published beside them do not give them exactly
    [("imagenet-b", 212, 1.1), ("language-bytes++", 425, 0.7), ("audioset", 25.0, 0.1), ("audioset-mel", 88.2, 1.7)],
)
def test_parameter_counts_nearly(name, millions, within):
    model = models.load(f"perceiver-io-{name}", device="meta")
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < within


@pytest.mark.parametrize(
    "name, size, channels, query_channels",
    [
        ("imagenet-fourier", 50_176, 261, 1024),
        ("imagenet-learned", 50_176, 512, 1024),
        ("imagenet-conv", 3_136, 322, 1024),
        ("imagenet-b", 50_176, 514, 1024),
        ("language-sentencepiece", 512, 768, 768),
        ("language-bytes", 2_048, 768, 768),
        ("glue-bytes", 2_048, 768, 1280),
        ("flow", 182_528, 322, 322),
        ("flow-separate", 365_056, 451, 451),
        ("flow-conv", 11_408, 322, 322),
        ("kinetics", 52_097, 704, 1026),
        ("audioset", 13_024, 487, 1024),
        ("audioset-mel", 17_344, 487, 1024),
    ],
)
def test_published_arrays(name, size, channels, query_channels):
    model = models.load(f"perceiver-io-{name}", device="meta")
    assert (model.input.size, model.input.channels, model.queries.channels) == (size, channels, query_channels)


def test_models_of_the_first_paper():
    """Arrays as published, and how often they are read."""
    for name, size, channels, cross, blocks in (
        ("imagenet-learned", 50_176, 131, 1, 1),
        ("audioset", 13_024, 487, 2, 2),
        ("audioset-mel", 17_344, 487, 2, 2),
        ("modelnet40", None, 387, 2, 1),
    ):
        model = models.load(f"perceiver-{name}", device="meta")
        assert (model.input.size, model.input.channels) == (size, channels), name
        assert (len(model.encoder.cross), len(model.encoder.blocks)) == (cross, blocks), name
        assert model.decoder is None

    def cross(channels):
        """Parameters of a cross-attend that depend on the input's channels: four linear layers and a norm."""
        return 2 * 1024 * channels + 2 * channels**2 + 5 * channels

    learned, fourier = (
        sum(p.numel() for p in models.load(f"perceiver-imagenet-{name}", device="meta").parameters())
        for name in ("learned", "1")
    )
    assert learned - fourier == 50_176 * 128 + cross(131) - cross(261)


def test_outputs_of_kinetics():
    model = models.load("perceiver-io-kinetics", device="meta")
    assert sum(model.queries.chosen(None).values()) == 804_737
    padding = {name: p.shape[1] for name, p in model.input.padding.items()}
    assert padding == {"audio": 303, "image": 461, "label": 4}
    assert not any("modalities" in name for name, _ in model.queries.named_buffers())  # 800 thousand positions are not kept


# --- Every task --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_outputs_and_gradients(task):
    model, inputs = model_of(task), input_of(task)
    output = model(inputs)
    shape = TASKS[task][2]
    if isinstance(shape, dict):
        assert {name: tuple(part.shape) for name, part in output.items()} == {n: (2, *s) for n, s in shape.items()}
    else:
        assert output.shape == (2, *shape)
    total(output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        hidden = name.endswith("key.bias") or (
            task == "modalities" and name in ("input.padding.label", "input.mask_tokens.audio")
        )
        assert hidden or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("task", TASKS)
def test_backends_agree(task, backend):
    expected, own = model_of(task), model_of(task, torch.float32, backend=backend)
    own.load_state_dict(expected.state_dict())
    results = []
    for model, dtype in ((expected, torch.float64), (own, torch.float32)):
        output = model(_cast(input_of(task, dtype=torch.float32), dtype))
        total(output).backward()
        parts = output if isinstance(output, dict) else {"": output}
        results.append({**parts, **{n: p.grad for n, p in model.named_parameters()}})
    for name, value in results[0].items():
        error = float((results[1][name].detach().double() - value.detach()).abs().max())
        assert error <= 3e-4 * max(1.0, float(value.abs().max())), (name, error)


@pytest.mark.parametrize("task", TASKS)
def test_linear_layers_follow_the_backend(task, products):
    """`ops.linear` computes them where it is faster or named, plain PyTorch under "eager", however the backend is set."""
    model, inputs = model_of(task, torch.float32, backend="auto"), input_of(task, dtype=torch.float32)
    called = []
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda *_: called.append(None))
    found = {}
    for backend in ("auto", "reference", "eager"):
        set_backend(model, backend)
        products.clear(), called.clear()
        found[backend] = total(model(inputs)).item()
        expected = len(called) + isinstance(model.output, TokenOutput)
        assert expected > 0 and products == [backend] * (0 if backend == "eager" else expected)
        again = perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**{**TASKS[task][0], "backend": backend}))
        again.load_state_dict(model.state_dict())
        products.clear()
        assert total(again.eval()(inputs)).item() == found[backend]
        assert products == [backend] * (0 if backend == "eager" else expected)
    for backend in ("auto", "eager"):
        assert found[backend] == pytest.approx(found["reference"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_examples_of_a_batch_do_not_meet(task):
    model, inputs = model_of(task), input_of(task, batch=3)
    first = {n: t[:1] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    whole, alone = model(inputs), model(first)
    if not isinstance(whole, dict):
        whole, alone = {"": whole}, {"": alone}
    for name in whole:
        torch.testing.assert_close(whole[name][:1], alone[name])


@pytest.mark.parametrize("task", TASKS)
def test_autocast_and_half_precision(task):
    """Autocast, and parameters in bfloat16, are as near to float64 as plain PyTorch is in them."""
    inputs = input_of(task, dtype=torch.float32)
    exact = model_of(task)(_cast(inputs, torch.float64))
    errors = {}
    for backend in ("eager", "auto"):
        model = model_of(task, torch.float32, backend=backend)
        short = model_of(task, torch.bfloat16, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [model(inputs)]
        outputs.append(short(_cast(inputs, torch.bfloat16)))
        errors[backend] = [_distance(output, exact) for output in outputs]
    assert all(own <= 2 * plain + 1e-2 for own, plain in zip(errors["auto"], errors["eager"], strict=True)), errors


def _cast(inputs, dtype):
    if isinstance(inputs, dict):
        return {name: t.to(dtype) for name, t in inputs.items()}
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def _distance(output, exact):
    pairs = [(output[n], t) for n, t in exact.items()] if isinstance(exact, dict) else [(output, exact)]
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1)) for a, b in pairs)


@pytest.mark.parametrize("task", ["modalities"])
def test_compiles_as_a_whole(task):
    """What stands around the attentions, which have tests of their own for it."""
    encoder = {**ENCODER, "num_blocks": 1, "layers_per_block": 0}
    model = model_of(task, torch.float32, encoder=encoder, backend="eager")
    inputs, options = input_of(task, dtype=torch.float32), {}
    if task == "modalities":
        options = {"masks": {"label": torch.ones(2, 1, dtype=torch.bool), "audio": torch.zeros(2, 4, dtype=torch.bool)}}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert _distance(compiled(inputs, **options), model(inputs, **options)) < 1e-4


@pytest.mark.parametrize("task", ["pixels", "learned positions", "stem", "masked words", "tasks", "flow", "modalities"])
def test_made_without_memory(task):
    """On the meta device first, then anywhere: everything is written by reset_parameters, buffers too."""
    config = perceiver_io.PerceiverIOConfig(**TASKS[task][0])
    model = perceiver_io.PerceiverIO(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    model.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    torch.manual_seed(0)
    fresh = perceiver_io.PerceiverIO(config)
    for name, tensor in model.named_parameters():
        other = fresh.get_parameter(name)
        assert tensor.any() == other.any(), name
        assert tensor.numel() < 50 or abs(float(tensor.std() / other.std().clamp(min=1e-9)) - 1) < 0.5 or not tensor.std(), (
            name
        )


def test_a_flow_starts_with_zero():
    config = perceiver_io.PerceiverIOConfig(**TASKS["flow"][0])
    assert not perceiver_io.PerceiverIO(config)(input_of("flow", dtype=torch.float32)).any()


def test_flow_is_divided():
    model = model_of("flow")
    output = model(input_of("flow"))
    model.output.scale = 1.0
    torch.testing.assert_close(model(input_of("flow")), output * 100)


def test_padding_of_texts():
    """Padding is neither read nor asked: short texts have the logits that they have alone, the rest those of no attention."""
    model = model_of("masked words")
    ids = input_of("masked words")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 4:] = False
    output = model(ids, key_mask=mask)
    torch.testing.assert_close(output[:1, :4], model(ids[:1, :4]))
    assert torch.equal(output[0, 4], output[0, 5])
    changed = ids.clone()
    changed[0, 4:] = 0
    assert torch.equal(model(changed, key_mask=mask), output)
    places = torch.tensor([1, 5])  # the second one of them is behind the mask of the first row
    torch.testing.assert_close(model(ids, key_mask=mask, points=places), output[:, places])
    with pytest.raises(IndexError, match="points has numbers from 0 to 99"):
        model(ids, key_mask=mask, points=torch.tensor([0, 99]))
    asked = model_of("masked words", mask_queries=False)(ids, key_mask=mask)
    torch.testing.assert_close(asked[mask], output[mask])
    assert not torch.equal(asked[0, 4], asked[0, 5])


def test_some_tasks():
    model, ids = model_of("tasks"), input_of("tasks")
    every, some = model(ids), model(ids, tasks=["c", "a"])
    assert list(some) == ["c", "a"]
    for name in some:
        torch.testing.assert_close(some[name], every[name])
    with pytest.raises(ValueError, match="tasks is .'d'.; it must be a list of one or more of .'a', 'b', 'c'"):
        model(ids, tasks=["d"])


def test_outputs_in_chunks():
    """Sub-sampled outputs are what they are among all, whatever they are decoded with."""
    model, inputs = model_of("modalities"), input_of("modalities")
    every = {"audio": torch.arange(4), "image": torch.arange(32), "label": None}
    whole = model(inputs, points=every)
    for chunk_size in (1, 5, 32, 1000):
        chunks = model.reconstruct(inputs, chunk_size=chunk_size)
        assert {name: part.shape for name, part in chunks.items()} == {name: part.shape for name, part in whole.items()}
        for name in whole:
            torch.testing.assert_close(chunks[name], whole[name])
    some = model(inputs, points={"audio": torch.tensor([2]), "image": torch.tensor([31, 0]), "label": torch.arange(0)})
    assert set(some) == {"audio", "image"}
    torch.testing.assert_close(some["image"][:, 1], whole["image"][:, 0, 0, 0])
    torch.testing.assert_close(some["audio"], whole["audio"][:, 6:9])
    # All at once they lie on the grid that reaches both ends.
    assert not torch.allclose(model(inputs)["image"], whole["image"])


def test_some_queries():
    model, inputs = model_of("flow"), input_of("flow")
    whole = model(inputs).flatten(1, 2)
    points = torch.tensor([23, 0, 7])
    torch.testing.assert_close(model(inputs, points=points), whole[:, points])


def test_masked_modalities():
    model, inputs = model_of("modalities"), input_of("modalities")
    other = {**inputs, "label": torch.randn(2, 5, dtype=torch.float64)}
    assert torch.equal(model(inputs)["image"], model(other)["image"])  # its probability is 1
    seen = {"label": torch.zeros(2, 1, dtype=torch.bool)}
    assert not torch.equal(model(inputs, masks=seen)["image"], model(other, masks=seen)["image"])
    model.input.mask_probs["label"] = 0.5
    outputs = {float(model(inputs)["label"][0, 0]) for _ in range(20)}
    assert len(outputs) == 2


@pytest.mark.parametrize("task", ["pixels", "entities", "masked words"])
def test_key_mask_hides_elements(task):
    model, inputs = model_of(task), input_of(task)
    size = model.input.size or inputs.shape[1]
    mask = torch.ones(2, size, dtype=torch.bool)
    mask[:, size - 2 :] = False
    changed = inputs.clone().flatten(1, 2) if task == "pixels" else inputs.clone()
    changed[:, size - 2 :] = 7 if task == "masked words" else float("nan")
    options = {} if task == "masked words" else {"query_mask": mask if task == "entities" else None}
    outputs = [model(x, key_mask=mask, **options) for x in (inputs, changed)]
    if task == "entities":
        outputs = [output[:, : size - 2] for output in outputs]
    assert torch.equal(*outputs)


def test_dropout_is_the_encoders_and_for_training():
    model, inputs = model_of("pixels", dropout=0.5), input_of("pixels")
    torch.testing.assert_close(model(inputs), model_of("pixels")(inputs))
    assert not torch.equal(model.train()(inputs), model(inputs))


# --- Files and errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_save_and_load(task, tmp_path):
    model = model_of(task, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    inputs = input_of(task, dtype=torch.float32)
    ours, theirs = model(inputs), loaded.eval()(inputs)
    if not isinstance(ours, dict):
        ours, theirs = {"": ours}, {"": theirs}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_overrides():
    model = models.load("perceiver-io-digits", backend="eager", output={"kind": "classes", "num_classes": 3})
    assert model.decoder.cross.attention.backend == "eager" and model.decoder.output.out_features == 3


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("pixels", {"input": {"kind": "picture"}}, "input is .*'kind' of 'array', 'conv_stem'"),
        ("pixels", {"input": {"kind": "grid", "shape": [3, 0]}}, "input 'grid': shape is"),
        (
            "pixels",
            {"input": {"kind": "grid", "shape": [3], "size": 3}},
            "input 'grid' has an unknown 'size'; allowed are shape",
        ),
        ("pixels", {"input": {"kind": "grid"}}, "input 'grid' has no 'shape'"),
        ("pixels", {"input": {"kind": "grid", "shape": [4, 4], "patch": [3, 1]}}, "patch is .3, 1.; it must have one size"),
        ("pixels", {"input": 3}, "input is 3; it must be a dict"),
        ("pixels", {"encoder": {"num_latents": 0}}, "encoder: num_latents is 0"),
        (
            "pixels",
            {"encoder": {**ENCODER, "self_heads": 5}},
            "encoder: qk_channels is 12; it must be a multiple of num_heads, 5",
        ),
        ("pixels", {"encoder": {"latents": 3}}, "encoder has an unknown 'latents'; allowed are num_latents"),
        ("pixels", {"encoder": {"backend": "cpp"}}, "encoder has an unknown 'backend'"),
        ("pixels", {"queries": None}, "queries is None; the output 'classes' needs queries"),
        ("pixels", {"output": {"kind": "latents"}}, "the output 'latents' reads the latents and takes no queries"),
        ("pixels", {"output": {"kind": "tokens", "vocab_size": 11}}, "takes the table of an input 'tokens'"),
        ("pixels", {"decoder": {"heads": 3}}, "decoder has an unknown 'heads'"),
        ("pixels", {"activation": "tanh"}, "activation is 'tanh'; allowed are 'gelu_tanh', 'gelu', 'relu', 'silu'"),
        ("pixels", {"dropout": 1.0}, "dropout is 1.0"),
        ("pixels", {"eps": 0}, "eps is 0; it must be a positive number"),
        ("pixels", {"backend": "gpu"}, "backend is 'gpu'"),
        ("tasks", {"queries": {"kind": "learned", "count": 2, "channels": 8}}, "as many as the output's tasks, 3"),
        ("modalities", {"queries": {"kind": "input"}}, "queries and output must be multimodal both"),
    ],
)
def test_configs_that_do_not_fit(task, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model_of(task, **changes)
    model_of(task, torch.float32).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(models.InputError, match=f"config.json: .*{message}"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "task, inputs, error, message",
    [
        (
            "pixels",
            torch.zeros(2, 4, 5, 3).double(),
            ValueError,
            r"inputs has shape \(2, 4, 5, 3\); it must be \(B, 5, 4, 3\) or",
        ),
        (
            "pixels",
            torch.zeros(2, 5, 4, 3),
            TypeError,
            "inputs has dtype torch.float32; it must be the module's, torch.float64",
        ),
        (
            "pixels",
            torch.zeros(2, 5, 4, 3).long(),
            TypeError,
            "inputs has dtype torch.int64; it must be a floating-point tensor",
        ),
        ("pixels", [1.0], TypeError, "inputs is a list; it must be a tensor"),
        ("latents", torch.zeros(2, 5).double(), ValueError, r"it must be \(B, M, 5\)"),
        ("masked words", torch.zeros(2, 7).long(), ValueError, "T from 1 to 6"),
        ("masked words", torch.full((2, 6), 11), IndexError, r"ids from 11 to 11; they must be in \[0, 11\)"),
        ("masked words", torch.zeros(2, 6), TypeError, "inputs is a torch.float32"),
        ("modalities", {"audio": torch.zeros(2, 12, 1)}, ValueError, "it must be a dict with .'audio', 'image', 'label'"),
    ],
)
def test_inputs_that_do_not_fit(task, inputs, error, message):
    with pytest.raises(error, match=message):
        model_of(task)(inputs)


def test_arguments_of_other_models():
    pixels, modalities = model_of("pixels"), model_of("modalities")
    for options, message in (
        ({"tasks": ["a"]}, "only an output of the kind 'tasks'"),
        ({"masks": {}}, "masks is for a multimodal input"),
        ({"points": torch.tensor([3])}, r"points has numbers from 3 to 3; they must be in \[0, 1\)"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask has shape \(2, 3\)"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            pixels(input_of("pixels"), **options)
    with pytest.raises(ValueError, match="reconstruct is for a model with a multimodal output"):
        pixels.reconstruct(input_of("pixels"))
    with pytest.raises(ValueError, match="points is .*; it must be a dict with some of"):
        modalities(input_of("modalities"), points={"video": None})
    with pytest.raises(ValueError, match="points are for a model with queries"):
        model_of("latents")(input_of("latents"), points=torch.tensor([0]))
    with pytest.raises(ValueError, match="points is not for an output of the kind 'tasks'"):
        model_of("tasks")(input_of("tasks"), points=torch.tensor([0]))
    with pytest.raises(ValueError, match="tokens is None"):
        model_of("flow").decode(torch.zeros(1, 7, 12, dtype=torch.float64))
