"""The networks of one merge: what is refused, in which words, and that they stay as they were given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pleas import MergeSettings, Parents, check_parents
from pleas.errors import ArchitectureMismatch, InputError, NonFinite
from tests.merging import outputs

SEPARATE = MergeSettings(heads="separate")


def net(seed: int = 0, width: int = 5, classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))


def test_parents_are_frozen_copies_in_evaluation_mode() -> None:
    given = [net(0).train(), net(1).train()]
    parents = Parents.of(given, torch.zeros(2, 6))
    assert parents.count == 2
    assert parents.names == ("a", "b")
    for ours, theirs in zip(parents.modules, given, strict=True):
        assert theirs.training
        assert all(p.requires_grad for p in theirs.parameters())
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())
        x = torch.randn(4, 6)
        assert torch.equal(outputs(ours, x), outputs(copy.deepcopy(theirs).eval(), x))
    given[0][0].weight.data.zero_()  # type: ignore[union-attr]
    assert float(parents.states[0]["0.weight"].abs().sum()) > 0


def test_what_every_stage_reads_of_them() -> None:
    parents = Parents.of([net(0), net(1), net(2, classes=4)], torch.zeros(2, 6), SEPARATE)
    assert [layer.name for layer in parents.layers] == ["0", "3"]
    assert parents.layers is parents.layers
    assert [parents.outputs(p) for p in range(3)] == [3, 3, 4]
    assert parents.settings.heads == "separate"


def test_symmetry_can_be_handed_on() -> None:
    first = Parents.of([net(0), net(1)], torch.zeros(2, 6))
    again = Parents.of([net(0), net(1)], torch.zeros(2, 6), names=("x", "y"), symmetry=first.symmetry)
    assert again.symmetry is first.symmetry
    assert again.names == ("x", "y")


def test_one_and_seventeen_networks_are_no_merge() -> None:
    for count, said in ((0, "0 parents"), (1, "1 parent"), (17, "17 parents")):
        with pytest.raises(InputError, match=f"^{said}: a merge takes 2 to 16 networks of one architecture"):
            check_parents([net()] * count, names=[str(i) for i in range(count)])


def test_every_parent_has_a_name_of_its_own() -> None:
    for names in (("x", "x"), ("x",)):
        with pytest.raises(InputError, match="give each parent a name of its own"):
            check_parents([net(0), net(1)], names=names)


def test_the_pair_and_the_tensors_that_differ_are_named() -> None:
    with pytest.raises(
        ArchitectureMismatch,
        match=r"parents one and three are not one architecture; tensors that differ:\n"
        r"  0\.weight: \(5, 6\) in one, \(7, 6\) in three(.|\n)*Merge checkpoints of the same model definition\.",
    ):
        check_parents([net(0), net(1), net(2, width=7)], names=("one", "two", "three"))
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(
        ArchitectureMismatch, match=r"only in a: 1\.bias, .*\n  only in b: 2\.bias, 2\.weight"
    ):
        check_parents([net(0), other])


def test_other_heads_need_separate_heads() -> None:
    wide = net(1, classes=4)
    with pytest.raises(ArchitectureMismatch, match=r"If only the head differs, ask for separate heads"):
        check_parents([net(0), wide])
    check_parents([net(0), wide], SEPARATE)
    with pytest.raises(ArchitectureMismatch, match="not one architecture"):  # more than the head differs
        check_parents([net(0), net(1, width=7, classes=4)], SEPARATE)


def test_damaged_weights_name_the_parent_and_the_tensor() -> None:
    damaged = net(1)
    damaged[3].bias.data[0] = float("inf")  # type: ignore[union-attr]
    with pytest.raises(NonFinite, match=r"parent b: weights '3\.bias' hold NaN or infinity"):
        check_parents([net(0), damaged])
    with pytest.raises(NonFinite, match="parent late: weights"):
        Parents.of([net(0), damaged], torch.zeros(2, 6), names=("early", "late"))


def test_counters_of_batch_norms_may_be_missing() -> None:
    old = net(1)
    del old[1].num_batches_tracked  # type: ignore[union-attr]
    check_parents([net(0), old])


class _Upwards(nn.Module):
    """Channels between two transposed convolutions, which are no layers of least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 5, 2, 2)
        self.again, self.head = nn.ConvTranspose2d(5, 4, 2, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.up(self.stem(x).relu()).relu()).mean((2, 3)))


def test_units_that_no_layer_touches_are_named_where_activations_match() -> None:
    example = torch.zeros(2, 3, 8, 8)
    said = Parents.of([_Upwards(), _Upwards()], example).notes
    assert any("no layer reads or writes 1 of the classes of units (up.weight" in note for note in said), said
    weights = Parents.of([_Upwards(), _Upwards()], example, MergeSettings(matching="weight")).notes
    assert not any("no layer reads or writes" in note for note in weights)


def test_a_base_is_copied_and_its_head_may_be_another() -> None:
    base = net(5, classes=100).train()
    parents = Parents.of([net(0), net(1)], torch.zeros(2, 6), base=base)
    assert parents.base is not None
    assert not parents.base.training
    assert base.training
    state = parents.base_state
    assert state is not None
    assert torch.equal(state["0.weight"], base[0].weight)  # type: ignore[arg-type]
    assert state["3.weight"].shape == (100, 5)
    said = "the base has another head than the parents (3.weight, 3.bias): these tensors have no task vectors"
    assert any(note.startswith(said) for note in parents.notes)
    alike = Parents.of([net(0), net(1)], torch.zeros(2, 6), base=net(2))
    assert not any("another head" in note for note in alike.notes)


def test_a_base_of_another_architecture_is_refused_by_its_tensors() -> None:
    with pytest.raises(
        ArchitectureMismatch,
        match=r"^the base is no network that parent one was fine-tuned from; tensors that differ:\n"
        r"  0\.weight: \(5, 6\) in one, \(7, 6\) in the base(.|\n)*Give the checkpoint that all parents started from",
    ):
        check_parents([net(0), net(1)], names=("one", "two"), base=net(2, width=7))
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ArchitectureMismatch, match=r"only in a: 1\.bias, .*\n  only in the base: 2\.bias"):
        Parents.of([net(0), net(1)], torch.zeros(2, 6), base=other)


def test_a_damaged_base_and_one_that_computes_something_else_are_refused() -> None:
    damaged = net(1)
    damaged[3].bias.data[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(NonFinite, match=r"^the base: weights '3\.bias' hold NaN or infinity"):
        check_parents([net(0), net(1)], base=damaged)
    other = net(2)
    other[2] = nn.Tanh()
    with pytest.raises(
        ArchitectureMismatch, match=r"parent base computes aten\.tanh where parent a computes"
    ):
        Parents.of([net(0), net(1)], torch.zeros(2, 6), base=other)
