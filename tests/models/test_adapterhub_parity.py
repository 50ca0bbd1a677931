"""AdapterHub beside the library `adapters` in the same process: the same tiny models, weights and setups."""

import copy
import json
import sys
import types

import pytest
import torch
import transformers

from mmkernels.models import InputError
from mmkernels.models.adapterhub import AdapterConfig, AdapterHub
from mmkernels.modules import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from mmkernels.testing import assert_within_budget

adapters = pytest.importorskip("adapters")
compositions = pytest.importorskip("adapters.composition")

transformers.logging.set_verbosity_error()
BERT = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
    type_vocab_size=2,
    attn_implementation="eager",  # the library changes masks in place, which others do not survive
)
T5 = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
SIZES_OF = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VIT = dict(**SIZES_OF, image_size=8, patch_size=4)
EAGER = dict(attn_implementation="eager")
BART = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=24, **EAGER)
CLIP_TEXT = dict(vocab_size=60, max_position_embeddings=24, eos_token_id=59, **SIZES_OF, **EAGER)
ALBERT = BERT | dict(num_hidden_layers=3, num_hidden_groups=2, embedding_size=12)
GPTJ = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, rotary_dim=4, pad_token_id=0, **EAGER)
LLAMA = dict(vocab_size=60, max_position_embeddings=24, num_key_value_heads=1, pad_token_id=0, **SIZES_OF, **EAGER)
ROWS, TOKENS = 6, 5


def build(kind):
    """A tiny model whose parameters are large enough for every path to matter."""
    torch.manual_seed(0)
    make = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**{**BERT, "pad_token_id": 0})),
        "t5": lambda: transformers.T5Model(transformers.T5Config(**T5)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
        "bert_mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**BERT, embedding_size=16)),
        "xlm_roberta": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**{**BERT, "pad_token_id": 0})),
        "deberta_v2": lambda: transformers.DebertaV2Model(
            transformers.DebertaV2Config(**BERT, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"])
        ),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(
                vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24, **EAGER
            )
        ),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=0, **EAGER)
        ),
        "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**ALBERT)),
        "gptj": lambda: transformers.GPTJModel(transformers.GPTJConfig(**GPTJ)),
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)),
        "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**LLAMA, sliding_window=None)),
        "bart": lambda: transformers.BartModel(transformers.BartConfig(**BART)),
        "mbart": lambda: transformers.MBartModel(transformers.MBartConfig(**BART)),
        "beit": lambda: transformers.BeitModel(
            transformers.BeitConfig(**VIT, layer_scale_init_value=0.1, use_relative_position_bias=True)
        ),
        "clip_text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT)),
        "clip_vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT, **EAGER)),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config={**VIT, **EAGER, "hidden_size": 24}, projection_dim=8)
        ),
    }[kind]
    return randomize(make()).eval()


def randomize(model, names=()):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not names or any(part in name for part in names):
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(1 + noise if parameter.dim() == 1 and "orm.weight" in name else noise)
    return model


def batch(kind):
    generator = torch.Generator().manual_seed(4)
    if kind in ("vit", "beit", "clip_vision"):
        return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator)}
    ids = torch.randint(2, 60, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "clip":
        inputs["pixel_values"] = torch.randn(ROWS, 3, 8, 8, generator=generator)
    return inputs | ({"decoder_input_ids": ids[:, :4]} if kind in ("t5", "bart", "mbart") else {})


def both(kind, configs, compat="adapters", backend="auto", fusions=(), **options):
    """(our hub, the library's model) with the same adapters {name: (preset, options)} and weights."""
    model = build(kind)
    theirs = copy.deepcopy(model)
    adapters.init(theirs)
    hub = AdapterHub(model, compat=compat, backend=backend)
    for name, (preset, changes) in configs.items():
        theirs.add_adapter(name, config=adapters.AdapterConfig.load(preset, **changes))
        hub.add_adapter(name, preset, **changes)
    for names, config in fusions:
        theirs.add_adapter_fusion(list(names), config)
        hub.add_adapter_fusion(list(names), config)
    randomize(theirs, ("adapter", "phm_rule"))
    state = {n: t for n, t in theirs.state_dict().items() if "prompt_tuning" not in n}
    assert set(model.state_dict()) == set(state)
    model.load_state_dict(state)
    theirs.eval(), model.eval()
    return hub, theirs


def compare(hub, theirs, kind, ours_setup, their_setup, exact=False, **extra):
    """Outputs, and gradients of every parameter of adapters and fusions."""
    hub.set_active(ours_setup)
    theirs.set_active_adapters(their_setup)
    results = []
    for model in (hub.model, theirs):
        model.zero_grad()
        torch.manual_seed(1)
        out = model(**batch(kind), **extra)
        out = out_of(out)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        (out * cotangent).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "adapter" in n or "phm" in n}
        results.append((out.detach(), gradients))
    (ours, gradients), (expected, their_gradients) = results
    assert ours.shape == expected.shape
    close(ours, expected, "output", exact)
    for name, gradient in gradients.items():
        other = their_gradients[name]
        if gradient is None or other is None:  # an adapter that no row has: nothing, or zeros
            assert all(g is None or not g.any() for g in (gradient, other)), name
            continue
        close(gradient, other, name, exact)
    return ours


