"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

    xn = LayerNorm([x ; position])        K = xn Wk^T + bk        V = xn Wv^T + bv
    out_h = dropout(softmax(scale Q_h K_h^T)) V_h          (Perceiver, Jaegle et al. 2021, section 3.1)

`latent_attention` is the plain form; `core` is the part that the kernels compute in the absorbed form.
"""

import torch


def latent_attention(
    q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale, keep, dropout_p
):
    """q (B|1,N,H*D), x (B,M,Cx), w_k (H*D,C), w_v (H*E,C), position (M,C-Cx), keep bool (B,H,N,M) or None -> (B,N,H*E)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_dtype = x.dtype
    q, w_k, w_v = q.to(dtype), w_k.to(dtype), w_v.to(dtype)
    xn = normalise(x.to(dtype), None if position is None else position.to(dtype), key_mask, eps)
    if norm_weight is not None:
        xn = xn * norm_weight.to(dtype)
    if norm_bias is not None:
        xn = xn + norm_bias.to(dtype)
    k, v = xn @ w_k.T, xn @ w_v.T
    if b_k is not None:
        k = k + b_k.to(dtype)
    if b_v is not None:
        v = v + b_v.to(dtype)
    q, k, v = (torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    probabilities = masked_softmax(scores, None if key_mask is None else key_mask[:, None, None, :])[0]
    if keep is not None:
        probabilities = probabilities * keep / (1.0 - dropout_p)
    return (probabilities @ v).transpose(1, 2).flatten(2).to(out_dtype)


def core(q, x, position, key_mask, scale, eps, keep=None):
    """softmax(scale q xhat^T) xhat and the lse, float32 at least, for absorbed q (B|1,R,C); see csrc/schemas.h.

    `keep` (B,R,M) or None is what dropout multiplies the weights by.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    xhat = normalise(x.to(dtype), None if position is None else position.to(dtype), key_mask, eps)
    scores = (q.to(dtype) * scale) @ xhat.transpose(-1, -2)
    probabilities, lse = masked_softmax(scores, None if key_mask is None else key_mask[:, None, :])
    if keep is None:
        return probabilities @ xhat, lse
    probabilities = probabilities * keep
    return torch.cat([probabilities @ xhat, probabilities.sum(-1, keepdim=True)], -1), lse


def core_backward(dout, dlse, q, x, position, key_mask, out, lse, scale, eps, wanted, keep=None):
    """`latent_bwd`: the gradients of `core` from its results, which may be those of a longer input that `x` is a part of."""
    dtype = out.dtype
    inputs = [
        None if t is None else t.detach().to(dtype).requires_grad_(bool(wanted & bit))
        for t, bit in ((q, 1), (x, 2), (position, 4))
    ]
    with torch.enable_grad():
        xhat = normalise(*inputs[1:], key_mask, eps)
        scores = (inputs[0] * scale) @ xhat.transpose(-1, -2)
    probabilities = (scores.detach() - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    if key_mask is not None:
        probabilities = probabilities.masked_fill(~key_mask[:, None, :], 0.0)
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse)
    if keep is None:
        dweights, kept = dout @ xhat.detach().transpose(-1, -2), probabilities
    else:
        dout, dsum = dout[..., :-1], dout[..., -1:]
        dweights, kept = (dout @ xhat.detach().transpose(-1, -2) + dsum) * keep, probabilities * keep
    dscores = probabilities * (dweights - delta[..., None])
    outputs, cotangents = [scores], [torch.where(probabilities > 0.0, dscores, 0.0)]
    if xhat.requires_grad:
        outputs, cotangents = [*outputs, xhat], [*cotangents, kept.transpose(-1, -2) @ dout]
    asked = [t for t in inputs if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, asked, cotangents) if asked else ())
    return tuple(
        q.new_empty(0) if t is None or not t.requires_grad else next(gradients).to(like.dtype)
        for t, like in zip(inputs, (q, x, position), strict=True)
    )


def normalise(x, position, key_mask, eps):
    """LayerNorm without affine over the channels of [x ; position]; masked rows become zeros; eps < 0 leaves out the norm."""
    if position is not None:
        x = torch.cat([x, position.expand(x.shape[0], -1, -1)], -1)
    if key_mask is not None:
        # Zeroed before they are used: 0 * NaN would leak what stands behind the mask.
        x = torch.where(key_mask[..., None], x, 0.0)
    return x if eps < 0 else torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def masked_softmax(scores, visible):
    """(softmax, lse) over the last dimension; a row without keys gives zeros and -inf."""
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return weights / total, (total.log() + top).squeeze(-1)
