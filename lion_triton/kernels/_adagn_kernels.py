"""The kernels of :mod:`lion_triton.kernels.adagn`, which says what they compute.

By their names: ``held`` ones have whole groups of a cloud in one program; all others work on chunks of a cloud's rows.
"""

from __future__ import annotations

from lion_triton.kernels._groups import (
    act,
    act_backward,
    by_channel,
    by_group,
    chunk_of_program,
    combine_moments,
    group_sums,
    load,
    load_offset,
    locate,
    running_moments,
    store_sums,
)
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.dropout import keep_element, keep_elements
from lion_triton.kernels.noise import first_sample


@triton.jit
def _drop(x, cloud, row, first_c, c, P, C, key_ptr, threshold, keep_scale, VECTORS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Dropout of a block of a cloud's rows and of channels; VECTORS: runs of eight channels."""
    if key_ptr is not None:
        row = row + (first_sample(key_ptr) + cloud) * P  # int64, of the whole batch
        if VECTORS:
            counter = row * (C // 8) + first_c // 8
            counter = counter[:, None] + tl.arange(0, x.shape[1] // 8)[None, :]
            keep = keep_elements(key_ptr, counter, threshold)
        else:
            keep = keep_element(key_ptr, row[:, None] * C + c[None, :], threshold)
        x = tl.where(keep, x * keep_scale, 0.0)
    return x


@triton.jit(do_not_specialize=["threshold"])
def adagn_held_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    key_ptr,
    stats_ptr,
    y_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    eps,
    P,
    C,
    G,
    threshold,
    keep_scale,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """All rows of some groups of a cloud, in one program."""
    bundles = tl.cdiv(G, GROUPS)
    cloud = (tl.program_id(0) // bundles).to(tl.int64)
    first_group = tl.program_id(0) % bundles * GROUPS
    _, c, in_c = locate(first_group, C, CG, GROUPS, WIDTH)
    g = first_group + tl.arange(0, GROUPS)
    row = tl.arange(0, ROWS)
    mask = (row < P)[:, None] & in_c[None, :]
    at = cloud * P * C + row[:, None].to(tl.int64) * C + c[None, :]
    shared = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    x = load(x_ptr + at, mask) + shared[None, :]
    # Relative to a group's first element, so that equal values have exactly their mean, however one divides.
    first = load(x_ptr + cloud * P * C + g * CG, g < G) + load_offset(offset_ptr, offset_stride, cloud, g * CG, g < G)
    n = tl.full((), CG, tl.float32) * P  # P may be a constant: 1
    delta = tl.where(mask, x - by_channel(first, GROUPS, WIDTH)[None, :], 0.0)
    mean = first + by_group(tl.sum(delta, 0), GROUPS, WIDTH) / n
    x = tl.where(mask, x - by_channel(mean, GROUPS, WIDTH)[None, :], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(by_group(tl.sum(x * x, 0), GROUPS, WIDTH) / n + eps))
    tl.store(stats_ptr + cloud * 2 * G + g, mean, mask=g < G)  # for the backward
    tl.store(stats_ptr + cloud * 2 * G + G + g, rstd, mask=g < G)

    slope = by_channel(rstd, GROUPS, WIDTH) * load(scale_ptr + cloud * scale_stride + c, in_c)
    shift = load(shift_ptr + cloud * shift_stride + c, in_c)
    y = act(slope[None, :] * x + shift[None, :], SILU)
    y = _drop(y, cloud, row, first_group * CG, c, P, C, key_ptr, threshold, keep_scale, VECTORS)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _saved(scale_ptr, shift_ptr, offset_ptr, stats_ptr, strides, cloud, group, c, in_c, G):  # type: ignore[no-untyped-def]
    """By channel: what to subtract from x, rstd, scale and shift."""
    scale_stride, shift_stride, offset_stride = strides
    mean = load(stats_ptr + cloud * 2 * G + group, in_c) - load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    rstd = load(stats_ptr + cloud * 2 * G + G + group, in_c)
    return (
        mean,
        rstd,
        load(scale_ptr + cloud * scale_stride + c, in_c),
        load(shift_ptr + cloud * shift_stride + c, in_c),
    )


@triton.jit(do_not_specialize=["threshold"])
def adagn_held_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    key_ptr,
    stats_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    doffset_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    P,
    C,
    G,
    threshold,
    keep_scale,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """All rows of some groups of a cloud, in one program."""
    bundles = tl.cdiv(G, GROUPS)
    cloud = (tl.program_id(0) // bundles).to(tl.int64)
    first_group = tl.program_id(0) % bundles * GROUPS
    group, c, in_c = locate(first_group, C, CG, GROUPS, WIDTH)
    row = tl.arange(0, ROWS)
    mask = (row < P)[:, None] & in_c[None, :]
    at = cloud * P * C + row[:, None].to(tl.int64) * C + c[None, :]
    mean, rstd, scale, shift = _saved(
        scale_ptr,
        shift_ptr,
        offset_ptr,
        stats_ptr,
        (scale_stride, shift_stride, offset_stride),
        cloud,
        group,
        c,
        in_c,
        G,
    )
    slope = rstd * scale

    x = tl.where(mask, load(x_ptr + at, mask) - mean[None, :], 0.0)
    dz = load(dy_ptr + at, mask)
    dz = _drop(dz, cloud, row, first_group * CG, c, P, C, key_ptr, threshold, keep_scale, VECTORS)
    dz = act_backward(dz, x, slope, shift, SILU)
    s1, s2 = tl.sum(dz, 0), tl.sum(dz * x, 0) * rstd
    n = tl.full((), CG, tl.float32) * P
    m1, m2 = group_sums(s1, s2, scale, n, GROUPS, WIDTH)
    m1 = rstd * by_channel(m1, GROUPS, WIDTH)
    m2 = rstd * rstd * by_channel(m2, GROUPS, WIDTH)
    dx = slope[None, :] * dz - m1[None, :] - m2[None, :] * x
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    store_sums(
        dscale_ptr, dshift_ptr, doffset_ptr, cloud * C + c, in_c, s1, s2, slope * s1 - m1 * P - m2 * tl.sum(x, 0)
    )


@triton.jit
def adagn_stats_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    offset_ptr,
    partial_ptr,
    offset_stride,
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
    """Mean and sum of squared deviations of a chunk's groups, (B, chunks, 2, G)."""
    cloud, first, end = chunk_of_program(P, chunks, chunk_rows)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    shared = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    mean, squares, count = running_moments(x_ptr, shared, cloud, first, end, P, C, c, in_c, ROWS)
    # Not the fast division, whose mean of equal values may not be that value.
    group_mean = tl.div_rn(by_group(tl.sum(count * mean, 0), GROUPS, WIDTH), ((end - first) * CG).to(tl.float32))
    error = mean - by_channel(group_mean, GROUPS, WIDTH)[None, :]
    group_squares = by_group(tl.sum(squares + count * error * error, 0), GROUPS, WIDTH)
    g = tl.arange(0, GROUPS)
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * G + g
    tl.store(out_ptr, group_mean, mask=g < G)
    tl.store(out_ptr + G, group_squares, mask=g < G)


@triton.jit
def _combine(partial_ptr, P, G, chunks, chunk_rows, CG: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance of a cloud's groups from those of its chunks."""
    g = tl.arange(0, GROUPS)
    mean = load(partial_ptr + g, g < G)  # of the first chunk: from there equal means stay exact, however one divides
    squares = tl.zeros((GROUPS,), tl.float32)
    count = 0.0
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        rows = tl.minimum(P - chunk.to(tl.int64) * chunk_rows, chunk_rows)
        n = tl.where(chunk < chunks, rows, 0).to(tl.float32)[:, None]
        mask = (chunk < chunks)[:, None] & (g < G)[None, :]
        ptr = partial_ptr + chunk[:, None] * 2 * G + g[None, :]
        means = load(ptr, mask)
        block_count = tl.sum(n)
        block_mean = mean + tl.sum(n * (means - mean[None, :]), 0) / block_count
        error = means - block_mean[None, :]
        block_squares = tl.sum(load(ptr + G, mask) + n * CG * error * error, 0)
        share = block_count / (count + block_count)
        delta = block_mean - mean
        mean += delta * share
        squares += block_squares + delta * delta * (count * share * CG)
        count += block_count
    return mean, squares / (count * CG)


@triton.jit
def adagn_moments_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    offset_ptr,
    stats_ptr,
    offset_stride,
    eps,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Mean and rstd of a cloud's groups, (B, 2, G), from the moments of x."""
    cloud = tl.program_id(0).to(tl.int64)
    group, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    offset = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    partial_ptr += cloud * chunks * 2 * C
    _, mean, rstd = combine_moments(
        partial_ptr, offset, eps, P, C, chunks, chunk_rows, c, in_c, CG, GROUPS, WIDTH, CHUNKS
    )
    stats_ptr += cloud * 2 * G + group
    first = in_c & (c == group * CG)
    tl.store(stats_ptr, mean, mask=first)
    tl.store(stats_ptr + G, rstd, mask=first)


@triton.jit(do_not_specialize=["threshold"])
def adagn_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    key_ptr,
    partial_ptr,
    stats_ptr,
    y_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    eps,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    threshold,
    keep_scale,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SILU: tl.constexpr,
    VECTORS: tl.constexpr,
):
    cloud, first, end = chunk_of_program(P, chunks, chunk_rows)
    g = tl.arange(0, GROUPS)
    stats_ptr += cloud * 2 * G + g
    if partial_ptr is None:
        mean, rstd = load(stats_ptr, g < G), load(stats_ptr + G, g < G)
    else:
        mean, var = _combine(partial_ptr + cloud * chunks * 2 * G, P, G, chunks, chunk_rows, CG, GROUPS, CHUNKS)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
        if first == 0:  # for the backward
            tl.store(stats_ptr, mean, mask=g < G)
            tl.store(stats_ptr + G, rstd, mask=g < G)

    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    slope = by_channel(rstd, GROUPS, WIDTH) * load(scale_ptr + cloud * scale_stride + c, in_c)
    shift = load(shift_ptr + cloud * shift_stride + c, in_c)
    shared = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    mean = by_channel(mean, GROUPS, WIDTH)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        x = load(x_ptr + base + offset, mask) + shared[None, :]
        y = act(slope[None, :] * (x - mean[None, :]) + shift[None, :], SILU)
        y = _drop(y, cloud, begin + row, 0, c, P, C, key_ptr, threshold, keep_scale, VECTORS)
        tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def adagn_bwd_sums_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    key_ptr,
    stats_ptr,
    partial_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    threshold,
    keep_scale,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Of a chunk: sums of dz, dz xhat and u - mean, (B, chunks, 3, C)."""
    cloud, first, end = chunk_of_program(P, chunks, chunk_rows)
    group, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    mean, rstd, scale, shift = _saved(
        scale_ptr,
        shift_ptr,
        offset_ptr,
        stats_ptr,
        (scale_stride, shift_stride, offset_stride),
        cloud,
        group,
        c,
        in_c,
        G,
    )
    slope = rstd * scale
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    s1 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    s2 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    sx = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        x = tl.where(mask, load(x_ptr + base + offset, mask) - mean[None, :], 0.0)
        dz = load(dy_ptr + base + offset, mask)
        dz = _drop(dz, cloud, begin + row, 0, c, P, C, key_ptr, threshold, keep_scale, VECTORS)
        dz = act_backward(dz, x, slope, shift, SILU)
        s1 += dz
        s2 += dz * x
        sx += x
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * C + c
    tl.store(out_ptr, tl.sum(s1, 0), mask=in_c)
    tl.store(out_ptr + C, tl.sum(s2, 0) * rstd, mask=in_c)
    tl.store(out_ptr + 2 * C, tl.sum(sx, 0), mask=in_c)


@triton.jit
def adagn_bwd_combine_kernel(  # type: ignore[no-untyped-def]
    scale_ptr,
    stats_ptr,
    partial_ptr,
    means_ptr,
    dscale_ptr,
    dshift_ptr,
    doffset_ptr,
    scale_stride,
    P,
    C,
    G,
    chunks,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of one cloud: m1 and m2 (B, 2, G), and the gradients of scale, shift and offset."""
    cloud = tl.program_id(0).to(tl.int64)
    group, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    sums1 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    sums2 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    sumsx = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & in_c[None, :]
        ptr = partial_ptr + (cloud * chunks + chunk)[:, None] * 3 * C + c[None, :]
        sums1 += load(ptr, mask)
        sums2 += load(ptr + C, mask)
        sumsx += load(ptr + 2 * C, mask)
    s1, s2 = tl.sum(sums1, 0), tl.sum(sums2, 0)
    scale = load(scale_ptr + cloud * scale_stride + c, in_c)
    rstd = load(stats_ptr + cloud * 2 * G + G + group, in_c)
    n = tl.full((), CG, tl.float32) * P  # P may be a constant: 1
    m1, m2 = group_sums(s1, s2, scale, n, GROUPS, WIDTH)
    g = tl.arange(0, GROUPS)
    means_ptr += cloud * 2 * G + g
    tl.store(means_ptr, m1, mask=g < G)
    tl.store(means_ptr + G, m2, mask=g < G)
    m1, m2 = by_channel(m1, GROUPS, WIDTH), by_channel(m2, GROUPS, WIDTH)
    doffset = rstd * (scale * s1 - m1 * P - m2 * rstd * tl.sum(sumsx, 0))
    store_sums(dscale_ptr, dshift_ptr, doffset_ptr, cloud * C + c, in_c, s1, s2, doffset)


@triton.jit(do_not_specialize=["threshold"])
def adagn_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    offset_ptr,
    key_ptr,
    stats_ptr,
    means_ptr,
    dx_ptr,
    scale_stride,
    shift_stride,
    offset_stride,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    threshold,
    keep_scale,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    VECTORS: tl.constexpr,
):
    cloud, first, end = chunk_of_program(P, chunks, chunk_rows)
    group, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    mean, rstd, scale, shift = _saved(
        scale_ptr,
        shift_ptr,
        offset_ptr,
        stats_ptr,
        (scale_stride, shift_stride, offset_stride),
        cloud,
        group,
        c,
        in_c,
        G,
    )
    slope = rstd * scale
    group += cloud * 2 * G
    m1, m2 = rstd * load(means_ptr + group, in_c), rstd * rstd * load(means_ptr + G + group, in_c)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        x = load(x_ptr + base + offset, mask) - mean[None, :]
        dz = load(dy_ptr + base + offset, mask)
        dz = _drop(dz, cloud, begin + row, 0, c, P, C, key_ptr, threshold, keep_scale, VECTORS)
        dz = act_backward(dz, x, slope, shift, SILU)
        dx = slope[None, :] * dz - m1[None, :] - m2[None, :] * x
        tl.store(dx_ptr + base + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
