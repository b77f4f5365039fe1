"""Drop-in replacements: reference packages' names, argument orders, layouts and dtypes, on this package's ops.

One module per package; ``docs/drop-in.md`` lists the line to change for each import, and what differs.
``python -m lion_triton.kernels.compat PROJECT`` says which lines of a project to change.
"""

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

__all__ = [
    "chamfer3d",
    "chamfer_dist",
    "emd",
    "emd_auction",
    "emd_mean",
    "knn_cuda",
    "pointnet2",
    "pointops",
    "pvcnn",
    "pytorch3d",
    "structural_losses",
    "torch_cluster",
]
