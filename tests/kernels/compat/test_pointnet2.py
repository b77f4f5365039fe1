from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_triton.kernels.compat import pointnet2
from tests.kernels.compat.cases import (
    DEVICE,
    assert_close,
    assert_equal,
    assert_same_gradients,
    double,
    leaf,
    rand,
    randint,
)


def brute_samples(xyz: Tensor, count: int) -> list[int]:
    """One cloud, as the CUDA kernel of pointnet2_ops goes: points near the origin are passed over."""
    chosen, nearest = [0], [1e10] * len(xyz)
    points = xyz.double().tolist()
    for _ in range(count - 1):
        best, besti = -1.0, 0
        for k, p in enumerate(points):
            if sum(c * c for c in p) <= 1e-3:
                continue
            d = sum((a - b) ** 2 for a, b in zip(p, points[chosen[-1]], strict=True))
            nearest[k] = min(nearest[k], d)
            if nearest[k] > best:
                best, besti = nearest[k], k
        chosen.append(besti)
    return chosen


class TestUtils:
    @pytest.mark.parametrize(("N", "count"), [(1, 1), (1, 3), (37, 12), (5, 9)])
    @pytest.mark.parametrize("near_origin", [(), (0,), (2, 3), (0, 1, 2, 3, 4)], ids=str)
    def test_sampling_passes_over_points_near_the_origin(
        self, N: int, count: int, near_origin: tuple[int, ...]
    ) -> None:
        xyz = rand(2, N, 3, seed=N)
        for k in near_origin:
            xyz[0, k : k + 1] *= 1e-3
        idx = pointnet2.furthest_point_sample(xyz, count)
        assert idx.dtype == torch.int32
        assert idx.tolist() == [brute_samples(cloud.cpu(), count) for cloud in xyz]

    def test_padding_with_zeros_is_never_sampled(self) -> None:
        xyz = torch.cat([rand(1, 6, 3, seed=0), torch.zeros(1, 50, 3, device=DEVICE)], 1)
        assert pointnet2.furthest_point_sample(xyz, 6).max() < 6

    @pytest.mark.parametrize(("N", "M"), [(9, 14), (1, 1), (4, 2), (3, 3)])
    def test_three_nn_returns_roots(self, N: int, M: int) -> None:
        unknown, known = leaf(rand(2, N, 3, seed=0)), leaf(rand(2, M, 3, seed=1))
        dist, idx = pointnet2.three_nn(unknown, known)
        expected = torch.cdist(double(unknown), double(known)).sort(2)
        k = min(3, M)
        assert idx.dtype == torch.int32 and not dist.requires_grad
        assert_close(dist[..., :k], expected.values[..., :3])
        assert_equal(idx[..., :k], expected.indices[..., :3].int())
        assert (dist[..., k:].isinf() & (idx[..., k:] == 0)).all()

    def test_gathering_and_interpolating(self) -> None:
        x, idx, idx2 = leaf(rand(2, 5, 7, seed=2)), randint(0, 7, 2, 4, seed=3), randint(0, 7, 2, 4, 3, seed=4)
        weight = rand(2, 4, 3, seed=5).requires_grad_()
        a = double(x)
        gathered = torch.stack([a[b][:, idx[b].cpu()] for b in range(2)])
        grouped = torch.stack([a[b][:, idx2[b].cpu()] for b in range(2)])
        interpolated = (grouped * weight.detach().cpu().double()[:, None]).sum(3)
        outputs = [
            pointnet2.gather_operation(x, idx.int()),
            pointnet2.grouping_operation(x, idx2.int()),
            pointnet2.three_interpolate(x, idx2.int(), weight),
        ]
        assert_same_gradients(outputs, [gathered, grouped, interpolated], [x], [a])
        assert weight.grad is None  # as in the original

    def test_ball_query_takes_the_radius_first(self) -> None:
        xyz, centers = rand(2, 30, 3, seed=6), rand(2, 5, 3, seed=7)
        idx = pointnet2.ball_query(1.0, 4, xyz, centers)
        for b in range(2):
            for m in range(5):
                hits = ((xyz[b] - centers[b, m]).square().sum(-1) < 1).nonzero().flatten().tolist()[:4]
                assert idx[b, m].tolist() == ((hits + hits[:1] * 4)[:4] if hits else [0] * 4)

    def test_query_and_group(self) -> None:
        xyz, centers, features = (
            leaf(rand(2, 30, 3, seed=8)),
            leaf(rand(2, 5, 3, seed=9)),
            leaf(rand(2, 4, 30, seed=10)),
        )
        a, c, f = double(xyz), double(centers), double(features)
        idx = pointnet2.ball_query(1.5, 6, xyz, centers).cpu().long()
        near = torch.stack([a[b][idx[b]] for b in range(2)]) - c[:, :, None]
        expected = torch.cat([near.permute(0, 3, 1, 2), torch.stack([f[b][:, idx[b]] for b in range(2)])], 1)
        grouped = pointnet2.QueryAndGroup(1.5, 6)(xyz, centers, features)
        assert_same_gradients([grouped], [expected], [xyz, centers, features], [a, c, f])
        assert_close(pointnet2.QueryAndGroup(1.5, 6, use_xyz=False)(xyz, centers, features), expected[:, 3:])
        assert_close(pointnet2.QueryAndGroup(1.5, 6)(xyz, centers), expected[:, :3])
        normal, relative = pointnet2.QueryAndGroup(1.5, 6, ret_grouped_xyz=True, normalize_xyz=True)(xyz, centers)
        assert_close(relative, expected[:, :3] / 1.5)
        assert torch.equal(normal, relative)
        with pytest.raises(ValueError, match="features: expected a tensor"):
            pointnet2.QueryAndGroup(1.5, 6, use_xyz=False)(xyz, centers)

    def test_sample_uniformly(self) -> None:
        torch.manual_seed(0)
        xyz = rand(1, 12, 3, seed=11)
        group = pointnet2.QueryAndGroup(1.2, 8, sample_uniformly=True, ret_unique_cnt=True)
        grouped, count = group(xyz, xyz)
        plain = pointnet2.ball_query(1.2, 8, xyz, xyz)
        assert count.dtype == torch.float32
        assert count[0].tolist() == [len(set(row)) for row in plain[0].tolist()]
        points = grouped.permute(0, 2, 3, 1) + xyz[:, :, None]
        idx = torch.cdist(points[0], xyz[0].expand(12, -1, -1)).argmin(2)
        for found, row in zip(idx.tolist(), plain[0].tolist(), strict=True):
            unique = sorted(set(row))
            assert found[: len(unique)] == unique and set(found) == set(unique)
        assert any(len(set(row[len(set(row)) :])) > 1 for row in idx.tolist())  # not the first one only

    def test_group_all(self) -> None:
        xyz, features = rand(2, 6, 3, seed=12), rand(2, 4, 6, seed=13)
        assert_equal(pointnet2.GroupAll()(xyz, None, features)[:, :, 0], torch.cat([xyz.mT, features], 1).cpu())
        grouped, coordinates = pointnet2.GroupAll(False, True)(xyz, None, features)
        assert_equal(grouped[:, :, 0], features.cpu())
        assert_equal(coordinates[:, :, 0], xyz.mT.cpu())


