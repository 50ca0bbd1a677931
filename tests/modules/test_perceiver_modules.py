"""Preprocessors, queries and postprocessors of Perceiver, each against its formula written once more."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from mmkernels import modules
from mmkernels.modules import positions, postprocessors, preprocessors

DOUBLE = {"dtype": torch.float64}


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- Preprocessors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, patch, channels", [((6,), (3,), 1), ((4, 6), (2, 3), 3), ((4, 2, 6), (2, 1, 3), 2)])
def test_patches(shape, patch, channels):
    """A token is a patch, its channels are in the order of the axes, the array's own last."""
    module = modules.GridInput(shape, channels, patch=patch)
    array = draw(2, *shape, channels)
    tokens, position = module(array.float())
    grid = [n // p for n, p in zip(shape, patch, strict=True)]
    assert position is None and tokens.shape == (2, math.prod(grid), math.prod(patch) * channels) == (
        2,
        module.size,
        module.channels,
    )
    for number, place in enumerate(itertools.product(*map(range, grid))):
        corner = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
        assert torch.equal(tokens[:, number], array.float()[(slice(None), *corner)].flatten(1))
    blocks = preprocessors.space_to_depth(array, patch)
    assert torch.equal(preprocessors.depth_to_space(blocks, patch), array)


def test_flat_arrays_and_arrays_of_one_channel():
    module = modules.GridInput((2, 4), 1, patch=(1, 2))
    array = torch.randn(3, 2, 4, 1)
    assert all(torch.equal(module(x)[0], module(array)[0]) for x in (array.flatten(1, 2), array[..., 0]))


def test_an_array_can_be_scaled_and_a_signal_scaled_back():
    """The content alone, not its positions; what comes out is in the units of what goes in."""
    fourier = {"kind": "fourier", "num_bands": 2}
    plain, scaled = (preprocessors.GridInput([8], 1, patch=[4], positions=fourier, scale=s) for s in (1.0, 4.0))
    samples = torch.randn(3, 8)
    (content, position), (larger, same) = plain(samples), scaled(samples)
    assert torch.equal(larger, 4 * content) and torch.equal(same, position)
    output = postprocessors.SampleOutput(4, scale=4.0)
    assert torch.equal(output(larger), samples)
    for kind, arguments in ((preprocessors.GridInput, ([8],)), (postprocessors.SampleOutput, (4,))):
        with pytest.raises(ValueError, match="scale is 0"):
            kind(*arguments, scale=0.0)


def test_positions_are_shared_and_projected():
    module = modules.GridInput((2, 3), 3, positions={"kind": "learned", "channels": 4, "projection": 5}, **DOUBLE)
    _, position = module(draw(7, 2, 3, 3))
    expected = module.positions.table @ module.positions.projection.weight.T + module.positions.projection.bias
    assert position.shape == (6, 5) and module.channels == 8
    torch.testing.assert_close(position, expected)
    added = modules.GridInput((2, 3), 3, positions={"kind": "learned", "channels": 3}, add_positions=True, **DOUBLE)
    tokens, position = added(draw(7, 2, 3, 3))
    assert position is None and added.channels == 3
    torch.testing.assert_close(tokens, draw(7, 2, 3, 3).flatten(1, 2) + added.positions.table)


@pytest.mark.parametrize("shape", [(9, 14), (7, 7), (224, 224), (8, 5), (1, 2)])
def test_conv_stem(shape):
    """SAME padding: ceil(n / 2) places, of n + k - 2 places needed the smaller half in front."""
    stem = modules.ConvStemInput(shape, 3, out_channels=2, **DOUBLE).eval()
    stem.norm.running_mean.normal_()
    stem.norm.running_var.uniform_(0.5, 2)
    picture = draw(1, *shape, 3)
    tokens, _ = stem(picture)

    def windows(array, size, fill):
        """(H, W, C) -> (h, w, C, size, size)."""
        pads = []
        for n in (array.shape[1], array.shape[0]):
            total = max((math.ceil(n / 2) - 1) * 2 + size - n, 0)
            pads += [total // 2, total - total // 2]
        array = F.pad(array, (0, 0, *pads), value=fill).unfold(0, size, 2).unfold(1, size, 2)
        return array

    x = torch.einsum("hwcij,ocij->hwo", windows(picture[0], 7, 0.0), stem.conv.weight)
    x = (x - stem.norm.running_mean) / (stem.norm.running_var + 1e-5).sqrt() * stem.norm.weight + stem.norm.bias
    x = windows(x.relu(), 3, float("-inf")).amax((-1, -2))
    assert stem.grid == x.shape[:2] == tuple(math.ceil(math.ceil(n / 2) / 2) for n in shape)
    torch.testing.assert_close(tokens[0], x.flatten(0, 1))


def test_conv_stem_trains_its_statistics():
    stem = modules.ConvStemInput((8, 8), out_channels=2)
    stem(torch.randn(4, 8, 8, 3) + 3)
    assert stem.norm.running_mean.abs().max() > 0 and stem.norm.momentum == 0.1
    assert stem.eval()(torch.zeros(4, 8, 8, 3))[0].shape == (4, 4, 2)


@pytest.mark.parametrize("shape, grid", [((224, 224), (55, 55)), ((31, 26), (7, 6))])
def test_conv_stem_of_huggingface(shape, grid):
    assert modules.ConvStemInput(shape, padding="huggingface").grid == grid


@pytest.mark.parametrize("side", [1, 3, 5])
def test_flow(side):
    """Channels of a neighbourhood are (row, column, rgb), the first frame's before the second's, zeros outside."""
    module = modules.FlowInput((3, 4), projection=6, neighbourhood=side, **DOUBLE)
    frames = draw(2, 2, 3, 4, 3)
    array = torch.zeros(2, 3, 4, 2, side, side, 3, dtype=torch.float64)
    for y, x, i, j in itertools.product(range(3), range(4), range(side), range(side)):
        row, column = y + i - side // 2, x + j - side // 2
        if 0 <= row < 3 and 0 <= column < 4:
            array[:, y, x, :, i, j] = frames[:, :, row, column]
    array = array.flatten(3).flatten(1, 2)
    expected = array @ module.linear.weight.T + module.linear.bias
    torch.testing.assert_close(module(frames)[0], expected)
    torch.testing.assert_close(module(preprocessors.neighbourhoods(frames, side))[0], expected)
    separate = modules.FlowInput((3, 4), projection=6, neighbourhood=side, frames="separate", **DOUBLE)
    tokens, _ = separate(frames)
    own = array.unflatten(-1, (2, -1)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(tokens, own @ separate.linear.weight.T + separate.linear.bias)


def test_points():
    module = modules.PointInput(2, num_bands=3, max_resolution=(8, 20))
    points = torch.rand(2, 5, 2) * 2 - 1
    tokens, _ = module(points)
    waves = [
        math.pi * f * points[..., i : i + 1] for i, mu in ((0, 8), (1, 20)) for f in torch.linspace(1, mu / 2, 3).tolist()
    ]
    expected = torch.cat([points, *[w.sin() for w in waves], *[w.cos() for w in waves]], -1)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert tokens.shape[-1] == module.channels


def multimodal(**options):
    parts = {
        "b": {"kind": "grid", "shape": [3], "channels": 2, "positions": {"kind": "fourier", "num_bands": 1}},
        "a": {"kind": "vector", "channels": 4},
    }
    return modules.MultimodalInput(parts, padding=3, **options, **DOUBLE)


def test_modalities_are_padded_and_concatenated():
    module = multimodal(mask_probs={"b": 0.5})
    inputs = {"a": draw(2, 4), "b": draw(2, 3, 2)}
    mask = torch.tensor([[True, False, False], [False, True, True]])
    leaves = [*module.parameters(), *(t.requires_grad_() for t in inputs.values())]
    tokens, position = module(inputs, masks={"b": mask})
    a = torch.cat([inputs["a"][:, None], module.padding["a"].expand(2, 1, -1)], -1)
    b = torch.cat(
        [inputs["b"], module.modalities["b"].positions().expand(2, -1, -1), module.padding["b"].expand(2, 3, -1)], -1
    )
    b = torch.where(mask[..., None], module.mask_tokens["b"], b)
    expected = torch.cat([a, b], 1)
    assert position is None and module.channels == 8 and torch.equal(tokens, expected)
    weights = draw(*tokens.shape)
    actual, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (tokens, expected))
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda x, y: module({"a": x, "b": y}, masks={"b": mask})[0], tuple(inputs.values()))


def test_masks_are_drawn():
    torch.manual_seed(0)
    module = multimodal(mask_probs={"b": 0.25})
    inputs = {"a": draw(1, 4).expand(4000, -1), "b": draw(1, 3, 2).expand(4000, -1, -1)}
    masked = (module(inputs)[0][:, 1:] == module.mask_tokens["b"]).all(-1).double()
    assert abs(float(masked.mean()) - 0.25) < 4 * (0.25 * 0.75 / 12000) ** 0.5
    module.mask_probs["b"] = 1.0
    assert (module(inputs)[0][:, 1:] == module.mask_tokens["b"]).all()
    module.mask_probs["b"] = 0.0
    assert not (module(inputs)[0][:, 1:] == module.mask_tokens["b"]).all(-1).any()


def test_parts_of_other_dtypes():
    parts = [
        (
            torch.ones(2, 1, 3, dtype=torch.bfloat16, requires_grad=True),
            None,
            torch.ones(1, 1, requires_grad=True),
            None,
            None,
        ),
        (torch.ones(2, 2, 2), torch.ones(2, 2), torch.ones(1, 0), None, None),
    ]
    out = preprocessors.join(parts)
    assert out.dtype == torch.float32 and torch.equal(out, torch.ones(2, 3, 4))
    out.sum().backward()
    assert parts[0][0].grad.dtype == torch.bfloat16 and float(parts[0][2].grad) == 2


# --- Positions and queries ---------------------------------------------------------------------------------------------------


def test_points_of_a_grid():
    """-1 + 2 i / n per axis, row-major."""
    shape = (2, 3, 5)
    numbers = torch.tensor([0, 29, 7, 16])
    expected = [
        [-1 + 2 * i / n for i, n in zip(place, shape, strict=True)] for place in ((0, 0, 0), (1, 2, 4), (0, 1, 2), (1, 0, 1))
    ]
    assert torch.equal(positions.index_coordinates(numbers, shape), torch.tensor(expected, dtype=torch.float64))


def test_released_rounding():
    """A few units in the last place beside the rounded coordinates, and equal where those are exact."""
    for n in (1, 2, 3, 5, 9, 17, 6, 7, 224, 496, 1920):
        plain, released = positions._axis(n), positions._released_axis(n)
        assert released.shape == plain.shape and (released - plain).abs().max() <= 2**-22
        assert n not in (1, 2, 3, 5, 9, 17) or torch.equal(released, plain)
    made = positions.ReleasedFourierPositions((7, 4), 2, **DOUBLE)()
    assert torch.equal(made.view(7, 4, -1)[:, 0, 0], positions._released_axis(7).double())
    assert not torch.equal(made, modules.FourierPositions((7, 4), 2, **DOUBLE)())


def test_fourier_queries():
    latents = torch.zeros(2, 3, 4)
    queries = modules.FourierQueries((3, 4), 2, (9, 9))
    every, none = queries(latents)
    assert none is None and not list(queries.buffers())
    assert torch.equal(every[0], modules.FourierPositions((3, 4), 2, (9, 9))())
    some, _ = queries(latents, points=torch.tensor([5]))
    expected = positions.fourier_features(torch.tensor([[-1 + 2 / 3, -1 + 2 / 4]], dtype=torch.float64), 2, (9, 9))
    assert torch.equal(some[0], expected.float())
    with pytest.raises(IndexError, match=r"points has numbers from 12 to 12; they must be in \[0, 12\)"):
        queries(latents, points=torch.tensor([12]))
    with pytest.raises(TypeError, match="points has dtype torch.float32"):
        queries(latents, points=torch.ones(1))


def test_queries_of_an_input():
    tokens, position = torch.randn(2, 6, 3), torch.randn(6, 2)
    every = modules.InputQueries(5)(None, tokens=tokens, position=position)
    assert torch.equal(every[0], tokens) and torch.equal(every[1], position)
    first = modules.InputQueries(5, count=2)(None, tokens=tokens, position=position)
    assert torch.equal(first[0], tokens[:, :2]) and torch.equal(first[1], position[:2])


# --- Encoder and decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
def test_decoder(residual):
    """Queries in two parts are those of the parts side by side."""
    torch.manual_seed(0)
    options = {"num_heads": 2, "qk_channels": 4, "v_channels": 6, "residual": residual, "backend": "reference", **DOUBLE}
    decoder = modules.PerceiverDecoder(7, 8, output_channels=3, **options)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    latents, queries, position = draw(2, 5, 8), draw(2, 9, 4), draw(9, 3)
    whole = torch.cat([queries, position.expand(2, -1, -1)], -1)
    y = decoder.cross.attention(whole, latents)
    y = y + whole if residual else y
    expected = decoder.output(y + decoder.cross.mlp(decoder.cross.norm(y)))
    torch.testing.assert_close(decoder(latents, queries, query_position=position), expected)
    one = decoder(latents, queries[:1], query_position=position)
    torch.testing.assert_close(one, decoder(latents, queries[:1].expand(2, -1, -1), query_position=position))


def test_heads_wider_than_any_kernel_takes():
    """A query for a class reads latents of 1280 channels with one head, as Hugging Face's text classifier does."""
    torch.manual_seed(0)
    decoder = modules.PerceiverDecoder(16, 1280, output_channels=3)
    latents, queries = torch.randn(2, 9, 1280), torch.randn(1, 1, 16)
    output = decoder(latents, queries)
    output.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents, queries), output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(modules.set_backend(decoder, "eager")(latents, queries), output, rtol=1e-4, atol=1e-4)


