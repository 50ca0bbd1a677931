"""Inputs longer than memory: the absorbed core over chunks that are read one after another (README, "Inputs in parts")."""

import contextlib

import torch
from torch.nn.functional import linear

from ... import _backends
from .._shared import dropout
from .._shared.arguments import autocast_dtype, check_key_mask, check_tensor
from ..attention import attention, explain_attention
from . import api, autograd, plan

ABSORBED = plan.Plan("absorb_into_queries", "raw_input", 0)


class LatentState:
    """`latent_attention` of an input that arrives in chunks, in memory that does not grow with it. For inference.

        state = LatentState(q, w_k, w_v, norm_weight=g, norm_bias=b, b_v=c)
        for x, position in chunks:
            state.update(x, position)
        out = state.result()        # latent_attention(q, all of x, ..., position=all of position) up to rounding

    It keeps the absorbed queries, and of everything read so far softmax(scale q' xhat^T) xhat with its log-sum-exp; or, where
    projecting takes fewer operations, softmax(scale q K^T) V. Both are N-sized; in which order chunks come does not matter.
    Rounding apart, neither does how the input is cut: states of the same queries and weights that read different chunks, in
    other threads or processes, are put together by `merge`.

    Arguments, errors and backends as `ops.latent_attention`; the kernels of absorbed queries take up to 1024 channels.
    A state keeps no gradient, and refuses tensors that want one while gradients are enabled: `ops.latent_attention_stream`
    trains. The queries and weights are those at the time it was made: change none of them in place.
    """

    def __init__(
        self,
        q,
        w_k,
        w_v,
        *,
        num_heads=1,
        norm_weight=None,
        norm_bias=None,
        eps=1e-5,
        b_k=None,
        b_v=None,
        scale=None,
        backend="auto",
    ):
        q, w_k, w_v, b_k, b_v, scale, eps = check_weights(
            q, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, scale, backend
        )
        self._tensors = {
            "q": q,
            "w_k": w_k,
            "w_v": w_v,
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "b_v": b_v,
        }
        for name, tensor in self._tensors.items():
            _refuse_gradient(name, tensor)
        self._numbers = {"num_heads": num_heads, "eps": eps, "scale": scale}
        self._backend = backend
        self._absorbed = None  # the queries, or None where what is read is projected
        sizes = q.shape[1], 1 << 30, 0, w_k.shape[1], w_k.shape[0], w_v.shape[0], 0, num_heads
        self._share = plan.absorbing_share(*sizes)  # of a long input, whatever its chunks are
        if self._share <= 1.0 or max(w_k.shape[0], w_v.shape[0]) > num_heads * api.MAX_CHANNELS:  # no kernel's heads
            self._absorb()
        self._kind = None  # (B, Cx, Cp) of the chunks
        self._partial = None  # (out, lse) of what has been read
        self._dropout = (None, 0.0)  # seed and probability: of a stream, whose chunks have an order
        self._length = 0  # keys that have been read

    @torch.no_grad()
    def _absorb(self):
        t = self._tensors
        self._absorbed = api.absorb_queries(t["q"], t["w_k"], self._numbers["num_heads"], t["norm_weight"])

    def update(self, chunk, position=None, key_mask=None):
        """Reads `chunk` (B, m, Cx), m of 0 or more; `position` (m, Cp) and `key_mask` bool (B, m) belong to its rows.

        B, Cx and Cp are those of the first chunk, dtype and device those of q. Returns the state.
        """
        chunk, position = self._check_chunk("chunk", chunk, position, key_mask)
        _refuse_gradient("chunk", chunk)
        _refuse_gradient("position", position)
        self._read(chunk, position, key_mask)
        return self

    def merge(self, other):
        """Adds what another state has read, which must be made of the same queries, weights and numbers. Returns the state."""
        if not isinstance(other, LatentState):
            raise TypeError(f"other is a {type(other).__name__}; it must be a LatentState")
        for name, ours in self._tensors.items():
            theirs = other._tensors[name]
            if not _equal(ours, theirs):
                raise ValueError(f"other has a different {name}; it must be made of the same queries and weights")
        for name, ours in self._numbers.items():
            if ours != other._numbers[name]:
                raise ValueError(f"other has {name} {other._numbers[name]}; it must be the same, {ours}")
        if other._partial is None:
            return self
        if self._kind is not None and self._kind != other._kind:
            raise ValueError(
                f"other has read chunks of {_told(*other._kind)}; those of this state are of {_told(*self._kind)}"
            )
        self._kind = other._kind
        self._add(*other._partial)
        return self

    def result(self):
        """(B, N, H * E): the attention over everything read so far; more may follow.

        Examples of which nothing visible has been read give zeros, without `b_v`, as in `latent_attention`; before the first
        chunk these are all, and B is that of q.
        """
        q, w_v = self._tensors["q"], self._tensors["w_v"]
        if self._partial is None:
            return w_v.new_zeros(q.shape[0], q.shape[1], w_v.shape[0])
        with torch.no_grad():
            return self._finish(*self._partial)

    def _finish(self, out, lse):
        if self._absorbed is None:
            return where_visible(out.transpose(1, 2).flatten(2).to(self._tensors["w_v"].dtype), lse)
        after = (self._tensors[name] for name in AFTER)
        return finish(out, lse, self._tensors["w_v"], self._numbers["num_heads"], *after, self._dropout[1])

    def _check_chunk(self, name, x, position, key_mask):
        """(x, position) as they are read, under autocast in its dtype."""
        q, channels = self._tensors["q"], self._tensors["w_k"].shape[1]
        check_tensor(name, x, ("B", "m", "Cx"), "q", q.device)
        if position is not None:
            check_tensor("position", position, ("m", "Cp"), "q", q.device)
        if autocast_dtype(x.device) is not None:
            x, position = x.to(q.dtype), None if position is None else position.to(q.dtype)
        for what, tensor in ((name, x), ("position", position)):
            if tensor is not None and tensor.dtype != q.dtype:
                raise TypeError(f"{what} has dtype {tensor.dtype}; it must be q's, {q.dtype}")
        batch, length, _ = x.shape
        if position is not None and position.shape[0] != length:
            raise ValueError(
                f"position has shape {tuple(position.shape)}; with {name} {tuple(x.shape)} it must be ({length}, Cp)"
            )
        if key_mask is not None:
            check_key_mask(key_mask, batch, length, q.device)
        kind = _kind(x, position)
        if self._kind is not None and kind != self._kind:
            raise ValueError(f"{name} is of {_told(*kind)}; those before it are of {_told(*self._kind)}")
        if sum(kind[1:]) != channels:
            raise ValueError(f"{name} is of {_told(*kind)}; the channels together must be those of w_k, {channels}")
        if q.shape[0] not in (1, batch):
            raise ValueError(f"{name} has batch {batch}; it must be that of q, {q.shape[0]}")
        return x, position

    def _choose(self, x, position):
        order = api._preference(self._tensors["q"], x, position, self._numbers["num_heads"], ABSORBED, self._dropout[1])
        return choose("latent_attention_stream", x, self._absorbed.shape[2], self._backend, order)

    @torch.no_grad()
    def _read(self, x, position, key_mask):
        if self._absorbed is None:
            partial = self._attend(self._tensors["q"], x, position, key_mask)
        else:
            forward, _ = autograd.core_pair(self._choose(x, position))
            numbers = self._numbers["scale"], self._numbers["eps"], *self._dropout, self._length
            partial = forward(self._absorbed, x, position, key_mask, *numbers)
        self._kind = _kind(x, position)
        self._add(*partial)
        self._length += x.shape[1]

    def _attend(self, q, x, position, key_mask):
        """(out, lse) of `ops.attention` to projected keys and values, (B, H, N, E) and (B, H, N); out of lse's dtype."""
        t, heads = self._tensors, self._numbers["num_heads"]
        x = api.normalised_input(x, position, key_mask, t["norm_weight"], t["norm_bias"], self._numbers["eps"])
        projected = q.expand(x.shape[0], -1, -1), linear(x, t["w_k"]), linear(x, t["w_v"], t["b_v"])
        q, k, v = (torch.unflatten(p, -1, (heads, -1)).transpose(1, 2) for p in projected)
        options = dict(key_mask=key_mask, scale=self._numbers["scale"], return_lse=True, backend=self._backend)
        out, lse = attention(q, k, v, **options)
        return out.to(lse.dtype), lse

    def _add(self, out, lse):
        self._partial = (out, lse) if self._partial is None else autograd.merge(*self._partial, out, lse)


