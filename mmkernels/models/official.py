"""Loading the parameters of the systems' own releases: names and layouts in, this package's state dict out."""

import re
from pathlib import Path

import torch

from .registry import InputError, read_json, read_tensors, require

ATTENTION = "MultiHeadDotProductAttention"


def check_mappings(config, state_dict) -> None:
    """Raises TypeError unless both are dictionaries and the second one maps names to tensors."""
    for name, value in (("config", config), ("state_dict", state_dict)):
        if not isinstance(value, dict):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a dictionary")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict has {name!r}: a {type(tensor).__name__}; it must map names to tensors")


# The layouts of a Perceiver's parameters: what reads one, what it is, and how a name starts that only it has.
_PERCEIVERS = (
    (
        "models.perceiver_io.from_huggingface",
        "Hugging Face's Perceiver",
        r"(perceiver\.)?(embeddings\.latents$|encoder\.(cross_att|self_att))",
    ),
    ("models.perceiver_io.from_official", "DeepMind's Perceiver IO", r"(.*/)?(perceiver_encoder/|cross_attention/attention/)"),
    (
        "models.perceiver.from_official",
        "DeepMind's Perceiver of 2021",
        r"latents/pos_embs$|(cross|latent)_\w+/(attention|mlp|layer_norm)",
    ),
    ("PerceiverIO.load_state_dict", "this package's PerceiverIO", r"encoder\.(latents$|cross\.\d|blocks\.\d)"),
    ("Perceiver.load_state_dict", "this package's Perceiver", r"cross\.\d+\.(attention|mlp|norm)\."),
)


def check_perceiver(reader: str, state_dict: dict) -> None:
    """Raises ValueError for names of a Perceiver that another function than `reader` reads, and says which."""
    for function, kind, start in _PERCEIVERS:
        if any(re.match(start, name) for name in state_dict):
            if function != reader:
                raise ValueError(f"state_dict is that of {kind}; {function} reads it")
            return


def haiku_state(config, state_dict) -> dict:
    """`state_dict` flat and of tensors, for one that is nested as the released files are, or of NumPy's arrays.

    "params" may stand around the parameters. Raises TypeError as `check_mappings` does.
    """
    if isinstance(state_dict, dict):
        state_dict = flattened(state_dict)
    check_mappings(config, state_dict)
    return {name.removeprefix("params/"): tensor for name, tensor in state_dict.items()}


