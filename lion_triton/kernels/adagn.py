"""Adaptive group norm, channels last: group norm, then a style's scale and shift, then SiLU, in one op.

Forward, per cloud and with the statistics of a group over its n = P C / G elements:

    xhat = (x - mean) rstd,   mean = sum x / n,   rstd = (sum (x - mean)^2 / n + eps)^(-1/2)
    z    = (weight xhat + bias) scale + shift  =  a (x - mean) + c
    y    = silu(z) = z sigmoid(z)   or   z

Backward, with dz the gradient of z, s1 = sum_P dz and s2 = sum_P dz xhat per cloud and channel:

    dscale = weight s2 + bias s1            dweight = sum_B scale s2
    dshift = s1                             dbias   = sum_B scale s1
    dx     = rstd (weight scale dz - m1 - xhat m2),   m_i = group sum of weight scale s_i, over n

Legend: B clouds, P positions (all dimensions between the first and the last), C channels, G groups.
The variance is biased and two-pass, never E[x^2] - E[x]^2: that form, which torch's own channels-last group
norm uses on a CPU, loses all digits once the mean is a few thousand standard deviations.
Statistics and arithmetic are float32 (float64 for float64 x). Deterministic, backward too.
Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1 to 7, with LION's style modulation.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lion_triton.kernels._checks import Impl, check_float, reference_only

Activation = Literal["silu"] | None


def adagn_reference(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"] | None,
    shift: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
) -> Float[Tensor, "B *P C"]:
    """Plain PyTorch form of :func:`adagn`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if scale is None or shift is None:
        scale, shift = torch.ones_like(weight)[None], torch.zeros_like(bias)[None]
    scale, shift = scale.to(dtype).expand(len(x), -1), shift.to(dtype).expand(len(x), -1)
    return _AdaGN.apply(x, scale, shift, weight.to(dtype), bias.to(dtype), num_groups, eps, act)


def adagn(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"] | None,
    shift: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B *P C"]:
    """``act((group_norm(x) * weight + bias) * scale + shift)`` with group statistics per cloud.

    x: (B, ..., C) with any number of position dimensions, none included; any floating dtype, which is also
        the dtype of the result. Group g is channels g C/G to (g + 1) C/G - 1, over all positions.
    scale, shift: (B, C), the style; both None is plain group norm.
    weight, bias: (C,). eps is added to the variance. act: "silu" or None.
    Differentiable, once, in all five tensors. ValueError: shapes, dtypes or devices that do not fit; C not a
    multiple of num_groups; only one of scale and shift; an unknown act.
    """
    check_float("x", x)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected a non-empty shape (B, ..., C), got {tuple(x.shape)}")
    B, C = x.shape[0], x.shape[-1]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups: expected a divisor of C = {C}, got {num_groups}")
    if (scale is None) != (shift is None):
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{missing}: expected a tensor because {given} is one, got None")
    if scale is not None and shift is not None:
        _check_shape("scale", scale, (B, C), x)
        _check_shape("shift", shift, (B, C), x)
    _check_shape("weight", weight, (C,), x)
    _check_shape("bias", bias, (C,), x)
    if act not in ("silu", None):
        raise ValueError(f'act: expected "silu" or None, got {act!r}')
    reference_only("adagn", impl, x)
    return adagn_reference(x, scale, shift, weight, bias, num_groups, eps, act)


class _AdaGN(torch.autograd.Function):
    """One temporary forward, two backward, all passes in place: on a CPU, fresh pages cost more than arithmetic.

    Autograd's own backward of the same formulas took about twice as long. Saved are x and coefficients per cloud
    and channel, neither xhat nor z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, *P, C)
        scale: Tensor,  # (B, C)
        shift: Tensor,  # (B, C)
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        num_groups: int,
        eps: float,
        act: Activation,
    ) -> Tensor:
        X = _positions(x, scale.dtype)  # (B, P, C)
        mean = _group_mean(X.sum(1), num_groups, X.shape[1])  # (B, C)
        z = X - mean[:, None]
        var = _group_mean(z.square_().sum(1), num_groups, X.shape[1])
        rstd = (var + eps).rsqrt()
        a = rstd * weight * scale
        c = torch.addcmul(shift, bias, scale)
        torch.sub(X, mean[:, None], out=z)
        torch.addcmul(c[:, None], z, a[:, None], out=z)
        if act == "silu":
            F.silu(z, inplace=True)
        ctx.save_for_backward(x, mean, rstd, a, c, scale, weight, bias)
        ctx.num_groups, ctx.act = num_groups, act
        return z.view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, a, c, scale, weight, bias = ctx.saved_tensors
        X, dz = _positions(x, scale.dtype), _positions(grads[0], scale.dtype)  # (B, P, C)
        dx = X - mean[:, None]
        if ctx.act == "silu":
            z = torch.addcmul(c[:, None], dx, a[:, None])
            dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
        s1 = dz.sum(1)  # (B, C)
        s2 = dx.mul_(dz).sum(1) * rstd
        m1 = _group_mean(weight * scale * s1, ctx.num_groups, X.shape[1])
        m2 = _group_mean(weight * scale * s2, ctx.num_groups, X.shape[1])
        # dx = a dz + k x + l
        k = -rstd.square() * m2
        l = -rstd * m1 - mean * k
        torch.mul(dz, a[:, None], out=dx).addcmul_(X, k[:, None]).add_(l[:, None])
        dscale, dshift = weight * s2 + bias * s1, s1
        dweight, dbias = (scale * s2).sum(0), (scale * s1).sum(0)
        return dx.view(x.shape).to(x.dtype), dscale, dshift, dweight, dbias, None, None, None


def _positions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, ..., C) to (B, P, C) in ``dtype``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).to(dtype)


def _group_mean(sums: Tensor, num_groups: int, num_positions: int) -> Tensor:
    """Mean over positions and the channels of a group, from sums (B, C) over positions; repeated to (B, C)."""
    groups = sums.unflatten(-1, (num_groups, -1))
    return (groups.mean(-1, keepdim=True) / num_positions).expand_as(groups).reshape(sums.shape)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_float(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
