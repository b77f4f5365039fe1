from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import Style, adagn, group_mlp_max, group_offsets
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.group_mlp import _group_mlp_max_bwd_op, _group_mlp_max_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
EPS = 1e-5

# B, N, M, K, C, C2, groups
CASES = [
    (1, 1, 1, 1, 2, 2, 1),
    (2, 9, 5, 3, 8, 16, 4),
    (1, 7, 3, 32, 24, 20, 4),  # channels that are no powers of two
    (2, 5, 3, 65, 4, 4, 2),  # more neighbours than a program has
    (1, 6, 2, 9, 72, 80, 8),  # more rows of dV than a program has
]
cases = pytest.mark.parametrize("sizes", CASES, ids=["-".join(map(str, case)) for case in CASES])
Inputs = list[Tensor | None]


def _inputs(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, with_offset: bool = True
) -> tuple[Tensor, Inputs, int]:
    """idx; features, offsets, weight, scale, shift, offset, matrix, scale2, shift2, offset2; groups."""
    B, N, M, K, C, C2, groups = sizes
    torch.manual_seed(0)
    idx = torch.randint(N, (M, B, K), device=DEVICE, dtype=torch.int32).transpose(0, 1)  # not contiguous
    styles = [[1 + 0.5 * torch.randn(B, c), torch.randn(B, c), torch.randn(B, c)] for c in (C, C2)]
    first = [torch.randn(B, N, C), 0.3 * torch.randn(B, M, K, 3), torch.randn(C, 3), *styles[0]]
    inputs: Inputs = [t.to(DEVICE, dtype) for t in (*first, torch.randn(C2, C) / C**0.5, *styles[1])]
    if not with_offset:
        inputs[5] = inputs[9] = None
    return idx, _leaves(inputs), groups


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def _call(idx: Tensor, inputs: Inputs, groups: int, impl: Impl) -> Tensor:
    features, offsets, weight, *rest = inputs
    styles: Any = Style(*rest[:3]), Style(*rest[4:])
    return group_mlp_max(features, idx, offsets, weight, styles[0], rest[3], styles[1], groups, EPS, impl=impl)


def _results(y: Tensor, inputs: Inputs) -> list[Tensor]:
    """The output, then every gradient."""
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None and t.requires_grad], cotangent)]


@cases
def test_reference_is_what_it_is_short_for(sizes: tuple[int, ...]) -> None:
    idx, inputs, groups = _inputs(sizes)
    features, offsets, weight, scale, shift, offset, matrix, scale2, shift2, offset2 = inputs
    options: dict[str, Any] = {"act": "silu", "impl": "reference"}
    x = group_offsets(features, idx, offsets, weight, impl="reference")
    h = adagn(x, scale, shift, None, None, groups, EPS, offset=offset, **options)
    y = adagn(h @ matrix.T, scale2, shift2, None, None, groups, EPS, offset=offset2, **options).amax(2)
    got = _call(idx, inputs, groups, "reference")
    torch.testing.assert_close(_results(got, inputs), _results(y, inputs), rtol=1e-9, atol=1e-9)


