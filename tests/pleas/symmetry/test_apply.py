"""Permutations act on positions, states and activations consistently."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pleas.symmetry import (
    Permutation,
    Program,
    Symmetry,
    UnitPermutation,
    execute,
    identity,
    permute_state,
    position_maps,
    random,
    state_of,
    trace,
)
from tests.cases import CASES, Case, randomise


class Vit(nn.Module):
    """Two attention blocks with a fused qkv projection, class token and positions."""

    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.place = nn.Parameter(torch.randn(1, 17, dim))
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 20), nn.Linear(20, dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        n, length, dim = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, dim)
        x = x + self.proj(y)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x[:, 0])


ALL = CASES | {"vit": Case(Vit)}


@cache
def traced(name: str) -> tuple[nn.Module, Symmetry]:
    model = ALL[name].model()
    return model, trace(model, ALL[name].example(), strict=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_heads_have_inner_dimensions() -> None:
    _, symmetry = traced("vit")
    heads = next(c for c in symmetry.classes if c.kind == "head")
    assert heads.size == 3
    assert [[c.size for c in inner] for inner in heads.children] == [[4, 4]] * 3
    qk, v = heads.children[1]
    places = {(a.tensor, a.dim): a.index for a in qk.axes}
    assert places["qkv.weight", 0][0].tolist() == [4, 16]  # head 1, dimension 0: its rows of q and of k
    assert {(a.tensor, a.dim) for a in v.axes} == {("qkv.weight", 0), ("qkv.bias", 0), ("proj.weight", 1)}
    assert [c.kind for c in symmetry.classes].count("output") == 1
    stream = max((c for c in symmetry.classes if "token" in {a.tensor for a in c.axes}), key=lambda c: c.size)
    assert (stream.size, stream.widenable, stream.reason) == (12, True, "")
    assert heads.widenable
    assert "position in the kernel" in symmetry.fixed["patch.weight", 2]
    assert symmetry.fixed["place", 1] == "add in the model fixes its position"


@pytest.mark.parametrize("name", ["vit", "grouped", "plain", "shared_conv"])
def test_the_identity_moves_nothing(name: str) -> None:
    model, symmetry = traced(name)
    state = state_of(symmetry.program, model)
    assert position_maps(symmetry, identity(symmetry)) == {}
    assert all(permute_state(symmetry, state, identity(symmetry))[k] is v for k, v in state.items())


@pytest.mark.parametrize("name", ALL)
def test_maps_are_permutations_and_give_the_permuted_state(name: str) -> None:
    model, symmetry = traced(name)
    state = state_of(symmetry.program, model)
    permutation = random(symmetry, seeded(1))
    maps = position_maps(symmetry, permutation)
    permuted = permute_state(symmetry, state, permutation)
    for (tensor, dim), places in maps.items():
        assert torch.equal(places.sort().values, torch.arange(len(places))), (tensor, dim)
        assert (symmetry.axis(tensor, dim).cls[places] == symmetry.axis(tensor, dim).cls).all()
    for tensor, value in state.items():
        if symmetry.groups.get(tensor, 1) == 1:
            for dim in range(value.dim()):
                value = value.index_select(dim, maps.get((tensor, dim), torch.arange(value.shape[dim])))
            assert torch.equal(permuted[tensor], value)
        assert torch.equal(permuted[tensor].flatten().sort().values, state[tensor].flatten().sort().values)


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_grouped_weights_on_their_virtual_axis(name: str) -> None:
    """A grouped weight is a block-diagonal ordinary weight: permute that one, and read the blocks off again."""
    model, symmetry = traced(name)
    state = state_of(symmetry.program, model)
    permutation = random(symmetry, seeded(2))
    maps, permuted = position_maps(symmetry, permutation), permute_state(symmetry, state, permutation)

    def dense(weight: Tensor, groups: int) -> Tensor:
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        full = torch.zeros(groups, blocks.shape[1], groups, *blocks.shape[2:])
        for g in range(groups):
            full[g, :, g] = blocks[g]
        return full.reshape(weight.shape[0], -1, *weight.shape[2:])

    assert symmetry.groups
    for tensor, groups in symmetry.groups.items():
        full = dense(state[tensor], groups)
        for dim in (0, 1):
            full = full.index_select(dim, maps.get((tensor, dim), torch.arange(full.shape[dim])))
        assert torch.equal(full, dense(permuted[tensor], groups))


def test_other_names_of_a_tied_tensor_are_permuted_along() -> None:
    model, symmetry = traced("shared_conv")
    permuted = permute_state(symmetry, dict(model.state_dict()), random(symmetry, seeded(3)))
    assert torch.equal(permuted["again.weight"], permuted["shared.weight"])
    assert not torch.equal(permuted["again.weight"], model.state_dict()["again.weight"])


def test_the_output_stays_in_place_unless_asked_for() -> None:
    model, symmetry = traced("residual")
    images = CASES["residual"].example()
    state = state_of(symmetry.program, model)
    assert symmetry.output == (len(symmetry.classes) - 1,)
    permutation = random(symmetry, seeded(4), only=symmetry.output)
    output = execute(symmetry.program.graph, [permute_state(symmetry, state, permutation)], [images])[0]
    torch.testing.assert_close(output, model(images)[:, permutation[-1].perm], rtol=1e-5, atol=1e-5)


def without_inner(permutation: Permutation) -> Permutation:
    """The same with inner units in place: DimUnits are about top-level units."""

    def still(part: UnitPermutation) -> UnitPermutation:
        return UnitPermutation(torch.arange(len(part.perm)), inside(part))

    def inside(part: UnitPermutation) -> tuple[tuple[UnitPermutation, ...], ...]:
        return tuple(tuple(still(inner) for inner in unit) for unit in part.children)

    return tuple(UnitPermutation(part.perm, inside(part)) for part in permutation)


def values_of(program: Program, state: dict[str, Tensor], images: Tensor) -> dict[fx.Node, Tensor]:
    """Every intermediate value of one run."""
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, args: list, kwargs: list) -> None:
        found[node] = node.target(*args[0], **kwargs[0])  # type: ignore[operator]

    with torch.no_grad():
        execute(program.graph, [state], [images], keep)
    return {node: value for node, value in found.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", ALL)
def test_activations_move_as_their_dimensions_say(name: str) -> None:
    """On permuted weights every activation is the original one with its units moved."""
    model, symmetry = traced(name)
    images = ALL[name].example(7)
    state = state_of(symmetry.program, model)
    permutation = without_inner(random(symmetry, seeded(5)))
    before = values_of(symmetry.program, state, images)
    after = values_of(symmetry.program, permute_state(symmetry, state, permutation), images)
    checked = 0
    for node, value in before.items():
        expected = value
        for dim in range(value.dim()):
            units = symmetry.value(node.name, dim)
            if units is None:
                continue
            assert len(units.cls) == value.shape[dim]
            index = torch.arange(value.shape[dim])
            for cls, part in enumerate(permutation):
                for unit, origin in enumerate(part.perm.tolist()):
                    place, source = (
                        torch.nonzero((units.cls == cls) & (units.unit == u)).flatten()
                        for u in (unit, origin)
                    )
                    index[place] = source
            expected = expected.index_select(dim, index)
            checked += 1
        torch.testing.assert_close(after[node], expected, rtol=1e-4, atol=1e-4, msg=node.name)
    assert checked > 3


def test_units_along_flattened_concatenated_and_sliced_dimensions() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.a(x), self.b(x)], 1)
            return self.head(torch.tanh(y).flatten(1) + y[:, 2:3].mean())

    model = randomise(Shapes().eval(), seeded(0))
    symmetry = trace(model, torch.randn(2, 3, 2, 2))
    names = {n.target: n.name for n in symmetry.program.graph.nodes if n.op == "call_function"}
    cat = symmetry.value(names[torch.ops.aten.cat.default], 1)
    flat = symmetry.value(names[torch.ops.aten.view.default], 1)
    assert cat is not None
    assert flat is not None
    assert cat.cls.tolist() == [0, 0, -1, 0, 1, 1]  # channel 2 is picked out by the slice
    assert cat.unit.tolist() == [0, 1, -1, 2, 0, 1]
    assert flat.cls.tolist() == [c for c in cat.cls.tolist() for _ in range(4)]
    assert torch.equal(flat.unit, symmetry.axis("head.weight", 1).unit)
    assert symmetry.value(names[torch.ops.aten.cat.default], 2) is None
    assert symmetry.value(names[torch.ops.aten.cat.default], 0) is None
    with pytest.raises(KeyError, match=r"the program reads no tensor named 'c\.weight'"):
        symmetry.axis("c.weight", 0)


def test_the_table_as_plain_data() -> None:
    _, symmetry = traced("option_a")
    table = symmetry.describe()
    first = table["classes"][0]
    assert first["coupled"] == (
        "0.0.weight[out] - 0.1.* - 1.first.0.weight[in] - 1.second.0.weight[out] - 1.second.1.* - "
        "2.first.0.weight[in] - 2.selection.weight[in]"
    )
    assert (first["size"], first["kind"], first["widenable"], first["reason"]) == (4, "channel", True, "")
    assert table["classes"][-1]["reason"] == "it is the output"
    assert table["permutable_share"] == 1.0
    assert table["unlisted"] == []
    assert len(table["notes"]) == 2