def out_of(output):
    """The tensor of a model's output that depends on everything."""
    names = ("logits", "logits_per_text", "last_hidden_state")
    return next(output[name] for name in names if name in output)


def close(actual, expected, what, exact=False):
    if exact:
        assert torch.equal(actual, expected), what
        return
    scale = max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= 2e-5 * scale, what


PRESETS = ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_inv", "double_seq_bn_inv", "compacter", "compacter++"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "vit"])
def test_presets(kind, preset):
    if kind == "vit" and "inv" in preset:
        with pytest.raises(ValueError, match="inv_adapter is 'nice'"):
            AdapterHub(build(kind)).add_adapter("a", preset)
        return
    changes = {"reduction_factor": 4} if "compacter" in preset else {}
    hub, theirs = both(kind, {"a": (preset, changes)})
    compare(hub, theirs, kind, "a", "a")


class StochasticDepth(torch.nn.Module):
    """torchvision's, which the library asks for: whole rows, with the probability p, are zero in training."""

    def __init__(self, p, mode):
        super().__init__()
        assert mode == "row"
        self.kept = 1.0 - p

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(self.kept).div_(self.kept)


@pytest.mark.parametrize("kind", ["vit", "bert", "t5"])
def test_adapter_plus(kind, monkeypatch):
    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.stochastic_depth")}
    modules["torchvision.ops.stochastic_depth"].StochasticDepth = StochasticDepth
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("adapters.methods.modeling.is_torchvision_available", lambda: True)
    changes = {"reduction_factor": 4, "stochastic_depth": 0.5}
    model = build(kind)
    theirs = copy.deepcopy(model)
    adapters.init(theirs)
    theirs.add_adapter("a", config=adapters.AdapterPlusConfig(**changes))
    randomize(theirs, ("adapter",))
    hub = AdapterHub(model, compat="adapters")
    hub.add_adapter("a", "AdapterPlus", **changes)
    model.load_state_dict({n: t for n, t in theirs.state_dict().items() if "prompt_tuning" not in n})
    for training in (False, True):
        for one in (theirs, model):
            one.train(training)
            for module in one.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        compare(hub, theirs, kind, "a", "a")


OPTIONS = {
    "ln_before": dict(ln_before=True),
    "ln_after": dict(ln_after=True),
    "residual before its norm": dict(ln_after=True, adapter_residual_before_ln=True),
    "gate": dict(use_gating=True),
    "channel": dict(scaling="channel"),
    "post_add": dict(original_ln_before=True, residual_before_ln="post_add"),
    "AdapterPlus": dict(original_ln_before=True, residual_before_ln=False, original_ln_after=False, scaling="channel"),
    "residual after the norm, two norms": dict(original_ln_before=True, residual_before_ln=False, ln_before=True),
    "leakyrelu": dict(non_linearity="leakyrelu"),
    "gelu_fast": dict(non_linearity="gelu_fast"),
    "gelu_new": dict(non_linearity="gelu_new"),
    "layers": dict(reduction_factor={"1": 2, "default": 8}, leave_out=[0]),
    "own Kronecker rule": dict(phm_layer=True, shared_phm_rule=False, reduction_factor=4),
    "factors of the rule": dict(phm_layer=True, factorized_phm_rule=True, reduction_factor=4),
    "unfactorized": dict(phm_layer=True, factorized_phm_W=False, reduction_factor=4),
    "shared weights": dict(phm_layer=True, shared_W_phm=True, reduction_factor=4),
    "parallel, norms": dict(is_parallel=True, ln_before=True, ln_after=True, use_gating=True),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, backend):
    hub, theirs = both("bert", {"a": ("double_seq_bn", options)}, backend=backend)
    compare(hub, theirs, "bert", "a", "a")


