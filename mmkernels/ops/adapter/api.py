"""`ops.adapter` and `ops.adapter_fusion`: signatures, validation, choice of backend."""

import torch

from ... import _backends
from .._shared import dropout
from .._shared.arguments import autocast_dtype, check_dense, check_number, check_numbers, check_seed, check_tensor
from . import autograd, reference


def adapter(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    *,
    input_residual=None,
    residual=None,
    skip=False,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="relu",
    scale=1.0,
    gate=None,
    index=None,
    out_norm_weight=None,
    out_norm_bias=None,
    out_eps=None,
    dropout_p=0.0,
    dropout_seed=None,
    backend="auto",
):
    """An adapter with the norms and residuals around it, or a bank of adapters, each on the rows that have its number.

        s = x + input_residual                                     u = LayerNorm(s) if norm_weight is given, else s
        o = dropout(gate scale (act(u W_downᵀ + b_down) W_upᵀ + b_up))
        y = o + u if skip + residuals                              out = LayerNorm(y) if out_norm_weight is given, else y

    With h what a sub-layer gives, r what it was given, and LN its LayerNorm (adapters' library, all in one pass):

        Pfeiffer (seq_bn)         adapter(h, ..., input_residual=r, norm=LN, residual=(h, r), out_norm=LN)
        Houlsby (double_seq_bn)   adapter(h, ..., residual=(h, r), out_norm=LN)
        parallel (par_bn)         adapter(r, ..., residual=(h, r), out_norm=LN)
        pre-LN models             the same without the two norms

    A residual that is x or input_residual itself, as the same tensor object, is not read twice, and its gradients are made as
    one. Sums are float32. Saved for the backward are the inputs, up to four numbers a row and, on a CPU, the bottleneck before
    its activation, float32 (..., r).

    Args:
        x: (..., C): examples (B, T, C), packed rows (N, C); float32, bfloat16 or float16 (`reference` takes every float
            dtype). Any strides.
        w_down, w_up: (r, C) and (C, r), as `nn.Linear` has them, or banks of A adapters (A, r, C) and (A, C, r); of x's dtype.
            Adapters of several sizes make a bank when the smaller ones are filled up with zeros, which have no part in
            anything and get no gradient.
        b_down, b_up: (r,) and (C,), or (A, r) and (A, C), of x's dtype or float32; or None.
        input_residual: of x's shape and dtype, added to x first.
        residual: a tensor of x's shape and dtype, or a tuple of them, added to the adapter's output. One that is neither x nor
            input_residual is free; more of them are added up first.
        skip: adds u, the input of the adapter.
        norm_weight, norm_bias, eps: LayerNorm of the adapter's input; (C,) of x's dtype or float32.
        activation: "relu", "gelu" (by erf), "gelu_tanh", "swish", "leakyrelu" (slope 0.01), "tanh" or None.
        scale: a number, or a learned tensor: of one element or (C,), for a bank also (A, 1) or (A, C); of x's dtype
            or float32.
        gate: a factor for each example, (x.shape[0],), or for each row, x.shape[:-1]; of x's dtype or float32.
        index: int32 or int64 numbers of adapters in any order, of each example or of each row, which a bank must have: in
            [0, A), or -1: no adapter, o = 0. Other numbers give NaN rows on a GPU, IndexError on a CPU. Groups may be
            empty; an adapter that nobody has gets a gradient of 0.
        out_norm_weight, out_norm_bias, out_eps: LayerNorm of the result; `out_eps` is `eps` where it is None.
        dropout_p: probability in [0, 1) of dropping an element of o; which ones depends on the seed and the element's place
            alone, so that every backend drops the same.
        dropout_seed: int64 tensor of one element on x's device; drawn from torch's generator when None.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        Of x's shape and dtype, contiguous. Under autocast x, residuals, weights and biases are converted to its dtype.

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    if not torch.compiler.is_compiling() and gate is index is None and dropout_p == 0.0:
        norms = norm_weight, norm_bias, out_norm_weight, out_norm_bias
        weights = w_down, b_down, w_up, b_up
        try:
            call = _small(x, weights, norms, input_residual, residual, skip, eps, out_eps, activation, scale, backend)
            if call is not None:
                return autograd.adapter("cpp", call[0], None, None, call[1], _backends.is_free(backend))
        except Exception:
            pass  # what is wrong is said below
    call = _prepare(
        x,
        w_down,
        b_down,
        w_up,
        b_up,
        input_residual,
        residual,
        skip,
        norm_weight,
        norm_bias,
        eps,
        activation,
        scale,
        gate,
        index,
        out_norm_weight,
        out_norm_bias,
        out_eps,
        dropout_p,
        dropout_seed,
    )
    given, index, seed, options = call
    name = _backends.choose(
        "adapter", backend, _backends.preference(given[0].dtype), lambda n: _refusals(n, given[0], given[3])
    )
    dropout_p = options[-1]
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)
    if name == "reference":
        shape = given[0].shape
        keep = None if seed is None else dropout.keep_mask(seed, (1, *shape), dropout_p)[0]
        skip, number, *numbers, _ = options
        out = reference.adapter(*given, index, skip, reference.ACTIVATIONS[number], *numbers, keep, dropout_p)
    else:
        out = autograd.adapter(name, given, index, seed, options, _backends.is_free(backend))
    return out if x.dim() == 3 else out.view(x.shape)


def _small(x, weights, norms, input_residual, residual, skip, eps, out_eps, activation, scale, backend):
    """(tensors of autograd.NAMES, options) of one adapter on a CPU, or None where the long way must decide.

    A small problem costs what its calls cost, so sizes and dtypes are checked by the native op alone: what it refuses goes the
    long way, which runs it or says what is wrong.
    """
    if type(x) is not torch.Tensor or x.dim() != 3 or torch.is_autocast_enabled("cpu") or type(skip) is not bool:
        return None
    out_eps = eps if out_eps is None else out_eps
    if not (type(eps) is type(out_eps) is float and 0.0 < eps < _INFINITY and 0.0 < out_eps < _INFINITY):
        return None
    if (norms[1] is not None and norms[0] is None) or (norms[3] is not None and norms[2] is None):
        return None
    factor = 1.0
    if not isinstance(scale, torch.Tensor):
        factor, scale = check_number("scale", scale), None
    elif scale.dim() > 1:
        return None
    else:
        scale = scale.reshape(1, -1)
    terms = () if residual is None else residual if isinstance(residual, (tuple, list)) else (residual,)
    flags, added = 0, None
    if skip and norms[0] is not None:
        flags = 4
    elif skip:
        terms = (x, *terms) if input_residual is None else (x, input_residual, *terms)
    for term in terms:
        if term is None:
            return None
        if term is x and not flags & 1:
            flags |= 1
        elif term is input_residual and not flags & 2:
            flags |= 2
        elif added is None:
            added = term
        else:
            return None
    given = (x, input_residual, added, *weights, *norms, scale, None)
    for tensor in given:
        if tensor is not None and not tensor.is_cpu:
            return None  # one on "meta" among the others would take the call there
    order = _backends.preference(x.dtype)
    if _backends.choose("adapter", backend, order, lambda name: _refusals(name, x, weights[0])) != "cpp":
        return None
    return given, (flags, reference.ACTIVATIONS.index(activation), eps, out_eps, factor, 0.0)


def explain_adapter(x, w_down, b_down, w_up, b_up, *, backend="auto", **options):
    """The `explain` of `adapter`."""
    given, index, _, numbers = _prepare(x, w_down, b_down, w_up, b_up, **options)
    name = _backends.choose(
        "adapter", backend, _backends.preference(given[0].dtype), lambda n: _refusals(n, given[0], given[3])
    )
    by_library = name == "cpp" and _backends.is_free(backend) and autograd.library_backward_is_faster(given, index, numbers)
    detail = "backward by the library" if by_library else ""
    return _backends.Explanation("adapter", name, detail, {n: _refusals(n, given[0], given[3]) for n in _backends.NAMES})


def adapter_fusion(
    query,
    outputs,
    w_q,
    b_q,
    w_k,
    b_k,
    w_v,
    *,
    input_residual=None,
    residual=None,
    temperature=1.0,
    dropout_p=0.0,
    dropout_seed=None,
    return_weights=False,
    backend="auto",
):
    """AdapterFusion (Pfeiffer et al. 2021, section 3.2): every token attends to what A adapters made of it.

        u_a = outputs_a + input_residual        q = query W_qᵀ + b_q
        p = softmax over a of dropout(q (W_k u_a + b_k)) / temperature
        out = sum_a p_a W_v u_a + residual

    W_k is applied to the query and W_v to the sum, so that no output is projected: 3 C^2 multiplications a token, whatever A
    is, instead of (1 + 2 A) C^2. Without dropout b_k and input_residual add the same to all scores; b_k's gradient is zero.
    Its products are the library's.

    Args:
        query: (..., C): (B, T, C), or rows (N, C); float32, bfloat16 or float16 (`reference` takes every float dtype). Any
            strides.
        outputs: (..., A, C) of query's dtype, A of 1 or more: outputs of the adapters, after their scale.
        w_q, w_k: (D, C) as `nn.Linear` has them, of query's dtype; None: no projection.
        b_q, b_k: (D,) of query's dtype, or None.
        w_v: (E, C), or None: the outputs themselves.
        input_residual: (..., C) of query's dtype, added to every output.
        residual: (..., E) of query's dtype, added to the result.
        temperature: a number above 0.
        dropout_p: probability in [0, 1) of dropping a score, which is then 0 and takes part as such (as in adapters' library);
            the others are divided by 1 - dropout_p. Which ones depends on the seed and the score's place alone, so that every
            backend drops the same.
        dropout_seed: int64 tensor of one element on query's device; drawn from torch's generator when None.
        return_weights: also return p.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (..., E) of query's dtype; E is C without w_v. Under autocast everything is converted to its dtype. With
        return_weights (that, p): p (..., A), float32 or float64, without a gradient.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    tensors, temperature, dropout_p, seed = _prepare_fusion(
        query, outputs, w_q, b_q, w_k, b_k, w_v, input_residual, residual, temperature, dropout_p, dropout_seed
    )
    query, outputs, w_q, b_q, w_k, b_k, w_v, input_residual, residual = tensors
    name = _backends.choose(
        "adapter_fusion", backend, _backends.preference(query.dtype), lambda n: _fusion_refusals(n, outputs)
    )
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(query.device)
    if name == "reference":
        rows = (1, 1, query.shape[:-1].numel(), outputs.shape[-2])
        keep = None if seed is None else dropout.keep_mask(seed, rows, dropout_p).view(outputs.shape[:-1])
        out, p = reference.adapter_fusion(*tensors, temperature, keep, dropout_p)
        return (out, p.detach()) if return_weights else out
    linear = torch.nn.functional.linear
    q = query if w_q is None and b_q is None else query + b_q if w_q is None else linear(query, w_q, b_q)
    absorbed = q if w_k is None else q @ w_k
    offset, unused = None, [t for t in (b_k,) if t is not None]
    if seed is not None:  # what all scores of a token share: a softmax sees it only if it does not see it in all of them
        offset, unused = None if b_k is None else q @ b_k, []
        if input_residual is not None:
            shared = (absorbed * input_residual).sum(-1)
            offset = shared if offset is None else offset + shared
        offset = None if offset is None else _in_examples(offset, 0)
    rows = _in_examples(absorbed, 1), _in_examples(outputs, 2), offset
    out, p = autograd.adapter_fusion(name, *rows, unused, seed, 1.0 / temperature, dropout_p)
    out = out if query.dim() == 3 else out.view(query.shape)
    out = out if input_residual is None else out + input_residual
    out = out if w_v is None else linear(out, w_v)
    out = out if residual is None else out + residual
    return (out, p.view(outputs.shape[:-1])) if return_weights else out


def explain_adapter_fusion(query, outputs, w_q, b_q, w_k, b_k, w_v, *, backend="auto", return_weights=False, **options):
    """The `explain` of `adapter_fusion`."""
    (query, outputs, *_), *_ = _prepare_fusion(query, outputs, w_q, b_q, w_k, b_k, w_v, **options)
    name = _backends.choose(
        "adapter_fusion", backend, _backends.preference(query.dtype), lambda n: _fusion_refusals(n, outputs)
    )
    return _backends.Explanation("adapter_fusion", name, "", {n: _fusion_refusals(n, outputs) for n in _backends.NAMES})


MOST_BOTTLENECK = 1024  # of the CUDA kernels: a tile's bottleneck and its gradient lie in shared memory


def _refusals(name, x, w_down):
    reasons = _backends.platform_refusals(name, x.device, x.dtype)
    if name == "sdpa":
        reasons.append("it is an attention")
    if name == "cuda" and w_down.shape[-2] > MOST_BOTTLENECK:
        reasons.append(f"the bottleneck has {w_down.shape[-2]} columns, it takes up to {MOST_BOTTLENECK}")
    return reasons


_INFINITY = float("inf")
MOST_FUSED = 4096  # adapters that the GPU kernels of adapter_fusion take


def _fusion_refusals(name, outputs):
    reasons = _backends.platform_refusals(name, outputs.device, outputs.dtype)
    if name == "sdpa":
        reasons.append("it is an attention")
    if name in ("triton", "cuda") and outputs.shape[-2] > MOST_FUSED:
        reasons.append(f"outputs are those of {outputs.shape[-2]} adapters, it takes up to {MOST_FUSED}")
    return reasons


def _prepare(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    input_residual=None,
    residual=None,
    skip=False,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="relu",
    scale=1.0,
    gate=None,
    index=None,
    out_norm_weight=None,
    out_norm_bias=None,
    out_eps=None,
    dropout_p=0.0,
    dropout_seed=None,
):
    """Validates, applies autocast. Returns what the registered ops take: (tensors of autograd.NAMES, index, seed, options)."""
    check_dense("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; it must be a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., C) with C of 1 or more")
    low = autocast_dtype(x.device)
    channels = x.shape[-1]
    bank = _check_weights(x, w_down, w_up)
    bottleneck = w_down.shape[-2]
    leading = () if bank is None else (bank,)
    _check_parameter("b_down", b_down, ((*leading, bottleneck),), x, low)
    _check_parameter("b_up", b_up, ((*leading, channels),), x, low)
    for name, weight, bias in (("norm", norm_weight, norm_bias), ("out_norm", out_norm_weight, out_norm_bias)):
        if bias is not None and weight is None:
            raise ValueError(f"{name}_bias is given; without {name}_weight it must be None")
        _check_parameter(f"{name}_weight", weight, ((channels,),), x, low)
        _check_parameter(f"{name}_bias", bias, ((channels,),), x, low)
    if low is None:
        for name, tensor in (("w_down", w_down), ("w_up", w_up)):
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, reference.ACTIVATIONS))}")
    if not isinstance(skip, bool):
        raise TypeError(f"skip is {skip!r}; it must be True or False")
    eps = check_number("eps", eps, "a number above 0", lambda e: e > 0.0)
    out_eps = eps if out_eps is None else check_number("out_eps", out_eps, "a number above 0, or None", lambda e: e > 0.0)
    dropout_p = check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    factor = 1.0
    if isinstance(scale, torch.Tensor):
        scale = _check_scale(scale, bank, channels, x, low)
    else:
        factor, scale = check_number("scale", scale, "a finite number or a tensor"), None
    gate = _of_rows("gate", gate, x)
    if gate is not None:
        _check_parameter("gate", gate, None, x, low)
    index = _check_index(index, bank, x)
    dropout_seed = check_seed(dropout_seed, "x", x.device)
    flags, added = _check_residuals(x, input_residual, residual, skip, norm_weight is not None, low)
    rows = [x, input_residual, added]
    if low is not None:
        rows = [t if t is None else t.to(low) for t in rows]
        w_down, w_up = w_down.to(low), w_up.to(low)
        b_down, b_up = (b if b is None else b.to(low) for b in (b_down, b_up))
        norm_weight, norm_bias, out_norm_weight, out_norm_bias, scale, gate = (
            p if p is None or p.dtype == torch.float32 else p.to(low)
            for p in (norm_weight, norm_bias, out_norm_weight, out_norm_bias, scale, gate)
        )
    if x.dim() != 3:
        rows = [t if t is None else _in_examples(t, 1) for t in rows]
    given = (*rows, w_down, b_down, w_up, b_up, norm_weight, norm_bias, out_norm_weight, out_norm_bias, scale, gate)
    options = flags, reference.ACTIVATIONS.index(activation), eps, out_eps, factor, dropout_p
    return given, index, dropout_seed, options


