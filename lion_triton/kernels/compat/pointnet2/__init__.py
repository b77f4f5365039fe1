"""PointNet++ ops and layers of pointnet2_ops (Pointnet2_PyTorch), of VoteNet, and of the older CUDA extensions.

    utils      pointnet2_utils: sampling, gathering, grouping, three nearest, QueryAndGroup, GroupAll
    modules    pointnet2_modules: set abstraction (single and multi scale, VoteNet's) and feature propagation
    wrappers   the functions of ``pointnet2_cuda``, which write into tensors that they are given

Points are (B, N, 3), features (B, C, N), indices int32. All names of the three are here too.
"""

from lion_triton.kernels.compat.pointnet2 import modules, utils, wrappers
from lion_triton.kernels.compat.pointnet2.modules import *  # noqa: F403
from lion_triton.kernels.compat.pointnet2.utils import *  # noqa: F403
from lion_triton.kernels.compat.pointnet2.wrappers import *  # noqa: F403

__all__ = [*utils.__all__, *modules.__all__, *wrappers.__all__]
