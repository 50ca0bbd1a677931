"""The registered ops called directly with wrong arguments: an error that names the argument, never a read past the end."""

import pytest
import torch

from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.adapter.autograd import NAMES
from mmkernels.ops.attention import api as attention_api


def mutations(tensor):
    """(description, tensor) of wrong or at least different versions of an argument."""
    yield "float64", tensor.double()
    yield "int32", tensor.to(torch.int32)
    yield "one dimension less", tensor[0]
    yield "one dimension more", tensor[None]
    for dim, size in enumerate(tensor.shape):
        yield f"dimension {dim} longer", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        if size > 2:
            yield f"dimension {dim} shorter", tensor.narrow(dim, 0, size - 1)


def call_with_mutations(op, arguments, names, legal):
    """Every mutation of every tensor either is legal and runs, or raises a RuntimeError that names the argument."""
    for position, name in enumerate(names):
        tensor = arguments[position]
        if tensor is None:
            continue
        for what, changed in mutations(tensor):
            mutated = [*arguments[:position], changed, *arguments[position + 1 :]]
            if legal(mutated):
                op(*mutated)
                continue
            with pytest.raises(RuntimeError) as error:
                op(*mutated)
            text = str(error.value)
            assert any(f"{n} " in text for n in names if n), f"{name}, {what}: the error names no argument: {text}"


@pytest.fixture
def native(on, request):
    """C++ on the CPU and the CUDA bindings in the emulator: what indexes raw memory."""
    return on(request.param)


both = pytest.mark.parametrize("native", ["cpp", "cuda"], indirect=True)


@both
def test_attention_forward(native, generator):
    q, k, v = (torch.randn(s, generator=generator) for s in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)))
    mask, bias, seed = torch.ones(2, 7, dtype=torch.bool), torch.randn(2, 3, 5, 7), torch.tensor([1])

    def legal(a):
        try:
            attention_api._check(*a[:5], a[7], a[8], a[6])
        except (TypeError, ValueError):
            return False
        return all(t.dtype == torch.float32 for t in a[:3]) and a[6].dim() == 1

    arguments = [q, k, v, mask, bias, None, seed, 0.3, 0.2]
    names = ("q", "k", "v", "key_mask", "bias", "bias_index", "seed")
    call_with_mutations(forward_backward("attention", native)[0], arguments, names, legal)
    for dropout_p in (-0.1, 1.0, float("nan")):
        with pytest.raises(RuntimeError, match="dropout_p"):
            forward_backward("attention", native)[0](*arguments[:8], dropout_p)
    with pytest.raises(RuntimeError, match="seed"):
        forward_backward("attention", native)[0](q, k, v, None, None, None, None, 0.3, 0.2)


@both
def test_attention_backward(native, generator):
    forward, backward = forward_backward("attention", native)
    q, k, v = (torch.randn(s, generator=generator) for s in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)))
    mask, bias, seed = torch.ones(2, 7, dtype=torch.bool), torch.randn(2, 3, 5, 7), torch.tensor([1])
    out, lse = forward(q, k, v, mask, bias, None, seed, 0.3, 0.2)
    arguments = [torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, mask, bias, None, seed, 0.3, 0.2, 7]
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", "key_mask", "bias", "bias_index", "seed")
    call_with_mutations(backward, arguments, names, lambda a: False)


