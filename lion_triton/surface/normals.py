"""Normals of bare points: planes through neighbours, and sides that agree along a spanning tree."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree
from torch import Tensor


def estimate_normals(points: Float[Tensor, "B N 3"], k: int = 10) -> Float[Tensor, "B N 3"]:
    """Outward unit normals of surfaces known by their points alone.

    The normal of a point is the direction in which its k nearest points (itself one of them) spread least. Sides are
    carried along the minimum spanning tree of the neighbours' graph, whose edges cost 1 - |cos| of the angle between
    two normals, from the highest point (largest y), where up is out, unless the volume that they then enclose, the sum
    of (p - center) . normal, is negative; each connected part of the graph has its own.

    points: (B, N, 3), floating point, N >= 3. k: 3 to N. Returns the like of points; no gradient. Computed on the CPU
    in float64. Parts thinner than the distance between neighbours get meaningless normals: no plane fits there.
    Source: Hoppe et al., "Surface Reconstruction from Unorganized Points", SIGGRAPH 1992, sections 3.1 and 3.3.
    ValueError: another shape, k out of range.
    """
    if points.ndim != 3 or points.shape[-1] != 3 or points.shape[1] < 3:
        raise ValueError(f"points: expected shape (B, N, 3) with N >= 3, got {tuple(points.shape)}")
    if not 3 <= k <= points.shape[1]:
        raise ValueError(f"k: expected 3 to {points.shape[1]}, the number of points, got {k}")
    clouds = points.detach().to("cpu", torch.float64).numpy()
    normals = np.stack([_oriented(cloud, k) for cloud in clouds]) if len(clouds) else clouds
    return torch.from_numpy(normals).to(points)


def _oriented(points: Float[np.ndarray, "N 3"], k: int) -> Float[np.ndarray, "N 3"]:
    _, neighbors = cKDTree(points).query(points, k=k)
    patches = points[neighbors] - points[neighbors].mean(1, keepdims=True)
    normals = np.linalg.eigh(patches.swapaxes(1, 2) @ patches)[1][..., 0]

    count = len(points)
    source, target = np.repeat(np.arange(count), k), neighbors.ravel()
    cost = 1 + 1e-6 - np.abs((normals[source] * normals[target]).sum(1))  # 0 would be no edge
    low, high = np.minimum(source, target), np.maximum(source, target)
    edges = np.unique(np.stack((low, high)), axis=1, return_index=True)[1]  # once each, or their costs would add up
    graph = coo_matrix((cost[edges], (low[edges], high[edges])), shape=(count, count))
    tree = minimum_spanning_tree(graph)
    parts, part_of = connected_components(tree, directed=False)
    for part in range(parts):
        members = np.flatnonzero(part_of == part)
        root = members[points[members, 1].argmax()]
        if normals[root, 1] < 0:
            normals[root] *= -1
        order, before = breadth_first_order(tree, root, directed=False)
        for i in order[1:]:
            if normals[i] @ normals[before[i]] < 0:
                normals[i] *= -1
        heights = ((points[members] - points[members].mean(0)) * normals[members]).sum(1)
        if heights.sum() < -1e-6 * np.abs(heights).sum() - 1e-12:  # of a flat patch it is 0 but for rounding
            normals[members] *= -1
    return normals
