"""The attention modules against plain twins, and as citizens of torch."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmkernels import _library
from mmkernels.modules import FourierPositions, LatentCrossAttention, LatentSelfAttention, set_backend
from mmkernels.testing import assert_within_budget, max_error, usual_error

BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
FUSED = BACKENDS[-1]
# What torch's SDPA makes of bfloat16 is not ours to bound.
PRECISIONS = [(b, t) for b in BACKENDS for t in (torch.float32, torch.bfloat16) if (b, t) != ("eager", torch.bfloat16)]


def plain_attention(q, k, v, key_mask, sdpa):
    mask = None if key_mask is None else key_mask[:, None, None]
    if sdpa:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores if mask is None else scores.masked_fill(~mask, -1e30)).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


class PlainCross(nn.Module):
    """The same attention as a user would write it, with the same names."""

    sdpa = False

    def __init__(self, query_channels, input_channels, qk, v, out, heads):
        super().__init__()
        self.heads = heads
        self.query_norm, self.input_norm = nn.LayerNorm(query_channels), nn.LayerNorm(input_channels)
        self.query, self.key = nn.Linear(query_channels, qk), nn.Linear(input_channels, qk)
        self.value, self.output = nn.Linear(input_channels, v), nn.Linear(v, out)

    def forward(self, latents, inputs, position=None, key_mask=None):
        if position is not None:
            inputs = torch.cat([inputs, position.expand(len(inputs), -1, -1)], -1)
        a, b = self.query_norm(latents.expand(len(inputs), -1, -1)), self.input_norm(inputs)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(a), self.key(b), self.value(b)))
        return self.output(plain_attention(q, k, v, key_mask, self.sdpa))


class PlainSelf(nn.Module):
    sdpa = False

    def __init__(self, channels, qk, v, out, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(channels)
        self.query, self.key, self.value = nn.Linear(channels, qk), nn.Linear(channels, qk), nn.Linear(channels, v)
        self.output = nn.Linear(v, out)

    def forward(self, z, key_mask=None):
        z = self.norm(z)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(z), self.key(z), self.value(z)))
        return self.output(plain_attention(q, k, v, key_mask, self.sdpa))


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


CROSS = {
    "one head, defaults": (dict(), (20, 11, 11, 11, 20, 1)),
    "four heads": (dict(num_heads=4, qk_channels=8, v_channels=24, output_channels=5), (20, 11, 8, 24, 5, 4)),
    "q shape": (dict(num_heads=2, shape_for_attention="q"), (20, 11, 20, 20, 20, 2)),
}


DRAWS = 4


def run(module, arguments, options, draw=0):
    """(output, gradients of parameters and floating arguments)."""
    arguments = [a.detach().clone().requires_grad_() for a in arguments]
    output = module(*arguments, **options)
    wanted = [*module.parameters(), *arguments]
    generator = torch.Generator().manual_seed(2 + draw)
    cotangent = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, wanted, cotangent)]


def check(module, plain, arguments, options, dtype=torch.float32):
    """Output and each gradient of `module` against `plain` in float64: in float32 four times the error of `plain` in float32.

    The largest error over a few draws of the arguments and, in float32, over the two ways to write plain attention, since
    of a tensor of few elements one error alone is luck. In bfloat16, where the gradient of the absorbed queries is rounded,
    three times the largest of plain's relative errors over all tensors.
    """

    def to(dtype):
        return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}

    module = module.to(dtype)  # rounded first: everybody starts from the same numbers
    plain.to(dtype).load_state_dict(module.state_dict())
    plains = [plain, copy.deepcopy(plain)] if dtype == torch.float32 else [plain]
    plains[-1].sdpa = dtype == torch.float32
    exact_module = copy.deepcopy(plain).double()
    names = ["output", *(n for n, _ in module.named_parameters()), *(f"argument {i}" for i in range(len(arguments)))]
    ours, allowed = (dict.fromkeys(names, 0.0) for _ in range(2))
    for draw in range(DRAWS):
        drawn = [(a if draw == 0 else torch.randn(a.shape)).to(dtype) for a in arguments]
        rounded = to(dtype)
        widened = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
        exact = dict(zip(names, run(exact_module, [a.double() for a in drawn], widened, draw), strict=True))
        scales = {name: float(b.abs().max()) for name, b in exact.items()}
        # Exactly zero, because every score of a row moves alike; it is rounded as the sums for key.weight are.
        scales["key.bias"] = scales["key.weight"]
        for errors, model in ((ours, module), *((allowed, plain) for plain in plains)):
            for name, value in zip(names, run(model, drawn, rounded, draw), strict=True):
                errors[name] = max(errors[name], max_error(value, exact[name]) / scales[name])
    if dtype == torch.bfloat16:
        allowed = dict.fromkeys(names, 3 * max(allowed.values()))
    else:
        allowed = {name: 4 * error for name, error in allowed.items()}
    over = {name: (ours[name], allowed[name]) for name in names if not ours[name] <= allowed[name]}
    assert not over, f"relative errors, ours and what plain PyTorch's in {dtype} allows: {over}"


@pytest.mark.parametrize("backend, dtype", PRECISIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["latents per example", "shared latents"])
@pytest.mark.parametrize("case", CROSS)
def test_cross_attention_against_its_twin(case, shared, dtype, backend):
    options, sizes = CROSS[case]
    module = randomise(LatentCrossAttention(20, 11, **options, backend=backend))
    latents, inputs = torch.randn(1 if shared else 3, 7, 20), torch.randn(3, 33, 4)
    position = torch.randn(33, 7)
    check(module, PlainCross(*sizes), [latents, inputs], {"position": position}, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_with_a_mask(backend):
    module = randomise(LatentCrossAttention(20, 11, backend=backend))
    mask = torch.arange(33) < torch.tensor([[33], [5], [1]])
    latents, inputs = torch.randn(3, 7, 20), torch.randn(3, 33, 11)
    check(module, PlainCross(20, 11, 11, 11, 20, 1), [latents, inputs], {"key_mask": mask})
    mask[1] = False
    assert torch.equal(module(latents, inputs, key_mask=mask)[1], module.output.bias.expand(7, 20))


@pytest.mark.parametrize("backend, dtype", PRECISIONS)
@pytest.mark.parametrize("sizes", [(24, 24, 24, 24, 8), (24, 12, 30, 24, 3)], ids=["defaults", "qk and v differ"])
def test_self_attention_against_its_twin(sizes, dtype, backend):
    channels, qk, v, out, heads = sizes
    module = LatentSelfAttention(channels, num_heads=heads, qk_channels=qk, v_channels=v, output_channels=out, backend=backend)
    check(randomise(module), PlainSelf(*sizes), [torch.randn(3, 9, channels)], {}, dtype)
    # Not a single key: its score's gradient is dP - delta, zero in exact arithmetic; plain softmax gives zero to the bit, a
    # backward that never sees whole rows gives the rounding of dP.
    mask = torch.arange(9) < torch.tensor([[9], [5], [3]])
    check(randomise(module), PlainSelf(*sizes), [torch.randn(3, 9, channels)], {"key_mask": mask}, dtype)


class Pair(nn.Module):
    """Both attentions and the positions, as in a model."""

    def __init__(self, backend, **factory):
        super().__init__()
        self.positions = FourierPositions((5, 7), 2, **factory)
        self.cross = LatentCrossAttention(16, 3 + self.positions.channels, backend=backend, **factory)
        self.self_attention = LatentSelfAttention(16, num_heads=4, backend=backend, **factory)

    def forward(self, latents, inputs):
        z = latents + self.cross(latents, inputs, position=self.positions())
        return z + self.self_attention(z)


def pair(backend):
    return randomise(Pair(backend)), torch.randn(1, 6, 16), torch.randn(2, 35, 3)


def test_state_dict():
    module, *_ = pair("reference")
    names = {f"cross.{n}" for n in PlainCross(16, 13, 13, 13, 16, 1).state_dict()}
    names |= {f"self_attention.{n}" for n in PlainSelf(16, 16, 16, 16, 4).state_dict()}
    assert set(module.state_dict()) == names
    other = Pair("eager")
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))


def test_deepcopy_dtype_device_and_repr():
    module, latents, inputs = pair(FUSED)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.cross.query.weight.zero_()
    assert twin.cross.query.weight.any()
    assert torch.equal(twin(latents, inputs), copy.deepcopy(twin)(latents, inputs))
    assert twin.to(torch.bfloat16)(latents.bfloat16(), inputs.bfloat16()).dtype == torch.bfloat16
    assert next(Pair("auto", device="meta", dtype=torch.float16).parameters()).dtype == torch.float16
    assert "num_heads=4" in repr(module) and FUSED in repr(module)


def test_weights_may_change_between_calls():
    module, latents, inputs = pair(FUSED)
    before = module(latents, inputs)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(module(latents, inputs), before)
    module.load_state_dict(state)
    assert torch.equal(module(latents, inputs), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    module, latents, inputs = pair(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(latents, inputs)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    exact = pair("reference")[0].double()(latents.double(), inputs.double())
    set_backend(module, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = module(latents, inputs)
    assert output.dtype == plain.dtype
    assert_within_budget(output, exact, plain, "output under autocast", factor=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    module, latents, inputs = pair(backend)
    plain = run(module, [latents, inputs], {})

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            return checkpoint(self.module, *arguments, use_reentrant=False)

    assert all(torch.equal(a, b) for a, b in zip(run(Checkpointed(), [latents, inputs], {}), plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    module, latents, inputs = pair(backend)
    plain = run(module, [latents, inputs], {})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, [latents, inputs], {}), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_for_all_batch_sizes_and_lengths(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = randomise(LatentCrossAttention(16, 5, backend=backend))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for batch, length in ((2, 35), (3, 50), (5, 111)):
        latents, inputs = torch.randn(batch, 6, 16), torch.randn(batch, length, 5)
        output = compiled(latents, inputs)
        torch.testing.assert_close(output, module(latents, inputs), rtol=1e-5, atol=1e-5)
        output.sum().backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_eager_is_sdpa():
    """The plain path uses torch's own fused attention."""
    module, latents, inputs = pair("eager")
    calls = []
    original = F.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    F.scaled_dot_product_attention = counted
    try:
        module(latents, inputs)
    finally:
        F.scaled_dot_product_attention = original
    assert len(calls) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LatentCrossAttention(16, 5, num_heads=2), "qk_channels is 5; it must be a multiple of num_heads, 2"),
        (lambda: LatentCrossAttention(16, 6, num_heads=2, v_channels=3), "v_channels is 3"),
        (lambda: LatentCrossAttention(16, 6, shape_for_attention="k"), "shape_for_attention is 'k'"),
        (lambda: LatentCrossAttention(0, 6), "query_channels is 0"),
        (lambda: LatentSelfAttention(16, num_heads=3), "qk_channels is 16"),
        (lambda: LatentSelfAttention(16, num_heads=0), "num_heads is 0"),
        (lambda: LatentSelfAttention(16, backend="fast"), "backend is 'fast'; allowed are 'auto'"),
        (lambda: LatentSelfAttention(16.0), "channels is 16.0; it must be a positive integer"),
        (lambda: LatentSelfAttention(16, eps=0.0), "eps is 0.0; it must be a positive number"),
        (lambda: set_backend(nn.Linear(1, 1), "fast"), "backend is 'fast'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_with_positions_and_a_mask(backend):
    """A decoder's query is content and a shared position; masked queries yield the bias of `output`."""
    torch.manual_seed(0)
    plain = PlainCross(7, 12, 8, 4, 7, 2).double()
    module = LatentCrossAttention(7, 12, num_heads=2, qk_channels=8, v_channels=4, backend=backend)
    module.load_state_dict(plain.state_dict())
    queries, position, inputs = torch.randn(3, 9, 4), torch.randn(9, 3), torch.randn(3, 20, 12)
    mask = torch.rand(3, 9) < 0.6
    out = module(queries, inputs, query_position=position, query_mask=mask)
    joined = torch.cat([queries, position.expand(3, -1, -1)], -1)
    expected = torch.where(mask[..., None], plain(joined.double(), inputs.double()), plain.output.bias)
    assert max_error(out, expected) < 1e-5
    shared = module(queries[:1], inputs, query_position=position, query_mask=mask)
    assert torch.equal(shared[0], out[0]) and shared.shape == (3, 9, 7)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(queries=[1.0]), TypeError, "queries is a list; it must be a tensor"),
        (dict(queries=torch.zeros(6, 16)), ValueError, r"queries has shape \(6, 16\); it must be \(B, N, 16\)"),
        (dict(queries=torch.zeros(3, 6, 16)), ValueError, r"queries has shape .*; its batch must be 1 or that of inputs, 2"),
        (dict(queries=torch.zeros(2, 6, 16).double()), TypeError, "queries has dtype torch.float64; it must be the module's"),
        (dict(inputs=torch.zeros(2, 7, 6)), ValueError, r"inputs has shape \(2, 7, 6\); it must be \(B, M, 5\)"),
        (dict(inputs=torch.zeros(2, 7, 5).half()), TypeError, "inputs has dtype torch.float16"),
        (dict(inputs=torch.zeros(2, 7, 5, device="meta")), ValueError, "inputs is on meta; it must be on the module's"),
        (dict(position=torch.zeros(1, 7, 3)), ValueError, r"position has shape \(1, 7, 3\); it must be a tensor \(M, Cp\)"),
        (dict(position=torch.zeros(6, 3)), ValueError, r"position has shape \(6, 3\); with inputs \(2, 7, 5\)"),
        (dict(key_mask=torch.ones(2, 6, dtype=torch.bool)), ValueError, r"key_mask has shape \(2, 6\); it must be"),
        (dict(query_position=torch.zeros(6)), ValueError, r"query_position has shape \(6,\); it must be a tensor \(N, Dp\)"),
        (dict(query_mask=torch.ones(2, 7, dtype=torch.bool)), ValueError, r"query_mask has shape \(2, 7\); it must be"),
    ],
)
def test_wrong_inputs(changes, error, message, backend):
    module = LatentCrossAttention(16, 8, backend=backend)
    arguments = dict(queries=torch.zeros(2, 6, 16), inputs=torch.zeros(2, 7, 5), position=torch.zeros(7, 3), key_mask=None)
    arguments |= changes
    with pytest.raises(error, match=message):
        module(arguments.pop("queries"), arguments.pop("inputs"), **arguments)
    own = LatentSelfAttention(16, backend=backend)
    with pytest.raises(ValueError, match=r"latents has shape \(6, 16\); it must be \(B, N, 16\)"):
        own(torch.zeros(6, 16))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_a_stream_is_the_whole_input(backend, dropout):
    """Result and gradients, as near to float64 as plain PyTorch comes that has the whole; what is dropped is the same."""
    torch.manual_seed(0)
    module = LatentCrossAttention(12, 10, num_heads=2, qk_channels=8, v_channels=16, dropout=dropout, backend=backend)
    own = nn.ModuleDict({"read": module, "preprocessor": nn.Linear(6, 6)})
    latents, inputs, position = torch.randn(1, 5, 9), torch.randn(3, 40, 6), torch.randn(40, 4)
    query_position, query_mask, mask = torch.randn(5, 3), torch.rand(3, 5) < 0.6, torch.rand(3, 40) < 0.7

    def results(own, dtype=torch.float32, chunked=False):
        q, x, place, side = (t.to(dtype) for t in (latents, inputs, position, query_position))
        module, preprocessor = own["read"], own["preprocessor"]
        options = dict(query_position=side, query_mask=query_mask)

        def chunks():
            for part in zip(x.split(16, 1), place.split(16), mask.split(16, 1), strict=True):
                yield preprocessor(part[0]), *part[1:]

        torch.manual_seed(3)
        if chunked:
            y = module.stream(q, chunks, parameters=preprocessor.parameters(), **options)
        else:
            y = module(q, preprocessor(x), position=place, key_mask=mask, **options)
        names, weights = zip(*own.named_parameters(), strict=True)
        return {"output": y, **dict(zip(names, torch.autograd.grad(y.square().sum(), weights), strict=True))}

    streamed = results(own, chunked=True)
    plain = set_backend(copy.deepcopy(own), "reference")
    eager, exact = results(plain), results(plain.double(), torch.float64)
    typical = usual_error(eager, exact)
    for name, value in streamed.items():
        assert_within_budget(value, exact[name], eager[name], name, 2.0 if name == "output" else 3.0, typical)
    if dropout > 0.0:
        assert not torch.allclose(streamed["output"], results(own.eval(), chunked=True)["output"])


