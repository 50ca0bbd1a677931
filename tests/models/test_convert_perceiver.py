"""`mmkernels.convert` on live Perceiver models of transformers: the same outputs, gradients and state dict."""

import copy
import importlib
import inspect

import pytest
import torch
import transformers
from test_perceiver_huggingface import CASES, POINTS, input_of, library_model

import mmkernels
from mmkernels import _library
from mmkernels.modules import convert
from mmkernels.testing import assert_within_budget

transformers.logging.set_verbosity_error()


def pair(kind, **changes):
    plain = library_model(kind, **changes).float()
    converted = copy.deepcopy(plain)
    return plain, converted, mmkernels.convert(converted)


def results(model, kind, **options):
    """Outputs, and gradients of all parameters and of the input."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    inputs = input_of(kind)
    if isinstance(inputs, dict):
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        options = {"subsampled_output_points": POINTS, **options}
    elif inputs.is_floating_point():
        inputs = inputs.to(dtype).requires_grad_()
    out = model(inputs=inputs, **options)
    out = out.last_hidden_state if kind == "PerceiverModel" else out.logits
    out = out if isinstance(out, dict) else {"output": out}
    generator = torch.Generator().manual_seed(5)
    sum((t * torch.randn(t.shape, generator=generator).to(dtype)).sum() for t in out.values()).backward()
    found = {name: tensor.detach() for name, tensor in out.items()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(inputs, torch.Tensor) and inputs.requires_grad:
        found["inputs"] = inputs.grad
    return found


def check_same(plain, converted, kind, **options):
    """The converted model's error is of the size of the library's own: both in float32, against the library in float64."""
    exact = results(copy.deepcopy(plain).double(), kind, **options)
    # A key's bias moves all scores of a row alike: its gradient is what is left of others that cancel.
    scales = {n: max(1.0, float(exact[n.replace("key.bias", "key.weight")].abs().max())) for n in exact}
    worst = []
    for model in (plain, converted):
        found = results(model, kind, **options)
        assert found.keys() == exact.keys()
        worst.append(max(float((found[n].double() - t).abs().max()) / scales[n] for n, t in exact.items()))
    assert worst[1] <= 3 * worst[0] + 1e-6, worst


def mask_for(kind):
    mask = torch.ones(2, 11 if kind == "PerceiverModel" else 9, dtype=torch.long)
    mask[0, 5:] = 0
    return mask


@pytest.mark.parametrize("kind", CASES)
def test_outputs_and_gradients(kind):
    plain, converted, report = pair(kind)
    blocks = 3 if kind == "PerceiverModel" else 4  # the cross-attention, two self-attentions, the decoder
    linears = {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert {n for n, what in report.replaced.items() if what == convert.PlainLinear.__doc__} == linears
    gelus = {name for name, module in plain.named_modules() if type(module).__name__ == "GELUActivation"}
    assert {n for n, what in report.replaced.items() if what == convert.LibraryGelu.__doc__} == gelus and len(gelus) == blocks
    attentions = report.replaced.keys() - linears - gelus
    assert len(attentions) == blocks and {report.replaced[n] for n in attentions} == {convert.PerceiverAttention.__doc__}
    assert not report.kept and all(type(module) is type(converted.get_submodule(n)) for n, module in plain.named_modules())
    before, after = plain.state_dict(), converted.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    check_same(plain, converted, kind)
    assert set(mmkernels.convert(converted).kept.values()) == {"it is converted already"}


@pytest.mark.parametrize("kind", ["PerceiverForMaskedLM", "PerceiverForSequenceClassification", "PerceiverModel"])
def test_masks(kind):
    plain, converted, _ = pair(kind)
    check_same(plain, converted, kind, attention_mask=mask_for(kind))
    nothing = mask_for(kind)
    nothing[1] = 0  # the library attends to everything then
    check_same(plain, converted, kind, attention_mask=nothing)
    soft = mask_for(kind).float()
    soft[1, 3] = 0.25
    check_same(plain, converted, kind, attention_mask=soft)


@pytest.fixture
def calls(monkeypatch):
    """What is computed by the ops, in order."""
    found = []
    for name in ("attention", "latent_attention"):
        op = getattr(mmkernels.ops, name)
        monkeypatch.setattr(
            mmkernels.ops,
            name,
            lambda q, *args, op=op, name=name, **kwargs: (found.append((name, q.shape[0])), op(q, *args, **kwargs))[1],
        )
    return found


def test_what_computes(calls):
    """One query for all examples; with probabilities, head masks or other modules in the place of a Linear the library."""
    _, converted, _ = pair("PerceiverForSequenceClassification", attention_probs_dropout_prob=0.1)
    ids = input_of("PerceiverForSequenceClassification")
    expected = converted(inputs=ids).logits
    cross, own = ("latent_attention", 1), ("attention", 2)
    assert calls == [cross, own, own, own, own, cross]
    calls.clear()
    out = converted(inputs=ids, output_attentions=True)
    assert not calls and len(out.attentions) == 4 and len(out.cross_attentions) == 2
    torch.testing.assert_close(out.logits, expected)
    if "head_mask" in inspect.signature(converted.forward).parameters:  # until transformers 5
        torch.testing.assert_close(converted(inputs=ids, head_mask=torch.ones(4)).logits, expected)
        assert calls == [cross, cross]  # the cross-attentions have no head mask
        calls.clear()
    converted.train()(inputs=ids)  # dropped probabilities
    assert calls == [own] * 6
    calls.clear()
    attention = converted.eval().perceiver.encoder.cross_attention.attention
    attention.self.value = torch.nn.Sequential(attention.self.value)
    torch.testing.assert_close(converted(inputs=ids).logits, expected)
    assert calls == [own, own, own, own, cross]


def test_attention_without_head_masks(calls, monkeypatch):
    """As transformers 5 has it."""
    kind = transformers.models.perceiver.modeling_perceiver.PerceiverAttention
    forward = kind.forward
    if "head_mask" in inspect.signature(forward).parameters:

        def newer(self, hidden_states, attention_mask=None, inputs=None, inputs_mask=None, output_attentions=False):
            return forward(self, hidden_states, attention_mask, None, inputs, inputs_mask, output_attentions)

        monkeypatch.setattr(kind, "forward", newer)
    model = library_model("PerceiverModel").float()
    attention = model.encoder.cross_attention.attention
    hidden, inputs = (torch.randn(2, 5, getattr(attention.self, n).normalized_shape[0]) for n in ("layernorm1", "layernorm2"))
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 2:] = torch.finfo(torch.float32).min
    arguments = (hidden, None, inputs, mask)
    (expected,), with_weights = attention(*arguments), attention(*arguments, True)
    mmkernels.convert(model)
    torch.testing.assert_close(attention(*arguments)[0], expected)
    torch.testing.assert_close(attention(hidden, inputs=inputs, inputs_mask=mask)[0], expected)
    assert calls == [("latent_attention", 2)] * 2
    for actual, of_library in zip(attention(*arguments, True), with_weights, strict=True):
        assert torch.equal(actual, of_library)


def test_weights_changed_after_conversion():
    plain, converted, _ = pair("PerceiverModel")
    converted(inputs=input_of("PerceiverModel").float())
    for model in (plain, converted):
        torch.manual_seed(3)
        linear = torch.nn.Linear(7, 7)
        model.encoder.cross_attention.attention.self.value = linear
        with torch.no_grad():
            model.encoder.cross_attention.attention.self.query.weight.mul_(0.5)
    check_same(plain, converted, "PerceiverModel")
    again = copy.deepcopy(converted)
    with torch.no_grad():
        converted.encoder.cross_attention.attention.self.key.weight.zero_()
    check_same(plain, again, "PerceiverModel")


@pytest.mark.parametrize("kind", CASES)
def test_linear_layers_where_ours_is_faster(kind, monkeypatch):
    """All of them, in copies of the converted model too, but for projections that a cross-attention absorbs."""
    monkeypatch.setattr(_library, "SLOW_MKL", True)
    monkeypatch.setattr(importlib.import_module("mmkernels.ops.linear.api"), "LEAST_ROWS", 1)
    called, linear = [], mmkernels.ops.linear
    monkeypatch.setattr(mmkernels.ops, "linear", lambda *layer, backend: (called.append(layer[1]), linear(*layer))[1])
    plain, converted, _ = pair(kind)
    converted = copy.deepcopy(converted)
    check_same(plain, converted, kind)
    own = {n: module.weight for n, module in converted.named_modules() if type(module) is torch.nn.Linear}
    missed = [n for n, weight in own.items() if not any(weight is w for w in called)]
    assert all("cross_attention.attention." in n for n in missed), missed


def test_adapters_of_peft_find_the_linear_layers():
    peft = pytest.importorskip("peft")
    plain, converted, _ = pair("PerceiverForSequenceClassification")
    ids = input_of("PerceiverForSequenceClassification")
    found = []
    for model in (copy.deepcopy(plain).double(), plain, converted):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["dense1", "query"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        found.append((model(inputs=ids).logits, sorted(model.state_dict())))
    (exact, _), (expected, names), (actual, found_names) = found
    assert names == found_names
    assert_within_budget(actual, exact, expected, "logits", factor=3.0)


def test_dropout_is_dropped():
    """In training attention probabilities are dropped with the library's frequency, and their mean stays."""
    plain, converted, _ = pair("PerceiverModel", attention_probs_dropout_prob=0.3)
    inputs = input_of("PerceiverModel").float()
    cross = converted.encoder.cross_attention.attention
    latents = converted.embeddings(batch_size=2)
    expected = cross.eval()(latents, inputs=inputs)[0]
    cross.train()
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([cross(latents, inputs=inputs)[0] for _ in range(1000)])
        theirs = plain.encoder.cross_attention.attention.train()
        other = torch.stack([theirs(latents, inputs=inputs)[0] for _ in range(1000)])
    torch.testing.assert_close(samples.mean(0), expected, rtol=0, atol=float(samples.std(0).max()) * 5 / 1000**0.5)
    torch.testing.assert_close(samples.std(0), other.std(0), rtol=0.15, atol=1e-3)


