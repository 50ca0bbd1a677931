"""Encoders of several modalities that meet in a few bottleneck tokens (MBT, Nagrani et al. 2021), and the fusions beside it.

Two ways through the same weights. The plain one, `backend="eager"`, concatenates [x_m ; z] and runs `EncoderBlock.forward`.
All others make few passes over the rows: layer norms read tokens and bottleneck where they lie and write them as one, add a
residual branch and the bias of the linear layer that made it on the way, GELU adds its bias, and one launch attends for all
modalities.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops._shared.arguments import check_key_mask
from .backend import WithBackend, eager_attention, own_backend

ROWS = ("all", "cls")
UPDATES = ("mean", "sequential")
FUSIONS = ("bottleneck", "cross", "shared", "none")


class EncoderBlock(nn.Module):
    """The weights of one modality in one layer: a pre-norm transformer block with the tanh form of GELU.

        u = x + Drop(MHSA(LN1(x)))      y = u + Drop(W2 Drop(GELU(W1 LN2(u))))

    `forward` is plain PyTorch; the layers below compute the same from the sub-modules' weights.

    Stochastic depth drops each of the two branches for a whole example with probability `stochastic_depth` in training. What
    is kept is not rescaled.
    """

    def __init__(
        self, channels, num_heads, mlp_channels, *, dropout=0.0, stochastic_depth=0.0, eps=1e-6, device=None, dtype=None
    ):
        super().__init__()
        self.num_heads, self.dropout, self.stochastic_depth = num_heads, dropout, stochastic_depth
        factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(channels, eps=eps, **factory)
        self.qkv = nn.Linear(channels, 3 * channels, **factory)
        self.proj = nn.Linear(channels, channels, **factory)
        self.norm2 = nn.LayerNorm(channels, eps=eps, **factory)
        self.fc1 = nn.Linear(channels, mlp_channels, **factory)
        self.fc2 = nn.Linear(mlp_channels, channels, **factory)

    def forward(self, x, key_mask=None):
        """(B, N, D) -> (B, N, D); `key_mask` bool (B, N), True where a row may be attended."""
        keep1, keep2 = self.draw(x)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.branch(self.proj(eager_attention(q, k, v, self.num_heads, key_mask)), keep1)
        return x + self.branch(self.fc2(self.activate(self.fc1(self.norm2(x)))), keep2)

    def draw(self, x):
        """What stochastic depth keeps of the two branches: bool (B, 1, 1) each, or None for everything."""
        if not self.training or self.stochastic_depth == 0.0:
            return None, None
        return (torch.rand(2, x.shape[0], 1, 1, device=x.device) >= self.stochastic_depth).unbind()

    def activate(self, x):
        return F.dropout(F.gelu(x, approximate="tanh"), self.dropout, self.training)

    def branch(self, x, keep):
        x = F.dropout(x, self.dropout, self.training)
        return x if keep is None else x * keep

    def extra_repr(self):
        return f"num_heads={self.num_heads}, dropout={self.dropout}, stochastic_depth={self.stochastic_depth}"


# --- A block in few passes --------------------------------------------------------------------------------------------------
# `rows` is a list of one or two tensors, such as [x_m] or [x_m, z], which stand behind each other in what is computed.


def _norm(norm, rows, backend, **residual):
    """LN(rows) as one tensor; with a residual (LN(rows + residual), rows + residual)."""
    rows = rows[0] if len(rows) == 1 else tuple(rows)
    return ops.film_layer_norm(rows, norm.weight, norm.bias, eps=norm.eps, backend=own_backend(backend), **residual)


def _linear(rows, weights, biases, backend):
    """Linear layers of the modalities, each on its own rows, in one pass."""
    return ops.linear(rows, weights, biases, backend=backend if backend in ("cpp", "reference") else "auto")


def _projections(blocks, rows, backend, first=0, last=3):
    """Queries, keys and values, or those numbered `first` to `last` - 1: (B, N, last - first, H, D) of normalised rows."""
    weights, biases = [block.qkv.weight for block in blocks], [block.qkv.bias for block in blocks]
    if last - first < 3:
        size = blocks[0].qkv.in_features
        weights, biases = ([p[first * size : last * size] for p in side] for side in (weights, biases))
    out = _linear(rows, weights, biases, backend)
    return [torch.unflatten(y, -1, (last - first, block.num_heads, -1)) for y, block in zip(out, blocks, strict=True)]


def _finish(blocks, sources, attended, keeps, backend):
    """From the attention's outputs (B, N, D), a list that is emptied, to those of the blocks. In inference nothing outlives
    its use."""
    dropping = [
        keep[0] is not None or (block.training and block.dropout > 0.0) for block, keep in zip(blocks, keeps, strict=True)
    ]
    biases = [block.proj.bias if drop else None for block, drop in zip(blocks, dropping, strict=True)]
    branches = _linear(attended, [block.proj.weight for block in blocks], biases, backend)
    attended.clear()
    normed, sums = [], []
    for block, rows, keep, drop in zip(blocks, sources, keeps, dropping, strict=True):
        branch = block.branch(branches.pop(0), keep[0])
        # The norm adds the bias where nothing is dropped between the two.
        results = _norm(block.norm2, rows, backend, residual=branch, residual_bias=None if drop else block.proj.bias)
        normed.append(results[0])
        sums.append(results[1])
    del branch, results
    hidden = _linear(normed, [block.fc1.weight for block in blocks], None, backend)
    normed.clear()
    for i, block in enumerate(blocks):
        hidden[i] = ops.bias_gelu(hidden[i], block.fc1.bias, backend=own_backend(backend))
        hidden[i] = F.dropout(hidden[i], block.dropout, block.training)
    out = _linear(hidden, [block.fc2.weight for block in blocks], [block.fc2.bias for block in blocks], backend)
    hidden.clear()
    return [sums.pop(0) + block.branch(out.pop(0), keep[1]) for block, keep in zip(blocks, keeps, strict=True)]


def _attend(queries, segments, masks, backend):
    """Every one of the queries (B, N, H, D) to its segments of keys and values (B, T_i, 2, H, D), all in one launch.

    `masks` has one or None for each segment. Returns (B, N, H D) each.
    """
    ks, vs, given = [], [], []
    for one, own in zip(segments, masks, strict=True):
        if len(one) > 2:  # more than a problem takes
            one, own = [torch.cat(one, 1)], [_joined_masks([segment.shape[:2] for segment in one], own)]
        k, v = (tuple(segment[:, :, i].transpose(1, 2) for segment in one) for i in range(2))
        ks, vs, given = [*ks, k], [*vs, v], [*given, tuple(own)]
    ks, vs, given = ([one if len(one) == 2 else one[0] for one in side] for side in (ks, vs, given))
    out = ops.attention([q.transpose(1, 2) for q in queries], ks, vs, key_mask=given, backend=backend)
    return [one.transpose(1, 2).flatten(2) for one in out]


def _joined_masks(shapes, masks):
    """One mask over segments that lie behind each other, or None where nothing is masked."""
    masks = list(masks)
    given = next((mask for mask in masks if mask is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_ones(shape) if m is None else m for shape, m in zip(shapes, masks, strict=True)], 1)


# --- Layers ------------------------------------------------------------------------------------------------------------------


class ModalityLayer(WithBackend):
    """One `EncoderBlock` for every modality, in `blocks[name]`; or one for all of them, in `blocks["shared"]`.

    The layers take their sub-modules' weights and do not call all of them: shard (FSDP) or hook a layer as a whole.

    Args:
        modalities: their names, 1 to 8.
        channels: D.
        num_heads: H; it divides D.
        mlp_channels: of the MLP's hidden layer; default 4 D.
        share_weights: one block for all modalities.
        dropout: probability of dropping an element of what each linear but the first adds, and of the MLP's hidden layer.
        stochastic_depth: see `EncoderBlock`.
        eps: of the layer norms.
        backend: a backend of `ops.bottleneck_attention` and `ops.attention`, or "eager": plain PyTorch with SDPA.

    Raises ValueError for sizes that are not positive, heads that do not divide D, unfit names and probabilities.
    """

    def __init__(
        self,
        modalities,
        channels,
        *,
        num_heads=12,
        mlp_channels=None,
        share_weights=False,
        dropout=0.0,
        stochastic_depth=0.0,
        eps=1e-6,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(backend)
        mlp_channels = 4 * channels if mlp_channels is None else mlp_channels
        for name, value in {"channels": channels, "num_heads": num_heads, "mlp_channels": mlp_channels}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be positive")
        if channels % num_heads:
            raise ValueError(f"channels is {channels}; it must be a multiple of num_heads, {num_heads}")
        for name, value in {"dropout": dropout, "stochastic_depth": stochastic_depth}.items():
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}; it must be in [0, 1)")
        self.modalities, self.channels, self.share_weights = _modality_names(modalities), channels, share_weights
        self.blocks = nn.ModuleDict()
        for name in ("shared",) if share_weights else self.modalities:
            self.blocks[name] = EncoderBlock(
                channels,
                num_heads,
                mlp_channels,
                dropout=dropout,
                stochastic_depth=stochastic_depth,
                eps=eps,
                device=device,
                dtype=dtype,
            )

    def block(self, name: str) -> EncoderBlock:
        return self.blocks["shared" if self.share_weights else name]

    def extra_repr(self):
        return f"modalities={self.modalities}, share_weights={self.share_weights}, backend={self.backend!r}"


class BottleneckFusionLayer(ModalityLayer):
    """Every modality attends to its own tokens and to the bottleneck, which is all they have in common (section 3.2).

        mean:        [x_m ; z_m] = Block_m([x_m ; z]) for every m,  z <- mean_m z_m          (equations 8 and 9)
        sequential:  [x_m ; z] <- Block_m([x_m ; z]) for one m after the other, in the order of `modalities`

    The bottleneck has neither mask nor positions. Without one the layer is a block of every modality by itself.

    Args: those of `ModalityLayer`, and
        update: "mean" or "sequential".
    """

    def __init__(self, modalities, channels, *, update="mean", **options):
        super().__init__(modalities, channels, **options)
        if update not in UPDATES:
            raise ValueError(f"update is {update!r}; allowed are {', '.join(map(repr, UPDATES))}")
        self.update = update

    def forward(self, tokens, bottleneck=None, *, key_masks=None, rows="all"):
        """One layer.

        Args:
            tokens: {modality: (B, T_m, D)}; a modality of the layer may be missing, and then takes no part.
            bottleneck: (B, Z, D), (1, Z, D) shared by the batch, or None.
            key_masks: None, or {modality: bool (B, T_m) or None}, True where a token may be attended.
            rows: "all"; or "cls", only row 0 of each modality, and no bottleneck: the exact part of a last layer that a
                classifier on the CLS tokens reads.

        Returns:
            ({modality: (B, T_m, D), or (B, 1, D) for "cls"}, bottleneck (B, Z, D) or None).

        Raises ValueError or TypeError for unknown modalities, misshapen tokens, bottleneck or masks.
        """
        tokens, masks = _checked(self.modalities, self.channels, tokens, key_masks, rows)
        _check_bottleneck(bottleneck, tokens, self.channels)
        if self.update == "mean" or bottleneck is None:
            return self._step(tokens, bottleneck, masks, rows, last=True)
        results = {}
        for i, name in enumerate(tokens):
            last = i == len(tokens) - 1
            one, bottleneck = self._step({name: tokens[name]}, bottleneck, {name: masks[name]}, rows, last)
            results |= one
        return results, bottleneck

    def _step(self, tokens, bottleneck, masks, rows, last):
        """All `tokens` from the same bottleneck; `last` says that with rows="cls" nobody reads the new bottleneck."""
        keep = bottleneck is not None and not (rows == "cls" and last)
        if bottleneck is not None:
            bottleneck = bottleneck.expand(next(iter(tokens.values())).shape[0], -1, -1)
        outputs = (self._plain if self.backend == "eager" else self._fused)(tokens, bottleneck, masks, rows, keep)
        if not keep:
            return dict(zip(tokens, outputs, strict=True)), None
        pairs = [y.split([y.shape[1] - bottleneck.shape[1], bottleneck.shape[1]], 1) for y in outputs]
        bottlenecks = [z for _, z in pairs]
        new = sum(bottlenecks[1:], bottlenecks[0]) / len(bottlenecks)
        return dict(zip(tokens, (x for x, _ in pairs), strict=True)), new

    def _fused(self, tokens, bottleneck, masks, rows, keep):
        """The rows that are asked for, of each modality, and those of the bottleneck behind them if `keep`."""
        blocks, x = [self.block(name) for name in tokens], list(tokens.values())
        keeps = [block.draw(one) for block, one in zip(blocks, x, strict=True)]
        shared = [] if bottleneck is None else [bottleneck]
        sources = [[one, *shared] for one in x]
        normed = [_norm(block.norm1, one, self.backend) for block, one in zip(blocks, sources, strict=True)]
        masks = [
            _joined_masks([t.shape[:2] for t in one], [mask, *(None for _ in shared)])
            for mask, one in zip(masks.values(), sources, strict=True)
        ]
        if rows == "all":
            attended = self._attend_all(blocks, normed, masks)
        else:
            kept = [one[:, :1] for one in normed]
            if keep:
                rows_of_z = [n[:, one.shape[1] :] for n, one in zip(normed, x, strict=True)]
                kept = [torch.cat(pair, 1) for pair in zip(kept, rows_of_z, strict=True)]
            queries = [one[:, :, 0] for one in _projections(blocks, kept, self.backend, 0, 1)]
            segments = [[one] for one in _projections(blocks, normed, self.backend, 1)]
            attended = _attend(queries, segments, [[mask] for mask in masks], self.backend)
            sources = [[one[:, :1], *(shared if keep else [])] for one in x]
            del normed, queries, segments, kept
        return _finish(blocks, sources, attended, keeps, self.backend)

    def _attend_all(self, blocks, normed, masks):
        """Self-attention of every modality's rows, (B, N, D) each. Empties `normed`: what is not needed later is not kept."""
        qkv = _projections(blocks, normed, self.backend)
        normed.clear()
        attended, _ = ops.bottleneck_attention(
            qkv,
            [one.detach()[:, :0] for one in qkv],  # its rows are among the tokens already
            key_masks=None if all(mask is None for mask in masks) else masks,
            backend=self.backend,
        )
        return attended

    def _plain(self, tokens, bottleneck, masks, rows, keep):
        """The same, in plain PyTorch."""
        outputs = []
        for name, x in tokens.items():
            length, mask = x.shape[1], masks[name]
            if bottleneck is not None:
                mask = _joined_masks([x.shape[:2], bottleneck.shape[:2]], [mask, None])
                x = torch.cat([x, bottleneck], 1)
            x = self.block(name)(x, mask)
            parts = [x[:, :1] if rows == "cls" else x[:, :length], *([x[:, length:]] if keep else [])]
            outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1) if rows == "cls" else x)
        return outputs