def _in_examples(tensor, trailing):
    """(B, T, ...) of (..., ...), of which the last `trailing` dimensions stay."""
    leading = tensor.dim() - trailing
    if leading == 2:
        return tensor
    return tensor.flatten(0, leading - 2) if leading > 2 else tensor[(None,) * (2 - leading)]


def _check_weights(x, w_down, w_up):
    """Returns A, or None where there is one adapter."""
    channels = x.shape[-1]
    for name, tensor in (("w_down", w_down), ("w_up", w_up)):
        if isinstance(tensor, (list, tuple)):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}; several adapters are one tensor (A, ., .): stack them, those of "
                "smaller bottlenecks filled up with zeros"
            )
        check_dense(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")
    if w_down.dim() not in (2, 3) or w_down.shape[-1] != channels or w_down.shape[-2] == 0:
        raise ValueError(
            f"w_down has shape {tuple(w_down.shape)}; it must be (r, {channels}) or (A, r, {channels}) with r of 1 or more"
        )
    expected = (*w_down.shape[:-2], channels, w_down.shape[-2])
    if w_up.shape != expected:
        raise ValueError(f"w_up has shape {tuple(w_up.shape)}; with w_down {tuple(w_down.shape)} it must be {tuple(expected)}")
    return w_down.shape[0] if w_down.dim() == 3 else None


def _check_parameter(name, tensor, shapes, x, low):
    """Raises unless `tensor` is None, or of one of the shapes (None: any) and of x's dtype or float32."""
    if tensor is None:
        return
    check_dense(name, tensor)
    if shapes is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, shapes))}")
    if not tensor.is_floating_point() or (low is None and tensor.dtype not in (x.dtype, torch.float32)):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}, or torch.float32")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")


