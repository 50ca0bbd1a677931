"""MBT: an independent formula over Flax names, published parameter counts, vision transformers, files, bad input."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from mmkernels import _library, models
from mmkernels.models import mbt

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
D, HEADS, MLP, CLASSES = 12, 3, 20, 5

# --- The released model, written once more over its own names: no code of the package ---------------------------------------

CASES = {
    "bottleneck": dict(),
    "sequential": dict(update="sequential"),
    "early": dict(fusion_layer=0),
    "late": dict(fusion_layer=3),
    "without the bottleneck in tests": dict(test_with_bottlenecks=False),
    "cross": dict(bottleneck=0),
    "shared": dict(bottleneck=0, share=True),
    "shared weights and bottleneck": dict(share=True),
    "pre_logits": dict(pre_logits=9),
    "temporal sampling": dict(method="temporal_sampling", n=3),
    "a frame more": dict(method="temporal_sampling", n=2),
    "all frames": dict(method="temporal_sampling", n=9),
    "mean": dict(bottleneck=0, classifier="gap"),
    "maximum": dict(bottleneck=0, classifier="gmp", share=True),
    "sum and pre_logits": dict(bottleneck=3, classifier="gsp", pre_logits=9),
    "three modalities": dict(names=("spectrogram", "rgb", "flow")),
    "cross, three modalities": dict(names=("spectrogram", "rgb", "flow"), bottleneck=0),
    "video alone": dict(names=("rgb",), bottleneck=0),
    "sound alone": dict(names=("spectrogram",)),
}
DEFAULTS = dict(
    names=("spectrogram", "rgb"),
    fusion_layer=1,
    update="mean",
    bottleneck=5,
    share=False,
    classifier="token",
    pre_logits=None,
    method="3d_conv",
    n=4,
    test_with_bottlenecks=True,
)
SHAPES = {"rgb": (8, 8, 12), "spectrogram": (13, 8), "flow": (4, 4, 8)}  # 13: a row of bins that no patch covers
PATCH = {"rgb": (2, 4, 4), "spectrogram": (4, 4), "flow": (2, 4, 4)}


def suffix(name):
    return "" if name == "rgb" else f"_{name}"


def frames(total, n):
    """The released sampling, with numpy as jax.numpy has it."""
    start, step = (total / (n + 1),) * 2 if n < total else (0, 1)
    return np.minimum(np.round(np.arange(start, total, step)).astype(int), total - 1)


def flax_weights(case, dtype=torch.float64):
    o, weights = {**DEFAULTS, **CASES[case]}, {}
    generator = torch.Generator().manual_seed(1)

    def draw(name, *shape, mean=0.0):
        weights[name] = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4 + mean).to(dtype)

    def dense(name, *shape, bias=None):
        draw(f"{name}/kernel", *shape)
        draw(f"{name}/bias", *(shape[-1:] if bias is None else bias))

    def norm(name):
        draw(f"{name}/scale", D, mean=1.0)
        draw(f"{name}/bias", D)

    for name in o["names"]:
        patch, tokens = PATCH[name], math.prod(s // p for s, p in zip(SHAPES[name], PATCH[name], strict=True))
        if name == "rgb" and o["method"] == "temporal_sampling":
            patch, tokens = patch[1:], len(frames(8, o["n"])) * 6
        dense(f"embedding{suffix(name)}", *patch, 3, D)
        token = o["classifier"] == "token"
        draw(f"Transformer/posembed_input{suffix(name)}/pos_embedding", 1, tokens + token, D)
        if token:
            draw("cls" if name == "rgb" or len(o["names"]) == 1 else f"cls{name}", 1, 1, D)
        for i in range(3):
            block = f"Transformer/encoderblock_{i}{'' if o['share'] else suffix(name)}"
            for n in ("query", "key", "value"):
                dense(f"{block}/MultiHeadDotProductAttention_0/{n}", D, HEADS, D // HEADS, bias=(HEADS, D // HEADS))
            dense(f"{block}/MultiHeadDotProductAttention_0/out", HEADS, D // HEADS, D)
            norm(f"{block}/LayerNorm_0")
            norm(f"{block}/LayerNorm_1")
            dense(f"{block}/MlpBlock_0/Dense_0", D, MLP)
            dense(f"{block}/MlpBlock_0/Dense_1", MLP, D)
    norm("Transformer/encoder_norm")
    if o["bottleneck"]:
        draw("bottleneck", 1, o["bottleneck"], D)
    if o["pre_logits"]:
        dense("pre_logits", D, o["pre_logits"])
    dense("output_projection", o["pre_logits"] or D, CLASSES)
    return weights


def released(case, w, inputs, train=False):
    """The released forward pass; the modalities that are in `inputs`."""
    o = {**DEFAULTS, **CASES[case]}
    names, token = [n for n in o["names"] if n in inputs], o["classifier"] == "token"
    one = len(o["names"]) == 1

    def norm(name, x):
        return F.layer_norm(x, (D,), w[f"{name}/scale"], w[f"{name}/bias"], 1e-6)

    def dense(name, x):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def block(i, name, x):
        p = f"Transformer/encoderblock_{i}{'' if o['share'] else suffix(name)}"
        a = f"{p}/MultiHeadDotProductAttention_0"
        n = norm(f"{p}/LayerNorm_0", x)
        q, k, v = (
            torch.einsum("bnd,dhe->bhne", n, w[f"{a}/{t}/kernel"]) + w[f"{a}/{t}/bias"][:, None]
            for t in ("query", "key", "value")
        )
        attended = (q @ k.transpose(-1, -2) / math.sqrt(D // HEADS)).softmax(-1) @ v
        x = x + torch.einsum("bhne,hed->bnd", attended, w[f"{a}/out/kernel"]) + w[f"{a}/out/bias"]
        m = F.gelu(dense(f"{p}/MlpBlock_0/Dense_0", norm(f"{p}/LayerNorm_1", x)), approximate="tanh")
        return x + dense(f"{p}/MlpBlock_0/Dense_1", m)

    x = {}
    for name in names:
        t, kernel = inputs[name], w[f"embedding{suffix(name)}/kernel"]
        if t.dim() == 5 and kernel.dim() == 4:
            t = t[:, frames(t.shape[1], o["n"])].flatten(1, 2)
        conv = F.conv3d if kernel.dim() == 5 else F.conv2d
        t = conv(
            t.movedim(-1, 1), kernel.movedim((-1, -2), (0, 1)), w[f"embedding{suffix(name)}/bias"], stride=kernel.shape[:-2]
        )
        t = t.flatten(2).transpose(1, 2)
        if token:
            t = torch.cat([w["cls" if name == "rgb" or one else f"cls{name}"].expand(len(t), -1, -1), t], 1)
        x[name] = t + w[f"Transformer/posembed_input{suffix(name)}/pos_embedding"]
    z, joint = w.get("bottleneck"), None
    use = train or o["test_with_bottlenecks"]
    for i in range(3):
        if i < o["fusion_layer"] or one or (z is not None and not use):
            x = {n: block(i, n, t) for n, t in x.items()}
        elif z is not None:
            seen = []
            for n in names if o["update"] == "mean" else o["names"]:
                if n in x:
                    out = block(i, n, torch.cat([x[n], z.expand(len(x[n]), -1, -1)], 1))
                    x[n], new = out[:, : x[n].shape[1]], out[:, x[n].shape[1] :]
                    z = new if o["update"] == "sequential" else z
                    seen.append(new)
            z = z if o["update"] == "sequential" else torch.stack(seen, -1).mean(-1)
        elif o["share"]:
            joint = torch.cat([x[n] for n in names], 1) if joint is None else joint
            joint = block(i, None, joint)
        else:
            order = ("rgb", "spectrogram", "flow")
            x = {
                n: block(i, n, torch.cat([x[m] for m in order if m in x and m != n] + [x[n]], 1))[:, -x[n].shape[1] :]
                for n in x
            }
    rows = norm("Transformer/encoder_norm", joint if joint is not None else torch.cat([x[n] for n in names], 1))

    def classify(t):
        return dense("output_projection", dense("pre_logits", t).tanh() if o["pre_logits"] else t)

    if not token:
        return classify({"gap": rows.mean(1), "gmp": rows.amax(1), "gsp": rows.sum(1)}[o["classifier"]])
    logits, start = {}, 0
    for n in names:
        logits[n] = classify(rows[:, start])
        start += x[n].shape[1]
    return logits if train else sum(logits.values()) / len(logits)


def official_config(case):
    o = {**DEFAULTS, **CASES[case]}
    config = {
        "modality_fusion": list(o["names"]),
        "fusion_layer": o["fusion_layer"],
        "input_shapes": {n: SHAPES[n] for n in o["names"]},
        "temporal_encoding": {"method": o["method"], "n_sampled_frames": o["n"]},
        "classifier": o["classifier"],
        "use_bottleneck": bool(o["bottleneck"]),
        "test_with_bottlenecks": o["test_with_bottlenecks"],
        "update": o["update"],
    }
    return config if len(o["names"]) == 1 else {**config, "share_encoder": o["share"]}


def clips(names, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(batch, *SHAPES[n], 3, generator=generator, dtype=torch.float64).to(dtype) for n in names}


def model_and_weights(case, backend="reference", dtype=torch.float64):
    weights = flax_weights(case, dtype)
    return mbt.from_official(official_config(case), weights, backend=backend), weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_official_weights_against_the_released_forward_pass(case, backend):
    names = {**DEFAULTS, **CASES[case]}["names"]
    dtype = torch.float32 if backend == "cpp" else torch.float64
    model, weights = model_and_weights(case, backend, dtype)
    exact, inputs = {n: t.double() for n, t in weights.items()}, clips(names, dtype)
    rtol = atol = 1e-10 if dtype == torch.float64 else 2e-4
    unused = "bottleneck" in weights and model.encoder.bottleneck is None
    count = sum(t.numel() for n, t in weights.items() if n != "bottleneck" or not unused)
    assert sum(p.numel() for p in model.parameters()) == count
    assert unused == (case in ("late", "sound alone"))
    for train in (False, True):
        expected = released(case, exact, {n: t.double() for n, t in inputs.items()}, train)
        actual = model.train(train)(inputs)
        if isinstance(expected, dict):
            assert train and list(actual) == [n for n in names]
        else:
            actual, expected = {"": actual}, {"": expected}
        for name in expected:
            torch.testing.assert_close(actual[name].double(), expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_official_weights(case):
    names = {**DEFAULTS, **CASES[case]}["names"]
    results = []
    for ours in (True, False):
        weights = {n: t.requires_grad_() for n, t in flax_weights(case).items()}
        inputs = {n: t.requires_grad_() for n, t in clips(names).items()}
        if ours:
            model = mbt.from_official(official_config(case), flax_weights(case), backend="reference").train()
            outputs = torch.func.functional_call(model, mbt.read_official(official_config(case), weights)[1], (inputs,))
        else:
            outputs = released(case, weights, inputs, train=True)
        outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
        wanted = [*weights.values(), *inputs.values()]
        results.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    top = max(float(g.abs().max()) for g in results[1])
    for name, a, b in zip([*weights, *names], *results, strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(float(b.abs().max()), 1e-2 * top), name


@pytest.mark.parametrize("case", ["bottleneck", "sequential", "cross", "shared", "mean", "three modalities", "pre_logits"])
def test_missing_modality(case):
    """It is left out of everything; the bottleneck and the logits are the mean over those that are there."""
    names = {**DEFAULTS, **CASES[case]}["names"]
    model, weights = model_and_weights(case)
    for absent in names:
        inputs = {n: t for n, t in clips(names).items() if n != absent}
        torch.testing.assert_close(model.eval()(inputs), released(case, weights, inputs), rtol=1e-10, atol=1e-10)
        if model.config.classifier == "token":
            assert list(model.train()(inputs)) == list(inputs)


def test_official_entries_are_checked():
    weights, config = flax_weights("bottleneck"), official_config("bottleneck")

    def without(name):
        return {n: t for n, t in weights.items() if not n.startswith(name)}

    for wrong_config, wrong_weights, message in (
        ({k: v for k, v in config.items() if k != "fusion_layer"}, weights, "config has no 'fusion_layer'"),
        ({**config, "input_shapes": {"rgb": SHAPES["rgb"]}}, weights, "no shape of the input 'spectrogram'"),
        ({**config, "use_bottleneck": False}, weights, "use_bottleneck is False; the state_dict has one"),
        ({**config, "use_bottleneck": True}, without("bottleneck"), "use_bottleneck is True; the state_dict has none"),
        ({**config, "classifier": "gap"}, weights, "classifier is 'gap'; the state_dict has a CLS token"),
        ({**config, "share_encoder": True}, weights, "share_encoder is True"),
        ({**config, "attention_dropout_rate": 0.1}, weights, "attention_dropout_rate is 0.1"),
        (config, {**weights, "decoder/kernel": torch.zeros(1)}, "state_dict has 'decoder/kernel'"),
        (config, without("Transformer/encoderblock_1/LayerNorm_0/scale"), "no 'Transformer/encoderblock_1/LayerNorm_0/scale'"),
        (config, without("Transformer/encoderblock"), "no 'Transformer/encoderblock_0'"),
        (config, without("clsspectrogram"), "no 'clsspectrogram'"),
        ({**config, "modality_fusion": ["rgb"]}, weights, "which this MBT does not have; its modalities are"),
        ({**config, "fusion_layer": 4}, weights, "fusion_layer is 4"),
        ({**config, "input_shapes": {**SHAPES, "rgb": (8, 8, 16)}}, weights, "positions.rgb has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            mbt.from_official(wrong_config, wrong_weights)


def test_the_released_config_as_it_is():
    """The names of the release in their groups; 224 x 224, 32 frames, eight seconds: on meta, because they are large."""
    groups = {
        "model": {
            "modality_fusion": ("spectrogram", "rgb"),
            "fusion_layer": 8,
            "use_bottleneck": True,
            "classifier": "token",
            "temporal_encoding_config": {"method": "3d_conv", "n_sampled_frames": 8},
            "attention_dropout_rate": 0.0,
            "stochastic_droplayer_rate": 0.3,
        },
        "dataset_configs": {"num_frames": 32, "crop_size": 224, "spec_shape": (100, 128), "num_spec_frames": 8},
        "batch_size": 64,
    }
    base = models.load("mbt-base", device="meta")
    weights = {n: torch.empty(s, device="meta") for n, s in released_shapes().items()}
    sizes, own = mbt.read_official(groups, weights)
    expected = {n: p.shape for n, p in base.state_dict().items()}
    assert {n: t.shape for n, t in own.items()} == expected
    assert sizes == dataclasses.replace(mbt.CONFIGS["mbt-base"], modalities=(mbt.SPECTROGRAM, mbt.RGB), stochastic_depth=0.3)


def released_shapes():
    shapes = {"bottleneck": (1, 5, 768), "output_projection/kernel": (768, 527), "output_projection/bias": (527,)}
    for s, cls, tokens, patch in (("", "cls", 3137, (2, 16, 16)), ("_spectrogram", "clsspectrogram", 401, (16, 16))):
        shapes |= {cls: (1, 1, 768), f"embedding{s}/kernel": (*patch, 3, 768), f"embedding{s}/bias": (768,)}
        shapes[f"Transformer/posembed_input{s}/pos_embedding"] = (1, tokens, 768)
        for i in range(12):
            p = f"Transformer/encoderblock_{i}{s}"
            a = f"{p}/MultiHeadDotProductAttention_0"
            for n in ("query", "key", "value"):
                shapes |= {f"{a}/{n}/kernel": (768, 12, 64), f"{a}/{n}/bias": (12, 64)}
            shapes |= {f"{a}/out/kernel": (12, 64, 768), f"{a}/out/bias": (768,)}
            shapes |= {f"{p}/LayerNorm_{n}/{e}": (768,) for n in (0, 1) for e in ("scale", "bias")}
            shapes |= {f"{p}/MlpBlock_0/Dense_0/kernel": (768, 3072), f"{p}/MlpBlock_0/Dense_0/bias": (3072,)}
            shapes |= {f"{p}/MlpBlock_0/Dense_1/kernel": (3072, 768), f"{p}/MlpBlock_0/Dense_1/bias": (768,)}
    return shapes | {f"Transformer/encoder_norm/{e}": (768,) for e in ("scale", "bias")}


# --- Published sizes, tokenisers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, tokens",
    [
        ("mbt-base", 175_009_295, [3136, 400]),
        ("mbt-base-8-frames", 173_215_247, [1568, 400]),
        ("mbt-base-shared", 89_954_831, [3136, 400]),
        ("mbt-base-rgb", 89_051_663, [3136]),
        ("mbt-base-spectrogram", 86_360_591, [400]),
        ("mbt-base-vggsound", 174_841_653, [3136, 400]),
        ("mbt-base-epic", 174_909_325, [3136, 400]),
        ("mbt-base-kinetics", 174_911_632, [3136, 400]),
    ],
)
def test_published_parameter_counts(name, parameters, tokens):
    model = models.load(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [m.num_tokens for m in model.config.modalities] == tokens
    assert name in models.names()


def sampling(total, n, released_sampling=False):
    return mbt.ModalityConfig(
        "rgb", (total, 8, 8), (4, 4), "temporal_sampling", sampled_frames=n, released_sampling=released_sampling
    )


def test_frames():
    assert sampling(32, 8).frames == [4, 7, 11, 14, 18, 21, 25, 28]
    assert sampling(10, 3).frames == [2, 5, 8]  # 2.5 and 7.5: halves to even
    assert sampling(4, 4).frames == sampling(4, 9).frames == [0, 1, 2, 3]
    for total in range(2, 40):
        for n in range(1, total):
            exact = sampling(total, n).frames
            assert len(exact) == n and all(abs(f - total * (i + 1) / (n + 1)) <= 0.5 for i, f in enumerate(exact))
            step = total / (n + 1)
            numbers = np.arange(step, total, step, dtype=np.float32)  # what jax.numpy makes of it
            assert sampling(total, n, True).frames == np.minimum(np.round(numbers), total - 1).astype(int).tolist()
    for total, n in ((8, 2), (32, 5), (32, 6)):
        assert len(sampling(total, n, True).frames) == n + 1 and sampling(total, n, True).frames[-1] == total - 1
    assert len(sampling(32, 8, True).frames) == 8 and len(sampling(32, 4, True).frames) == 4


@pytest.mark.parametrize(
    "config",
    [
        mbt.ModalityConfig("steps", (11,), (3,), "1d_conv", channels=5),
        mbt.ModalityConfig("sound", (9, 7), (4, 2), "2d_conv", channels=1),
        mbt.ModalityConfig("video", (5, 9, 8), (2, 4, 3), "3d_conv"),
        mbt.ModalityConfig("video", (6, 7, 8), (4, 4), "temporal_sampling", sampled_frames=3),  # patches across frames
    ],
    ids=lambda config: config.tokeniser,
)
def test_tokenisers_are_convolutions(config):
    tokeniser = mbt.Tokeniser(config, D, dtype=torch.float64)
    torch.nn.init.normal_(tokeniser.weight)
    torch.nn.init.normal_(tokeniser.bias)
    x = torch.randn(2, *config.shape, config.channels, dtype=torch.float64)
    picked = x[:, config.frames].flatten(1, 2) if config.tokeniser == "temporal_sampling" else x
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(config.patch) - 1]
    expected = conv(picked.movedim(-1, 1), tokeniser.weight, tokeniser.bias, stride=config.patch).flatten(2).transpose(1, 2)
    assert expected.shape[1] == config.num_tokens
    torch.testing.assert_close(tokeniser(x), expected, rtol=1e-12, atol=1e-12)


# --- Vision transformers -----------------------------------------------------------------------------------------------------

GRID = 4  # the pictures have 4 x 4 patches of 4 x 4


def nested(weights):
    tree = {}
    for name, value in weights.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def vit_names():
    """One random transformer under every naming."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    timm = {
        "cls_token": draw(1, 1, D),
        "pos_embed": draw(1, GRID * GRID + 1, D),
        "patch_embed.proj.weight": draw(D, 3, 4, 4),
        "norm.weight": draw(D),
        "head.weight": draw(7, D),
    }
    timm |= {"patch_embed.proj.bias": draw(D), "norm.bias": draw(D), "head.bias": draw(7)}
    for i in range(3):
        for name, shape in {
            "norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,), "mlp.fc1": (MLP, D), "mlp.fc2": (D, MLP)
        }.items():  # fmt: skip
            timm[f"blocks.{i}.{name}.weight"], timm[f"blocks.{i}.{name}.bias"] = draw(*shape), draw(shape[0])
    stem = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    parts = {
        "norm1": ("layernorm_before",) * 2,
        "attn.proj": ("attention.output.dense", "attention.o_proj"),
        "norm2": ("layernorm_after",) * 2,
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
    }
    hub, new, flax, scenic = {}, {}, {}, {}
    for name, t in timm.items():
        base, _, end = name.rpartition(".")
        if name in stem or base in stem:
            hub[f"vit.{stem[name]}" if name in stem else f"vit.{stem[base]}.{end}"] = t
        elif base.startswith("blocks"):
            _, i, part = base.split(".", 2)
            if part == "attn.qkv":
                for n, short, piece in zip(("query", "key", "value"), "qkv", t.chunk(3), strict=True):
                    hub[f"vit.encoder.layer.{i}.attention.attention.{n}.{end}"] = piece
                    new[f"layers.{i}.attention.{short}_proj.{end}"] = piece
                    for state, number in ((flax, 1), (scenic, 0)):
                        where = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_{number}/{n}"
                        piece_ = piece.T.reshape(D, HEADS, -1) if end == "weight" else piece.reshape(HEADS, -1)
                        state[f"{where}/{'kernel' if end == 'weight' else 'bias'}"] = piece_.numpy()
            else:
                hub[f"vit.encoder.layer.{i}.{parts[part][0]}.{end}"] = t
                new[f"layers.{i}.{parts[part][1]}.{end}"] = t
                for state, (a, b, c) in ((flax, (1, 2, 3)), (scenic, (0, 1, 0))):
                    where = {
                        "norm1": "LayerNorm_0",
                        "norm2": f"LayerNorm_{b}",
                        "attn.proj": f"MultiHeadDotProductAttention_{a}/out",
                        "mlp.fc1": f"MlpBlock_{c}/Dense_0",
                        "mlp.fc2": f"MlpBlock_{c}/Dense_1",
                    }[part]
                    kernel = t.T if t.dim() == 2 else t
                    kernel = kernel.reshape(HEADS, -1, D) if part == "attn.proj" and end == "weight" else kernel
                    leaf = {"weight": "scale" if "norm" in part else "kernel", "bias": "bias"}[end]
                    state[f"Transformer/encoderblock_{i}/{where}/{leaf}"] = kernel.numpy()
    new |= {n.removeprefix("vit."): t for n, t in hub.items() if "encoder.layer" not in n}
    new["pooler.dense.weight"] = torch.zeros(1)
    for state in (flax, scenic):
        state |= {
            "cls": timm["cls_token"].numpy(),
            "embedding/kernel": timm["patch_embed.proj.weight"].permute(2, 3, 1, 0).numpy(),
            "embedding/bias": timm["patch_embed.proj.bias"].numpy(),
            "Transformer/posembed_input/pos_embedding": timm["pos_embed"].numpy(),
            "Transformer/encoder_norm/scale": timm["norm.weight"].numpy(),
            "Transformer/encoder_norm/bias": timm["norm.bias"].numpy(),
            "head/kernel": timm["head.weight"].T.numpy(),
        }
    return {"timm": timm, "Hugging Face": hub, "Hugging Face 5": new, "Flax": flax, "scenic": nested(scenic)}


