"""What several of the drop-in modules share: checks, furthest points in every form, ragged clouds."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from lion_triton import kernels


def as_int(name: str, value: Any) -> int:
    """An integer of Python's, of NumPy's, or a tensor that holds one; raise ``ValueError`` for anything else."""
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None


def check_tensors(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first that is no tensor: ``check_tensors(xyz=xyz)``."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def furthest_points(
    points: Float[Tensor, "B N D"],
    count: int,
    lengths: Int[Tensor, " B"] | None = None,
    start: Int64[Tensor, " B"] | None = None,
) -> Int64[Tensor, "B M"]:
    """Indices of points, each the furthest from those before it, starting at point 0, or at ``start``.

    Only the first ``lengths`` points of each cloud are looked at. When all of them coincide with chosen ones, as they
    do beyond a cloud's size, index 0 follows. Ties go to the lowest index.
    """
    (B, _, D), device = points.shape, points.device
    if B == 0 or count == 0:
        return torch.zeros(B, count, dtype=torch.int64, device=device)
    origin = torch.zeros(B, dtype=torch.int64, device=device) if start is None else start
    first = points.take_along_dim(origin[:, None, None], 1)
    if lengths is not None:  # a copy of the first point is never the furthest
        padding = torch.arange(points.shape[1], device=device) >= lengths[:, None]
        points = torch.where(padding[..., None], first, points)
    if start is not None:  # the first point in front of all
        points = torch.cat([first, points], 1)
    most = min(count, points.shape[1])
    if D <= 3:
        idx = kernels.furthest_point_sample(F.pad(points, (0, 3 - D)), most).long()
    else:
        idx = _furthest_points(points, most)
    if start is not None:
        idx = torch.cat([start[:, None], (idx[:, 1:] - 1).clamp(min=0)], 1)
    return F.pad(idx, (0, count - most))


def _furthest_points(points: Float[Tensor, "B N D"], count: int) -> Int64[Tensor, "B M"]:
    """In any number of dimensions, from point 0."""
    axes = points.permute(2, 0, 1).contiguous()  # (D, B, N)
    chosen = torch.zeros(count, axes.shape[1], 1, dtype=torch.int64, device=points.device)
    nearest = axes.new_full(axes.shape[1:], torch.inf)  # squared distance to the nearest chosen point
    diff, sqdist = torch.empty_like(nearest), torch.empty_like(nearest)
    for m in range(1, count):  # thousands of tiny steps: every operation writes into memory that exists
        for d, axis in enumerate(axes):
            torch.sub(axis, axis.gather(1, chosen[m - 1]), out=diff)
            if d:
                sqdist.addcmul_(diff, diff)
            else:
                torch.mul(diff, diff, out=sqdist)
        torch.minimum(nearest, sqdist, out=nearest)
        if points.device.type == "cpu":  # NumPy's is vectorised: 10 times faster than PyTorch's
            nearest.numpy().argmax(1, out=chosen[m, :, 0].numpy())
        else:
            torch.argmax(nearest, 1, keepdim=True, out=chosen[m])
    return chosen[..., 0].T


def pad_clouds(x: Float[Tensor, "n C"], sizes: list[int]) -> Float[Tensor, "B N C"]:
    """Clouds that follow each other, of these sizes, as a batch; zeros behind."""
    if len(set(sizes)) <= 1:
        return x.reshape(len(sizes), sizes[0] if sizes else 0, x.shape[1])
    return torch.nn.utils.rnn.pad_sequence(list(x.split(sizes)), batch_first=True)


def pack_clouds(x: Tensor, sizes: list[int]) -> Tensor:
    """(B, N, ...) to (n, ...): the inverse of :func:`pad_clouds`."""
    return torch.cat([x[:0].flatten(0, 1), *(rows[:size] for rows, size in zip(x, sizes, strict=True))])
