"""MSN's ops: the auction EMD (``emd_module``), the expansion penalty and minimum density sampling.

    emdModule, emdFunction                     emd.emd_module
    expansionPenaltyModule, expansionPenaltyFunction    expansion_penalty.expansion_penalty_module
    minimum_density_sample, gather_operation   MDS.MDS_module

The auction has a kernel; the other two are PyTorch operations on every device. ValueError: arguments that do not fit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from lion_triton import kernels
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels.compat._clouds import as_int, check_tensors
from lion_triton.kernels.compat.pvcnn import gather as gather_operation

__all__ = [
    "emdFunction",
    "emdModule",
    "expansionPenaltyFunction",
    "expansionPenaltyModule",
    "gather_operation",
    "minimum_density_sample",
]


class emdFunction:
    """Called as the original is: ``emdFunction.apply(xyz1, xyz2, eps, iters)``; see :class:`emdModule`."""

    @staticmethod
    def apply(
        xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B N 3"], eps: float, iters: int
    ) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
        check_tensors(xyz1=xyz1, xyz2=xyz2)
        return kernels.auction_emd(xyz1, xyz2.detach(), float(eps), as_int("iters", iters))


class emdModule(nn.Module):
    """Squared distances to the points that an auction assigns, and their indices.

    input1, input2: (B, N, 3), any N (the original's: multiples of 1024), clouds about as large as 1, as eps is a
    length: 0.005 with iters 50 in MSN's training, 0.002 with 10000 in its evaluation. Returns (B, N) float32 and
    (B, N) int32; few rounds leave an assignment that is not one to one. Differentiable in input1 only, as the original;
    deterministic.
    """

    def forward(
        self, input1: Float[Tensor, "B N 3"], input2: Float[Tensor, "B N 3"], eps: float, iters: int
    ) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
        return emdFunction.apply(input1, input2, eps, iters)


class expansionPenaltyFunction:
    """``apply(xyz, primitive_size, alpha)``; see :class:`expansionPenaltyModule`."""

    @staticmethod
    def apply(
        xyz: Float[Tensor, "B N 3"], primitive_size: int, alpha: float
    ) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"], Float[Tensor, " B"]]:
        check_tensors(xyz=xyz)
        size = as_int("primitive_size", primitive_size)
        if xyz.ndim != 3 or xyz.shape[2] != 3 or size < 2 or xyz.shape[1] % size or not xyz.shape[1]:
            shape = tuple(xyz.shape)
            raise ValueError(f"xyz: expected (B, N, 3) with N a multiple of primitive_size >= 2 ({size}), got {shape}")
        return _expansion_penalty_op(xyz.float(), size, float(alpha))


class expansionPenaltyModule(nn.Module):
    """Lengths of the edges that are long, in a minimum spanning tree of each surface element.

    input: (B, N, 3); every ``primitive_size`` points in a row are an element. Leaves are taken off a tree, round by
    round, each with its edge (of a last pair the higher index); an edge longer than alpha x the tree's mean is its
    leaf's penalty. Returns dist (B, N) float32, 0 where there is none, assignment (B, N) int32, the edge's other end or
    -1, and the mean edge length (B,). As in the original the gradient of dist is that of the SQUARED length, to the
    penalised point only; the others have none. Deterministic.
    """

    def forward(
        self, input: Float[Tensor, "B N 3"], primitive_size: int, alpha: float
    ) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"], Float[Tensor, " B"]]:
        return expansionPenaltyFunction.apply(input, primitive_size, alpha)


def _empty_penalties(xyz: Tensor, size: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = xyz.shape[:2]
    return xyz.new_empty(shape), xyz.new_empty(shape, dtype=torch.int32), xyz.new_empty(shape[0])


@op(fake=_empty_penalties)
def _expansion_penalty_op(xyz: Tensor, size: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = xyz.shape
    ends, lengths = _spanning_tree(xyz.reshape(B * N // size, size, 3))
    mean = lengths.mean(1)
    owner = _owners(ends, size)  # of each edge: the point that it counts for
    place = torch.where(lengths > mean[:, None] * alpha, owner, size)  # short edges go to a slot of their own
    first = torch.arange(0, N, size, device=xyz.device).repeat(B)[:, None]
    dist = xyz.new_zeros(len(ends), size + 1).scatter_(1, place, lengths)
    assignment = torch.full_like(dist, -1, dtype=torch.int64).scatter_(1, place, ends.sum(2) - owner + first)
    dist, assignment = (t[:, :size].reshape(B, N) for t in (dist, assignment))
    return dist, assignment.int(), mean.view(B, N // size).mean(1)


@gradient(_expansion_penalty_op, save=lambda xyz, size, alpha, out: (xyz, out[1]))
def _expansion_penalty_backward(needs: Needs, grad: Tensor, xyz: Tensor, assignment: Tensor) -> Gradients:
    difference = xyz - xyz.take_along_dim(assignment.clamp(min=0).long()[..., None], 1)
    return ((2 * grad[..., None] * difference).masked_fill((assignment < 0)[..., None], 0),)


def _spanning_tree(points: Float[Tensor, "G S 3"]) -> tuple[Tensor, Float[Tensor, "G S-1"]]:
    """Edges (G, S - 1, 2) and their lengths, in the order that Prim's algorithm finds them from point 0."""
    G, S, _ = points.shape
    group = torch.arange(G, device=points.device)
    near = torch.full((G, S), torch.inf, device=points.device)  # distance to the tree; of its own points infinity
    nearest = torch.zeros(G, S, dtype=torch.int64, device=points.device)
    in_tree = torch.zeros(G, S, dtype=torch.bool, device=points.device)
    last = torch.zeros(G, dtype=torch.int64, device=points.device)
    ends, lengths = [], []
    for _ in range(S - 1):
        in_tree[group, last] = True
        distance = (points - points[group, last][:, None]).square().sum(-1).sqrt()
        closer = distance < near
        near, nearest = torch.where(closer, distance, near), torch.where(closer, last[:, None], nearest)
        last = near.masked_fill(in_tree, torch.inf).argmin(1)
        ends.append(torch.stack([last, nearest[group, last]], 1))
        lengths.append(near[group, last])
    return torch.stack(ends, 1), torch.stack(lengths, 1)


def _owners(ends: Tensor, size: int) -> Tensor:
    """Of each edge (G, E, 2) the end that becomes a leaf first; of two at once the higher index."""
    owner = torch.full(ends.shape[:2], -1, dtype=torch.int64, device=ends.device)
    while (left := owner < 0).any():
        degree = torch.zeros(len(ends), size, dtype=torch.int64, device=ends.device)
        degree.scatter_add_(1, ends.flatten(1), left.repeat_interleave(2, 1).long())
        leaf = degree.gather(1, ends.flatten(1)).view(ends.shape) == 1
        owner = torch.where(left, torch.where(leaf, ends, -1).amax(2), owner)
    return owner


@torch.no_grad()
def minimum_density_sample(
    xyz: Float[Tensor, "B N 3"], npoint: int, mean_mst_length: Float[Tensor, " B"]
) -> Int32[Tensor, "B M"]:
    """Indices (B, npoint) of points, each where those before it are least dense, starting at point 0.

    Every sampled point p adds exp(-|x - p|^2 / (5 l^2)) to the density at x, l the mean length of
    ``expansionPenaltyModule``; as in the original twice that from index 8192 on, the points of MSN's input. Ties go to
    the lowest index; when all are sampled, index 0 follows. Deterministic.
    """
    check_tensors(xyz=xyz, mean_mst_length=mean_mst_length)
    B, N, _ = xyz.shape
    xyz = xyz.float()
    # Of a length whose square is 0 only the point itself is near; 0 / 0 would be no number.
    scale = (5 * mean_mst_length.float().square()[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
    weight = torch.where(torch.arange(N, device=xyz.device) < 8192, 1.0, 2.0)
    density = torch.zeros(B, N, device=xyz.device)
    idx = torch.zeros(B, as_int("npoint", npoint), dtype=torch.int64, device=xyz.device)
    for m in range(1, idx.shape[1]):
        last = idx[:, m - 1, None]
        density.scatter_(1, last, torch.inf)
        sqdist = (xyz - xyz.take_along_dim(last[..., None], 1)).square().sum(-1)
        density += torch.exp(-sqdist / scale) * weight
        idx[:, m] = density.argmin(1)
    return idx.int()
