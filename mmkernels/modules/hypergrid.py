"""Linear layers whose weight is scaled block by block by gates of each example (HyperGrid, Tay et al. 2021)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops._shared.arguments import check_integer
from .backend import WithBackend, own_backend

# What makes the row factor (over the inputs) and the column factor (over the outputs): "L", the local state times a matrix;
# "G", a vector that all examples share; "", nothing: one block.
VARIANTS = {"L2": "LL", "LG": "LG", "GL": "GL", "GG": "GG", "row": ("L", ""), "column": ("", "L")}
ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class HyperGrid(WithBackend):
    """The gates of each example, S = sigmoid(r cᵀ), from its local state h (section 3).

        L2:  r = h L_r, c = h L_c      LG:  r = h L_r, c = G_c      GL:  r = G_r, c = h L_c      GG:  r = G_r, c = G_c
        row: r = h L_r, c = 1          column: r = 1, c = h L_c     (single-sided: the gates scale inputs or outputs alone)

    Parameters, as the variant needs them: `L_r` (S, R), `L_c` (S, C), `G_r` (R,), `G_c` (C,). They are normal, so that the
    factors of a state of mean square 1 have variance 1. (From zero r and c would have no gradient.)
    """

    def __init__(self, grid, state_features, *, variant="L2", backend="auto", device=None, dtype=None):
        super().__init__(backend)
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; allowed are {', '.join(map(repr, VARIANTS))}")
        self.grid, self.state_features, self.variant = check_grid(grid, variant), state_features, variant
        self.kinds = tuple(VARIANTS[variant])
        for kind, side, count in zip(self.kinds, "rc", self.grid, strict=True):
            if kind:
                shape = (state_features, count) if kind == "L" else (count,)
                setattr(self, f"{kind}_{side}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else self.state_features**-0.5)

    @property
    def is_local(self) -> bool:
        """Whether the gates depend on a state, and are an example's own."""
        return "L" in self.kinds

    def forward(self, state=None):
        """(G, S) -> gates (G, R, C), float32 or float64; (1, R, C) where no factor is local, whatever the state."""
        if self.is_local:
            self._check(state)
        row, column = (self._factor(kind, side, state) for kind, side in zip(self.kinds, "rc", strict=True))
        if self.backend == "eager":
            return torch.sigmoid(row[:, :, None] * column[:, None, :])
        return ops.hypergrid_gate(row, column, backend=own_backend(self.backend))

    def _factor(self, kind, side, state):
        """(G or 1, R or C). The gates of 16-bit models stay in float32, which costs nothing at their size."""
        if not kind:
            return next(self.parameters()).new_ones(1, 1, dtype=self._dtype())
        parameter = getattr(self, f"{kind}_{side}")
        return (state @ parameter if kind == "L" else parameter[None]).to(self._dtype())

    def _dtype(self):
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def _check(self, state):
        wanted = f"variant {self.variant!r} needs a tensor (G, {self.state_features})"
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"state is {'None' if state is None else f'a {type(state).__name__}'}; {wanted}")
        if state.dim() != 2 or state.shape[1] != self.state_features:
            raise ValueError(f"state has shape {tuple(state.shape)}; {wanted}")

    def extra_repr(self):
        return f"grid={self.grid}, state_features={self.state_features}, variant={self.variant!r}"


