"""What only a GPU can show; the contracts themselves run there by the `backend` fixture's entries marked `gpu`."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import attention, hypergrid_linear, latent_attention

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "cuda")
each_backend = pytest.mark.parametrize("name", BACKENDS)
each_family = pytest.mark.parametrize("family", ("attention", "latent"))


def make(generator, family, dtype=torch.bfloat16, batch=2, queries=512, keys=5003):
    """Arguments of a size that fills the multiprocessors: tiles, splits and pipelines run side by side and many times over."""
    if family == "attention":
        sizes = {"q": (batch, 4, queries, 64), "k": (batch, 4, keys, 64), "v": (batch, 4, keys, 40), "bias": (1, 4, 1, keys)}
    else:
        sizes = {"q": (1, queries, 261), "x": (batch, keys, 3), "position": (keys, 258), "w_k": (261, 261), "w_v": (64, 261)}
        sizes |= {"norm_weight": (261,), "norm_bias": (261,), "b_v": (64,)}
    gain = {"w_k": 261**-0.5, "w_v": 261**-0.5}
    return {n: (gain.get(n, 1.0) * torch.randn(s, generator=generator)).to(dtype) for n, s in sizes.items()}


def parts(family):
    return (
        (attention, testing.eager_attention) if family == "attention" else (latent_attention, testing.eager_latent_attention)
    )


def cotangent(generator, family, tensors):
    rows, last = tensors["q"].shape[:-1], tensors["v" if family == "attention" else "w_v"]
    shape = (*rows, last.shape[-1]) if family == "attention" else (tensors["x"].shape[0], rows[1], last.shape[0])
    return torch.randn(shape, generator=generator).to(tensors["q"].dtype)


@each_backend
@each_family
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_full_size_matches_float64_with_the_same_bits_every_time(generator, name, family, dtype):
    """Races between warps, asynchronous copies and blocks that share a multiprocessor show here or nowhere."""
    (op, eager), tensors = parts(family), make(generator, family, dtype)
    mask = torch.rand(2, 5003, generator=generator) < 0.8
    grad, wanted = cotangent(generator, family, tensors), tuple(tensors)
    first = testing.check_op(op, eager, tensors, wanted, name, grad, key_mask=mask)
    for _ in range(20):
        again = testing.run(op, tensors, wanted, grad, backend=name, key_mask=mask)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in wanted)


@each_backend
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("length", (512, 62, 1))
def test_full_size_hypergrid_matches_float64_with_the_same_bits_every_time(generator, name, length, dtype):
    """Clusters, their multicast copies and their barriers show what they really do here alone."""
    sizes = {"x": (24, length, 3072), "weight": (768, 3072), "bias": (768,)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in sizes.items()}
    tensors["gate"] = torch.rand(24, 32, 32, generator=generator)
    tensors["weight"] *= 3072**-0.5
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    grad, wanted = torch.randn(24, length, 768, generator=generator).to(dtype), tuple(tensors)
    options = dict(activation="relu", residual=True)
    first = testing.check_op(hypergrid_linear, testing.eager_hypergrid_linear, tensors, wanted, name, grad, **options)
    for _ in range(20):
        again = testing.run(hypergrid_linear, tensors, wanted, grad, backend=name, **options)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in wanted)


@each_backend
@each_family
def test_a_cuda_graph_replays_forward_and_backward(generator, name, family):
    op, tensors = parts(family)[0], make(generator, family)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    grad = cotangent(generator, family, tensors)

    def step():
        out = op(**tensors, backend=name)
        return out, *torch.autograd.grad(out, list(tensors.values()), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and loaded before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(tensor.roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@each_backend
@each_family
def test_the_current_stream_is_the_one_that_works(generator, name, family):
    """On another stream, behind work that writes the inputs: a kernel on the default stream would read them too early."""
    op, tensors = parts(family)[0], make(generator, family)
    expected = op(**tensors, backend=name)
    key = "v" if family == "attention" else "x"
    late, stream = torch.full_like(tensors[key], float("nan")), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(tensors[key])
        out = op(**{**tensors, key: late}, backend=name)
    stream.synchronize()
    assert torch.equal(out, expected)


@each_backend
@each_family
def test_offsets_beyond_two_to_the_31(generator, name, family):
    """Examples further apart than 32 bits reach, forward and backward: the values are those of the dense tensor."""
    op, tensors = parts(family)[0], make(generator, family, queries=33, keys=70)
    key, span = "k" if family == "attention" else "x", 2**31 + 64
    near = tensors[key]
    buffer = torch.full((span + near[0].numel(),), float("nan"), dtype=near.dtype)
    far = buffer.as_strided(near.shape, (span, *near.stride()[1:])).copy_(near)
    names, grad = tuple(n for n in tensors if n != key), cotangent(generator, family, tensors)
    ours, expected = (testing.run(op, {**tensors, key: t}, names, grad, backend=name) for t in (far, near))
    assert torch.equal(ours.output, expected.output)
    assert all(torch.equal(ours.gradients[n], expected.gradients[n]) for n in names)


@each_backend
def test_memory_of_a_training_step_does_not_grow_with_the_input(generator, name):
    """latent_attention with a raw input: what is allocated beyond the inputs is of the queries' size and the splits'."""

    def allocated(keys):
        tensors = make(generator, "latent", batch=1, queries=128, keys=keys)
        wanted = tuple(n for n in tensors if n not in ("x", "position"))
        tensors = {n: t.requires_grad_() if n in wanted else t for n, t in tensors.items()}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        latent_attention(**tensors, backend=name).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    allocated(1000)
    assert allocated(400_000) <= allocated(100_000) + 2**20


@each_family
def test_compiled_by_inductor(generator, family):
    op, tensors = parts(family)[0], make(generator, family, queries=65, keys=130)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}

    def model(tensors):
        return op(**{n: t * 1.5 for n, t in tensors.items()}, backend="triton").relu()

    torch._dynamo.reset()
    expected, actual = model(tensors), torch.compile(model, fullgraph=True)(tensors)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(o.float().square().sum(), list(tensors.values())) for o in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_what_auto_takes(generator):
    bfloat16, float32 = (make(generator, "latent", dtype, keys=70) for dtype in (torch.bfloat16, torch.float32))
    assert mmkernels.explain("latent_attention", **bfloat16).backend == "triton"
    hopper = torch.cuda.get_device_capability()[0] == 9
    absorbed = {n: t for n, t in make(generator, "latent").items() if n != "b_v"}
    absorbed["w_v"] = absorbed["w_k"]
    assert "values: raw_input" in mmkernels.explain("latent_attention", **absorbed).detail
    assert mmkernels.explain("latent_attention", **absorbed).backend == ("cuda" if hopper else "triton")
    assert mmkernels.explain("latent_attention", **float32).backend == "cuda"
    plain = {n: t for n, t in make(generator, "attention", keys=70).items() if n != "bias"}
    assert mmkernels.explain("attention", **plain).backend == "triton"
    plain["v"] = plain["k"]
    assert mmkernels.explain("attention", **plain).backend == "sdpa"
    cpu = {n: t.cpu() for n, t in float32.items()}
    assert mmkernels.explain("latent_attention", **cpu).refusals["cuda"]