def read_huggingface(folder) -> tuple:
    """(config, state dict) of a checkpoint as Hugging Face's `save_pretrained` writes it, without its library.

    Reads config.json, and model.safetensors or pytorch_model.bin, in one file or in the shards of an index.

    Raises InputError for files that are missing, truncated or something else.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise InputError(f"{index} has no 'weight_map'; it must map names of tensors to files")
            files = sorted(set(places.values()))
        else:
            continue
        state = {}
        for file in files:
            state |= (read_tensors if name.endswith(".safetensors") else read_pickle)(folder / file)
        return config, state
    raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of one of them")


def read_pickle(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have no common one
        raise InputError(f"{path} cannot be read as tensors of PyTorch: {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; it must hold tensors by name")
    return state


def haiku_linear(state: dict, source: str, target: str) -> dict:
    """`source`/w (in, out), or (1, 1, in, out), and `source`/b -> `target`.weight (out, in) and `target`.bias."""
    weight = _take(state, f"{source}/w")
    if weight.dim() == 4 and weight.shape[:2] == (1, 1):
        weight = weight[0, 0]
    if weight.dim() != 2:
        raise ValueError(f"state_dict has {source + '/w'!r} of shape {tuple(weight.shape)}; it must be (in, out)")
    return {f"{target}.weight": weight.T, f"{target}.bias": _take(state, f"{source}/b")}


def haiku_conv(state: dict, source: str, target: str) -> dict:
    """`source`/w (height, width, in, out), without a bias -> `target`.weight (out, in, height, width)."""
    weight = _take(state, f"{source}/w")
    if weight.dim() != 4:
        raise ValueError(f"state_dict has {source + '/w'!r} of shape {tuple(weight.shape)}; it must be (h, w, in, out)")
    return {f"{target}.weight": weight.permute(3, 2, 0, 1)}


def haiku_norm(state: dict, source: str, target: str) -> dict:
    """`source`/scale and `source`/offset -> `target`.weight and `target`.bias."""
    return {f"{target}.weight": _take(state, f"{source}/scale"), f"{target}.bias": _take(state, f"{source}/offset")}


def array(state: dict, name: str) -> torch.Tensor:
    """An array that is kept as it is."""
    return _take(state, name)


def common_dtype(state: dict) -> torch.dtype:
    """The one dtype of all tensors; raises ValueError where there are several."""
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"state_dict has tensors of {sorted(map(str, dtypes))}; all must have one floating-point dtype")
    return dtypes.pop()


def _take(state, name):
    if name not in state:
        raise ValueError(f"state_dict has no {name!r}; it has {len(state)} entries, the first is {next(iter(state), None)!r}")
    return state[name]


# --- Flax --------------------------------------------------------------------------------------------------------------------


def flax_linear(state: dict, source: str, target: str) -> dict:
    """`source`/kernel (in, out) and `source`/bias -> `target`.weight (out, in) and `target`.bias."""
    return {f"{target}.weight": _take(state, f"{source}/kernel").T, f"{target}.bias": _take(state, f"{source}/bias")}


def flax_norm(state: dict, source: str, target: str) -> dict:
    """`source`/scale and `source`/bias -> `target`.weight and `target`.bias."""
    return {f"{target}.weight": _take(state, f"{source}/scale"), f"{target}.bias": _take(state, f"{source}/bias")}


def flax_conv(state: dict, source: str, target: str) -> dict:
    """`source`/kernel (*patch, in, out) and `source`/bias -> `target`.weight (out, in, *patch) and `target`.bias."""
    kernel = _take(state, f"{source}/kernel")
    weight = kernel.permute(-1, -2, *range(kernel.dim() - 2))
    return {f"{target}.weight": weight, f"{target}.bias": _take(state, f"{source}/bias")}


def flax_block(state: dict, source: str, target: str, numbers=(0, 1, 0)) -> dict:
    """A transformer block -> `modules.bottleneck.EncoderBlock`.

    query, key and value kernels are (D, H, D / H), that of out (H, D / H, D). `numbers` are those of the attention, the
    second layer norm and the MLP, which Flax counts by kind or all together.
    """
    attention, norm, mlp = numbers
    inner = f"{source}/{ATTENTION}_{attention}"
    parts = [(_take(state, f"{inner}/{n}/kernel"), _take(state, f"{inner}/{n}/bias")) for n in ("query", "key", "value")]
    return {
        **flax_norm(state, f"{source}/LayerNorm_0", f"{target}.norm1"),
        f"{target}.qkv.weight": torch.cat([kernel.flatten(1).T for kernel, _ in parts]),
        f"{target}.qkv.bias": torch.cat([bias.flatten() for _, bias in parts]),
        f"{target}.proj.weight": _take(state, f"{inner}/out/kernel").flatten(0, -2).T,
        f"{target}.proj.bias": _take(state, f"{inner}/out/bias"),
        **flax_norm(state, f"{source}/LayerNorm_{norm}", f"{target}.norm2"),
        **flax_linear(state, f"{source}/MlpBlock_{mlp}/Dense_0", f"{target}.fc1"),
        **flax_linear(state, f"{source}/MlpBlock_{mlp}/Dense_1", f"{target}.fc2"),
    }


def flattened(state: dict) -> dict:
    """A nested dict of arrays with names joined by "/"; a flat one stays as it is. Arrays become tensors without a copy."""
    flat = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": tensor for inner, tensor in flattened(value).items()}
        else:
            flat[name] = torch.as_tensor(value) if hasattr(value, "__array__") else value
    return flat


def read_flax_checkpoint(path) -> dict:
    """The parameters of a MessagePack checkpoint (`flax.serialization`), nested, without JAX.

    They stand under `optimizer/target`, `params`, or at the top. Nothing else is decoded: a checkpoint holds the
    optimizer's state as well.

    Raises InputError for a file that cannot be read, is truncated or is something else; ImportError without `msgpack`.
    """
    msgpack = require("msgpack", "checkpoints")
    try:
        content = Path(path).read_bytes()
        # Arrays stay bytes until they are asked for.
        tree = msgpack.unpackb(content, strict_map_key=False)
        for name in ("optimizer", "target", "params"):
            if isinstance(tree, dict) and name in tree:
                tree = tree[name]
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__} where parameters should stand")
        return _decoded(tree, msgpack)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, msgpack.UnpackException) as error:
        raise InputError(f"{path} cannot be read as a Flax checkpoint (truncated, or something else): {error}") from error


def _decoded(node, msgpack):
    """Flax packs an array as (shape, dtype name, bytes), in chunks where it is longer than 1 GiB."""
    if isinstance(node, dict) and "__msgpack_chunked_array__" in node:
        shape, chunks = ([node[key][str(i)] for i in range(len(node[key]))] for key in ("shape", "chunks"))
        return torch.cat([_decoded(chunk, msgpack) for chunk in chunks]).reshape(shape)
    if isinstance(node, dict):
        return {name: _decoded(value, msgpack) for name, value in node.items()}
    if not isinstance(node, msgpack.ExtType) or node.code not in (1, 3):  # arrays and scalars of numpy
        raise ValueError(f"it holds a {type(node).__name__} where an array should stand")
    shape, name, data = msgpack.unpackb(node.data)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"it holds an array of {name!r}, which torch has not")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


# --- Vision transformers -----------------------------------------------------------------------------------------------------

_VIT_BLOCK = {
    "timm": {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    "hf": {
        "norm1": "layernorm_before",
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    },
}
_VIT_STEM = {
    "timm": ("patch_embed.proj", "cls_token", "pos_embed", "norm", "blocks"),
    "hf": (
        "embeddings.patch_embeddings.projection",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "layernorm",
        "encoder.layer",
    ),
}
# Hugging Face renamed the modules in transformers 5; files on its hub have the older names.
_HF_RENAMED = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def read_vit(state_dict: dict, num_layers: int) -> dict:
    """A vision transformer under one set of names, from those of timm, Hugging Face's ViTModel or Google's Flax checkpoints.

    Returns `embedding.weight` (D, C, h, w) and `.bias`, `cls` (1, 1, D) if there is one, `positions` (1, T, D), the CLS
    token's first, `norm.*`, and `blocks.<i>.*` as `modules.bottleneck.EncoderBlock` has them. Heads are left out.

    Raises ValueError for missing names, another number of layers, and parts of a block that an `EncoderBlock` has not.
    """
    state = flattened(state_dict)
    found = [n for n in state if n.endswith("Transformer/posembed_input/pos_embedding")]
    if found:
        return _read_flax_vit(state, found[0].removesuffix("Transformer/posembed_input/pos_embedding"), num_layers)
    for pattern, name in _HF_RENAMED if any(n.endswith(f"{_VIT_STEM['hf'][0]}.weight") for n in state) else ():
        state = {re.sub(pattern, name, n): tensor for n, tensor in state.items()}
    for kind, (patches, cls, positions, norm, blocks) in _VIT_STEM.items():
        found = [n for n in state if re.fullmatch(rf"(.*\.)?{re.escape(patches)}\.weight", n)]
        if not found:
            continue
        prefix = found[0].removesuffix(f"{patches}.weight")
        vit = {f"embedding.{n}": _take(state, f"{prefix}{patches}.{n}") for n in ("weight", "bias")}
        vit |= {f"norm.{n}": _take(state, f"{prefix}{norm}.{n}") for n in ("weight", "bias")}
        vit["positions"] = _take(state, prefix + positions)
        if prefix + cls in state:
            vit["cls"] = state[prefix + cls]
        _check_depth({int(i) for i in _matches(rf"{re.escape(prefix + blocks)}\.(\d+)\..*", state)}, num_layers)
        for i in range(num_layers):
            source = f"{prefix}{blocks}.{i}."
            own = {n.removeprefix(source) for n in state if n.startswith(source)}
            for target, name in _VIT_BLOCK[kind].items():
                for end in ("weight", "bias"):
                    vit[f"blocks.{i}.{target}.{end}"] = _take(state, f"{source}{name}.{end}")
                    own.discard(f"{name}.{end}")
            if own:
                raise ValueError(f"state_dict has {source + min(own)!r}, which the blocks of an MBT do not have")
            if kind == "hf":
                for end in ("weight", "bias"):
                    vit[f"blocks.{i}.qkv.{end}"] = torch.cat([vit.pop(f"blocks.{i}.{n}.{end}") for n in "qkv"])
        return vit
    raise ValueError(f"state_dict has names of no known vision transformer; the first is {next(iter(state), None)!r}")


def _read_flax_vit(state, prefix, num_layers):
    state = {n.removeprefix(prefix): tensor for n, tensor in state.items()}
    vit = {
        **flax_conv(state, "embedding", "embedding"),
        **flax_norm(state, "Transformer/encoder_norm", "norm"),
        "positions": _take(state, "Transformer/posembed_input/pos_embedding"),
    }
    if "cls" in state:
        vit["cls"] = state["cls"]
    _check_depth({int(i) for i in _matches(r"Transformer/encoderblock_(\d+)/.*", state)}, num_layers)
    together = any(f"/{ATTENTION}_1/" in n for n in state)
    for i in range(num_layers):
        vit |= flax_block(state, f"Transformer/encoderblock_{i}", f"blocks.{i}", (1, 2, 3) if together else (0, 1, 0))
    return vit


def _matches(pattern, names):
    return [match[1] for match in (re.fullmatch(pattern, name) for name in names) if match]


def _check_depth(layers, num_layers):
    if layers != set(range(num_layers)):
        raise ValueError(f"state_dict has layers {sorted(layers)}; the config has num_layers {num_layers}")
