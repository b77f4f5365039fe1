"""Names, order and defaults of every argument, written out from the reference packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from lion_triton.kernels import compat
from lion_triton.kernels.compat import (
    chamfer3d,
    chamfer_dist,
    emd,
    emd_auction,
    emd_mean,
    knn_cuda,
    pointnet2,
    pointops,
    pvcnn,
    pytorch3d,
    structural_losses,
    torch_cluster,
)

MODULES = [
    *(chamfer3d, chamfer_dist, emd, emd_auction, emd_mean, knn_cuda, pointnet2, pointops, pvcnn, pytorch3d),
    *(structural_losses, torch_cluster),
]

SIGNATURES: dict[Callable[..., Any], str] = {
    pvcnn.avg_voxelize: "features, coords, resolution",
    pvcnn.trilinear_devoxelize: "features, coords, resolution, is_training=True",
    pvcnn.ball_query: "centers_coords, points_coords, radius, num_neighbors",
    pvcnn.grouping: "features, indices",
    pvcnn.gather: "features, indices",
    pvcnn.furthest_point_sample: "coords, num_samples, normals=None, return_indices=False",
    pvcnn.nearest_neighbor_interpolate: "points_coords, centers_coords, centers_features",
    pvcnn.logits_mask: "coords, logits, num_points_per_object",
    pvcnn.kl_loss: "x, y",
    pvcnn.huber_loss: "error, delta",
    chamfer3d.chamfer_3DDist.forward: "self, input1, input2",
    chamfer3d.chamfer_3DDist_nograd.forward: "self, input1, input2",
    chamfer3d.chamfer_3DFunction.apply: "xyz1, xyz2",
    chamfer3d.chamfer_3DFunction_noGrad.apply: "xyz1, xyz2",
    chamfer3d.fscore: "dist1, dist2, threshold=0.001",
    chamfer3d.fscore_1e4: "dist1, dist2, threshold=0.0001",
    chamfer_dist.ChamferFunction.apply: "xyz1, xyz2",
    chamfer_dist.ChamferDistance: "ignore_zeros=False",
    chamfer_dist.ChamferDistance.forward: "self, xyz1, xyz2",
    chamfer_dist.ChamferDistanceL1: "ignore_zeros=False",
    chamfer_dist.ChamferDistanceL1.forward: "self, xyz1, xyz2",
    chamfer_dist.ChamferDistanceL1_PM: "ignore_zeros=False",
    chamfer_dist.ChamferDistanceL2: "ignore_zeros=False",
    chamfer_dist.ChamferDistanceL2_split: "ignore_zeros=False",
    emd.earth_mover_distance: "xyz1, xyz2, transpose=True",
    emd.EarthMoverDistanceFunction.apply: "xyz1, xyz2",
    emd_mean.earth_mover_distance: "xyz1, xyz2, transpose=True",
    emd_mean.earth_mover_distance_nograd: "xyz1, xyz2, transpose=True",
    emd_mean.EarthMoverDistance.forward: "self, xyz1, xyz2, transpose=False",
    emd_auction.emdFunction.apply: "xyz1, xyz2, eps, iters",
    emd_auction.emdModule.forward: "self, input1, input2, eps, iters",
    emd_auction.expansionPenaltyFunction.apply: "xyz, primitive_size, alpha",
    emd_auction.expansionPenaltyModule.forward: "self, input, primitive_size, alpha",
    emd_auction.minimum_density_sample: "xyz, npoint, mean_mst_length",
    structural_losses.nn_distance: "seta, setb",
    structural_losses.match_cost: "seta, setb",
    knn_cuda.KNN: "k, transpose_mode=False",
    knn_cuda.KNN.forward: "self, ref, query",
    pointops.furthestsampling: "xyz, offset, new_offset",
    pointops.knnquery: "nsample, xyz, new_xyz, offset, new_offset",
    pointops.grouping: "input, idx",
    pointops.queryandgroup: "nsample, xyz, new_xyz, feat, idx, offset, new_offset, use_xyz=True",
    pointops.subtraction: "input1, input2, idx",
    pointops.aggregation: "input, position, weight, idx",
    pointops.interpolation: "xyz, new_xyz, feat, offset, new_offset, k=3",
    torch_cluster.fps: "x, batch=None, ratio=None, random_start=True, batch_size=None, ptr=None",
    torch_cluster.knn: "x, y, k, batch_x=None, batch_y=None, cosine=False, num_workers=1, batch_size=None",
    torch_cluster.radius: (
        "x, y, r, batch_x=None, batch_y=None, max_num_neighbors=32, num_workers=1, batch_size=None, "
        "ignore_same_index=False"
    ),
    torch_cluster.knn_graph: (
        "x, k, batch=None, loop=False, flow='source_to_target', cosine=False, num_workers=1, batch_size=None"
    ),
    torch_cluster.radius_graph: (
        "x, r, batch=None, loop=False, max_num_neighbors=32, flow='source_to_target', num_workers=1, batch_size=None"
    ),
    pointnet2.furthest_point_sample: "xyz, npoint",
    pointnet2.gather_operation: "features, idx",
    pointnet2.grouping_operation: "features, idx",
    pointnet2.three_nn: "unknown, known",
    pointnet2.three_interpolate: "features, idx, weight",
    pointnet2.ball_query: "radius, nsample, xyz, new_xyz",
    pointnet2.QueryAndGroup: (
        "radius, nsample, use_xyz=True, ret_grouped_xyz=False, normalize_xyz=False, sample_uniformly=False, "
        "ret_unique_cnt=False"
    ),
    pointnet2.QueryAndGroup.forward: "self, xyz, new_xyz, features=None",
    pointnet2.GroupAll: "use_xyz=True, ret_grouped_xyz=False",
    pointnet2.GroupAll.forward: "self, xyz, new_xyz, features=None",
    pointnet2.build_shared_mlp: "mlp_spec, bn=True",
    pointnet2.PointnetSAModule: "mlp, npoint=None, radius=None, nsample=None, bn=True, use_xyz=True",
    pointnet2.PointnetSAModuleMSG: "npoint, radii, nsamples, mlps, bn=True, use_xyz=True, sample_uniformly=False",
    pointnet2.PointnetSAModuleMSG.forward: "self, xyz, features=None",
    pointnet2.PointnetSAModuleMSGVotes: "npoint, radii, nsamples, mlps, bn=True, use_xyz=True, sample_uniformly=False",
    pointnet2.PointnetSAModuleMSGVotes.forward: "self, xyz, features=None, inds=None",
    pointnet2.PointnetSAModuleVotes: (
        "*, mlp, npoint=None, radius=None, nsample=None, bn=True, use_xyz=True, pooling='max', sigma=None, "
        "normalize_xyz=False, sample_uniformly=False, ret_unique_cnt=False"
    ),
    pointnet2.PointnetSAModuleVotes.forward: "self, xyz, features=None, inds=None",
    pointnet2.PointnetFPModule: "mlp, bn=True",
    pointnet2.PointnetFPModule.forward: "self, unknown, known, unknow_feats, known_feats",
    pointnet2.furthest_point_sampling_wrapper: "b, n, m, points_tensor, temp_tensor, idx_tensor",
    pointnet2.gather_points_wrapper: "b, c, n, npoints, points_tensor, idx_tensor, out_tensor",
    pointnet2.gather_points_grad_wrapper: "b, c, n, npoints, grad_out_tensor, idx_tensor, grad_points_tensor",
    pointnet2.group_points_wrapper: "b, c, n, npoints, nsample, points_tensor, idx_tensor, out_tensor",
    pointnet2.group_points_grad_wrapper: "b, c, n, npoints, nsample, grad_out_tensor, idx_tensor, grad_points_tensor",
    pointnet2.ball_query_wrapper: "b, n, m, radius, nsample, new_xyz_tensor, xyz_tensor, idx_tensor",
    pointnet2.three_nn_wrapper: "b, n, m, unknown_tensor, known_tensor, dist2_tensor, idx_tensor",
    pointnet2.three_interpolate_wrapper: "b, c, m, n, points_tensor, idx_tensor, weight_tensor, out_tensor",
    pointnet2.three_interpolate_grad_wrapper: (
        "b, c, n, m, grad_out_tensor, idx_tensor, weight_tensor, grad_points_tensor"
    ),
    pytorch3d.estimate_pointcloud_normals: (
        "pointclouds, neighborhood_size=50, disambiguate_directions=True, *, use_symeig_workaround=True"
    ),
    pytorch3d.estimate_pointcloud_local_coord_frames: (
        "pointclouds, neighborhood_size=50, disambiguate_directions=True, *, use_symeig_workaround=True"
    ),
    pytorch3d.corresponding_points_alignment: (
        "X, Y, weights=None, estimate_scale=False, allow_reflection=False, eps=1e-09"
    ),
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
    others = {"_KNN", "SimilarityTransform", "interpolation2", "gather_operation"}  # tuples, and names for others
    for module in MODULES:
        names = set(module.__all__) - others
        assert names == {n for where, n in listed if f"{where}.".startswith(f"{module.__name__}.")} - others
    assert set(compat.__all__) == {module.__name__.rpartition(".")[2] for module in MODULES}
    assert pytorch3d._KNN._fields == ("dists", "idx", "knn")
    assert pytorch3d.SimilarityTransform._fields == ("R", "T", "s")
