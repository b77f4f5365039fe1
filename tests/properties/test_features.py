"""Ops on features: gathers, voxels and normalisations by Triton agree with the reference."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lion_triton import kernels
from tests.properties.strategies import (
    KINDS,
    Draw,
    agree,
    both,
    dtype_of,
    index,
    noise_key,
    one_of,
    property_of,
    size,
    spoiled,
    tensor,
)


def sizes(draw: Draw) -> tuple[int, int, int, int]:
    """B, N, M, C."""
    return size(draw, 0, 3), size(draw, 1, 12), size(draw, 0, 12), one_of(draw, 1, 4, 7, 16)


@property_of(5)
def test_group(draw: Draw) -> str:
    B, N, M, C = sizes(draw)
    return both(draw, kernels.group, [tensor(draw, B, N, C, dtype=dtype_of(draw)), index(draw, N, B, M, 3)])


@property_of(5)
def test_three_interpolate(draw: Draw) -> str:
    B, N, M, C = sizes(draw)
    features, weights = tensor(draw, B, N, C, dtype=dtype_of(draw)), tensor(draw, B, M, 3, dtype=dtype_of(draw))
    return both(draw, kernels.three_interpolate, [features, weights, index(draw, N, B, M, 3)])


@property_of(5)
def test_group_offsets(draw: Draw) -> str:
    B, N, M, C = sizes(draw)
    features, K = tensor(draw, B, N, C, dtype=dtype_of(draw)), size(draw, 1, 4)
    offsets, weight = tensor(draw, B, M, K, 3, dtype=dtype_of(draw)), tensor(draw, C, 3, dtype=dtype_of(draw))
    return both(draw, kernels.group_offsets, [features, index(draw, N, B, M, K), offsets, weight], loose=4)


@property_of(4)
def test_group_mlp_max(draw: Draw) -> str:
    B, N, M, _ = sizes(draw)
    groups, K = size(draw, 1, 2), size(draw, 1, 4)
    C, C2 = (groups * size(draw, 3, 5) for _ in range(2))

    def drawn(*shape: int) -> Tensor:
        return tensor(draw, *shape, dtype=dtype_of(draw), kinds=("normal", "grid"))

    def op(x: Any, idx: Any, offsets: Any, weight: Any, matrix: Any, g: Any, *style: Any, impl: Any) -> Tensor:
        styles = kernels.Style(*style[:3]), kernels.Style(*style[3:])
        return kernels.group_mlp_max(x, idx, offsets, weight, styles[0], matrix, styles[1], g, impl=impl)

    shared = [one_of(draw, None, drawn(B, channels)) for channels in (C, C2)]
    styles = [drawn(B, C), drawn(B, C), shared[0], drawn(B, C2), drawn(B, C2), shared[1]]
    points = [drawn(B, N, C), index(draw, N, B, M, K), drawn(B, M, K, 3), drawn(C, 3)]
    return both(draw, op, [*points, drawn(C2, C), groups, *styles], loose=100)


@property_of(4)
def test_linear_attention(draw: Draw) -> str:
    B, N, _, _ = sizes(draw)
    x = tensor(draw, B, N, 3, size(draw, 1, 3), size(draw, 1, 5), dtype=dtype_of(draw), kinds=("normal", "grid"))
    return both(draw, kernels.linear_attention, [x], loose=30)


def coords_of(draw: Draw, B: int, N: int) -> Tensor:
    return tensor(draw, B, N, 3, dtype=one_of(draw, torch.float32, torch.float64))


@property_of(5)
def test_avg_voxelize(draw: Draw) -> str:
    B, N, _, C = sizes(draw)
    coords, R = coords_of(draw, B, N), size(draw, 1, 4)

    def op(features: Any, coords: Any, R: Any, impl: Any) -> Tensor:
        return kernels.avg_voxelize(features, coords.detach() if isinstance(coords, Tensor) else coords, R, impl=impl)

    return both(draw, op, [tensor(draw, B, N, C, dtype=dtype_of(draw)), coords, R])


@property_of(5)
def test_voxelize_conv3d(draw: Draw) -> str:
    """What ``auto`` takes, at times without the empty voxels, against the whole grid."""
    B, N, _, _ = sizes(draw)
    R, C, C2 = one_of(draw, 1, 3, 4, 4), one_of(draw, 1, 16, 32), size(draw, 1, 4)

    def op(features: Any, coords: Any, weight: Any, R: Any, impl: Any) -> Tensor:
        coords = coords.detach() if isinstance(coords, Tensor) else coords
        return kernels.voxelize_conv3d(features, coords, weight, R, impl=impl)

    weight = tensor(draw, C2, C, 3, 3, 3, dtype=dtype_of(draw), kinds=("normal", "grid"))
    arguments = spoiled(draw, [tensor(draw, B, N, C, dtype=dtype_of(draw)), coords_of(draw, B, N), weight, R])
    return agree(partial(op, impl="auto"), partial(op, impl="reference"), arguments, loose=30)


@property_of(5)
def test_trilinear_devoxelize(draw: Draw) -> str:
    B, N, _, C = sizes(draw)
    R = size(draw, 1, 4)
    arguments = [tensor(draw, B, R, R, R, C, dtype=dtype_of(draw)), coords_of(draw, B, N)]
    return both(draw, kernels.trilinear_devoxelize, arguments)


@property_of(5)
def test_plan_voxels(draw: Draw) -> str:
    """A plan that is shared gives what each op makes of the coordinates itself."""
    B, N, _, C = sizes(draw)
    R, impl = size(draw, 1, 4), one_of(draw, "reference", "triton")
    features, voxels = (tensor(draw, B, *n, C, dtype=dtype_of(draw)) for n in ((N,), (R, R, R)))

    def planned(features: Any, voxels: Any, coords: Any, R: Any) -> Any:
        plan = kernels.plan_voxels(coords, R, impl=impl)
        given = {"plan": plan, "impl": impl}
        return kernels.avg_voxelize(features, coords, R, **given), kernels.trilinear_devoxelize(voxels, coords, **given)

    def alone(features: Any, voxels: Any, coords: Any, R: Any) -> Any:
        voxelized = kernels.avg_voxelize(features, coords, R, impl=impl)
        return voxelized, kernels.trilinear_devoxelize(voxels, coords, impl=impl)

    arguments = spoiled(draw, [features, voxels, coords_of(draw, B, N), R])
    return agree(planned, alone, arguments, same_refusals=False)


@property_of(6)
def test_adagn(draw: Draw) -> str:
    """To the digit for tame values; what is normalised away from 1e15, or of one value, is rounding: never NaN."""
    B, N, M, _ = sizes(draw)
    groups, per_group, tame = size(draw, 1, 3), size(draw, 1, 4), one_of(draw, True, False)
    C, positions = groups * per_group, one_of(draw, (), (N,), (N, M + 1))

    def drawn(*shape: int) -> Tensor:
        return tensor(draw, *shape, dtype=dtype_of(draw), kinds=("normal", "grid") if tame else KINDS)

    style = [drawn(B, C), drawn(B, C)] if one_of(draw, True, False) else [None, None]
    affine = [drawn(C), drawn(C)] if one_of(draw, True, False) else [None, None]
    shape = one_of(draw, None, (C,), (B, C))
    act, drop, key = one_of(draw, None, "silu"), one_of(draw, 0.0, 0.0, 0.5), noise_key(draw)

    def op(x: Any, scale: Any, shift: Any, weight: Any, bias: Any, groups: Any, offset: Any, impl: Any) -> Tensor:
        given = {"act": act, "offset": offset, "dropout": drop, "key": key, "impl": impl}
        return kernels.adagn(x, scale, shift, weight, bias, groups, **given)

    x, offset = drawn(B, *positions, C), None if shape is None else drawn(*shape)
    arguments = [x, *style, *affine, groups, offset]
    return both(draw, op, arguments, loose=10, compare=comparable(x, groups, offset) if tame else "nothing")


def comparable(x: Tensor, groups: int, offset: Tensor | None) -> Literal["all", "results", "nothing"]:
    """Nothing where a group of channels of a cloud (B, ..., C) has one value alone; no gradients where one channel is a
    group, whose offset has none."""
    values = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    of_groups = values.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2)
    if x.numel() and (of_groups.amax(2) == of_groups.amin(2)).any():
        return "nothing"
    return "results" if offset is not None and x.shape[-1] == groups else "all"


@property_of(4)
def test_adagn_devoxelize(draw: Draw) -> str:
    """To the digit as that of ``adagn``."""
    B, N, _, _ = sizes(draw)
    tame = one_of(draw, True, False)
    groups, R, H = size(draw, 1, 2), size(draw, 1, 3), size(draw, 1, 3)
    C = groups * size(draw, 1, 4)
    kinds = ("normal", "grid", "tiny") if tame else KINDS
    offset, points = (
        tensor(draw, *shape, dtype=dtype_of(draw), kinds=kinds) if one_of(draw, False, True) else None
        for shape in ((B, C), (B, N, C))
    )
    style = [tensor(draw, *shape, kinds=("normal", "grid")) for shape in ((B, C), (B, C), (H, C), (C, H))]

    def op(
        x: Any, coords: Any, scale: Any, shift: Any, g: Any, squeeze: Any, excite: Any, *rest: Any, impl: Any
    ) -> Any:
        offset, points = rest
        given = {"offset": offset, "points": points, "impl": impl}
        return kernels.adagn_devoxelize(x, coords, scale, shift, g, squeeze, excite, **given)

    x, coords = tensor(draw, B, R, R, R, C, dtype=dtype_of(draw), kinds=kinds), coords_of(draw, B, N)
    arguments = [x, coords, *style[:2], groups, *style[2:], offset, points]
    return both(draw, op, arguments, loose=30, compare=comparable(x, groups, offset) if tame else "nothing")


@property_of(4)
def test_adagn_max_neighbors(draw: Draw) -> str:
    B, M, K, _ = sizes(draw)
    groups = size(draw, 1, 2)
    C = groups * size(draw, 3, 5)
    offset = tensor(draw, B, C, dtype=dtype_of(draw)) if one_of(draw, False, True) else None
    style = [tensor(draw, B, C, kinds=("normal", "grid"), dtype=dtype_of(draw)) for _ in range(2)]

    def op(x: Any, scale: Any, shift: Any, g: Any, offset: Any, impl: Any) -> Tensor:
        return kernels.adagn_max_neighbors(x, scale, shift, g, offset=offset, impl=impl)

    x = tensor(draw, B, M, K, C, kinds=("normal",), dtype=dtype_of(draw))
    return both(draw, op, [x, *style, groups, offset], loose=30)
