"""The fusion layers and the encoder against a plain twin, the exact pruning, and as citizens of torch."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmkernels import _library, ops
from mmkernels.modules import BottleneckFusionLayer, MultimodalEncoder, set_backend
from mmkernels.modules.bottleneck import CrossModalLayer, JointLayer
from mmkernels.testing import assert_within_budget, max_error

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
FUSED = BACKENDS[-1]
# What torch's SDPA makes of bfloat16 is not ours to bound.
PRECISIONS = [(b, t) for b in BACKENDS for t in (torch.float32, torch.bfloat16) if (b, t) != ("eager", torch.bfloat16)]
D, HEADS = 12, 3
LENGTHS = {"rgb": 7, "spectrogram": 5, "flow": 3}

# --- The twin: one function, the formulas of the paper over a state dict, always on concatenated rows -----------------------


def _thirds(w):
    return zip(w["qkv.weight"].chunk(3), w["qkv.bias"].chunk(3), strict=True)


def twin_block(w, x, mask=None):
    """`w` maps the names of one block to tensors."""
    n = F.layer_norm(x, x.shape[-1:], w["norm1.weight"], w["norm1.bias"], 1e-6)
    q, k, v = ((n @ a.T + b).unflatten(-1, (HEADS, -1)) for a, b in _thirds(w))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    a = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    u = x + a @ w["proj.weight"].T + w["proj.bias"]
    n = F.layer_norm(u, u.shape[-1:], w["norm2.weight"], w["norm2.bias"], 1e-6)
    return u + F.gelu(n @ w["fc1.weight"].T + w["fc1.bias"], approximate="tanh") @ w["fc2.weight"].T + w["fc2.bias"]


class Twin(nn.Module):
    """`MultimodalEncoder` as the paper and the released code have it; holds a copy of its parameters."""

    def __init__(self, encoder, **options):
        super().__init__()
        self.encoder, self.options = copy.deepcopy(encoder), options

    def forward(self, *tokens, names, masks=None):
        o, state = self.options, dict(self.encoder.named_parameters())
        x = dict(zip(names, tokens, strict=True))
        masks = {n: None if masks is None else masks.get(n) for n in names}
        batch = tokens[0].shape[0]
        z = state.get("bottleneck")
        z = None if z is None or not o.get("with_bottleneck", True) else z.expand(batch, -1, -1)

        def block(layer, name, rows, mask):
            prefix = f"layers.{layer}.blocks.{'shared' if o.get('share_weights') else name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            return twin_block(own, rows, mask)

        def full(name, rows):
            return torch.ones(rows.shape[:2], dtype=torch.bool) if masks.get(name) is None else masks[name]

        joint = None
        for i in range(len(self.encoder.layers)):
            fusing = i >= o["fusion_layer"]
            kind = o.get("fusion", "bottleneck") if fusing else "none"
            if kind == "bottleneck" and z is not None:
                seen = []
                for n in names:
                    mask = torch.cat([full(n, x[n]), torch.ones(z.shape[:2], dtype=torch.bool)], 1)
                    out = block(i, n, torch.cat([x[n], z], 1), mask)
                    x[n], new = out[:, : x[n].shape[1]], out[:, x[n].shape[1] :]
                    if o.get("update") == "sequential":
                        z = new
                    seen.append(new)
                if o.get("update") != "sequential":
                    z = torch.stack(seen).mean(0)
            elif kind == "cross":
                before = dict(x)
                for n in names:
                    rows = [m for m in names if m != n] + [n]
                    mask = torch.cat([full(m, before[m]) for m in rows], 1)
                    x[n] = block(i, n, torch.cat([before[m] for m in rows], 1), mask)[:, -before[n].shape[1] :]
            elif kind == "shared":
                joint = torch.cat([x[n] for n in names], 1) if joint is None else joint
                joint = block(i, None, joint, torch.cat([full(n, x[n]) for n in names], 1))
            else:
                for n in names:
                    x[n] = block(i, n, x[n], full(n, x[n]))
        if joint is not None:
            x = dict(zip(names, joint.split([x[n].shape[1] for n in names], 1), strict=True))
        return [F.layer_norm(x[n], (D,), state["norm.weight"], state["norm.bias"], 1e-6) for n in names]


MODES = {
    "bottleneck": dict(fusion_layer=1),
    "bottleneck, shared weights": dict(fusion_layer=1, share_weights=True),
    "sequential": dict(fusion_layer=1, update="sequential"),
    "sequential, shared weights": dict(fusion_layer=0, update="sequential", share_weights=True),
    "early": dict(fusion_layer=0),
    "late": dict(fusion_layer=3),
    "none": dict(fusion_layer=0, fusion="none"),
    "cross": dict(fusion_layer=1, fusion="cross"),
    "cross, shared weights": dict(fusion_layer=1, fusion="cross", share_weights=True),
    "shared": dict(fusion_layer=1, fusion="shared", share_weights=True),
    "shared, early": dict(fusion_layer=0, fusion="shared", share_weights=True),
}
PRESENT = {
    "all three": ("rgb", "spectrogram", "flow"),
    "two of three": ("rgb", "flow"),
    "one of three": ("spectrogram",),
}


def encoder(backend="reference", dtype=torch.float64, modalities=tuple(LENGTHS), num_layers=3, **options):
    torch.manual_seed(0)
    model = MultimodalEncoder(
        modalities, D, num_layers, num_heads=HEADS, mlp_channels=20, num_bottlenecks=2, backend=backend, dtype=dtype, **options
    )
    return randomise(model)


def randomise(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module


def clips(names, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, LENGTHS[n], D, generator=generator, dtype=torch.float64).to(dtype) for n in names]


def key_masks(names):
    masks = {n: torch.arange(LENGTHS[n]) < torch.tensor([[LENGTHS[n]], [2]]) for n in names}
    return {**masks, names[-1]: None} if len(names) > 1 else masks


def cotangents(outputs):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def run(function, parameters, arguments):
    """[outputs, gradients of parameters (zero where there is none) and arguments], names beside them."""
    arguments = [a.detach().clone().requires_grad_() for a in arguments]
    outputs = function(*arguments)
    wanted = [*parameters.values(), *arguments]
    gradients = torch.autograd.grad(outputs, wanted, cotangents(outputs), allow_unused=True, materialize_grads=True)
    names = [f"output {i}" for i in range(len(outputs))] + list(parameters) + [f"input {i}" for i in range(len(arguments))]
    return dict(zip(names, [*(y.detach() for y in outputs), *gradients], strict=True))


def compare(actual, expected, allowed):
    """Relative to the largest entry; a tensor that is exactly zero, up to rounding, to the largest of all gradients."""
    assert actual.keys() == expected.keys()
    top = max(float(t.abs().max()) for t in expected.values())
    for name, exact in expected.items():
        scale = max(float(exact.abs().max()), 1e-3 * top)
        assert max_error(actual[name], exact) <= allowed * scale, name


def forward_of(model, names, masks=None, rows="all"):
    return lambda *tokens: list(model(dict(zip(names, tokens, strict=True)), key_masks=masks, rows=rows).values())


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_against_the_twin(mode, present, masked, backend):
    names = PRESENT[present]
    model, masks = encoder(backend, **MODES[mode]), key_masks(names) if masked else None
    twin = Twin(model, **MODES[mode])
    expected = run(
        lambda *tokens: twin(*tokens, names=names, masks=masks), dict(twin.encoder.named_parameters()), clips(names)
    )
    actual = run(forward_of(model, names, masks), dict(model.named_parameters()), clips(names))
    compare(actual, expected, 1e-12)


@pytest.mark.parametrize("backend, dtype", PRECISIONS)
@pytest.mark.parametrize("mode", ["bottleneck", "sequential", "cross", "shared"])
def test_precisions_against_the_twin(mode, dtype, backend):
    """Three times the worst relative error of the twin in the same dtype."""
    names = PRESENT["all three"]
    model = encoder(backend, **MODES[mode]).to(dtype)
    twin, exact = Twin(model, **MODES[mode]), Twin(model.double(), **MODES[mode])
    model.to(dtype)
    tokens, masks = clips(names, dtype), key_masks(names)

    def plain(twin, tokens):
        return run(lambda *t: twin(*t, names=names, masks=masks), dict(twin.encoder.named_parameters()), tokens)

    exact, eager = plain(exact, [t.double() for t in tokens]), plain(twin, tokens)
    ours = run(forward_of(model, names, masks), dict(model.named_parameters()), tokens)
    top = max(float(t.abs().max()) for t in exact.values())
    scales = {name: max(float(t.abs().max()), 1e-3 * top) for name, t in exact.items()}
    allowed = 3 * max(max_error(eager[name], t) / scales[name] for name, t in exact.items())
    for name, t in exact.items():
        assert max_error(ours[name], t) / scales[name] <= allowed, name


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("mode", MODES)
def test_pruning_is_exact(mode, present, backend):
    """rows="cls" gives row 0 of rows="all", and the same gradients; stochastic depth in training included."""
    names = PRESENT[present]
    model = encoder(backend, stochastic_depth=0.5, **MODES[mode]).train()
    masks = key_masks(names)
    results = []
    for rows in ("all", "cls"):
        torch.manual_seed(5)
        forward = forward_of(model, names, masks, rows)
        results.append(
            run(lambda *tokens, f=forward: [y[:, :1] for y in f(*tokens)], dict(model.named_parameters()), clips(names))
        )
    assert results[1]["output 0"].shape == (2, 1, D)
    assert model(dict(zip(names, clips(names), strict=True)), rows="cls")[names[0]].shape == (2, 1, D)
    compare(results[1], results[0], 1e-12)


def test_pruning_computes_less(monkeypatch):
    """The linears behind the last attention see one row of every modality, and no bottleneck."""
    model, names = encoder(**MODES["bottleneck"]), PRESENT["all three"]
    seen = []
    original = ops.linear

    def counted(x, weight, bias=None, **options):
        seen.extend((w.shape[0], one.shape[1]) for one, w in zip(x, weight, strict=True))
        return original(x, weight, bias, **options)

    monkeypatch.setattr(ops, "linear", counted)
    model(dict(zip(names, clips(names), strict=True)), rows="cls")
    assert [rows for _, rows in seen[-9:]] == [1] * 9  # proj, fc1 and fc2 of three modalities
    assert [rows for width, rows in seen if width == 20][:3] == list(LENGTHS.values())


def test_bottleneck_is_left_out_in_evaluation():
    options = MODES["bottleneck"]
    model, names = encoder(test_with_bottlenecks=False, **options), PRESENT["all three"]
    tokens = clips(names)
    for training in (True, False):
        expected = Twin(model, **options, with_bottleneck=training)(*tokens, names=names)
        for a, b in zip(forward_of(model.train(training), names)(*tokens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_order_of_the_modalities():
    """The mean does not depend on it; the sequential update follows that of the layer, not that of the dict."""
    names = PRESENT["all three"]
    x, z = dict(zip(names, clips(names), strict=True)), torch.randn(1, 2, D, dtype=torch.float64)
    for update, same in (("mean", True), ("sequential", False)):
        layers = []
        for order in (names, names[::-1]):
            torch.manual_seed(0)
            layer = BottleneckFusionLayer(order, D, num_heads=HEADS, update=update, backend="reference", dtype=torch.float64)
            layers.append(layer)
        layers[1].load_state_dict(layers[0].state_dict())
        (a, za), (b, zb) = (layer(x, z) for layer in layers)
        shuffled, zs = layers[0]({n: x[n] for n in names[::-1]}, z)
        assert torch.equal(zs, za) and all(torch.equal(shuffled[n], a[n]) for n in names)
        assert torch.allclose(za, zb, rtol=1e-12) == same and torch.allclose(a["rgb"], b["rgb"], rtol=1e-12) == same


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bottleneck_for_the_batch(backend):
    names = PRESENT["all three"]
    layer = randomise(BottleneckFusionLayer(names, D, num_heads=HEADS, backend=backend))
    x, z = dict(zip(names, clips(names, torch.float32), strict=True)), torch.randn(1, 2, D)
    (a, za), (b, zb) = layer(x, z), layer(x, z.expand(2, -1, -1))
    assert za.shape == zb.shape == (2, 2, D)
    torch.testing.assert_close(za, zb, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hidden_tokens_never_leak():
    for mode, rows in itertools.product(("bottleneck", "sequential", "cross", "shared"), ("all", "cls")):
        model, names = encoder(**MODES[mode]), PRESENT["all three"]
        tokens, masks = clips(names), key_masks(names)
        poisoned = [
            t if masks[n] is None else t.masked_fill(~masks[n][..., None], float("nan"))
            for n, t in zip(names, tokens, strict=True)
        ]
        forward = forward_of(model, names, masks, rows)
        for n, a, b in zip(names, forward(*tokens), forward(*poisoned), strict=True):
            shown = torch.ones(a.shape[:2], dtype=torch.bool) if masks[n] is None else masks[n][:, : a.shape[1]]
            assert torch.equal(a[shown], b[shown]), (mode, rows)


# --- Randomness --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_stochastic_depth(backend):
    """Branches that add exactly 1 are there or not: for whole examples, both branches and modalities apart, not rescaled."""
    p, batch, names = 0.3, 4000, ("rgb", "flow")
    layer = BottleneckFusionLayer(names, D, num_heads=HEADS, mlp_channels=4, stochastic_depth=p, backend=backend)
    with torch.no_grad():
        for block in layer.blocks.values():
            for linear, one in ((block.proj, 1.0), (block.fc2, 10.0)):
                linear.weight.zero_()
                linear.bias.fill_(one)
    x = {n: torch.zeros(batch, 2, D) for n in names}
    torch.manual_seed(0)
    out, z = layer(x, torch.zeros(1, 3, D))
    kept = {n: out[n][:, 0, 0] for n in names}
    for n in names:
        assert torch.equal(out[n], kept[n][:, None, None].expand_as(out[n]))
        assert set(kept[n].tolist()) == {0.0, 1.0, 10.0, 11.0}
    # A modality's tokens and bottleneck share the draw; the update is the mean of the modalities'.
    assert torch.equal(z, ((kept["rgb"] + kept["flow"]) / 2)[:, None, None].expand_as(z))
    draws = torch.stack(
        [(k % 10 == 1, k >= 10) for k in kept.values()][0] + [(k % 10 == 1, k >= 10) for k in kept.values()][1]
    )
    five_sigma = 5 * (p * (1 - p) / batch) ** 0.5
    assert ((draws.float().mean(1) - (1 - p)).abs() < five_sigma).all()
    correlations = torch.corrcoef(draws.float()) - torch.eye(4)
    assert correlations.abs().max() < 5 / batch**0.5
    out, _ = layer.eval()(x, torch.zeros(1, 3, D))
    assert torch.equal(out["rgb"], torch.full_like(out["rgb"], 11.0))


def test_stochastic_depth_grows_with_the_layers():
    rates = [layer.blocks["rgb"].stochastic_depth for layer in encoder(stochastic_depth=0.3, fusion_layer=1).layers]
    assert rates == [0.0, 0.15, 0.3]
    single = MultimodalEncoder(("rgb",), D, 1, num_heads=HEADS, stochastic_depth=0.3)
    assert single.layers[0].blocks["rgb"].stochastic_depth == 0.0


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_dropout(backend):
    """Dropped and rescaled element by element where the paper has it: behind proj, the activation and fc2."""
    layer = BottleneckFusionLayer(("rgb",), 32, num_heads=4, dropout=0.25, backend=backend)
    block = layer.blocks["rgb"]
    x = {"rgb": torch.zeros(50, 8, 32)}
    with torch.no_grad():
        for linear in (block.proj, block.fc1, block.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        block.proj.bias.fill_(3.0)
        branch = layer(x)[0]["rgb"]
        assert set(branch.unique().tolist()) == {0.0, 4.0}
        assert abs((branch == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / branch.numel()) ** 0.5
        block.proj.bias.zero_()
        block.fc2.bias.fill_(3.0)
        assert set(layer(x)[0]["rgb"].unique().tolist()) == {0.0, 4.0}
        block.fc2.bias.zero_()
        block.fc1.bias.fill_(100.0)
        block.fc2.weight[:, 0] = 1.0
        values = layer(x)[0]["rgb"].unique()
        torch.testing.assert_close(values, torch.tensor([0.0, 100 / 0.75**2]))
        assert layer.eval()(x)[0]["rgb"].unique().tolist() == [100.0]


# --- A citizen of torch ------------------------------------------------------------------------------------------------------


def small(backend, mode="bottleneck", dtype=torch.float32, num_layers=3):
    names = PRESENT["two of three"]
    return encoder(backend, dtype, names, num_layers, **MODES[mode]), names, clips(names, dtype)


def test_state_dict():
    model, *_ = small("reference")
    block = ["norm1", "qkv", "proj", "norm2", "fc1", "fc2"]
    names = {
        f"layers.{i}.blocks.{m}.{n}.{end}"
        for i in range(3)
        for m in ("rgb", "flow")
        for n in block
        for end in ("weight", "bias")
    }
    assert set(model.state_dict()) == names | {"bottleneck", "norm.weight", "norm.bias"}
    assert model.bottleneck.shape == (1, 2, D)
    shared, *_ = small("reference", "shared")
    assert set(shared.layers[0].blocks) == {"shared"} and shared.bottleneck is None
    for unused in (dict(fusion_layer=3), dict(fusion="cross"), dict(modalities=("rgb",))):
        assert encoder(**{"fusion_layer": 0, **unused}).bottleneck is None
    small("eager")[0].load_state_dict(model.state_dict())


def test_deepcopy_dtype_device_and_repr():
    model, names, tokens = small(FUSED)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.bottleneck.zero_()
    assert twin.bottleneck.any()
    half = twin.to(torch.bfloat16)(dict(zip(names, [t.bfloat16() for t in tokens], strict=True)))
    assert half["rgb"].dtype == torch.bfloat16
    meta = MultimodalEncoder(names, D, 2, num_heads=HEADS, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}
    assert "num_heads=3" in repr(model) and FUSED in repr(model)


def test_set_backend_reaches_the_layers():
    model, *_ = small(FUSED)
    set_backend(model, "eager")
    assert {layer.backend for layer in model.layers} == {"eager"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["bottleneck", "sequential", "cross", "shared"])
def test_autocast(mode, backend):
    model, names, tokens = small(backend, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = forward_of(model, names, rows="cls")(*tokens)
    sum(y.float().sum() for y in outputs).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    exact = forward_of(small("reference", mode, torch.float64)[0], names, rows="cls")(*[t.double() for t in tokens])
    set_backend(model, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = forward_of(model, names, rows="cls")(*tokens)
    for a, b, c in zip(outputs, exact, plain, strict=True):
        assert a.dtype == c.dtype
        assert_within_budget(a, b, c, "output under autocast", factor=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    model, names, tokens = small(backend)
    forward = forward_of(model, names)
    plain = run(forward, dict(model.named_parameters()), tokens)
    again = run(
        lambda *t: checkpoint(forward, *t, use_reentrant=False),
        dict(model.named_parameters()),
        tokens,
    )
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_activation_checkpointing_repeats_what_was_dropped():
    model, names, tokens = small(FUSED)
    for module in model.modules():
        if hasattr(module, "stochastic_depth"):
            module.stochastic_depth = 0.5
    forward = forward_of(model, names)
    results = []
    for function in (forward, lambda *t: checkpoint(forward, *t, use_reentrant=False)):
        torch.manual_seed(7)
        results.append(run(function, dict(model.named_parameters()), tokens))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    "mode, backend",
    [("bottleneck", backend) for backend in BACKENDS] + [(mode, FUSED) for mode in ("sequential", "cross", "shared")],
)
def test_compile_fullgraph(mode, backend):
    torch._dynamo.reset()
    model, names, tokens = small(backend, mode, num_layers=2)
    masks = key_masks(names)
    plain = run(forward_of(model, names, masks, "cls"), dict(model.named_parameters()), tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = run(forward_of(compiled, names, masks, "cls"), dict(model.named_parameters()), tokens)
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", sorted({"eager", FUSED}))
def test_one_compilation_for_all_batch_sizes_and_lengths(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, counts = randomise(BottleneckFusionLayer(("rgb", "flow"), D, num_heads=HEADS, backend=backend)), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, a, b in ((2, 35, 20), (3, 50, 11), (5, 17, 64)):
        tokens = {"rgb": torch.randn(batch, a, D), "flow": torch.randn(batch, b, D)}
        bottleneck = torch.randn(1, 4, D)
        (outputs, z), expected = compiled(tokens, bottleneck), model(tokens, bottleneck)
        torch.testing.assert_close((outputs, z), expected, rtol=1e-4, atol=1e-4)
        (z.sum() + sum(y.sum() for y in outputs.values())).backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_eager_is_sdpa():
    """The plain path uses torch's own fused attention, once for every modality and layer."""
    model, names, tokens = small("eager")
    calls = []
    original = F.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    F.scaled_dot_product_attention = counted
    try:
        forward_of(model, names)(*tokens)
    finally:
        F.scaled_dot_product_attention = original
    assert len(calls) == 6


