"""The tail of a point-voxel convolution in one gather: adaptive group norm, squeeze-excite, trilinear devoxelising.

Of a grid x per cloud, without ever making a normalised or a gated one. Adaptive group norm is affine per channel,
squeeze-excite multiplies by a gate per channel that depends on the mean, which the affine map only shifts and scales,
and trilinear weights sum to 1:

    u    = x + offset,   dev = mean_P u - mean,   z = a (u - mean) + shift,   a = scale rstd       (``adagn.py``)
    gate = sigmoid(W2 relu(W1 mean_P z)),   mean_P z = a dev + shift                    squeeze-excite
    y    = devoxelize(gate z) + points = slope devoxelize(x) + intercept + points
    slope = gate a,   intercept = gate (shift - a center),   center = mean - offset

Backward, with D the gradient of y: dslope = sum_N D devoxelize(x), dintercept = sum_N D, through the formulas above to
the per-channel mean m and biased variance q of x, and

    dx = slope devoxelize^T(D) + k (x - m) + l,   k = 2 dq / P,   l = dm / P,   dpoints = D

Legend: B clouds, N points, R voxels per side, P = R^3, C channels, H hidden channels of squeeze-excite.
Statistics are those of ``adagn.py``: Welford's and Chan's, never E[x^2] - E[x]^2; arithmetic is float32 (float64 in the
reference of float64 x). By Triton, features of s bytes: forward three launches, s C B (P + 9 N) bytes and 4 C B N for
the gathered x that a backward reads; backward three launches and two matrix products, s C B (2 P + 9 N) + 4 C B N.
Deterministic, backward too.
Source: PVConv of Liu et al., "Point-Voxel CNN", NeurIPS 2019; Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import (
    Impl,
    check_groups,
    check_points,
    check_same,
    check_shape,
    sums_dtype,
    upcast,
    use_triton,
)
from lion_triton.kernels._groups import (
    RowChunks,
    at_once,
    by_channel,
    by_group,
    combine_moments,
    group_mean,
    load,
    load_offset,
    locate,
    moments_kernel,
    per_cloud,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.rows import bags, block_of_rows
from lion_triton.kernels.voxel import (
    VoxelPlan,
    cells_of,
    check_plan,
    check_voxels,
    corners_of,
    gather_corners,
    scatter_corners,
)

# Chosen by machine code, not by timing: bytes of x per thread and step of the statistics; points per program of the
# sums over points.
_WARPS, _BYTES_PER_THREAD, _SUMMED = 4, 32, 128


def adagn_devoxelize_reference(
    voxels: Float[Tensor, "B R R R C"],
    coords: Float[Tensor, "B N 3"],
    scale: Float[Tensor, "B C"],
    shift: Float[Tensor, "B C"],
    num_groups: int,
    squeeze: Float[Tensor, "H C"],
    excite: Float[Tensor, "C H"],
    eps: float = 1e-5,
    *,
    offset: Float[Tensor, "B C"] | None = None,
    points: Float[Tensor, "B N C"] | None = None,
    plan: VoxelPlan | None = None,
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`adagn_devoxelize`."""
    B, R, C = len(voxels), voxels.shape[1], voxels.shape[4]
    corners, corners_t = corners_of(plan, coords, R, voxels)
    gather: Any = (*corners, *corners_t)
    raw, mean, var = _gather_moments_op(voxels.flatten(1, 3), *gather)

    dtype = raw.dtype
    scale, shift, squeeze, excite = (t.to(dtype) for t in (scale, shift, squeeze, excite))
    u = mean if offset is None else mean + offset.to(dtype)
    group = group_mean(u, num_groups)
    dev = u - group
    a = scale * (group_mean(var + dev.square(), num_groups) + eps).rsqrt()
    gate = ((torch.addcmul(shift, a, dev) @ squeeze.T).relu() @ excite.T).sigmoid()
    center = group if offset is None else group - offset.to(dtype)
    slope, intercept = gate * a, gate * (shift - a * center)
    y = torch.addcmul(intercept[:, None], raw.view(B, coords.shape[1], C), slope[:, None])
    return (y if points is None else y + points).to(voxels.dtype)


