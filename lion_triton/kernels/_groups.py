"""What the ops with group statistics share: how their kernels cut up a tensor, and running moments.

Tensors are (B, P, C), rows of channels last. A kernel's channels are GROUPS times WIDTH places, powers of two, of which
a group takes the first CG.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._triton import tl, triton

# Chosen by machine code, not by timing: warps of a program up to 1024 channels. Chunks for about as many programs as a
# GPU runs at once, but of no less than so many elements, and not too many to be combined by every program. The bits of
# a cloud's result may therefore depend on the size of its batch.
_WARPS = 4
_PROGRAMS, _LEAST_CHUNK, _MOST_CHUNKS = 1024, 4096, 128
# Chunks' values that a program combines at once, or values of a matrix; bytes of a row that a program reads at least.
_AT_ONCE, _LEAST_ROW = 2048, 32
_CACHED = 1 << 20  # elements that a CPU works on at a time


def group_mean(means: Float[Tensor, "B C"], num_groups: int) -> Float[Tensor, "B C"]:
    """Mean over the channels of a group, repeated: (B, C) to (B, C)."""
    groups = means.unflatten(-1, (num_groups, -1))
    return groups.mean(-1, keepdim=True).expand_as(groups).reshape(means.shape)


def cloud_buffers(
    x: Float[Tensor, "B P C"], dtype: torch.dtype, count: int
) -> Iterator[tuple[slice, list[Float[Tensor, "b P C"]]]]:
    """A few clouds of x at a time: which, and ``count`` buffers of their size, the same memory each time."""
    B, P, C = x.shape
    size = B if x.device.type != "cpu" else max(1, _CACHED // (P * C))
    buffers = [x.new_empty((min(size, B), P, C), dtype=dtype) for _ in range(count)]
    for first in range(0, B, size):
        clouds = slice(first, min(first + size, B))
        yield clouds, [buffer[: clouds.stop - first] for buffer in buffers]


def as_dtype_of(buffer: Tensor, x: Tensor) -> Tensor:
    """x, or a copy in a buffer of the dtype that it lacks."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def center_groups(
    x: Float[Tensor, "b P C"],
    offset: Float[Tensor, "b C"] | None,
    num_groups: int,
    eps: float,
    out: Float[Tensor, "b P C"],
    squares: Float[Tensor, "b P C"],
) -> tuple[Float[Tensor, "b C"], Float[Tensor, "b C"], Float[Tensor, "b C"]]:
    """``out = x + offset - mean``, in two buffers; what was subtracted from x, by how much the mean of a channel
    differs from its group's, and rstd."""
    part = as_dtype_of(squares, x)
    means = part.sum(1) / x.shape[1]
    if offset is not None:
        means += offset
    mean = group_mean(means, num_groups)
    center = mean if offset is None else mean - offset
    torch.sub(part, center[:, None], out=out)
    var = group_mean(torch.mul(out, out, out=squares).sum(1) / x.shape[1], num_groups)
    return center, means - mean, (var + eps).rsqrt()


def per_cloud(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """All with unit stride over channels, and their strides over clouds: views of one tensor are not copied."""
    unit = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in tensors]
    return unit, [0 if t is None else t.stride(0) for t in unit]


