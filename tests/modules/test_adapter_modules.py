"""Adapters, banks, fusion, Kronecker layers and invertible adapters alone, against formulas written once more."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmkernels import _library
from mmkernels.modules import Adapter, AdapterBank, AdapterConfig, AdapterFusion, InvertibleAdapter, PHMAdapter, set_backend
from mmkernels.modules.adapter import PRESETS, PHMLinear, fuse_bottlenecks
from mmkernels.ops._shared import dropout
from mmkernels.ops._shared.dropout import keep_mask
from mmkernels.testing import assert_within_budget

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
C, B, T = 16, 3, 5


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def rows(*shape, seed=1):
    return torch.randn(*(shape or (B, T, C)), generator=torch.Generator().manual_seed(seed))


def weights(adapter):
    return adapter.adapter_down[-1].weight, adapter.adapter_down[-1].bias, adapter.adapter_up.weight, adapter.adapter_up.bias


def test_presets_begin_where_they_should():
    h, r, norm = rows(), rows(seed=2), nn.LayerNorm(C)
    plain = norm(h + r)
    for name, config in PRESETS.items():
        adapter = (PHMAdapter if config.phm_layer else Adapter)(C, AdapterConfig.of(config, reduction_factor=4))
        out = adapter.eval()(h, r, norm)
        begin = h + r if not config.original_ln_after else plain
        if config.original_ln_before and not config.residual_before_ln:
            begin = plain
        tolerance = 0.0 if config.init_weights == "mam_adapter" else 0.05
        assert float((out - begin).abs().max()) <= tolerance + 1e-6, name
    assert Adapter(768).bottleneck == 48 and Adapter(8, reduction := AdapterConfig(reduction_factor=16)).bottleneck == 1
    assert reduction.bottleneck(8) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_formulas(backend):
    """Pfeiffer, Houlsby and parallel adapters, with gradients."""
    for preset in ("seq_bn", "double_seq_bn", "scaled_par_bn"):
        adapter = randomized(Adapter(C, preset, backend=backend))
        norm = randomized(nn.LayerNorm(C), 5)
        results = []
        for ours in (True, False):
            h, r = rows().requires_grad_(), rows(seed=2).requires_grad_()
            down, b_down, up, b_up = weights(adapter)
            if ours:
                out = adapter(h, r, norm)
            elif preset == "seq_bn":
                x = norm(h + r)
                out = norm(F.linear(torch.relu(F.linear(x, down, b_down)), up, b_up) + h + r)
            elif preset == "double_seq_bn":
                out = norm(F.linear(F.silu(F.linear(h, down, b_down)), up, b_up) + h + r)
            else:
                out = norm(adapter.scaling * F.linear(torch.relu(F.linear(r, down, b_down)), up, b_up) + h + r)
            gradients = torch.autograd.grad((out * rows(seed=3)).sum(), [h, r, *adapter.parameters(), *norm.parameters()])
            results.append([out.detach(), *gradients])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "scaled_par_bn", "AdapterPlus"])
def test_bank(preset, backend):
    """Each row by its own adapter, of different sizes; -1 is none; per token as well; gradients of everybody."""
    config = AdapterConfig.of(preset, stochastic_depth=0.0)
    bank = AdapterBank({n: Adapter(C, config, bottleneck=s, backend=backend) for n, s in zip("xyz", (2, 5, 3), strict=True)})
    bank.backend = backend
    randomized(bank)
    norm = randomized(nn.LayerNorm(C), 5)
    h, r = rows(4, T, C), rows(4, T, C, seed=2)
    index = torch.tensor([2, 0, -1, 2])
    out = bank(h, r, norm, index=index)
    plain = norm(h + r) if config.original_ln_after else h
    expected = torch.stack([plain[i] if n < 0 else bank["xyz"[n]](h, r, norm)[i] for i, n in enumerate(index.tolist())])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    (out * rows(4, T, C, seed=3)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in bank.named_parameters() if p.grad is not None}
    bank.zero_grad()
    (expected * rows(4, T, C, seed=3)).sum().backward()
    for name, parameter in bank.named_parameters():
        if name.startswith("y."):
            assert name not in gradients or not gradients[name].any()
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-4)
    tokens = torch.tensor([0, 1, 2, 1, 0]).expand(4, T)
    whole = torch.stack([bank[n](h, r, norm) for n in "xyz"])
    expected = whole.gather(0, tokens[None, :, :, None].expand(1, 4, T, C))[0]
    torch.testing.assert_close(bank(h, r, norm, index=tokens), expected, atol=1e-5, rtol=1e-4)
    assert list(bank.state_dict()) == [f"{n}.{key}" for n in "xyz" for key in bank[n].state_dict()]


def test_bank_of_different_adapters_is_refused():
    bank = AdapterBank({"a": Adapter(C, "seq_bn"), "b": Adapter(C, "double_seq_bn")})
    assert not bank.alike(["a", "b"]) and bank.alike(["a", "a"])
    with pytest.raises(ValueError, match="adapter 'w' is unknown; known are "):
        bank(rows(), rows(seed=2), nn.LayerNorm(C), index=torch.zeros(B, dtype=torch.int64), names=["w"])
    wide = AdapterBank({"a": Adapter(C, "seq_bn"), "b": Adapter(2 * C, "seq_bn")})
    with pytest.raises(ValueError, match="differ in more than their bottlenecks"):
        wide(rows(), rows(seed=2), nn.LayerNorm(C), index=torch.zeros(B, dtype=torch.int64))
    assert set_backend(wide, "eager").backend == "eager"
    with pytest.raises(ValueError, match="differ in more than their bottlenecks"):
        bank(rows(), rows(), index=torch.zeros(B, dtype=torch.int64))


def test_kronecker_weights():
    config = AdapterConfig.of("compacter", reduction_factor=2)
    layer = randomized(PHMLinear(C, 8, AdapterConfig.of(config, shared_phm_rule=False)))
    expected = sum(torch.kron(layer.phm_rule[i], layer.W_left[i] @ layer.W_right[i]) for i in range(4))
    torch.testing.assert_close(layer(rows()), rows() @ expected + layer.b)
    with pytest.raises(ValueError, match="out_features is 6; phm_dim 4 must divide it"):
        PHMLinear(C, 6, config)
    adapter = PHMAdapter(C, config)
    assert "shared_parameters.phm_rule" in adapter.state_dict()
    shared = nn.ParameterDict({"phm_rule": nn.Parameter(torch.randn(4, 4, 4))})
    two = [PHMAdapter(C, config, shared=shared) for _ in range(2)]
    sum(a(rows()).square().sum() for a in two).backward()
    assert shared["phm_rule"].grad is not None and all("phm_rule" not in name for name in two[0].state_dict())


FUSIONS = [{}, dict(value=False), dict(key=False), dict(query=False), dict(residual_before=True), dict(query_before_ln=True)]


@pytest.mark.parametrize("options", FUSIONS, ids=str)
def test_fusion_needs_neither_keys_nor_values(options):
    """Absorbed, and with the bottlenecks alone, against keys and values of everything; gradients too."""
    fusion = randomized(AdapterFusion(C, {"regularization": False, **options}))
    adapters = [randomized(Adapter(C, "scaled_par_bn", bottleneck=size), size) for size in (2, 4, 3)]
    results = []
    for way in ("eager", "absorbed", "bottlenecks"):
        fusion.backend = "eager" if way == "eager" else "auto"
        x, query, residual = (rows(seed=seed).requires_grad_() for seed in (1, 2, 3))
        if way == "bottlenecks":
            out = fuse_bottlenecks(fusion, adapters, query, x, residual)
        else:
            out = fusion(query, [adapter.up(x) for adapter in adapters], residual)
        wanted = [x, query, residual, *fusion.parameters(), *(p for a in adapters for p in a.parameters())]
        gradients = torch.autograd.grad((out * rows(seed=4)).sum(), wanted, allow_unused=True)
        results.append([out.detach(), *gradients])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            actual, expected = (torch.zeros(()) if t is None else t for t in (actual, expected))
            torch.testing.assert_close(actual.broadcast_to(expected.shape), expected, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("residual_before", [False, True])
def test_dropped_scores_of_a_fusion(residual_before, monkeypatch):
    """The same on every backend, and those of plain PyTorch and of bottlenecks where its dropout drops the same scores."""
    fusion = randomized(AdapterFusion(C, {"residual_before": residual_before}, dropout=0.4)).train()
    fusion.keep_attention = True
    adapters = [randomized(Adapter(C, bottleneck=size), size) for size in (2, 4, 3)]
    x, query, residual = (rows(seed=seed) for seed in (1, 2, 3))
    seeds = []

    def by_counter(scores, p, training=True):
        keep = keep_mask(seeds[-1], (1, 1, scores[..., 0].numel(), scores.shape[-1]), p).view(scores.shape)
        return torch.where(keep, scores / (1.0 - p), 0.0)

    monkeypatch.setattr(dropout, "draw_seed", lambda device: seeds.append(torch.tensor([11])) or seeds[-1])
    results = []
    for backend in ("auto", "reference", "eager", "bottlenecks"):
        fusion.backend = backend if backend != "bottlenecks" else "auto"
        if backend in ("eager", "bottlenecks"):
            monkeypatch.setattr(F, "dropout", by_counter)
        if backend == "bottlenecks":
            out = fuse_bottlenecks(fusion, adapters, query, x, residual)
        else:
            out = fusion(query, [adapter.up(x) for adapter in adapters], residual)
        results.append((out.detach(), fusion.attention))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_fusion_begins_as_published_and_cools_in_training_alone():
    fusion = AdapterFusion(C, {"temperature": True})
    assert float(fusion.value.weight.diagonal().sum()) == C and float(fusion.value.weight[0, 1]) == pytest.approx(1e-6)
    assert float(fusion.regularization().detach()) == pytest.approx(0.01 * (C * C - C) * 1e-12, rel=1e-3)
    u, x = rows(B, T, 2, C), rows()
    fusion.eval()(x, u, x)
    assert fusion.T == 50.0
    fusion.train()(x, u, x)
    assert fusion.T == pytest.approx(49.95)
    for wrong, message in (("dynamics", "config is 'dynamics'"), ({"values": True}, "unknown option 'values'")):
        with pytest.raises(ValueError, match=message):
            AdapterFusion(C, wrong)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [16, 7])
@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_invertible_adapters(kind, channels, backend):
    adapter = randomized(InvertibleAdapter(channels, kind, activation="swish", backend=backend))
    x = rows(B, T, channels).requires_grad_()
    y = adapter(x)
    torch.testing.assert_close(adapter(y, inverse=True), x, atol=1e-5, rtol=1e-4)
    first = channels // 2
    a, b = x[..., :first], x[..., first:]

    def network(layers, x):
        return layers[2](F.silu(layers[0](x)))

    if kind == "nice":
        a = a + network(adapter.F, b)
        b = b + network(adapter.G, a)
    else:
        s, t = network(adapter.s2, b).chunk(2, -1)
        a = torch.exp(3.18 * torch.atan(s / 5)) * a + t
        s, t = network(adapter.s1, a).chunk(2, -1)
        b = torch.exp(3.18 * torch.atan(s / 5)) * b + t
    torch.testing.assert_close(y, torch.cat((a, b), -1), atol=1e-5, rtol=1e-4)
    moved = copy.deepcopy(adapter).to(torch.float64)  # it has functions of its own, none of which may be nn.Module's
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
    # an inverse has the inverse Jacobian
    jacobian = torch.autograd.functional.jacobian(lambda v: adapter(v[None, None])[0, 0], x[0, 0].detach())
    back = torch.autograd.functional.jacobian(lambda v: adapter(v[None, None], inverse=True)[0, 0], y[0, 0].detach())
    torch.testing.assert_close(jacobian @ back, torch.eye(channels), atol=1e-4, rtol=1e-3)


def test_depth_and_dropout():
    adapter = randomized(Adapter(C, "AdapterPlus", bottleneck=4)).train()
    h, r = rows(2000, 1, C), torch.zeros(2000, 1, C)
    torch.manual_seed(0)
    kept = (adapter(h, r) - h).abs().flatten(1).amax(1) > 1e-4
    assert 0.85 < float(kept.float().mean()) < 0.95
    whole = adapter.eval()(h, r) - h
    torch.manual_seed(0)
    torch.testing.assert_close((adapter.train()(h, r) - h)[kept], whole[kept] / 0.9, atol=1e-4, rtol=1e-3)
    dropped = randomized(Adapter(C, AdapterConfig(dropout=0.5), bottleneck=4)).train()
    change = dropped(h, r) - h
    zeros = float((change == 0).float().mean())
    assert 0.45 < zeros < 0.55 and not (dropped.eval()(h, r) - h == 0).any()


def test_compiles_in_one_graph():
    bank = randomized(AdapterBank({n: Adapter(C, "seq_bn", bottleneck=4) for n in "ab"}))
    norm, index = nn.LayerNorm(C), torch.tensor([0, 1, 0])
    compiled = torch.compile(lambda h, r: bank(h, r, norm, index=index), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows(), rows(seed=2)), bank(rows(), rows(seed=2), norm, index=index))


def test_set_backend_and_wrong_arguments():
    adapter = set_backend(Adapter(C), "eager")
    assert adapter.backend == "eager"
    wrong = [
        (lambda: Adapter(C, "pfeifer"), ValueError, "config is 'pfeifer'"),
        (lambda: Adapter(C, 3), TypeError, "config is a int"),
        (lambda: Adapter(C, {"architecture": "lora"}), ValueError, "architecture is 'lora'"),
        (lambda: Adapter(C, AdapterConfig(scaling="wide")), ValueError, "scaling is 'wide'"),
        (lambda: Adapter(C, AdapterConfig(dropout=1.0)), ValueError, "dropout is 1.0"),
        (lambda: Adapter(C, backend="fast"), ValueError, "backend is 'fast'"),
        (lambda: InvertibleAdapter(C, "flow"), ValueError, "kind is 'flow'"),
        (lambda: InvertibleAdapter(C, activation="sine"), ValueError, "activation is 'sine'"),
    ]
    for make, error, message in wrong:
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize("options", [{}, {"use_gating": True}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_bank_checks_its_index(backend, options):
    bank = AdapterBank({name: Adapter(16, {"reduction_factor": 4, **options}) for name in "ab"}, backend=backend)
    x = torch.randn(2, 3, 16)
    for index, error, message in (
        (torch.tensor([0, 99]), IndexError, "index has numbers from 0 to 99"),
        (torch.tensor([-5, 0]), IndexError, "index has numbers from -5 to 0"),
        (torch.tensor([0.0, 1.0]), TypeError, "index has dtype torch.float32"),
    ):
        with pytest.raises(error) as raised:
            bank(x, index=index)
        assert message in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_gates_of_an_index_of_tokens(backend):
    """Every token has the gate that its own adapter makes of the whole example."""
    torch.manual_seed(0)
    bank = AdapterBank({name: Adapter(16, {"reduction_factor": 4, "use_gating": True}) for name in "ab"}, backend=backend)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    x, index = torch.randn(2, 3, 16), torch.tensor([[0, 1, -1], [1, 0, 0]])

    def by_token(bank, x):
        alone = [bank["a"](x), bank["b"](x), x]
        return torch.stack([torch.stack([alone[n][b, t] for t, n in enumerate(row)]) for b, row in enumerate(index.tolist())])

    plain = set_backend(copy.deepcopy(bank), "eager")
    exact = by_token(copy.deepcopy(plain).double(), x.double())
    assert_within_budget(bank(x, index=index), exact, by_token(plain, x), "output")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Adapter(16, "compacter"), "PHMAdapter has those"),
        (lambda: Adapter(16, bottleneck=0), "bottleneck is 0"),
        (lambda: Adapter(0), "channels is 0"),
        (lambda: AdapterBank()(torch.zeros(1, 1, 4), index=torch.tensor([0])), "names is empty"),
    ],
)
def test_impossible_adapters(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
