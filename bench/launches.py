"""How many kernels a function launches on a GPU, and how many bytes they read and write: counted, without one.

``python -m bench.launches`` prints both for the networks of the published sizes.

PyTorch's operators are counted by a dispatch mode, Triton's kernels where they would be launched; tensors have shapes
and no data (``device="meta"``), so that a network of the published size takes a second. Views and allocations launch
nothing. An operator counts as the kernels that it takes at least: a backward of a convolution one per gradient, a sort
one (a radix sort takes several), an operator on a list of tensors one for 64 of them. Bytes are those of all tensors
that an operator or a kernel is given and returns, each once: a lower bound, too, where it reads some again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lion_triton.kernels import _checks, _op
from lion_triton.kernels.census import TARGETS, standing_in
from lion_triton.models import LION, LIONConfig

_NOTHING = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "_unsafe_view"),
    *("promote_types", "is_same_size"),
}
_TENSORS_PER_LAUNCH = 64


@dataclass
class Launches:
    """Kernels by name, and the bytes of all."""

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def count(self) -> int:
        return self.kernels.total()

    def add(self, name: str, launches: int, values: Any) -> None:
        self.kernels[name] += launches
        self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def _channels_last(x: Tensor) -> Tensor:
    """In the layout in which cuDNN leaves what it makes of channels-last tensors."""
    return torch.empty_like(x, memory_format=torch.channels_last_3d) if x.ndim == 5 else x


class _Operators(TorchDispatchMode):
    def __init__(self, found: Launches) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name.startswith("convolution"):
            out = tree_map_only(Tensor, _channels_last, out)
        if not func.is_view and name not in _NOTHING:
            launches = 1
            if name == "convolution_backward":
                launches = sum(args[-1])
            elif name.startswith("_foreach"):
                launches = ceil(len(args[0]) / _TENSORS_PER_LAUNCH)
            self.found.add(name, launches, (args, kwargs, out))
        return out


@contextmanager
def counting(dtype: torch.dtype | None = None) -> Iterator[Launches]:
    """Counts what this block would launch if its tensors, on the meta device, were on a GPU.

    dtype: that of mixed precision, as by autocast, which does not know of the meta device.
    """
    from triton.runtime.jit import JITFunction

    found = Launches()

    def skip(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.add(kernel.__name__.strip("_"), 1, args)

    with (
        patch.object(JITFunction, "run", skip),
        standing_in(TARGETS["sm_90"]),
        patch.object(_checks, "on_gpu", lambda x: True),
        patch.object(_op, "_traced", lambda args: False),  # what an op launches is to be seen, not the op
        patch.object(torch.amp, "is_autocast_available", lambda device_type: True),
        patch.object(torch, "is_autocast_enabled", lambda device_type: dtype is not None),
        patch.object(torch, "get_autocast_dtype", lambda device_type: dtype),
        patch.object(torch, "autocast", lambda device_type, enabled: nullcontext()),
        _Operators(found),
    ):
        yield found


Call = Callable[[], tuple[Tensor, ...]]


def networks(batch: int) -> dict[str, tuple[nn.Module, Call]]:
    """The published ones, and calls of each on so many clouds, on the meta device."""
    with torch.device("meta"):
        lion = LION(LIONConfig())
        points, h, z, t = (torch.empty(batch, *size) for size in ((2048, 3), (2048, 4), (128,), ()))
    vae = lion.vae
    return {
        "shape encoder": (vae, lambda: vae.encode_shape(points)),
        "point encoder": (vae, lambda: vae.encode_points(points, z)),
        "decoder": (vae, lambda: (vae.decode(h, z),)),
        "shape prior": (lion.shape_prior, lambda: (lion.shape_prior(z, t),)),
        "point prior": (lion.point_prior, lambda: (lion.point_prior(h, t, z),)),
    }


def count(network: nn.Module, call: Call, dtype: torch.dtype | None) -> tuple[Launches, Launches]:
    """Of a forward without gradients, and of one in training mode with the gradients of the weights."""
    network.eval()
    with counting(dtype) as forward, torch.no_grad():
        call()
    network.train()
    with counting(dtype) as both:
        outputs = call()
        weights, grads = list(network.parameters()), [torch.empty_like(out) for out in outputs]
        torch.autograd.grad(outputs, weights, grads, allow_unused=True)
    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches and bytes of the published networks, counted without a GPU.")
    parser.add_argument("--batch", type=int, default=32, help="clouds of 2048 points")
    batch = parser.parse_args().batch
    print(f"B = {batch}\n\n| | launches, forward | forward and backward | GB, forward | forward and backward |")
    print("|---|---|---|---|---|")
    for name, (network, call) in networks(batch).items():
        for dtype, precision in ((torch.bfloat16, "bf16"), (None, "float32")):
            forward, both = count(network, call, dtype)
            cells = f"{forward.count} | {both.count} | {forward.bytes / 1e9:.1f} | {both.bytes / 1e9:.1f}"
            print(f"| {name}, {precision} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
