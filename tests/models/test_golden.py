"""Golden cases against the official tensors: outputs, loss, gradients of all weights and inputs. test_ca_mtl.py has CA-MTL's.

Cases lie in `tests/golden/<system>/<case>`, and in the folder that MMKERNELS_GOLDEN names, in the same layout.

Budgets: config.json says by how much the official code in float32 misses its own float64 results, `f32_run_max_abs_err`. Our
float64 must stay within that, relative to tensors above one; where it is not given, within the rounding of the stored float32.
Float32 backends are allowed twice the largest error of plain PyTorch in float32 on top.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkernels import _library
from mmkernels.models import hypergrid_t5, mbt, official, perceiver, perceiver_io
from mmkernels.modules import BottleneckFusionLayer, HyperGridLinear
from mmkernels.modules.hypergrid import VARIANTS

ROOTS = [Path(__file__).parents[1] / "golden"]
if os.environ.get("MMKERNELS_GOLDEN"):
    ROOTS.append(Path(os.environ["MMKERNELS_GOLDEN"]))


def run_perceiver(config, weights, inputs, backend):
    """{output name: output}, differentiable with respect to weights and inputs."""
    if "encoder" in config:
        return run_perceiver_io(config, weights, inputs, backend)
    sizes, own = perceiver.read_official({**config, "index_shape": _only(inputs).shape[1:-1]}, weights)
    model = perceiver.from_official({**config, "index_shape": sizes.input_shape}, weights, backend=backend)
    return {"output": torch.func.functional_call(model, own, (_only(inputs),))}


def run_perceiver_io(config, weights, inputs, backend):
    """The outputs, and what every module gives on the way under its released name."""
    masked = "mask" in inputs
    if len(inputs) == 1:
        config = {**config, "index_shape": _only(inputs).shape[1:-1]}
    _, own = perceiver_io.read_official(config, weights)
    model = perceiver_io.from_official(config, weights, backend=backend).train(config.get("is_training", False))
    steps = {}
    for name, module in perceiver_io_modules(model, config, weights).items():
        module.register_forward_hook(lambda _, args, out, name=name: steps.setdefault(name, []).append(out))
    options = {}
    if masked:
        options["key_mask"] = inputs["mask"].bool()
    if "subsampled_points" in config:
        options["points"] = {name: torch.tensor(points) for name, points in config["subsampled_points"].items()}
    arguments = inputs["token_ids"] if masked else _only(inputs) if len(inputs) == 1 else inputs
    output = torch.func.functional_call(model, own, (arguments,), options)
    outputs = output if isinstance(output, dict) else {"output": output}
    batch = len(next(iter(inputs.values())))
    for name, calls in steps.items():
        for number, out in enumerate(calls):
            outputs[f"inter/{name}" if ":" in name else f"inter/{name}#{number}"] = whole(out, batch)
    return outputs


def perceiver_io_modules(model, config, weights):
    """{released name: our module} of what gives what the released module gives."""
    encoder, decoder = (
        next(n.removesuffix("/cross_attention/attention/linear/w") for n in weights if test(n) and n.endswith(_QUERY))
        for test in (lambda n: "decoder" not in n, lambda n: "decoder" in n)
    )
    layers = {f"{encoder}/self_attention{f'_{i}' * (i > 0)}": layer for i, layer in enumerate(model.encoder.blocks[0])}
    names = {f"{encoder}/cross_attention": model.encoder.cross[0], **layers}
    names |= {f"{decoder}/cross_attention": model.decoder.cross, decoder: model.decoder}
    query = decoder if decoder.startswith("basic_decoder") else decoder.partition("/")[0]
    names[f"{query}:decoder_query#0"] = model.queries
    if "preprocessor" in config:
        names["image_preprocessor"] = model.input
    if "subsampled_points" in config:
        names |= {"multimodal_preprocessor": model.input, "audio_preprocessor": model.input.modalities["audio"]}
        names |= {"image_preprocessor": model.input.modalities["image"]}
        parts = model.queries.modalities
        names["basic_decoder:decoder_query#0"] = parts["audio"]
        names["basic_video_autoencoding_decoder/~/basic_decoder:decoder_query#0"] = parts["image"]
        names["classification_decoder:decoder_query#0"] = parts["label"]
    return names


def whole(out, batch):
    """A module's tokens and positions as one array, with the batch that all examples share spelled out."""
    if isinstance(out, tuple):
        tokens, position = out
        tokens = tokens.expand(batch, -1, -1)
        out = tokens if position is None else torch.cat([tokens, position.expand(batch, -1, -1)], -1)
    return out