def at_once(places: int, most: int) -> int:
    """Rows of so many places that a program holds at once, of at most ``most``: a power of two."""
    return min(max(_AT_ONCE // places, 1), triton.next_power_of_2(max(most, 1)))


def bundle_of_groups(x: Tensor, num_groups: int) -> dict[str, int]:
    """As many groups of x (..., C) for a program as make rows worth reading."""
    cg = x.shape[-1] // num_groups
    worth = triton.next_power_of_2(triton.cdiv(_LEAST_ROW, cg * x.element_size()))
    return {"CG": cg, "GROUPS": min(worth, triton.next_power_of_2(num_groups)), "WIDTH": triton.next_power_of_2(cg)}


class RowChunks:
    """A cloud's rows in chunks, one a program, with all groups."""

    def __init__(self, x: Tensor, num_groups: int, per_thread: int) -> None:
        self.B, self.P, self.C = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
        width = triton.next_power_of_2(self.C // num_groups)
        groups = triton.next_power_of_2(num_groups)
        places = groups * width
        warps = min(max(places // 256, _WARPS), 16)
        rows = max(32 * warps * per_thread // places, 1)
        least = max(_LEAST_CHUNK, x.numel() // _PROGRAMS) // places
        steps = triton.cdiv(max(least, triton.cdiv(self.P, _MOST_CHUNKS)), rows)
        self.chunk_rows = max(steps, 1) * rows
        self.chunks = triton.cdiv(self.P, self.chunk_rows)
        self.channels = {"CG": self.C // num_groups, "GROUPS": groups, "WIDTH": width, "num_warps": warps}
        self.rows = {"ROWS": rows, **self.channels}
        self.vectors = self.C // num_groups == width and self.C % 8 == 0
        self.sizes = (self.P, self.C, num_groups, self.chunks)
        self.grid = (self.B * self.chunks,)


@triton.jit
def locate(first_group, C, CG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Group, channel and presence of each place."""
    place = tl.arange(0, GROUPS * WIDTH)
    group = first_group + place // WIDTH
    if CG == WIDTH:  # the mask of whole vectors
        c = first_group * CG + place
        return group, c, c < C
    c = group * CG + place % WIDTH
    return group, c, (place % WIDTH < CG) & (c < C)


@triton.jit
def chunk_of_program(P, chunks, chunk_rows):  # type: ignore[no-untyped-def]
    """Cloud of this program, and its first row and the row behind its last one in it."""
    pid = tl.program_id(0)
    first = (pid % chunks).to(tl.int64) * chunk_rows
    return (pid // chunks).to(tl.int64), first, tl.minimum(first + chunk_rows, P)


@triton.jit
def load(ptr, mask):  # type: ignore[no-untyped-def]
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_offset(offset_ptr, stride, cloud, c, mask):  # type: ignore[no-untyped-def]
    if offset_ptr is not None:
        return load(offset_ptr + cloud * stride + c, mask)
    return tl.zeros(c.shape, tl.float32)


@triton.jit
def by_group(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.reshape(x, (GROUPS, WIDTH)), 1)


@triton.jit
def by_channel(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))


@triton.jit
def running_moments(x_ptr, shared, cloud, first, end, P, C, c, in_c, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of rows first to end of x + shared: mean, squared deviations and count of each place in a block, by Welford."""
    row = tl.arange(0, ROWS)
    at = row[:, None] * C + c[None, :]
    mean = tl.zeros(at.shape, tl.float32)
    squares = tl.zeros(at.shape, tl.float32)
    step = 0.0
    for begin in range(first, end, ROWS):
        step += 1.0
        mask = (begin + row < end)[:, None] & in_c[None, :]
        x = load(x_ptr + (cloud * P + begin) * C + at, mask) + shared[None, :]
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / step)
        squares += delta * (x - mean)
    count = ((end - first - row + ROWS - 1) // ROWS).to(tl.float32)
    return mean, squares, tl.where(in_c[None, :], tl.maximum(count, 0.0)[:, None], 0.0)


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    partial_ptr,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and squared deviations of a chunk's channels, (B, chunks, 2, C)."""
    cloud, first, end = chunk_of_program(P, chunks, chunk_rows)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    nothing = tl.zeros(c.shape, tl.float32)
    mean, squares, count = running_moments(x_ptr, nothing, cloud, first, end, P, C, c, in_c, ROWS)
    # Not the fast division, whose mean of equal values may not be that value.
    channel_mean = tl.div_rn(tl.sum(count * mean, 0), (end - first).to(tl.float32))
    error = mean - channel_mean[None, :]
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(out_ptr, channel_mean, mask=in_c)
    tl.store(out_ptr + C, tl.sum(squares + count * error * error, 0), mask=in_c)


@triton.jit
def combine_moments(  # type: ignore[no-untyped-def]
    partial_ptr,
    offset,
    eps,
    P,
    C,
    chunks,
    chunk_rows,
    c,
    in_c,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of x + offset, by channel, from the moments of a cloud's chunks: mean less its group's, that one, and rstd."""
    mean = load(partial_ptr + c, in_c)  # of the first chunk: from there equal means stay exact, however one divides
    squares = tl.zeros(c.shape, tl.float32)
    count = 0.0
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        n = tl.where(chunk < chunks, tl.minimum(P - chunk * chunk_rows, chunk_rows), 0).to(tl.float32)[:, None]
        mask = (chunk < chunks)[:, None] & in_c[None, :]
        ptr = partial_ptr + chunk[:, None] * 2 * C + c[None, :]
        means = load(ptr, mask)
        block_count = tl.sum(n)
        block_mean = mean + tl.sum(n * (means - mean[None, :]), 0) / block_count
        error = means - block_mean[None, :]
        share = block_count / (count + block_count)
        delta = block_mean - mean
        mean += delta * share
        squares += tl.sum(load(ptr + C, mask) + n * error * error, 0) + delta * delta * (count * share)
        count += block_count

    u = tl.where(in_c, mean + offset, 0.0)
    # Relative to a group's first channel, for the same reason.
    first = by_channel(
        by_group(tl.where(tl.arange(0, GROUPS * WIDTH) % WIDTH == 0, u, 0.0), GROUPS, WIDTH), GROUPS, WIDTH
    )
    group = first + by_channel(by_group(tl.where(in_c, u - first, 0.0), GROUPS, WIDTH) / CG, GROUPS, WIDTH)
    dev = tl.where(in_c, u - group, 0.0)
    var = by_group(tl.where(in_c, squares / count, 0.0) + dev * dev, GROUPS, WIDTH) / CG
    rstd = by_channel(tl.div_rn(1.0, tl.sqrt_rn(var + eps)), GROUPS, WIDTH)
    return dev, group, rstd


@triton.jit
def act(z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    if SILU:
        z *= tl.sigmoid(z)
    return z


@triton.jit
def act_backward(dy, x, slope, shift, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of z = slope x + shift, x already relative to its mean."""
    if SILU:
        z = slope[None, :] * x + shift[None, :]
        sigmoid = tl.sigmoid(z)
        dy *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit
def group_sums(s1, s2, scale, n, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """m1 and m2."""
    return by_group(scale * s1, GROUPS, WIDTH) / n, by_group(scale * s2, GROUPS, WIDTH) / n


@triton.jit
def store_sums(dscale_ptr, dshift_ptr, doffset_ptr, at, mask, s1, s2, doffset):  # type: ignore[no-untyped-def]
    tl.store(dscale_ptr + at, s2.to(dscale_ptr.dtype.element_ty), mask=mask)
    tl.store(dshift_ptr + at, s1.to(dshift_ptr.dtype.element_ty), mask=mask)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + at, doffset.to(doffset_ptr.dtype.element_ty), mask=mask)
