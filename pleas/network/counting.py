"""Counting multiply-adds so that the number depends on shapes alone, never on the kernel that torch picks.

`scaled_dot_product_attention` becomes another op on every device and in every version of torch, and torch's counter
knows some of them only: what it does not know counts as nothing. So attention is made to run as two matrix products
while we count, and where a forward insists on a kernel of its own, that kernel has a formula here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

# What `scaled_dot_product_attention` turns into, from torch 2.11 to 2.15; not every version has all of them.
ATTENTION_KERNELS = (
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_triton_scaled_dot_attention",
)


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """FLOPs of softmax(q k^T) v: 2 for every multiply-add of the two products, nothing for softmax and mask.

    Shapes (..., heads, L, E), (..., heads or fewer, S, E) and (..., heads or fewer, S, E_v): with grouped queries the
    fewer heads of key and value are used again, so the query's heads count. A causal mask saves nothing.
    """
    *heads, tokens, width = query
    return 2 * prod(heads) * tokens * key[-2] * (width + value[-1])


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """The formula of every attention kernel that this version of torch has."""
    return {getattr(aten, name): attention_flops for name in ATTENTION_KERNELS if hasattr(aten, name)}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """A counter of everything run inside. Attention runs as matrix products; the fused layers of
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which hide theirs, are switched off meanwhile."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=attention_formulas()) as counter,
        ):
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
