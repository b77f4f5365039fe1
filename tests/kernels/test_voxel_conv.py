from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lion_triton.kernels import _dot, adagn, voxel, voxel_conv
from lion_triton.kernels._dot import by_matrix_units, factors_like
from lion_triton.kernels.voxel import plan_voxels
from lion_triton.kernels.voxel_conv import (
    _pays,
    _spread_bwd_op,
    _spread_op,
    _voxelize_conv3d_bwd_op,
    _voxelize_conv3d_op,
    conv3d,
    voxelize_conv3d,
    voxelize_conv3d_moments,
    voxelize_conv3d_reference,
)
from lion_triton.models.layers import PVConv
from lion_triton.models.modulation import Norm


def _random(B: int, N: int, R: int) -> Tensor:
    return torch.rand(B, N, 3) * (R - 1)


def _one_voxel(B: int, N: int, R: int) -> Tensor:
    return torch.full((B, N, 3), float(R - 1))


def _corners(B: int, N: int, R: int) -> Tensor:
    return torch.randint(2, (B, N, 3)) * (R - 1.0)


def _not_contiguous(B: int, N: int, R: int) -> Tensor:
    return _random(B, 2 * N, R).transpose(1, 2).contiguous().transpose(1, 2)[:, ::2]


Coords = Callable[[int, int, int], Tensor]
CASES: list[tuple[int, int, int, int, int, Coords]] = [
    (3, 67, 5, 4, 7, _random),
    (2, 1, 3, 2, 4, _random),
    (2, 5, 2, 3, 1, _random),
    (2, 9, 1, 3, 2, _random),
    (2, 40, 4, 3, 4, _one_voxel),
    (2, 40, 3, 5, 3, _corners),
    (3, 11, 4, 3, 3, _not_contiguous),
    (1, 300, 3, 2, 3, _random),
]
cases = pytest.mark.parametrize(
    ("B", "N", "C", "C2", "R", "kind"),
    CASES,
    ids=[f"B{B}-N{N}-C{C}-C2{C2}-R{R}{kind.__name__}" for B, N, C, C2, R, kind in CASES],
)
# Of results and gradients in the L2 norm; in bfloat16 two roundings. Not twice the reference's own: in bfloat16 the
# weight's gradient by oneDNN is wrong, or not finite, on grids of 2.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the empty voxels, whether it pays or not."""
    monkeypatch.setattr(voxel, "mostly_empty", lambda *_: True)
    monkeypatch.setattr(voxel_conv, "_pays", lambda *_: True)


