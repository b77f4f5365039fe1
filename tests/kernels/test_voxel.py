from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import voxel
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.voxel import avg_voxelize, cells_reference, plan_voxels, trilinear_devoxelize, voxel_coords

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])


def _random(B: int, N: int, R: int) -> Tensor:
    return torch.rand(B, N, 3) * (R - 1)


def _one_voxel(B: int, N: int, R: int) -> Tensor:
    return 0.6 + 0.8 * torch.rand(B, N, 3)


def _coincident(B: int, N: int, R: int) -> Tensor:
    return torch.tensor([0.3, R - 1.2, R - 1]).expand(B, N, 3)


def _edges(B: int, N: int, R: int) -> Tensor:
    """0, R - 1 and the floats next to R - 1 and to 1."""
    values = torch.tensor([0.0, R - 1, R - 1, 1.0]).nextafter(torch.tensor([0.0, 0.0, R - 1, 0.0]))
    return values[torch.randint(4, (B, N, 3))]


def _ties(B: int, N: int, R: int) -> Tensor:
    return torch.randint(R - 1, (B, N, 3)) + 0.5


def _not_contiguous(B: int, N: int, R: int) -> Tensor:
    return _random(B, 2 * N, R).transpose(1, 2).contiguous().transpose(1, 2)[:, ::2]


