"""``pointnet2_modules``: set abstraction and feature propagation, by sampling, grouping, an MLP and a maximum.

Parameters are called as in pointnet2_ops; state dicts of the older packages and of VoteNet, which call them
``layer0.conv.weight`` and so on, load too. The lists of channels that are given are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lion_triton.kernels.compat._clouds import as_int
from lion_triton.kernels.compat.pointnet2.utils import (
    GroupAll,
    QueryAndGroup,
    furthest_point_sample,
    gather_operation,
    three_interpolate,
    three_nn,
)

__all__ = [
    "PointnetFPModule",
    "PointnetSAModule",
    "PointnetSAModuleMSG",
    "PointnetSAModuleMSGVotes",
    "PointnetSAModuleVotes",
    "build_shared_mlp",
]


def build_shared_mlp(mlp_spec: Sequence[int], bn: bool = True) -> nn.Sequential:
    """1 x 1 convolutions of these channels, each with a batch norm (or a bias) and a ReLU."""
    layers: list[nn.Module] = []
    for before, after in zip(mlp_spec, mlp_spec[1:], strict=False):
        layers.append(nn.Conv2d(before, after, 1, bias=not bn))
        layers += [nn.BatchNorm2d(after)] * bn
        layers.append(nn.ReLU())
    mlp = nn.Sequential(*layers)
    mlp.register_load_state_dict_pre_hook(_rename_older)
    return mlp


def _rename_older(mlp: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """``layer1.conv.weight`` is ``3.weight`` (``2.weight`` without batch norms), ``layer1.bn.bn.bias`` ``4.bias``."""
    stride = 3 if any(isinstance(layer, nn.BatchNorm2d) for layer in mlp.children()) else 2
    for key in [key for key in state if key.startswith(prefix)]:
        older = re.fullmatch(r"layer(\d+)\.(conv|bn\.bn)\.(\w+)", key[len(prefix) :])
        if older:
            layer = int(older[1]) * stride + (older[2] != "conv")
            state[f"{prefix}{layer}.{older[3]}"] = state.pop(key)


def _with_xyz(mlp: Sequence[int], use_xyz: bool) -> list[int]:
    return [mlp[0] + 3 * use_xyz, *mlp[1:]] if len(mlp) else []


def _centers(
    xyz: Float[Tensor, "B N 3"], npoint: int | None, inds: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Sampled points (B, M, 3) and their indices; None if all points form one group."""
    if npoint is None:
        return None, inds
    inds = furthest_point_sample(xyz, npoint) if inds is None else inds
    return gather_operation(xyz.mT, inds).mT.contiguous(), inds


