"""The 2021 Perceiver: an independent formula, published parameter counts, files, training on a handful of examples."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmkernels import _library, models
from mmkernels.models import perceiver

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])


def tiny(**changes):
    fields = {
        "input_shape": (5, 4),
        "input_channels": 3,
        "num_classes": 6,
        "num_latents": 7,
        "latent_channels": 12,
        "num_cross_attends": 3,
        "layers_per_block": 2,
        "self_heads": 3,
        "num_bands": 2,
        "backend": "reference",
    }
    return perceiver.PerceiverConfig(**{**fields, **changes})


def randomised(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = perceiver.Perceiver(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


# --- Against the formulas, written once more ------------------------------------------------------------------------------


def official_forward(weights, crosses, towers, x, self_heads):
    """The loop of the paper over Haiku-named weights; `crosses` and `towers` name the modules in calling order."""

    def norm(name, t):
        return F.layer_norm(t, t.shape[-1:], weights[f"{name}/scale"], weights[f"{name}/offset"], 1e-5)

    def linear(name, t):
        return t @ weights[f"{name}/w"] + weights[f"{name}/b"]

    def attend(name, a, b, heads):
        q, k, v = (linear(f"{name}/linear{s}", t).unflatten(-1, (heads, -1)) for s, t in (("", a), ("_1", b), ("_2", b)))
        p = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}/linear_3", torch.einsum("bhnm,bmhd->bnhd", p, v).flatten(2))

    def mlp(name, t):
        return linear(f"{name}/linear_1", F.gelu(linear(f"{name}/linear", t), approximate="tanh"))

    z = weights["latents/pos_embs"].expand(x.shape[0], -1, -1)
    for cross, tower in zip(crosses, towers, strict=True):
        z = z + attend(f"{cross}/attention", norm(f"{cross}/layer_norm", z), norm(f"{cross}/layer_norm_1", x), 1)
        z = z + mlp(f"{cross}/mlp", norm(f"{cross}/layer_norm_2", z))
        for layer in tower:
            n = norm(f"{layer}/layer_norm", z)
            z = z + attend(f"{layer}/attention", n, n, self_heads)
            z = z + mlp(f"{layer}/mlp", norm(f"{layer}/layer_norm_1", z))
    return linear("projection/~/logits", z.mean(1))


def official_weights(crosses, layers, *, latents, channels, width, classes, widening=1):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4

    weights = {"latents/pos_embs": draw(latents, channels)}

    def linear(name, a, b):
        weights[f"{name}/w"], weights[f"{name}/b"] = draw(a, b), draw(b)

    def norm(name, size):
        weights[f"{name}/scale"], weights[f"{name}/offset"] = 1 + draw(size), draw(size)

    def mlp(name):
        linear(f"{name}/mlp/linear", channels, widening * channels)
        linear(f"{name}/mlp/linear_1", widening * channels, channels)

    for name in crosses:
        for suffix, sizes in {
            "": (channels, width),
            "_1": (width, width),
            "_2": (width, width),
            "_3": (width, channels),
        }.items():
            linear(f"{name}/attention/linear{suffix}", *sizes)
        for suffix, size in {"": channels, "_1": width, "_2": channels}.items():
            norm(f"{name}/layer_norm{suffix}", size)
        mlp(name)
    for name in layers:
        for suffix in ("", "_1", "_2", "_3"):
            linear(f"{name}/attention/linear{suffix}", channels, channels)
        for suffix in ("", "_1"):
            norm(f"{name}/layer_norm{suffix}", channels)
        mlp(name)
    linear("projection/~/logits", channels, classes)
    return weights


def fourier(shape, bands, resolution):
    """Point by point, with the standard library alone."""
    rows = []
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)).tolist():
        p = [float(torch.tensor(-1 + 2 * i / (n - 1) if n > 1 else -1.0)) for i, n in zip(index, shape, strict=True)]
        waves = [
            math.pi * (1 + k * (mu / 2 - 1) / (bands - 1) if bands > 1 else 1.0) * x
            for x, mu in zip(p, resolution, strict=True)
            for k in range(bands)
        ]
        rows.append(p + [math.sin(w) for w in waves] + [math.cos(w) for w in waves])
    return torch.tensor(rows, dtype=torch.float64)


SHARINGS = {
    "one cross-attend": (["cross_first"], ["latent_0"], 1, 1),
    "after the first": (["cross_first", "cross_shared"], ["latent_0", "latent_1"], 4, 2),
    "everywhere": (["cross_shared"], ["latent_0"], 3, 1),
    "nowhere": ([f"cross_{t}" for t in range(11)], [f"latent_{i}" for i in range(22)], 11, 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "shape, resolution", [((13,), (40,)), ((3, 4), (3, 4)), ((2, 3, 4), (8, 6, 4))], ids=["1d", "2d", "3d"]
)
def test_official_weights_against_the_formulas(backend, sharing, shape, resolution):
    crosses, layers, attends, per_block = SHARINGS[sharing]
    bands, content = 3, 2
    width = content + len(shape) * (2 * bands + 1)
    weights = official_weights(crosses, layers, latents=5, channels=12, width=width, classes=4, widening=2)
    config = {
        "num_cross_attends": attends,
        "layers_per_block": per_block,
        "self_heads": 3,
        "num_bands": bands,
        "max_resolution": list(resolution),
        "index_shape": list(shape),
    }
    dtype = torch.float32 if backend == "cpp" else torch.float64
    model = perceiver.from_official(config, {name: t.to(dtype) for name, t in weights.items()}, backend=backend)
    x = torch.randn(2, *shape, content, dtype=dtype)
    called = [crosses[min(t, len(crosses) - 1)] for t in range(attends)]
    towers = [[layers[(t * per_block + i) % len(layers)] for i in range(per_block)] for t in range(attends)]
    array = torch.cat([x.double().flatten(1, -2), fourier(shape, bands, resolution).expand(2, -1, -1)], -1)
    expected = official_forward(weights, called, towers, array, 3)
    # float64: the features are equal to the bit or nearly; float32: 22 blocks deep at most.
    torch.testing.assert_close(
        model(x).double(),
        expected,
        rtol=1e-9 if dtype == torch.float64 else 2e-4,
        atol=1e-9 if dtype == torch.float64 else 2e-4,
    )
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())


def test_nested_and_flat_arrays():
    """{module: {parameter: array}}, as the released files are, alone or as "params", and arrays by whole names."""
    weights = official_weights(["cross_first"], ["latent_0"], latents=5, channels=12, width=9, classes=4)
    config = {"num_cross_attends": 1, "layers_per_block": 1, "self_heads": 3, "num_bands": 1, "max_resolution": [3, 4]}
    expected = perceiver.from_official(config, weights).state_dict()
    nested = {}
    for name, tensor in weights.items():
        module, _, parameter = name.rpartition("/")
        nested.setdefault(module, {})[parameter] = tensor.numpy()
    for given in (nested, {"params": nested}, {name: tensor.numpy() for name, tensor in weights.items()}):
        loaded = perceiver.from_official(config, given).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_official_names_are_checked():
    weights = official_weights(["cross_first"], ["latent_0"], latents=5, channels=12, width=9, classes=4)
    config = {"num_cross_attends": 1, "layers_per_block": 1, "self_heads": 3, "num_bands": 1, "max_resolution": [3, 4]}
    with pytest.raises(ValueError, match="no 'num_bands'"):
        perceiver.from_official({k: v for k, v in config.items() if k != "num_bands"}, weights)
    with pytest.raises(ValueError, match="decoder/w"):
        perceiver.from_official(config, {**weights, "decoder/w": torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(ValueError, match="layer_norm/scale"):
        perceiver.from_official(config, {k: v for k, v in weights.items() if k != "cross_first/layer_norm/scale"})
    with pytest.raises(ValueError, match="3 cross-attends|latent layers"):
        perceiver.from_official({**config, "layers_per_block": 3}, weights)


# --- Published sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, millions",
    [("perceiver-imagenet", 44.9), ("perceiver-imagenet-1", 42.1), ("perceiver-imagenet-unshared", 326.2)],
)
def test_published_parameter_counts(name, millions):
    model = models.load(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.positions.channels + model.config.input_channels == 261


def test_blocks_without_a_cross_attend():
    """Two cross-attends over four blocks: in front of the first and the third."""
    model = randomised(tiny(num_cross_attends=2, num_blocks=4))
    calls = []
    for i, module in enumerate(model.cross):
        module.register_forward_hook(lambda *_, i=i: calls.append(f"cross{i}"))
    model.blocks[0][0].register_forward_hook(lambda *_: calls.append("block"))
    model(torch.randn(2, 5, 4, 3, dtype=torch.float64))
    assert calls == ["cross0", "block", "block", "cross1", "block", "block"]


def test_initial_weights():
    torch.manual_seed(0)
    model = perceiver.Perceiver(tiny(latent_channels=240, num_latents=300, self_heads=8))
    assert torch.equal(model.head.weight, torch.zeros_like(model.head.weight))
    assert model.latents.abs().max() <= 0.04 and abs(model.latents.std() - 0.02 * 0.8796) < 1e-3
    weight = model.blocks[0][0].mlp[0].weight
    assert abs(weight.var() * 240 - 1) < 0.02  # variance 1 / fan_in
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, torch.nn.Linear))


# --- A model like any other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_parameter_has_a_gradient(backend):
    model = randomised(tiny(backend=backend), torch.float32)
    model(torch.randn(2, 5, 4, 3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # The key bias moves all scores of a row alike: its gradient is zero.
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_overfits_a_handful(backend):
    torch.manual_seed(0)
    model = perceiver.Perceiver(tiny(backend=backend))
    inputs, labels = torch.randn(6, 5, 4, 3), torch.arange(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and (model(inputs).argmax(-1) == labels).all()


def test_key_mask_hides_elements():
    model = randomised(tiny())
    inputs = torch.randn(2, 20, 3, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 15:] = False
    poisoned = inputs.clone()
    poisoned[:, 15:] = float("nan")
    assert torch.equal(model(inputs, key_mask=mask), model(poisoned, key_mask=mask))
    assert not torch.equal(model(inputs, key_mask=mask), model(inputs))


def test_flat_and_grid_inputs_are_the_same():
    model = randomised(tiny())
    inputs = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert torch.equal(model(inputs), model(inputs.flatten(1, 2)))
    with pytest.raises(ValueError, match=r"inputs has shape \(2, 4, 5, 3\)"):
        model(inputs.transpose(1, 2))


# --- Files ----------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model = randomised(tiny(max_resolution=(9, 9), share_cross="none"), torch.float32)
    model.save_pretrained(tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    inputs = torch.randn(2, 5, 4, 3)
    assert torch.equal(loaded(inputs), model(inputs))
    assert models.load(tmp_path / "m", backend="eager").cross[0].attention.backend == "eager"
    assert models.load(tmp_path / "m", dtype=torch.float64).head.weight.dtype == torch.float64
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


def test_unknown_names_and_fields():
    with pytest.raises(models.InputError, match="known are .*perceiver-digits"):
        models.load("perceiver-digit")
    with pytest.raises(models.InputError, match="unknown field 'latents'"):
        models.load("perceiver-digits", latents=3)
    with pytest.raises(models.InputError, match="num_latents is 0"):
        models.load("perceiver-digits", num_latents=0)
    with pytest.raises(models.InputError, match="latent_channels is 64; it must be a multiple of self_heads, 7"):
        models.load("perceiver-digits", self_heads=7)
    with pytest.raises(models.InputError, match="backend is 'gpu'"):
        models.load("perceiver-digits", backend="gpu")


def test_truncated_and_foreign_files(tmp_path):
    randomised(tiny(), torch.float32).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, fields = weights.read_bytes(), json.loads(config.read_text())
    for content in (b"", whole[:5], whole[:100], whole[:-1], b"PK\x03\x04" + whole):
        weights.write_bytes(content)
        with pytest.raises(models.InputError, match="model.safetensors"):
            models.load(tmp_path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "more": torch.zeros(1)}, weights)
    with pytest.raises(models.InputError, match="more is unknown"):
        models.load(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "latents"}, weights)
    with pytest.raises(models.InputError, match="latents is missing"):
        models.load(tmp_path)
    save_file(tensors, weights)
    for wrong, message in (
        ({"num_latents": 8}, "latents has shape"),
        ({"system": "bert"}, "allowed are .*mbt, perceiver"),
        ({"num_bands": "x"}, "num_bands"),
        ({"input_shape": 5}, "config.json: input_shape is 5; it must be a tuple"),
        ({"input_shape": [3, 0]}, "input_shape is"),
        ({"max_resolution": [1.0]}, "max_resolution is"),
        ({"cross_heads": 0}, "cross_heads is 0"),
        ({"cross_heads": 1000}, "cross_heads is 1000; it must divide"),
        ({"self_v_channels": 1.5}, "self_v_channels is 1.5"),
        ({"eps": 0}, "eps is 0; it must be a positive number"),
        ({"share_blocks": "no"}, "share_blocks is 'no'"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
        ({"num_latents": 10**15}, "does not fit into memory"),
        ({"colour": 1}, "unknown field"),
    ):
        config.write_text(json.dumps({**fields, **wrong}))
        with pytest.raises(models.InputError, match=message):
            models.load(tmp_path)
    for text in ("", "[1]", '{"system": "perceiver", "num_la'):
        config.write_text(text)
        with pytest.raises(models.InputError, match="config.json"):
            models.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = randomised(tiny(), torch.float32)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with torch.no_grad():
        model.latents.add_(1)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("survived", [0, 1])
def test_a_crash_while_files_are_renamed_leaves_no_mixture(tmp_path, monkeypatch, survived):
    """The configs differ where the weights' shapes do not: a mixture would load and compute something else."""
    models.load("perceiver-digits", num_classes=3).save_pretrained(tmp_path)
    replace, left = os.replace, [survived]

    def crash(*paths):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        models.load("perceiver-digits", num_classes=3, self_heads=2).save_pretrained(tmp_path)
    with pytest.raises(models.InputError):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name_or_path=None), "name_or_path is a NoneType"),
        (dict(name_or_path="perceiver-digits", dtype=torch.int64), "dtype is torch.int64; it must be a floating-point"),
        (dict(name_or_path="perceiver-digits", dtype="float32"), "dtype is 'float32'"),
        (dict(name_or_path="perceiver-digits", device="gpu"), "device is 'gpu', which cannot be used here"),
    ],
)
def test_wrong_arguments_of_load(arguments, message):
    with pytest.raises(models.InputError, match=message):
        models.load(**arguments)


