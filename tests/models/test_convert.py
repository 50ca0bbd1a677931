"""`mmkernels.convert` on live models of `adapters` and PEFT: the same outputs, gradients and state dict, fewer calls."""

import collections
import copy
import importlib

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels import _library, ops, testing
from mmkernels.modules import convert
from mmkernels.modules.backend import own_gelu_is_faster

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
from adapters import composition as L  # noqa: E402

transformers.logging.set_verbosity_error()
BERT = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BERT |= dict(max_position_embeddings=24, attn_implementation="eager")
ROWS = 6
TASKS = torch.tensor([2, 0, 1, 0, 2, 1])


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """What is converted does not depend on the one that the tests run on."""
    for name in ("SLOW_MKL", "AVX512"):
        monkeypatch.setattr(_library, name, False)


@pytest.fixture
def called(any_processor, monkeypatch):
    """The weights that `ops.linear` gets, on a machine where it is the faster one."""
    monkeypatch.setattr(_library, "SLOW_MKL", True)
    monkeypatch.setattr(importlib.import_module("mmkernels.ops.linear.api"), "LEAST_ROWS", 1)
    weights, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda *layer, backend: (weights.append(layer[1]), linear(*layer, backend=backend))[1])
    return weights


def randomized(model, std=0.2):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "LayerNorm.weight" in name else noise)
    return model.eval()


def batch():
    ids = torch.randint(2, 60, (ROWS, 5), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def results(model, **extra):
    """Output and gradients of what trains."""
    model.zero_grad()
    out = model(**batch(), **extra)[0]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    if out.requires_grad:
        (out * cotangent).sum().backward()
    return {"output": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(plain, converted, **extra):
    expected, actual = results(plain, **extra), results(converted, **extra)
    for name in expected.keys() | actual.keys():
        one, other = actual.get(name), expected.get(name)
        if one is None or other is None:
            assert not (one if other is None else other).any(), name
            continue
        assert float((one - other).abs().max()) <= 2e-5 * max(1.0, float(other.abs().max())), name


def library_model(preset, changes=None):
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    adapters.init(model)
    for name, factor in (("a", 4), ("b", 2), ("c", 8)):
        options = {"reduction_factor": 4 if "compacter" in preset else factor, **(changes or {})}
        model.add_adapter(name, config=adapters.AdapterConfig.load(preset, **options))
    model.add_adapter_fusion(["a", "b", "c"])
    return randomized(model)


SETUPS = {
    "one": "a",
    "stack": L.Stack("a", "b"),
    "batch_split": L.BatchSplit("a", "b", "c", batch_sizes=[1, 3, 2]),
    "parallel": L.Parallel("a", "b", "c"),
    "split": L.Split("a", "b", splits=[2, 3]),
    "average": L.Average("a", "b", "c", weights=[1, 2, 3]),
    "multi_task": L.MultiTask("a", "b", "c"),
    "fuse": L.Fuse("a", "b", "c"),
    "parallel of stacks": L.Parallel(L.Stack("a", "b"), "c"),
}


@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "compacter", "seq_bn_inv"])
def test_adapters(preset):
    plain = library_model(preset)
    converted = copy.deepcopy(plain)
    before = {n: t.clone() for n, t in converted.state_dict().items()}
    report = mmkernels.convert(converted)
    assert len(report.replaced) == 8 and not report.kept  # two places, the attention and the GELU of two layers
    after = converted.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    for name, setup in SETUPS.items():
        extra = {"task_ids": TASKS} if name == "multi_task" else {}
        for model in (plain, converted):
            model.set_active_adapters(setup)
        check_same(plain, converted, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert plain(**batch())[0].dtype == converted(**batch())[0].dtype == torch.float32
    assert set(mmkernels.convert(converted).kept.values()) == {"it is converted already"}


def test_adapters_added_trained_and_deleted_later():
    plain = library_model("double_seq_bn")
    converted = copy.deepcopy(plain)
    mmkernels.convert(converted)
    for model in (plain, converted):
        torch.manual_seed(1)
        model.add_adapter("d", config="seq_bn")
        model.delete_adapter("b")
        model.train_adapter("d")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        model.eval()
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch())[0].square().sum().backward()
            optimizer.step()
    check_same(plain, converted)


def test_no_loop_over_the_adapters_of_a_batch():
    """The number of operations does not grow with the number of adapters but for the stacking of their weights."""
    counts = []
    for setup in (L.BatchSplit("a", "b", batch_sizes=3), L.BatchSplit("a", "b", "c", batch_sizes=2)):
        model = library_model("double_seq_bn")
        mmkernels.convert(model)
        model.set_active_adapters(setup)
        with torch.no_grad():
            model(**batch())  # numbers of the batch's adapters are made once
            with Count() as count:
                model(**batch())
        counts.append(count.others)
    assert counts[0] == counts[1]


class Count(TorchDispatchMode):
    others = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(word in str(function) for word in ("pad", "stack", "detach", "constant", "fill", "copy", "slice", "empty")):
            self.others += 1
        return function(*args, **(kwargs or {}))