def run_mbt(config, weights, inputs, backend):
    """The logits; as well what a model in training returns, which the loss leaves out."""
    if "MBT" not in config["kind"]:
        return run_fusion_layer(config, weights, inputs, backend)
    config = {**config, "input_shapes": {name: tuple(x.shape[1:-1]) for name, x in inputs.items()}}
    _, own = mbt.read_official(config, weights)
    model = mbt.from_official(config, weights, backend=backend).eval()
    outputs = {"logits": torch.func.functional_call(model, own, (inputs,))}
    if model.config.classifier == "token":
        training = torch.func.functional_call(model.train(), own, (inputs,))
        outputs |= {f"train_logits_{name}": logits for name, logits in training.items()}
    return outputs


def run_fusion_layer(config, weights, inputs, backend):
    layer = BottleneckFusionLayer(
        config["order"],
        config["hidden_size"],
        num_heads=config["num_heads"],
        mlp_channels=config["mlp_dim"],
        update=config["update"],
        eps=config["layer_norm_eps"],
        backend=backend,
    )
    own = {}
    for name in config["order"]:
        own |= official.flax_block(weights, name, f"blocks.{name}")
    tokens = {name: inputs[name] for name in config["order"]}
    outputs, bottleneck = torch.func.functional_call(layer, own, (tokens, inputs["bottleneck"]))
    return {**outputs, "bottleneck": bottleneck}


def run_hypergrid(config, weights, inputs, backend):
    """The layer, or the sub-layer of T5, and its grid."""
    backend = "auto" if backend == "cpp" else backend  # kernels take blocks of 8 and more, most cases have narrower ones
    weights = {name.removeprefix("hypergrid/"): tensor for name, tensor in weights.items()}
    state = inputs.get("local_state")
    if "context" in inputs:  # a gate of its own for every weight
        layer = HyperGridLinear(*weights["weights"].shape, weights["weights"].shape, variant="GG", bias=False, backend=backend)
        logits = torch.nn.functional.linear(inputs["context"], *(weights[f"contextual_projection/{n}"] for n in _AFFINE))
        gate = torch.sigmoid(logits).unflatten(1, layer.hypergrid.grid)
        own = {"weight": weights["weights"].T}
        return {"y": torch.func.functional_call(layer, own, (inputs["x"],), {"gate": gate})}
    kinds = tuple(next((kind for kind in "LG" if f"{kind}_{side}" in weights), "") for side in "rc")
    options = {
        "grid": tuple(weights[f"{kind}_{side}"].shape[-1] if kind else 1 for kind, side in zip(kinds, "rc", strict=True)),
        "variant": next(name for name, parts in VARIANTS.items() if tuple(parts) == kinds),
        "residual": config["residual"],
        "backend": backend,
    }
    own = {f"hypergrid.{n}": tensor for n, tensor in weights.items() if n[:2] in ("L_", "G_")}
    if "W" in weights:
        own["weight"] = weights["W"].T
        width = 1 if state is None else state.shape[1]
        layer = HyperGridLinear(*weights["W"].shape, state_features=width, bias=False, **options)
        arguments, grids = (inputs["x"], state), layer.hypergrid
    else:
        gated = "wi_0" in weights
        sizes = hypergrid_t5.HyperGridT5Config(
            d_model=config["d_model"],
            d_ff=config["d_ff"],
            layer_norm_epsilon=config["rms_norm_eps"],
            feed_forward_proj="gated-gelu" if gated else config["activation"],
            dropout_rate=0.0,
            **options,
        )
        layer = hypergrid_t5.SubLayer(sizes, "DenseReluDense", hypergrid_t5.FeedForward(sizes))
        own = {f"DenseReluDense.wo.{n}": tensor for n, tensor in own.items()}
        own |= {f"DenseReluDense.{n}.weight": weights[n].T for n in ("wi_0", "wi_1", "wi", "wo") if n in weights}
        own["layer_norm.weight"] = weights["layer_norm/scale"]
        arguments, grids = (inputs["x"],), layer.inner.wo.hypergrid
    made = []
    grids.register_forward_hook(lambda module, args, grid: made.append(grid))
    return {"y": torch.func.functional_call(layer, own, arguments), "inter/grid": made[0]}