def latent_attention_stream(
    q,
    chunks,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    parameters=(),
    backend="auto",
):
    """`latent_attention` of an input that comes in chunks and never is in memory as a whole, with gradients.

    Equal to `latent_attention` on all chunks one behind the other, up to rounding. Where a gradient is wanted the backward
    pass reads the chunks a second time instead of keeping them: memory is one chunk and N-sized tensors, whatever M is.

    Args:
        q, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, scale, dropout_p, dropout_seed, backend: as in
            `latent_attention`, also what dropout drops. The projections are absorbed into the queries, or made chunk by chunk
            where that takes fewer operations and nothing is dropped; the kernels of the former take up to 1024 channels.
        chunks: what can be iterated twice, a list, `x.split(4096, 1)`, a dataset, a loader, or a function without arguments
            that returns an iterator (a generator function). Each element is x (B, m, Cx), or (x, position), or (x, position,
            key_mask) with position (m, Cp) or None and key_mask bool (B, m) or None. m may differ, B, Cx and Cp may not.
            Without gradients an iterator will do.
        parameters: the tensors that chunks are computed from and that want gradients, such as
            `preprocessor.parameters()`. Chunks are then computed without a graph in the forward pass, and again with one, one
            chunk at a time, in the backward pass (activation checkpointing). Chunks that want a gradient while `parameters`
            is empty are refused.

    The second reading starts from the same state of torch's generators and with the same autocast as the first, so that
    dropout, augmentation and shuffling by these repeat. What it reads must be the same: number and shapes of chunks are
    compared, and of chunks that are data, not computed from `parameters`, a checksum. A RuntimeError tells what differs.

    Returns:
        (B, N, H * E) of q's dtype. Without any chunk zeros (B of q), as for examples without a visible key.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
        RuntimeError: in the backward pass, the second reading differs from the first.
    """
    parameters = tuple(parameters)
    for i, tensor in enumerate(parameters):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"parameters[{i}] is a {type(tensor).__name__}; it must be a tensor")
    q, w_k, w_v, b_k, b_v, scale, eps = check_weights(
        q, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, scale, backend
    )
    dropout_p, seed = api._check_dropout(dropout_p, dropout_seed, q.device, "q")
    if dropout_p > 0.0 and seed is None:
        seed = dropout.draw_seed(q.device)
    weights = dict(q=q, w_k=w_k, w_v=w_v, norm_weight=norm_weight, norm_bias=norm_bias, b_v=b_v)
    state = _state_of(weights, parameters, (seed, dropout_p), num_heads=num_heads, eps=eps, scale=scale, backend=backend)
    # What wants a second reading if it wants a gradient: what is on the chunks' side, and the queries.
    beside = parameters if state._absorbed is not None else (w_k, w_v, norm_weight, norm_bias, b_v, *parameters)
    training = _want_gradients(q, w_k, norm_weight, *beside)
    source = _Source(chunks, q.device, training)
    marks = []
    with torch.set_grad_enabled(torch.is_grad_enabled() and not parameters):  # with a graph that is dropped: to notice it
        for i, parts in enumerate(source):
            x, position = state._check_chunk(f"chunks[{i}]", *parts)
            for tensor in (x, position):
                if tensor is not None and tensor.requires_grad and not parameters:
                    raise ValueError(
                        f"chunks[{i}] wants a gradient; name in `parameters` what the chunks are computed from, or detach them"
                    )
            if training:
                marks.append(_Mark(x, position, parts[2]))
            state._read(x, position, parts[2])
    if state._partial is None:
        zero = sum(t.sum() * 0.0 for t in (q, w_k, w_v, norm_weight, norm_bias, b_k, b_v, *parameters) if t is not None)
        return state.result() + zero.to(w_v.dtype)
    out, lse = state._partial
    if training:
        if q.shape[0] == out.shape[0]:
            q = where_visible(q, lse)  # else NaN of an example without keys would reach w_k's gradient
        if state._absorbed is not None:
            q = api.absorb_queries(q, w_k, num_heads, norm_weight)
        out = autograd.merged(_Gradients(source, state, marks, beside), out, lse, q, *beside)
    out = state._finish(out, lse)
    return out if b_k is None or not b_k.requires_grad else out + b_k.sum() * 0.0