def lora_model(names="abc", config="lora", **options):
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    adapters.init(model)
    for name, rank in zip(names, (4, 2, 8), strict=False):
        changes = {"r": rank} if config == "lora" else {}
        everywhere = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
        model.add_adapter(name, config=adapters.AdapterConfig.load(config, **everywhere, **changes, **options))
    return randomized(model)


@pytest.mark.parametrize("options", [{}, {"alpha": 3}], ids=str)
def test_lora_of_adapters(options):
    plain = lora_model(**options)
    converted = copy.deepcopy(plain)
    before = {n: t.clone() for n, t in converted.state_dict().items()}
    report = mmkernels.convert(converted)
    assert sum("LoRA" in what for what in report.replaced.values()) == 10 and not report.kept
    after = converted.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    calls = []
    for name, setup in SETUPS.items():
        if name not in ("one", "batch_split", "average", "multi_task"):  # the library cannot do the others with LoRA layers
            continue
        for model in (plain, converted):
            model.set_active_adapters(setup)
        check_same(plain, converted, **({"task_ids": TASKS} if name == "multi_task" else {}))
        with Count() as plain_count, torch.no_grad():
            plain(**batch(), **({"task_ids": TASKS} if name == "multi_task" else {}))
        with Count() as count, torch.no_grad():
            converted(**batch(), **({"task_ids": TASKS} if name == "multi_task" else {}))
        calls.append((name, count.others < plain_count.others))
    assert all(fewer for _, fewer in calls), calls
    for model in (plain, converted):
        model.set_active_adapters("a")
        model.merge_adapter("a")
    check_same(plain, converted)
    for model in (plain, converted):
        model.reset_adapter()
    check_same(plain, converted)


GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, attn_implementation="eager")


@pytest.mark.parametrize("method", ["seq_bn", "lora"])
@pytest.mark.parametrize("kind, options", [("Bert", BERT), ("GPT2", GPT2)])
def test_linear_layers_where_ours_is_faster(kind, options, method, called):
    """With adapters, without, and with those that come later; GPT-2's weights lie the other way round."""
    plain = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    adapters.init(plain)
    everywhere = {} if method == "seq_bn" else dict(intermediate_lora=True, output_lora=True)
    plain.add_adapter("a", config=adapters.AdapterConfig.load(method, **everywhere))
    converted = copy.deepcopy(randomized(plain))
    mmkernels.convert(converted)
    for model in (plain, converted):
        torch.manual_seed(6)
        model.add_adapter("later", config=adapters.AdapterConfig.load("lora", r=2, intermediate_lora=True, output_lora=True))
        randomized(model)
    layers = [
        m
        for n, m in converted.named_modules()
        if type(m).__name__ == "LoRALinearTorch" or n.endswith("attention.output.dense")
    ]
    for setup in (None, "a", "later"):
        called.clear()
        for model in (plain, converted):
            model.set_active_adapters(setup)
        check_same(plain, converted)
        pointers = {weight.data_ptr() for weight in called}
        assert layers and all(layer.weight.data_ptr() in pointers for layer in layers), setup


def test_methods_of_adapters_that_stay():
    for config, options in (("lora", {"use_gating": True}), ("dora", {}), ("lora", {"dropout": 0.5})):
        plain = lora_model("a", config, **options).train("dropout" in options)
        converted = copy.deepcopy(plain)
        assert mmkernels.convert(converted).replaced
        for model in (plain, converted):
            model.set_active_adapters("a")
            torch.manual_seed(0)
            model.out = model(**batch())[0]
        assert torch.equal(plain.out, converted.out)
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    adapters.init(model)
    model.add_adapter("i", config="ia3")
    model.add_adapter("p", config=adapters.PrefixTuningConfig(bottleneck_size=4))
    report = mmkernels.convert(model)
    assert not any("LoRA" in what for what in report.replaced.values())
    assert {why.partition(":")[0] for why in report.kept.values()} == {"it has IA3", "it has PrefixTuningLayer"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
def test_attention_with_and_without_prefixes(kind, attention):
    config = getattr(transformers, f"{kind}Config")(**BERT | {"attn_implementation": attention})
    plain = getattr(transformers, f"{kind}Model")(config)
    adapters.init(plain)
    plain.add_adapter("a", config="seq_bn")
    for name in ("p", "q"):
        plain.add_adapter(name, config=adapters.PrefixTuningConfig(bottleneck_size=4, prefix_length=3))
    converted = copy.deepcopy(randomized(plain))
    report = mmkernels.convert(converted)
    assert sum("attention" in what for what in report.replaced.values()) == 2
    outputs = []
    for setup in (None, "a", "p", L.Stack("p", "a"), L.Parallel("p", "q")):
        for model in (plain, converted):
            model.set_active_adapters(setup)
        check_same(plain, converted)
        outputs.append(results(plain)["output"])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[3])  # prefixes matter


