"""Multiply-adds of attention: by hand, by formula, and the same whichever kernel torch picks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pleas
from pleas.network.counting import ATTENTION_KERNELS, attention_flops, attention_formulas, counting

aten = torch.ops.aten
# Ops of torch whose names say attention and which nothing of ours can meet while counting.
NOT_MET = {
    # called by the kernels, where no counter looks; a forward that calls one itself cannot be traced
    "_cudnn_attention_forward",
    "_flash_attention_forward_no_dropout_inplace",
    # the fused layers, which `counting` switches off
    "_native_multi_head_attention",
    "_triton_multi_head_attention",
}
SHAPES = {  # name -> shapes of query, key, value
    "self": ((2, 6, 5, 8), (2, 6, 5, 8), (2, 6, 5, 8)),
    "cross": ((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
    "other values": ((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 12)),
    "grouped queries": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "odd width": ((1, 3, 4, 5), (1, 3, 4, 5), (1, 3, 4, 5)),
    "one token": ((2, 6, 1, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
}


def by_hand(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """Two for every number that is multiplied and added, one at a time."""
    count = 0
    for _ in itertools.product(*(range(size) for size in query[:-2]), range(query[-2]), range(key[-2])):
        count += 2 * query[-1]  # a score
        count += 2 * value[-1]  # its share of the result
    return count


class Attend(nn.Module):
    """One image (N, C, H, W) is read as queries, keys and values of the given shapes; `kernel` is forced if given."""

    def __init__(
        self, shapes: tuple[tuple[int, ...], ...], kernel: SDPBackend | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shapes, self.kernel, self.options = shapes, kernel, options
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (x.flatten()[: prod(shape)].view(shape) * self.scale for shape in self.shapes)
        grouped = query.shape[1] != key.shape[1]
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **self.options)


EXAMPLE = torch.randn(2, 1, 32, 32)


def available() -> list[SDPBackend]:
    """The kernels that the CPU has here."""
    found = []
    for kernel in SDPBackend.__members__.values():
        try:
            Attend(SHAPES["self"], kernel)(EXAMPLE)
        except RuntimeError:
            continue
        found.append(kernel)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_is_what_one_counts_by_hand(name: str) -> None:
    assert attention_flops(*SHAPES[name]) == by_hand(*SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("op", ATTENTION_KERNELS)
def test_every_kernel_counts_the_same(op: str, name: str) -> None:
    if not hasattr(aten, op):
        pytest.skip(f"torch {torch.__version__} has no {op}")
    tensors = [torch.empty(shape, device="meta") for shape in SHAPES[name]]
    with counting() as counter:
        formula = counter.flop_registry[getattr(aten, op)]
    assert formula(*tensors, 0.0, is_causal=True, out_val=(tensors[0],)) == by_hand(*SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_attention_counts_what_one_counts_by_hand_whichever_kernel_is_forced(name: str) -> None:
    forced = [None, SDPBackend.MATH]
    if name not in ("other values", "grouped queries"):  # which not every fused kernel takes
        forced += [kernel for kernel in available() if kernel is not SDPBackend.MATH]
        assert len(forced) > 2, "the CPU has a fused kernel"
    for kernel in forced:
        for options in ({}, {"is_causal": True}, {"scale": 0.3}):
            assert pleas.flops(Attend(SHAPES[name], kernel, **options), EXAMPLE) == by_hand(*SHAPES[name]), (
                kernel
            )


def test_attention_counts_the_same_under_inference_mode() -> None:
    for kernel in (None, *available()):
        module = Attend(SHAPES["cross"], kernel)
        module.forward = torch.inference_mode()(module.forward)  # type: ignore[method-assign]
        assert pleas.flops(module, EXAMPLE) == by_hand(*SHAPES["cross"])


def test_half_precision_counts_the_same() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert pleas.flops(Attend(SHAPES["self"]).to(dtype), EXAMPLE.to(dtype)) == by_hand(*SHAPES["self"])


def test_every_attention_op_of_torch_is_counted_or_known_not_to_be_met() -> None:
    """A new version with a new kernel fails here, and not in someone's merge."""
    names = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    attention = {
        name for name in names if ("attention" in name or "dot_product" in name) and "backward" not in name
    }
    assert "scaled_dot_product_attention" in attention
    composite = {  # made of other ops on every device: the counter sees those
        name
        for name in attention
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CompositeImplicitAutograd")
    }
    with counting() as counter:
        counted = {str(op).partition(".")[2] for op in counter.flop_registry}
    assert attention - composite - counted - NOT_MET == set()


def test_formulas_are_given_for_the_ops_there_are() -> None:
    assert {str(op).partition(".")[2] for op in attention_formulas()} == {
        name for name in ATTENTION_KERNELS if hasattr(aten, name)
    }


@contextmanager
def fused_layers(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Encoder(nn.Module):
    """(N, 1, 32, 32) as 32 tokens of width 32."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.squeeze(1))


def test_fused_transformer_layers_count_their_parts_and_are_left_as_they_were() -> None:
    """torch's own layers hide everything in one op where nothing needs gradients: 0 FLOPs."""
    tokens, width, hidden = 32, 32, 48
    projections = 4 * 2 * tokens * width * width
    attention = by_hand(*[(1, 4, tokens, width // 4)] * 3)
    expected = 2 * (projections + attention + 2 * 2 * tokens * width * hidden)
    encoder = Encoder().eval().requires_grad_(False)
    for enabled in (True, False):
        with fused_layers(enabled):
            assert pleas.flops(encoder, EXAMPLE) == expected
            assert torch.backends.mha.get_fastpath_enabled() is enabled


def test_kernels_and_fused_layers_are_as_before_when_a_forward_fails() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such thing")

    with fused_layers(True), pytest.raises(KeyError):
        pleas.flops(Failing(), EXAMPLE)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


class Reader(nn.Module):
    """Tokens (N, 16, width) read by attention whose values are wider than its keys, or whose queries are learned."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.key, self.value, self.head = nn.Linear(12, 8), nn.Linear(12, 20), nn.Linear(20, 5)
        self.query = nn.Parameter(torch.randn(1, 2, 3, 4)) if learned else nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT

        def by_heads(layer: nn.Module) -> Tensor:
            return layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2)

        query = by_heads(self.query) if isinstance(self.query, nn.Module) else self.query
        read = F.scaled_dot_product_attention(query, by_heads(self.key), by_heads(self.value))
        return self.head(read.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize(("learned", "apart"), [(False, 0.0), (False, 0.5), (False, 1.0), (True, 0.0)])
def test_a_plan_promises_what_is_counted_for_values_of_other_width_and_learned_queries(
    learned: bool, apart: float
) -> None:
    torch.manual_seed(0)
    a, b = Reader(learned).eval(), Reader(learned).eval()
    images = torch.randn(32, 3, 16, 16)
    result = pleas.merge(a, b, [images], apart=apart, settings=pleas.MergeSettings(positions=64, rows=500))
    assert result.flops == result.plan.flops
    assert result.parent_flops == result.plan.parent_flops == pleas.flops(copy.deepcopy(b), images)