def _assert_as_good_as_the_reference(idx: Tensor, inputs: Inputs, groups: int) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtypes; twice the same bits.

    In bfloat16 two neighbours may change places as maximum by a rounding; there errors are those of all elements.
    """
    ours, again, reference = (
        _results(_call(idx, inputs, groups, i), inputs) for i in ("triton", "triton", "reference")
    )
    double = _leaves(inputs, torch.float64)
    exact = _results(_call(idx, double, groups, "reference"), double)
    for x, twice, y, z in zip(ours, again, reference, exact, strict=True):
        assert torch.equal(x, twice)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        half = x.dtype == torch.bfloat16
        size = torch.Tensor.norm if half else lambda t: t.abs().max()
        allowed = 2 * size(y - z) + (2e-6 if interpreting() else 5e-6) * size(z)
        if half and interpreting():  # it truncates where a GPU rounds
            allowed = 2.0**-6 * size(z)
        assert size(x - z) <= allowed


@cases
def test_triton_is_as_good_as_the_reference(sizes: tuple[int, ...]) -> None:
    _assert_as_good_as_the_reference(*_inputs(sizes, torch.float32))


def test_half_precision_by_triton() -> None:
    _assert_as_good_as_the_reference(*_inputs(CASES[1], torch.bfloat16))


def test_amd_takes_the_composition_where_a_backward_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("lion_triton.kernels.group_mlp.warp_size", lambda: 64)
    monkeypatch.setattr("lion_triton.kernels.group_mlp.group_mlp_max_reference", lambda *_: called.append(1))
    idx, inputs, groups = _inputs((1, 3, 2, 2, 40, 8, 8), torch.float32)
    _call(idx, inputs, groups, "triton")
    assert called
    assert _call(idx, [t.detach() for t in inputs], groups, "triton").shape == (1, 2, 8)


def test_several_tiles_and_chunks_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lion_triton.kernels.group_mlp._PROGRAMS", 4)
    _assert_as_good_as_the_reference(*_inputs((2, 9, 21, 3, 8, 8, 4), torch.float32, with_offset=False))


@BOTH
def test_constant_neighborhoods_are_their_shift(impl: Impl) -> None:
    """Whose variance is 0: equal values have exactly their mean."""
    idx, inputs, groups = _inputs((2, 5, 7, 3, 8, 8, 2), torch.float32, with_offset=False)
    values = [t.detach() for t in inputs if t is not None]
    values[0].fill_(1 / 3)
    values[1].zero_()
    values[5][:] = values[5][:1].clone()
    features, offsets, weight, scale, shift, matrix, scale2, shift2 = values
    styles = Style(scale, shift), Style(scale2, shift2)
    y = group_mlp_max(features, idx, offsets, weight, styles[0], matrix, styles[1], groups, EPS, impl=impl)
    expected = torch.nn.functional.silu(shift2)[:, None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@BOTH
def test_equal_neighbours_share_their_maximum_by_the_first(impl: Impl) -> None:
    """As a ball query makes them, which repeats a neighbour to fill up."""
    idx, inputs, groups = _inputs(CASES[1], torch.float32)
    idx[:] = idx[:, :, :1]
    offsets = inputs[1].detach()
    offsets[:] = offsets[:, :, :1]
    inputs[1] = offsets.requires_grad_()
    doffsets = _results(_call(idx, inputs, groups, impl), inputs)[2]
    assert torch.equal(doffsets[:, :, 1], doffsets[:, :, 2])  # only what the statistics add
    assert not torch.equal(doffsets[:, :, 0], doffsets[:, :, 1])


def test_nan_is_the_maximum() -> None:
    idx, inputs, groups = _inputs(CASES[1], torch.float32)
    features = inputs[0].detach()
    features[0, 0, 0] = float("nan")
    inputs[0] = features
    for impl in ("reference", "triton"):
        y = _call(idx, inputs, groups, impl)
        assert y[0].isnan().all()
        assert not y[1].isnan().any()


def test_only_some_gradients() -> None:
    idx, inputs, groups = _inputs(CASES[1], torch.float32)
    expected = _results(_call(idx, inputs, groups, "triton"), inputs)[1:]
    for i in (0, 1, 5, 6):
        alone: Inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs) if t is not None]
        torch.testing.assert_close(_results(_call(idx, alone, groups, "triton"), alone)[1], expected[i])


def test_opcheck_and_compile() -> None:
    idx, inputs, groups = _inputs(CASES[1], torch.float32)
    arguments = (inputs[0], idx, *inputs[1:], groups, EPS)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_group_mlp_max_op.overload, arguments, test_utils=checks)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    y, *saved = _group_mlp_max_op(*plain)
    backward = (y, *plain[:-2], *saved, groups, True)
    torch.library.opcheck(_group_mlp_max_bwd_op.overload, backward, test_utils=checks[::2])
    compiled = torch.compile(lambda *v: _call(idx, list(v), groups, "triton"), fullgraph=True, backend="aot_eager")
    got, expected = (_results(y, inputs) for y in (compiled(*inputs), _call(idx, inputs, groups, "triton")))
    torch.testing.assert_close(got, expected)


def test_bad_input_is_named() -> None:
    idx, inputs, _ = _inputs(CASES[1], torch.float32)
    for i, message in (
        (0, r"^offsets: expected the batch size of features \(1\), got 2$"),
        (3, r"^style.scale: expected shape \(2, 8\), got \(1, 8\)$"),
        (6, r"^matrix: expected shape \(1, 8\), got \(1, 7\)$"),
        (9, r"^style2.offset: expected shape \(2, 16\), got \(1, 16\)$"),
    ):
        wrong = [t[:1, :7] if i == 6 == j else t[:1] if i == j else t for j, t in enumerate(inputs)]
        with pytest.raises(ValueError, match=message):
            _call(idx[: len(wrong[0])], wrong, 4, "reference")
    with pytest.raises(ValueError, match=r"^num_groups: expected a divisor of C = 8, got 3$"):
        _call(idx, inputs, 3, "reference")