def test_filter_and_wrong_model():
    model = library_model("double_seq_bn")
    report = mmkernels.convert(model, lambda name, module: "layer.0" in name)
    names = "attention.self", "attention.output", "intermediate.intermediate_act_fn", "output"
    assert set(report.replaced) == {f"encoder.layer.0.{name}" for name in names}
    with pytest.raises(TypeError, match="model is a dict"):
        mmkernels.convert({})
    assert str(mmkernels.convert(torch.nn.Linear(2, 2))) == "nothing to convert"


def peft_model(**options):
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "intermediate.dense"], **options)
    model = peft.get_peft_model(model, config)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "intermediate.dense"], **options)
    model.add_adapter("second", config)
    return randomized(model)


@pytest.mark.parametrize("active", ["default", "second", ["default", "second"]])
def test_lora_of_peft(active):
    plain = peft_model()
    converted = copy.deepcopy(plain)
    names = list(converted.state_dict())
    report = mmkernels.convert(converted)
    assert len(report.replaced) == 8 and list(converted.state_dict()) == names
    for model in (plain, converted):
        model.base_model.set_adapter(active)
    check_same(plain, converted)


def test_linear_layers_around_those_of_peft(called):
    plain = peft_model()
    converted = copy.deepcopy(plain)
    found = collections.Counter(mmkernels.convert(converted).replaced.values())
    assert found == {convert.LoraLinear.__doc__: 6, convert.LibraryGelu.__doc__: 2, convert.PlainLinear.__doc__: 7}
    check_same(plain, converted)
    own = [
        m.weight for n, m in converted.named_modules() if type(m) is torch.nn.Linear and "lora" not in n and "pooler" not in n
    ]
    assert len(own) == 12 and all(any(weight is w for w in called) for weight in own)
    seen = []
    hook = converted.base_model.model.encoder.layer[0].attention.self.query.base_layer.register_forward_hook(
        lambda *_: seen.append(1)
    )
    check_same(plain, converted)
    assert seen
    hook.remove()


def test_mixed_batches_of_peft():
    plain = peft_model()
    converted = copy.deepcopy(plain)
    mmkernels.convert(converted)
    names = ["default", "second", "__base__", "second", "default", "default"]
    with torch.no_grad():
        check_same(plain, converted, adapter_names=names)
    for model in (plain, converted):
        model.merge_adapter()
    check_same(plain, converted)


def test_lora_that_the_library_goes_on_computing():
    plain = peft_model(use_dora=True)
    converted = copy.deepcopy(plain)
    mmkernels.convert(converted)
    check_same(plain, converted)
    plain = peft_model(lora_dropout=0.5).train()
    converted = copy.deepcopy(plain)
    mmkernels.convert(converted)
    torch.manual_seed(0)
    expected = plain(**batch())[0]
    torch.manual_seed(0)
    assert torch.equal(converted(**batch())[0], expected)


# --- What stands around adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"])
def test_gelus_of_transformers(kind, monkeypatch):
    calls, own = [], ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda x, **options: calls.append(options) or own(x, **options))
    plain = transformers.models.bert.modeling_bert.BertIntermediate(transformers.BertConfig(**BERT | {"hidden_act": kind}))
    converted = copy.deepcopy(plain)
    report = mmkernels.convert(converted)
    assert report.replaced == {"intermediate_act_fn": convert.LibraryGelu.__doc__} and not report.kept
    plain, converted = plain.intermediate_act_fn, converted.intermediate_act_fn
    x = 4 * torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(6))
    exact, eager, ours = (
        testing.run(function, {"input": tensor}, ("input",))
        for function, tensor in ((plain, x.double()), (plain, x), (converted, x))
    )
    testing.assert_within_budget(ours.output, exact.output, eager.output, "output")
    testing.assert_within_budget(ours.gradients["input"], exact.gradients["input"], eager.gradients["input"], "gradient", 3.0)
    form = "none" if kind in ("gelu", "gelu_python") else "tanh"
    expected = [form] if own_gelu_is_faster(x, form) else []
    assert [options["approximate"] for options in calls] == expected
    assert converted(x.double()).dtype == torch.float64 and len(calls) == len(expected)  # no kernel has that dtype


def test_of_peft_only_what_is_two_matrices():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = torch.nn.ModuleDict({"q": torch.nn.Linear(16, 16), "k": torch.nn.Linear(16, 24)})
    network.forward = lambda x: network["k"](network["q"](x))
    model = peft.get_peft_model(network, peft.AdaLoraConfig(target_modules=["q", "k"], total_step=10)).eval()
    x = torch.randn(4, 5, 16)
    before = model(x)
    report = mmkernels.convert(model)
    assert not report.replaced and all("more than two matrices" in why for why in report.kept.values()) and report.kept
    assert torch.equal(model(x), before)


def test_peft_still_counts_the_names_of_rows():
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24))
    model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"], r=2), adapter_name="a").eval()
    mmkernels.convert(model)
    for count in (1, 2, 5):
        with pytest.raises(ValueError, match="adapter_names"):
            model(torch.randn(4, 16), adapter_names=["a"] * count)
