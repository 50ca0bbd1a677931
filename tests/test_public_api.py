"""The public names and their signatures. They may grow; what is here does not change."""

import inspect
import threading

import pytest
import torch

import mmkernels
from mmkernels import models, modules, ops
from mmkernels.models import adapterhub, ca_mtl, hypergrid_t5, mbt, perceiver, perceiver_io

SIGNATURES = {
    ops.adapter: "(x, w_down, b_down, w_up, b_up, *, input_residual=None, residual=None, skip=False, norm_weight=None, "
    "norm_bias=None, eps=1e-05, activation='relu', scale=1.0, gate=None, index=None, out_norm_weight=None, "
    "out_norm_bias=None, out_eps=None, dropout_p=0.0, dropout_seed=None, backend='auto')",
    ops.adapter_fusion: "(query, outputs, w_q, b_q, w_k, b_k, w_v, *, input_residual=None, residual=None, temperature=1.0, "
    "dropout_p=0.0, dropout_seed=None, return_weights=False, backend='auto')",
    ops.attention: "(q, k, v, *, key_mask=None, bias=None, scale=None, dropout_p=0.0, dropout_seed=None, return_lse=False, "
    "backend='auto')",
    ops.bias_gelu: "(x, bias=None, *, approximate='tanh', backend='auto')",
    ops.bottleneck_attention: "(tokens_qkv, bottleneck_qkv, *, key_masks=None, scale=None, query_rows='all', backend='auto')",
    ops.film_layer_norm: "(x, gain, bias, *, residual=None, residual_bias=None, index=None, eps=1e-05, backend='auto')",
    ops.latent_attention: "(q, x, w_k, w_v, *, num_heads=1, norm_weight=None, norm_bias=None, eps=1e-05, b_k=None, b_v=None, "
    "position=None, key_mask=None, scale=None, dropout_p=0.0, dropout_seed=None, backend='auto')",
    ops.latent_attention_sharded: "(q, x, w_k, w_v, *, num_heads=1, norm_weight=None, norm_bias=None, eps=1e-05, b_k=None, "
    "b_v=None, position=None, key_mask=None, scale=None, dropout_p=0.0, dropout_seed=None, group=None, backend='auto')",
    ops.latent_attention_stream: "(q, chunks, w_k, w_v, *, num_heads=1, norm_weight=None, norm_bias=None, eps=1e-05, "
    "b_k=None, b_v=None, scale=None, dropout_p=0.0, dropout_seed=None, parameters=(), backend='auto')",
    ops.LatentState: "(q, w_k, w_v, *, num_heads=1, norm_weight=None, norm_bias=None, eps=1e-05, b_k=None, b_v=None, "
    "scale=None, backend='auto')",
    ops.LatentState.update: "(self, chunk, position=None, key_mask=None)",
    ops.LatentState.merge: "(self, other)",
    ops.LatentState.result: "(self)",
    ops.latent_decode: "(queries, k, v, w_q, w_o, *, num_heads=1, norm_weight=None, norm_bias=None, eps=1e-05, b_q=None, "
    "b_o=None, position=None, query_mask=None, key_mask=None, scale=None, backend='auto')",
    ops.linear: "(x, weight, bias=None, *, backend='auto')",
    mmkernels.explain: "(op_name, *args, **kwargs)",
    mmkernels.use_backend: "(name)",
    modules.LatentCrossAttention: "(query_channels, input_channels, *, num_heads=1, qk_channels=None, v_channels=None, "
    "output_channels=None, shape_for_attention='kv', eps=1e-05, dropout=0.0, backend='auto', device=None, dtype=None)",
    modules.LatentCrossAttention.forward: "(self, queries, inputs, *, position=None, key_mask=None, query_position=None, "
    "query_mask=None, group=None)",
    modules.LatentCrossAttention.stream: "(self, queries, chunks, *, parameters=(), query_position=None, query_mask=None)",
    modules.LatentSelfAttention: "(channels, *, num_heads=8, qk_channels=None, v_channels=None, output_channels=None, "
    "eps=1e-05, dropout=0.0, backend='auto', device=None, dtype=None)",
    modules.LatentSelfAttention.forward: "(self, latents, *, key_mask=None)",
    modules.BottleneckFusionLayer: "(modalities, channels, *, update='mean', **options)",
    modules.BottleneckFusionLayer.forward: "(self, tokens, bottleneck=None, *, key_masks=None, rows='all')",
    modules.MultimodalEncoder: "(modalities, channels, num_layers, *, fusion_layer=0, fusion='bottleneck', update='mean', "
    "num_bottlenecks=4, test_with_bottlenecks=True, num_heads=12, mlp_channels=None, share_weights=False, dropout=0.0, "
    "stochastic_depth=0.0, eps=1e-06, backend='auto', device=None, dtype=None)",
    modules.MultimodalEncoder.forward: "(self, tokens, *, key_masks=None, rows='all')",
    modules.HyperGridLinear: "(in_features, out_features, grid, *, state_features=None, variant='L2', residual=False, "
    "bias=True, activation=None, dropout=0.0, backend='auto', device=None, dtype=None)",
    modules.HyperGridLinear.forward: "(self, x, state=None, *, gate=None, gate_index=None)",
    modules.HyperGridLinear.from_linear: "(linear, grid, **options)",
    modules.HyperGridLinear.gate: "(self, state=None)",
    modules.FourierPositions: "(index_shape, num_bands, max_resolution=None, *, device=None, dtype=None)",
    modules.FourierPositions.forward: "(self)",
    modules.FiLM: "(task_channels, channels, *, device=None, dtype=None)",
    modules.FiLM.forward: "(self, x, tasks, index=None)",
    modules.ConditionalLayerNorm: "(channels, task_channels, *, eps=1e-12, backend='auto', device=None, dtype=None)",
    modules.ConditionalLayerNorm.forward: "(self, x, tasks, index=None, *, branch=None, branch_bias=None, modulation=None)",
    modules.ConditionalAlignment: "(channels, task_channels, *, eps=1e-12, dropout=0.0, backend='auto', device=None, "
    "dtype=None)",
    modules.ConditionalAlignment.forward: "(self, x, tasks, index=None, *, branch=None)",
    modules.ConditionalAttention: "(channels, task_channels, length, block, *, num_heads, dropout=0.0, backend='auto', "
    "device=None, dtype=None)",
    modules.ConditionalAttention.forward: "(self, x, tasks, index=None, *, key_mask=None)",
    modules.ConditionalBottleneck: "(channels, task_channels, bottleneck=None, *, device=None, dtype=None)",
    modules.ConditionalBottleneck.forward: "(self, x, tasks, index=None)",
    modules.PerceiverResampler: "(channels, *, num_latents=64, depth=6, num_heads=8, head_dim=64, kv_heads=None, "
    "mlp_channels=None, activation='gelu', gated=False, norm='layer', bias=False, input_channels=None, output_channels=None, "
    "max_length=None, max_frames=None, max_media=None, eps=1e-05, dropout=0.0, backend='auto', device=None, dtype=None)",
    modules.PerceiverResampler.forward: "(self, context, *, key_mask=None)",
    modules.PerceiverResampler.from_idefics2: "(source, config=None, **options)",
    modules.PerceiverResampler.from_ip_adapter: "(state_dict, *, head_dim=64, **options)",
    modules.PerceiverResampler.from_flamingo: "(state_dict, *, head_dim=64, **options)",
    modules.set_backend: "(model, backend)",
    ca_mtl.CAMTL.forward: "(self, input_ids, task_id, *, attention_mask=None, token_type_ids=None, labels=None)",
    ca_mtl.CAMTL.encode: "(self, input_ids, task_id, *, attention_mask=None, token_type_ids=None)",
    ca_mtl.CAMTL.freeze: "(self, first, last)",
    ca_mtl.CAMTL.save_pretrained: "(self, path)",
    ca_mtl.from_official: "(config, state_dict, *, backend='auto')",
    ca_mtl.from_bert: "(config, state_dict, *, variant='base', backend='auto', **tasks)",
    models.load: "(name_or_path, *, device=None, dtype=None, **overrides)",
    hypergrid_t5.HyperGridT5.forward: "(self, input_ids, *, attention_mask=None, labels=None, decoder_input_ids=None, "
    "decoder_attention_mask=None, local_state=None)",
    hypergrid_t5.HyperGridT5.generate: "(self, input_ids, *, attention_mask=None, local_state=None, max_new_tokens=64, "
    "num_beams=1, length_penalty=1.0, early_stopping=False)",
    hypergrid_t5.HyperGridT5.encode: "(self, input_ids, *, attention_mask=None, local_state=None)",
    hypergrid_t5.HyperGridT5.save_pretrained: "(self, path)",
    hypergrid_t5.from_official: "(config, state_dict, *, grid=None, variant='L2', residual=True, backend='auto')",
    hypergrid_t5.add_grids: "(model, grid, *, variant='L2', residual=True)",
    mbt.MBT.forward: "(self, inputs, *, key_masks=None)",
    mbt.MBT.save_pretrained: "(self, path)",
    mbt.from_official: "(config, state_dict, *, backend='auto')",
    mbt.from_vit: "(config, state_dict, *, inflation='central_frame', positions='resize_tile', "
    "bottleneck_from_positions=True, device=None, dtype=None)",
    mmkernels.convert: "(model, filter_fn=None)",
    modules.Adapter: "(channels, config='seq_bn', *, bottleneck=None, backend='auto', device=None, dtype=None)",
    modules.Adapter.forward: "(self, hidden, residual=None, norm=None, *, last=True)",
    modules.AdapterBank: "(adapters=None, *, backend='auto')",
    modules.AdapterBank.forward: "(self, hidden, residual=None, norm=None, *, index, names=None, last=True)",
    modules.AdapterFusion: "(channels, config='dynamic', *, dropout=0.0, backend='auto', device=None, dtype=None)",
    modules.AdapterFusion.forward: "(self, query, outputs, residual)",
    modules.InvertibleAdapter: "(channels, kind='nice', *, activation='relu', reduction_factor=2, "
    "backend='auto', device=None, dtype=None)",
    modules.InvertibleAdapter.forward: "(self, x, *, inverse=False)",
    modules.PHMAdapter: "(channels, config='compacter', *, bottleneck=None, shared=None, backend='auto', "
    "device=None, dtype=None)",
    modules.Average: "(*children, weights=None, normalize_weights=True)",
    modules.BatchSplit: "(*children, batch_sizes)",
    modules.Fuse: "(*children, name=None)",
    modules.Split: "(*children, splits)",
    adapterhub.AdapterHub: "(model, *, compat=None, backend='auto')",
    adapterhub.AdapterHub.add_adapter: "(self, name, config='seq_bn', *, set_active=False, **changes)",
    adapterhub.AdapterHub.delete_adapter: "(self, name)",
    adapterhub.AdapterHub.add_adapter_fusion: "(self, names, config='dynamic', *, name=None, set_active=False)",
    adapterhub.AdapterHub.add_head: "(self, name, head_type='classification', **options)",
    adapterhub.AdapterHub.set_active: "(self, setup, *, skip_layers=())",
    adapterhub.AdapterHub.train_adapter: "(self, setup, *, train_embeddings=False)",
    adapterhub.AdapterHub.train_adapter_fusion: "(self, setup, *, unfreeze_adapters=False)",
    adapterhub.AdapterHub.save_adapter: "(self, name, folder, *, with_head=True, safetensors=False)",
    adapterhub.AdapterHub.load_adapter: "(self, folder, *, load_as=None, leave_out=(), with_head=True, set_active=False)",
    adapterhub.AdapterHub.save_adapter_fusion: "(self, name, folder, *, safetensors=False)",
    adapterhub.AdapterHub.load_adapter_fusion: "(self, folder, *, load_as=None, set_active=False)",
    adapterhub.AdapterHub.save_head: "(self, folder, name=None, *, safetensors=False)",
    adapterhub.AdapterHub.load_head: "(self, folder, *, load_as=None)",
    adapterhub.AdapterHub.save_setup: "(self, setup, folder, *, safetensors=False)",
    adapterhub.AdapterHub.load_setup: "(self, folder, *, set_active=True)",
    perceiver.from_official: "(config, state_dict, *, backend='auto')",
    perceiver.Perceiver.save_pretrained: "(self, path)",
    perceiver_io.from_official: "(config, state_dict, *, backend='auto')",
    perceiver_io.from_huggingface: "(config, state_dict, *, kind=None, image_shape=None, backend='auto')",
    perceiver_io.to_huggingface: "(model)",
    perceiver_io.PerceiverIO: "(config, *, device=None, dtype=None)",
    perceiver_io.PerceiverIO.forward: "(self, inputs, *, key_mask=None, query_mask=None, points=None, tasks=None, masks=None)",
    perceiver_io.PerceiverIO.encode: "(self, inputs, *, key_mask=None, masks=None)",
    perceiver_io.PerceiverIO.decode: "(self, latents, *, tokens=None, position=None, query_mask=None, points=None, "
    "tasks=None)",
    perceiver_io.PerceiverIO.reconstruct: "(self, inputs, *, chunk_size=16384, key_mask=None, masks=None, progress=None)",
    perceiver_io.PerceiverIO.save_pretrained: "(self, path)",
    modules.PerceiverEncoder.forward: "(self, inputs, *, position=None, key_mask=None, group=None)",
    modules.PerceiverEncoder.stream: "(self, chunks, *, parameters=())",
    modules.PerceiverDecoder.forward: "(self, latents, queries, *, query_position=None, query_mask=None)",
}