class HyperGridLinear(WithBackend):
    """`nn.Linear` with a weight that each example rescales block by block, without ever writing the rescaled weight.

        y[b, t, n] = sum_k (rho + S[b, k R // in, n C // out]) a(x)[b, t, k] weight[n, k] + bias[n]

    rho is 1 with `residual`, else 0, and a(x) = dropout(activation(x)). `weight` (out, in) and `bias` (out,) are those of
    `nn.Linear`, and so are their names; S comes from `hypergrid`, a `HyperGrid`. With a pretrained weight neither form begins
    as the identity: gates are around a half.

    Args:
        in_features, out_features: as in `nn.Linear`.
        grid: (R, C), blocks over the inputs and over the outputs, which they divide; (R, 1) for "row", (1, C) for "column".
        state_features: S, of the local state; default in_features.
        variant: "L2", "LG", "GL", "GG", "row" or "column"; see `HyperGrid`.
        residual: scales by 1 + S instead of S.
        bias: whether there is one.
        activation: of x: None, "relu", "gelu" (by erf) or "gelu_tanh".
        dropout: probability of dropping an element of activation(x), in training.
        backend: a backend of `ops.hypergrid_linear`, or "eager": plain PyTorch, which writes a weight for each gate.

    Raises ValueError or TypeError for sizes that are not positive, grids that do not divide, unknown names.
    """

    def __init__(
        self,
        in_features,
        out_features,
        grid,
        *,
        state_features=None,
        variant="L2",
        residual=False,
        bias=True,
        activation=None,
        dropout=0.0,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(backend)
        state_features = in_features if state_features is None else state_features
        for name, value in (("in_features", in_features), ("out_features", out_features), ("state_features", state_features)):
            check_integer(name, value)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
        factory = {"device": device, "dtype": dtype}
        self.hypergrid = HyperGrid(grid, state_features, variant=variant, backend=backend, **factory)
        for letter, count, side, size in zip(
            "RC", self.hypergrid.grid, ("in_features", "out_features"), (in_features, out_features), strict=True
        ):
            if size % count:
                raise ValueError(f"grid is {self.hypergrid.grid}; {letter} = {count} must divide {side} = {size}")
        self.in_features, self.out_features = in_features, out_features
        self.residual, self.activation, self.dropout = residual, activation, dropout
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **factory)) if bias else None)
        self._reset_linear()

    @classmethod
    def from_linear(cls, linear: nn.Linear, grid, **options):
        """A layer that takes over the parameters of `linear` (the same tensors, no copies), with new grids.

        `options` are the keyword arguments of the constructor but `bias`, `device` and `dtype`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be an nn.Linear")
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            grid,
            bias=bias is not None,
            device="meta",  # nothing is allocated only to be thrown away
            dtype=weight.dtype,
            **options,
        )
        layer.hypergrid.to_empty(device=weight.device).reset_parameters()
        layer.weight, layer.bias = weight, bias
        return layer.train(linear.training)

    def reset_parameters(self):
        self._reset_linear()
        self.hypergrid.reset_parameters()

    def _reset_linear(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as in nn.Linear
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def gate(self, state=None):
        """The gates of local states (G, S): (G, R, C), or (1, R, C) where no factor is local.

        `forward` takes them as `gate`: while an example is decoded they stay the same and are made once.
        """
        return self.hypergrid(state)

    def forward(self, x, state=None, *, gate=None, gate_index=None):
        """One layer.

        Args:
            x: (B, ..., in): examples, or packed rows (N, in) with `gate_index`.
            state: local states (G, S), with G = B unless there is a `gate_index`. Default: the first token of each
                example, x[:, 0] (rows (B, in) are examples of one token), which needs S = in.
            gate: what `gate(state)` returned, in place of a state.
            gate_index: int32 or int64, the number of the state (or gate) of each example, (B,), or of each row, x.shape[:-1].

        Returns (B, ..., out).

        Raises ValueError or TypeError for states and gates of wrong sizes, both or neither where one is needed, and whatever
        `ops.hypergrid_linear` raises.
        """
        if gate is None:
            if state is None and self.hypergrid.is_local:
                if gate_index is not None:
                    raise ValueError("gate_index is given; it needs the states or the gates that it numbers")
                state = self._first_token(x)
            gate = self.gate(state)
        elif state is not None:
            raise ValueError("state and gate are given; at most one of them may be")
        dropout = self.dropout if self.training else 0.0
        if self.backend == "eager":
            return self._eager(x, gate, gate_index, dropout)
        return ops.hypergrid_linear(
            x,
            self.weight,
            gate,
            self.bias,
            gate_index=gate_index,
            residual=self.residual,
            activation=self.activation,
            dropout_p=dropout,
            backend=own_backend(self.backend),
        )

    def _first_token(self, x):
        features = self.hypergrid.state_features
        if x.shape[-1] != features:
            raise ValueError(
                f"state is None; that takes the first token of x, which has shape {tuple(x.shape)} and not the width "
                f"state_features, {features}"
            )
        return x if x.dim() < 3 else x.flatten(1, -2)[:, 0]

    def _eager(self, x, gate, gate_index, dropout):
        """Writes the weight of every gate."""
        gates, rows, columns = gate.shape
        x = F.dropout(ACTIVATIONS[self.activation](x), dropout)
        factor = (gate + self.residual).to(self.weight.dtype).transpose(1, 2)[:, :, None, :, None]
        weight = self.weight.view(columns, self.out_features // columns, rows, self.in_features // rows) * factor
        weight = weight.view(gates, self.out_features, self.in_features)
        if gate_index is None and gates == 1:
            return F.linear(x, weight[0], self.bias)
        if gate_index is None or gate_index.shape == x.shape[:1] != x.shape[:-1]:  # a weight of each example
            weight = weight if gate_index is None else weight[gate_index]
            y = torch.bmm(x.reshape(x.shape[0], -1, self.in_features), weight.transpose(1, 2)).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        ones = [F.linear(x[gate_index == i], one, self.bias) for i, one in enumerate(weight)]
        order = torch.cat([(gate_index == i).flatten().nonzero()[:, 0] for i in range(gates)])
        return torch.cat(ones)[order.argsort()].view(*x.shape[:-1], -1)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"residual={self.residual}, activation={self.activation!r}, dropout={self.dropout}, backend={self.backend!r}"
        )


def check_grid(grid, variant="L2") -> tuple:
    """(R, C) as a tuple; raises ValueError unless both are positive integers and fit the variant."""
    if not isinstance(grid, (list, tuple)) or len(grid) != 2:
        raise ValueError(f"grid is {grid!r}; it must be a pair (R, C)")
    for name, count, kind in zip(("grid[0]", "grid[1]"), grid, VARIANTS[variant], strict=True):
        check_integer(name, count)
        if not kind and count != 1:
            raise ValueError(f"{name} is {count}; with variant {variant!r} it must be 1")
    return tuple(grid)
