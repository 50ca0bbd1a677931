"""Cross-attention as a decoder: which op computes it, against a plain twin; and what is kept between calls at inference."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmkernels import ops
from mmkernels.modules import LatentCrossAttention
from mmkernels.testing import max_error


class Plain(nn.Module):
    """What a user would write, with the same names."""

    def __init__(self, query_channels, input_channels, qk, v, out, heads):
        super().__init__()
        self.heads = heads
        self.query_norm, self.input_norm = nn.LayerNorm(query_channels), nn.LayerNorm(input_channels)
        self.query, self.key = nn.Linear(query_channels, qk), nn.Linear(input_channels, qk)
        self.value, self.output = nn.Linear(input_channels, v), nn.Linear(v, out)

    def forward(self, queries, inputs, query_position, position, key_mask, query_mask):
        queries = torch.cat([queries, query_position.expand(len(queries), -1, -1)], -1)
        inputs = torch.cat([inputs, position.expand(len(inputs), -1, -1)], -1)
        a, b = self.query_norm(queries).expand(len(inputs), -1, -1), self.input_norm(inputs)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(a), self.key(b), self.value(b)))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~key_mask[:, None, None], -1e30)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.output(torch.where((query_mask & key_mask.any(1, keepdim=True))[..., None], out, 0.0))


def decoder(heads=1, backend="auto"):
    """A module and inputs for which folding into keys and values is the cheapest form."""
    torch.manual_seed(0)
    module = LatentCrossAttention(12, 48, num_heads=heads, qk_channels=48, v_channels=48, output_channels=9, backend=backend)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


@pytest.fixture
def called(monkeypatch):
    """The names of the ops that the module calls."""
    names = []
    for name in ("latent_attention", "latent_decode"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **kw: names.append(name) or op(*a, **kw))
    return names


@pytest.mark.parametrize("backend", ["auto", "reference", "eager"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_decoder_against_its_twin(called, heads, shared, backend):
    module, plain = decoder(heads, backend), Plain(12, 48, 48, 48, 9, heads).double()
    plain.load_state_dict(module.state_dict())
    queries, query_position = torch.randn(1 if shared else 3, 150, 8), torch.randn(150, 4)
    inputs, position = torch.randn(3, 6, 40), torch.randn(6, 8)
    key_mask, query_mask = torch.rand(3, 6) < 0.7, torch.rand(3, 150) < 0.8
    key_mask[2] = False
    arguments = [t.requires_grad_() for t in (queries, inputs, query_position, position)]
    doubles = [t.detach().double().requires_grad_() for t in arguments]
    names = dict(query_position=arguments[2], position=arguments[3], key_mask=key_mask, query_mask=query_mask)
    out = module(*arguments[:2], **names)
    expected = plain(*doubles, key_mask, query_mask)
    assert called == ([] if backend == "eager" else ["latent_decode"])
    if backend == "eager":  # SDPA's rows without keys are its own
        out, expected = out[:2], expected[:2]
    assert max_error(out, expected) < 1e-5
    cotangent = torch.randn(out.shape)
    ours = torch.autograd.grad(out, [*module.parameters(), *arguments], cotangent)
    exact = torch.autograd.grad(expected, [*plain.parameters(), *doubles], cotangent.double())
    wanted = [*dict(module.named_parameters()), "queries", "inputs", "query_position", "position"]
    for name, a, b in zip(wanted, ours, exact, strict=True):
        assert max_error(a, b) < 2e-5 * max(1.0, float(b.abs().max())), name


def test_nothing_behind_the_masks_of_a_decoder_leaks():
    module = decoder()
    queries, inputs = torch.randn(2, 150, 12), torch.randn(2, 6, 48)
    key_mask, query_mask = torch.rand(2, 6) < 0.7, torch.rand(2, 150) < 0.8
    clean = module(queries, inputs, key_mask=key_mask, query_mask=query_mask)
    gradients = torch.autograd.grad(clean.square().sum(), list(module.parameters()))
    queries[~query_mask], inputs[~key_mask] = float("nan"), float("nan")
    poisoned = module(queries, inputs, key_mask=key_mask, query_mask=query_mask)
    assert torch.equal(clean, poisoned)
    again = torch.autograd.grad(poisoned.square().sum(), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_few_queries_absorb_and_many_heads_project(called):
    LatentCrossAttention(32, 32)(torch.randn(1, 1, 32), torch.randn(2, 40, 32))  # a class head
    LatentCrossAttention(24, 40, num_heads=8, qk_channels=16, v_channels=24)(torch.randn(1, 64, 24), torch.randn(2, 32, 40))
    assert called == ["latent_attention"] * 2


def test_a_decoder_compiles_whole(called):
    module = decoder()
    queries, inputs = torch.randn(1, 150, 12), torch.randn(2, 6, 48)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, inputs), module(queries, inputs))
    assert "latent_decode" in called


# --- What is kept at inference ----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, backend="auto", heads=1):
        super().__init__()
        torch.manual_seed(0)
        self.latents = nn.Parameter(torch.randn(5, 16))
        self.cross = LatentCrossAttention(16, 8, num_heads=heads, backend=backend)
        with torch.no_grad():
            for parameter in self.cross.parameters():
                parameter.normal_(std=0.3)

    def forward(self, inputs, **options):
        return self.cross(self.latents[None], inputs, **options)


def fresh(model, *arguments, **options):
    """What the model gives without anything kept."""
    return copy.deepcopy(model)(*arguments, **options)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("heads", [1, 2])
def test_absorbed_queries_are_made_once(heads, mode):
    model, inputs = Encoder(heads=heads).eval(), torch.randn(3, 60, 8)
    trained = model(inputs)
    assert model.cross._kept is None  # with gradients nothing is kept
    with mode():
        first = model(inputs)
        kept = model.cross._kept
        assert kept[2].shape == (1, 5 * heads, 8)
        second = model(torch.cat([inputs, inputs], 1))  # a tensor of inference mode there
        assert model.cross._kept is kept and torch.equal(model(inputs), first)
    torch.testing.assert_close(first, trained)
    torch.testing.assert_close(second, first)
    mask = torch.rand(3, 60) < 0.5
    with mode():
        torch.testing.assert_close(model(inputs, key_mask=mask), fresh(model, inputs, key_mask=mask))
    poisoned = torch.where(mask[..., None], inputs, float("nan"))
    with mode():
        torch.testing.assert_close(model(poisoned, key_mask=mask), model(inputs, key_mask=mask))


def changes():
    def optimiser(model):
        model.latents.grad = torch.ones_like(model.latents)
        torch.optim.SGD([model.latents], 0.1).step()

    def load(model):
        model.load_state_dict({n: t + 0.1 for n, t in model.state_dict().items()})

    def data(model):
        model.train()
        model.latents.data.add_(1.0)
        model.eval()

    def replaced(model):
        model.cross.query.weight = nn.Parameter(torch.randn_like(model.cross.query.weight))

    def half_and_back(model):
        model.bfloat16().float()

    def new_data(model):
        model.cross.key.weight.data = torch.randn_like(model.cross.key.weight)

    def in_place(name):
        def change(model):
            with torch.no_grad():
                model.get_parameter(name).mul_(1.5)

        return change

    parts = ("query_norm.weight", "query_norm.bias", "query.weight", "query.bias", "key.weight", "input_norm.weight")
    every = {name: in_place(f"cross.{name}") for name in parts} | {"latents": in_place("latents")}
    every |= {"value.weight": in_place("cross.value.weight"), "input_norm.bias": in_place("cross.input_norm.bias")}
    return every | {f.__name__: f for f in (optimiser, load, data, replaced, half_and_back, new_data)}


@pytest.mark.parametrize("change", changes())
def test_every_change_of_a_weight_is_seen(change):
    model, inputs = Encoder().eval(), torch.randn(3, 60, 8)
    with torch.no_grad():
        before = model(inputs)
        assert model.cross._kept is not None
    with torch.enable_grad():
        changes()[change](model)
    with torch.no_grad():
        after = model(inputs)
        assert torch.equal(after, fresh(model, inputs)) and not torch.equal(after, before)


def test_memory_that_comes_again_is_not_taken_for_the_same_queries():
    module = Encoder().eval().cross
    inputs = torch.randn(1, 60, 8)
    with torch.no_grad():
        for _ in range(8):  # often at the address of the one before
            queries = torch.randn(1, 5, 16)
            assert torch.equal(module(queries, inputs), fresh(module, queries, inputs))
            del queries


def test_what_is_kept_is_no_part_of_the_model():
    model, inputs = Encoder().eval(), torch.randn(3, 60, 8)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(inputs)
        assert list(model.state_dict()) == keys and not list(model.buffers())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.cross._kept is None
            assert torch.equal(other(inputs), expected)
        half = copy.deepcopy(model).bfloat16()
        assert half(inputs.bfloat16()).dtype == torch.bfloat16
        wide = model.double()
        torch.testing.assert_close(wide(inputs.double()), expected.double())


def test_where_nothing_is_kept():
    model, inputs = Encoder().eval(), torch.randn(3, 60, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs)
        model.train()(inputs)
        torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(inputs)
        Encoder("reference").eval()(inputs)
        model.cross(torch.randn(3, 5, 16), inputs)  # queries of each example
    with torch.inference_mode():
        model.cross(torch.randn(1, 5, 16), inputs)  # no version counter
    assert model.cross._kept is None
    with torch.no_grad():
        out = torch.func.functional_call(model, {"latents": torch.zeros(5, 16)}, (inputs,))
        assert not torch.equal(out, model(inputs))
        assert torch.equal(out, F.linear(*_value_and_output(model, inputs, torch.zeros(5, 16))))


def _value_and_output(model, inputs, latents):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.latents.copy_(latents)
    seen = []
    other.cross.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    other(inputs)
    return seen[0], model.cross.output.weight, model.cross.output.bias