def test_what_a_stream_refuses():
    module = LatentCrossAttention(12, 10, backend="eager")
    with pytest.raises(ValueError, match="backend is 'eager'; a stream needs one of ops.latent_attention"):
        module.stream(torch.randn(1, 5, 12), [torch.randn(2, 7, 10)])
    module.backend = "auto"
    with pytest.raises(ValueError, match=r"queries has shape \(1, 5, 11\); it must be \(B, N, 12\)"):
        module.stream(torch.randn(1, 5, 11), [torch.randn(2, 7, 10)])
    with pytest.raises(ValueError, match=r"query_mask has shape \(1, 5\); it must be \(B, M\) = \(2, 5\)"):
        module.stream(torch.randn(1, 5, 12), [torch.randn(2, 7, 10)], query_mask=torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_attention_weights(backend):
    """While training alone; its mean over many draws is the result without."""
    torch.manual_seed(0)
    cross = randomise(LatentCrossAttention(12, 10, num_heads=2, qk_channels=8, v_channels=16, dropout=0.5, backend=backend))
    own = randomise(LatentSelfAttention(12, num_heads=2, dropout=0.5, backend=backend))
    latents, inputs = torch.randn(400, 5, 12), torch.randn(1, 40, 10).expand(400, -1, -1)
    for module, arguments in ((cross, (latents[:1], inputs)), (own, (latents[:1].expand(400, -1, -1),))):
        with torch.no_grad():
            dropped = module(*arguments)
            torch.manual_seed(7)
            first = module(*arguments)
            torch.manual_seed(7)
            assert torch.equal(first, module(*arguments)) and not torch.equal(first, dropped)
            kept = module.eval()(*arguments)
            assert torch.equal(kept, module(*arguments))
        noise = (dropped - kept).std(0) / 20 + 1e-6
        assert ((dropped.mean(0) - kept[0]).abs() < 5 * noise).all()
        assert "dropout=0.5" in repr(module)


def test_dropout_that_is_refused():
    for make in (lambda p: LatentCrossAttention(12, 10, dropout=p), lambda p: LatentSelfAttention(16, dropout=p)):
        with pytest.raises(ValueError, match=r"dropout is 1.0; it must be a number in \[0, 1\)"):
            make(1.0)