class CrossModalLayer(ModalityLayer):
    """Every modality attends to the tokens of all modalities, through its own weights: Block_m([others ; x_m]), x_m's rows.

    Only the rows that are kept are computed; the released code computes all of them. The order of the others changes nothing.
    """

    def forward(self, tokens, *, key_masks=None, rows="all"):
        """{modality: (B, T_m, D)} -> the same, or (B, 1, D) for rows="cls"; arguments as in `BottleneckFusionLayer`."""
        tokens, masks = _checked(self.modalities, self.channels, tokens, key_masks, rows)
        names = list(tokens)
        blocks = [self.block(name) for name in names]
        if self.backend == "eager":
            results = {}
            for name, block in zip(names, blocks, strict=True):
                order = [*(other for other in names if other != name), name]
                mask = _joined_masks([tokens[n].shape[:2] for n in order], [masks[n] for n in order])
                kept = block(torch.cat([tokens[n] for n in order], 1), mask)[:, -tokens[name].shape[1] :]
                results[name] = kept[:, :1] if rows == "cls" else kept
            return results
        keeps = [block.draw(tokens[name]) for name, block in zip(names, blocks, strict=True)]
        x = [tokens[name][:, :1] if rows == "cls" else tokens[name] for name in names]
        normed = [[_norm(block.norm1, [tokens[n]], self.backend) for n in names] for block in blocks]
        everywhere = [block for block in blocks for _ in names]
        keys = _projections(everywhere, [one for own in normed for one in own], self.backend, 1)
        segments = [keys[i : i + len(names)] for i in range(0, len(keys), len(names))]
        own = [normed[i][i][:, : one.shape[1]] for i, one in enumerate(x)]
        queries = [one[:, :, 0] for one in _projections(blocks, own, self.backend, 0, 1)]
        attended = _attend(queries, segments, [list(masks.values())] * len(names), self.backend)
        return dict(zip(names, _finish(blocks, [[one] for one in x], attended, keeps, self.backend), strict=True))