LAYOUTS = {  # kind of model -> number of places
    "xlm_roberta": 4,
    "deberta_v2": 4,
    "distilbert": 4,
    "albert": 4,
    "gpt2": 4,
    "gptj": 4,
    "llama": 4,
    "mistral": 4,
    "bart": 10,
    "mbart": 10,
    "beit": 4,
    "clip_text": 4,
    "clip_vision": 4,
    "clip": 8,
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_layouts(kind, tmp_path):
    """Sequential adapters with cross-attention, invertible ones where the library has them, skipped layers, folders."""
    inverted = not any(word in kind for word in ("beit", "vision"))
    changes = {"reduction_factor": 4, "cross_adapter": True}
    configs = {"a": ("double_seq_bn", changes), "b": ("seq_bn_inv" if inverted else "seq_bn", {}), "c": ("par_bn", {})}
    hub, theirs = both(kind, configs)
    assert len(hub.places) == LAYOUTS[kind]
    for name in configs:
        compare(hub, theirs, kind, name, name)
    theirs.set_active_adapters("a", skip_layers=[0, 2])
    hub.set_active("a", skip_layers=[0, 2])
    ours, expected = (out_of(m(**batch(kind))) for m in (hub.model, theirs))
    close(ours.detach(), expected.detach(), "with layers skipped")
    compare(hub, theirs, kind, BatchSplit("a", "a", batch_sizes=3), compositions.BatchSplit("a", "a", batch_sizes=3))
    if kind in ("beit", "clip_vision"):  # the library cannot do it there
        hub.set_active("a")
        alone = hub.model(**batch(kind)).last_hidden_state
        hub.set_active(Parallel("a", "a"))
        close(hub.model(**batch(kind)).last_hidden_state.detach(), alone.detach().repeat(2, 1, 1), "Parallel")
    elif "clip" not in kind:
        compare(hub, theirs, kind, Parallel("a", "a"), compositions.Parallel("a", "a"))
    name = "b" if inverted else "a"
    theirs.save_adapter(str(tmp_path / "theirs"), name)
    hub.save_adapter(name, tmp_path / "ours")
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()
    weights = [torch.load(tmp_path / folder / "pytorch_adapter.bin") for folder in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    fresh = AdapterHub(build(kind), compat="adapters")
    fresh.load_adapter(tmp_path / "theirs")
    for one, other in zip(fresh.parameters_of(name), hub.parameters_of(name), strict=True):
        assert torch.equal(one, other)


def test_albert_adapters_read_what_attention_gave():
    """The library gives them the residual, and adds what attention gave."""
    hub, theirs = both("albert", {"a": ("double_seq_bn", {"reduction_factor": 4})}, compat=None)
    layer = hub.model.encoder.albert_layer_groups[0].albert_layers[0]
    seen = {}

    def keep(name, tensor):
        seen.setdefault(name, tensor)  # of the first of the layers that share it

    layer.attention.register_forward_pre_hook(lambda module, args: keep("residual", args[0]))
    layer.attention.output_dropout.register_forward_hook(lambda module, args, out: keep("h", out))
    layer.ffn.register_forward_pre_hook(lambda module, args: keep("out", args[0]))
    hub.set_active("a")
    theirs.set_active_adapters("a")
    with torch.no_grad():
        ours, expected = (model(**batch("albert")).last_hidden_state for model in (hub.model, theirs))
        adapter = layer.attention.attention_adapters.adapters["a"]
        out = adapter(seen["h"], seen["residual"], layer.attention.LayerNorm)
    assert torch.equal(seen["out"], out)
    assert float((ours - expected).abs().max()) > 1e-3


def test_attentions_and_caches_go_on_coming_out():
    """What a layer gives beside its hidden states, and what it keeps for the next token."""
    for kind in ("bart", "albert", "gpt2", "gptj", "llama", "clip_text", "distilbert", "beit", "vit"):
        plain = build(kind)
        hub = AdapterHub(copy.deepcopy(plain))
        options = {"output_hidden_states": True} | ({} if kind == "vit" else {"output_attentions": True})
        expected, actual = (m(**batch(kind), **options) for m in (plain, hub.model))
        for name, value in expected.items():
            values = value if isinstance(value, tuple) else (value,)
            for one, other in zip(values, actual[name] if isinstance(value, tuple) else (actual[name],), strict=True):
                assert not isinstance(one, torch.Tensor) or torch.equal(one, other), (kind, name)
    for name, config, changes in (
        ("BartForConditionalGeneration", transformers.BartConfig(**BART), {"cross_adapter": True}),
        ("GPTJForCausalLM", transformers.GPTJConfig(**GPTJ), {}),
        ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), {}),
    ):
        torch.manual_seed(0)
        plain = randomize(getattr(transformers, name)(config)).eval()
        hub = AdapterHub(copy.deepcopy(plain))
        hub.add_adapter("a", "double_seq_bn", **changes)
        options = dict(max_new_tokens=6, num_beams=2, do_sample=False)
        ids = batch("bart")["input_ids"]
        assert torch.equal(hub.model.generate(ids, **options), plain.generate(ids, **options))
        randomize(hub.model, ("adapters",))
        hub.set_active("a")
        cached, again = (hub.model.generate(ids, **options, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, again)


def test_cross_attention_adapters_of_t5():
    hub, theirs = both("t5", {"a": ("double_seq_bn", {"cross_adapter": True})})
    compare(hub, theirs, "t5", "a", "a")
    assert len(hub.places) == 2 * 2 + 2 * 3


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "electra"])
def test_skipped_layers(kind):
    hub, theirs = both(kind, {"a": ("double_seq_bn", {})})
    layers = [0, 2]
    theirs.set_active_adapters("a", skip_layers=layers)
    hub.set_active("a", skip_layers=layers)
    ours, expected = (m(**batch(kind)).last_hidden_state for m in (hub.model, theirs))
    close(ours.detach(), expected.detach(), "output")