def _inputs(B: int, N: int, C: int, C2: int, R: int, kind: Coords, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Features, coordinates, weight and a cotangent."""
    torch.manual_seed(0)
    features = torch.randn(B, C, N, dtype=dtype).transpose(1, 2)
    weight = torch.randn(C2, C, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last_3d)
    return features, kind(B, N, R), weight, torch.randn(B, C2, R, R, R, dtype=dtype).permute(0, 2, 3, 4, 1)


def _results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], R: int, **options: Any) -> list[Tensor]:
    """The output and the gradients of features and weight."""
    features, coords, weight, cotangent = inputs
    features, weight = features.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(features, coords, weight, R, **options)
    return [out.detach(), *torch.autograd.grad(out, (features, weight), cotangent)]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("products", [1, voxel_conv._PRODUCTS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@cases
def test_output_and_gradients(
    B: int,
    N: int,
    C: int,
    C2: int,
    R: int,
    kind: Coords,
    dtype: torch.dtype,
    products: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(voxel_conv, "_PRODUCTS", products)
    inputs = _inputs(B, N, C, C2, R, kind, dtype)
    features, coords, weight, cotangent = inputs
    got = _results(voxelize_conv3d, inputs, R)
    again = _results(voxelize_conv3d, inputs, R, plan=plan_voxels(coords.to(voxel.upcast(features).dtype), R))
    exact = features.double(), coords, weight.double(), cotangent.double()
    for x, y, expected in zip(got, again, _results(voxelize_conv3d_reference, exact, R), strict=True):
        assert torch.equal(x, y)
        assert x.dtype == dtype
        assert x.shape == expected.shape
        assert (x.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.usefixtures("everywhere")
def test_gradcheck_and_one_gradient_of_two() -> None:
    features, coords, weight, _ = _inputs(2, 3, 2, 1, 2, _random, torch.float64)
    call = lambda x, w: voxelize_conv3d(x, coords, w, 2)  # noqa: E731
    assert torch.autograd.gradcheck(call, (features.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradcheck(call, (features.detach(), weight))
    assert torch.autograd.gradcheck(call, (features, weight.detach()))


@pytest.mark.usefixtures("everywhere")
def test_autocast_changes_nothing() -> None:
    inputs = _inputs(2, 6, 2, 3, 3, _random, torch.float32)
    expected = _results(voxelize_conv3d, inputs, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _results(voxelize_conv3d, inputs, 3)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_opcheck_and_compile() -> None:
    features, coords, weight, cotangent = _inputs(2, 6, 2, 3, 3, _random, torch.float32)
    plan = plan_voxels(coords, 3)
    assert plan.matrices is not None
    occupied = plan.matrices.occupied
    assert occupied is not None
    V = occupied.mean.num_rows
    where = [*occupied.steps[:2], *occupied.steps_t[:2], occupied.first]
    rows, kernel = torch.randn(V, 2, requires_grad=True), torch.randn(27 * 3, 2, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_spread_op.overload, (rows, kernel, where, 3), test_utils=checks)
    backward = (cotangent, rows.detach(), kernel.detach(), where, 3)
    torch.library.opcheck(_spread_bwd_op.overload, backward, test_utils=("test_schema", "test_faketensor"))

    compiled = torch.compile(voxelize_conv3d, backend="aot_eager", fullgraph=True)
    inputs = features, coords, weight, cotangent
    for x, y in zip(_results(compiled, inputs, 3, plan=plan), _results(voxelize_conv3d, inputs, 3), strict=True):
        assert torch.equal(x, y)


# Triton. B, N, C, C2, R
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_CASES: list[tuple[int, int, int, int, int, Coords]] = [
    (1, 1, 1, 1, 4, _random),
    (2, 31, 20, 33, 4, _random),
    (1, 5, 65, 66, 4, _random),  # more channels than a program has
    (2, 16, 3, 5, 4, _one_voxel),
    (2, 13, 5, 4, 4, _corners),
    (2, 7, 4, 3, 4, _not_contiguous),
    (1, 13, 2, 8, 8, _random),  # several cubes
]


@pytest.mark.parametrize(
    ("B", "N", "C", "C2", "R", "kind", "dtype"),
    [(*case, torch.float32) for case in TRITON_CASES] + [(*case, torch.bfloat16) for case in TRITON_CASES[1::4]],
)
def test_triton(
    B: int, N: int, C: int, C2: int, R: int, kind: Coords, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(voxel_conv, "_LEAST_POINTS", 31)  # of 62 points two parts of the weight's gradient
    inputs = tuple(x.to(DEVICE) for x in _inputs(B, N, C, C2, R, kind, dtype))
    got = _results(voxelize_conv3d, inputs, R, impl="triton")
    again = _results(voxelize_conv3d, inputs, R, impl="triton", plan=plan_voxels(inputs[1], R, impl="triton"))
    exact = tuple(x.double() for x in inputs)
    expected = _results(voxelize_conv3d_reference, exact, R, impl="reference")
    for x, y, z in zip(got, again, expected, strict=True):
        assert torch.equal(x, y)
        assert x.dtype == dtype
        assert x.shape == z.shape
        assert (x.double() - z).norm() <= TOLERANCE[dtype] * z.norm()


def test_moments_are_those_of_the_result_and_adagn_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[adagn.__module__], "_HELD", 0)  # whose name the function has taken
    features, coords, weight, _ = (x.to(DEVICE) for x in _inputs(1, 20, 2, 16, 8, _random, torch.float32))
    grid, moments = voxelize_conv3d_moments(features.requires_grad_(), coords, weight, 8, impl="triton")
    assert moments is not None
    cubes = grid.detach().unflatten(3, (2, 4)).unflatten(2, (2, 4)).unflatten(1, (2, 4))
    cubes = cubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(1, 8, 64, 16)
    torch.testing.assert_close(moments[:, :, 0], cubes.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments[:, :, 1], 64 * cubes.var(2, correction=0), rtol=1e-4, atol=1e-5)
    assert not moments.requires_grad

    style = [torch.randn(1, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    results = []
    for given in (moments, None):
        y = adagn(grid, *style[:2], None, None, 8, act="silu", offset=style[2], moments=given, impl="triton")
        results.append([y, *torch.autograd.grad(y, [grid, *style], torch.ones_like(y))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for wrong, message in (
        (moments[:, :7], "parts of equal size of 512 positions, got torch.float32 and 7 parts"),
        (moments.double(), "got torch.float64 and 8 parts"),
        (moments[:, :, :1], r"moments: expected shape \(1, 8, 2, 16\), got \(1, 8, 1, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adagn(grid, None, None, None, None, 8, moments=wrong)


def test_triton_on_other_grids_is_the_whole_grid() -> None:
    """Those that cubes do not fill, or points fill; and gradients that nobody asks for are not made."""
    for N, R, cubes in ((5, 4, True), (33, 4, False), (5, 5, False)):
        features, coords, weight, cotangent = (x.to(DEVICE) for x in _inputs(1, N, 2, 3, R, _random, torch.float32))
        grid, moments = voxelize_conv3d_moments(features, coords, weight.requires_grad_(), R, impl="triton")
        assert (moments is not None) == cubes
        expected = voxelize_conv3d_reference(features, coords, weight, R)
        torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-5)
        got, wanted = (torch.autograd.grad(y, weight, cotangent)[0] for y in (grid, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile_by_triton() -> None:
    features, coords, weight, _ = (x.to(DEVICE) for x in _inputs(2, 6, 2, 3, 4, _random, torch.float32))
    plan = plan_voxels(coords, 4, impl="triton")
    assert plan.cells is not None
    kernel = weight.permute(0, 2, 3, 4, 1).flatten(1, 3).contiguous()
    leaves = features.contiguous().requires_grad_(), kernel.clone().requires_grad_()
    # Rows of points that are not the first in their voxel are never read, and hold anything: no values are compared.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (leaves[0], plan.coords, *plan.cells, leaves[1], 4)
    torch.library.opcheck(_voxelize_conv3d_op.overload, arguments, test_utils=checks)
    out, _, *saved = _voxelize_conv3d_op(features, plan.coords, *plan.cells, kernel, 4)
    backward = (out, features, plan.coords, plan.cells.order, *saved, kernel, True)
    torch.library.opcheck(_voxelize_conv3d_bwd_op.overload, backward, test_utils=("test_schema", "test_faketensor"))
    call = lambda x, w: voxelize_conv3d(x, coords, w, 4, plan=plan, impl="triton")  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, weight), call(features, weight))


def test_products_are_as_precise_as_pytorch_is_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dot, "_INTERPRETED", False)
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert factors_like(torch.zeros(1), "conv")["PRECISION"] == precision
        assert by_matrix_units(torch.zeros(1), "conv") == allowed
    assert by_matrix_units(torch.zeros(1, dtype=torch.bfloat16), "conv")
    assert not by_matrix_units(torch.zeros(1, dtype=torch.float64), "conv")
    inputs = _inputs(1, 6, 2, 3, 4, _random, torch.float32)[:3]
    compiled = torch.compile(lambda *v: voxelize_conv3d(*v, 4, impl="triton"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), voxelize_conv3d_reference(*inputs, 4))


@pytest.mark.parametrize(
    ("N", "R", "C", "dtype", "matrix_units", "pays"),
    [
        (2048, 32, 4, torch.float32, True, True),
        (2048, 32, 3, torch.float32, True, False),
        (512, 16, 4, torch.float32, True, False),
        (256, 8, 32, torch.float32, False, True),
        (257, 8, 64, torch.float32, False, False),
        (512, 8, 128, torch.float32, False, False),
        (1024, 16, 32, torch.bfloat16, False, True),
        (1024, 16, 31, torch.bfloat16, False, False),
        (256, 8, 128, torch.bfloat16, False, False),
        (2048, 32, 32, torch.bfloat16, True, False),
    ],
)
def test_where_it_pays(
    N: int, R: int, C: int, dtype: torch.dtype, matrix_units: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voxel_conv, "_MATRIX_UNITS", matrix_units)
    assert _pays(torch.empty(4, N, C, dtype=dtype), R) == pays
    assert not _pays(torch.empty(4, N, C, dtype=dtype, device="meta"), R)  # nor on a GPU


def test_a_block_leaves_out_the_empty_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[int] = []

    def watched(rows: Tensor, *rest: Any) -> Tensor:
        multiplied.append(len(rows))
        result: Tensor = _spread_op(rows, *rest)
        return result

    monkeypatch.setattr(voxel_conv, "_spread_op", watched)
    torch.manual_seed(0)
    block = PVConv(32, 8, 4).eval()
    norms = [Norm(*(torch.ones(2, 8) for _ in range(3)), None) for _ in range(3)]
    block(torch.randn(2, 32, 32), plan_voxels(_one_voxel(2, 32, 4), 4), norms)
    assert multiplied == [2]


@pytest.mark.parametrize("B", [0, 1, 2])
def test_conv3d(B: int) -> None:
    torch.manual_seed(0)
    voxels, weight = torch.randn(B, 4, 4, 4, 3), torch.randn(5, 3, 3, 3, 3, requires_grad=True)
    expected = F.conv3d(voxels.permute(0, 4, 1, 2, 3), weight, padding=1).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(conv3d(voxels, weight), expected)
    assert conv3d(voxels, weight).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(conv3d(voxels, weight), expected)
        assert conv3d(voxels, weight).is_contiguous()
        compiled = torch.compile(conv3d, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(voxels, weight), expected)


def test_arguments_that_do_not_fit() -> None:
    features, coords, weight, _ = _inputs(2, 6, 2, 3, 4, _random, torch.float32)
    with pytest.raises(ValueError, match=r"^weight: expected shape \(3, 2, 3, 3, 3\), got \(3, 2, 3, 3, 1\)$"):
        voxelize_conv3d(features, coords, weight[..., :1], 4)
    with pytest.raises(ValueError, match=r"^features: expected the N of coords \(6\), got 5$"):
        voxelize_conv3d(features[:, :5], coords, weight, 4)
    with pytest.raises(ValueError, match=r"^plan: expected resolution 4, got 5$"):
        voxelize_conv3d(features, coords, weight, 4, plan=plan_voxels(coords, 5))