class JointLayer(ModalityLayer):
    """All modalities as one sequence through one block. `share_weights` must be True."""

    def __init__(self, modalities, channels, *, share_weights=True, **options):
        if not share_weights:
            raise ValueError("share_weights is False; one sequence of all modalities must share them")
        super().__init__(modalities, channels, share_weights=True, **options)

    def forward(self, x, *, key_mask=None, queries=None):
        """(B, N, D) -> (B, N, D), or (B, Q, D): the rows numbered in the list `queries`. `key_mask` bool (B, N)."""
        block = self.blocks["shared"]
        if self.backend == "eager":
            return _pick(block(x, key_mask), queries)
        keeps = block.draw(x)
        normed = _norm(block.norm1, [x], self.backend)
        if queries is None:
            (qkv,) = _projections([block], [normed], self.backend)
            masks = None if key_mask is None else [key_mask]
            (attended,), _ = ops.bottleneck_attention([qkv], [qkv.detach()[:, :0]], key_masks=masks, backend=self.backend)
        else:
            (q,) = _projections([block], [_pick(normed, queries)], self.backend, 0, 1)
            (kv,) = _projections([block], [normed], self.backend, 1)
            (attended,) = _attend([q[:, :, 0]], [[kv]], [[key_mask]], self.backend)
        return _finish([block], [[_pick(x, queries)]], [attended], [keeps], self.backend)[0]


