"""Ridge regression from second moments, by a solver that cannot fail on a positive semidefinite matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pleas.errors import NonFinite


def ridge_solve(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float, name: str = "layer") -> Tensor:
    """Ridge regression towards a prior, from second moments.

    Minimises `tr(W G W^T) - 2 tr(W C^T) + ridge * mean(diag G) * |W - prior|_F^2` (PLeaS, eq. 3, plus a
    prior).

    gram:  (..., d_in, d_in) float64      cross: (..., d_out, d_in) float64      prior: (..., d_out, d_in)
    ridge: dimensionless, > 0
    Returns (..., d_out, d_in).
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = ridge * torch.where(level > 0, level, 1.0)
    right = cross + damping[..., None, None] * prior
    return damped_solve(gram, damping, right.mT, name).mT


def damped_solve(matrix: Tensor, damping: Tensor, right: Tensor, name: str) -> Tensor:
    """`(M + damping I)^-1 R` for positive semidefinite M (..., d, d), damping (...) > 0 and R (..., d, k).

    Rounding can leave M with eigenvalues a little below zero, and damping that is small against its largest does not
    mend that: where Cholesky fails, eigenvalues below zero count as zero. Raises NonFinite naming the layer.
    """
    if not bool(torch.isfinite(matrix).all() and torch.isfinite(right).all()):
        raise NonFinite(
            f"layer '{name}': its second moments are NaN or infinite. Look at the proxies with `datafree diagnose`, "
            "and check the parents' weights and preprocessing."
        )
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + damping[..., None, None] * eye)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse = (values.clamp_min(0) + damping[..., None]).reciprocal()
    return vectors @ (inverse[..., None] * (vectors.mT @ right))


def dual_ridge(z: Tensor, left: Tensor, ridge: float, name: str) -> Tensor:
    """Z^T (Z Z^T + n damping)^-1 R, transposed: the step from the prior that minimises the ridge objective.

    z: (n, d) float32, left: (n, o) float64. Returns (o, d) float64.
    """
    kernel = (z @ z.T).double() / len(z)
    level = kernel.diagonal().sum() / z.shape[1]  # the mean diagonal of the d x d Gram matrix
    damping = ridge * torch.where(level > 0, level, 1.0)
    return (z.T.double() @ damped_solve(kernel, damping, left, name) / len(z)).T


def dead_positions(variance: Tensor, relative: float = 1e-12) -> Tensor:
    """Positions whose variance is nil against the largest one."""
    return (variance <= relative * variance.max()).nonzero()[:, 0]