def adagn_devoxelize(
    voxels: Float[Tensor, "B R R R C"],
    coords: Float[Tensor, "B N 3"],
    scale: Float[Tensor, "B C"],
    shift: Float[Tensor, "B C"],
    num_groups: int,
    squeeze: Float[Tensor, "H C"],
    excite: Float[Tensor, "C H"],
    eps: float = 1e-5,
    *,
    offset: Float[Tensor, "B C"] | None = None,
    points: Float[Tensor, "B N C"] | None = None,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """``trilinear_devoxelize(squeeze_excite(adagn(voxels + offset))) + points``, without the grids in between.

    voxels, coords, plan: as of ``trilinear_devoxelize``. scale, shift, num_groups, eps, offset: as of ``adagn``
        without weight and bias. squeeze, excite: the two matrices of squeeze-excite, whose gate is
        ``sigmoid(excite relu(squeeze mean))`` of the mean over all voxels.
    points: (B, N, C), what is added, in any floating dtype; None is 0.
    Returns (B, N, C) in the dtype of the voxels. Differentiable, once, in all but coords. Deterministic, gradients
    too. Triton computes float64 in float32.
    ValueError: shapes, dtypes, devices or a plan that do not fit; C not a multiple of num_groups.
    """
    check_voxels(voxels)
    check_points("coords", coords)
    check_same(voxels=voxels, coords=coords)
    B, R, C = len(voxels), voxels.shape[1], voxels.shape[4]
    check_plan(plan, coords, R)
    num_groups = check_groups(num_groups, C)
    H = squeeze.shape[0] if isinstance(squeeze, Tensor) and squeeze.ndim else 0
    shapes = {"scale": (B, C), "shift": (B, C), "offset": (B, C), "squeeze": (max(H, 1), C), "excite": (C, H)}
    given: dict[str, Any] = {
        "scale": scale,
        "shift": shift,
        "offset": offset,
        "squeeze": squeeze,
        "excite": excite,
        "points": points,
    }
    shapes["points"] = (*coords.shape[:2], C)
    for name, tensor in given.items():
        if tensor is not None or name not in ("offset", "points"):
            check_shape(name, tensor, shapes[name], voxels, like="voxels")
    if not use_triton(impl, voxels):
        return adagn_devoxelize_reference(
            voxels, coords, scale, shift, num_groups, squeeze, excite, eps, offset=offset, points=points, plan=plan
        )
    cells = cells_of(plan, coords, R)
    differentiated = (voxels, scale, shift, offset, squeeze, excite, points)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiated)
    arguments: Any = (voxels, *cells, *differentiated[1:], num_groups, float(eps), keep)
    return _adagn_devoxelize_op(*arguments)[0]


# The reference's one op: gather and moments, with the one pass over the grid that is their backward.