def test_wrong_inputs_of_the_model():
    model = perceiver.Perceiver(tiny())
    with pytest.raises(TypeError, match="inputs is a list; it must be a tensor"):
        model([1.0])
    shape = (1, *model.config.input_shape, model.config.input_channels)
    with pytest.raises(TypeError, match="inputs has dtype torch.float64; it must be the module's, torch.float32"):
        model(torch.zeros(shape, dtype=torch.float64))


def test_wrong_arguments_of_from_official():
    config = {"num_cross_attends": 1, "layers_per_block": 1, "self_heads": 1, "num_bands": 1, "max_resolution": [3, 4]}
    for changed, weights, error, message in (
        ([], {}, TypeError, "config is a list; it must be a dictionary"),
        (config, [], TypeError, "state_dict is a list"),
        (config, {"latents/pos_embs": [1.0]}, TypeError, "state_dict has 'latents/pos_embs': a list"),
        ({**config, "num_bands": "1"}, {}, ValueError, "config has num_bands '1'; it must be an integer"),
        ({**config, "max_resolution": 3}, {}, ValueError, "config has max_resolution 3; it must be a list"),
        (config, {"cross_attention/x": torch.ones(1), "latents/pos_embs": torch.ones(3)}, ValueError, "state_dict has"),
    ):
        with pytest.raises(error, match=message):
            perceiver.from_official(changed, weights)
