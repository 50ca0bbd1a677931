"""The resampler against those that others published, live, with the same weights; and as a citizen of torch."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels import _library
from mmkernels.modules import PerceiverResampler, resampler, set_backend
from mmkernels.testing import assert_within_budget, farthest_of_nearby, usual_error

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
flamingo_pytorch = pytest.importorskip("flamingo_pytorch")
from diffusers.models.embeddings import IPAdapterPlusImageProjection  # noqa: E402
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig  # noqa: E402
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler, Idefics2RMSNorm  # noqa: E402

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
FUSED = BACKENDS[-1]
ROWS = (7, 70)  # fewer than a projection's columns and more: gains go into the context, and into the weights


def randomised(module, std=0.25):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if parameter.dim() == 1 and name.endswith("weight") else noise)
    return module


def idefics2(**changes):
    config = dict(hidden_size=48, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=6, resampler_head_dim=8)
    config = Idefics2PerceiverConfig(**config | dict(num_key_value_heads=2) | changes)
    return randomised(Idefics2PerceiverResampler(config)).train()


def exact_norms(module):
    """Their norm rounds to float32; in float64 one that does not."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Idefics2RMSNorm):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return module


def results(module, tensors, *more, **options):
    """Output, and the gradients of a random sum of it by name, those of the tensors last."""
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = module(*leaves, *more, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"out": out.detach()} | found | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}


def check_all(ours, theirs, renamed, rtol):
    """Every one of their results has its equal among ours, and no other is there."""
    expected = {name: t for name, t in theirs.items() if name == "out" or name.startswith("input ")}
    parameters = {name: t for name, t in theirs.items() if name not in expected}
    expected |= renamed(parameters)
    assert expected.keys() == ours.keys()
    for name, right in expected.items():
        assert ours[name].shape == right.shape, name
        scale = float(right.abs().max())
        assert scale > 0 and float((ours[name] - right).abs().max()) <= rtol * max(scale, 1.0), name


def context(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(11)).to(dtype)


# --- The others, live -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "name, dtype, rtol", [("reference", torch.float64, 1e-12), *((b, torch.float32, 1e-5) for b in BACKENDS)]
)
def test_idefics2(name, dtype, rtol, rows):
    """Forward and all gradients, with padded contexts and one that is all padding."""
    theirs = idefics2().to(dtype)
    theirs = exact_norms(theirs) if dtype == torch.float64 else theirs
    ours = PerceiverResampler.from_idefics2(theirs, backend=name)
    assert ours.kv_heads == 2 and ours.eps == 1e-6 and ours.latents.dtype == dtype
    x, mask = context(3, rows, 48, dtype=dtype), torch.arange(rows) < torch.tensor([[rows - 3], [0], [rows]])
    expected = results(theirs, [x], mask.long())
    actual = results(ours, [x], key_mask=mask)
    check_all(actual, expected, lambda t: resampler.renamed(t, resampler.IDEFICS2, "perceiver_resampler"), rtol)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "name, dtype, rtol", [("reference", torch.float64, 1e-12), *((b, torch.float32, 1e-5) for b in BACKENDS)]
)
def test_ip_adapter(name, dtype, rtol, rows):
    theirs = randomised(IPAdapterPlusImageProjection(24, 32, 48, 2, 8, 6, 4, 2)).to(dtype)
    ours = PerceiverResampler.from_ip_adapter(theirs.state_dict(), head_dim=8, backend=name)
    x = context(2, rows, 24, dtype=dtype)
    in_ours = lambda t: resampler.renamed(t, resampler.IP_ADAPTER, "image_proj")  # noqa: E731
    check_all(results(ours, [x]), results(theirs, [x]), in_ours, rtol)


def original_names(state_dict):
    """Of the released files, from those of diffusers."""
    pairs = {"ln0": "0.norm1", "ln1": "0.norm2", "attn.to_q": "0.to_q", "attn.to_k": "0.to_kv", "attn.to_out.0": "0.to_out"}
    pairs |= {"ff.0": "1.0", "ff.1.net.0.proj": "1.1", "ff.1.net.2": "1.3"}
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, original in pairs.items():
            if f".{theirs}." in name:
                other = state_dict.get(name.replace("to_k", "to_v"))
                renamed[name.replace(theirs, original)] = torch.cat([tensor, other]) if "to_k" in theirs else tensor
                break
        else:
            if "to_v" not in name:
                renamed[name] = tensor
    return renamed


