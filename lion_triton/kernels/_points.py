"""What the ops on points share: squared distances, in PyTorch and in kernels, and how kernels walk a cloud.

Squared distances are sums of squared differences, ((dx^2 + dy^2) + dz^2): |x|^2 + |y|^2 - 2 x.y would lose all digits
of small ones. A kernel holds a block of one cloud in registers and walks the other one point at a time, the same for
all threads; no distance matrix, no tiles, no exchange between threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._triton import tl, triton

# Points in registers per program: the first that makes _PROGRAMS programs, about two for each multiprocessor of a
# large card. The other cloud comes eight points at a time. Chosen by machine code, not by timing.
_PROGRAMS, _UNROLL = 256, 8


def points_per_program(num_points: int, blocks: tuple[int, ...]) -> int:
    """The first of ``blocks``, largest first, that makes enough programs."""
    return next((block for block in blocks if num_points >= _PROGRAMS * block), blocks[-1])


def points_at_a_time(*clouds: Tensor) -> int:
    """How many points of the clouds that are walked come together."""
    return _UNROLL if min(c.shape[1] for c in clouds) >= _UNROLL else 1


def squared_distances(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, "B N M"]:
    """All squared distances, in memory, without gradient. Unchecked; for whole clouds see sqdist_blocks."""
    x, y = x.detach(), y.detach().mT.contiguous()
    sqdist = (x[:, :, 0, None] - y[:, 0, None]).square_()
    for axis in (1, 2):
        diff = x[:, :, axis, None] - y[:, axis, None]
        sqdist.addcmul_(diff, diff)
    return sqdist


def sqdist_blocks(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]
) -> Iterator[tuple[slice, slice, Float[Tensor, "b n M"]]]:
    """Squared distances block by block: (clouds, points of x, their distances to all of y)."""
    (B, N, _), M = x.shape, y.shape[1]
    size = block_size(x)
    rows = min(N, max(1, size // M))
    clouds = max(1, size // (N * M))
    for b in range(0, B, clouds):
        for i in range(0, N, rows):
            block = slice(b, b + clouds), slice(i, i + rows)
            yield *block, squared_distances(x[block], y[block[0]])


def block_size(x: Tensor) -> int:
    """Distances per block: half a megabyte stays in a CPU's cache (5 times faster), a GPU wants many."""
    return 1 << 17 if x.device.type == "cpu" else 1 << 25


def argmin(x: Tensor) -> Tensor:
    """Index of the least value along the last dimension, the first of equal ones."""
    if x.device.type == "cpu":  # NumPy's is vectorised: 10 times faster than PyTorch's
        return torch.from_numpy(x.numpy().argmin(-1))
    return x.argmin(-1)


@triton.jit
def load_scalars(ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    scalars = ()
    for i in tl.static_range(COUNT):
        scalars = scalars + (tl.load(ptr + i).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return scalars


@triton.jit
def load_points(ptr, row, mask=None, other=None):  # type: ignore[no-untyped-def]
    """The coordinates of the points at ``row``, an integer or a block of them."""
    p = ptr + row.to(tl.int64) * 3
    x = tl.load(p, mask=mask, other=other).to(tl.float32)
    y = tl.load(p + 1, mask=mask, other=other).to(tl.float32)
    z = tl.load(p + 2, mask=mask, other=other).to(tl.float32)
    return x, y, z


@triton.jit
def point_sqdist(px, py, pz, qx, qy, qz):  # type: ignore[no-untyped-def]
    dx = px - qx
    dy = py - qy
    dz = pz - qz
    return tl.fma(dz, dz, tl.fma(dy, dy, dx * dx))  # left to the compiler, equal points might round differently
