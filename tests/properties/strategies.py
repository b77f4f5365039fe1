"""What every property shares: random tensors, spoiled arguments, and what counts as the right answer.

A property draws arguments and ends in ``agree``: the call gives what the specification gives, or both refuse with a
``ValueError`` of one line. Anything else is a failure: another exception, NaN from finite input, another dtype or
shape than that of the specification, arguments that are changed.

``property_of(n)`` makes of a function of ``draw`` a test of n cases, the same ones every time; its attribute ``check``
is the function, of which ``tests/soak/properties.py`` runs as many as it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]
Check = Callable[[Draw], str]  # returns "equal" or "refused"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Relative to the largest value of a result: what the same sums in another order, and one rounding on store, may cost;
# float64 is computed in float32 by Triton.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# How a tensor's values spread; and how they lie in memory.
KINDS = ("normal", "grid", "coincident", "tiny", "huge", "mixed")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def property_of(cases: int) -> Callable[[Check], Callable[[], None]]:
    def decorate(check: Check) -> Callable[[], None]:
        @settings(
            max_examples=cases,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # shrinking would take minutes in Triton's interpreter, and cases are small
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def test(data: st.DataObject) -> None:
            check(data.draw)

        test.__name__, test.__doc__, test.check = check.__name__, check.__doc__, check  # type: ignore[attr-defined]
        return test

    return decorate


def one_of(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


def size(draw: Draw, least: int, most: int) -> int:
    return draw(st.integers(least, most))


def dtype_of(draw: Draw) -> torch.dtype:
    return one_of(draw, *DTYPES)


def values(draw: Draw, shape: Sequence[int], dtype: torch.dtype, kinds: Sequence[str] = KINDS) -> Tensor:
    """Finite values of one kind; squares of huge ones, and sums of them, are still numbers in float32."""
    kind = one_of(draw, *kinds)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(size(draw, 0, 999)), dtype=torch.float64)
    largest = 1e2 if dtype == torch.float16 else 1e15
    if kind == "grid":  # many ties, and exact arithmetic
        x = (2 * x).round()
    elif kind == "coincident":
        x = x[..., :1, :1].expand(x.shape).clone() if x.ndim > 1 and x.numel() else torch.ones_like(x)
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "huge":
        x = x.clamp(-4, 4) * largest
    elif kind == "mixed":
        x = x * largest ** torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.clamp(-4 * largest, 4 * largest).to(dtype)


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values with other strides. What lies between those of a slice is NaN."""
    layout = one_of(draw, *LAYOUTS)
    if layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced" and x.ndim:
        room = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), -1 if not x.is_floating_point() else torch.nan)
        room = room.to(x.dtype)
        room[..., 1::2] = x
        x = room[..., 1::2]
    elif layout == "expanded" and len(x):
        x = x[:1].expand(x.shape)
    return x.to(DEVICE)


def tensor(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32, kinds: Sequence[str] = KINDS) -> Tensor:
    return laid_out(draw, values(draw, shape, dtype, kinds))


def index(draw: Draw, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(size(draw, 0, 999))
    x = torch.randint(high, shape, generator=generator, dtype=one_of(draw, torch.int32, torch.int64))
    return laid_out(draw, x)


def noise_key(draw: Draw) -> Tensor:
    bound = 2**63
    numbers = [draw(st.integers(-bound, bound - 1)), draw(st.integers(-bound, bound - 1))]
    return torch.tensor(numbers + one_of(draw, [], [size(draw, 0, 2**40)]), device=DEVICE)


def spoiled(draw: Draw, arguments: list[Any]) -> list[Any]:
    """The arguments, in a fifth of the cases one of them of another shape, dtype or type: valid or not, who knows."""
    if size(draw, 0, 4) or not arguments:
        return arguments
    at = size(draw, 0, len(arguments) - 1)
    x = arguments[at]
    if isinstance(x, Tensor):
        axis = size(draw, 0, max(x.ndim - 1, 0))
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda: x.int() if x.is_floating_point() else x.double(),
            lambda: x.to(one_of(draw, *DTYPES, torch.bool, torch.complex64)),
            lambda: x[None],
            lambda: x[..., None],
            lambda: x.numpy(force=True) if x.dtype != torch.bfloat16 else x.tolist(),
        ]
        if x.ndim:
            changes += [
                lambda: x.narrow(axis, 0, 0),
                lambda: x.narrow(axis, 0, max(x.shape[axis] - 1, 0)),
                lambda: torch.cat([x, x], axis),
                lambda: x.select(axis, 0) if x.shape[axis] else x[None],
            ]
        changed = one_of(draw, *changes)()
    else:
        changed = one_of(draw, None, -1, 0, 2.5, "3", float("nan"), float("inf"), 10**9 if x is None else -(10**9))
    return [*arguments[:at], changed, *arguments[at + 1 :]]