def setups(library):
    """The same compositions in ours and in the library's blocks."""
    L = library
    return {
        "stack": (Stack("a", "b"), L.Stack("a", "b")),
        "batch_split": (BatchSplit("a", "b", "c", batch_sizes=[1, 3, 2]), L.BatchSplit("a", "b", "c", batch_sizes=[1, 3, 2])),
        "parallel": (Parallel("a", "b", "c"), L.Parallel("a", "b", "c")),
        "split": (Split("a", "b", splits=[2, 3]), L.Split("a", "b", splits=[2, 3])),
        "average": (Average("a", "b", "c", weights=[1, 2, 3]), L.Average("a", "b", "c", weights=[1, 2, 3])),
        "multi_task": (MultiTask("a", "b", "c"), L.MultiTask("a", "b", "c")),
        "stack of parallel": (Stack("a", Parallel("b", "c")), L.Stack("a", L.Parallel("b", "c"))),
        "parallel of stacks": (Parallel(Stack("a", "b"), "c"), L.Parallel(L.Stack("a", "b"), "c")),
        "batch_split of stacks": (
            BatchSplit(Stack("a", "b"), "c", batch_sizes=[4, 2]),
            L.BatchSplit(L.Stack("a", "b"), "c", batch_sizes=[4, 2]),
        ),
        "nested splits": (
            BatchSplit(BatchSplit("a", "b", batch_sizes=1), "c", batch_sizes=[2, 4]),
            L.BatchSplit(L.BatchSplit("a", "b", batch_sizes=1), "c", batch_sizes=[2, 4]),
        ),
        "average of stacks": (Average(Stack("a", "b"), "c"), L.Average(L.Stack("a", "b"), "c")),
    }


TASKS = torch.tensor([2, 0, 1, 0, 2, 1])
SIZES = {"a": 4, "b": 2, "c": 8}
# What the library computes as it should: there our own way is the same.
SAME = {"double_seq_bn": set(setups(compositions)) - {"average", "average of stacks"}}
SAME["seq_bn"] = {"stack", "batch_split", "parallel", "split", "stack of parallel"}


@pytest.mark.parametrize("name", setups(compositions))
@pytest.mark.parametrize("preset", ["double_seq_bn", "seq_bn"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "vit"])
def test_compositions(kind, preset, name):
    if kind == "t5" and "split" in name and "batch" not in name or kind == "vit" and name == "split":
        pytest.skip("other numbers of tokens")
    for compat in ("adapters", None):
        if compat is None and name not in SAME[preset]:
            continue
        hub, theirs = both(kind, {n: (preset, {"reduction_factor": f}) for n, f in SIZES.items()}, compat)
        extra = {"task_ids": TASKS} if name == "multi_task" else {}
        compare(hub, theirs, kind, *setups(compositions)[name], **extra)


@pytest.mark.parametrize("name", [n for n in setups(compositions) if n != "multi_task"])
def test_compositions_of_parallel_adapters(name):
    """The library cannot compute most of them; where it can, in a Stack, the last one replaces the others."""
    hub, theirs = both("bert", {n: ("par_bn", {"reduction_factor": f}) for n, f in SIZES.items()})
    ours, their = setups(compositions)[name]
    try:
        compare(hub, theirs, "bert", ours, their)
    except RuntimeError:
        assert "parallel" in name


@pytest.mark.parametrize("config", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "scaled_par_bn"])
def test_fusion(preset, backend, config):
    configs = {n: (preset, {"reduction_factor": f}) for n, f in SIZES.items()}
    hub, theirs = both("bert", configs, backend=backend, fusions=[("abc", config), ("bc", config)])
    compare(hub, theirs, "bert", Fuse("a", "b", "c"), compositions.Fuse("a", "b", "c"))
    compare(hub, theirs, "bert", Stack("a", Fuse("b", "c")), compositions.Stack("a", compositions.Fuse("b", "c")))
    if config == "dynamic":
        hub.train_adapter_fusion(Fuse("a", "b", "c"))
        theirs.train_adapter_fusion(compositions.Fuse("a", "b", "c"))
        trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (hub.model, theirs)]
        assert trainable[0] == trainable[1]
        ours, expected = hub.fusion_regularization(), theirs.get_fusion_regularization_loss()
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)


FUSION_OPTIONS = [
    dict(query_before_ln=True),
    dict(residual_before=True),
    dict(temperature=True),
    dict(value_before_softmax=False),
    dict(key=False),
    dict(query=False),
    dict(residual_before=True, value=False, regularization=False, value_initialized=False),
]


@pytest.mark.parametrize("options", FUSION_OPTIONS, ids=str)
def test_fusion_options(options):
    configs = {n: ("seq_bn", {"reduction_factor": f}) for n, f in SIZES.items()}
    config = {**adapters.DynamicAdapterFusionConfig().to_dict(), **options}
    for backend in ("auto", "eager"):
        hub, theirs = both("bert", configs, backend=backend, fusions=[("abc", config)])
        for _ in range(2):  # the temperature changes from call to call
            compare(hub, theirs, "bert", Fuse("a", "b", "c"), compositions.Fuse("a", "b", "c"))