@pytest.mark.parametrize("kind", ["PerceiverForMaskedLM", "PerceiverForImageClassificationFourier"])
def test_autocast(kind):
    plain, converted, _ = pair(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inputs = input_of(kind)
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        expected, actual = (model(inputs=inputs).logits for model in (plain, converted))
    assert actual.dtype == expected.dtype
    exact = plain(inputs=inputs).logits
    allowed = 2 * float((expected.float() - exact).abs().max())
    assert float((actual.float() - exact).abs().max()) <= allowed


def test_compiled():
    plain, converted, _ = pair("PerceiverForSequenceClassification")
    ids = input_of("PerceiverForSequenceClassification")
    compiled = torch.compile(converted.perceiver.encoder.cross_attention.attention, fullgraph=True, backend="eager")
    latents = converted.perceiver.embeddings(batch_size=2)
    inputs, _, _ = plain.perceiver.input_preprocessor(ids)
    mask = torch.zeros(2, 1, 1, 9)
    mask[0, ..., 4:] = torch.finfo(torch.float32).min
    expected = plain.perceiver.encoder.cross_attention.attention(latents, inputs=inputs, inputs_mask=mask)[0]
    torch.testing.assert_close(compiled(latents, inputs=inputs, inputs_mask=mask)[0], expected, rtol=1e-4, atol=1e-4)


def test_filter():
    model = library_model("PerceiverForMaskedLM")
    report = mmkernels.convert(model, lambda name, module: "decoder" in name)
    first, *linears = (name for name, what in report.replaced.items() if what != convert.LibraryGelu.__doc__)
    assert (
        all("decoder" in name for name in report.replaced) and first == "perceiver.decoder.decoding_cross_attention.attention"
    )
    assert len(linears) == 6 and all(type(model.get_submodule(n)) is torch.nn.Linear for n in linears)