def test_exact_and_tanh_gelu():
    from mmkernels.modules.perceiver import Mlp

    x = draw(3, 4)
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        mlp = Mlp(4, 2, activation, **DOUBLE)
        assert torch.equal(mlp(x), mlp[2](F.gelu(mlp[0](x), approximate=approximate)))


def test_encoder_alone_is_ready():
    encoder = modules.PerceiverEncoder(5, num_latents=3, latent_channels=8, num_blocks=1, layers_per_block=1)
    assert 0 < encoder.latents.abs().max() <= 0.04
    assert encoder(torch.randn(2, 6, 5)).isfinite().all()
    with pytest.raises(ValueError, match="num_blocks is 3; it must be a multiple of num_cross_attends, 2"):
        modules.PerceiverEncoder(5, num_cross_attends=2, num_blocks=3)
    with pytest.raises(ValueError, match="dropout is 2"):
        modules.PerceiverEncoder(5, dropout=2)


# --- Postprocessors ----------------------------------------------------------------------------------------------------------


def test_upsampled_flow():
    """Every fine pixel is a weighted mean of the nine coarse flows around its own, in fine pixels."""
    up, height, width = 2, 3, 2
    module = modules.FlowOutput((up * height, up * width), scale=10.0, upsample=up)
    outputs = draw(1, height * width, module.channels)
    flow = module(outputs)
    assert flow.shape == (1, 6, 4, 2)
    for y, x, i, j in itertools.product(range(height), range(width), range(up), range(up)):
        weights = outputs[0, y * width + x, 2:].view(9, up, up)[:, i, j].softmax(0)
        expected = torch.zeros(2, dtype=torch.float64)
        for k, (row, column) in enumerate(itertools.product(range(y - 1, y + 2), range(x - 1, x + 2))):
            if 0 <= row < height and 0 <= column < width:
                expected += weights[k] * outputs[0, row * width + column, :2] / 10 * up
        torch.testing.assert_close(flow[0, up * y + i, up * x + j], expected)


