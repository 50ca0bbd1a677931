"""Loading the parameters of the systems' own releases: names and layouts in, this package's state dict out."""

import torch


def haiku_linear(state: dict, source: str, target: str) -> dict:
    """`source`/w (in, out) and `source`/b -> `target`.weight (out, in) and `target`.bias."""
    return {f"{target}.weight": _take(state, f"{source}/w").T, f"{target}.bias": _take(state, f"{source}/b")}


def haiku_norm(state: dict, source: str, target: str) -> dict:
    """`source`/scale and `source`/offset -> `target`.weight and `target`.bias."""
    return {f"{target}.weight": _take(state, f"{source}/scale"), f"{target}.bias": _take(state, f"{source}/offset")}


def array(state: dict, name: str) -> torch.Tensor:
    """An array that is kept as it is."""
    return _take(state, name)


def common_dtype(state: dict) -> torch.dtype:
    """The one dtype of all tensors; raises ValueError where there are several."""
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1:
        raise ValueError(f"state_dict has tensors of {sorted(map(str, dtypes))}; all must have one dtype")
    return dtypes.pop()


def _take(state, name):
    if name not in state:
        raise ValueError(f"state_dict has no {name!r}; it has {len(state)} entries, the first is {next(iter(state), None)!r}")
    return state[name]
