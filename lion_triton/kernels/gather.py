"""Rows of features by index, and sums of three of them: what networks on points move features with.

    group              G[m, k] = F[i(m, k)]                 backward  dF[n] = sum_{m,k: i(m,k) = n} dG[m, k]
    three_interpolate  O[n] = sum_k w_k(n) F[i_k(n)]        backward  dF[m] = sum_{n,k: i_k(n) = m} w_k(n) dO[n]
                                                                      dw_k(n) = dO[n] . F[i_k(n)]

In both forms one gather of the rows of all clouds at once, with its backward, by ``rows.py``.

Legend: B clouds, N points, M centres, K neighbours, C channels. Indices are int32 or int64.
Source: Qi et al., "PointNet++", NeurIPS 2017 (three_interpolate).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_same
from lion_triton.kernels.rows import take_rows


def group_reference(features: Float[Tensor, "B N C"], idx: Int[Tensor, "B M K"]) -> Float[Tensor, "B M K C"]:
    """Plain PyTorch form of :func:`group`."""
    return _group(features, idx, "reference")


def three_interpolate_reference(
    features: Float[Tensor, "B M C"], weights: Float[Tensor, "B N 3"], idx: Int[Tensor, "B N 3"]
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`three_interpolate`."""
    return _three_interpolate(features, weights, idx, "reference")


def group(
    features: Float[Tensor, "B N C"], idx: Int[Tensor, "B M K"], *, impl: Impl = "auto"
) -> Float[Tensor, "B M K C"]:
    """Rows of ``features`` at ``idx``: ``out[b, m, k] = features[b, idx[b, m, k]]``.

    features: (B, N, C), any floating dtype. idx: (B, M, K) int32 or int64 in [0, N) (checked on a CPU only, and not
    under torch.compile). Returns (B, M, K, C) in the dtype of features. Differentiable in features (once, by Triton;
    summed in float32, or float64 in the reference); deterministic, backward too.
    ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    check_gather(features, idx)
    return _group(features, idx, impl)


def three_interpolate(
    features: Float[Tensor, "B M C"],
    weights: Float[Tensor, "B N 3"],
    idx: Int[Tensor, "B N 3"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """Weighted sum of three rows: ``out[b, n] = sum_k weights[b, n, k] features[b, idx[b, n, k]]``.

    features: (B, M, C), any floating dtype. weights, idx: (B, N, 3) of :func:`three_nn`; idx int32 or int64 in
    [0, M) (checked on a CPU only, and not under torch.compile). Summed in float32 (float64 in the reference),
    returned as (B, N, C) in the dtype of features. Differentiable in features and weights (once, by Triton);
    deterministic, backward too.
    Source: Qi et al. 2017, eq. 2. ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    check_gather(features, idx)
    check_float("weights", weights)
    check_same(features=features, weights=weights)
    if weights.shape != idx.shape or idx.shape[-1] != 3:
        shapes = f"{tuple(weights.shape)} and {tuple(idx.shape)}"
        raise ValueError(f"weights, idx: expected the same shape (B, N, 3), got {shapes}")
    return _three_interpolate(features, weights, idx, impl)


def _group(features: Tensor, idx: Tensor, impl: Impl) -> Tensor:
    rows = take_rows(features.flatten(0, 1), row_index(idx, features.shape[1]).reshape(-1, 1), impl=impl)
    return rows.view(*idx.shape, features.shape[2])


def _three_interpolate(features: Tensor, weights: Tensor, idx: Tensor, impl: Impl) -> Tensor:
    index = row_index(idx, features.shape[1]).flatten(0, 1)
    rows = take_rows(features.flatten(0, 1), index, weights.flatten(0, 1), impl=impl)
    return rows.view(*idx.shape[:2], features.shape[2])


def row_index(idx: Int[Tensor, "B ..."], num_points: int) -> Int[Tensor, "B ..."]:
    """Indices into the rows of all clouds, (B N)."""
    num_rows = idx.shape[0] * num_points
    dtype = index_dtype(num_rows)
    cloud = torch.arange(0, num_rows, num_points, dtype=dtype, device=idx.device)
    return idx.to(dtype) + cloud.view(-1, 1, 1)


def index_dtype(num_rows: int) -> torch.dtype:
    """Int32 where it can count the rows: half the bytes to load and to sort."""
    return torch.int32 if num_rows < 2**31 else torch.int64


def check_gather(features: Tensor, idx: Tensor) -> None:
    """Raise ``ValueError`` unless ``idx`` (B, M, K) can index the rows of ``features`` (B, N, C)."""
    check_float("features", features)
    if features.ndim != 3 or 0 in features.shape[1:]:
        raise ValueError(f"features: expected shape (B, N, C) with N, C >= 1, got {tuple(features.shape)}")
    if not isinstance(idx, Tensor) or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx: expected int32 or int64, got {getattr(idx, 'dtype', type(idx).__name__)}")
    if idx.ndim != 3:
        raise ValueError(f"idx: expected shape (B, M, K), got {tuple(idx.shape)}")
    check_same(features=features, idx=idx)
    if idx.device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
        low, high = (v.item() for v in idx.aminmax())
        if low < 0 or high >= features.shape[1]:
            raise ValueError(f"idx: expected values in [0, {features.shape[1]}), got {low} to {high}")