@both
def test_attention_with_diagonal_blocks(native, generator):
    forward, backward = forward_backward("attention", native)
    q, k, v = (torch.randn(s, generator=generator) for s in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)))
    blocks, index = torch.randn(3, 5, 3, generator=generator), torch.tensor([1, 0])

    def fits(blocks):  # as many blocks as there are, as wide as they are
        return blocks.dtype == torch.float32 and blocks.dim() == 3 and blocks.shape[1] == 5 and blocks.is_contiguous()

    def legal(a):
        values = a[2].dtype == torch.float32 and a[2].shape[:3] == v.shape[:3] and a[2].dim() == 4
        return a[0] is q and a[1] is k and values and a[5] is index and fits(a[4])

    arguments = [q, k, v, None, blocks, index, None, 0.3, 0.0]
    call_with_mutations(forward, arguments, ("q", "k", "v", None, "bias", "bias_index"), legal)
    out, lse = forward(*arguments)
    arguments = [torch.ones_like(out), None, q, k, v, out, lse, None, blocks, index, None, 0.3, 0.0, 7]
    names = ("dout", None, "q", "k", "v", "out", "lse", None, "bias", "bias_index")
    call_with_mutations(backward, arguments, names, lambda a: a[8] is not blocks and fits(a[8]))
    with pytest.raises(RuntimeError, match="bias"):
        forward(q, k, v, None, blocks, None, None, 0.3, 0.0)  # three rows for two examples


def decoder_arguments(generator):
    queries, position = torch.randn(2, 5, 6, generator=generator), torch.randn(5, 2, generator=generator)
    k, v = torch.randn(2, 3, 7, 8, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    bias, out_bias = torch.randn(2, 3, 7, generator=generator), torch.randn(4, generator=generator)
    query_mask, key_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    return [queries, position, query_mask, k, bias, v, out_bias, key_mask]


DECODER = ("queries", "position", "query_mask", "k", "bias", "v", "out_bias", "key_mask")


@both
def test_latent_decode_forward(native, generator):
    arguments = [*decoder_arguments(generator), 0.3, 1e-5]
    call_with_mutations(forward_backward("latent", native, "latent_decode")[0], arguments, DECODER, lambda a: False)


@both
def test_latent_decode_backward(native, generator):
    forward, backward = forward_backward("latent", native, "latent_decode")
    arguments = decoder_arguments(generator)
    out, lse = forward(*arguments, 0.3, 1e-5)
    arguments = [torch.ones_like(out), *arguments, out, lse, 0.3, 1e-5, 7]
    call_with_mutations(backward, arguments, ("dout", *DECODER, "out", "lse"), lambda a: False)


@both
def test_latent_forward(native, generator):
    q, x = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 6, generator=generator)
    position, mask = torch.randn(7, 2, generator=generator), torch.ones(2, 7, dtype=torch.bool)
    arguments, names = [q, x, position, mask, 0.3, 1e-5], ("q", "x", "position", "key_mask")

    def legal(a):
        q, x, position, mask = a[:4]
        return (
            [t.dim() for t in a[:4]] == [3, 3, 2, 2]
            and all(t.dtype == torch.float32 for t in a[:3])
            and mask.dtype == torch.bool
            and q.shape[0] in (1, x.shape[0])
            and q.shape[2] == x.shape[2] + position.shape[1]
            and position.shape[0] == x.shape[1]
            and mask.shape == x.shape[:2]
        )

    call_with_mutations(forward_backward("latent", native)[0], arguments, names, legal)


@both
def test_latent_backward(native, generator):
    forward, backward = forward_backward("latent", native)
    q, x = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 7, 6, generator=generator)
    position, mask = torch.randn(7, 2, generator=generator), torch.ones(2, 7, dtype=torch.bool)
    out, lse = forward(q, x, position, mask, 0.3, 1e-5)
    arguments = [torch.ones_like(out), torch.ones_like(lse), q, x, position, mask, out, lse, 0.3, 1e-5, 7]
    names = ("dout", "dlse", "q", "x", "position", "key_mask", "out", "lse")
    call_with_mutations(backward, arguments, names, lambda a: False)


