"""Distances between all pairs of two sets of clouds, for evaluation; no gradients.

    pairwise_chamfer   out[s, r] = mean_n min_m |a_sn - b_rm|^2 + mean_m min_n |a_sn - b_rm|^2
    pairwise_emd       out[s, r] = approx_emd(a_s, b_r) or exact_emd(a_s, b_r)

On a CPU the Chamfer distances come from one k-d tree per cloud (SciPy), built once and asked by all its
partners; the reference compares all points and is the check. Exact assignment runs in processes, since SciPy
solves it without releasing the interpreter. Both use ``torch.get_num_threads()`` cores.

Legend: S and R clouds, N and M points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Progress = Callable[[int], object]


@torch.no_grad()
def pairwise_chamfer_reference(
    a: Float[Tensor, "S N 3"], b: Float[Tensor, "R M 3"], progress: Progress | None = None
) -> Float[Tensor, "S R"]:
    """Plain PyTorch form of :func:`pairwise_chamfer`."""