def _check_scale(scale, bank, channels, x, low):
    """As (1 or A, 1 or C)."""
    shapes = [(), (1,), (channels,)]
    if bank is not None:
        shapes += [(bank, 1), (bank, channels)]
    _check_parameter("scale", scale, shapes, x, low)
    return scale if scale.dim() == 2 else scale.reshape(1, -1)


def _of_rows(name, tensor, x):
    """What has a value for each example or for each row, as (B,) or (B, T) of the x (B, T, C) that the ops are given."""
    if tensor is None:
        return None
    check_dense(name, tensor)
    examples, rows = x.shape[:1] if x.dim() > 1 else (1,), x.shape[:-1]
    if tensor.shape != examples and tensor.shape != rows:
        allowed = " or ".join(dict.fromkeys((str(tuple(examples)), str(tuple(rows)))))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {allowed}")
    if x.dim() == 3:
        return tensor
    if x.dim() < 3:  # rows are the examples
        return tensor.reshape(1, -1)
    if tensor.shape == rows:
        return tensor.reshape(-1, x.shape[-2])
    return tensor.reshape(-1, *(1,) * (x.dim() - 3)).expand(x.shape[:-2]).reshape(-1)


def _check_index(index, bank, x):
    if bank is None:
        if index is not None:
            raise ValueError("index is given; with weights of one adapter, (r, C) and (C, r), it must be None")
        return None
    if index is None:
        raise ValueError("index is None; a bank of adapters, w_down (A, r, C), needs a number for each example or row")
    check_numbers("index", index, bank, x.device, "no adapter")
    return _of_rows("index", index, x).to(torch.int64)