Coords = Callable[[int, int, int], Tensor]
CASES: list[tuple[int, int, int, int, Coords]] = [
    (2, 1, 3, 4, _random),
    (1, 7, 1, 2, _random),
    (3, 67, 5, 4, _random),
    (1, 70, 17, 3, _random),
    (1, 257, 4, 6, _random),
    (2, 40, 4, 3, _one_voxel),
    (2, 9, 4, 4, _coincident),
    (2, 60, 3, 5, _edges),
    (2, 60, 3, 5, _ties),
    (2, 60, 3, 4, _not_contiguous),
    (2, 5, 2, 2, _coincident),
    (2, 5, 2, 1, _random),
]
cases = pytest.mark.parametrize(
    ("B", "N", "C", "R", "kind"), CASES, ids=[f"B{B}-N{N}-C{C}-R{R}{k.__name__}" for B, N, C, R, k in CASES]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def _averaging(coords: Tensor, R: int) -> Tensor:
    """Dense matrix of avg_voxelize, (B, R, R, R, N), by loops. Python's round is half-to-even too."""
    B, N, _ = coords.shape
    matrix = torch.zeros(B, R, R, R, N, dtype=torch.float64)
    for b, n in product(range(B), range(N)):
        x, y, z = (min(round(c), R - 1) for c in coords[b, n].tolist())
        matrix[b, x, y, z, n] = 1
    return matrix / matrix.sum(-1, keepdim=True).clamp(min=1)


def _interpolation(coords: Tensor, R: int) -> Tensor:
    """Dense matrix of trilinear_devoxelize, (B, N, R, R, R): a hat function around each voxel, no corners."""
    hats = (1 - (coords.double()[..., None] - torch.arange(R)).abs()).clamp(min=0)  # (B, N, 3, R)
    return torch.einsum("bnx,bny,bnz->bnxyz", *hats.unbind(2))


def _assert_product(got: Tensor, matrix: Tensor, x: Tensor) -> None:
    """got = matrix @ x up to the rounding of a sum in the accumulation dtype and of the result in its own."""
    exact, size = matrix @ x.double(), matrix @ x.double().abs()
    accumulated = torch.float64 if got.dtype == torch.float64 else torch.float32
    bound = (8 + matrix.shape[-1]) * torch.finfo(accumulated).eps * size + torch.finfo(got.dtype).eps * exact.abs()
    assert torch.all((got.double() - exact).abs() <= bound)


@cases
@dtypes
def test_avg_voxelize_and_gradient(B: int, N: int, C: int, R: int, kind: Coords, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    coords = kind(B, N, R).clamp(0, R - 1)
    features = torch.randn(B, C, N, dtype=dtype).transpose(1, 2).requires_grad_()
    voxels = avg_voxelize(features, coords, R)
    cotangent = torch.randn(B, R, R, R, C, dtype=dtype)
    voxels.backward(cotangent)
    matrix = _averaging(coords, R).flatten(1, 3)  # (B, R^3, N)
    assert voxels.shape == (B, R, R, R, C)
    assert voxels.dtype == features.grad.dtype == dtype
    _assert_product(voxels.detach().flatten(1, 3), matrix, features.detach())
    _assert_product(features.grad, matrix.mT, cotangent.flatten(1, 3))


@cases
@dtypes
def test_trilinear_devoxelize_and_gradient(B: int, N: int, C: int, R: int, kind: Coords, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    coords = kind(B, N, R).clamp(0, R - 1)
    # Channels first in memory, as a convolution may leave it.
    voxels = torch.randn(B, C, R, R, R, dtype=dtype).permute(0, 2, 3, 4, 1).requires_grad_()
    features = trilinear_devoxelize(voxels, coords)
    cotangent = torch.randn(B, N, C, dtype=dtype)
    features.backward(cotangent)
    matrix = _interpolation(coords, R).flatten(2)  # (B, N, R^3)
    assert features.shape == (B, N, C)
    assert features.dtype == voxels.grad.dtype == dtype
    _assert_product(features.detach(), matrix, voxels.detach().flatten(1, 3))
    _assert_product(voxels.grad.flatten(1, 3), matrix.mT, cotangent)


def _assert_same_cells(coords: Tensor, R: int) -> None:
    expected, got = cells_reference(coords, R), plan_voxels(coords, R, impl="triton").cells
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype == torch.int32
        assert torch.equal(x, y)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_cells_by_triton_are_those_of_the_reference(
    B: int, N: int, C: int, R: int, kind: Coords, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # In float64 a point may lie just below a cell's border, where float32 has the border.
    _assert_same_cells(kind(B, N, R).to(DEVICE).to(dtype), R)


@pytest.mark.parametrize("kind", [_random, _ties, _coincident], ids=lambda k: k.__name__)
def test_cells_of_clouds_that_no_program_sorts(kind: Coords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxel, "_MOST_SORTED", 32)
    torch.manual_seed(0)
    _assert_same_cells(kind(2, 50, 4).to(DEVICE), 4)


def test_cells_against_loops() -> None:
    torch.manual_seed(0)
    coords = _edges(2, 30, 3)
    order, start = cells_reference(coords, 3)
    rows = [[] for _ in range(2 * 27)]
    for b, n in product(range(2), range(30)):
        x, y, z = (int(c) for c in coords[b, n].tolist())
        rows[b * 27 + (x * 3 + y) * 3 + z].append(b * 30 + n)
    assert [order[i:j].tolist() for i, j in zip(start[:-1], start[1:], strict=True)] == rows


def _gradients(coords: Tensor, R: int, f: Tensor, v: Tensor, impl: Impl) -> list[Tensor]:
    """Both ops' outputs, then their gradients for random cotangents."""
    f, v = f.clone().requires_grad_(), v.clone().requires_grad_()
    outputs = avg_voxelize(f, coords, R, impl=impl), trilinear_devoxelize(v, coords, impl=impl)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, (f, v), cotangents))


def _assert_as_good_as_the_reference(B: int, N: int, C: int, R: int, kind: Coords, dtype: torch.dtype) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtype."""
    torch.manual_seed(0)
    coords = kind(B, N, R).to(DEVICE)
    # Neither is contiguous.
    f = torch.randn(B, C, N).to(DEVICE, dtype).transpose(1, 2)
    v = torch.randn(B, C, R, R, R).to(DEVICE, dtype).permute(0, 2, 3, 4, 1)
    ours, reference = (_gradients(coords, R, f, v, impl) for impl in ("triton", "reference"))
    exact = _gradients(coords, R, f.double(), v.double(), "reference")
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype == dtype
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if interpreting() and dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@cases
def test_triton_is_as_good_as_the_reference(B: int, N: int, C: int, R: int, kind: Coords) -> None:
    _assert_as_good_as_the_reference(B, N, C, R, kind, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_by_triton(dtype: torch.dtype) -> None:
    _assert_as_good_as_the_reference(3, 67, 5, 4, _random, dtype)


def test_triton_computes_float64_in_float32_and_repeats_bit_for_bit() -> None:
    torch.manual_seed(0)
    coords, f, v = (t.to(DEVICE) for t in (_random(2, 40, 3), torch.randn(2, 40, 3), torch.randn(2, 3, 3, 3, 3)))
    once, twice = (_gradients(coords, 3, f, v, "triton") for _ in range(2))
    double = _gradients(coords.double(), 3, f.double(), v.double(), "triton")
    for x, y, z in zip(once, twice, double, strict=True):
        assert torch.equal(x, y)
        assert z.dtype == torch.float64
        torch.testing.assert_close(x.double(), z, rtol=1e-5, atol=1e-5)


@BOTH
def test_ties_go_to_even_and_axes_are_x_y_z(impl: Impl) -> None:
    coords = torch.tensor([[[0.5, 1.5, 2.5]]], device=DEVICE)
    voxels = avg_voxelize(torch.ones(1, 1, 1, device=DEVICE), coords, 4, impl=impl)
    assert voxels.nonzero().tolist() == [[0, 0, 2, 2, 0]]


@BOTH
def test_upper_corner_unused_without_fraction(impl: Impl) -> None:
    R = 4
    corner = torch.tensor(list(product((0, 1, R - 1), repeat=3)), device=DEVICE)  # (27, 3)
    voxels = torch.full((27, R, R, R, 1), torch.nan, device=DEVICE)
    voxels[(torch.arange(27), *corner.T)] = 7
    assert trilinear_devoxelize(voxels, corner[:, None].float(), impl=impl).flatten().tolist() == [7] * 27


def test_partition_of_unity_and_reproduction_of_linear_fields() -> None:
    torch.manual_seed(2)
    B, N, R = 2, 50, 6
    coords = _random(B, N, R).double()
    grid = torch.stack(torch.meshgrid(*[torch.arange(R).double()] * 3, indexing="ij"), -1).expand(B, R, R, R, 3)
    torch.testing.assert_close(trilinear_devoxelize(grid, coords), coords, rtol=1e-14, atol=1e-14)
    ones = trilinear_devoxelize(torch.ones(B, R, R, R, 1), coords)
    torch.testing.assert_close(ones, torch.ones(B, N, 1), rtol=0, atol=1e-6)
    occupied = avg_voxelize(torch.ones(B, N, 1).double(), coords, R)
    torch.testing.assert_close(occupied, (_averaging(coords, R).sum(-1, keepdim=True) > 0).double())


def test_linear() -> None:
    torch.manual_seed(3)
    coords = _random(2, 30, 4).double()
    f, g = torch.randn(2, 2, 30, 3, dtype=torch.float64)
    v, w = torch.randn(2, 2, 4, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        avg_voxelize(2 * f - 3 * g, coords, 4), 2 * avg_voxelize(f, coords, 4) - 3 * avg_voxelize(g, coords, 4)
    )
    torch.testing.assert_close(
        trilinear_devoxelize(2 * v - 3 * w, coords),
        2 * trilinear_devoxelize(v, coords) - 3 * trilinear_devoxelize(w, coords),
    )


def test_backward_is_the_adjoint() -> None:
    torch.manual_seed(4)
    coords = _random(2, 80, 4).double()
    f = torch.randn(2, 80, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 4, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    for y, x, cotangent in (
        (avg_voxelize(f, coords, 4), f, torch.randn_like(v)),
        (trilinear_devoxelize(v, coords), v, torch.randn_like(f)),
    ):
        (grad,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        torch.testing.assert_close((y * cotangent).sum(), (x * grad).sum())
        # The cotangent of a sum is one number, expanded.
        (of_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(of_sum, torch.autograd.grad(y, x, torch.ones_like(y))[0])


def test_gradcheck_twice_differentiable_and_no_gradient_to_coords() -> None:
    torch.manual_seed(5)
    coords = _random(2, 6, 3).double().requires_grad_()
    f = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    ops: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: avg_voxelize(x, coords, 3), f),
        (lambda x: trilinear_devoxelize(x, coords), v),
    ]
    for op, x in ops:
        assert torch.autograd.gradcheck(op, x)
        assert torch.autograd.gradgradcheck(op, x)
        op(x).sum().backward()
    assert coords.grad is None
    assert not plan_voxels(coords, 3).matrices.corners.weight.requires_grad


def test_same_bits_twice_and_with_any_number_of_threads() -> None:
    torch.manual_seed(6)
    B, N, C, R = 4, 1024, 16, 8
    coords = _random(B, N, R)
    f = torch.randn(B, N, C, requires_grad=True)
    v = torch.randn(B, R, R, R, C, requires_grad=True)
    grad_f, grad_v = torch.randn(B, N, C), torch.randn(B, R, R, R, C)

    def run() -> list[Tensor]:
        y, z = avg_voxelize(f, coords, R), trilinear_devoxelize(v, coords)
        return [y, z, *torch.autograd.grad((y, z), (f, v), (grad_v, grad_f))]

    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 1, 2, 5):
            torch.set_num_threads(n)
            runs.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@BOTH
def test_shared_plan_changes_nothing(impl: Impl) -> None:
    torch.manual_seed(7)
    coords = _random(2, 90, 5).to(DEVICE)
    f, v = torch.randn(2, 90, 3).to(DEVICE), torch.randn(2, 5, 5, 5, 3).to(DEVICE)
    for planned_by in ("reference", "triton"):
        plan = plan_voxels(coords, 5, impl=planned_by)
        for got, expected in (
            (avg_voxelize(f, coords, 5, plan=plan, impl=impl), avg_voxelize(f, coords, 5, impl=impl)),
            (trilinear_devoxelize(v, coords, plan=plan, impl=impl), trilinear_devoxelize(v, coords, impl=impl)),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_coordinates_outside_act_as_clamped_and_nan_stays_in_its_point(impl: Impl) -> None:
    torch.manual_seed(8)
    R = 4
    coords = (torch.randn(2, 40, 3) * 5 + 1.5).to(DEVICE)
    f, v = torch.randn(2, 40, 3).to(DEVICE), torch.randn(2, R, R, R, 3).to(DEVICE)
    inside = coords.clamp(0, R - 1)
    assert torch.equal(avg_voxelize(f, coords, R, impl=impl), avg_voxelize(f, inside, R, impl=impl))
    assert torch.equal(trilinear_devoxelize(v, coords, impl=impl), trilinear_devoxelize(v, inside, impl=impl))
    coords[1, 3] = torch.nan
    bad = trilinear_devoxelize(v, coords, impl=impl).isnan().any(-1)
    assert bad.nonzero().tolist() == [[1, 3]]
    assert avg_voxelize(f, coords, R, impl=impl).isfinite().all()


@BOTH
def test_empty_batch(impl: Impl) -> None:
    f, v = torch.zeros(0, 5, 3, device=DEVICE), torch.zeros(0, 2, 2, 2, 3, device=DEVICE)
    coords = torch.zeros(0, 5, 3, device=DEVICE)
    shapes = [t.shape for t in _gradients(coords, 2, f, v, impl)]
    assert shapes == [v.shape, f.shape, f.shape, v.shape]


def test_opcheck() -> None:
    coords = _random(2, 9, 3).to(DEVICE)
    torch.library.opcheck(voxel._voxel_coords_op.overload, (coords, 3))
    torch.library.opcheck(voxel._cells_op.overload, (coords, 3))
    cells, f = voxel._cells_op(coords, 3), torch.randn(2, 9, 4, device=DEVICE)
    v = torch.randn(2, 3, 3, 3, 4, device=DEVICE)
    torch.library.opcheck(voxel._avg_voxelize_op.overload, (f.requires_grad_(), coords, *cells, 3))
    torch.library.opcheck(voxel._trilinear_devoxelize_op.overload, (v.requires_grad_(), coords, *cells))
    never_differentiated = ("test_schema", "test_faketensor")
    count = torch.ones(v.shape[:4], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(voxel._avg_voxelize_bwd_op.overload, (v, coords, count), test_utils=never_differentiated)
    torch.library.opcheck(
        voxel._trilinear_devoxelize_bwd_op.overload, (f, coords, *cells, 3), test_utils=never_differentiated
    )


def test_a_plan_made_without_gradients_serves_with_them() -> None:
    torch.manual_seed(0)
    coords, v = _random(2, 9, 3), torch.randn(2, 3, 3, 3, 4, requires_grad=True)
    with torch.no_grad():
        plan = plan_voxels(coords, 3, impl="reference")
    assert plan.matrices.corners_t is None
    cotangent = torch.randn(2, 9, 4)
    gradients = [
        torch.autograd.grad(trilinear_devoxelize(v, coords, plan=p, impl="reference"), v, cotangent)[0]
        for p in (plan, None)
    ]
    assert torch.equal(*gradients)


@BOTH
def test_compiles_whole(impl: Impl) -> None:
    torch.manual_seed(9)

    def there_and_back(features: Tensor, points: Tensor) -> Tensor:
        coords = voxel_coords(points, 4)
        plan = plan_voxels(coords, 4, impl=impl)
        voxels = avg_voxelize(features, coords, 4, plan=plan, impl=impl)
        return trilinear_devoxelize(voxels, coords, plan=plan, impl=impl)

    f, points, cotangent = torch.randn(3, 2, 33, 3).to(DEVICE).unbind()
    f.requires_grad_()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    results = [(y, *torch.autograd.grad(y, f, cotangent)) for y in (there_and_back(f, points), compiled(f, points))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "R"), [(2, 2), (37, 8), (100, 3), (9, 1), (1030, 4)])
def test_voxel_coords(N: int, R: int, dtype: torch.dtype, impl: Impl) -> None:
    torch.manual_seed(10)
    points = (torch.randn(2, N, 3) * torch.tensor([1.0, 3.0, 0.2]) + 2).to(DEVICE, dtype).requires_grad_()
    coords = voxel_coords(points, R, impl=impl).cpu()
    assert coords.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not coords.requires_grad
    tolerance = 1e-14 if dtype == torch.float64 and impl == "reference" else 1e-6
    for cloud, got in zip(points.detach().tolist(), coords.tolist(), strict=True):
        mean = [sum(axis) / N for axis in zip(*cloud, strict=True)]
        radius = max(sum((p - m) ** 2 for p, m in zip(point, mean, strict=True)) ** 0.5 for point in cloud)
        for point, c in zip(cloud, got, strict=True):
            expected = [
                min(max(((p - m) / (2 * radius) + 0.5) * R, 0), R - 1) for p, m in zip(point, mean, strict=True)
            ]
            assert c == pytest.approx(expected, abs=tolerance * R)


@BOTH
@pytest.mark.parametrize("N", [1, 3, 7])
@pytest.mark.parametrize(("R", "centre"), [(1, 0), (2, 1), (8, 4), (9, 4.5)])
def test_voxel_coords_of_coincident_points_are_the_centre(N: int, R: int, centre: float, impl: Impl) -> None:
    # 0.1 and 0.7 are no binary fractions: their mean rounds to a neighbour of theirs for some N.
    points = torch.tensor([[0.1, 0.7, 1e5 / 3], [0, 0, 0]])[:, None].expand(2, N, 3)
    coords = voxel_coords(points.to(DEVICE), R, impl=impl).cpu()
    assert torch.equal(coords, torch.full((2, N, 3), float(centre)))


POINTS, FEATURES, VOXELS = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.zeros(2, 3, 3, 3, 4)
PLAN = plan_voxels(POINTS, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: voxel_coords(POINTS[:, :0], 3),
            "points: expected shape (B, N, 3) with N >= 1, got (2, 0, 3)",
        ),
        (lambda: voxel_coords(POINTS, 0), "resolution: expected an integer >= 1, got 0"),
        (
            lambda: plan_voxels(POINTS.int(), 3),
            "coords: expected float32, float64, bfloat16 or float16, got torch.int32",
        ),
        (lambda: plan_voxels(POINTS, 2.5), "resolution: expected an integer >= 1, got 2.5"),
        (
            lambda: plan_voxels(POINTS, 1100),
            "coords: expected B R^3 and 8 B N below 2^31, got B = 2, N = 5, R = 1100",
        ),
        (
            lambda: avg_voxelize(FEATURES[0], POINTS, 3),
            "features: expected shape (B, N, C) with C >= 1, got (5, 4)",
        ),
        (
            lambda: avg_voxelize(FEATURES[..., :0], POINTS, 3),
            "features: expected shape (B, N, C) with C >= 1, got (2, 5, 0)",
        ),
        (lambda: avg_voxelize(FEATURES[:1], POINTS, 3), "coords: expected the batch size of features (1), got 2"),
        (lambda: avg_voxelize(FEATURES[:, :4], POINTS, 3), "features: expected the N of coords (5), got 4"),
        (
            lambda: avg_voxelize(FEATURES, POINTS[..., :2], 3),
            "coords: expected shape (B, N, 3) with N >= 1, got (2, 5, 2)",
        ),
        (lambda: avg_voxelize(FEATURES, POINTS, 4, plan=PLAN), "plan: expected resolution 4, got 3"),
        (
            lambda: avg_voxelize(FEATURES[:, :4], POINTS[:, :4], 3, plan=PLAN),
            "plan: expected (2, 4, 3) coords, got (2, 5, 3)",
        ),
        (
            lambda: trilinear_devoxelize(VOXELS[:, :2], POINTS),
            "voxels: expected shape (B, R, R, R, C) with R >= 1 and C >= 1, got (2, 2, 3, 3, 4)",
        ),
        (
            lambda: trilinear_devoxelize(VOXELS.long(), POINTS),
            "voxels: expected float32, float64, bfloat16 or float16, got torch.int64",
        ),
        (
            lambda: trilinear_devoxelize(VOXELS, POINTS.to("meta")),
            "coords: expected the device of voxels (cpu), got meta",
        ),
        (
            lambda: trilinear_devoxelize(VOXELS[:, :2, :2, :2], POINTS, plan=PLAN),
            "plan: expected resolution 2, got 3",
        ),
        (
            lambda: trilinear_devoxelize(VOXELS, POINTS, impl="cuda"),
            'impl: expected "auto", "triton" or "reference", got \'cuda\'',
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
