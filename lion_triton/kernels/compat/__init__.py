"""Drop-in replacements: reference packages' names, argument orders, layouts and dtypes, on this package's ops.

One module per package; ``docs/drop-in.md`` lists the line to change for each import, and what differs.
"""

from lion_triton.kernels.compat import chamfer3d, emd, pvcnn, pytorch3d

__all__ = ["chamfer3d", "emd", "pvcnn", "pytorch3d"]
