"""The same numbers as the peers' packages, where those are installed (`pip install fusion-bench mergekit`).

Their formulas, as published: TIES keeps of every flat task vector what is at least as large as its
(d - floor(keep d))-th smallest entry, takes the sign of the sum, that of the signs' sum where it is 0, and averages
what agrees; Iso-C is U mean(s) V^T of the sum; TSV-Merge the polar factors of floor(rank / N) singular vectors each;
SLERP the great circle of the normalised tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pleas.comparators.subspace import iso_c, tsv
from pleas.comparators.task_vectors import slerp, ties


def vectors(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 9), "a.bias": (6,), "b.weight": (5, 6)}
    return [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]


def test_ties_equals_fusion_bench() -> None:
    peer = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    given = vectors()
    flat = torch.stack([torch.cat([v.flatten() for v in vector.values()]) for vector in given])
    expected = peer.ties_merging(flat, reset_thresh=20, merge_func="mean")
    found = torch.cat([value.flatten() for value in ties(given, 0.2, 1.0).values()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_iso_c_equals_fusion_bench() -> None:
    peer = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    torch.testing.assert_close(
        iso_c(vectors()), peer.iso_c(vectors(), accelerator="cpu"), rtol=1e-5, atol=1e-5
    )


def test_tsv_equals_fusion_bench() -> None:
    peer = pytest.importorskip("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    expected = peer.compute_and_sum_svd_mem_reduction(vectors(), accelerator="cpu")
    torch.testing.assert_close(tsv(vectors()), dict(expected), rtol=1e-5, atol=1e-5)


def test_slerp_equals_mergekit() -> None:
    peer = pytest.importorskip("mergekit.merge_methods.slerp")
    a, b = (vector["a.weight"] for vector in vectors()[:2])
    torch.testing.assert_close(slerp(a, b, 0.3), peer.slerp(0.3, a, b), rtol=1e-5, atol=1e-5)