def without_annotations(function) -> str:
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature(function):
    assert without_annotations(function) == SIGNATURES[function]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (mmkernels, {"BackendError", "convert", "explain", "models", "modules", "ops", "testing", "train", "use_backend"}),
        (
            ops,
            {
                "BlockDiagonalBias",
                "LatentState",
                "adapter",
                "attention",
                "bias_gelu",
                "bottleneck_attention",
                "film_layer_norm",
                "latent_attention",
                "latent_attention_sharded",
                "latent_attention_stream",
                "latent_decode",
                "linear",
            },
        ),
        (
            modules,
            {
                "Adapter",
                "AdapterBank",
                "AdapterFusion",
                "Average",
                "BatchSplit",
                "BottleneckFusionLayer",
                "ConditionalAlignment",
                "ConditionalAttention",
                "ConditionalBottleneck",
                "ConditionalLayerNorm",
                "FiLM",
                "Fuse",
                "InvertibleAdapter",
                "MultiTask",
                "PHMAdapter",
                "Parallel",
                "Split",
                "Stack",
                "FourierPositions",
                "HyperGridLinear",
                "LatentCrossAttention",
                "LatentSelfAttention",
                "MultimodalEncoder",
                "PerceiverDecoder",
                "PerceiverEncoder",
                "PerceiverResampler",
                "set_backend",
            },
        ),
        (models, {"adapterhub", "ca_mtl", "hypergrid_t5", "load", "mbt", "names", "perceiver", "perceiver_io"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_public_names(module, names):
    assert names <= set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_public_thing_says_what_it_is():
    for function in SIGNATURES:
        if function.__name__ != "forward":
            assert function.__doc__, function.__qualname__


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'latent_attention'"):
        mmkernels.latent_attention  # noqa: B018
    with pytest.raises(
        ValueError,
        match="op_name is 'softmax'; allowed are 'adapter', 'adapter_fusion', 'attention', .*, 'latent_attention', .*'linear'",
    ):
        mmkernels.explain("softmax")
    with pytest.raises(ValueError, match="backend is 'magic'; allowed are 'auto', 'cuda'"):
        mmkernels.use_backend("magic")


def test_use_backend_nests_and_lets_go():
    q = torch.zeros(1, 1, 3, 8)

    def current():
        return mmkernels.explain("attention", q, q, q).backend

    outside, again = current(), mmkernels.use_backend("reference")
    with again, mmkernels.use_backend("sdpa"):
        with again:
            assert current() == "reference"
        assert current() == "sdpa"
        with mmkernels.use_backend("auto"):
            assert current() == outside
        found = []
        thread = threading.Thread(target=lambda: found.append(current()))
        thread.start()
        thread.join()
        assert found == [outside]  # of this thread alone
    with pytest.raises(KeyError), again:
        raise KeyError
    assert current() == outside


def test_shapes_without_numbers():
    """Ops and explanations work on the "meta" device, where torch has no autocast to ask for."""
    q = torch.zeros(1, 2, 3, 8, device="meta")
    assert mmkernels.ops.attention(q, q, q).shape == (1, 2, 3, 8)
    x, w = torch.zeros(1, 5, 8, device="meta"), torch.zeros(4, 8, device="meta")
    assert mmkernels.ops.latent_attention(x[..., :4], x, w, w).shape == (1, 5, 4)
    assert mmkernels.explain("latent_attention", x[..., :4], x, w, w).backend == "reference"