X = torch.zeros(2, 4, D)


def layer(**options):
    return BottleneckFusionLayer(("a", "b"), D, **{"num_heads": HEADS, **options})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layer(num_heads=5), "channels is 12; it must be a multiple of num_heads, 5"),
        (lambda: layer(mlp_channels=0), "mlp_channels is 0"),
        (lambda: layer(update="max"), "update is 'max'; allowed are 'mean', 'sequential'"),
        (lambda: layer(backend="fast"), "backend is 'fast'; allowed are 'auto'"),
        (lambda: layer(dropout=1.0), "dropout is 1.0"),
        (lambda: layer(stochastic_depth=-0.1), "stochastic_depth is -0.1"),
        (lambda: BottleneckFusionLayer((), D), "1 to 8 different names"),
        (lambda: BottleneckFusionLayer(("a", "a"), D), "1 to 8 different names"),
        (lambda: BottleneckFusionLayer(("a.b",), D), "modalities has 'a.b'"),
        (lambda: BottleneckFusionLayer(("keys",), D), "modalities has 'keys'"),
        (lambda: JointLayer(("a", "b"), D, share_weights=False), "share_weights is False"),
        (lambda: MultimodalEncoder(("a",), D, 0), "num_layers is 0"),
        (lambda: MultimodalEncoder(("a",), D, 2, fusion_layer=3), "fusion_layer is 3; it must be from 0 to num_layers, 2"),
        (lambda: MultimodalEncoder(("a",), D, 2, fusion="sum"), "fusion is 'sum'; allowed are 'bottleneck'"),
        (lambda: MultimodalEncoder(("a",), D, 2, fusion="shared"), "fusion='shared' needs it True"),
        (lambda: MultimodalEncoder(("a",), D, 2, num_bottlenecks=0), "num_bottlenecks is 0"),
        (lambda: layer()({}), "tokens is empty; it must have one or more of 'a', 'b'"),
        (lambda: layer()({"c": X}), "tokens has 'c'; allowed are 'a', 'b'"),
        (lambda: layer()({"a": X[..., 1:]}), r"tokens\['a'\] has shape \(2, 4, 11\); it must be a tensor \(B, T, 12\)"),
        (lambda: layer()({"a": X, "b": X[:1]}), r"tokens\['b'\] has batch 1; it must be that of 'a', 2"),
        (lambda: layer()({"a": None}), r"tokens\['a'\] has type NoneType"),
        (lambda: layer()({"a": X}, X[..., 1:]), r"bottleneck has shape \(2, 4, 11\); it must be a tensor \(2 or 1, Z, 12\)"),
        (lambda: layer()({"a": X}, rows="first"), "rows is 'first'; allowed are 'all', 'cls'"),
        (lambda: layer()({"a": X[:, :0]}, rows="cls"), "needs the row of a CLS token"),
        (lambda: layer()({"a": X}, key_masks={"b": None}), "key_masks has 'b'; allowed are the modalities of the tokens: 'a'"),
        (
            lambda: layer()({"a": X}, key_masks={"a": torch.ones(2, 3, dtype=torch.bool)}),
            r"key_masks\['a'\] has shape \(2, 3\); it must be \(B, M\) = \(2, 4\)",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layer()([X, X]), "tokens is a list; it must be a dict"),
        (lambda: layer()({"a": X}, key_masks=[None]), "key_masks is a list"),
        (lambda: layer()({"a": X}, key_masks={"a": X[..., 0]}), r"key_masks\['a'\] is a torch.float32"),
        (lambda: CrossModalLayer(("a",), D, num_heads=HEADS)([X]), "tokens is a list"),
    ],
)
def test_wrong_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()