def all_tensors(x: Any) -> list[Tensor]:
    """The tensors of arguments or results, however they are put together."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for value in x.values() for t in all_tensors(value)]
    return [t for value in x for t in all_tensors(value)] if isinstance(x, (list, tuple)) else []


@dataclass
class Answer:
    """What a call came to: results and gradients, or a refusal."""

    results: list[Tensor]
    gradients: list[Tensor | None]
    refusal: str | None = None


def answer(call: Callable[..., Any], arguments: list[Any]) -> Answer:
    """Of arguments that are not touched; with gradients of all floating tensors, under cotangents that are always the
    same. ``ValueError`` in one line is a refusal."""
    before = [x.clone() for x in all_tensors(arguments)]
    inputs = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in arguments]
    try:
        results = all_tensors(call(*inputs))
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 300, f"not one line: {message!r}"
        return Answer([], [], message)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in results if x.requires_grad]
    gradients: list[Tensor | None] = []
    if outputs and leaves:
        cotangents = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(x)
            for i, x in enumerate(outputs)
        ]
        gradients = list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))
    for x, copy in zip(all_tensors(arguments), before, strict=True):
        assert torch.equal(x.nan_to_num(), copy.nan_to_num()), "an argument was changed"
    return Answer([x.detach() for x in results], gradients)


def doubled(x: Any) -> Any:
    """The values that float32 arithmetic sees, in float64."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.float().double()
    return type(x)(doubled(value) for value in x) if isinstance(x, (list, tuple)) else x


def halved(x: Any) -> Any:
    """Float64 as float32, all else as it is."""
    if isinstance(x, Tensor) and x.dtype == torch.float64:
        return x.float()
    return type(x)(halved(value) for value in x) if isinstance(x, (list, tuple)) else x


def agree(
    call: Callable[..., Any],
    specification: Callable[..., Any],
    arguments: list[Any],
    *,
    ties: Callable[..., bool] | None = None,
    loose: float = 1,
    same_refusals: bool = True,
    compare: Literal["all", "results", "nothing"] = "all",
    in_float32: bool = False,
) -> str:
    """``call`` and ``specification`` of the same arguments come to the same: "equal" or "refused".

    Floating results and gradients may be off the specification's in float64 by ``loose`` x ``TOLERANCE``, or by four
    times what the specification itself is off in the arguments' own dtype, or ``in_float32`` where that is float64:
    of what is 0 but for rounding more cannot be asked. Integers are equal, or ``ties`` (of the
    arguments and of both lists of results) says that the others are as good; then nothing else is compared. A gradient
    that one of them does not have counts as zero. Gradients, or all values, may be left out of what is compared: then
    no more is asked of them than not to be NaN.
    """
    got, same = answer(call, arguments), answer(specification, arguments)
    if got.refusal or same.refusal:
        assert not same_refusals or (got.refusal and same.refusal), f"refused by one: {got.refusal!r}, {same.refusal!r}"
        return "refused"
    exact = answer(specification, [doubled(x) for x in arguments])
    finite = all(x.isfinite().all() for x in all_tensors(arguments) if x.is_floating_point())
    assert len(got.results) == len(same.results)
    for x, y in zip(got.results, same.results, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
        assert not finite or not x.isnan().any(), "NaN from finite input"
    for i, (x, y) in enumerate(zip(got.gradients, same.gradients, strict=False)):
        assert x is None or y is None or (x.shape, x.dtype) == (y.shape, y.dtype)
        overflown = y is not None and y.isnan().any()  # infinite terms of a sum over clouds
        assert not finite or x is None or overflown or not x.isnan().any(), f"gradient {i}: NaN from finite input"
    if in_float32 and any(x.dtype == torch.float64 for x in all_tensors(arguments)):
        same = answer(specification, [halved(x) for x in arguments])
    pairs = list(zip(got.results, exact.results, strict=True))
    if any(not x.is_floating_point() and not torch.equal(x, y) for x, y in pairs):
        assert ties is not None and ties(arguments, got.results, exact.results), "other indices"
        return "equal"
    for x, y, z in zip(got.results, same.results, exact.results, strict=True):
        if compare != "nothing" and x.is_floating_point():
            check_close("result", x, y, z, loose)
    for i, gradients in enumerate(zip_longest(got.gradients, same.gradients, exact.gradients)):
        given = next((g for g in gradients if g is not None), None)
        if given is not None:
            a, b, c = (torch.zeros_like(given) if g is None else g for g in gradients)
            if compare == "all":
                check_close(f"gradient {i}", a, b, c, loose)
    return "equal"


def both(draw: Draw, op: Callable[..., Any], arguments: list[Any], **options: Any) -> str:
    """An op by Triton, which computes float64 in float32, and its reference, of arguments that may be spoiled."""
    calls = partial(op, impl="triton"), partial(op, impl="reference")
    return agree(*calls, spoiled(draw, arguments), in_float32=True, **options)


def check_close(what: str, x: Tensor, same: Tensor, exact: Tensor, loose: float = 1) -> None:
    """The rule of ``agree`` for one floating tensor; what overflows is infinite or the largest number."""
    most = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)  # Triton computes float64 in float32
    a, b, c = (t.double().clamp(-most, most) for t in (x, same, exact))
    if not a.numel():
        return
    off, own = (a - c).abs().max().item(), (b - c).abs().max().item()
    scale = c.abs().max().item()
    allowed = 4 * own + loose * TOLERANCE[x.dtype] * scale + 1e-37
    assert off <= allowed, f"{what}: off by {off:.3g} where {allowed:.3g} is allowed, of values up to {scale:.3g}"