def test_heads_of_tasks():
    module = modules.TaskOutput({"a": 2, "b": 3}, 4, **DOUBLE)
    outputs = draw(5, 2, 4)
    head = module.heads["b"]
    torch.testing.assert_close(module(outputs)["b"], head[2](torch.tanh(head[0](outputs[:, 1]))))
    assert module.numbers(["b", "a"]) == [1, 0]


def test_tied_logits():
    module, table = modules.TokenOutput(7, **DOUBLE), draw(7, 4)
    torch.nn.init.normal_(module.bias)
    torch.testing.assert_close(module(draw(2, 3, 4), table), draw(2, 3, 4) @ table.T + module.bias)


@pytest.mark.parametrize("share", ["after_first", "none"])
def test_an_input_in_chunks_is_that_input(share):
    """Also where it is read again for every cross-attend, with gradients of what the chunks are computed from."""
    torch.manual_seed(0)
    encoder = modules.PerceiverEncoder(
        6, num_latents=4, latent_channels=8, num_cross_attends=3, num_blocks=3, layers_per_block=1, share_cross=share
    ).double()
    layer = torch.nn.Linear(3, 4).double()
    x, position = torch.randn(2, 11, 3, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)

    def chunks():
        for part, place in zip(x.split(4, 1), position.split(4), strict=True):
            yield layer(part), place

    whole = encoder(layer(x), position=position)
    parts = encoder.stream(chunks, parameters=layer.parameters())
    torch.testing.assert_close(parts, whole)
    cotangent, wanted = torch.randn_like(whole), [*encoder.parameters(), *layer.parameters()]
    for ours, expected in zip(*(torch.autograd.grad(z, wanted, cotangent) for z in (parts, whole)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_attention_dropout():
    encoder = modules.PerceiverEncoder(5, num_latents=3, latent_channels=8, attention_dropout=0.5, num_blocks=1)
    decoder = modules.PerceiverDecoder(6, 8, attention_dropout=0.5)
    x, queries = torch.randn(2, 40, 5), torch.randn(1, 7, 6)
    for block in (*encoder.cross, *encoder.blocks[0], decoder.cross):
        assert block.attention.dropout == 0.5
    trained = [decoder(encoder(x), queries) for _ in range(2)]
    assert not torch.equal(*trained)
    encoder.eval(), decoder.eval()
    assert torch.equal(*(decoder(encoder(x), queries) for _ in range(2)))