_AFFINE = ("weight", "bias")
_QUERY = "/cross_attention/attention/linear/w"

# system -> (runner, why it does not know a case); a line comes with every model
RUNNERS = {
    "perceiver": (run_perceiver, lambda config: ""),
    "mbt": (run_mbt, lambda config: ""),
    "hypergrid": (run_hypergrid, lambda config: ""),
}
BACKENDS = [("reference", torch.float64), ("eager", torch.float32), ("reference", torch.float32)]
if _library.load("cpu").loaded:
    BACKENDS.append(("cpp", torch.float32))


def cases():
    for root in ROOTS:
        assert root.is_dir(), f"{root} is no folder of golden cases"
        for config in sorted(root.glob("*/*/config.json")):
            if config.parent.parent.name in ("adapterhub", "ca_mtl"):  # of other layouts, in tests of their own
                continue
            yield pytest.param(config.parent, id=f"{config.parent.parent.name}-{config.parent.name}")


def refusal(folder):
    system = folder.parent.name
    if system not in RUNNERS:
        return f"no model for the system {system!r} yet"
    return RUNNERS[system][1](json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("folder", list(cases()))
def test_golden(folder):
    if why := refusal(folder):
        pytest.xfail(f"not supported: {why}")
    config = json.loads((folder / "config.json").read_text())
    expected = {name: tensor.double() for name, tensor in load_file(folder / "outputs.safetensors").items()}
    allowed = config.get("f32_run_max_abs_err", torch.finfo(torch.float32).eps / 2)
    for backend, dtype in BACKENDS:
        errors = {
            name: float((actual.double() - expected[name]).abs().max()) / max(1.0, float(expected[name].abs().max()))
            for name, actual in compute(folder, config, expected, backend, dtype).items()
        }
        if backend == "eager":  # the reference in float64, before it in the list, needs no allowance
            allowed += 2 * max(errors.values())
            continue
        worst = max(errors, key=errors.get)
        assert errors[worst] <= allowed, f"{worst} on {backend} in {dtype}: error {errors[worst]:.3e}, allowed {allowed:.3e}"


def compute(folder, config, expected, backend, dtype):
    """Everything that is stored and that we compute, under its stored name."""
    weights, inputs = (
        {
            name: tensor.to(dtype, copy=True).requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(folder / file).items()
        }
        for file in ("weights.safetensors", "inputs.safetensors")
    )
    outputs = RUNNERS[folder.parent.name][0](config, weights, inputs, backend)
    cotangents = {name: expected[f"cotangent/{name}"].to(dtype) for name in outputs if f"cotangent/{name}" in expected}
    for name, output in outputs.items():
        if f"grad_{name}" in expected:  # of something on the way
            output.retain_grad()
    loss = sum((outputs[name] * cotangent).sum() for name, cotangent in cotangents.items())
    loss.backward()
    results = {name if "/" in name else f"out/{name}": output.detach() for name, output in outputs.items()}
    results |= {f"grad_{name}": output.grad for name, output in outputs.items() if f"grad_{name}" in expected}
    results["loss"] = loss.detach()[None]
    for kind, tensors in (("grad", weights), ("grad_input", inputs)):
        for name, tensor in tensors.items():
            if f"{kind}/{name}" in expected:  # what takes no part has the gradient zero
                results[f"{kind}/{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    kinds = ("out", "loss", "grad", "grad_input", "grad_inter")
    missing = {name for name in expected if name.partition("/")[0] in kinds} - set(results)
    results = {name: tensor for name, tensor in results.items() if not name.startswith("inter/") or name in expected}
    assert not missing, f"not computed: {sorted(missing)}"
    assert all(results[name].shape == expected[name].shape for name in results)
    return results


def test_every_case_of_this_repository_has_a_model():
    assert {refusal(case.values[0]) for case in cases() if case.values[0].is_relative_to(ROOTS[0])} == {""}


def _only(inputs):
    (value,) = inputs.values()
    return value