def _empty_gather_moments(x: Tensor, column: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = sums_dtype(x)
    moments = (x.new_empty((x.shape[0], x.shape[2]), dtype=dtype) for _ in range(2))
    return x.new_empty((column.shape[0], x.shape[2]), dtype=dtype), *moments


@op(fake=_empty_gather_moments)
def _gather_moments_op(
    x: Tensor,  # (B, P, C)
    column: Tensor,
    start: Tensor | None,
    weight: Tensor,
    column_t: Tensor,
    start_t: Tensor,
    weight_t: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gathered rows (B N, C), and the mean and biased variance of each cloud's channels."""
    X = upcast(x).contiguous()
    mean = X.sum(1) / X.shape[1]
    var = (X - mean[:, None]).square_().sum(1) / X.shape[1]
    return bags(X.flatten(0, 1), column, start, weight.to(X.dtype)), mean, var


@op(fake=lambda x, *_: x.new_empty(x.shape))
def _gather_moments_bwd_op(
    x: Tensor,
    mean: Tensor,
    draw: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    column_t: Tensor,
    start_t: Tensor,
    weight_t: Tensor,
) -> Tensor:
    X, P = upcast(x), x.shape[1]
    k = 2 / P * dvar
    dx = bags(draw, column_t, start_t, weight_t.to(X.dtype)).view(X.shape)
    return dx.addcmul_(X, k[:, None]).add_((dmean / P - k * mean)[:, None]).to(x.dtype)


@gradient(
    _gather_moments_op,
    save=lambda x, column, start, weight, column_t, start_t, weight_t, out: (x, out[1], column_t, start_t, weight_t),
    results=3,
)
def _gather_moments_backward(
    needs: Needs,
    draw: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    mean: Tensor,
    *transpose: Tensor,
) -> Gradients:
    draw = mean.new_zeros((transpose[1].shape[0], mean.shape[1])) if draw is None else draw
    dmean, dvar = (torch.zeros_like(mean) if d is None else d for d in (dmean, dvar))
    return (_gather_moments_bwd_op(x, mean, draw, dmean, dvar, *transpose),)


# Kernels


@triton.jit
def _coefficients_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    squeeze_ptr,
    excite_ptr,
    affine_ptr,
    saved_ptr,
    hidden_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    eps,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    H,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Of one cloud: slope and intercept (B, 2, C); dev, center, rstd, gate, mean of z (B, 5, C); hidden (B, H)."""
    cloud = tl.program_id(0).to(tl.int64)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    offset = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    partial_ptr += cloud * chunks * 2 * C
    dev, group, rstd = combine_moments(
        partial_ptr, offset, eps, P, C, chunks, chunk_rows, c, in_c, CG, GROUPS, WIDTH, CHUNKS
    )
    shift = load(shift_ptr + cloud * shift_stride + c, in_c)
    a = rstd * load(scale_ptr + cloud * scale_stride + c, in_c)
    z = tl.where(in_c, a * dev + shift, 0.0)
    excited = tl.zeros(c.shape, tl.float32)
    for begin in range(0, H, HIDDEN):
        h = begin + tl.arange(0, HIDDEN)
        mask = (h < H)[:, None] & in_c[None, :]
        squeezed = tl.sum(load(squeeze_ptr + h[:, None] * C + c[None, :], mask) * z[None, :], 1)
        squeezed = tl.maximum(squeezed, 0.0)
        tl.store(hidden_ptr + cloud * H + h, squeezed, mask=h < H)
        excited += tl.sum(load(excite_ptr + c[None, :] * H + h[:, None], mask) * squeezed[:, None], 0)
    gate = tl.sigmoid(excited)
    center = group - offset
    affine_ptr += cloud * 2 * C + c
    tl.store(affine_ptr, gate * a, mask=in_c)
    tl.store(affine_ptr + C, gate * (shift - a * center), mask=in_c)
    saved_ptr += cloud * 5 * C + c
    tl.store(saved_ptr, dev, mask=in_c)
    tl.store(saved_ptr + C, center, mask=in_c)
    tl.store(saved_ptr + 2 * C, rstd, mask=in_c)
    tl.store(saved_ptr + 3 * C, gate, mask=in_c)
    tl.store(saved_ptr + 4 * C, z, mask=in_c)


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    coords_ptr,
    affine_ptr,
    points_ptr,
    y_ptr,
    raw_ptr,
    N,
    num_points,
    C,
    R,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = p < num_points, (c < C)[None, :]
    mask = in_rows[:, None] & in_channels
    raw = gather_corners(x_ptr, coords_ptr, p, c, in_rows, in_channels, N, C, R)
    at = p[:, None] * C + c[None, :]
    if raw_ptr is not None:
        tl.store(raw_ptr + at, raw, mask=mask)
    affine_ptr += (p // N)[:, None] * 2 * C + c[None, :]
    y = load(affine_ptr, mask) * raw + load(affine_ptr + C, mask)
    if points_ptr is not None:
        y += load(points_ptr + at, mask)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _point_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, raw_ptr, partial_ptr, N, C, chunks, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Of a chunk of a cloud's points: sums of grad and of grad times raw, (B, chunks, 2, C)."""
    cloud = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    dot = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in range(0, CHUNK, ROWS):
        n = first + begin + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at = (cloud * N + n)[:, None] * C + c[None, :]
        grad = load(grad_ptr + at, mask)
        total += grad
        dot += grad * load(raw_ptr + at, mask)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(partial_ptr, tl.sum(total, 0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(dot, 0), mask=c < C)


@triton.jit
def _coefficients_bwd_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    scale_ptr,
    shift_ptr,
    squeeze_ptr,
    excite_ptr,
    saved_ptr,
    hidden_ptr,
    grid_ptr,
    dscale_ptr,
    dshift_ptr,
    doffset_ptr,
    dexcited_ptr,
    dsqueezed_ptr,
    scale_stride,
    shift_stride,
    P,
    C,
    G,
    chunks,
    H,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Of one cloud: slope, k, l and mean of x (B, 4, C), and what the other gradients are made of."""
    cloud = tl.program_id(0).to(tl.int64)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    totals = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    dots = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & in_c[None, :]
        ptr = partial_ptr + (cloud * chunks + chunk)[:, None] * 2 * C + c[None, :]
        totals += load(ptr, mask)
        dots += load(ptr + C, mask)
    dintercept, dslope = tl.sum(totals, 0), tl.sum(dots, 0)

    saved_ptr += cloud * 5 * C + c
    dev, center, rstd = load(saved_ptr, in_c), load(saved_ptr + C, in_c), load(saved_ptr + 2 * C, in_c)
    gate = load(saved_ptr + 3 * C, in_c)
    scale = load(scale_ptr + cloud * scale_stride + c, in_c)
    shift = load(shift_ptr + cloud * shift_stride + c, in_c)
    a = rstd * scale
    dgate = dslope * a + dintercept * (shift - a * center)
    dexcited = dgate * gate * (1.0 - gate)
    dz = tl.zeros(c.shape, tl.float32)
    for begin in range(0, H, HIDDEN):
        h = begin + tl.arange(0, HIDDEN)
        mask = (h < H)[:, None] & in_c[None, :]
        dhidden = tl.sum(load(excite_ptr + c[None, :] * H + h[:, None], mask) * dexcited[None, :], 1)
        dsqueezed = tl.where(load(hidden_ptr + cloud * H + h, h < H) > 0, dhidden, 0.0)
        tl.store(dsqueezed_ptr + cloud * H + h, dsqueezed, mask=h < H)
        dz += tl.sum(load(squeeze_ptr + h[:, None] * C + c[None, :], mask) * dsqueezed[:, None], 0)

    through = dintercept * gate  # the gradient of shift - a center
    da = dslope * gate - through * center + dz * dev
    dvar = -0.5 * rstd * rstd * rstd * by_channel(by_group(da * scale, GROUPS, WIDTH), GROUPS, WIDTH) / CG
    ddev = dz * a + 2.0 * dev * dvar
    dgroup = by_channel(by_group(through * a + ddev, GROUPS, WIDTH), GROUPS, WIDTH)
    du = ddev - dgroup / CG
    at = cloud * C + c
    tl.store(dscale_ptr + at, (da * rstd).to(dscale_ptr.dtype.element_ty), mask=in_c)
    tl.store(dshift_ptr + at, (through + dz).to(dshift_ptr.dtype.element_ty), mask=in_c)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + at, (du + through * a).to(doffset_ptr.dtype.element_ty), mask=in_c)
    tl.store(dexcited_ptr + at, dexcited, mask=in_c)
    grid_ptr += cloud * 4 * C + c
    tl.store(grid_ptr, gate * a, mask=in_c)
    tl.store(grid_ptr + C, 2.0 * dvar / P, mask=in_c)
    tl.store(grid_ptr + 2 * C, du / P, mask=in_c)
    tl.store(grid_ptr + 3 * C, dev + center, mask=in_c)


@triton.jit
def _grid_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    coords_ptr,
    order_ptr,
    start_ptr,
    grid_ptr,
    dx_ptr,
    num_voxels,
    C,
    R,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = v < num_voxels, (c < C)[None, :]
    mask = in_rows & in_channels
    scattered = scatter_corners(grad_ptr, coords_ptr, order_ptr, start_ptr, v, c, in_rows, in_channels, C, R)
    grid_ptr += v // (R * R * R) * 4 * C + c[None, :]
    at = v * C + c[None, :]
    x = load(x_ptr + at, mask) - load(grid_ptr + 3 * C, mask)
    dx = load(grid_ptr, mask) * scattered + load(grid_ptr + C, mask) * x + load(grid_ptr + 2 * C, mask)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# Launching and registration


def _empty_forward(x: Tensor, coords: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    squeeze, keep = rest[5], rest[-1]
    (B, N, _), C = coords.shape, x.shape[4]
    sizes = ((B, N, C) if keep else (0,), (B, 2, C), (B, 5, C), (B, squeeze.shape[0]))
    return x.new_empty((B, N, C)), *(x.new_empty(size, dtype=torch.float32) for size in sizes)


@op(fake=_empty_forward)
def _adagn_devoxelize_op(
    x: Tensor,  # (B, R, R, R, C)
    coords: Tensor,
    order: Tensor,
    start: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    squeeze: Tensor,
    excite: Tensor,
    points: Tensor | None,
    num_groups: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, gathered x (B, N, C; empty unless ``keep``, for the backward), slope and intercept (B, 2, C), and what the
    coefficients' backward needs."""
    x, coords = x.contiguous(), coords.contiguous()
    (B, N, _), (R, C), H = coords.shape, x.shape[3:], squeeze.shape[0]
    out = _empty_forward(x, coords, order, start, scale, shift, offset, squeeze, keep)
    y, raw, affine, saved, hidden = out
    cut = RowChunks(x, num_groups, _BYTES_PER_THREAD // x.element_size())
    partials = x.new_empty((B, cut.chunks, 2, C), dtype=torch.float32)
    launch(moments_kernel, cut.grid, x, partials, *cut.sizes, cut.chunk_rows, **cut.rows)
    style, strides = per_cloud(scale, shift, offset)
    places = cut.channels["GROUPS"] * cut.channels["WIDTH"]
    launch(
        _coefficients_kernel,
        (B,),
        partials,
        *style,
        squeeze.contiguous(),
        excite.contiguous(),
        affine,
        saved,
        hidden,
        *strides,
        eps,
        *cut.sizes,
        cut.chunk_rows,
        H,
        CHUNKS=at_once(places, cut.chunks),
        HIDDEN=at_once(places, H),
        **cut.channels,
    )
    rows, channels, grid = block_of_rows(B * N, C, x)
    points = None if points is None else points.contiguous()
    sizes = (N, B * N, C, R)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_gather_kernel, grid, x, coords, affine, points, y, raw if keep else None, *sizes, **blocks)
    return y, raw, affine, saved, hidden


def _empty_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, scale, shift, offset, squeeze, excite, *_ = rest
    none = x.new_empty(0)
    return tuple(none if t is None else t.new_empty(t.shape) for t in (x, scale, shift, offset, squeeze, excite))


@op(fake=_empty_backward)
def _adagn_devoxelize_bwd_op(
    grad: Tensor,
    x: Tensor,
    coords: Tensor,
    order: Tensor,
    start: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    squeeze: Tensor,
    excite: Tensor,
    raw: Tensor,
    saved: Tensor,
    hidden: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift, offset (empty without one), squeeze and excite."""
    grad, x, coords = grad.contiguous(), x.contiguous(), coords.contiguous()
    (B, N, C), R, H = grad.shape, x.shape[1], squeeze.shape[0]
    dx, dscale, dshift, doffset, dsqueeze, dexcite = _empty_backward(
        grad, x, coords, order, start, scale, shift, offset, squeeze, excite
    )
    rows, channels, _ = block_of_rows(N, C, grad)
    chunk = max(rows, _SUMMED)
    chunks = triton.cdiv(N, chunk)
    partials = raw.new_empty((B, chunks, 2, C))
    grid = (B * chunks, triton.cdiv(C, channels))
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_point_sums_kernel, grid, grad, raw, partials, N, C, chunks, CHUNK=chunk, **blocks)

    style, strides = per_cloud(scale, shift)
    coefficients, dexcited, dsqueezed = raw.new_empty((B, 4, C)), raw.new_empty((B, C)), torch.empty_like(hidden)
    cut = RowChunks(x, num_groups, _BYTES_PER_THREAD // x.element_size())
    places = cut.channels["GROUPS"] * cut.channels["WIDTH"]
    launch(
        _coefficients_bwd_kernel,
        (B,),
        partials,
        *style,
        squeeze.contiguous(),
        excite.contiguous(),
        saved,
        hidden,
        coefficients,
        dscale,
        dshift,
        None if offset is None else doffset,
        dexcited,
        dsqueezed,
        *strides,
        R**3,
        C,
        num_groups,
        chunks,
        H,
        CHUNKS=at_once(places, chunks),
        HIDDEN=at_once(places, H),
        **cut.channels,
    )
    rows, channels, grid = block_of_rows(B * R**3, C, x)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_grid_bwd_kernel, grid, grad, x, coords, order, start, coefficients, dx, B * R**3, C, R, **blocks)
    dsqueeze, dexcite = (dsqueezed.T @ saved[:, 4]).to(squeeze.dtype), (dexcited.T @ hidden).to(excite.dtype)
    return dx, dscale, dshift, doffset, dsqueeze, dexcite


@gradient(
    _adagn_devoxelize_op,
    save=lambda x, coords, order, start, scale, shift, offset, squeeze, excite, points, num_groups, eps, keep, out: (
        *(x, coords, order, start, scale, shift, offset, squeeze, excite),
        *(out[1], out[3], out[4], num_groups, None if points is None else points.dtype),
    ),
)
def _adagn_devoxelize_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    dx, dscale, dshift, doffset, dsqueeze, dexcite = _adagn_devoxelize_bwd_op(grad, *saved[:-1])
    dpoints = grad.to(saved[-1]) if needs[9] else None
    return dx, None, None, None, dscale, dshift, doffset if needs[6] else None, dsqueeze, dexcite, dpoints
