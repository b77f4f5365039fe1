"""Mixed precision of a whole network: its matrices are cast once per call, and nothing else changes dtype inside.

``torch.autocast`` casts at every use. A network that enters ``compute_dtype`` instead takes autocast's word for the
dtype, casts the weights of all its matrix products and convolutions together, and switches autocast off inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lion_triton.kernels.cast import cast_all


@contextmanager
def compute_dtype(network: nn.Module, device: torch.device) -> Iterator[torch.dtype]:
    """The dtype of features inside: autocast's, or that of the network's parameters where autocast is off.

    Inside, the parameters of ``nn.Linear`` and ``nn.Conv3d`` modules are copies in that dtype, but for those of modules
    with ``full_precision`` set.
    """
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        yield next(network.parameters()).dtype
        return
    dtype = torch.get_autocast_dtype(device.type)
    places = [
        (module, name)
        for module in network.modules()
        if isinstance(module, (nn.Linear, nn.Conv3d)) and not getattr(module, "full_precision", False)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype != dtype
    ]
    originals = [module._parameters[name] for module, name in places]
    copies = cast_all([p for p in originals if p is not None], dtype)
    try:
        for (module, name), copy in zip(places, copies, strict=True):
            module._parameters[name] = copy  # type: ignore[assignment]
        with torch.autocast(device.type, enabled=False):
            yield dtype
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            module._parameters[name] = original