def vit_config(**changes):
    fields = {
        "modalities": (
            mbt.ModalityConfig("rgb", (8, 12, 20), (3, 4, 4), "3d_conv"),
            mbt.ModalityConfig("spectrogram", (25, 8), (4, 4), "2d_conv", channels=1),
            mbt.ModalityConfig("steps", (9,), (3,), "1d_conv"),
        ),
        "num_classes": CLASSES,
        "channels": D,
        "num_layers": 3,
        "num_heads": HEADS,
        "mlp_channels": MLP,
        "fusion_layer": 1,
        "num_bottlenecks": 5,
        "backend": "reference",
    }
    return mbt.MBTConfig(**{**fields, **changes})


def test_every_naming_gives_the_same_model():
    states = vit_names()
    results = []
    for state in states.values():
        torch.manual_seed(0)
        results.append(mbt.from_vit(vit_config(), state).state_dict())
    for naming, result in zip(states, results, strict=True):
        assert all(torch.equal(result[n], t) for n, t in results[0].items()), naming


def test_a_picture_through_the_transformer():
    """An MBT with one 2-D modality of the transformer's own size is that transformer."""
    state = {n: t.double() for n, t in vit_names()["timm"].items()}
    picture = mbt.ModalityConfig("picture", (4 * GRID, 4 * GRID), (4, 4), "2d_conv")
    model = mbt.from_vit(vit_config(modalities=(picture,)), state, dtype=torch.float64)
    x = torch.randn(2, 4 * GRID, 4 * GRID, 3, dtype=torch.float64)
    t = F.conv2d(x.movedim(-1, 1), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    t = torch.cat([state["cls_token"].expand(2, -1, -1), t.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]

    def linear(name, y):
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, y):
        return F.layer_norm(y, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for i in range(3):
        b = f"blocks.{i}"
        q, k, v = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", t)).reshape(2, -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        a = ((q @ k.mT / math.sqrt(D // HEADS)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        t = t + linear(f"{b}.attn.proj", a)
        t = t + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", t)), approximate="tanh"))
    torch.nn.init.normal_(model.head.weight)
    torch.testing.assert_close(model.eval()({"picture": x}), model.head(norm("norm", t)[:, 0]), rtol=1e-10, atol=1e-10)


def test_inflated_weights():
    state = vit_names()["timm"]
    kernel, table = state["patch_embed.proj.weight"], state["pos_embed"]
    torch.manual_seed(0)
    model = mbt.from_vit(vit_config(), state)
    rgb, sound = model.tokenisers["rgb"].weight, model.tokenisers["spectrogram"].weight
    assert torch.equal(rgb[:, :, 1], kernel) and not rgb[:, :, 0].any() and not rgb[:, :, 2].any()
    # One channel is that channel three times: a convolution of a tiled input with the kernel as it is.
    x = torch.randn(1, 25, 8, 1)
    tiled = F.conv2d(x.expand(-1, -1, -1, 3).movedim(-1, 1), kernel, state["patch_embed.proj.bias"], stride=4)
    torch.testing.assert_close(model.tokenisers["spectrogram"](x), tiled.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert sound.shape == (D, 1, 4, 4)
    grid = table[0, 1:].reshape(GRID, GRID, D).double().numpy()

    def zoom(height, width):
        return torch.from_numpy(ndimage.zoom(grid, (height / GRID, width / GRID, 1), order=1)).reshape(-1, D).float()

    torch.testing.assert_close(model.positions["rgb"][0, 1:], zoom(3, 5).repeat(2, 1))
    torch.testing.assert_close(model.positions["spectrogram"][0, 1:], zoom(6, 2))
    torch.testing.assert_close(model.encoder.bottleneck[0, 1:], zoom(2, 2))
    for row in (model.positions["rgb"][0, 0], model.positions["spectrogram"][0, 0], model.encoder.bottleneck[0, 0]):
        assert torch.equal(row, table[0, 0])
    for m in ("rgb", "spectrogram", "steps"):
        assert torch.equal(model.cls[m], state["cls_token"])
        assert torch.equal(model.encoder.layers[2].blocks[m].qkv.weight, state["blocks.2.attn.qkv.weight"])
        assert not any(
            torch.equal(model.encoder.layers[i].blocks[m].fc1.weight, state["blocks.2.mlp.fc1.weight"]) for i in (0, 1)
        )
    assert abs(model.positions["steps"]).max() < 0.2 and not model.head.weight.any()
    mean = mbt.from_vit(vit_config(), state, inflation="mean", bottleneck_from_positions=False)
    torch.testing.assert_close(mean.tokenisers["rgb"].weight, (kernel / 3)[:, :, None].expand(-1, -1, 3, -1, -1))
    assert abs(mean.encoder.bottleneck).max() < 0.2
    ranked = mbt.from_vit(vit_config(), state, inflation="rank_pooling").tokenisers["rgb"].weight
    for t in range(3):  # alpha_t = 2 (T - t + 1) - (T + 1) (H_T - H_{t-1}), H_3 = 11 / 6
        alpha = (6 - 4 * 11 / 6, 4 - 4 * (11 / 6 - 1), 2 - 4 * (11 / 6 - 1.5))[t]
        torch.testing.assert_close(ranked[:, :, t], kernel * alpha / 3, rtol=1e-5, atol=1e-6)


def test_positions_of_a_vit_other_ways():
    state = vit_names()["timm"]
    table = state["pos_embed"]
    square = (mbt.ModalityConfig("rgb", (6, 16, 16), (4, 4), "temporal_sampling", sampled_frames=3),)
    tiled = mbt.from_vit(vit_config(modalities=square), state, positions="tile")
    assert torch.equal(tiled.positions["rgb"][0, 1:], table[0, 1:].repeat(3, 1))
    fresh = mbt.from_vit(vit_config(modalities=square), state, positions="none")
    assert abs(fresh.positions["rgb"]).max() < 0.2
    pooled = mbt.from_vit(vit_config(modalities=square, classifier="gap"), state)
    assert torch.equal(pooled.positions["rgb"][0], table[0, 1:].repeat(3, 1)) and not pooled.cls
    shared = mbt.from_vit(vit_config(share_weights=True), state)
    assert torch.equal(shared.encoder.layers[1].blocks["shared"].fc2.bias, state["blocks.1.mlp.fc2.bias"])


def test_wrong_vision_transformers():
    state = vit_names()["timm"]
    for options, wrong, message in (
        ({}, {"a": torch.zeros(1)}, "names of no known vision transformer; the first is 'a'"),
        ({}, {n: t for n, t in state.items() if n != "blocks.1.mlp.fc1.bias"}, "no 'blocks.1.mlp.fc1.bias'"),
        ({}, {n: t for n, t in state.items() if "blocks.2" not in n}, r"layers \[0, 1\]; the config has num_layers 3"),
        ({}, {**state, "blocks.0.ls1.gamma": torch.ones(D)}, "'blocks.0.ls1.gamma', which the blocks of an MBT do not have"),
        ({}, {**state, "pos_embed": torch.zeros(1, 19, D)}, "19 positions; it must be a square"),
        ({"positions": "tile"}, state, "no multiple of 16 positions"),
        ({"positions": "cubic"}, state, "positions is 'cubic'"),
        ({"inflation": "max"}, state, "inflation is 'max'; allowed are 'central_frame'"),
        ({}, {**state, "patch_embed.proj.weight": torch.zeros(D, 3, 8, 8)}, "tokenisers.rgb.weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            mbt.from_vit(vit_config(), wrong, **options)


# --- A model like any other --------------------------------------------------------------------------------------------------


def tiny(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return mbt.MBT(vit_config(**changes), dtype=dtype)


def tiny_clips(config, batch=2, dtype=torch.float32):
    return {m.name: torch.randn(batch, *m.shape, m.channels, dtype=dtype) for m in config.modalities}


def test_initial_weights():
    torch.manual_seed(0)
    model = mbt.MBT(vit_config(channels=240, num_heads=4, mlp_channels=300, pre_logits=64))
    block = model.encoder.layers[0].blocks["rgb"]
    for weight, (a, b) in ((block.qkv.weight[240:480], (240, 240)), (block.fc1.weight, (240, 300))):
        bound = math.sqrt(6 / (a + b))
        assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.std() / bound * math.sqrt(3) - 1) < 0.02
    assert not block.qkv.bias.any() and not block.proj.bias.any() and 0 < block.fc1.bias.abs().max() < 1e-5
    assert not model.head.weight.any() and not model.cls["rgb"].any()
    assert abs(model.positions["rgb"].std() - 0.02) < 1e-3 and abs(model.encoder.bottleneck.std() - 0.02) < 2e-3
    assert abs(model.tokenisers["rgb"].weight.var() * 3 * 48 - 1) < 0.05
    assert model.encoder.norm.eps == 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", ["bottleneck", "cross", "shared"])
def test_every_parameter_has_a_gradient(fusion, backend):
    model = tiny(fusion=fusion, share_weights=fusion == "shared", backend=backend, pre_logits=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    sum(y.square().sum() for y in model(tiny_clips(model.config)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_overfits_a_handful(backend):
    model = tiny(backend=backend)
    inputs, labels = tiny_clips(model.config, 5), torch.arange(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = torch.stack([F.cross_entropy(y, labels) for y in model.train()(inputs).values()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and (model.eval()(inputs).argmax(-1) == labels).all()


def test_compiles_whole():
    """With `fullgraph=True`: the dict of a model in training, and the average in evaluation."""
    torch._dynamo.reset()
    model = tiny(backend=BACKENDS[-1], num_layers=2, modalities=vit_config().modalities[:2])
    torch.nn.init.normal_(model.head.weight)
    inputs = tiny_clips(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    model.eval()
    torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classifier", ["token", "gap", "gmp", "gsp"])
def test_short_clips(classifier):
    """What a mask hides changes nothing, in attention and in pooling; without any mask everything counts."""
    model = tiny(torch.float64, classifier=classifier).eval()
    torch.nn.init.normal_(model.head.weight)
    inputs = tiny_clips(model.config, dtype=torch.float64)
    mask = torch.arange(12) < torch.tensor([[12], [8]])  # the spectrogram's 6 x 2 patches, row by row
    other = {**inputs, "spectrogram": inputs["spectrogram"].clone()}
    other["spectrogram"][1, 16:] = float("nan")
    masks = {"spectrogram": mask, "rgb": None}
    assert torch.equal(model(inputs, key_masks=masks), model(other, key_masks=masks))
    assert torch.equal(model(inputs, key_masks=masks)[0], model(inputs)[0])
    assert not torch.allclose(model(inputs, key_masks=masks)[1], model(inputs)[1])
    encoded = torch.randn(1, 3, D, dtype=torch.float64)
    if classifier != "token":
        pooled = model._pool({"a": encoded, "b": encoded + 1}, {"b": torch.tensor([[True, False, False]])})
        rows = torch.cat([encoded, encoded[:, :1] + 1], 1)
        expected = {"gap": rows.mean(1), "gmp": rows.amax(1), "gsp": rows.sum(1)}[classifier]
        torch.testing.assert_close(pooled, expected)


def test_save_and_load(tmp_path):
    model = tiny(update="sequential", test_with_bottlenecks=False, stochastic_depth=0.1).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "m")
    loaded = models.load(tmp_path / "m").eval()
    assert loaded.config == model.config and isinstance(loaded.config.modalities[0], mbt.ModalityConfig)
    inputs = tiny_clips(model.config)
    assert torch.equal(loaded(inputs), model(inputs))
    assert models.load(tmp_path / "m", backend="eager").encoder.layers[0].backend == "eager"
    assert models.load(tmp_path / "m", dtype=torch.float64).head.weight.dtype == torch.float64
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["modalities"][0]["patch"] = [2, 4, 4]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(models.InputError, match="positions.rgb has shape|tokenisers.rgb.weight has shape"):
        models.load(tmp_path / "m")


def test_models_of_the_users_own():
    """A third modality with a tokeniser of its kind, by names of the user's choice."""
    modalities = [
        {"name": "audio", "shape": [16, 8], "patch": [4, 4], "tokeniser": "2d_conv", "channels": 1},
        {"name": "video", "shape": [4, 8, 8], "patch": [4, 4], "tokeniser": "temporal_sampling", "sampled_frames": 2},
        {"name": "motion", "shape": [20], "patch": [5], "tokeniser": "1d_conv", "channels": 6},
    ]
    sizes = {"channels": D, "num_heads": HEADS, "mlp_channels": MLP, "num_layers": 2, "fusion_layer": 1, "num_classes": 4}
    model = models.load("mbt-base", modalities=modalities, **sizes)
    assert model.config.num_bottlenecks == 5 and [m.num_tokens for m in model.config.modalities] == [8, 8, 4]
    assert model.eval()(tiny_clips(model.config)).shape == (2, 4)
    assert set(model.train()(tiny_clips(model.config))) == {"audio", "video", "motion"}


def modality(**changes):
    return {"name": "a", "shape": (8, 8), "patch": (4, 4), "tokeniser": "2d_conv", **changes}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channels": 0}, "channels is 0"),
        ({"num_heads": 7}, "channels is 768; it must be a multiple of num_heads, 7"),
        ({"fusion_layer": 13}, "fusion_layer is 13; it must be from 0 to num_layers, 12"),
        ({"fusion_layer": "8"}, "fusion_layer is '8'; it must be an integer"),
        ({"fusion": "sum"}, "fusion is 'sum'"),
        ({"fusion": "shared"}, "share_weights is False"),
        ({"update": "max"}, "update is 'max'"),
        ({"classifier": "map"}, "classifier is 'map'; allowed are 'token', 'gap', 'gmp', 'gsp'"),
        ({"stochastic_depth": 1.5}, "stochastic_depth is"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
        ({"modalities": []}, "modalities is"),
        ({"modalities": "rgb"}, "modalities is 'rgb'"),
        ({"modalities": ["rgb"]}, "it must be a list of one or more ModalityConfig"),
        ({"modalities": [modality(), modality()]}, "1 to 8 different names"),
        ({"modalities": [modality(colour=1)]}, "colour"),
        ({"modalities": [modality(tokeniser="4d")]}, "modality 'a': tokeniser is '4d'; allowed are '1d_conv'"),
        ({"modalities": [modality(shape=(8,))]}, r"modality 'a': shape is \(8,\); '2d_conv' needs 2 positive integers"),
        ({"modalities": [modality(shape=(8, 3))]}, r"shape is \(8, 3\); it must be at least the patch"),
        ({"modalities": [modality(patch=4)]}, "patch is 4"),
        ({"modalities": [modality(channels=0)]}, "channels is 0"),
        ({"modalities": [modality(sampled_frames=2)]}, "only 'temporal_sampling' takes it"),
        ({"modalities": [modality(tokeniser="temporal_sampling", shape=(8, 8, 8))]}, "sampled_frames is None"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(models.InputError, match=message):
        models.load("mbt-base", device="meta", **fields)


def test_wrong_inputs():
    model = tiny()
    inputs = tiny_clips(model.config)
    given, rgb = dict(inputs), inputs["rgb"]
    model(inputs)
    assert all(inputs[name] is x for name, x in given.items())  # the released code overwrites them
    for wrong, error, message in (
        ({}, ValueError, "inputs is empty; it must have one or more of 'rgb', 'spectrogram', 'steps'"),
        ({"flow": rgb}, ValueError, "inputs has 'flow'; allowed are 'rgb', 'spectrogram', 'steps'"),
        (rgb, TypeError, "inputs is a Tensor; it must be a dict"),
        (
            {"rgb": rgb[:, :7]},
            ValueError,
            r"inputs\['rgb'\] has shape \(2, 7, 12, 20, 3\); it must be a tensor \(B, 8, 12, 20, 3\)",
        ),
        ({"rgb": rgb.movedim(-1, 2)}, ValueError, "it must be a tensor"),
        ({"rgb": rgb.double()}, TypeError, r"inputs\['rgb'\] has dtype torch.float64; it must be the model's, torch.float32"),
        ({"rgb": (rgb * 255).to(torch.uint8)}, TypeError, r"inputs\['rgb'\] has dtype torch.uint8"),
        (
            {**inputs, "rgb": rgb[:1]},
            ValueError,
            r"inputs\['spectrogram'\] has batch 2; it must be that of the other modalities, 1",
        ),
    ):
        with pytest.raises(error, match=message):
            model(wrong)
    with pytest.raises(ValueError, match="key_masks has 'steps'; allowed are 'rgb'"):
        model({"rgb": rgb}, key_masks={"steps": None})
    with pytest.raises(ValueError, match=r"key_masks\['rgb'\] has shape \(2, 3\); it must be \(B, M\) = \(2, 30\)"):
        model({"rgb": rgb}, key_masks={"rgb": torch.ones(2, 3, dtype=torch.bool)})