def _pick(x, rows):
    return x if rows is None else torch.stack([x[:, row] for row in rows], 1)


class MultimodalEncoder(nn.Module):
    """Layers of every modality by itself up to `fusion_layer`, then layers that fuse them, and one layer norm for all.

    Args:
        modalities: their names, 1 to 8.
        channels: D.
        num_layers: L.
        fusion_layer: L_f, the first layer that fuses: 0 is early fusion, L is late.
        fusion: "bottleneck"; "cross", see `CrossModalLayer`; "shared", one sequence of all tokens, in the order of
            `modalities`, for which `share_weights` must be True; "none".
        update: of the bottleneck, "mean" or "sequential".
        num_bottlenecks: Z, the rows of the parameter `bottleneck` (1, Z, D). It exists where it is used: fusion="bottleneck",
            two or more modalities, L_f < L.
        test_with_bottlenecks: False: in evaluation the fusing layers are layers of every modality by itself.
        stochastic_depth: the drop probability of the last layer; that of layer l is l / (L - 1) times it.
        num_heads, mlp_channels, share_weights, dropout, eps, backend: of every layer, see `ModalityLayer`.

    Raises ValueError as the layers do, and for layer numbers and names that do not fit.
    """

    def __init__(
        self,
        modalities,
        channels,
        num_layers,
        *,
        fusion_layer=0,
        fusion="bottleneck",
        update="mean",
        num_bottlenecks=4,
        test_with_bottlenecks=True,
        num_heads=12,
        mlp_channels=None,
        share_weights=False,
        dropout=0.0,
        stochastic_depth=0.0,
        eps=1e-6,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        modalities = _modality_names(modalities)
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; it must be positive")
        if not 0 <= fusion_layer <= num_layers:
            raise ValueError(f"fusion_layer is {fusion_layer}; it must be from 0 to num_layers, {num_layers}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; allowed are {', '.join(map(repr, FUSIONS))}")
        if fusion == "shared" and not share_weights:
            raise ValueError("share_weights is False; fusion='shared' needs it True")
        if not 1 <= num_bottlenecks <= 1024:
            raise ValueError(f"num_bottlenecks is {num_bottlenecks}; it must be from 1 to 1024")
        self.modalities, self.channels, self.fusion_layer = modalities, channels, fusion_layer
        self.test_with_bottlenecks = test_with_bottlenecks
        kinds = {
            "bottleneck": BottleneckFusionLayer,
            "cross": CrossModalLayer,
            "shared": JointLayer,
            "none": BottleneckFusionLayer,
        }
        self.layers = nn.ModuleList()
        for i in range(num_layers):
            kind = kinds[fusion] if i >= fusion_layer else BottleneckFusionLayer
            self.layers.append(
                kind(
                    modalities,
                    channels,
                    num_heads=num_heads,
                    mlp_channels=mlp_channels,
                    share_weights=share_weights,
                    dropout=dropout,
                    stochastic_depth=stochastic_depth * i / max(num_layers - 1, 1),
                    eps=eps,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                    **({"update": update} if kind is BottleneckFusionLayer else {}),
                )
            )
        used = fusion == "bottleneck" and len(modalities) > 1 and fusion_layer < num_layers
        self.bottleneck = None
        if used:
            self.bottleneck = nn.Parameter(torch.empty(1, num_bottlenecks, channels, device=device, dtype=dtype))
            nn.init.normal_(self.bottleneck, std=0.02)
        self.norm = nn.LayerNorm(channels, eps=eps, device=device, dtype=dtype)

    def forward(self, tokens, *, key_masks=None, rows="all"):
        """Encodes the modalities that are there.

        Args:
            tokens: {modality: (B, T_m, D)}, positions added; those of the encoder, any but none may be missing.
            key_masks: None, or {modality: bool (B, T_m) or None}, True where a token may be attended.
            rows: "all"; or "cls", only row 0 of each modality, for which the last layer computes nothing else.

        Returns:
            {modality: (B, T_m, D), or (B, 1, D) for "cls"}, normalised.
        """
        tokens, masks = _checked(self.modalities, self.channels, tokens, key_masks, rows)
        bottleneck = self.bottleneck if self.training or self.test_with_bottlenecks else None
        lengths = [x.shape[1] for x in tokens.values()]
        joint = None
        for i, layer in enumerate(self.layers):
            wanted = rows if i == len(self.layers) - 1 else "all"
            if isinstance(layer, CrossModalLayer):
                tokens = layer(tokens, key_masks=masks, rows=wanted)
            elif isinstance(layer, JointLayer):
                if joint is None:
                    joint = torch.cat(list(tokens.values()), 1)
                    mask = _joined_masks([x.shape[:2] for x in tokens.values()], masks.values())
                    starts = [sum(lengths[:m]) for m in range(len(lengths))]
                joint = layer(joint, key_mask=mask, queries=starts if wanted == "cls" else None)
            elif i < self.fusion_layer or bottleneck is None:
                tokens, _ = layer(tokens, key_masks=masks, rows=wanted)
            else:
                tokens, bottleneck = layer(tokens, bottleneck, key_masks=masks, rows=wanted)
        if joint is not None:
            tokens = dict(zip(tokens, joint.split(len(lengths) * [1] if rows == "cls" else lengths, 1), strict=True))
        return {name: self.norm(x) for name, x in tokens.items()}


# --- Checks ------------------------------------------------------------------------------------------------------------------


def _modality_names(modalities):
    names = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if not 1 <= len(names) <= 8 or len(set(names)) != len(names):
        raise ValueError(f"modalities is {modalities!r}; it must be 1 to 8 different names")
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f"modalities has {name!r}; a name must be a Python identifier that nn.ModuleDict does not use")
    return names