def test_the_names_of_released_adapters():
    theirs = randomised(IPAdapterPlusImageProjection(24, 32, 48, 2, 8, 6, 4, 2))
    files = original_names(theirs.state_dict())
    assert files["layers.1.0.to_kv.weight"].shape == (96, 48)
    whole = {f"image_proj.{name}": tensor for name, tensor in files.items()} | {"ip_adapter.1.to_k_ip.weight": torch.zeros(2)}
    x = context(2, 30, 24)
    for given in (files, {"image_proj": files, "ip_adapter": {}}, whole):
        ours = PerceiverResampler.from_ip_adapter(given, head_dim=8)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    with_positions = PerceiverResampler.from_ip_adapter(files | {"pos_emb.weight": torch.randn(30, 24)}, head_dim=8)
    torch.testing.assert_close(with_positions(x), theirs(x + with_positions.positions), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="state_dict has to_latents_from_mean_pooled_seq.1.weight, which the module has not"):
        PerceiverResampler.from_ip_adapter(files | {"to_latents_from_mean_pooled_seq.1.weight": torch.zeros(2, 2)})


def test_parts_of_a_state_dict():
    """Whichever tensor is missing, cut or of another type: the error has its name, as the others call it."""
    adapter = randomised(IPAdapterPlusImageProjection(24, 32, 48, 1, 8, 6, 4, 2)).state_dict()
    flamingo = flamingo_pytorch.PerceiverResampler(dim=48, depth=1, dim_head=8, heads=6, num_latents=4).state_dict()
    theirs = idefics2(resampler_depth=1)
    given = (
        (PerceiverResampler.from_ip_adapter, adapter, dict(head_dim=8)),
        (PerceiverResampler.from_ip_adapter, original_names(adapter), dict(head_dim=8)),
        (PerceiverResampler.from_flamingo, flamingo, dict(head_dim=8)),
        (PerceiverResampler.from_idefics2, theirs.state_dict(), dict(config=theirs.config)),
    )
    for begin, state, options in given:
        begin(state, **options)
        for name in state.keys() - {"latents", "media_pos_emb"}:
            with pytest.raises(ValueError, match=rf"state_dict has no .*'{name}'"):
                begin({n: t for n, t in state.items() if n != name}, **options)
            with pytest.raises(TypeError, match=f"state_dict has '{name}': a NoneType; it must map names to tensors"):
                begin(state | {name: None}, **options)
        with pytest.raises(ValueError, match="state_dict has no '.*q.*weight'"):
            begin({"latents": state["latents"]}, **options)
        with pytest.raises(ValueError, match="state_dict has .*bias'|state_dict has .*of shape"):
            begin({n: t[:-8] if "to_out" in n or "o_proj" in n else t for n, t in state.items()}, **options)
        with pytest.raises(TypeError, match="(state_dict|source) is a NoneType; it must be a"):
            begin(None, **options)
    with pytest.raises(TypeError, match="config is a int; it must be the perceiver_config, an object or a dict"):
        PerceiverResampler.from_idefics2(theirs.state_dict(), 3)


@pytest.mark.parametrize("name", BACKENDS)
def test_flamingo(name):
    """With its embeddings of media, each of which is resampled by itself."""
    theirs = randomised(
        flamingo_pytorch.PerceiverResampler(dim=48, depth=2, dim_head=8, heads=6, num_latents=4, num_media_embeds=5)
    )
    ours = PerceiverResampler.from_flamingo(theirs.state_dict(), head_dim=8, backend=name)
    x = context(2, 3, 40, 48)
    actual, expected = results(ours, [x]), results(theirs, [x])
    assert actual["out"].shape == (2, 3, 4, 48)
    check_all(actual, expected, lambda t: resampler.renamed(t, resampler.FLAMINGO, "perceiver"), 1e-5)