def test_bits_of_the_library():
    """On "eager" with compat, what the library computes comes bit for bit."""
    for preset in ("seq_bn", "double_seq_bn"):
        configs = {n: (preset, {"reduction_factor": 4}) for n in "abc"}
        hub, theirs = both("bert", configs, backend="eager", fusions=[("abc", "dynamic")])
        pairs = setups(compositions) | {"fuse": (Fuse("a", "b", "c"), compositions.Fuse("a", "b", "c"))}
        for name, (ours, their) in pairs.items():
            extra = {"task_ids": TASKS} if name == "multi_task" else {}
            hub.set_active(ours)
            theirs.set_active_adapters(their)
            assert torch.equal(*(m(**batch("bert"), **extra).last_hidden_state for m in (hub.model, theirs))), name


# --- Folders -----------------------------------------------------------------------------------------------------------------


def outputs(kind, *models):
    with torch.no_grad():
        return [model.eval()(**batch(kind))[0] for model in models]


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("preset", ["seq_bn_inv", "double_seq_bn", "compacter"])
@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "roberta", "t5", "vit"])
def test_folders_both_ways(kind, preset, safetensors, tmp_path):
    changes = {"reduction_factor": 4}
    if kind == "bert_mlm" and safetensors:
        pytest.skip("the library cannot write tied weights there")
    preset = preset.removesuffix("_inv") if kind == "vit" else preset
    hub, theirs = both(kind, {"a": (preset, changes)})
    theirs.save_adapter(str(tmp_path / "theirs"), "a", use_safetensors=safetensors)
    hub.save_adapter("a", tmp_path / "ours", safetensors=safetensors)
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "theirs").iterdir()}
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()

    fresh = AdapterHub(build(kind), compat="adapters")
    if preset == "compacter" and kind != "bert_mlm":  # where the model has no prefix, the library forgets the shared rule
        with pytest.raises(InputError, match="shared_parameters.new.phm_rule is missing"):
            fresh.load_adapter(tmp_path / "theirs", load_as="new")
        assert "new" not in fresh.configs
        fresh.load_adapter(tmp_path / "ours", load_as="new")
    else:
        fresh.load_adapter(tmp_path / "theirs", load_as="new")
    fresh.set_active("new")
    hub.set_active("a")
    peer = build(kind)
    adapters.init(peer)
    peer.load_adapter(str(tmp_path / "ours"), use_safetensors=safetensors)
    peer.set_active_adapters("a")
    ours, again, theirs_of_ours = outputs(kind, hub.model, fresh.model, peer)
    assert torch.equal(ours, again)
    close(theirs_of_ours, ours, "output")


def test_fusion_folders_both_ways(tmp_path):
    configs = {n: ("seq_bn", {"reduction_factor": f}) for n, f in SIZES.items()}
    hub, theirs = both("bert", configs, fusions=[("abc", "dynamic")])
    setup, their_setup = Fuse("a", "b", "c"), compositions.Fuse("a", "b", "c")
    theirs.save_adapter_setup(str(tmp_path / "theirs"), their_setup)
    hub.save_setup(setup, tmp_path / "ours")
    fresh, peer = AdapterHub(build("bert")), build("bert")
    assert fresh.load_setup(tmp_path / "theirs") == setup
    adapters.init(peer)
    peer.load_adapter_setup(str(tmp_path / "ours"), set_active=True)
    hub.set_active(setup)
    ours, again, theirs_of_ours = outputs("bert", hub.model, fresh.model, peer)
    close(again, ours, "output")
    close(theirs_of_ours, ours, "output")


HEADS = {
    "classification": ("add_classification_head", dict(num_labels=3)),
    "multilabel_classification": ("add_classification_head", dict(num_labels=3, multilabel=True)),
    "tagging": ("add_tagging_head", dict(num_labels=4)),
    "question_answering": ("add_qa_head", dict()),
    "multiple_choice": ("add_multiple_choice_head", dict(num_choices=2)),
    "masked_lm": ("add_masked_lm_head", dict()),
}