def explain_latent_attention_stream(
    q,
    chunks,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    parameters=(),
    backend="auto",
):
    """The `explain` of `latent_attention_stream`; reads the first chunk, whose backend it tells."""
    q, w_k, w_v, b_k, b_v, scale, eps = check_weights(
        q, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, scale, backend
    )
    dropout_p, seed = api._check_dropout(dropout_p, dropout_seed, q.device, "q")
    weights = dict(q=q, w_k=w_k, w_v=w_v, norm_weight=norm_weight, norm_bias=norm_bias, b_v=b_v)
    state = _state_of(weights, parameters, (seed, dropout_p), num_heads=num_heads, eps=eps, scale=scale, backend=backend)
    x, position = q.new_empty(q.shape[0], 0, w_k.shape[1]), None
    with torch.no_grad():
        for parts in _Source(chunks, q.device, False):
            x, position = state._check_chunk("chunks[0]", *parts)
            break
    if state._absorbed is not None:
        name, reasons = state._choose(x, position), {n: refusals(n, x, w_k.shape[1]) for n in _backends.NAMES}
        return _backends.Explanation("latent_attention_stream", name, "absorbed, chunk by chunk", reasons)
    shapes = (q.shape[1], w_k.shape[0]), (x.shape[1], w_k.shape[0]), (x.shape[1], w_v.shape[0])
    heads = (q.new_empty(1).expand(x.shape[0], num_heads, rows, width // num_heads) for rows, width in shapes)
    told = explain_attention(*heads, return_lse=True, backend=backend)
    return told._replace(op="latent_attention_stream", detail="projected, chunk by chunk")


TRAINING_SHARE = 1.7  # with gradients absorbing was measured to be the faster way up to so many times the operations


def _state_of(weights, parameters, dropout, *, eps, **numbers):
    """The state of a stream. Its chunks are absorbed where weights are dropped, which `ops.attention` counts from zero."""
    learns = _want_gradients(*weights.values(), *parameters)
    with torch.no_grad():
        state = LatentState(**weights, eps=None if eps < 0 else eps, **numbers)
        state._dropout = dropout
        if state._absorbed is None and (dropout[1] > 0.0 or (learns and state._share <= TRAINING_SHARE)):
            state._absorb()
    return state


def _want_gradients(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --- What streams and shards share -----------------------------------------------------------------------------------

AFTER = ("norm_weight", "norm_bias", "b_v")


def check_weights(q, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, scale, backend):
    """The checks of `latent_attention` without an input. Returns (q, w_k, w_v, b_k, b_v, scale, eps)."""
    _backends.check_name(backend)
    for name, tensor, dimensions in (("q", q, ("B", "N", "H * D")), ("w_k", w_k, ("H * D", "C"))):
        check_tensor(name, tensor, dimensions, "q", getattr(q, "device", None))
    nothing = q.new_empty(q.shape[0], 0, w_k.shape[1])
    q, _, w_k, w_v, b_k, b_v, _, scale, eps = api._check(
        q, nothing, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, None, None, scale
    )
    return q, w_k, w_v, b_k, b_v, scale, eps


def choose(op, x, channels, backend, order):
    return _backends.choose(op, backend, order, lambda name: refusals(name, x, channels))


def refusals(name, x, channels):
    reasons = api._refusals(name, x)
    if name not in ("reference", "sdpa") and channels > api.MAX_CHANNELS:
        reasons.append(f"the input has {channels} channels; its absorbed kernels take up to {api.MAX_CHANNELS}")
    return reasons


def finish(out, lse, w_v, num_heads, norm_weight, norm_bias, b_v, dropout_p=0.0):
    """The result from the core's `out` over the whole input; zeros where nothing was visible."""
    return where_visible(api.values_of_core(out, w_v, num_heads, norm_weight, norm_bias, b_v, dropout_p), lse)


def where_visible(tensor, lse):
    """`tensor` (B, ...), zeros in the examples that have no key. Selected, so that no NaN passes, nor a gradient."""
    return torch.where((lse != float("-inf")).flatten(1).any(1).view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0.0)


# --- Reading twice ---------------------------------------------------------------------------------------------------


class _Source:
    """Chunks as (x, position, key_mask), as often as wanted, from the second time on under the conditions of the first."""

    def __init__(self, chunks, device, twice):
        if isinstance(chunks, torch.Tensor):
            raise TypeError("chunks is a Tensor; it must be a series of them, as x.split(4096, 1) is")
        if not callable(chunks):
            try:
                once = iter(chunks) is chunks
            except TypeError:
                raise TypeError(
                    f"chunks is a {type(chunks).__name__}; it must be iterable, or a function that returns an iterator"
                ) from None
            if once and twice:
                raise TypeError(
                    f"chunks is a {type(chunks).__name__}, which can be read once; the backward pass reads a second time: "
                    "give a list, or a function that returns a new iterator"
                )
        self.chunks, self.device = chunks, device
        self.random, self.autocast = None, None
        if twice:
            self.random = [torch.get_rng_state()]
            if device.type == "cuda":
                self.random.append(torch.cuda.get_rng_state(device))
            dtype = autocast_dtype(device)
            self.autocast = dict(enabled=dtype is not None, dtype=dtype)

    def __iter__(self):
        for i, item in enumerate(self.chunks() if callable(self.chunks) else self.chunks):
            parts = tuple(item) if isinstance(item, (tuple, list)) else (item,)
            if not 1 <= len(parts) <= 3:
                raise ValueError(f"chunks[{i}] has {len(parts)} parts; it must be x, (x, position) or (x, position, key_mask)")
            yield (*parts, *(None,) * (3 - len(parts)))

    @contextlib.contextmanager
    def again(self):
        """The generators and autocast as they were at the first reading, for a time."""
        gpu = self.device.type == "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([self.device] if gpu else []))
            torch.set_rng_state(self.random[0])
            if gpu:
                torch.cuda.set_rng_state(self.random[1], self.device)
            if self.device.type != "meta":
                stack.enter_context(torch.autocast(self.device.type, **self.autocast))
            yield


class _Mark:
    """What is remembered of a chunk: what each part is, and a sum over its bits in which every row has another weight."""

    NAMES = ("", " position", " key_mask")

    def __init__(self, *parts):
        self.parts = [None if t is None else (tuple(t.shape), t.dtype) for t in parts]
        self.sums = [None if t is None else _bit_sum(t.detach()) for t in parts]

    def check(self, i, *parts):
        """Raises where chunk `i` is of other shapes; returns [(name, tensor that says whether the part has other values)].

        Values of what is computed from parameters may differ by rounding, and are not looked at.
        """
        again = _Mark(*parts)
        names = [f"chunks[{i}]{name}" for name in self.NAMES]
        for name, before, now in zip(names, self.parts, again.parts, strict=True):
            if before != now:
                raise RuntimeError(f"{_CHANGED} {name} was {_part(before)} and is {_part(now)}")
        sums = zip(names, parts, self.sums, again.sums, strict=True)
        return [(name, before != now) for name, t, before, now in sums if t is not None and not t.requires_grad]


def _part(part):
    return "None" if part is None else f"{part[0]} of {part[1]}"


def _bit_sum(tensor):
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor[..., None] if tensor.dtype == torch.bool else tensor
    rows = bits.view(kinds[tensor.element_size()]).sum(-1, dtype=torch.int64).flatten()
    return (rows * (2 * torch.arange(rows.numel(), device=tensor.device) + 1)).sum()


class _Gradients:
    """Reads the chunks of a stream again and collects the gradients of the queries, absorbed or not, and of `parameters`."""

    def __init__(self, source, state, marks, parameters):
        self.source, self.state, self.marks, self.parameters = source, state, marks, parameters

    def __call__(self, dout, out, lse, q, _, wanted):
        asked = [p for p, want in zip(self.parameters, wanted[1:], strict=True) if want]
        dq = torch.zeros_like(q, dtype=out.dtype) if wanted[0] else None
        sums, changed, count, length = [None] * len(asked), [], 0, 0
        of_chunk = self._of_projected if self.state._absorbed is None else self._of_absorbed
        with self.source.again(), torch.set_grad_enabled(bool(asked)):
            for i, parts in enumerate(self.source):
                count += 1
                if count > len(self.marks):
                    break
                x, position = self.state._check_chunk(f"chunks[{i}]", *parts)
                changed += self.marks[i].check(i, x, position, parts[2])
                dq_here, found = of_chunk(dout, out, lse, q, (x, position, parts[2]), length, wanted[0], asked)
                length += x.shape[1]
                if wanted[0]:
                    dq += dq_here
                sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, found, strict=True)]
        if count != len(self.marks):
            now = "more" if count > len(self.marks) else count
            raise RuntimeError(f"{_CHANGED} there were {len(self.marks)} of them and are {now}")
        if changed and (flags := torch.stack([flag for _, flag in changed])).any():
            raise RuntimeError(f"{_CHANGED} {changed[int(flags.int().argmax())][0]} has other values")
        found = iter(sums)
        return (dq.to(q.dtype) if wanted[0] else None, *(next(found) if want else None for want in wanted[1:]))

    def _of_absorbed(self, dout, out, lse, absorbed, chunk, first_key, wanted, asked):
        made = [t for t in chunk[:2] if t is not None and t.requires_grad]
        bits = wanted + 2 * any(t is chunk[0] for t in made) + 4 * any(t is chunk[1] for t in made)
        if not bits:
            return None, [None] * len(asked)
        with torch.no_grad():
            _, backward = autograd.core_pair(self.state._choose(*chunk[:2]))
            numbers = self.state._numbers["scale"], self.state._numbers["eps"], bits, *self.state._dropout, first_key
            dq, *dparts = backward(dout, None, absorbed, *chunk, out, lse, *numbers)
        if not made:
            return dq, [None] * len(asked)
        gradients = [d for d, bit in zip(dparts, (2, 4), strict=True) if bits & bit]
        return dq, torch.autograd.grad(made, asked, gradients, allow_unused=True)

    def _of_projected(self, dout, out, lse, q, chunk, _, wanted, asked):
        """Through the chunk's own (o, l), computed again: d out / d o = exp(l - lse), d out / d l = exp(l - lse) (o - out)."""
        with torch.enable_grad():
            q = q.detach().requires_grad_(wanted)
            own, own_lse = self.state._attend(q, *chunk)
        inputs = [q] * wanted + asked
        if not own.requires_grad:
            return None, [None] * len(asked)
        with torch.no_grad():
            share = torch.where(lse == float("-inf"), 0.0, (own_lse - lse).exp())[..., None] * dout
            pairs = [(own, share), (own_lse, (share * (own - out)).sum(-1))]
        outputs, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        dq, *found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        return (dq, found) if wanted else (None, [dq, *found])


_CHANGED = "the second reading of chunks, for the gradient, differs from the first:"


def _refuse_gradient(name, tensor):
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} wants a gradient, which a LatentState does not keep: use ops.latent_attention_stream to train, or "
            "torch.no_grad()"
        )


def _equal(ours, theirs):
    if ours is theirs or ours is None or theirs is None:
        return ours is theirs
    same_kind = (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return same_kind and torch.equal(ours, theirs)


def _kind(x, position):
    return x.shape[0], x.shape[2], 0 if position is None else position.shape[1]


def _told(batch, width, shared):
    return f"batch {batch}, {width} channels" + (f" and {shared} of position" if shared else "")
