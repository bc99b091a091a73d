"""Parents whose tensors agree and whose functions do not, or that are no functions of one image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from pleas.errors import ArchitectureMismatch, NonFinite, UnsupportedModel
from pleas.guards import (
    changes_input,
    check_forwards,
    check_rows_alone,
    check_same_function,
    ensemble_obstacles,
    parent_names,
    unmatched_classes,
)
from pleas.symmetry import execute, export_program, plain, state_of, trace
from tests.cases import CASES, conv_bn, pooled_head, randomise

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Net(nn.Module):
    """Two convolutions, with the parts that leave no trace in the state dict as arguments."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor] = F.relu,
        eps: float = 1e-5,
        pool: Callable[[Tensor], Tensor] = lambda x: x.mean((2, 3)),
        skip: bool = False,
        then: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.act, self.pool, self.skip, self.then = act, pool, skip, then
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=eps)
        self.second, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y = self.second(x)
        y = self.act(y + (x if self.skip else y))
        return self.then(self.head(self.pool(y)))


def net(seed: int, **arguments: object) -> nn.Module:
    return randomise(Net(**arguments).eval(), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


OTHERS = {
    "gelu": ({"act": F.gelu}, "parent b computes aten.gelu where parent a computes aten.relu"),
    "relu6, which usual images do not tell": (
        {"act": F.relu6},
        "parent b computes aten.hardtanh where parent a",
    ),
    "epsilon": (
        {"eps": 1e-1},
        "parent b computes aten._native_batch_norm_legit_no_training with eps=0.1 where parent a has eps=1e-05 "
        "(module norm)",
    ),
    "pooling": (
        {"pool": lambda x: x.amax((2, 3))},
        "parent b computes aten.amax where parent a computes aten.mean",
    ),
    "wiring": ({"skip": True}, "aten.add of parent b reads other values than that of parent a"),
    "scale": ({"then": lambda x: x * 3}, "parent b computes aten.mul where the other is done"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_first_differing_operation_is_named(kind: str) -> None:
    arguments, what = OTHERS[kind]
    a, b = net(0), net(1, **arguments)
    message = f"the parents' tensors agree, but not what is computed from them: {what}"
    with pytest.raises(ArchitectureMismatch, match=re.escape(message)) as failure:
        check_same_function(export_program(a, IMAGES), [a, b], IMAGES)
    share = re.search(r"give logits that differ by (\S+) of their scale", str(failure.value))
    assert share is not None
    assert float(share[1]) > 1e-4


def test_the_parent_to_blame_is_named_among_several() -> None:
    parents = [net(0), net(1), net(2, act=torch.tanh)]
    program = export_program(parents[0], IMAGES)
    assert check_same_function(program, parents[:2], IMAGES) == ()
    with pytest.raises(
        ArchitectureMismatch, match=r"parent digits computes aten.tanh where parent letters computes"
    ):
        check_same_function(program, parents, IMAGES, ("letters", "shapes", "digits"))
    assert parent_names(28)[-3:] == ("z", "p26", "p27")


def test_a_difference_nobody_will_notice_is_a_note() -> None:
    a, b = net(0), net(1, eps=1.001e-5)
    (note,) = check_same_function(export_program(a, IMAGES), [a, b], IMAGES)
    assert note.startswith(
        "Parent b computes aten._native_batch_norm_legit_no_training with eps=1.001e-05 where parent"
    )
    assert note.endswith("and parent a's way is merged.")


@pytest.mark.parametrize("name", CASES)
def test_parents_of_one_definition_pass(name: str) -> None:
    case = CASES[name]
    parents = [case.model(seed).train() for seed in range(2)]
    assert check_forwards(export_program(parents[0], case.example()), parents, case.example()) == ()


def test_the_same_function_in_other_words_passes() -> None:
    a, b = (
        net(0),
        net(1, act=lambda x: x.clamp_min(0), pool=lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]),
    )
    assert check_forwards(export_program(a, IMAGES), [a, b], IMAGES) == ()


def test_weights_that_give_no_numbers_are_the_parents_fault() -> None:
    a, b = net(0), net(1)
    with torch.no_grad():
        b.get_parameter("second.weight")[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFinite, match="parent b gives logits that are NaN or infinite for random images"):
        check_forwards(export_program(a, IMAGES), [a, b], IMAGES)


# --- in place ---


class InPlace(nn.Module):
    """Scales the images it is given, as if they were its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 6), pooled_head(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.mul_(2).sub_(1))


def test_a_forward_that_writes_into_its_images_is_found() -> None:
    parents = [randomise(InPlace(), torch.Generator().manual_seed(seed)) for seed in range(2)]
    given = IMAGES.clone()
    assert changes_input(parents[0], given)
    assert not changes_input(net(0), given)
    program = export_program(parents[0], given)
    notes = check_forwards(program, parents, given)
    assert notes == tuple(
        f"The forward of parent {name} changes its input in place: give every network a copy of the images."
        for name in "ab"
    )
    states = [state_of(program, parent) for parent in (parents[0], parents[0])]
    first, second = execute(program.graph, states, [given, given])
    assert torch.equal(first, second)
    assert torch.equal(given, IMAGES)


def test_no_parent_sees_what_another_wrote() -> None:
    """Exported graphs are functional; one written by hand need not be."""
    graph = fx.Graph()
    images = graph.placeholder("x")
    images.meta["val"] = IMAGES
    weight = graph.create_node("get_attr", "w")
    graph.output(
        graph.call_function(aten.mul_.Tensor, (graph.call_function(aten.mul_.Tensor, (images, weight)), 2))
    )
    given, states = IMAGES.clone(), [{"w": torch.tensor(3.0)}, {"w": torch.tensor(5.0)}]
    first, second = execute(graph, states, [given, given])
    assert torch.equal(first, IMAGES * 6)
    assert torch.equal(second, IMAGES * 10)
    assert torch.equal(given, IMAGES)


# --- one image at a time ---


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), pooled_head(6)
    )
    message = (
        r"parent b: the logits of an image depend on the other images of its batch: batch norm '1' keeps no running "
        r"statistics \(track_running_stats=False\) and normalises by its batch. A network to merge must treat every"
    )
    with pytest.raises(UnsupportedModel, match=message):
        check_rows_alone(export_program(model, IMAGES), model, IMAGES, "b")


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.mean((2, 3)))
        return y - y.mean(0)


def test_an_op_over_the_images_of_a_batch_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="some op runs over the images of the batch"):
        check_rows_alone(export_program(Centres(), IMAGES), Centres(), IMAGES)


# --- classes nobody matches ---


class Reshaped(nn.Module):
    """Linear, view, transposed convolution: a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear = conv_bn(3, 4), nn.Linear(4, 6 * 4)
        self.up, self.head = nn.ConvTranspose2d(6, 5, 2, stride=2), pooled_head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.stem(x).mean((2, 3))).view(-1, 6, 2, 2)
        return self.head(F.relu(self.up(x)))


def transposed() -> nn.Module:
    ups = [nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(conv_bn(3, 4), *ups, pooled_head(5))


def with_weight_norm() -> nn.Module:
    layers = [parametrizations.weight_norm(nn.Conv2d(w, 6, 3)) for w in (3, 6)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), pooled_head(6))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (transposed, ["1.weight"]),
        (with_weight_norm, ["0.bias"]),
        (lambda: plain(with_weight_norm()), []),
        (Reshaped, []),
        (CASES["residual"].model, []),
        (CASES["grouped"].model, []),
        (CASES["pre_activation"].model, []),
    ],
)
def test_classes_that_no_layer_reads_or_writes_are_listed(
    build: Callable[[], nn.Module], expected: Sequence[str]
) -> None:
    found = unmatched_classes(trace(build(), IMAGES))
    assert len(found) == len(expected)
    for cls, tensor in zip(found, expected, strict=True):
        assert tensor in {axis.tensor for axis in cls.axes}


# --- where two networks side by side are not their ensemble ---


class Experts(nn.Module):
    """A soft mixture of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = conv_bn(3, 6), nn.Linear(6, 2), nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        shares = self.gate(x).softmax(-1)
        return self.head(sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))


def squeeze_head() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def log_probabilities() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6), pooled_head(6), nn.LogSoftmax(-1))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (squeeze_head, ["relu in module 2 comes after the layer whose outputs are averaged"]),
        (log_probabilities, ["_log_softmax in module 2 comes after the layer"]),
        (lambda: Net(then=lambda x: 3 * x), []),
        (
            lambda: Net(then=lambda x: x * x.sigmoid()),
            [
                "mul comes after",
            ],
        ),
        (
            Experts,
            ["the 2 outputs of gate are of no class of units, and there is one copy of them at any budget ("],
        ),
        (CASES["residual"].model, []),
        (CASES["option_a"].model, []),
    ],
)
def test_what_keeps_two_networks_side_by_side_from_the_ensemble(
    build: Callable[[], nn.Module], expected: Sequence[str]
) -> None:
    found = ensemble_obstacles(trace(build(), IMAGES))
    assert len(found) == len(expected), found
    for sentence, start in zip(found, expected, strict=True):
        assert sentence.startswith(start)