@pytest.mark.parametrize("head_type", HEADS)
def test_heads_both_ways(head_type, tmp_path):
    method, options = HEADS[head_type]
    theirs = adapters.BertAdapterModel(transformers.BertConfig(**BERT)).eval()
    theirs.add_adapter("a", config="seq_bn_inv")
    getattr(theirs, method)("a", **options)
    randomize(theirs)
    theirs.save_adapter(str(tmp_path / "theirs"), "a")
    theirs.set_active_adapters("a")
    options = {n: v for n, v in options.items() if n != "multilabel"}

    def load(folder):
        model = transformers.BertModel(transformers.BertConfig(**BERT))
        base = {n.removeprefix("bert."): t for n, t in theirs.state_dict().items() if n.startswith("bert.")}
        model.load_state_dict({n: t for n, t in base.items() if n in model.state_dict()})
        hub = AdapterHub(model.eval())
        hub.load_adapter(folder)
        hub.set_active("a")
        return hub

    hub = load(tmp_path / "theirs")
    assert hub.model.heads["a"].config["head_type"] == head_type
    expected = theirs(**batch("bert"))
    logits = hub(**batch("bert"))["logits"]
    if head_type == "question_answering":
        close(logits[..., 0], expected.start_logits, "starts")
        close(logits[..., 1], expected.end_logits, "ends")
    else:
        close(logits, expected.logits, "logits")
    hub.save_adapter("a", tmp_path / "ours")
    peer = adapters.BertAdapterModel(transformers.BertConfig(**BERT)).eval()
    peer.load_state_dict(
        {n: t for n, t in theirs.state_dict().items() if "adapters" not in n and "heads" not in n}, strict=False
    )
    peer.load_adapter(str(tmp_path / "ours"))
    peer.set_active_adapters("a")
    assert torch.equal(peer(**batch("bert"))[0], expected[0])


GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=0, **EAGER)
DISTIL = dict(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24, **EAGER)
OF_T5 = dict(**T5, decoder_start_token_id=0, eos_token_id=1)
OWN_HEADS = {  # class of a model with a head of its own -> of its config, options, head_type
    "BertForSequenceClassification": ("Bert", {**BERT, "num_labels": 3}, "classification"),
    "BertForTokenClassification": ("Bert", BERT, "tagging"),
    "BertForQuestionAnswering": ("Bert", BERT, "question_answering"),
    "BertForMaskedLM": ("Bert", BERT, "masked_lm"),
    "XLMRobertaForSequenceClassification": ("XLMRoberta", {**BERT, "pad_token_id": 0}, "classification"),
    "RobertaForMaskedLM": ("Roberta", {**BERT, "pad_token_id": 0}, "masked_lm"),
    "DistilBertForSequenceClassification": ("DistilBert", DISTIL, "classification"),
    "BartForSequenceClassification": ("Bart", BART, "classification"),
    "BartForConditionalGeneration": ("Bart", BART, "seq2seq_lm"),
    "GPT2ForSequenceClassification": ("GPT2", GPT2, "classification"),
    "GPT2LMHeadModel": ("GPT2", GPT2, "causal_lm"),
    "AlbertForSequenceClassification": ("Albert", {**ALBERT, "num_labels": 3}, "classification"),
    "AlbertForMaskedLM": ("Albert", ALBERT, "masked_lm"),
    "GPTJForCausalLM": ("GPTJ", GPTJ, "causal_lm"),
    "LlamaForSequenceClassification": ("Llama", LLAMA, "classification"),
    "LlamaForTokenClassification": ("Llama", LLAMA, "tagging"),
    "LlamaForCausalLM": ("Llama", LLAMA, "causal_lm"),
    "MistralForCausalLM": ("Mistral", LLAMA, "causal_lm"),
    "T5ForConditionalGeneration": ("T5", OF_T5, "seq2seq_lm"),
    "ViTForImageClassification": ("ViT", {**VIT, "num_labels": 3}, "image_classification"),
    "BeitForImageClassification": ("Beit", {**VIT, "layer_scale_init_value": 0.1}, "image_classification"),
}


def ended_batch(name, eos=None):
    """A batch whose rows end with one end-of-sequence token."""
    kind = {"ViT": "vit", "Beit": "beit", "Bart": "bart", "T5": "t5"}.get(name, "bert")
    inputs = batch(kind)
    if eos is not None:
        ids = torch.where(inputs["input_ids"] == eos, 7, inputs["input_ids"])
        ids[:, -1] = eos
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs


def base_of(name, config, weights):
    """A model without a head with the weights of one that has them."""
    model = getattr(transformers, f"{name}Model")(config)
    own = model.state_dict()
    model.load_state_dict({n: weights.get(n, tensor) for n, tensor in own.items()})
    return model.eval()


@pytest.mark.parametrize("class_name", OWN_HEADS)
def test_own_heads_become_heads(class_name, tmp_path):
    """A folder of a model with a head of its own, in a model without; and from there to the library's models with heads."""
    name, options, head_type = OWN_HEADS[class_name]
    config = getattr(transformers, f"{name}Config")(**options)
    theirs = randomize(getattr(transformers, class_name)(config)).eval()
    adapters.init(theirs)
    theirs.add_adapter("a", config="double_seq_bn", set_active=True)
    randomize(theirs, ("adapters",))
    theirs.save_adapter(str(tmp_path / "theirs"), "a")
    inputs = ended_batch(name, getattr(config, "eos_token_id", None) if name in ("Bart", "T5") else None)
    if head_type == "seq2seq_lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    prefix = f"{theirs.base_model_prefix}."
    weights = {n.removeprefix(prefix): t for n, t in theirs.state_dict().items()}
    hub = AdapterHub(base_of(name, config, weights), compat="adapters")
    hub.load_adapter(tmp_path / "theirs", set_active=True)
    assert hub.model.eval().heads["a"].config["head_type"] == head_type
    with torch.no_grad():
        expected = theirs(**inputs)
        expected = expected.start_logits if head_type == "question_answering" else expected.logits
        logits = hub(**inputs)["logits"]
        close(logits[..., 0] if head_type == "question_answering" else logits, expected, "logits")
    hub.save_adapter("a", tmp_path / "ours")
    peer = getattr(adapters, f"{name}AdapterModel")(config).eval()
    own, base = peer.state_dict(), hub.model.state_dict()
    peer.load_state_dict({n: base.get(n.removeprefix(f"{peer.base_model_prefix}."), t) for n, t in own.items()})
    peer.load_adapter(str(tmp_path / "ours"), set_active=True)
    with torch.no_grad():
        output = peer(**inputs)
    close(output.start_logits if head_type == "question_answering" else output.logits, expected, "logits of the library")