def with_older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As SharedMLP of the older packages calls them: three layers a step, of which the last has no parameters."""
    older = {}
    for key, value in state.items():
        *module, layer, name = key.split(".")
        step, what = divmod(int(layer), 3)
        older[".".join([*module, f"layer{step}", *(["bn", "bn"] if what else ["conv"]), name])] = value
    return older


class TestModules:
    def clouds(self) -> tuple[Tensor, Tensor]:
        return rand(2, 40, 3, seed=0), rand(2, 5, 40, seed=1).requires_grad_()

    def test_set_abstraction(self) -> None:
        xyz, features = self.clouds()
        spec = [[5, 8], [5, 7, 9]]
        sa = pointnet2.PointnetSAModuleMSG(10, [0.4, 0.9], [4, 6], spec).to(DEVICE).eval()
        assert spec == [[5, 8], [5, 7, 9]]
        new_xyz, out = sa(xyz, features)
        idx = pointnet2.furthest_point_sample(xyz, 10)
        centers = xyz.take_along_dim(idx.long()[..., None], 1)
        assert_equal(new_xyz, centers.cpu())
        expected = []
        for radius, nsample, mlp in zip([0.4, 0.9], [4, 6], sa.mlps, strict=True):
            grouped = pointnet2.QueryAndGroup(radius, nsample)(xyz, centers, features)
            expected.append(mlp(grouped).amax(3))
        assert_close(out, torch.cat(expected, 1).cpu())
        out.sum().backward()
        assert features.grad is not None and features.grad.abs().sum() > 0
        assert pointnet2.PointnetSAModule([5, 8]).to(DEVICE)(xyz, features)[1].shape == (2, 8, 1)

    def test_votes(self) -> None:
        xyz, features = self.clouds()
        for pooling in ("max", "avg", "rbf"):
            sa = pointnet2.PointnetSAModuleVotes(
                mlp=[5, 8], npoint=10, radius=0.9, nsample=6, pooling=pooling, normalize_xyz=True
            ).to(DEVICE)
            inds = randint(0, 40, 2, 10, seed=2).int()
            new_xyz, out, same = sa(xyz, features, inds)
            grouped, relative = pointnet2.QueryAndGroup(0.9, 6, True, True, True)(xyz, new_xyz, features)
            lifted = sa.mlp_module(grouped)
            rbf = torch.exp(-relative.square().sum(1) / 0.45**2 / 2)[:, None]
            expected = {"max": lifted.amax(3), "avg": lifted.mean(3), "rbf": (lifted * rbf).sum(3) / 6}[pooling]
            assert same is inds
            assert_close(out, expected.cpu(), 1e-4)
        msg = pointnet2.PointnetSAModuleMSGVotes(10, [0.9], [6], [[5, 8]]).to(DEVICE)
        assert_equal(msg(xyz, features, inds)[2], inds.cpu())
        with pytest.raises(ValueError, match="inds: expected 10 indices of each cloud, got 3"):
            sa(xyz, features, inds[:, :3])

    def test_feature_propagation(self) -> None:
        known, unknown = rand(2, 6, 3, seed=3), rand(2, 9, 3, seed=4)
        features, skip = leaf(rand(2, 4, 6, seed=5)), rand(2, 2, 9, seed=6)
        fp = pointnet2.PointnetFPModule(mlp=[6, 8]).to(DEVICE)
        dist = torch.cdist(double(unknown), double(known)).sort(2)
        inverse = 1 / (dist.values[..., :3] + 1e-8)
        weight = inverse / inverse.sum(2, keepdim=True)
        f = double(features)
        near = torch.stack([f[b][:, dist.indices[b, :, :3]] for b in range(2)])
        together = torch.cat([(near * weight[:, None]).sum(3), skip.cpu().double()], 1).float().to(DEVICE)
        assert_close(fp(unknown, known, skip, features), fp.mlp(together[..., None])[..., 0].cpu(), 1e-4)
        assert fp(unknown, None, skip, features[..., :1]).shape == (2, 8, 9)
        assert pointnet2.PointnetFPModule([4, 8]).to(DEVICE)(unknown, known, None, features).shape == (2, 8, 9)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: pointnet2.PointnetSAModule([5, 8, 9], 4, 0.5, 3),
            lambda: pointnet2.PointnetFPModule([5, 8, 9]),
            lambda: pointnet2.PointnetSAModuleVotes(mlp=[5, 8, 9], npoint=4, radius=0.5, nsample=3),
        ],
    )
    def test_older_state_dicts_load(self, make: Callable[[], nn.Module]) -> None:
        here, there = make(), make()
        state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in there.state_dict().items()}
        assert here.load_state_dict(with_older_names(state)) == nn.modules.module._IncompatibleKeys([], [])
        assert all(torch.equal(value, state[key]) for key, value in here.state_dict().items())
        assert here.load_state_dict(dict(state)) == nn.modules.module._IncompatibleKeys([], [])


class TestWrappers:
    def test_outputs_are_written(self) -> None:
        xyz, new_xyz = rand(2, 9, 3, seed=0), rand(2, 4, 3, seed=1)
        xyz[0, 1:3] = 0  # nothing is passed over
        idx = torch.zeros(2, 9, dtype=torch.int32, device=DEVICE)
        assert pointnet2.furthest_point_sampling_wrapper(2, 9, 9, xyz, None, idx) == 1
        assert idx.sort(1).values.tolist() == [[0, 0, 1, *range(3, 9)], list(range(9))]
        ball = torch.zeros(2, 4, 6, dtype=torch.int32, device=DEVICE)
        pointnet2.ball_query_wrapper(2, 9, 4, 0.8, 6, new_xyz, xyz, ball)
        assert torch.equal(ball, pointnet2.ball_query(0.8, 6, xyz, new_xyz))
        dist2, three = torch.zeros(2, 4, 3, device=DEVICE), torch.zeros(2, 4, 3, dtype=torch.int32, device=DEVICE)
        pointnet2.three_nn_wrapper(2, 4, 9, new_xyz, xyz, dist2, three)
        dist, expected = pointnet2.three_nn(new_xyz, xyz)
        assert_close(dist2, dist.square().cpu())
        assert torch.equal(three, expected)

    def test_gathers_and_their_gradients(self) -> None:
        points, weight = rand(2, 5, 9, seed=3), rand(2, 4, 3, seed=4)
        idx, idx1 = randint(0, 9, 2, 4, 3, seed=5).int(), randint(0, 9, 2, 4, seed=6).int()
        for call, back, forward in (
            (
                lambda out: pointnet2.gather_points_wrapper(2, 5, 9, 4, points, idx1, out),
                lambda g, out: pointnet2.gather_points_grad_wrapper(2, 5, 9, 4, g, idx1, out),
                lambda x: pointnet2.gather_operation(x, idx1),
            ),
            (
                lambda out: pointnet2.group_points_wrapper(2, 5, 9, 4, 3, points, idx, out),
                lambda g, out: pointnet2.group_points_grad_wrapper(2, 5, 9, 4, 3, g, idx, out),
                lambda x: pointnet2.grouping_operation(x, idx),
            ),
            (
                lambda out: pointnet2.three_interpolate_wrapper(2, 5, 9, 4, points, idx, weight, out),
                lambda g, out: pointnet2.three_interpolate_grad_wrapper(2, 5, 4, 9, g, idx, weight, out),
                lambda x: pointnet2.three_interpolate(x, idx, weight),
            ),
        ):
            x = leaf(points)
            expected = forward(x)
            out, grad = torch.zeros_like(expected), rand(*expected.shape, seed=7)
            call(out)
            assert torch.equal(out, expected)
            expected.backward(grad)
            added = torch.ones_like(points)
            back(grad, added)
            assert x.grad is not None
            assert_close(added - 1, x.grad.cpu())

    def test_an_output_that_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"out_tensor: expected shape \(1, 2, 3\), got \(1, 2, 4\)"):
            pointnet2.gather_points_wrapper(
                *(1, 2, 5, 3, torch.zeros(1, 2, 5), torch.zeros(1, 3).int(), torch.zeros(1, 2, 4))
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pointnet2.furthest_point_sample([[0.0]], 1), "xyz: expected a tensor, got list"),
        (lambda: pointnet2.furthest_point_sample(torch.zeros(1, 3), 1), r"xyz: expected shape \(B, N, 3\)"),
        (lambda: pointnet2.furthest_point_sample(torch.zeros(1, 3, 3), 0), "npoint: expected an integer >= 1, got 0"),
        (lambda: pointnet2.ball_query(1, 2.5, torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)), "nsample: expected an int"),
        (lambda: pointnet2.QueryAndGroup(1, 2, ret_unique_cnt=True), "ret_unique_cnt: expected sample_uniformly=True"),
        (lambda: pointnet2.PointnetSAModuleMSG(2, [1.0], [2], []), "radii, nsamples, mlps: expected as many of each"),
        (lambda: pointnet2.PointnetSAModuleVotes(mlp=[1], pooling="sum"), "pooling: expected"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