def test_latent_inference(on, generator):
    on("cpp")
    op = torch.ops.mmkernels.latent_attention.default
    shapes = {"q": (2, 5, 8), "x": (2, 7, 6), "w_k": (8, 8), "w_v": (4, 8), "norm_weight": (8,), "norm_bias": (8,)}
    shapes |= {"b_v": (4,), "position": (7, 2)}
    arguments = [torch.randn(s, generator=generator) for s in shapes.values()]
    arguments += [torch.ones(2, 7, dtype=torch.bool), 2, 0.3, 1e-5]
    assert op(*arguments).shape == (2, 5, 4)
    wrong = [(0, (2, 5, 9)), (0, (3, 5, 8)), (1, (2, 8, 6)), (2, (8, 7)), (2, (7, 8)), (3, (3, 8)), (3, (4, 9))]
    wrong += [(4, (7,)), (5, (9,)), (6, (5,)), (7, (6, 2)), (7, (7, 3))]
    for position, shape in wrong:
        with pytest.raises(RuntimeError, match=rf"\b({'|'.join(shapes)}) "):
            op(*arguments[:position], torch.zeros(shape), *arguments[position + 1 :])
    for heads in (0, -1, 3):
        with pytest.raises(RuntimeError, match="num_heads"):
            op(*arguments[:9], heads, 0.3, 1e-5)


def in_list(op, position):
    """`op` with the tensor at `position` in a list of one."""
    return lambda *args: op(*args[:position], [args[position]], *args[position + 1 :])


@both
def test_norm_forward(native, generator):
    shapes = [(2, 5, 8), (2, 5, 8), (8,), (2, 8), (8,)]
    inputs = [*(torch.randn(s, generator=generator) for s in shapes), None, 1e-5]

    def legal(a):
        x, residual, residual_bias, gain, bias = a[:5]
        rows = x.dim() == residual.dim() == 3 and x.shape == residual.shape
        return (
            rows
            and all(t.dtype == torch.float32 for t in a[:5])
            and residual_bias.shape == x.shape[2:]
            and gain.shape in (x.shape[2:], (x.shape[0], x.shape[2]))
            and bias.shape in (x.shape[2:], (x.shape[0], x.shape[2]))
        )

    names = ("x", "residual", "residual_bias", "gain", "bias")
    forward = forward_backward("norm", native)[0]
    call_with_mutations(in_list(forward, 0), inputs, names, legal)
    for wrong in ([], [inputs[0]] * 3, [inputs[0], inputs[0][:1]], [inputs[0], inputs[0].half()], [inputs[0][..., :0]]):
        with pytest.raises(RuntimeError, match=r"x(\[1\])? has "):
            forward(wrong, inputs[1], None, None, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="residual_bias is given"):
        forward(inputs[:1], None, inputs[2], None, None, None, 1e-5)
    tasks = [inputs[0], inputs[1], None, torch.randn(3, 8, generator=generator), inputs[4], torch.tensor([2, 0]), 1e-5]
    names = ("x", "residual", None, "gain", "bias", "index")

    def of_tasks(a):
        others = all(a[i] is tasks[i] for i in (0, 1, 2, 4, 5))
        gain = a[3].dtype == torch.float32 and a[3].dim() == 2 and a[3].shape[1] == 8
        return others and gain and a[3].shape[0] >= 3  # a number beyond its rows is seen on a CPU alone

    if native == "cpp":
        call_with_mutations(in_list(forward, 0), tasks, names, of_tasks)
        with pytest.raises(RuntimeError, match="index has the number 2; numbers must be in"):
            forward([inputs[0]], inputs[1], None, tasks[3][:2], None, tasks[5], 1e-5)


@both
def test_norm_backward(native, generator):
    forward, backward = forward_backward("norm", native)
    x, gain = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 8, generator=generator)
    out, total, mean, rstd = forward([x], x, None, gain, None, None, 1e-5)
    inputs = [torch.ones_like(out), torch.ones_like(out), total, mean, rstd, gain, None, 0, 15]
    legal = lambda a: all(t.dtype == torch.float32 for t in a[:6]) and a[5].shape == (8,)  # noqa: E731
    call_with_mutations(in_list(backward, 2), inputs, ("dout", "dsum", "rows", "mean", "rstd", "gain"), legal)


