"""Names, order and defaults of every argument, written out from the reference packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from lion_triton.kernels import compat
from lion_triton.kernels.compat import chamfer3d, emd, pvcnn, pytorch3d

SIGNATURES: dict[Callable[..., Any], str] = {
    pvcnn.avg_voxelize: "features, coords, resolution",
    pvcnn.trilinear_devoxelize: "features, coords, resolution, is_training=True",
    pvcnn.ball_query: "centers_coords, points_coords, radius, num_neighbors",
    pvcnn.grouping: "features, indices",
    pvcnn.gather: "features, indices",
    pvcnn.furthest_point_sample: "coords, num_samples, normals=None",
    pvcnn.nearest_neighbor_interpolate: "points_coords, centers_coords, centers_features",
    pvcnn.logits_mask: "coords, logits, num_points_per_object",
    pvcnn.kl_loss: "x, y",
    pvcnn.huber_loss: "error, delta",
    chamfer3d.chamfer_3DDist.forward: "self, input1, input2",
    chamfer3d.chamfer_3DDist_nograd.forward: "self, input1, input2",
    chamfer3d.chamfer_3DFunction.apply: "xyz1, xyz2",
    chamfer3d.chamfer_3DFunction_noGrad.apply: "xyz1, xyz2",
    chamfer3d.fscore: "dist1, dist2, threshold=0.001",
    emd.earth_mover_distance: "xyz1, xyz2, transpose=True",
    emd.EarthMoverDistanceFunction.apply: "xyz1, xyz2",
    pytorch3d.chamfer_distance: (
        "x, y, x_lengths=None, y_lengths=None, x_normals=None, y_normals=None, weights=None, batch_reduction='mean', "
        "point_reduction='mean', norm=2, single_directional=False, abs_cosine=True"
    ),
    pytorch3d.knn_points: (
        "p1, p2, lengths1=None, lengths2=None, norm=2, K=1, version=-1, return_nn=False, return_sorted=True"
    ),
    pytorch3d.knn_gather: "x, idx, lengths=None",
    pytorch3d.ball_query: (
        "p1, p2, lengths1=None, lengths2=None, K=500, radius=0.2, return_nn=True, skip_points_outside_cube=False"
    ),
    pytorch3d.sample_farthest_points: "points, lengths=None, K=50, random_start_point=False",
    pytorch3d.masked_gather: "points, idx",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__.rsplit('.')[-1]}.{f.__qualname__}")
def test_signature(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == (
        f"({SIGNATURES[function]})"
    )


def test_every_public_name_is_listed() -> None:
    listed = {(f.__module__, f.__qualname__.split(".")[0]) for f in SIGNATURES}
    for module in (pvcnn, chamfer3d, emd, pytorch3d):
        names = set(module.__all__) - {"_KNN"}
        assert names == {name for where, name in listed if where == module.__name__}
    assert set(compat.__all__) == {"chamfer3d", "emd", "pvcnn", "pytorch3d"}
    assert pytorch3d._KNN._fields == ("dists", "idx", "knn")