class PointnetSAModuleMSG(nn.Module):
    """Set abstraction with several radii, whose features are put one behind the other.

    npoint: centres, None for one group of all points; radii, nsamples, mlps: one of each scale; bn: batch norms;
    use_xyz: relative coordinates go in too; sample_uniformly: see :class:`QueryAndGroup`.
    """

    def __init__(
        self,
        npoint: int | None,
        radii: Sequence[float | None],
        nsamples: Sequence[int | None],
        mlps: Sequence[Sequence[int]],
        bn: bool = True,
        use_xyz: bool = True,
        sample_uniformly: bool = False,
    ) -> None:
        super().__init__()
        if not len(radii) == len(nsamples) == len(mlps):
            lengths = f"{len(radii)}, {len(nsamples)} and {len(mlps)}"
            raise ValueError(f"radii, nsamples, mlps: expected as many of each, got {lengths}")
        self.npoint = npoint
        self.groupers, self.mlps = nn.ModuleList(), nn.ModuleList()
        for radius, nsample, mlp in zip(radii, nsamples, mlps, strict=True):
            if npoint is None:
                self.groupers.append(GroupAll(use_xyz))
            else:
                assert radius is not None and nsample is not None
                self.groupers.append(QueryAndGroup(radius, nsample, use_xyz, sample_uniformly=sample_uniformly))
            self.mlps.append(build_shared_mlp(_with_xyz(mlp, use_xyz), bn))

    def forward(self, xyz: Float[Tensor, "B N 3"], features: Float[Tensor, "B C N"] | None = None) -> Any:
        """Returns the centres (B, M, 3), None if there are none, and features (B, sum of the last channels, M)."""
        return self._abstract(xyz, features, None)[:2]

    def _abstract(
        self, xyz: Tensor, features: Tensor | None, inds: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        new_xyz, inds = _centers(xyz, self.npoint, inds)
        scales = zip(self.groupers, self.mlps, strict=True)
        return new_xyz, torch.cat([mlp(group(xyz, new_xyz, features)).max(3).values for group, mlp in scales], 1), inds


class PointnetSAModule(PointnetSAModuleMSG):
    """Set abstraction with one radius."""

    def __init__(
        self,
        mlp: Sequence[int],
        npoint: int | None = None,
        radius: float | None = None,
        nsample: int | None = None,
        bn: bool = True,
        use_xyz: bool = True,
    ) -> None:
        super().__init__(npoint, [radius], [nsample], [mlp], bn=bn, use_xyz=use_xyz)


class PointnetSAModuleMSGVotes(PointnetSAModuleMSG):
    """VoteNet's: takes and returns the indices of the centres."""

    def forward(
        self,
        xyz: Float[Tensor, "B N 3"],
        features: Float[Tensor, "B C N"] | None = None,
        inds: Int[Tensor, "B M"] | None = None,
    ) -> Any:
        """Returns the centres (B, M, 3), features and the indices (B, M)."""
        return self._abstract(xyz, features, inds)


class PointnetSAModuleVotes(nn.Module):
    """VoteNet's set abstraction with one radius: takes and returns the indices of the centres.

    pooling: "max", "avg" or "rbf" over a centre's neighbours: a sum weighted by exp(-d^2 / 2 sigma^2), over nsample.
    sigma: half the radius by default. The others: see :class:`QueryAndGroup`.
    """

    def __init__(
        self,
        *,
        mlp: Sequence[int],
        npoint: int | None = None,
        radius: float | None = None,
        nsample: int | None = None,
        bn: bool = True,
        use_xyz: bool = True,
        pooling: str = "max",
        sigma: float | None = None,
        normalize_xyz: bool = False,
        sample_uniformly: bool = False,
        ret_unique_cnt: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in ("max", "avg", "rbf"):
            raise ValueError(f'pooling: expected "max", "avg" or "rbf", got {pooling!r}')
        self.npoint, self.radius, self.nsample, self.pooling, self.use_xyz = npoint, radius, nsample, pooling, use_xyz
        self.sigma = sigma or (radius or 0) / 2
        self.normalize_xyz, self.ret_unique_cnt = normalize_xyz, ret_unique_cnt
        if npoint is None:
            self.grouper: nn.Module = GroupAll(use_xyz, ret_grouped_xyz=True)
        else:
            assert radius is not None and nsample is not None
            self.grouper = QueryAndGroup(
                radius, nsample, use_xyz, True, normalize_xyz, sample_uniformly, ret_unique_cnt
            )
        self.mlp_module = build_shared_mlp(_with_xyz(mlp, use_xyz), bn)

    def forward(
        self,
        xyz: Float[Tensor, "B N 3"],
        features: Float[Tensor, "B C N"] | None = None,
        inds: Int[Tensor, "B M"] | None = None,
    ) -> Any:
        """Returns centres (B, M, 3), features (B, C', M), indices (B, M), and with ``ret_unique_cnt`` counts (B, M)."""
        if inds is not None and self.npoint is not None and inds.shape[1] != as_int("npoint", self.npoint):
            raise ValueError(f"inds: expected {self.npoint} indices of each cloud, got {inds.shape[1]}")
        new_xyz, inds = _centers(xyz, self.npoint, inds)
        grouped, grouped_xyz, *counts = self.grouper(xyz, new_xyz, features)
        new_features = self.mlp_module(grouped)
        if self.pooling == "max":
            new_features = new_features.max(3).values
        elif self.pooling == "avg":
            new_features = new_features.mean(3)
        else:
            weight = torch.exp(-grouped_xyz.square().sum(1) / self.sigma**2 / 2)
            new_features = (new_features * weight[:, None]).sum(3) / float(self.nsample or grouped.shape[3])
        return new_xyz, new_features, inds, *counts


class PointnetFPModule(nn.Module):
    """Feature propagation: features of known points, interpolated by inverse distance, beside those of unknown ones."""

    def __init__(self, mlp: Sequence[int], bn: bool = True) -> None:
        super().__init__()
        self.mlp = build_shared_mlp(mlp, bn)

    def forward(
        self,
        unknown: Float[Tensor, "B N 3"],
        known: Float[Tensor, "B M 3"] | None,
        unknow_feats: Float[Tensor, "B C1 N"] | None,
        known_feats: Float[Tensor, "B C2 M"],
    ) -> Float[Tensor, "B C N"]:
        """Without ``known`` its features (B, C2, 1) are those of all."""
        if known is None:
            features = known_feats.expand(-1, -1, unknown.shape[1])
        else:
            distance, idx = three_nn(unknown, known)
            inverse = 1 / (distance + 1e-8)
            features = three_interpolate(known_feats, idx, inverse / inverse.sum(2, keepdim=True))
        if unknow_feats is not None:
            features = torch.cat([features, unknow_feats], 1)
        return self.mlp(features[..., None])[..., 0]