def _check_residuals(x, input_residual, residual, skip, has_norm, low):
    """Returns (what is added to the output again, as the ops number it, what else is)."""
    terms = () if residual is None else tuple(residual) if isinstance(residual, (list, tuple)) else (residual,)
    names = ["residual"] if terms and terms[0] is residual else [f"residual[{i}]" for i in range(len(terms))]
    for name, tensor in (*zip(names, terms, strict=True), ("input_residual", input_residual)):
        if tensor is None and name == "input_residual" or tensor is x:
            continue
        check_tensor(name, tensor, tuple("." * x.dim()), "x", x.device)
        if tensor.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be that of x, {tuple(x.shape)}")
        if low is None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}")
    flags, added = 4 if skip and has_norm else 0, None
    if skip and not has_norm:
        terms = (x, *terms) if input_residual is None else (x, input_residual, *terms)
    for term in terms:
        if term is x and not flags & 1:
            flags |= 1
        elif term is input_residual and not flags & 2:
            flags |= 2
        else:
            added = term if added is None else added + term
    return flags, added


def _prepare_fusion(
    query,
    outputs,
    w_q,
    b_q,
    w_k,
    b_k,
    w_v,
    input_residual=None,
    residual=None,
    temperature=1.0,
    dropout_p=0.0,
    dropout_seed=None,
):
    """Validates, applies autocast. Returns the tensors, the temperature, dropout_p and the seed."""
    check_dense("query", query)
    if not query.is_floating_point():
        raise TypeError(f"query has dtype {query.dtype}; it must be a floating-point tensor")
    if query.dim() == 0 or query.shape[-1] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be (..., C) with C of 1 or more")
    low, leading, channels = autocast_dtype(query.device), tuple(query.shape[:-1]), query.shape[-1]
    check_dense("outputs", outputs)
    sizes = tuple(outputs.shape)
    if len(sizes) != len(leading) + 2 or sizes[:-2] != leading or sizes[-2] == 0 or sizes[-1] != channels:
        allowed = ", ".join((*map(str, leading), "A", str(channels)))
        raise ValueError(f"outputs has shape {sizes}; with query {tuple(query.shape)} it must be ({allowed}), A of 1 or more")
    width = channels if w_q is None else w_q.shape[0] if isinstance(w_q, torch.Tensor) and w_q.dim() == 2 else -1
    of_values = channels if w_v is None else w_v.shape[0] if isinstance(w_v, torch.Tensor) and w_v.dim() == 2 else -1
    if w_k is None and width not in (channels, -1):
        raise ValueError(f"w_k is None; with w_q {tuple(w_q.shape)} it must be ({width}, {channels})")
    shapes = {"w_q": (w_q, (max(width, 1), channels)), "b_q": (b_q, (width,)), "w_k": (w_k, (width, channels))}
    shapes |= {
        "b_k": (b_k, (width,)),
        "w_v": (w_v, (max(of_values, 1), channels)),
        "input_residual": (input_residual, (*leading, channels)),
        "residual": (residual, (*leading, of_values)),
    }
    for name, (tensor, shape) in {"outputs": (outputs, sizes), **shapes}.items():
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
        if not tensor.is_floating_point() or (low is None and tensor.dtype != query.dtype):
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be query's, {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on query's device, {query.device}")
    temperature = check_number("temperature", temperature, "a number above 0", lambda t: t > 0.0)
    dropout_p = check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    seed = check_seed(dropout_seed, "query", query.device)
    tensors = query, outputs, w_q, b_q, w_k, b_k, w_v, input_residual, residual
    return tensors if low is None else tuple(t if t is None else t.to(low) for t in tensors), temperature, dropout_p, seed
