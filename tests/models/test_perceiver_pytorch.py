"""Encoder and decoder against `perceiver-pytorch`, a variant of the paper's, where the two are made to compute the same.

That library has no biases of queries, keys and values, exact GELU, and a gated MLP: with half of its first layer constant one
the gate is all that is left. Its position features and its norm in front of the head are others; arrays come as they are.
"""

import pytest
import torch

from mmkernels.modules import PerceiverDecoder, PerceiverEncoder

perceiver_pytorch = pytest.importorskip("perceiver_pytorch")

SIZES = {"num_latents": 6, "latent_dim": 16, "cross_heads": 2, "latent_heads": 4, "cross_dim_head": 5, "latent_dim_head": 3}
OURS = {"activation": "gelu", "backend": "reference", "dtype": torch.float64}
ENCODER = {
    "num_latents": 6,
    "latent_channels": 16,
    "cross_heads": 2,
    "self_heads": 4,
    "cross_qk_channels": 10,
    "self_qk_channels": 12,
    "cross_widening": 4,
    "self_widening": 4,
    **OURS,
}


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for module in model.modules():
        if type(module).__name__ == "FeedForward":
            value = module.net[0].out_features // 2
            with torch.no_grad():
                module.net[0].weight[:value] = 0
                module.net[0].bias[:value] = 1
    return model.double().eval()


def copy_block(block, attention, mlp):
    """Their pre-norms of an attention and an MLP -> our block."""
    ours, theirs = block.attention, attention.fn
    key, value = theirs.to_kv.weight.chunk(2)
    pairs = [(ours.query, theirs.to_q.weight, None), (ours.key, key, None), (ours.value, value, None)]
    pairs += [(ours.output, theirs.to_out.weight, theirs.to_out.bias), (block.norm, mlp.norm.weight, mlp.norm.bias)]
    first, last = mlp.fn.net[0], mlp.fn.net[2]
    half = first.out_features // 2
    pairs += [(block.mlp[0], first.weight[half:], first.bias[half:]), (block.mlp[2], last.weight, last.bias)]
    if attention.norm_context is None:
        pairs += [(ours.norm, attention.norm.weight, attention.norm.bias)]
    else:
        pairs += [(ours.query_norm, attention.norm.weight, attention.norm.bias)]
        pairs += [(ours.input_norm, attention.norm_context.weight, attention.norm_context.bias)]
    with torch.no_grad():
        for module, weight, bias in pairs:
            module.weight.copy_(weight)
            module.bias.copy_(torch.zeros_like(module.bias) if bias is None else bias)


@pytest.mark.parametrize("masked", [False, True])
def test_perceiver(masked):
    """Three cross-attends, nothing shared."""
    theirs = randomised(
        perceiver_pytorch.Perceiver(
            num_freq_bands=1,
            max_freq=2,
            depth=3,
            input_channels=7,
            input_axis=1,
            self_per_cross_attn=2,
            fourier_encode_data=False,
            **SIZES,
        )
    )
    ours = PerceiverEncoder(
        7, num_cross_attends=3, num_blocks=3, layers_per_block=2, share_cross="none", share_blocks=False, **ENCODER
    )
    with torch.no_grad():
        ours.latents.copy_(theirs.latents)
    for i, block in enumerate(theirs.layers):
        copy_block(ours.cross[i], block.cross_attn, block.cross_ff)
        for layer, parts in zip(ours.blocks[i], block.self_attns, strict=True):
            copy_block(layer, *parts)
    inputs = torch.randn(2, 11, 7, dtype=torch.float64)
    mask = torch.rand(2, 11) < 0.6 if masked else None
    expected = theirs(inputs, mask=mask, return_embeddings=True)
    torch.testing.assert_close(ours(inputs, key_mask=mask), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_perceiver_io(masked):
    """One cross-attend, one layer three times, and a decoder without the residual of its queries."""
    theirs = randomised(
        perceiver_pytorch.PerceiverIO(
            depth=3, dim=7, queries_dim=9, logits_dim=4, weight_tie_layers=True, decoder_ff=True, **SIZES
        )
    )
    encoder = PerceiverEncoder(7, num_blocks=3, layers_per_block=1, **ENCODER)
    decoder = PerceiverDecoder(9, 16, output_channels=4, num_heads=2, qk_channels=10, widening=4, **OURS)
    with torch.no_grad():
        encoder.latents.copy_(theirs.latents)
        decoder.output.load_state_dict(theirs.to_logits.state_dict())
    copy_block(encoder.cross[0], theirs.cross_attend_block.cross_attn, theirs.cross_attend_block.cross_ff)
    copy_block(encoder.blocks[0][0], *theirs.layers[0].self_attns[0])
    copy_block(decoder.cross, theirs.decoder_cross_attn, theirs.decoder_ff)
    inputs, queries = torch.randn(2, 11, 7, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    mask = torch.rand(2, 11) < 0.6 if masked else None
    expected = theirs(inputs, mask=mask, queries=queries)
    torch.testing.assert_close(decoder(encoder(inputs, key_mask=mask), queries[None]), expected)