@pytest.mark.parametrize("setup", ["a", "parallel"])
@pytest.mark.parametrize("name", ["T5", "Bart", "GPT2", "GPTJ", "Llama"])
def test_heads_of_rows_that_end(name, setup, tmp_path):
    """Classification by the end-of-sequence token, or by the last one that is no padding."""
    config = getattr(transformers, f"{name}Config")(
        **{"T5": OF_T5, "Bart": BART, "GPT2": GPT2, "GPTJ": GPTJ, "Llama": LLAMA}[name]
    )
    theirs = getattr(adapters, f"{name}AdapterModel")(config)
    for adapter in "ab":
        theirs.add_adapter(adapter, config="double_seq_bn")
        theirs.add_classification_head(adapter, num_labels=3)
    randomize(theirs).eval()
    for adapter in "ab":
        theirs.save_adapter(str(tmp_path / adapter), adapter)
    weights = {n.removeprefix(f"{theirs.base_model_prefix}."): t for n, t in theirs.state_dict().items()}
    hub = AdapterHub(base_of(name, config, weights), compat="adapters")
    for adapter in "ab":
        hub.load_adapter(tmp_path / adapter)
    hub.model.eval()
    padded = name not in ("T5", "Bart")
    inputs = ended_batch(name, None if padded else config.eos_token_id)
    if padded:
        inputs["input_ids"][2, 3:] = 0
    hub.set_active(Parallel("a", "b") if setup == "parallel" else "a")
    theirs.set_active_adapters(compositions.Parallel("a", "b") if setup == "parallel" else "a")
    with torch.no_grad():
        logits, expected = hub(**inputs)["logits"], theirs(**inputs)
    if setup == "parallel":
        for adapter, one in zip("ab", expected.head_outputs, strict=True):
            close(logits[adapter], one.logits, adapter)
        return
    close(logits, expected.logits, "logits")
    if not padded:
        with pytest.raises(ValueError, match="rows without the token"):
            hub(**inputs | {"input_ids": torch.full_like(inputs["input_ids"], 7)})


def test_folders_of_old_versions(tmp_path):
    """What adapter-transformers wrote, as the library reads it today."""
    hub, theirs = both("bert", {"a": ("seq_bn_inv", {"non_linearity": "gelu_new"})})
    hub.save_adapter("a", tmp_path / "a")
    state = torch.load(tmp_path / "a/pytorch_adapter.bin")
    content = json.loads((tmp_path / "a/adapter_config.json").read_text())
    fields = ("ln_before", "ln_after", "mh_adapter", "output_adapter", "adapter_residual_before_ln", "original_ln_after")
    old = {name: content["config"][name] for name in (*fields, "original_ln_before", "reduction_factor", "residual_before_ln")}
    inverted = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    of_text = {"type": "text_lang", "name": "a", "hidden_size": 16, "model_type": "bert", "model_name": "", "model_class": "X"}
    first = {**of_text, "config": {**old, "non_linearity": "gelu", "invertible_adapter": inverted, "leave_out": []}}
    second = {**content, "version": "2.1.3", "config": {**content["config"]}}
    for option in ("stochastic_depth", "init_weights_seed", "dropout", "use_gating", "scaling", "cross_adapter"):
        del second["config"][option]
    legacy = {
        f"bert.{n}".replace(".adapters.", ".layer_text_lang_adapters.").replace("invertible_a", "invertible_lang_a"): t
        for n, t in state.items()
    }
    for version, config, tensors in ((1, first, legacy), (2, second, state)):
        folder = tmp_path / str(version)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.save(tensors, folder / "pytorch_adapter.bin")
        fresh, peer = AdapterHub(build("bert"), compat="adapters"), build("bert")
        adapters.init(peer)
        fresh.load_adapter(folder, load_as="new", set_active=True)
        peer.load_adapter(str(folder), load_as="new", set_active=True)
        hub.set_active("a")
        for model, what in ((fresh.model, "ours"), (peer, "theirs")):
            close(*outputs("bert", model, hub.model), f"{what} of version {version}")
    named = {**of_text, "config": "pfeiffer", "type": "text_task"}  # relu
    (tmp_path / "1/adapter_config.json").write_text(json.dumps(named))
    torch.save({n: t for n, t in legacy.items() if "invertible" not in n}, tmp_path / "1/pytorch_adapter.bin")
    fresh.load_adapter(tmp_path / "1")
    assert fresh.configs["a"] == AdapterConfig.of("seq_bn")
    # a head beside it, of a class that is called otherwise now
    head = {"head_type": "classification", "num_labels": 3, "layers": 2, "activation_function": "tanh", "label2id": None}
    (tmp_path / "1/head_config.json").write_text(json.dumps({**of_text, "model_class": "BertModelWithHeads", "config": head}))
    sizes = {"1.weight": (16, 16), "1.bias": (16,), "4.weight": (3, 16), "4.bias": (3,)}
    torch.save({f"heads.a.{n}": torch.randn(size) for n, size in sizes.items()}, tmp_path / "1/pytorch_model_head.bin")
    fresh.load_adapter(tmp_path / "1", load_as="b", set_active=True)
    assert fresh(**batch("bert"))["logits"].shape == (ROWS, 3)


