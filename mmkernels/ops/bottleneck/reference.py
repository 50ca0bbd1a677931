"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

For every modality m, with its T_m tokens and its view of the Z bottleneck tokens in a row, [x ; z]:

    S = scale [q_x ; q_z] [k_x ; k_z]^T      masked tokens are left out as keys
    [out_x ; out_z] = softmax(S) [v_x ; v_z]

Modalities never see each other: what they exchange passes through the bottleneck, in the layer around this op.
Low-precision inputs are computed in float32 and the result is rounded once.
"""

import torch


def bottleneck_attention(tokens_qkv, bottleneck_qkv, key_masks, scale, cls):
    """Lists of (B,T,H*D) and (B,Z,H*D) for lists of (B,T,3,H,D) and (B,Z,3,H,D); cls: of the tokens row 0 alone."""
    outputs = []
    for tokens, bottleneck, mask in zip(tokens_qkv, bottleneck_qkv, key_masks, strict=True):
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        length = tokens.shape[1]
        q, k, v = torch.cat([tokens, bottleneck], 1).to(dtype).unbind(2)  # (B, T + Z, H, D)
        if cls:
            q, length = q[:, :1], 1
        visible = None
        if mask is not None:
            visible = torch.cat([mask, mask.new_ones(mask.shape[0], bottleneck.shape[1])], 1)
            # Zeroed before they are used: 0 * NaN would leak what stands behind the mask.
            k, v = (torch.where(visible[:, :, None, None], t, 0.0) for t in (k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
            # A row without any key: no bottleneck, every token masked.
            scores = torch.where(visible.any(1)[:, None, None, None], scores, 0.0)
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2).to(tokens.dtype)
        outputs.append((out[:, :length], out[:, length:]))
    return [out for out, _ in outputs], [out for _, out in outputs]