def test_frames_are_read_together():
    """(B, T, F, M, C) is, up to the embeddings, a context of F M rows for every medium."""
    ours = randomised(PerceiverResampler(16, num_latents=3, depth=1, num_heads=2, head_dim=8, max_frames=4, max_media=3))
    x = context(2, 3, 4, 5, 16)
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    plain = copy.deepcopy(ours)
    plain.frames = plain.media = None
    placed = x + ours.frames[:, None] + ours.media[:, None, None]
    expected = plain(placed.reshape(6, 20, 16), key_mask=mask.reshape(6, 20)).reshape(2, 3, 3, 16)
    torch.testing.assert_close(ours(x, key_mask=mask), expected)
    few = context(2, 7, 16)  # one medium of one frame
    torch.testing.assert_close(ours(few), plain(few + ours.frames[0] + ours.media[0]))


def test_a_state_dict_of_a_whole_model_and_other_places():
    theirs = idefics2(hidden_act="gelu_pytorch_tanh", attention_dropout=0.25)
    whole = {f"model.connector.perceiver_resampler.{name}": t for name, t in theirs.state_dict().items()}
    whole["model.text_model.norm.weight"] = torch.zeros(3)
    ours = PerceiverResampler.from_idefics2(whole, theirs.config, dtype=torch.float64)
    assert ours.dropout == 0.25 and ours.activation == "gelu_tanh" and ours.latents.dtype == torch.float64
    x = context(2, 20, 48)
    expected = exact_norms(theirs.double().eval())(x.double(), torch.ones(2, 20))
    torch.testing.assert_close(ours.eval()(x.double()), expected)
    with torch.no_grad():
        ours.latents.zero_()
    assert theirs.latents.any() and ours.latents.requires_grad  # a copy
    for given, config, message in (
        (theirs.state_dict(), None, "config is None; with a state dict it must be the perceiver_config"),
        ({"norm.weight": torch.zeros(3)}, {}, "state_dict has no latents"),
        (theirs.state_dict(), dict(hidden_act="mish"), "hidden_act is 'mish'; allowed are 'silu'"),
        (theirs.state_dict(), dict(resampler_head_dim=9), "head_dim is 9; num_heads times that must be 48"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceiverResampler.from_idefics2(given, config)


# --- Conversion in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_convert_idefics2(rows, monkeypatch):
    monkeypatch.setattr(_library, "SLOW_MKL", False)  # where ops.linear is faster the linear layers are converted too
    theirs = idefics2()
    model = nn.ModuleDict({"connector": copy.deepcopy(theirs)})
    names = list(model.state_dict())
    report = mmkernels.convert(model)
    assert report.replaced == {"connector": "perceiver resampler of Idefics2 on ops.attention"}
    assert list(model.state_dict()) == names
    x, mask = context(2, rows, 48), torch.arange(rows) < torch.tensor([[rows - 3], [rows]])
    expected, actual = (results(module, [x], mask.long()) for module in (theirs, model["connector"]))
    check_all(actual, expected, lambda t: t, 1e-5)
    assert mmkernels.convert(model).kept == {"connector": "it is converted already"}


class Seen(TorchDispatchMode):
    """Sizes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
        return out


def test_the_context_is_never_joined_nor_normalised_twice():
    theirs, x, mask = idefics2(), context(2, 200, 48), torch.ones(2, 200, dtype=torch.long)

    def large(module):
        with Seen() as seen, torch.no_grad():
            module(x, mask)
        return [size for size in seen.sizes if size >= x.numel()]

    plain = large(theirs)
    mmkernels.convert(theirs)
    fused = large(theirs)
    assert max(plain) > x.numel() and max(fused) == x.numel()  # [x ; z]
    projections = 2 * len(theirs.layers)  # as large as x would be keys of every head
    assert len(fused) < len(plain) - projections


def test_convert_leaves_what_a_library_put_in_place():
    """A LoRA around the projection of keys takes part: that layer is called, not read."""
    peft = pytest.importorskip("peft")
    theirs = idefics2()
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config)
    x, mask = context(2, 70, 48), torch.ones(2, 70, dtype=torch.long)
    expected = wrapped(x, mask)
    mmkernels.convert(wrapped)
    torch.testing.assert_close(wrapped(x, mask), expected, rtol=1e-5, atol=1e-5)


# --- As a module of torch ---------------------------------------------------------------------------------------------------


def small(backend="auto", **options):
    sizes = dict(num_latents=5, depth=2, num_heads=4, kv_heads=2, head_dim=8, input_channels=12, output_channels=20)
    return randomised(PerceiverResampler(24, **sizes | dict(backend=backend) | options))


@pytest.mark.parametrize("norm, gated, bias", [("layer", False, True), ("rms", True, True), ("layer", True, False)])
@pytest.mark.parametrize("rows", ROWS)
def test_all_options_on_all_backends(norm, gated, bias, rows):
    """Against the plain path in float64; it is theirs by the tests above."""
    options = dict(norm=norm, gated=gated, bias=bias, activation="silu", max_length=80, mlp_channels=32)
    exact = small("eager", **options).double()
    x, mask = context(2, rows, 12), torch.arange(rows) < torch.tensor([[rows - 2], [0]])
    right = results(exact, [x.double()], key_mask=mask)
    plain = farthest_of_nearby(lambda m, x: results(m, [x], key_mask=mask), small("eager", **options), x, right)
    typical = usual_error(plain, right)
    for name in BACKENDS:
        ours = results(set_backend(small(**options), name), [x], key_mask=mask)
        for what, exactly in right.items():
            if what.endswith("key.bias"):  # it moves all scores of a row alike: zero but for rounding
                assert ours[what].abs().max() <= 1e-5 * right[what.replace("bias", "weight")].abs().max()
                continue
            assert_within_budget(ours[what], exactly, plain[what], f"{what} on {name}", factor=3.0, typical=typical)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    """Rows of any size: RMSNorm's factor comes late, but where float16 would not hold what comes before it."""
    options = dict(norm="rms", gated=True, input_channels=None)
    module, x = small(**options), 500 * context(2, 70, 24).abs() + 1000
    exact = set_backend(small(**options), "eager").to(dtype).double()(x.to(dtype).double())
    plain = set_backend(small(**options).to(dtype), "eager")(x.to(dtype))
    assert_within_budget(module.to(dtype)(x.to(dtype)), exact, plain, "output", factor=2.0)


@pytest.mark.parametrize("options", [{}, dict(norm="rms", kv_heads=1), dict(backend="eager")], ids=str)
def test_what_stands_behind_the_mask_reaches_neither_output_nor_gradients(options):
    options = {"backend": FUSED, **options}
    module, x = small(**options), context(2, 70, 12)
    mask = torch.arange(70) < torch.tensor([[50], [70]])
    results = []
    for rows in (x, torch.where(mask[..., None], x, float("nan"))):
        rows = rows.detach().requires_grad_()
        module.zero_grad()
        out = module(rows, key_mask=mask)
        out.square().sum().backward()
        results.append([out.detach(), rows.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results)) and len(results[0]) > 3
    assert not results[1][1][~mask].any()


FEW = dict(num_latents=2, num_heads=3, kv_heads=3, head_dim=16)  # a latent costs less than a channel of a key


@pytest.mark.parametrize("norm, bias", [("layer", True), ("rms", True), ("layer", False)])
@pytest.mark.parametrize("rows", ROWS)
def test_few_latents_absorb_the_projections(norm, bias, rows, monkeypatch):
    options = dict(norm=norm, bias=bias, **FEW)
    x, mask = context(3, rows, 12), torch.arange(rows) < torch.tensor([[rows - 2], [0], [rows]])
    right = results(small("eager", **options).double(), [x.double()], key_mask=mask)
    plain = farthest_of_nearby(lambda m, x: results(m, [x], key_mask=mask), small("eager", **options), x, right)
    monkeypatch.setattr(resampler.ops, "attention", None)  # not called
    module = small(**options)
    ours = results(module, [x], key_mask=mask)
    assert ours.keys() == right.keys()
    for what, exactly in right.items():
        if what.endswith("key.bias"):
            assert not ours[what].any()
        else:
            assert_within_budget(ours[what], exactly, plain[what], what, factor=3.0, typical=usual_error(plain, right))
    with torch.no_grad():
        poisoned = torch.where(mask[..., None], x, float("nan"))
        assert torch.equal(module(poisoned, key_mask=mask), module(x, key_mask=mask))
        exact = small("eager", **options).double()(x.double())
        assert_within_budget(module(x), exact, small("eager", **options)(x), "without a mask", factor=3.0)


@pytest.mark.parametrize(
    "changes, dtype",
    [
        (dict(num_latents=12), torch.float32),
        (dict(kv_heads=1), torch.float32),
        (dict(backend="reference"), torch.float32),
        (dict(dropout=0.1), torch.float32),
        (dict(), torch.bfloat16),
    ],
    ids=str,
)
def test_what_absorbs_nothing(changes, dtype, monkeypatch):
    """Many latents, heads that share keys, named backends, dropout in training, 16 bits."""
    called, attention = [], resampler.ops.attention
    monkeypatch.setattr(resampler.ops, "attention", lambda *a, **k: (called.append(1), attention(*a, **k))[1])
    module = small(**FEW | changes).to(dtype)
    module(context(2, 70, 12, dtype=dtype))
    assert len(called) == 2
    replaced = small(**FEW)
    replaced.layers[1].key = nn.Sequential(replaced.layers[1].key)  # as a library's LoRA layer would be
    called.clear()
    replaced(context(2, 70, 12))
    assert len(called) == 1


def test_dropout_in_training_alone():
    module, x = small(dropout=0.5), context(2, 9, 12)
    assert torch.equal(module.eval()(x), small()(x))
    assert not torch.equal(module.train()(x), module(x))
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("backend, options", [(FUSED, {}), ("auto", FEW)], ids=["attention", "absorbed"])
def test_compile_fullgraph_once_for_all_sizes(backend, options):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = small(backend, depth=1, **options)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for batch, rows in ((2, 40), (3, 50), (5, 61)):
        x = context(batch, rows, 12)
        mask = torch.rand(batch, rows, generator=torch.Generator().manual_seed(2)) < 0.8
        ours = compiled(x, key_mask=mask)
        torch.testing.assert_close(ours, module(x, key_mask=mask), rtol=1e-5, atol=1e-5)
        ours.sum().backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_state_dict_is_plain_and_autocast_works():
    module, x = small(), context(2, 70, 12)
    other = PerceiverResampler(
        24, num_latents=5, depth=2, num_heads=4, kv_heads=2, head_dim=8, input_channels=12, output_channels=20
    )
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    exact = module.double()(x.double())
    module = module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = module(x), set_backend(copy.deepcopy(module), "eager")(x)
    assert_within_budget(ours, exact, plain, "output under autocast", factor=2.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PerceiverResampler(16, num_heads=4, kv_heads=3), "num_heads is 4; it must be a multiple of kv_heads, 3"),
        (lambda: PerceiverResampler(16, activation="mish"), "activation is 'mish'; allowed are 'relu', 'gelu'"),
        (lambda: PerceiverResampler(16, norm="batch"), "norm is 'batch'; allowed are 'layer', 'rms'"),
        (lambda: PerceiverResampler(0), "channels is 0; it must be an integer of 1 or more"),
        (lambda: PerceiverResampler(16, max_frames=0), "max_frames is 0; it must be an integer of 1 or more"),
        (lambda: PerceiverResampler(16, eps=0.0), "eps is 0.0; it must be a positive number"),
        (lambda: PerceiverResampler(16, dropout=1.0), r"dropout is 1.0; it must be a number in \[0, 1\)"),
        (lambda: PerceiverResampler(16, backend="cudnn"), "backend is 'cudnn'; allowed are 'auto'"),
        (lambda: small()(context(2, 12)), r"context has shape \(2, 12\); it must be one of \(B, M, 12\)"),
        (lambda: small()(context(2, 7, 24)), r"context has shape \(2, 7, 24\)"),
        (lambda: small(max_length=6)(context(2, 7, 12)), "with max_length 6 it has 7 of them"),
        (lambda: small(max_media=2)(context(2, 3, 7, 12)), "with max_media 2 it has 3 of them"),
        (
            lambda: small()(context(2, 7, 12), key_mask=torch.ones(2, 6, dtype=torch.bool)),
            r"key_mask has shape \(2, 6\); it must be a bool tensor \(2, 7\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="bias is 1; it must be True or False"):
        PerceiverResampler(16, bias=1)
    with pytest.raises(TypeError, match="gated is 'x'; it must be True or False"):
        PerceiverResampler(16, gated="x")
    with pytest.raises(TypeError, match="context is a list; it must be a tensor"):
        small()([1.0])
    with pytest.raises(TypeError, match="context has dtype torch.float64; it must be the module's, torch.float32"):
        small()(context(2, 7, 12).double())
    with pytest.raises(TypeError, match="key_mask is a torch.int64; it must be a bool tensor"):
        small()(context(2, 7, 12), key_mask=torch.ones(2, 7, dtype=torch.int64))
