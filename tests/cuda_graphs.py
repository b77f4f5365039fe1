"""A stand-in for CUDA graphs on a machine without a GPU: it refuses what capture refuses and replays what it captured.

While it captures, every operator below autograd is taken down with its arguments. A replay runs these operators again
on the very same memory, and no line of Python between them: numbers of Python are frozen, tensors are read where they
were. Unlike a GPU's graph, which would read freed memory, it says so when a tensor that it reads is gone.

What the references of the ops do on a CPU alone, with NumPy or with a look at indices, stands for a kernel's launch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
# What needs a value on the host, or a size that depends on values, or copies from pageable memory.
REFUSED = {
    aten._local_scalar_dense.default: "waits for the device",
    aten.equal.default: "waits for the device",
    aten.nonzero.default: "waits for the device",
    aten.masked_select.default: "waits for the device",
    aten._unique2.default: "waits for the device",
    aten.unique_dim.default: "waits for the device",
    aten.unique_consecutive.default: "waits for the device",
    aten.repeat_interleave.Tensor: "waits for the device",
    aten.lift_fresh.default: "copies from the host",
}
METHODS = "item tolist numpy cpu cuda pin_memory __bool__ __int__ __float__ __index__".split()


class _Outside:
    """A tensor made before the capture: the graph knows its memory but does not keep it."""

    def __init__(self, x: Tensor) -> None:
        self.storage = StorageWeakRef(x.untyped_storage())
        self.layout = (x.dtype, x.storage_offset(), x.shape, x.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"a tensor that the graph reads is gone: {self.layout}"
        dtype, *layout = self.layout
        return torch.empty(0, dtype=dtype).set_(storage, *layout)  # type: ignore[call-overload]


class _Tape(TorchDispatchMode):
    capturing: _Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.inside: dict[int, Tensor] = {}  # memory made during the capture, by address, kept alive
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was in memory outside that is written to

    def is_inside(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = REFUSED.get(func)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            reason = "waits for the device"
        if reason:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} {reason}")
        schema = func._schema.arguments
        for argument, value in zip(schema, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    place = x.untyped_storage()._cdata
                    if not self.is_inside(x) and place not in self.before:
                        whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                        self.before[place] = (whole, whole.clone())
        return self.take_down(func, args, kwargs, any(a.alias_info and a.alias_info.is_write for a in schema))

    def take_down(self, func: Any, args: Any, kwargs: Any, writes: bool) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        made = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        fresh = [x for x in made if x.untyped_storage()._cdata not in known]
        if fresh or writes:
            keep = lambda x: x.detach() if self.is_inside(x) else _Outside(x)  # noqa: E731
            args, kwargs = tree_map_only(Tensor, keep, (args, kwargs))
            self.operators.append((func, args, kwargs, [x.detach() for x in fresh]))
        self.inside.update((x.untyped_storage()._cdata, x.detach()) for x in fresh)
        return out

    def undo(self) -> None:
        """Leave memory outside as it was, for a capture computes nothing."""
        for whole, content in self.before.values():
            whole.copy_(content)
        self.before.clear()


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    captured = 0
    replayed = 0

    def __init__(self) -> None:
        self.tape = _Tape()

    @torch.no_grad()
    def replay(self) -> None:
        Graph.replayed += 1
        for func, args, kwargs, kept in self.tape.operators:
            args, kwargs = tree_map_only(_Outside, _Outside.tensor, (args, kwargs))
            out = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for place, x in zip(kept, out, strict=bool(kept)):
                place.copy_(x)


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _Tape.capturing is None:  # within a launch
            return method(*args, **kwargs)
        raise RuntimeError(f"operation not permitted when stream is capturing: {method.__name__}")

    return refuse


def _launch(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one operator without gradients."""

    def launch(*args: Any) -> Any:
        tape, _Tape.capturing = _Tape.capturing, None
        try:
            if tape is None:
                return function(*args)
            with _disable_current_modes(), torch.no_grad():
                return tape.take_down(function, args, {}, False)
        finally:
            _Tape.capturing = tape

    return launch


@contextmanager
def graph(graph: Graph, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands for ``torch.cuda.graph``."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
        for name in METHODS:
            patch.setattr(Tensor, name, _refusing(getattr(Tensor, name)))
        patch.setattr(torch, "manual_seed", _refusing(torch.manual_seed))
        _Tape.capturing = graph.tape
        try:
            with graph.tape:
                yield
        finally:
            _Tape.capturing = None
            graph.tape.undo()
    Graph.captured += 1


# Of the references on a CPU, by name wherever they are imported: what computes with NumPy, and what looks at indices.
AS_LAUNCHES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "furthest_point_sample_reference": _launch,
    "argmin": _launch,
    "check_gather": lambda check: lambda *_: None,
}


class _Stream:
    """Stands for streams and events: on a CPU everything is done in order anyway."""

    def __init__(self, *args: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def pretend(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """From here on ``modules``, which imported ``why_uncaptured``, capture on a CPU."""
    Graph.captured = Graph.replayed = 0
    here: Callable[[], _Stream] = _Stream
    for name, value in {"CUDAGraph": Graph, "graph": graph, "Stream": _Stream, "Event": _Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", here)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    for module in [m for name, m in sys.modules.items() if name.startswith("lion_triton.kernels.")]:
        for name, stand_in in AS_LAUNCHES.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in(getattr(module, name)))
    for module in modules:
        monkeypatch.setattr(module, "why_uncaptured", lambda *_: "")