def _checked(modalities, channels, tokens, key_masks, rows):
    """Validates; returns tokens and masks in the order of `modalities`, masks with None where there is none."""
    tokens = check_modalities("tokens", modalities, tokens)
    for name, x in tokens.items():
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[2] != channels:
            raise ValueError(f"tokens[{name!r}] has {shape_or_type(x)}; it must be a tensor (B, T, {channels})")
        if rows == "cls" and x.shape[1] == 0:
            raise ValueError(f"tokens[{name!r}] has no rows; rows='cls' needs the row of a CLS token")
    first = next(iter(tokens))
    for name, x in tokens.items():
        if x.shape[0] != tokens[first].shape[0]:
            raise ValueError(
                f"tokens[{name!r}] has batch {x.shape[0]}; it must be that of {first!r}, {tokens[first].shape[0]}"
            )
    if rows not in ROWS:
        raise ValueError(f"rows is {rows!r}; allowed are {', '.join(map(repr, ROWS))}")
    masks = dict.fromkeys(tokens)
    if key_masks is not None:
        if not isinstance(key_masks, dict):
            raise TypeError(f"key_masks is a {type(key_masks).__name__}; it must be a dict from modality to mask, or None")
        for name, mask in key_masks.items():
            if name not in tokens:
                raise ValueError(f"key_masks has {name!r}; allowed are the modalities of the tokens: {_listed(tokens)}")
            check_mask(name, mask, tokens[name])
            masks[name] = mask
    return tokens, masks


