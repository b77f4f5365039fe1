"""Point-cloud and diffusion ops, channels last, each with a plain PyTorch reference that is its specification.

Every op takes ``impl=``: ``"auto"`` (Triton on a GPU, the reference elsewhere), ``"triton"`` or ``"reference"``.
Shapes, dtypes and devices are always checked; values are not, as that would wait for the GPU: see ``check_finite``.
"""

from lion_triton.kernels._checks import check_finite
from lion_triton.kernels.adagn import adagn
from lion_triton.kernels.adagn_devoxelize import adagn_devoxelize
from lion_triton.kernels.adagn_max_neighbors import adagn_max_neighbors
from lion_triton.kernels.auction import auction_emd
from lion_triton.kernels.diffusion import ancestral_step, posterior_q_sample, q_sample
from lion_triton.kernels.dropout import dropout
from lion_triton.kernels.emd import approx_emd, exact_emd
from lion_triton.kernels.gather import group, three_interpolate
from lion_triton.kernels.group_mlp import Style, group_mlp_max
from lion_triton.kernels.knn import knn
from lion_triton.kernels.linear_attention import linear_attention
from lion_triton.kernels.losses import gaussian_kl, noise_mse
from lion_triton.kernels.moments import local_moments
from lion_triton.kernels.nearest import chamfer_distance, nearest_neighbor
from lion_triton.kernels.neighborhood import group_offsets
from lion_triton.kernels.noise import normal_noise
from lion_triton.kernels.pairwise import pairwise_chamfer, pairwise_emd
from lion_triton.kernels.query import ball_query, three_nn
from lion_triton.kernels.sampling import furthest_point_sample
from lion_triton.kernels.voxel import VoxelPlan, avg_voxelize, plan_voxels, trilinear_devoxelize, voxel_coords
from lion_triton.kernels.voxel_conv import voxelize_conv3d

__all__ = [
    "Style",
    "VoxelPlan",
    "adagn",
    "adagn_devoxelize",
    "adagn_max_neighbors",
    "ancestral_step",
    "approx_emd",
    "auction_emd",
    "avg_voxelize",
    "ball_query",
    "chamfer_distance",
    "check_finite",
    "dropout",
    "exact_emd",
    "furthest_point_sample",
    "gaussian_kl",
    "group",
    "group_mlp_max",
    "group_offsets",
    "knn",
    "linear_attention",
    "local_moments",
    "nearest_neighbor",
    "noise_mse",
    "normal_noise",
    "pairwise_chamfer",
    "pairwise_emd",
    "plan_voxels",
    "posterior_q_sample",
    "q_sample",
    "three_interpolate",
    "three_nn",
    "trilinear_devoxelize",
    "voxel_coords",
    "voxelize_conv3d",
]