def test_own_head_of_a_model_both_ways(tmp_path):
    config = transformers.BertConfig(**BERT, num_labels=3)
    theirs = randomize(transformers.BertForSequenceClassification(config)).eval()
    empty = transformers.BertForSequenceClassification(config).eval()
    empty.bert.load_state_dict(theirs.bert.state_dict())
    peer = copy.deepcopy(empty)
    adapters.init(theirs)
    theirs.add_adapter("a", set_active=True)
    theirs.save_adapter(str(tmp_path / "theirs"), "a")
    hub = AdapterHub(empty)
    hub.load_adapter(tmp_path / "theirs", set_active=True)
    expected = theirs(**batch("bert")).logits
    close(hub(**batch("bert")).logits, expected, "logits")
    hub.save_adapter("a", tmp_path / "ours")
    adapters.init(peer)
    peer.load_adapter(str(tmp_path / "ours"), set_active=True)
    close(peer(**batch("bert")).logits, expected, "logits")
    other = AdapterHub(transformers.BertForTokenClassification(config))
    with pytest.raises(InputError, match="the model is BertForTokenClassification"):
        other.load_head(tmp_path / "ours")


def _randomized_hub(kind, preset, **options):
    hub = AdapterHub(build(kind), **options)
    for name in "ab":
        hub.add_adapter(name, preset, reduction_factor=4)
    randomize(hub.model, ("adapter", "phm_rule"))
    hub.model.eval()
    return hub


@pytest.mark.parametrize(
    "kind, preset",
    [("t5", "seq_bn_inv"), ("llama", "seq_bn_inv"), ("bert", "seq_bn_inv"), ("clip_text", "seq_bn"), ("clip", "seq_bn")],
)
def test_each_child_of_a_parallel_is_that_adapter_alone(kind, preset):
    """Where the batch has to be repeated before the model begins: it makes masks, or finds tokens, by its inputs."""
    hub, inputs = _randomized_hub(kind, preset), batch(kind)

    def outputs(*setups):
        found = []
        for setup in setups:
            hub.set_active(setup)
            with torch.no_grad():
                out = hub.model(**{n: t.to(hub.model.dtype) if t.is_floating_point() else t for n, t in inputs.items()})
            found.append(out.text_embeds if kind == "clip" else out_of(out))
        return torch.cat(found)

    together, alone = outputs(Parallel("a", "b")), outputs("a", "b")
    hub.model.double()
    torch.set_default_dtype(torch.float64)  # in which CLIP makes its mask
    try:
        exact = outputs("a", "b")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_within_budget(together, exact, alone, "output")


GENERATING = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=0, **EAGER)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, decoder_start_token_id=2)),
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", GENERATING)
def test_generates_by_tasks_and_in_parallel(kind, beams):
    torch.manual_seed(0)
    hub = AdapterHub(randomize(GENERATING[kind]()).eval())
    for name in "ab":
        hub.add_adapter(name, "seq_bn", reduction_factor=4)
    randomize(hub.model, ("adapter",))
    with torch.no_grad():
        for name, parameter in hub.model.named_parameters():
            if "adapter_up" in name:
                parameter.mul_(20)  # so that the two give different words
            elif ".ln_" in name and name.endswith("weight"):
                parameter.fill_(1.0)
    ids = batch("gpt2")["input_ids"]

    def generate(setup, ids, **options):
        hub.set_active(setup)
        return hub.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            min_new_tokens=4,
            num_beams=beams,
            do_sample=False,
            **options,
        )

    alone = [generate(name, ids) for name in "ab"]
    assert not torch.equal(*alone)
    tasks = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = generate(MultiTask("a", "b"), ids, task_ids=tasks)
    assert torch.equal(mixed, torch.where(tasks[:, None] == 0, *alone))
    assert torch.equal(generate(Parallel("a", "b"), ids), torch.cat(alone))
    assert not hub.active.passes