def check_mask(name, mask, tokens):
    """Raises unless `mask`, that of the modality `name`, is None or a bool tensor for the `tokens` (B, T, D)."""
    if mask is not None:
        check_key_mask(mask, *tokens.shape[:2], tokens.device, f"key_masks[{name!r}]")


def check_modalities(argument, modalities, values):
    """`values` in the order of `modalities`; raises unless it is a dict of some of them."""
    if not isinstance(values, dict):
        raise TypeError(f"{argument} is a {type(values).__name__}; it must be a dict from modality to tensor")
    for name in values:
        if name not in modalities:
            raise ValueError(f"{argument} has {name!r}; allowed are {_listed(modalities)}")
    if not values:
        raise ValueError(f"{argument} is empty; it must have one or more of {_listed(modalities)}")
    return {name: values[name] for name in modalities if name in values}


def _check_bottleneck(bottleneck, tokens, channels):
    if bottleneck is None:
        return
    batch = next(iter(tokens.values())).shape[0]
    good = isinstance(bottleneck, torch.Tensor) and bottleneck.dim() == 3
    if not good or bottleneck.shape[0] not in (1, batch) or bottleneck.shape[2] != channels:
        raise ValueError(
            f"bottleneck has {shape_or_type(bottleneck)}; it must be a tensor ({batch} or 1, Z, {channels}), or None"
        )


def shape_or_type(x):
    """What was given in place of a tensor of another shape."""
    return f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"type {type(x).__name__}"


def _listed(names):
    return ", ".join(map(repr, names))