@both
def test_bias_gelu(native, generator):
    forward, backward = forward_backward("activation", native, "bias_gelu")
    x, bias = torch.randn(2, 5, 8, generator=generator), torch.randn(8, generator=generator)
    legal = lambda a: all(t.dtype == torch.float32 for t in a[:2]) and a[1].shape == a[0].shape[-1:]  # noqa: E731
    call_with_mutations(forward, [x, bias, True], ("x", "bias"), legal)
    inputs = [torch.ones_like(x), x, bias, True, 3]
    call_with_mutations(backward, inputs, ("dout", "x", "bias"), lambda a: False)
    with pytest.raises(RuntimeError, match="x has shape"):
        forward(torch.tensor(1.0), None, True)


def hypergrid_arguments(generator):
    shapes = ((6, 16), (24, 16), (2, 2, 3), (24,))
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    return [*tensors, torch.tensor([1, 0]), 3, False, 2, 0.0, None]


def is_hypergrid(x, weight, gate, bias, index, rows_per_gate):
    floats = all(t.dtype == torch.float32 for t in (x, weight, gate, bias))
    if not floats or index.dtype != torch.int64 or (x.dim(), weight.dim(), gate.dim(), bias.dim()) != (2, 2, 3, 1):
        return False
    divided = all(s % n == 0 and (n == 1 or s // n >= 8) for s, n in zip(weight.shape[::-1], gate.shape[1:], strict=True))
    rows = x.shape[0] % rows_per_gate == 0 and index.shape == (x.shape[0] // rows_per_gate,)
    return divided and rows and x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]


# The CUDA binding alone here: a C++ one is held to the same by its own tests.
@pytest.mark.parametrize("native", ["cuda"], indirect=True)
def test_hypergrid(native, generator):
    forward, backward = forward_backward("hypergrid", native)
    names = ("x", "weight", "gate", "bias", "index")
    arguments = hypergrid_arguments(generator)
    call_with_mutations(forward, arguments, names, lambda a: is_hypergrid(*a[:6]))
    dy = torch.randn(6, 24, generator=generator)

    def legal(a):
        same = a[0].dtype == torch.float32 and a[0].dim() == 2 and a[0].shape == (a[1].shape[0], a[2].shape[0])
        return same and is_hypergrid(*a[1:4], arguments[3], *a[4:6])

    inputs = [dy, *arguments[:3], *arguments[4:], True, True, True, True]
    call_with_mutations(backward, inputs, ("dy", "x", "weight", "gate", "index"), legal)
    for place, wrong, message in ((5, 4, "x has 6 rows"), (7, 4, "activation is 4"), (8, 1.0, "dropout_p is 1")):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(RuntimeError, match="gate has shape .*without index it must have 1 or 3 gates"):
        forward(*arguments[:4], None, 2, *arguments[6:])


@pytest.mark.parametrize("native", ["cuda"], indirect=True)
def test_hypergrid_gate(native, generator):
    forward, backward = forward_backward("hypergrid", native, "hypergrid_gate")
    row, column = torch.randn(2, 5, generator=generator), torch.randn(1, 7, generator=generator)

    def legal(row, column):
        alike = row.dtype == column.dtype == torch.float32 and row.dim() == column.dim() == 2
        return alike and (row.shape[0] == column.shape[0] or 1 in (row.shape[0], column.shape[0]))

    call_with_mutations(forward, [row, column], ("row", "column"), lambda a: legal(*a))
    right = lambda a: legal(*a[1:]) and a[0].dtype == torch.float32 and a[0].shape == forward(*a[1:]).shape  # noqa: E731
    call_with_mutations(backward, [torch.ones(2, 5, 7), row, column], ("dgate", "row", "column"), right)


def is_adapter(arguments):
    """Of the 15 tensors of adapter_fwd, all of them given, with a bank."""
    x, input_residual, residual, w_down, b_down, w_up, b_up, *vectors, scale, gate, index, seed = arguments[:15]
    if any(t.dtype != torch.float32 for t in arguments[:13]) or index.dtype != torch.int64 or seed.dtype != torch.int64:
        return False
    if x.dim() != 3 or w_down.dim() != 3 or scale.dim() != 2:
        return False
    adapters, bottleneck, channels = *w_down.shape[:2], x.shape[2]
    alike = input_residual.shape == residual.shape == x.shape and w_down.shape[2] == channels and seed.shape == (1,)
    banks = (b_down, (bottleneck,)), (w_up, (channels, bottleneck)), (b_up, (channels,))
    scaled = scale.shape[0] in (1, adapters) and scale.shape[1] in (1, channels)
    of_rows = all(t.shape in (x.shape[:1], x.shape[:2]) for t in (gate, index))
    numbers = bool(((index >= -1) & (index < adapters)).all())
    return (
        alike
        and all(t.shape == (adapters, *sizes) for t, sizes in banks)
        and all(t.shape == (channels,) for t in vectors)
        and scaled
        and of_rows
        and numbers
    )


@both
def test_adapter(native, generator):
    forward, backward = forward_backward("adapter", native)
    shapes = [(2, 3, 8)] * 3 + [(5, 4, 8), (5, 4), (5, 8, 4), (5, 8)] + [(8,)] * 4 + [(5, 8), (2, 3)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors += [torch.tensor([4, -1]), torch.tensor([3])]
    options = [7, 1, 1e-5, 1e-5, 1.0, 0.5]
    names = (*NAMES, "index", "seed")
    save = native == "cpp"  # a GPU makes the bottleneck and y again, and does not look at it
    call_with_mutations(forward, [*tensors, *options, save], names, is_adapter)
    _, statistics, kept = forward(*tensors, *options, save)
    assert kept.shape == ((2, 3, 4 + 8) if save else (0,)) and kept.dtype == torch.float32
    saved = [kept] if save else []
    inputs = [torch.randn(2, 3, 8, generator=generator), *tensors, statistics, *saved, *options, 2**13 - 1]

    def legal(a):
        same = all(t.dtype == torch.float32 for t in (a[0], a[16], *a[17 : 17 + save])) and a[0].shape == a[1].shape
        fits = not save or a[17].shape == (*a[1].shape[:2], a[4].shape[1] + a[1].shape[-1])
        return same and fits and is_adapter(a[1:16]) and a[16].shape == (4, *a[1].shape[:2])

    kept_or_none = (lambda *a: backward(*a)) if save else (lambda *a: backward(*a[:17], None, *a[17:]))
    call_with_mutations(kept_or_none, inputs, ("dout", *names, "statistics", *["saved"] * save), legal)
    options.append(False)
    for place, wrong, message in ((15, 8, "skip is 8"), (16, 7, "activation is 7"), (20, 1.0, "dropout_p is 1")):
        with pytest.raises(RuntimeError, match=message):
            forward(*tensors, *options[: place - 15], wrong, *options[place - 14 :])
    for place, skip in ((1, 2), (7, 4)):
        with pytest.raises(RuntimeError, match=f"skip is {skip}"):
            forward(*tensors[:place], None, *tensors[place + 1 :], skip, *options[1:])
    with pytest.raises(RuntimeError, match="index is absent; a bank of adapters needs one"):
        forward(*tensors[:13], None, *tensors[14:], *options)
    if native == "cpp":  # on a GPU nobody waits to look: the row is NaN
        with pytest.raises(RuntimeError, match="index has the number 5; numbers must be in"):
            forward(*tensors[:13], torch.tensor([5, 0]), *tensors[14:], *options)
    with pytest.raises(RuntimeError, match="bit 1 is of an argument that is absent"):
        backward(*inputs[:2], None, *inputs[3:17], None, 1, *options[1:-1], 2)
    if not save:
        with pytest.raises(RuntimeError, match="save is true; on a GPU"):
            forward(*tensors, *options[:-1], True)
